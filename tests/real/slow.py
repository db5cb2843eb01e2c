"""Slowloris and its kin (slowhttptest -H, -B, -R and -X), while a good client keeps asking.

    python3 slow.py [SECONDS_EACH [CONNECTIONS]]
"""

import re
import subprocess
import sys
import threading
import time

from stand import Checks, check_calm, start
from support import Client, Upstream

SECONDS, CONNECTIONS = (
    int(value) for value in (sys.argv[1:] + ["20", "1000"][len(sys.argv) - 1 :])
)
PROBE = 20  # seconds after which slowhttptest calls a server closed that does not answer it
BIG = b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n" + bytes(4000000)
ATTACKS = {  # name: what slowhttptest is told besides
    "-H slow headers": ["-H", "-i", "3", "-x", "24"],
    "-B slow body": ["-B", "-i", "3", "-s", "8192", "-x", "10"],
    "-R ranges": ["-R", "-t", "HEAD", "-a", "10", "-b", "3000"],
    "-X slow read": ["-X", "-w", "512", "-y", "1024", "-n", "3", "-z", "32", "-k", "3"],
}


def send_big_or_empty(received):
    if "/big" in received.line and not received.line.startswith("HEAD"):
        received.send(BIG)
    else:
        received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


class GoodClient(threading.Thread):
    """Asks again and again, each time on a new connection.

    `taken` has the seconds that each response took, `failures` what went wrong.
    """

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address, self.taken, self.failures, self.over = address, [], [], threading.Event()

    def run(self):
        while not self.over.wait(0.05):
            begin = time.monotonic()
            try:
                with Client(self.address) as client:
                    client.request("GET", "/v1/models")
                    reply = client.read_reply()
                    assert reply.status == 200 and reply.complete, reply.status
                self.taken.append(time.monotonic() - begin)
            except (OSError, AssertionError) as error:
                self.failures.append(
                    "%s after %.1f s" % (error or type(error).__name__, time.monotonic() - begin)
                )


def attack(program, options):
    """slowhttptest's last words on the server."""
    command = ["slowhttptest", "-u", program.url + "/v1/big", "-c", str(CONNECTIONS), "-r", "200"]
    command += ["-l", str(SECONDS), "-p", str(PROBE), "-v", "1"] + options
    said = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=SECONDS * 3 + 60,
    ).stdout
    said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said)
    return (
        re.findall(r"service available:\s*(\S+)", said),
        (re.findall(r"Exit status: *(.*)", said) or ["unknown"])[-1],
        said,
    )


if __name__ == "__main__":
    checks = Checks()
    with Upstream(answer=send_big_or_empty) as upstream:
        for name, options in ATTACKS.items():
            title = "%s, %d connections, %d s" % (name, CONNECTIONS, SECONDS)
            with checks(title), start(upstream.url) as program:
                good = GoodClient(program.address)
                good.start()
                verdicts, ending, said = attack(program, options)
                good.over.set()
                good.join()
                times = sorted(good.taken)
                median = times[len(times) // 2]
                print(
                    "       slowhttptest: service available %s (of %d looks), %s"
                    % (" ".join(sorted(set(verdicts))) or "?", len(verdicts), ending)
                )
                print(
                    "       %d good answers, median %.1f ms, longest %.1f ms; %d failed"
                    % (len(times), median * 1000, times[-1] * 1000, len(good.failures))
                )
                assert verdicts and set(verdicts) == {"YES"}, said[-1500:]
                assert not good.failures, good.failures[:5]
                check_calm(program)
    checks.end()
