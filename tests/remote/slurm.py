"""
A Slurm on this machine, with munge: `with slurm(folder)` starts both and gives the environment that reaches them (SLURM_CONF). Of several nodes, n1, n2, …,
each is a slurmd with a port of its own; their GPUs are character devices that stand for some. Needs root, as the daemons do. By hand:
`python tests/remote/slurm.py FOLDER [NODES [GPUS]]` prints that variable and stays until ctrl+c.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
THERE = os.getuid() == 0 and all(shutil.which(name, path=SBIN) for name in ("munged", "slurmctld", "slurmd", "sbatch", "sinfo"))
CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdTimeout=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{nodes}
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
"""


NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres={gres} State=UNKNOWN"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")  # what stands for GPUs


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(n)]


@contextlib.contextmanager
def slurm(folder: Path, nodes: int = 1, gpus: int = 0) -> Generator[dict[str, str]]:
    """The environment in which sbatch, squeue and scancel reach this Slurm; NAME.pid in `folder`, which every user must be able to enter, holds a node's slurmd."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf, host, ports, names = folder / "slurm.conf", socket.gethostname(), free_ports(nodes + 1), [f"n{k + 1}" for k in range(nodes)]
    lines = [NODE.format(name=n, host=host, port=p, cpus=os.cpu_count(), gres=f"gpu:{gpus}" if gpus else "") for n, p in zip(names, ports[1:])]
    conf.write_text(CONF.format(host=host, ports=ports, folder=folder, nodes="\n".join(lines)))
    (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(f"Name=gpu File={device}\n" for device in DEVICES[:gpus]))
    munge = pwd.getpwnam("munge")
    own = folder / "munge"
    own.mkdir(mode=0o711)
    (own / "key").write_bytes(os.urandom(1024))
    (own / "key").chmod(0o400)
    for path in (own, own / "key"):
        os.chown(path, munge.pw_uid, munge.pw_gid)
    folder.chmod(0o777)
    words = [f"--key-file={own}/key", f"--socket={folder}/munge.socket", f"--pid-file={own}/pid", f"--log-file={own}/log", f"--seed-file={own}/seed", "--force"]
    env, daemons = {**os.environ, "SLURM_CONF": str(conf), "PATH": SBIN}, []
    try:
        daemons.append(subprocess.Popen([shutil.which("munged", path=SBIN), "--foreground", *words], user=munge.pw_uid, group=munge.pw_gid))
        wait(lambda: (folder / "munge.socket").exists())
        for name, *more in (["slurmctld"], *(["slurmd", "-N", n] for n in names)):
            with open(folder / f"{more[-1] if more else name}.log", "w") as log:
                daemons.append(subprocess.Popen([shutil.which(name, path=SBIN), "-D", *more], env=env, stdout=log, stderr=log))
        wait(lambda: subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=env, capture_output=True, text=True, check=False).stdout.split() == ["idle"] * nodes)
        yield env
        subprocess.run(["scancel", "-u", "root"], env=env, check=False)
    finally:
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in names:  # of a node that came back
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGKILL)


def of_node(name: str) -> list[int]:
    """The processes of a node's tasks."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={name}\0".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
    return found


def dies(folder: Path, name: str) -> None:
    """A node loses its power: its tasks, what leads them, its slurmd."""
    mine = of_node(name)
    with contextlib.suppress(ProcessLookupError):
        for pid in mine:
            os.kill(pid, signal.SIGSTOP)
        leads = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in mine} - {*mine}
        for pid in (*leads, *mine, int((folder / f"{name}.pid").read_text())):
            os.kill(pid, signal.SIGKILL)


def comes_back(folder: Path, name: str) -> None:
    (folder / f"{name}.pid").unlink(missing_ok=True)
    subprocess.run(["slurmd", "-N", name], env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}, check=True)


def wait(ready, seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "the daemons did not come up"
        time.sleep(0.1)


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    with slurm(place, *map(int, sys.argv[2:])) as env, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={env['SLURM_CONF']}", flush=True)
        signal.pause()
