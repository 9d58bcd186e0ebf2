"""
A Slurm of one node, this machine, with munge: `with slurm(folder)` starts both and gives the environment that reaches them (SLURM_CONF). Needs root, as the
daemons do. By hand: `python tests/remote/slurm.py FOLDER` prints that variable and stays until ctrl+c.
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
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@contextlib.contextmanager
def slurm(folder: Path) -> Generator[dict[str, str]]:
    """The environment in which sbatch, squeue and scancel reach this Slurm. `folder` must be one that every user may enter."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), ports=free_ports(), folder=folder, cpus=os.cpu_count()))
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
        for name in ("slurmctld", "slurmd"):
            with open(folder / f"{name}.log", "w") as log:
                daemons.append(subprocess.Popen([shutil.which(name, path=SBIN), "-D"], env=env, stdout=log, stderr=log))
        wait(lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True, check=False).stdout)
        yield env
    finally:
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(ready, seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "the daemons did not come up"
        time.sleep(0.1)


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    with slurm(place) as env, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={env['SLURM_CONF']}", flush=True)
        signal.pause()
