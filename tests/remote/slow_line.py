"""
A command behind a slow line: `--via "python tests/remote/slow_line.py --rtt 200 --rate 20 --"`. Its streams are carried with this delay there and back (ms)
and at this rate each way (kB/s). Like a real line it has buffers of its own: what is written is taken at once, and comes out when its turn is.
"""

import argparse
import contextlib
import os
import queue
import subprocess
import sys
import threading
import time


def carry(source: int, target: int, delay: float, rate: float) -> None:
    line: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def come_out() -> None:
        with contextlib.suppress(OSError):
            while (some := line.get())[1]:
                time.sleep(max(0.0, some[0] - time.monotonic()))
                data = some[1]
                while data:
                    data = data[os.write(target, data) :]
        os.close(target)

    thread, free = threading.Thread(target=come_out), 0.0
    thread.start()
    with contextlib.suppress(OSError):
        while data := os.read(source, 1 << 16):
            for i in range(0, len(data), 256):  # what is sent comes little by little
                free = max(free, time.monotonic()) + len(data[i : i + 256]) / rate
                line.put((free + delay, data[i : i + 256]))
    line.put((free + delay, b""))
    thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rtt", type=float, default=200.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    process = subprocess.Popen(given.command[given.command[:1] == ["--"] :], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    ends = [(0, process.stdin.fileno()), (process.stdout.fileno(), 1)]
    threads = [threading.Thread(target=carry, args=(*ends[n], given.rtt / 2000, given.rate * 1000), daemon=True) for n in (0, 1)]
    for thread in threads:
        thread.start()
    threads[1].join()
    sys.stdout = None  # it is closed
    os._exit(process.wait())
