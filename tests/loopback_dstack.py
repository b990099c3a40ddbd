"""A stand-in for the dstack CLI that runs tasks as processes on this machine: apply, ps, run get, logs and stop, as
cloud/dstack.py calls them. A task gets a new folder with what its archive holds, and of its commands the last, because
what the others install is here. The machines are in the folder LOOPBACK_DSTACK.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HOME = Path(os.environ["LOOPBACK_DSTACK"])


def newest(name: str) -> Path:
    return max(HOME.glob(f"{name}.*"), key=lambda path: int(path.suffix[1:]))


def record(machine: Path) -> dict:
    code = (machine / "code").read_text().strip() if (machine / "code").exists() else ""
    stopped = (machine / "stopped").exists()
    status = "running" if not code else "terminated" if stopped else "done" if code == "0" else "failed"
    submission = {"exit_status": int(code) if code else None}
    commands = json.loads((machine / "task").read_text())["commands"]
    spec = {"run_name": machine.stem, "configuration": {"env": {}, "commands": commands}}
    return {
        "status": status,
        "run_spec": spec,
        "latest_job_submission": submission,
        "submitted_at": "2026",
        "cost": 0.1,
    }


def apply(words: list[str]) -> None:
    task = json.loads(Path(words[words.index("-f") + 1]).read_text())
    print(" #  BACKEND  RESOURCES  PRICE\n 1  loopback           $0.01\n")
    if "-y" not in words:
        return
    number = 1 + max((int(path.suffix[1:]) for path in HOME.glob(f"{task['name']}.*")), default=0)
    machine = HOME / f"{task['name']}.{number}"
    machine.mkdir(parents=True)
    (machine / "task").write_text(json.dumps(task))
    for file in task["files"]:
        with tarfile.open(file.split(":")[0]) as tar:
            tar.extractall(machine / "folio", filter="data")
    (machine / "bin").mkdir()
    (machine / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (machine / "bin" / "python").chmod(0o755)
    given = dict(item.partition("=")[::2] for item in task["env"] if "=" in item)
    given |= {item: os.environ[item] for item in task["env"] if "=" not in item}
    keep = {key: value for key, value in os.environ.items() if key.startswith("HF_HUB_") or key in ("HOME", "LANG")}
    env = keep | given | {"PATH": f"{machine}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(machine / "folio"), "PYTHONUNBUFFERED": "1", "HF_HOME": str(machine / "hf")}
    script = f"({task['commands'][-1]}) > ../log 2>&1 & echo $! > ../pid; wait $!; echo $? > ../tmp; mv ../tmp ../code"
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(["bash", "-c", script], cwd=machine / "folio", env=env, start_new_session=True, **pipes)
    while not (machine / "pid").exists():
        time.sleep(0.01)


def main(words: list[str]) -> None:
    match words:
        case ["apply", *rest]:
            apply(rest)
        case ["ps", *_]:
            machines = {newest(path.stem) for path in HOME.glob("*.*")}
            print(json.dumps({"runs": [run for x in machines if (run := record(x))["status"] == "running"]}))
        case ["run", "get", name, "--json"]:
            if not list(HOME.glob(f"{name}.*")):
                print(f"Run {name} not found")
                raise SystemExit(1)
            print(json.dumps(record(newest(name))))
        case ["logs", name]:
            print((newest(name) / "log").read_text(), end="")
        case ["stop", "-y", *rest]:
            machine = newest(rest[-1])
            (machine / "stopped").touch()
            try:
                os.kill(int((machine / "pid").read_text()), signal.SIGKILL if "-x" in rest else signal.SIGINT)
            except ProcessLookupError:
                pass


main(sys.argv[1:])
