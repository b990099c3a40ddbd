"""What the tests of benchmark/, tuner/ and cloud/ share: a script that starts at once, finished runs, and patience."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmark.runs import Spec, defaults

ROOT = Path(__file__).resolve().parent.parent
FAKE = '''"""A script that keeps the contract of the run folder, without PyTorch."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass
class Args:
    env_id: str = "Fake-v1"  # an environment
    seed: int = 1  # random seed
    total_timesteps: int = 1000  # steps
    env_kwargs: dict[str, float] = field(default_factory=dict)  # for the environment
    learning_rate: float = 0.001  # the score is 100 at 0.01, and falls with the distance in decades
    batch_size: int = 32  # without effect
    norm_adv: bool = True  # adds 1 to the score
    run_dir: str = ""  # run folder
    resume: str = ""  # a run folder
    device: str = "cpu"  # without effect
    torch_threads: int = 1  # without effect
    checkpoint_every: int = 100  # steps
    pause: float = 0.0  # seconds at each checkpoint
    fail: str = ""  # at half of the run: an exit code, or "hang"; "stubborn" ignores SIGINT


def main():
    words, given = sys.argv[1:], {}
    while words:
        name = words.pop(0)[2:].replace("-", "_")
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        given[name.removeprefix("no_")] = values or [not name.startswith("no_")]
    pairs = given.pop("env_kwargs", [])
    kinds = {x.name: {bool: lambda x: x is True or x == "True"}.get(x.type, x.type) for x in fields(Args)}
    try:
        args = Args(env_kwargs=dict(zip(pairs[::2], map(float, pairs[1::2]))))
        for name, values in given.items():
            setattr(args, name, kinds[name](values[0]))
    except (KeyError, ValueError) as error:
        print("error: bad flag:", error, file=sys.stderr)
        sys.exit(2)
    if args.env_id.startswith("Bad"):
        print("error: cannot make", args.env_id, file=sys.stderr)
        sys.exit(2)
    folder, step = Path(args.resume or args.run_dir), 0
    if args.resume:
        args = Args(**json.loads((folder / "args.json").read_text())["args"])
        step = json.loads((folder / "checkpoint.pt").read_text())["step"] if (folder / "checkpoint.pt").exists() else 0
        rows = (folder / "episodes.csv").read_text().splitlines()[1:]
        rows = [row for row in rows if row.count(",") == 3 and int(row.split(",")[0]) <= step]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(__file__).name).write_text(Path(__file__).read_text())
        command = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
        described = {"args": asdict(args), "command": command, "commit": "0" * 40, "versions": {"torch": "0"}}
        described |= {"cpu": "a CPU", "threads": 1, "gpu": "", "started": time.ctime()}
        (folder / "args.json").write_text(json.dumps(described))
        rows = []
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{step} {os.getpid()}\\n")
    stubborn = args.fail == "stubborn"
    signal.signal(signal.SIGINT, signal.SIG_IGN if stubborn else lambda *_: sys.exit(130))
    temporary = folder / "episodes.tmp"
    temporary.write_text("".join(row + "\\n" for row in ["step,seconds,return,length", *rows]))
    temporary.replace(folder / "episodes.csv")
    episodes = (folder / "episodes.csv").open("a")
    final = 100 - 30 * abs(math.log10(args.learning_rate / 0.01)) + args.norm_adv + args.seed % 10 / 10
    while step < args.total_timesteps:
        time.sleep(args.pause)
        for _ in range(10):
            step += args.checkpoint_every // 10
            score = final * min(1, step / args.total_timesteps * 2)
            episodes.write(f"{step},{step / 1000},{score},{args.checkpoint_every // 10}\\n")
        episodes.flush()
        if args.fail and not stubborn and step >= args.total_timesteps / 2:
            print("at half of the run")
            time.sleep(1000 if args.fail == "hang" else 0)
            sys.exit(int(args.fail))
        temporary = folder / "checkpoint.tmp"
        temporary.write_text(json.dumps({"step": step}))
        temporary.replace(folder / "checkpoint.pt")
    result = {"final_return": final, "eval_return_mean": final + 1, "eval_return_std": 1.0, "eval_episodes": 20}
    result |= {"eval_truncated": 0, "steps": step, "seconds": step / 1000, "sps": 1000.0, "peak_memory_mb": 10.0}
    (folder / "agent.safetensors").write_text("weights")
    temporary = folder / "result.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(folder / "result.json")
    (folder / "checkpoint.pt").unlink()


if __name__ == "__main__":
    main()
'''


def fake_script(folder: Path, name: str = "fake") -> Path:
    """Write the fake script into a folder."""
    path = folder / f"{name}.py"
    path.write_text(FAKE)
    return path


def finish(spec: Spec, returns=(1.0,) * 200, final_return: float | None = ..., **result) -> Path:
    """Write a finished run folder for a Spec. Its episodes have these returns, at equal distances."""
    folder, source = spec.folder, spec.script.read_text()
    folder.mkdir(parents=True)
    known = {name: None if value is ... else value for name, value in defaults(source).items()}
    described = {"args": known | spec.flags, "command": [str(spec.script), *spec.words], "commit": "0" * 40}
    described |= {"versions": {"torch": "2.0"}, "cpu": "a CPU", "threads": 1, "gpu": ""}
    described |= {"started": "Sun Nov 29 12:00:00 2026"}
    (folder / "args.json").write_text(json.dumps(described))
    (folder / spec.script.name).write_text(source)
    length = spec.flags["total_timesteps"] // len(returns)
    rows = [f"{(i + 1) * length},{i / 10},{value},{length}\n" for i, value in enumerate(returns)]
    (folder / "episodes.csv").write_text("step,seconds,return,length\n" + "".join(rows))
    last = sum(returns[-100:]) / len(returns[-100:]) if final_return is ... else final_return
    found = {"final_return": last, "eval_return_mean": last, "eval_return_std": 0.0, "eval_episodes": 20}
    found |= {"eval_truncated": 0, "steps": spec.flags["total_timesteps"], "seconds": 60.0, "sps": 100.0}
    (folder / "result.json").write_text(json.dumps(found | {"peak_memory_mb": 300.0} | result))
    return folder


def until(condition, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def run(*words, cwd: Path = ROOT, env: dict | None = None, code: int = 0) -> subprocess.CompletedProcess:
    """`python WORDS`, which ends with this exit code and without a traceback."""
    command, env = [sys.executable, *map(str, words)], os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    told = f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code and "Traceback" not in done.stderr, told
    return done


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
