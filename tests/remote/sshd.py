"""
An sshd of one's own on loopback: `with sshd(folder) as command` starts it with keys and a configuration that lie in `folder`, and gives the words of an
`ssh` that reaches it. By hand: `python tests/remote/sshd.py FOLDER` prints those words and stays until ctrl+c.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

DAEMON = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
THERE = bool(DAEMON and shutil.which("ssh") and shutil.which("ssh-keygen"))


@contextlib.contextmanager
def sshd(folder: Path) -> Generator[str]:
    """The words that lead to this machine through a real sshd."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.create_server(("127.0.0.1", 0)) as some:
        port = some.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile {folder}/pid\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "sshd.log", "w") as log:
        process = subprocess.Popen([DAEMON, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    until = time.monotonic() + 20
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until and process.poll() is None, (folder / "sshd.log").read_text()
            time.sleep(0.05)
        options = f"-F none -i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile={folder}/known -o LogLevel=ERROR -p {port}"
        yield f"ssh {options} {getpass.getuser()}@127.0.0.1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(0o700, exist_ok=True)
    with sshd(folder) as words, contextlib.suppress(KeyboardInterrupt):
        print(words, flush=True)
        signal.pause()
