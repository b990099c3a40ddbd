"""Run what is missing of a suite, and only that. Start it as often as you like: it resumes where it was.

    python benchmark/run.py classic                        # as many runs side by side as there are cores or GPUs
    python benchmark/run.py classic --only 'CartPole*' --seeds 3 --dry-run      # print the commands instead
    python benchmark/run.py mujoco --status                # from another shell: how the runs stand
    python benchmark/run.py mujoco --backend dstack --jobs 20          # on rented machines, see docs/cloud.md

A suite is a TOML file (suites.py). Its runs are in runs/{suite}/{env}__{script}__{seed}, with a log beside each. Seed 1
of every entry comes first, then seed 2, and so on, so that a benchmark that is stopped early has some of everything.
What happens to a run folder that exists: runner.py.

Ctrl-C, SIGTERM, a closed terminal, or on Linux kill -9 stop all runs; the same command resumes them. A run that fails
does not stop the others. Exit code: 0 when every run is finished, 1 when one failed or is stale, 2 for bad input, 130
when stopped.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from benchmark import runner, suites
from benchmark.runner import Job, Runner
from benchmark.runs import RUNS, fail, shown


@dataclass
class Args:
    suites: tyro.conf.Positional[tuple[str, ...]]  # suites by name (benchmark/suites/), or paths of TOML files
    only: tuple[str, ...] = ()  # only entries whose script, environment, or name (CartPole-v1__ppo) fits a pattern
    seeds: str = ""  # seeds instead of the suite's: 3 for 1, 2, and 3; or a list such as 1,3,7-9
    jobs: int | None = None  # runs side by side; default: as many as fit on the cores or GPUs, 10 in the cloud
    threads: int = 1  # CPU threads of each run
    gpus: tuple[str, ...] = ()  # GPUs by number or id; default: all that are visible
    runs_per_gpu: int = 1  # runs side by side on each GPU
    device: Literal["cpu", "cuda"] | None = None  # --device of every run; default: each script's own
    retries: int = 0  # how often a run that failed is resumed, except for bad input and NaN
    hang_after: float = 30.0  # kill a run whose log and folder do not change for so many minutes
    rerun_stale: bool = False  # move runs with other flags or an older algorithm aside, and run them again
    dry_run: bool = False  # print the commands and start nothing
    status: bool = False  # show how the runs stand and start nothing
    runs_dir: Path = RUNS  # where the run folders are
    backend: Literal["local", "dstack"] = "local"  # where the runs are made: here, or on rented machines
    template: str = "auto"  # the rented machine: cpu, gpu, or a file as in cloud/; auto: by the script


def make_jobs(args: Args) -> list[Job]:
    """The runs of the suites that --only and --seeds leave, in the order in which they are started."""
    seeds = runner.parse_seeds(args.seeds)
    if args.seeds and not seeds:
        fail(f"--seeds is {args.seeds}; give a number (3 for 1, 2, and 3) or a list such as 1,3,7-9")
    names = args.suites or fail(f"name a suite: {', '.join(suites.suite_names())}, or a TOML file")
    jobs = []
    for suite in [suites.load(name) for name in dict.fromkeys(names)]:
        for entry in (entry for entry in suite.entries if entry.fits(args.only)):
            for seed in seeds or range(1, entry.seeds + 1):
                spec = entry.spec(suite.name, seed, args.runs_dir)
                jobs.append(Job(f"{suite.name}/{spec.folder.name}", spec, runner.uses_gpu(entry.script, args.device)))
    if not jobs:
        fail(f"no entry matches --only {shlex.join(args.only)}")
    return sorted(jobs, key=lambda job: job.spec.flags["seed"])  # stable: within a seed as in the suites


def dry_run(jobs: list[Job], args: Args) -> None:
    """The commands that would be started, as they can be pasted into a shell."""
    steps = []
    for job in jobs:
        if job.state == "waiting" or job.state == "stale" and args.rerun_stale:
            command, in_the_way = job.command(args.threads, args.device)
            if in_the_way:
                print(f"# moved aside first: {shown(job.spec.folder)}")
            print(shlex.join(command))
            steps.append(job.spec.flags["total_timesteps"])
        elif job.state in ("stale", "elsewhere"):
            print(f"# {job.state}: {job.name} {job.note}".rstrip())
    print(f"# {len(steps)} to run ({sum(steps):,} steps), {sum(job.state == 'done' for job in jobs)} done")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for name in ("jobs", "threads", "runs_per_gpu", "hang_after"):
        if (value := getattr(args, name)) is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} is {value}, must be greater than 0")
    try:
        jobs = make_jobs(args)
    except suites.SuiteError as error:
        fail(str(error))
    for job in jobs:
        job.look()
    if args.dry_run:
        return dry_run(jobs, args)
    if args.backend == "dstack" and not args.status:
        from cloud.dstack import Dstack  # the Hub's client is imported only where it is needed

        backend, slots = Dstack(args.template, args.runs_dir), [None] * (args.jobs or 10)
    else:
        gpus = runner.find_gpus(args.gpus) if any(job.on_gpu for job in jobs) else []
        slots = runner.slots(args.jobs, args.threads, gpus, args.runs_per_gpu)
        if gpus and not all(job.on_gpu for job in jobs):
            slots += runner.slots(args.jobs, args.threads, [])
        backend = runner.Local()
    for job in jobs:
        job.on_gpu &= any(slots)  # what can use a GPU gets one if there is one
    work = Runner(
        jobs, slots, backend, args.threads, args.device, args.retries, args.rerun_stale, hang_after=args.hang_after
    )
    if args.status:
        for job in jobs:
            job.status()
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
        return console.print(runner.table(jobs, work.display.summary(), 10**6))
    try:
        work.work()
    except OSError as error:
        fail(f"{error}; nothing finished is lost, the same command resumes", code=1)
    raise SystemExit(work.report())


if __name__ == "__main__":
    main()
