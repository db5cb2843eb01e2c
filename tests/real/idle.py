"""2,000 idle kept-alive connections cost less than 100 MB, and nobody waits because of them.

    python3 idle.py [CONNECTIONS]
"""

import resource
import sys
import time

from stand import Checks, check_calm, memory, start
from support import Client, Upstream

COUNT, MOST = int(sys.argv[1] if len(sys.argv) > 1 else 2000), 100  # MB

if __name__ == "__main__":
    checks = Checks()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with Upstream() as upstream, start(upstream.url, MAX_CONNECTIONS=4096) as program:
        before, clients = memory(program, "VmRSS"), []
        with checks("%d clients are served and stay" % COUNT):
            for _ in range(COUNT):
                clients.append(Client(program.address))
                clients[-1].request("GET", "/v1/models")
                assert clients[-1].read_reply().status == 200
        cost = memory(program, "VmRSS") - before
        print("       %.1f MB for %d connections (%.1f MB before)" % (cost, len(clients), before))
        with checks("they cost less than %d MB" % MOST):
            assert cost < MOST
        with checks("a new client is answered meanwhile"):
            begin = time.monotonic()
            with Client(program.address) as client:
                client.request()
                assert client.read_reply().status == 200
            print("       in %.1f ms" % ((time.monotonic() - begin) * 1000))
        with checks("each of them still is"):
            for client in clients:
                client.request("GET", "/health")
            assert all(client.read_reply().status == 200 for client in clients)
        with checks("no fault was printed"):
            check_calm(program)
    checks.end()
