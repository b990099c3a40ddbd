"""Commands on rented machines, through dstack (https://dstack.ai), whose CLI is installed apart.

    uv tool install 'dstack>=0.22,<0.23'      # then a server and a login: docs/cloud.md, from nothing to a suite
    export HF_TOKEN=hf_... FOLIO_HUB=you/folio-dev
    python cloud/dstack.py fleet              # once: from where machines may be rented; rents none
    python cloud/dstack.py -- python algos/ppo_atari.py --env-id ALE/Pong-v5       # short for: submit -- ...
    python cloud/dstack.py submit --dry-run --max-price 0.5 -- python algos/ppo_atari.py     # machines and prices only
    python cloud/dstack.py submit --template gpus --many atari -- python benchmark/run.py atari --gpus 0 1 2 3
    python cloud/dstack.py list               # and: logs NAME, stop NAME

A job is a dstack task from a template beside this file: `cpu`, `gpu` (one), `gpus` (several on one machine), or a file
of your own; `auto` takes gpu for scripts named *_atari or with --device cuda, else cpu. The task gets

    folio.tgz           the working tree: what git tracks or does not ignore, but for docs/plots and benchmark/results,
                        and as much of .git as tells commit and uncommitted changes, so that args.json is true
    cloud/job.py        as the last command: it pulls the run, resumes it, pushes at checkpoints
    HF_TOKEN, FOLIO_HUB as environment; the token goes from your environment to the dstack server, into no file and no
                        command line

What is submitted a second time while it is active is not started again. What is lost with its machine is started again
by dstack (retry in the template) and goes on from the Hub. The result is on the Hub: `python cloud/hub.py pull NAME`.

`Dstack` is the backend of benchmark/run.py and tuner/run.py with --backend dstack.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import tyro
import yaml
from huggingface_hub import constants, get_token

from cloud import hub as hf
from cloud.hub import ERRORS, ROOT, Remote, fail
from cloud.job import check_flags, flags_in, is_same, script_of

HERE = Path(__file__).resolve().parent
ENDED = "terminated", "failed", "done"  # dstack's final statuses
LEFT_OUT = "docs/plots/", "benchmark/results/", "runs/"  # large, and no run reads them; dstack takes 2 MB of code
INSTALL = "uv tool install 'dstack>=0.22,<0.23'"
LOOK, WAIT_LINE = 30.0, 600.0  # seconds between two looks at all jobs; between two lines of a job that waits
SILENCE = 300.0  # seconds after which a dstack server that does not answer is one that cannot be reached


class CloudError(OSError):
    """dstack said no, or nothing; in one line."""


# -------------------------------------------------------------------------------------------------- dstack's own CLI


def find_cli() -> str:
    """FOLIO_DSTACK, or dstack on PATH."""
    path = os.environ.get("FOLIO_DSTACK") or shutil.which("dstack")
    if not path or not shutil.which(path):
        fail(f"the dstack CLI is not installed: {INSTALL}; or FOLIO_DSTACK names it")
    return path


def call(*words: str, cwd: Path | None = None, stdin: str | None = None) -> str:
    """What `dstack WORDS` prints; a CloudError if it fails."""
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    if token := get_token():
        env["HF_TOKEN"] = token  # a task names it, and dstack reads it here
    feed = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    apart = {"start_new_session": True, "timeout": SILENCE}  # a Ctrl-C that is meant for us must not cut it off
    try:
        done = subprocess.run([find_cli(), *words], cwd=cwd, env=env, capture_output=True, text=True, **feed, **apart)
    except subprocess.TimeoutExpired:
        raise CloudError(f"dstack {words[0]}: no answer for {SILENCE:g} seconds")
    if done.returncode:
        raise CloudError(f"dstack {words[0]}: {complaint(done.stdout + done.stderr, token)}")
    return done.stdout


def complaint(text: str, token: str | None) -> str:
    """What dstack complains of, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = lines[-1:] if "Traceback (most recent call last)" in text else lines
    line = " ".join(lines) or "it failed and said nothing"
    return (line.replace(token, "***") if token else line)[-400:]


def run_of(name: str) -> dict | None:
    """dstack's record of a run, None if it has none."""
    try:
        return json.loads(call("run", "get", name, "--json"))
    except CloudError as error:
        if "not found" in str(error):
            return None
        raise


def active() -> dict[str, dict]:
    """Runs that have not ended (and, if there is none, the last that has), by name."""
    return {run["run_spec"]["run_name"]: run for run in json.loads(call("ps", "--json"))["runs"]}


def status(run: dict) -> str:
    words = [run["status"], run.get("status_message"), run.get("error")]
    return ", ".join(dict.fromkeys(word for word in words if word))


# --------------------------------------------------------------------------------------------------------- a task


def task_name(name: str) -> str:
    """A run's name as dstack takes them: lower case, 41 characters at most."""
    if re.fullmatch("[a-z][a-z0-9-]{1,40}", name):
        return name
    short = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return f"run-{short[:28].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def default_name(command: list[str]) -> str:
    """{env}__{script}__{seed}__{time}, as the scripts name their folders."""
    words = [part for word in command[script_of(command) :] for part in word.split("=", 1)]
    given = dict(zip(words, words[1:]))
    env = re.sub("[^A-Za-z0-9.]+", "-", given.get("--env-id", "default")).strip("-.")
    return f"{env}__{Path(words[0]).stem}__{given.get('--seed', '1')}__{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def template_for(template: str, command: list[str]) -> Path:
    if template == "auto":
        scripts = [Path(word).stem for word in command if word.endswith(".py")]
        is_gpu = any(script.endswith("_atari") for script in scripts) or "cuda" in command
        template = "gpu" if is_gpu else "cpu"
    path = Path(template) if template.endswith((".yml", ".yaml")) else HERE / f"{template}.dstack.yml"
    if not path.is_file():
        there = sorted(x.name.removesuffix(".dstack.yml") for x in HERE.glob("*.dstack.yml"))
        fail(f"there is no template {template}; there are {', '.join(there)}, or paths of .yml files")
    return path


def make_task(template: Path, name: str, command: list[str], repo: str, changes: dict, env: dict, many: bool) -> dict:
    """The template, filled in. `changes` are keys of the task, or of its resources."""
    try:
        task = yaml.safe_load(template.read_text())
        if task["type"] != "task":
            raise ValueError("its type is not task")
        env = {"FOLIO_HUB": repo, "FOLIO_RUN": name} | env
        if constants.ENDPOINT != "https://huggingface.co":
            env["HF_ENDPOINT"] = constants.ENDPOINT
        task["env"] = [*task.get("env", []), *(f"{key}={value}" for key, value in env.items())]
        job = ["python", "cloud/job.py", name, *(["--many"] if many else []), "--", *command]
        task["commands"] = [*task["commands"], f"exec {shlex.join(job)}"]  # exec: so that signals reach it
        task |= {"name": task_name(name), "files": ["folio.tgz:folio.tgz"]}
        for key, value in changes.items():
            if value is not None:
                (task["resources"] if key in ("cpu", "memory", "gpu", "disk") else task)[key] = value
        return task
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        fail(f"template {template} cannot be used: {' '.join(str(error).split())}")


def git(*words, cwd: Path = ROOT) -> str:
    done = subprocess.run(["git", *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"git {words[0]} fails in {cwd}, and a job has to know its commit: {' '.join(done.stderr.split())}")
    return done.stdout


def pack(target: Path, root: Path = ROOT) -> None:
    """The working tree as a .tgz, with the commit and its trees as .git: without a single file's history, which
    `git describe --dirty` does not need."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root).split("\0")
    names = [name for name in listed if name and not name.startswith(LEFT_OUT) and (root / name).is_file()]
    with tempfile.TemporaryDirectory(prefix="folio-") as aside:
        bare = Path(aside) / "folio"
        upload = "git -c uploadpack.allowFilter=true upload-pack"
        shallow = ["--depth=1", "--filter=blob:none", "--no-checkout", "--no-tags", f"--upload-pack={upload}"]
        git("clone", "-q", *shallow, root.resolve().as_uri(), bare, cwd=root)
        git("read-tree", "HEAD", cwd=bare)
        tracked = git("ls-files", "-z", cwd=bare).split("\0")
        if absent := [name for name in tracked if name.startswith(LEFT_OUT)]:
            git("update-index", "--skip-worktree", *absent, cwd=bare)
        git("remote", "remove", "origin", cwd=bare)

        def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = 0
            info.uname = info.gname = "root"
            return info

        with tarfile.open(target, "w:gz") as tar:
            tar.add(bare / ".git", ".git", filter=anonymous)
            for name in names:
                tar.add(root / name, name, filter=anonymous)


def plan(folder: Path, task: dict) -> str:
    """What dstack would do: the task's terms, and the machines that fit with their prices."""
    (folder / "task.dstack.yml").write_text(json.dumps(task, indent=2))  # JSON is YAML
    text = call("apply", "-f", "task.dstack.yml", cwd=folder, stdin="n\n")
    lines = [line.rstrip() for line in text.splitlines() if not re.search(r"Exiting|\[y/n\]", line)]
    text = "\n".join(lines).strip()
    if "has no fleets" in text:
        raise CloudError("dstack has no fleet yet: python cloud/dstack.py fleet creates one, which costs nothing")
    if "No matching instance offers" in text:
        terms = {**task["resources"], "spot_policy": task.get("spot_policy"), "max_price": task.get("max_price")}
        asked = ", ".join(f"{key} {value}" for key, value in terms.items())
        raise CloudError(f"no machine that dstack can rent fits: {asked}")
    return text


def apply(folder: Path, task: dict) -> None:
    (folder / "task.dstack.yml").write_text(json.dumps(task, indent=2))
    call("apply", "-f", "task.dstack.yml", "-y", "-d", cwd=folder)


def make_repository(hub: hf.Hub) -> None:
    """It is there afterwards, and the token may see it: better known here than on a machine that costs."""
    try:
        hf.create(hub, private=True)
    except ERRORS as error:
        fail(f"{hub.repo}: {hf.reason(error)}")


# ---------------------------------------------------------------------------------------------- the runner's backend


@dataclass
class Handle:
    """A job of the runner: which run it is, and how it stands."""

    name: str
    task: str  # its name in dstack
    command: list[str]  # as at home
    folder: Path
    log: Path
    code: int | None = None
    said: str = ""  # what was noted in the log last, and when
    said_at: float = 0.0
    shown: int = 0  # bytes of dstack's log that are in ours
    head: str | None = None  # of the run's branch, when it was looked at last


class Dstack:
    """Runs as dstack tasks, one task each: the runner's `Backend`.

    They outlive the runner if it is killed; the next one finds them. What they do comes from the Hub: the episodes so
    far whenever a job has pushed, everything at the end.
    """

    def __init__(self, runs_dir: Path, template: str, scripts: Path, folders: list[Path]):
        self.runs_dir, self.template = runs_dir.resolve(), template
        if not scripts.resolve().is_relative_to(ROOT):
            fail(f"the scripts in {scripts} are not below {ROOT}, and a job in the cloud has nothing else")
        if template != "auto":
            template_for(template, [])
        for folder in folders:
            hf.check_name(self.name_of(folder))
        self.hub = hf.open_hub(None)
        if not get_token():
            fail("no token for the Hub: export HF_TOKEN=hf_..., or hf auth login")
        try:
            active()  # the CLI is there, the server answers, the login is good
        except CloudError as error:
            fail(str(error))
        make_repository(self.hub)
        self.aside = tempfile.TemporaryDirectory(prefix="folio-")
        self.here = Path(self.aside.name)
        pack(self.here / "folio.tgz")
        self.handles: list[Handle] = []
        self.planned: set[Path] = set()
        self.looked = 0.0

    def name_of(self, folder: Path) -> str:
        """A run's name: the path of its folder below runs/."""
        return folder.resolve().relative_to(self.runs_dir).as_posix()

    def submit(self, command: list[str], env: dict[str, str], resources) -> Handle:
        """A run, unless a job is making it already or the Hub has its result."""
        command, folder = self.translate(command)
        name, at_home = self.name_of(folder), [command[0], str(ROOT / command[1]), *command[2:]]
        handle = Handle(name, task_name(name), at_home, folder, resources.log)
        path = template_for(self.template, command)
        changes = {"cpu": f"{resources.threads}.."} if resources.threads > 2 else {}
        task = make_task(path, handle.name, command, self.hub.repo, changes, env, many=False)
        if path not in self.planned:
            print(plan(self.here, task), flush=True)
            self.planned.add(path)
        try:
            run = run_of(handle.task)
            if run and run["status"] not in ENDED:
                if run["run_spec"]["configuration"]["commands"][-1] != task["commands"][-1]:
                    stop = f"python cloud/dstack.py stop {handle.task}"
                    raise CloudError(f"{handle.task} is active already, by another command; to end it: {stop}")
                self.note(handle, f"{handle.task} is active already: {status(run)}")
            elif not self.is_made(handle):
                apply(self.here, task)
                self.note(handle, f"submitted as {handle.task}")
            self.handles.append(handle)
        except (CloudError, *ERRORS) as error:
            self.note(handle, f"could not be submitted: {error if isinstance(error, CloudError) else hf.reason(error)}")
            handle.code = 1
        return handle

    def translate(self, command: list[str]) -> tuple[list[str], Path]:
        """The runner's command as it is written on a machine that has only the repository, and the run folder."""
        script, words = Path(command[1]).resolve(), command[2:]
        given = dict(zip(words, words[1:]))
        folder = Path(given.get("--resume") or given["--run-dir"]).resolve()
        if "--resume" in given:  # the job finds out by itself whether there is something to resume
            try:
                words = list(json.loads((folder / "args.json").read_text())["command"])[1:]
            except (OSError, ValueError, KeyError, TypeError):
                raise CloudError(f"{folder / 'args.json'} does not tell the command to go on with in the cloud")
        return ["python", script.relative_to(ROOT).as_posix(), *flags_in(words)], folder

    def is_of(self, handle: Handle, run: Remote) -> bool:
        """Whether what the Hub has was made by the handle's command, not by an earlier one for a run of this name."""
        return is_same(run.files, lambda path: hf.read(self.hub, run, path), handle.command)

    def is_made(self, handle: Handle) -> bool:
        """Whether the Hub has the result, which is then pulled. If it has nothing, it gets what was begun here."""
        running, finished = hf.find(self.hub, handle.name)
        if finished and finished.finished and self.is_of(handle, finished):
            self.note(handle, f"{self.hub.repo} has its result")
            handle.code = self.pull(handle, finished)
        elif not running and not finished and (handle.folder / "checkpoint.pt").exists():
            hf.push(self.hub, handle.folder, handle.name)
        return handle.code is not None

    def poll(self, handle: Handle) -> int | None:
        if handle.code is None and time.monotonic() - self.looked > LOOK:
            self.look()
            self.looked = time.monotonic()
        return handle.code

    def look(self) -> None:
        """How the jobs are."""
        self.handles = [handle for handle in self.handles if handle.code is None]
        try:
            runs, heads = active(), hf.heads(self.hub)
            for handle in self.handles:
                self.follow(handle, runs.get(handle.task) or run_of(handle.task), heads)
        except (CloudError, *ERRORS) as error:
            for handle in self.handles:
                text = error if isinstance(error, CloudError) else hf.reason(error)
                self.note(handle, f"cannot be looked at, which is tried again: {text}")

    def follow(self, handle: Handle, run: dict | None, heads: dict[str, str]) -> None:
        now = status(run) if run else "gone"
        if run and run["status"] in ("running", *ENDED):
            with suppress(CloudError):
                log = call("logs", handle.task).encode()
                with handle.log.open("ab") as file:
                    file.write(log[handle.shown if len(log) >= handle.shown else 0 :])
                handle.shown = len(log)
        if now != handle.said or not now.startswith("running") and time.monotonic() - handle.said_at > WAIT_LINE:
            self.note(handle, now)  # of a job that waits for a machine also when nothing changes: it does not hang
        head = heads.get(hf.branch_of(handle.name))
        if head and head != handle.head and not (handle.folder / "checkpoint.pt").exists():
            there = Remote(handle.name, head, hf.tree(self.hub, handle.name, head))
            if self.is_of(handle, there):
                hf.glance(self.hub, there, handle.folder)
            handle.head = head
        if run is None or run["status"] in ENDED:
            handle.code = self.end(handle, run)

    def end(self, handle: Handle, run: dict | None) -> int:
        """Pull what a job has left; its exit code."""
        code = ((run or {}).get("latest_job_submission") or {}).get("exit_status")
        if run and run["status"] == "done":
            code = 0
        _, finished = hf.find(self.hub, handle.name)
        if code == 0 and finished and finished.finished:
            return self.pull(handle, finished)
        return 1 if code is None else code

    def pull(self, handle: Handle, finished: Remote) -> int:
        if not (handle.folder / "checkpoint.pt").exists():
            shutil.rmtree(handle.folder, ignore_errors=True)  # a copy of some of what comes now
        handle.folder.parent.mkdir(parents=True, exist_ok=True)
        hf.fetch(self.hub, finished, handle.folder)
        return 0

    def stop(self, handle: Handle, force: bool) -> None:
        """Its machine is given back when it has pushed its last checkpoint, which is not waited for."""
        if handle.code is not None:  # it has ended, or is another runner's
            return
        try:
            call("stop", "-y", *(["-x"] if force else []), handle.task)
            handle.code = 130
        except CloudError as error:
            self.note(handle, f"could not be stopped: {error}")
            if force:
                print(f"{handle.name} may go on in the cloud: dstack stop {handle.task} ({error})", file=sys.stderr)
                handle.code = 130

    def leave(self, handle: Handle) -> None:
        handle.code = 130  # the other follows the same job

    def forget(self, folder: Path) -> None:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        with suppress(*ERRORS):  # mostly that there is none
            self.hub.api.delete_branch(self.hub.repo, branch=hf.branch_of(self.name_of(folder)))

    def note(self, handle: Handle, text: str) -> None:
        handle.said, handle.said_at = text, time.monotonic()
        with handle.log.open("a") as file:
            file.write(f"# {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, dstack: {text}\n")


# --------------------------------------------------------------------------------------------------- the commands


@dataclass
class Submit:
    """a command on a rented machine; the command stands behind --"""

    name: str | None = None
    """the run's name, on the Hub and below runs/; by default {env}__{script}__{seed}__{UTC time}"""
    many: str | None = None
    """the command makes many runs by itself, all below this folder of runs/"""
    template: str = "auto"
    """cpu, gpu, gpus, or the path of a template of your own; auto: by the script"""
    cpu: str | None = None
    """instead of the template's: cores, such as 4.. or 8"""
    memory: str | None = None
    """such as 32GB.."""
    gpu: str | None = None
    """such as 24GB:1, or H100:4"""
    disk: str | None = None
    """such as 100GB.."""
    spot_policy: Literal["spot", "on-demand", "auto"] | None = None
    """whether the machine may be taken away"""
    max_price: float | None = None
    """dollars an hour"""
    max_duration: str | None = None
    """such as 6h; then the job is stopped"""
    repo: str | None = None
    """repository on the Hub; by default that in FOLIO_HUB"""
    dry_run: bool = False
    """show terms, machines and prices, and submit nothing"""
    command: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass
class List:
    """the newest jobs, a hundred at most"""


@dataclass
class Logs:
    """what a job has printed"""

    name: tyro.conf.Positional[str]
    """of the run, or of the task"""


@dataclass
class Stop:
    """end a job; it pushes its last checkpoint first"""

    name: tyro.conf.Positional[str]
    """of the run, or of the task"""
    abort: bool = False
    """at once, without the last checkpoint"""


@dataclass
class Fleet:
    """create the fleet from which jobs get their machines"""

    file: Path = HERE / "fleet.dstack.yml"
    """its description"""


def run_submit(args: Submit) -> None:
    command = list(args.command)
    if not command:
        fail("no command; it stands behind --, such as: -- python algos/ppo.py --seed 1")
    if args.many and args.name:
        fail("--many names the runs' folder, so there is no --name")
    if not args.many:
        check_flags(command)
        script = command[script_of(command)]
        if not (ROOT / script).is_file() or Path(script).is_absolute():
            fail(f"there is no script {script} in {ROOT}; name it as seen from there")
    name = hf.check_name(args.many or args.name or default_name(command))
    hub = hf.open_hub(args.repo)
    if not get_token():
        fail("no token for the Hub, and the job has to push its run: export HF_TOKEN=hf_..., or hf auth login")
    names = "cpu", "memory", "gpu", "disk", "spot_policy", "max_price", "max_duration"
    changes = {key: getattr(args, key) for key in names}
    template = template_for(args.template, command)
    task = make_task(template, name, command, hub.repo, changes, {}, many=bool(args.many))
    run = None if args.dry_run else run_of(task["name"])
    if run and run["status"] not in ENDED:
        print(f"{name} is active already: {status(run)}")
        return
    with tempfile.TemporaryDirectory(prefix="folio-") as aside:
        pack(Path(aside) / "folio.tgz")
        print(plan(Path(aside), task))
        if args.dry_run:
            return
        make_repository(hub)
        apply(Path(aside), task)
    print(
        f"submitted {name}, as {task['name']}\n"
        f"look:    python cloud/dstack.py logs {task['name']}\n"
        f"stop:    python cloud/dstack.py stop {task['name']}\n"
        f"result:  python cloud/hub.py pull {shlex.quote(name + '/*' if args.many else name)} --repo {hub.repo}"
    )


def run_list() -> None:
    runs = json.loads(call("ps", "--all", "--json"))["runs"]
    if not runs:
        print("no jobs")
    for run in runs:
        env = run["run_spec"]["configuration"].get("env") or {}
        name = env.get("FOLIO_RUN") if isinstance(env, dict) else None  # no other variable: the token is one of them
        row = [run["run_spec"]["run_name"], f"${run.get('cost', 0):.2f}", run["submitted_at"][:16], status(run)]
        print("  ".join([f"{row[0]:41}", f"{row[1]:>8}", row[2], row[3], name or ""]).rstrip())


def run_fleet(path: Path) -> None:
    try:
        if yaml.safe_load(path.read_text())["type"] != "fleet":  # dstack would take a task, too, and begin it
            raise ValueError("its type is not fleet")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        fail(f"fleet {path} cannot be used: {' '.join(str(error).split())}")
    print(call("apply", "-f", path.name, "-y", "-d", cwd=path.resolve().parent).strip())


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    words, command = words[:at], tuple(words[at + 1 :])
    if command and (not words or words[0].startswith("-")) and words[:1] not in (["-h"], ["--help"]):
        words = ["submit", *words]
    commands = {"submit": Submit, "list": List, "logs": Logs, "stop": Stop, "fleet": Fleet}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=words)
    try:
        match args:
            case Submit():
                run_submit(replace(args, command=command))
            case List():
                run_list()
            case Logs():
                print(call("logs", task_name(args.name)), end="")
            case Stop():
                print(call("stop", "-y", *(["-x"] if args.abort else []), task_name(args.name)), end="")
            case Fleet():
                run_fleet(args.file)
    except CloudError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; `list` shows what has been submitted", code=130)


if __name__ == "__main__":
    main()
