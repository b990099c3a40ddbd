"""Commands on rented machines, through dstack (https://dstack.ai). docs/cloud.md has the setup.

    python cloud/dstack.py fleet              # once: how many machines at most, and at which price; rents none
    python cloud/dstack.py -- python algos/ppo_atari.py --env-id ALE/Pong-v5          # short for: submit -- ...
    python cloud/dstack.py submit --dry-run --max-price 0.5 -- python algos/ppo_atari.py      # machines and prices
    python cloud/dstack.py submit --template gpus -- python benchmark/run.py atari
    python cloud/dstack.py list               # and: logs NAME, stop NAME

A job is a dstack task from a template: cloud/{cpu,gpu,gpus}.dstack.yml, or a file of your own. It gets the working tree
with its commit, HF_TOKEN and FOLIO_HUB, and cloud/job.py as its last command. If it loses its machine, dstack starts it
again, and it continues from the Hub. `Dstack` is the backend of benchmark/run.py: one task for each run.
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
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
import yaml
from huggingface_hub import get_token
from tyro.conf import Positional

from benchmark.runs import ROOT, RUNS, Spec, difference, fail, flags_of, read_result, words_of
from cloud.hub import ERRORS, Hub, check_name, open_hub, reason
from cloud.job import find_script, makes_a_run

HERE = Path(__file__).resolve().parent
ENDED = "terminated", "failed", "done"  # dstack's final statuses
LEFT_OUT = "docs/", "benchmark/results/", "runs/"  # large, and no run reads them; dstack takes 2 MB of code
LOOK, TIMEOUT = 30.0, 300.0  # seconds between looks at all jobs, and until a dstack that does not answer is given up
PATIENCE = 120  # looks that fail in a row before a job counts as lost
NO_CLI = "the dstack CLI is not installed: uv tool install 'dstack[server]>=0.22,<0.23'"
NO_TOKEN = "there is no Hugging Face token: export HF_TOKEN=hf_..., or hf auth login"
CHANGES = "cpu", "memory", "gpu", "disk", "spot_policy", "max_price", "max_duration"  # of a template, by flags


def execute(*command, stdin: str = "", **options) -> str:
    """What a command prints; an OSError if it fails."""
    options |= {"input": stdin, "timeout": TIMEOUT, "start_new_session": True}  # Ctrl-C is meant for us alone
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        raise OSError(f"{Path(command[0]).name} {command[1]}: no answer for {TIMEOUT:g} seconds")
    if done.returncode:
        raise OSError(f"{Path(command[0]).name} {command[1]} failed: {(done.stdout + done.stderr)[-350:]}")
    return done.stdout


def find_cli() -> str | None:
    return shutil.which(os.environ.get("FOLIO_DSTACK", "dstack"))


def call(*words, **options) -> str:
    """What `dstack WORDS` prints."""
    if not (path := find_cli()):
        raise OSError(NO_CLI)
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "HF_TOKEN": get_token() or ""}
    return execute(path, *words, env=os.environ | plain, **options)


def open_all(repo: str = "") -> Hub:
    """The Hub, or an error with all that a job lacks."""
    return open_hub(repo, missing=[*([] if find_cli() else [NO_CLI]), *([] if get_token() else [NO_TOKEN])])


def active() -> dict[str, dict]:
    """dstack's records of the jobs that have not ended, by task name."""
    runs = json.loads(call("ps", "--json"))["runs"]
    return {run["run_spec"]["run_name"]: run for run in runs if run["status"] not in ENDED}


def status(run: dict) -> str:
    return ", ".join(dict.fromkeys(filter(None, (run["status"], run.get("status_message"), run.get("error")))))


def task_name(name: str) -> str:
    """A run's name as dstack takes them: lower case, 41 characters at most."""
    if re.fullmatch("[a-z][a-z0-9-]{1,40}", name):
        return name
    short = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:28].strip("-")
    return f"run-{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def name_job(command: list[str]) -> tuple[str, bool, list[str]]:
    """A name for what a command makes below runs/, whether these are many runs, and the command."""
    at = find_script(command)
    script, words = ROOT / command[at], command[at + 1 :]
    flags, places = flags_of(words), [i for i, word in enumerate(words) if word.startswith("--")]
    if flags.keys() & {"runs_dir", "studies"}:
        fail("a job writes to runs/: leave out --runs-dir and --studies")
    if absent := [word for word in words if word.startswith(LEFT_OUT) and Path(word).suffix]:
        fail(f"a job does not get {', '.join(LEFT_OUT)}: move {absent[0]} to another folder")
    if makes_a_run(script):
        env = re.sub("[^A-Za-z0-9.]+", "-", str(flags.get("env_id", "default"))).strip("-.")
        return f"{env}__{script.stem}__{flags.get('seed', 1)}__{time.strftime('%Y%m%dT%H%M%S')}", False, command
    match script.parent.name, *words[: min([*places, len(words)])]:
        case "benchmark", suite:
            return Path(suite).stem, True, command
        case "tuner", "validate", study:
            return f"tuner/{Path(study).name}", True, command
        case "tuner", "search", space:
            env = [re.sub("[^A-Za-z0-9]+", "-", flags["env_id"])] if "env_id" in flags else []
            name = flags.get("name", "__".join([*env, Path(space).stem]))
            return f"tuner/{name}", True, [*command, *([] if "name" in flags else ["--name", name])]
    fail(f"name the folder below runs/ that this writes to, with --many FOLDER: {shlex.join(command)}")


def find_template(template: str, command: list[str]) -> Path:
    if template == "auto":
        template = "gpu" if any(Path(word).stem.endswith(("atari", "cuda")) for word in command) else "cpu"
    path = Path(template) if template.endswith((".yml", ".yaml")) else HERE / f"{template}.dstack.yml"
    if not path.is_file():
        raise OSError(f"no template {template}; there are cpu, gpu, and gpus, or give the path of a .yml file")
    return path


def at_least(cores: int, wanted) -> str:
    """The larger of two demands for cores; `wanted` is a template's, such as 4 or "x86:4..8"."""
    low = re.match(r"\d+", str(wanted).rpartition(":")[2])
    return wanted if low and int(low[0]) >= cores else f"{cores}.."


def make_task(template: Path, name: str, command: list[str], repo: str, many: bool = False, **changes) -> dict:
    """A template, filled in. `changes` are keys of the task or of its resources, and `threads`."""
    try:
        task = yaml.safe_load(template.read_text())
        if task["type"] != "task":
            raise ValueError("its type is not task")
        task["env"] = [*task.get("env", []), f"FOLIO_HUB={repo}", f"FOLIO_RUN={name}"]
        job = ["python", "cloud/job.py", name, *(["--many"] if many else []), "--", *command]
        task["commands"] = [*task["commands"], f"exec {shlex.join(job)}"]  # exec: signals reach it
        task |= {"name": task_name(name), "files": ["folio.tgz:folio.tgz"]}
        resources = task["resources"]
        if threads := changes.pop("threads", None):
            resources["cpu"] = at_least(threads, resources.get("cpu"))
        for key, value in changes.items():
            if value is not None:
                (resources if key in CHANGES[:4] else task)[key] = value
        return task
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise OSError(f"template {template} cannot be used: {' '.join(str(error).split())}")


def pack(target: Path, root: Path) -> None:
    """The working tree as a .tgz: what git tracks or does not ignore, and of .git the commit and its trees, without
    any file's content, which `git describe --dirty` does not need."""
    listed = execute("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root).split("\0")
    names = [name for name in listed if name and not name.startswith(LEFT_OUT) and (root / name).is_file()]
    with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
        bare, upload = Path(temporary) / "folio", "git -c uploadpack.allowFilter=true upload-pack"
        shallow = ["--depth=1", "--filter=blob:none", "--no-checkout", "--no-tags", f"--upload-pack={upload}"]
        execute("git", "clone", "-q", *shallow, root.resolve().as_uri(), bare)
        execute("git", "read-tree", "HEAD", cwd=bare)
        tracked = execute("git", "ls-files", "-z", cwd=bare).split("\0")
        if absent := [name for name in tracked if name.startswith(LEFT_OUT)]:
            execute("git", "update-index", "--skip-worktree", *absent, cwd=bare)
        execute("git", "remote", "remove", "origin", cwd=bare)
        with tarfile.open(target, "w:gz") as tar:
            for path, name in [(bare / ".git", ".git"), *((root / name, name) for name in names)]:
                tar.add(path, name, filter=lambda x: x.replace(uid=0, gid=0, uname="root", gname="root", deep=False))


def apply(folder: Path, task: dict, *flags: str, stdin: str = "") -> str:
    """`dstack apply` of a task in a folder that has folio.tgz; what it prints, without the question and the answer."""
    file = f"{task['name']}.dstack.yml"
    (folder / file).write_text(json.dumps(task, indent=2))  # JSON is YAML
    text = call("apply", "-f", file, *flags, cwd=folder, stdin=stdin)
    return re.sub(r".*\[y/n\].*|Exiting\.\.\.", "", text).strip()


class Dstack:
    """Runs as dstack tasks, one each. They outlive the runner; the next one finds them."""

    def __init__(self, template: str = "auto", runs_dir: Path = RUNS) -> None:
        self.template, self.runs_dir, self.hub = template, runs_dir.resolve(), open_all()
        self.lock, self.looked, self.jobs = threading.Lock(), 0.0, {}
        self.temporary = tempfile.TemporaryDirectory(prefix="folio-")
        try:
            self.active()  # the CLI is there, the server answers, the login is valid
            self.hub.create()  # what is wrong with the token shows here, not on a machine that costs
            pack(Path(self.temporary.name) / "folio.tgz", ROOT)
        except ERRORS as error:
            fail(reason(error))

    def active(self) -> dict[str, dict]:
        """`active()`, at most once every LOOK seconds for all jobs together."""
        with self.lock:
            if not self.looked or time.monotonic() - self.looked > LOOK:
                self.jobs, self.looked = active(), time.monotonic()
            return self.jobs

    def start(self, spec: Spec, command: list[str], *, slot: str | None, threads: int, log: Path, lock: int):
        return Handle(self, spec, threads, flags_of(command).get("device"), log)


class Handle(threading.Thread):
    """A run of the backend. Its thread talks to dstack and the Hub, so that `poll` and `stop` return at once."""

    def __init__(self, backend: Dstack, spec: Spec, threads: int, device: str | None, log: Path) -> None:
        super().__init__(daemon=True, name=spec.folder.resolve().relative_to(backend.runs_dir).as_posix())
        self.backend, self.spec, self.threads, self.device, self.log = backend, spec, threads, device, log
        self.code, self.said, self.stopping = None, "", threading.Event()
        self.start()

    def poll(self) -> int | None:
        return self.code

    def stop(self, force: bool = False) -> None:
        """Stop the task, which pushes its run first; with `force`, do not wait for dstack to confirm that."""
        self.stopping.set()
        if force and self.code is None:
            self.code = 130
            self.warn()

    def warn(self) -> None:
        print(f"{self.name} may still run, and cost: python cloud/dstack.py stop {self.name}", file=sys.stderr)

    def note(self, text: str) -> None:
        """Write into the log, or touch it: by that the runner sees that this does not hang."""
        with self.log.open("a") as file:
            file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} dstack: {text}\n" if text != self.said else "")
        self.said = text
        os.utime(self.log)

    def run(self) -> None:
        try:
            code = self.work()
        except Exception as error:  # whatever it is: without a code the run would look alive
            self.note(reason(error))
            code = 1
            self.stopping.is_set() and self.warn()
        self.code = code if self.code is None else self.code

    def work(self) -> int:
        """Submit the run, unless the Hub has its result or a job is making it, and follow it; its exit code."""
        backend, script, folder, name = self.backend, self.spec.script.resolve(), self.spec.folder, self.name
        machine = {"torch_threads": self.threads} | ({"device": self.device} if self.device else {})
        command = ["python", script.relative_to(ROOT).as_posix(), *words_of(self.spec.flags | machine)]
        template = find_template(backend.template, command)
        task = make_task(template, name, command, backend.hub.repo, threads=self.threads)
        if run := backend.active().get(task["name"]):
            if run["run_spec"]["configuration"]["commands"][-1] != task["commands"][-1]:
                raise OSError(f"{task['name']} is active with another command; end it: dstack stop {task['name']}")
        elif self.pull(name):
            return 0
        else:
            if (folder / "checkpoint.pt").exists() and not backend.hub.bucket_files(f"{name}/"):
                backend.hub.save(backend.runs_dir, name)  # begun here
            self.note(apply(Path(backend.temporary.name), task, "-y", "-d"))
        failures = 0
        while not self.stopping.wait(LOOK):
            try:
                run = backend.active().get(task["name"]) or json.loads(call("run", "get", task["name"], "--json"))
                self.note(status(run))
                if run["status"] in ENDED:
                    is_here, output = self.pull(name), call("logs", task["name"])
                    with self.log.open("a") as file:
                        file.write(output)
                    code = (run.get("latest_job_submission") or {}).get("exit_status")
                    return 0 if run["status"] == "done" and is_here else code or 1
                failures = 0
            except ERRORS as error:
                failures += 1
                self.note(f"retrying: {reason(error)}")
                if failures == PATIENCE:
                    raise
        self.note(call("stop", "-y", task["name"]))
        return 130

    def pull(self, name: str) -> bool:
        """Whether the Hub has the finished run; then it is here afterwards."""
        found = [x for x in self.backend.hub.find(name) if x.name == name and x.finished]
        self.backend.hub.pull(self.backend.runs_dir, found, accept=lambda path: not difference(path, self.spec))
        return bool(read_result(self.spec.folder)) and not difference(self.spec.folder, self.spec)


@dataclass
class Submit:
    """run a command on a rented machine; the command follows --"""

    name: str = ""  # of the run, on the Hub and below runs/; default: {env}__{script}__{seed}__{time}
    many: str = ""  # the folder below runs/ of a command that makes many runs; default: by the suite or the study
    template: str = "auto"  # cpu, gpu, gpus, or the path of a template of your own; auto: by the script
    cpu: str | None = None  # cores instead of the template's, such as 4.. or 8
    memory: str | None = None  # such as 32GB..
    gpu: str | None = None  # such as 24GB:1, or H100:4
    disk: str | None = None  # such as 100GB..
    spot_policy: Literal["spot", "on-demand", "auto"] | None = None  # whether the machine may be taken away
    max_price: float | None = None  # dollars an hour
    max_duration: str | None = None  # such as 6h; then the job is stopped
    repo: str = ""  # repository and bucket on the Hub; default: $FOLIO_HUB
    dry_run: bool = False  # show terms, machines, and prices, and submit nothing
    command: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> None:
        name, many, command = self.many or self.name, bool(self.many), list(self.command)
        if not command:
            fail("no command; it follows --")
        if not name:
            name, many, command = name_job(command)
        elif self.name and (many or not makes_a_run(ROOT / command[find_script(command)])):
            fail("--name is for a script that writes a run folder; for a command that makes many runs there is --many")
        check_name(name)
        if not many and flags_of(command).keys() & {"run_dir", "resume", "evaluate"}:
            fail("a job names the run folder and resumes by itself; leave out --run-dir, --resume, and --evaluate")
        hub = open_all(self.repo)
        changes = {key: value for key, value in vars(self).items() if key in CHANGES}
        task = make_task(find_template(self.template, command), name, command, hub.repo, many, **changes)
        with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
            folder = Path(temporary)
            pack(folder / "folio.tgz", ROOT)
            if self.dry_run:
                print(apply(folder, task, stdin="n\n"))
            elif run := active().get(task["name"]):
                print(f"{name} is active already: {status(run)}")
            else:
                hub.create()  # what is wrong with the token shows here, not on a machine that costs
                print(apply(folder, task, "-y", "-d"))
                print(f"python cloud/dstack.py logs {task['name']}     # or stop {task['name']}")
                print(f"python cloud/hub.py pull {name} --repo {hub.repo}{' --unfinished' if many else ''}")


def list_jobs() -> None:
    """list the newest jobs, 100 at most"""
    for run in json.loads(call("ps", "--all", "--json"))["runs"]:
        name = run["run_spec"]["configuration"].get("env", {}).get("FOLIO_RUN", "")
        cost, submitted = f"${run.get('cost', 0):.2f}", run["submitted_at"][:16]
        print(f"{run['run_spec']['run_name']:41}  {cost:>8}  {submitted}  {status(run)}  {name}".rstrip())


def logs(name: Positional[str]) -> None:
    """print what a job has printed; NAME is a run's or a task's"""
    print(call("logs", task_name(name)), end="")


def stop(name: Positional[str]) -> None:
    """end a job, which pushes its runs first; NAME is a run's or a task's"""
    print(call("stop", "-y", task_name(name)), end="")


def fleet(file: Path = HERE / "fleet.dstack.yml") -> None:
    """create the fleet from which jobs get their machines, as FILE describes it"""
    print(call("apply", "-f", str(file.resolve()), "-y", "-d").strip())


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    words, command = words[:at], tuple(words[at + 1 :])
    if "--" not in sys.argv and (found := [i for i, x in enumerate(words) if x == "python" or x.endswith(".py")]):
        fail(f"put -- before the command: ... -- {shlex.join(words[found[0] :])}")
    if command and (not words or words[0].startswith("-")):
        words = ["submit", *words]
    commands = {"submit": Submit, "list": list_jobs, "logs": logs, "stop": stop, "fleet": fleet}
    try:
        args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=words)
        if isinstance(args, Submit):
            replace(args, command=command).run()
    except ERRORS as error:
        fail(reason(error))
    except KeyboardInterrupt:
        fail("interrupted; `list` shows what has been submitted", code=130)


if __name__ == "__main__":
    main()
