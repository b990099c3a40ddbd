"""A stand-in for the login node of a Slurm cluster with three machines, for dstack's backend of that name:
`python loopback_slurm.py FOLDER` writes FOLDER/key and FOLDER/port. It can be asked what there is, so that dstack has
real offers; whatever is to be started is refused. Needs asyncssh, of the environment in which dstack is.
"""

import asyncio
import os
import sys
from pathlib import Path

import asyncssh

NODES = {  # name: cores, memory in MB, GPUs, partition
    "node1": (16, 65_536, 1, "gpu"),
    "node4": (32, 262_144, 4, "gpus"),
    "cpu1": (8, 32_768, 0, "cpu"),
}
FORM = (
    "NodeName={0} NodeHostName={0} NodeAddr=10.0.0.1 Arch=x86_64 CPUTot={1} CPUEfctv={1} RealMemory={2} Gres={3} "
    "Partitions={4} State=IDLE"
)
LINES = [FORM.format(name, cores, memory, f"gpu:{gpus}", part) for name, (cores, memory, gpus, part) in NODES.items()]
COMMANDS = {
    "scontrol": f'[ "$1" = ping ] && echo "Slurmctld(primary) is UP" || cat <<END\n{chr(10).join(LINES)}\nEND',
    "sinfo": "echo gpu; echo gpus; echo 'cpu*'",
    "sbatch": "echo 'sbatch: error: this node starts nothing' >&2; exit 1",
    "squeue": ":",
    "scancel": ":",
}


async def main(folder: Path) -> None:
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, text in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    key, host_key = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "key")
    key.write_public_key(folder / "authorized")
    (folder / "key").chmod(0o600)

    async def work(process: asyncssh.SSHServerProcess) -> None:
        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
        shell = await asyncio.create_subprocess_exec(
            *("sh", "-c", process.command) if process.command else ("sh",), env=env, stdin=-1, stdout=-1, stderr=-1
        )
        await process.redirect(stdin=shell.stdin, stdout=shell.stdout, stderr=shell.stderr)
        process.exit(await shell.wait())

    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[host_key],
        authorized_client_keys=str(folder / "authorized"),
        process_factory=work,
        encoding=None,
    )
    (folder / "port.tmp").write_text(str(server.get_port()))
    (folder / "port.tmp").rename(folder / "port")
    await asyncio.Event().wait()


asyncio.run(main(Path(sys.argv[1])))
