#!/usr/bin/env python3
"""A soak: python3 tests/soak.py --seconds 60

Two relays run as processes, one with a provider key configured and one transparent, in front of
one upstream that stalls, resets, lies about lengths and sends garbage. Good, bad, slow, vanishing
and huge clients come all at once. In the end

- every response to a good client was right byte for byte, and every response that the upstream
  broke was seen to be broken;
- memory and file descriptors of the relays are back where they were after the warm-up, and they
  keep no more idle threads than there can be clients at once;
- neither reported a fault, no client saw the provider key, the upstream saw no client key, and
  SIGTERM ends both with 0.

With --chaos each relay is two workers that serve TLS. Every five seconds their settings are read
again, at times from a wrong file; every ten seconds a worker is killed; and in the end SIGTERM
comes while clients do. Then also

- the connections of the killed worker end visibly cut, and those of the other are not touched;
- after each reload all workers ask for the new client key and refuse the old one, and a worker that
  comes later does so from its first request on; a wrong file changes nothing;
- SIGTERM ends the relays within the grace time and a second, and no response looks whole that is
  not; the worker that was spared is measured, and the parent.

The limits of aiproxy.py that are half a minute or more are cut to a few seconds, so that a minute
sees them all reached often; --real-limits leaves them alone. Memory and descriptors are read from
/proc: elsewhere these two checks are left out.
The last line is "N passed, N failed"; exit status 1 if any failed.
"""
import argparse
import collections
import hashlib
import json
import math
import os
import random
import signal
import socket
import struct
import subprocess
import ssl
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from support import (  # noqa: E402
    CHAT, EVENT_HEAD, PATIENCE, PROGRAM, Client, children, chunk, clean_environ, event,
    make_certificate, process_state, sockets_of)

PROVIDER_KEY = "sk-soak-provider-key"
CLIENT_KEY = "ck-soak-client-key"
AUTH = [("Authorization", "Bearer " + CLIENT_KEY)]
CHUNKED = [("Transfer-Encoding", "chunked")]

TIMEOUT = 8                 # AIPROXY_TIMEOUT: long enough for a machine that stumbles
MAX_BODY = 4 << 20          # AIPROXY_MAX_BODY
MAX_CONNECTIONS = 128       # AIPROXY_MAX_CONNECTIONS: a crowd reaches it
# What a relay may use more than after the warm-up.
BLOCK_SLACK = 1.1           # times the blocks of memory that Python's objects take
MEMORY_SLACK = 8 << 20      # bytes: a few objects may keep an arena that a large body once needed;
STACK_SLACK = 64 << 10      # and for each thread: its stack keeps the pages that it once touched
SETTLE_SECONDS = 40         # until the relays' own limits have ended connections
GRACE = 4                   # AIPROXY_GRACE
END_SLACK = 2               # seconds after it: one for cut responses to be seen cut, one for us
RELOAD_SECONDS = 5          # --chaos: between two reloads, every second time with a killed worker
RESET_ON_CLOSE = struct.pack("ii", 1, 0)    # for SO_LINGER: close() sends a reset
LISTENING = "0A"            # a state in /proc/net/tcp

# Constants of aiproxy.py that no setting reaches, and their values here, in seconds.
LIMITS = {
    "HEAD_SECONDS": 5,      # for a whole request head
    "STALL_SECONDS": 5,     # for a client that takes nothing of its response
    "BODY_GRACE": 5,        # before a request body has to keep a minimum data rate
    "POOL_SECONDS": 5,      # for an idle upstream connection
    "IDLE_SECONDS": 6,      # for an idle client connection
    "SETTLED_SECONDS": 5,   # after which a worker that dies is replaced at once
}

# The program with these limits. At SIGUSR1 it returns to the system what glibc keeps although it
# is free: places between what is in use, and caches. That is no leak; the report gives both. And
# it says how many blocks of memory its objects take.
RUN = """import ctypes, gc, os, signal, sys, aiproxy
limits = %r
unknown = set(limits) - set(vars(aiproxy))
if unknown:
    sys.exit("LIMITS in soak.py: not in aiproxy.py: " + ", ".join(sorted(unknown)))
vars(aiproxy).update(limits)
def report(*_):
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    blocks = getattr(sys, "getallocatedblocks", int)()
    os.write(2, b"blocks %%d\\n" %% blocks)
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, report)
sys.exit(aiproxy.main())
"""

# ---- What the upstream does -----------------------------------------------------------------
# A request's body is a task: "how" names the behavior, "seed" and "size" make the right body.


def right_body(task):
    """The body of the right response."""
    seed, size = task["seed"], task["size"]
    if task["how"] == "a deeply nested usage":
        return b'{"usage":{"seed":%d,"a":' % seed + b"[" * 30000
    if "events" in task["how"]:
        texts = [json.dumps({"seed": seed, "n": number}) for number in range(size)]
        return b"".join(event(text) for text in texts + ["[DONE]"])
    digest = hashlib.sha512(b"%d" % seed).digest()
    return (digest * (size // len(digest) + 1))[:size]


def pieces(data, seed):
    """`data` in pieces of every size."""
    dice = random.Random(seed)
    start = 0
    while start < len(data):
        end = start + dice.choice((1, 2, 15, 100, 1000, 10000, 70000))
        yield data[start:end]
        start = end


def with_length(body, length=None):
    """A response with this body, whose content-length may be wrong."""
    if length is None:
        length = len(body)
    head = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % length)
    return head + body


def stall(peer):
    """Send nothing more until the other side closes."""
    peer.settimeout(60)
    while peer.recv(65536):
        pass
    raise ConnectionResetError()


def reset(peer):
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    raise ConnectionResetError()


def hang_up(peer):
    raise ConnectionResetError()


def send_length(peer, task):
    peer.sendall(with_length(right_body(task)))


def send_chunked(peer, task, pause=0.0):
    body = right_body(task)
    peer.sendall(EVENT_HEAD)
    for piece in pieces(body, len(body)):
        peer.sendall(chunk(piece))
        if pause:
            time.sleep(pause)
    peer.sendall(b"0\r\n\r\n")


def send_slowly(peer, task):
    send_chunked(peer, task, pause=0.005)


def send_until_close(peer, task):
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + right_body(task))
    peer.shutdown(socket.SHUT_WR)
    stall(peer)


def send_events(peer, task):
    """One event a chunk."""
    peer.sendall(EVENT_HEAD)
    for one in right_body(task).split(b"\n\n")[:-1]:
        peer.sendall(chunk(one + b"\n\n"))
    peer.sendall(b"0\r\n\r\n")


def send_trailing_data(peer, task):
    peer.sendall(with_length(right_body(task)) + with_length(b"poison"))


def send_one_chunk(peer, task):
    peer.sendall(EVENT_HEAD + chunk(right_body(task)) + b"0\r\n\r\n")


GOOD = {
    "length": send_length,
    "chunked": send_chunked,
    "until close": send_until_close,
    "events": send_events,
    "slow events": send_slowly,
    "trailing data": send_trailing_data,
    "a deeply nested usage": send_one_chunk,
}


def half_body(task):
    return with_length(right_body(task)[:task["size"] // 2], task["size"])


def two_lengths(task):
    status_line, rest = with_length(right_body(task)).split(b"\r\n", 1)
    return status_line + b"\r\nContent-Length: 3\r\n" + rest


HEAD_START = b"HTTP/1.1 200 OK\r\nX: "
HALF_STREAM = EVENT_HEAD + chunk(event("1"))
LENGTH_AND_CHUNKED = (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
                      b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
BAD_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n12345"
BAD_FIELD = b"HTTP/1.1 200 OK\r\nX\x00: \x01\r\n\r\n"
ENDLESS_CHUNK = EVENT_HEAD + b"ffffffffffffffff\r\n" + bytes(100000)
ENDLESS_HEAD = b"HTTP/1.1 200 OK\r\n" + b"X: %b\r\n" % (b"a" * 1000) * 100
INTERIM_ONLY = b"HTTP/1.1 100 Continue\r\n\r\n" * 100
KEY_IN_ERROR = (b"HTTP/1.1 403 No\r\nConnection: close\r\nContent-Length: 99\r\n\r\n"
                + PROVIDER_KEY.encode().center(99))

# What is sent, as bytes or made of the task, and what happens then. The client must see that it
# is no whole response: it gets an error of the relay, or a body that is cut.
BROKEN = {
    "silent": (b"", stall),
    "silent in a head": (HEAD_START, stall),
    "silent in a body": (half_body, stall),
    "silent in events": (HALF_STREAM, stall),
    "reset": (b"", reset),
    "reset in a head": (HEAD_START, reset),
    "reset in a body": (half_body, reset),
    "closed in events": (HALF_STREAM, hang_up),
    "closed in a body": (half_body, hang_up),
    "two lengths": (two_lengths, hang_up),
    "length and chunked": (LENGTH_AND_CHUNKED, hang_up),
    "bad length": (BAD_LENGTH, hang_up),
    "garbage": (right_body, stall),
    "garbage in a head": (BAD_FIELD, hang_up),
    "garbage for a chunk": (HALF_STREAM + b"zz\r\n\r\n", stall),
    "endless chunk": (ENDLESS_CHUNK, hang_up),
    "endless head": (ENDLESS_HEAD, stall),
    "interim responses only": (INTERIM_ONLY, stall),
    "key in an error": (KEY_IN_ERROR, hang_up),
}
CUT_IN_A_BODY = ("closed in a body", "silent in a body", "reset in a body")


def send_broken(peer, task):
    data, then = BROKEN[task["how"]]
    if callable(data):
        data = data(task)
    peer.sendall(data)
    then(peer)


def send_endless(peer):
    peer.sendall(EVENT_HEAD)
    while True:
        peer.sendall(chunk(event("x" * 50000)))
        time.sleep(0.01)


def echo(peer):
    """The upstream's end of a WebSocket, which sends back what it receives."""
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\n"
                 b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    while True:
        data = peer.recv(65536)
        peer.sendall(data)
        if not data:
            raise ConnectionResetError()


def read_head(stream):
    """The next request's head in lower case; None at the end of the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return None
        head += line
    return head.lower()


def read_chunked_body(stream):
    body = b""
    while True:
        size = int(stream.readline(), 16)
        body += stream.read(size + 2)[:-2]
        if not size:
            return body


def read_body(stream, head):
    if b"transfer-encoding: chunked" in head:
        return read_chunked_body(stream)
    if b"content-length: " not in head:
        return b""
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = stream.read(length)
    if len(body) < length:
        raise ConnectionResetError()
    return body


class Upstream:
    """Does what each request asks for.

    It has a process of its own and a thread for each connection. On stdout it prints its address
    and then a line for each thing that is wrong with a request.
    """

    def run(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.print("http://127.0.0.1:%d" % listener.getsockname()[1])
        while True:
            peer = listener.accept()[0]
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def print(self, line):
        """A whole line in one write: many threads print."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def serve(self, peer):
        with peer, peer.makefile("rb") as stream:
            try:
                while True:
                    peer.settimeout(PATIENCE * 3)
                    head = read_head(stream)
                    if head is None:
                        return
                    self.respond(peer, stream, head)
            except (OSError, ValueError):
                pass    # the relay closed the connection, since its client had

    def respond(self, peer, stream, head):
        both_keys = b"ck-soak" in head and b"sk-soak" in head
        if both_keys or b"x-forwarded-for" in head:
            self.print("the upstream saw a client's key or address")
        if b"upgrade: websocket" in head:
            echo(peer)

        task = json.loads(read_body(stream, head))
        padding = task.pop("pad", "").encode()
        if hashlib.md5(padding).hexdigest() != task["sum"]:
            self.print("an upload arrived damaged")

        if task["how"] == "endless":
            send_endless(peer)
        elif task["how"] in GOOD:
            GOOD[task["how"]](peer, task)
        else:
            send_broken(peer, task)


# ---- The relays -----------------------------------------------------------------------------

Usage = collections.namedtuple("Usage", "memory threads descriptors blocks")  # memory in bytes


class Relay:
    """aiproxy.py as a process, what it prints, and what it uses."""

    def __init__(self, name, real_limits, env_file=None, spared=0, **settings):
        self.name = name
        self.env_file = env_file
        self.has_provider_key = "KEY" in settings
        self.has_tls = "TLS_CERT" in settings
        self.workers = settings.get("WORKERS", 1)
        self.errors = []                            # lines of its stderr
        self.outcomes = collections.Counter()       # of the requests in its log
        self.failed = {}                            # by request id, those that are not "ok"
        self.peak = 0                               # bytes of memory
        self.untrimmed = 0                          # bytes of memory before SIGUSR1
        self.blocks = 0                             # what it said at the last SIGUSR1
        self.stopped = math.inf                     # when it got SIGTERM
        self.killed = {}        # by port of a client whose worker was killed: when

        self.process = self.start(real_limits, settings)
        self.address = self.read_address()
        for read in (self.read_errors, self.read_log):
            threading.Thread(target=read, daemon=True).start()
        # The process that is measured. Of several workers it is the one that nobody kills.
        self.pid = self.process.pid
        if self.workers > 1:
            self.wait_for_workers()
            self.pid = self.worker_pids()[spared]
            self.wait_until_it_serves()

    def start(self, real_limits, settings):
        settings = dict(settings, PORT=0, LOG="json", GRACE=GRACE)
        settings["MAX_CONNECTIONS"] = MAX_CONNECTIONS
        environ = {"AIPROXY_" + key: str(value) for key, value in settings.items()}
        environ["PYTHONPATH"] = os.path.dirname(PROGRAM)
        # glibc keeps up to 200 KB of freed memory for each thread, which fills over minutes and
        # would hide a leak.
        environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
        limits = {} if real_limits else LIMITS
        command = [sys.executable, "-c", RUN % limits]
        if self.env_file:
            command += ["--env-file", self.env_file]
        return subprocess.Popen(
            command, env=clean_environ(environ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)

    def read_address(self):
        """The address in the banner."""
        while True:
            line = self.process.stderr.readline()
            self.errors.append(line)
            assert line, "the relay did not start: %s" % "".join(self.errors)
            if " on http" in line:
                return "127.0.0.1", int(line.rpartition(":")[2])

    def read_errors(self):
        for line in self.process.stderr:
            if line.startswith("blocks "):
                self.blocks = int(line.split()[1])
            else:
                self.errors.append(line)

    def read_log(self):
        for line in self.process.stdout:
            try:
                fields = json.loads(line)
            except ValueError:
                fields = {"request_id": "", "outcome": "a damaged line"}
            self.outcomes[fields["outcome"]] += 1
            if fields["outcome"] != "ok":
                self.failed[fields["request_id"]] = line.strip()

    def worker_pids(self):
        """The oldest first."""
        return children(self.process.pid)

    def count_lines(self, text):
        """How many lines of its stderr hold this."""
        return sum(text in line for line in self.errors)

    def wait_for_lines(self, text, count):
        deadline = time.monotonic() + TIMEOUT
        while self.count_lines(text) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def wait_for_workers(self):
        deadline = time.monotonic() + PATIENCE
        while len(self.worker_pids()) < self.workers:
            assert time.monotonic() < deadline, "%s: a worker is missing" % self.name
            time.sleep(0.02)

    def wait_until_it_serves(self):
        """Until the measured worker has opened all that it needs: it has had a client then."""
        deadline = time.monotonic() + PATIENCE
        while not self.takes_a_client():
            assert time.monotonic() < deadline, "%s: a worker takes nobody" % self.name
        while ports_of_clients(self, self.pid):
            assert time.monotonic() < deadline, "%s: a worker keeps a client" % self.name
            time.sleep(0.02)

    def takes_a_client(self):
        """Has the measured worker taken a new client soon? Else another one may have."""
        with socket.create_connection(self.address, PATIENCE) as client:
            for _ in range(10):
                if client.getsockname()[1] in ports_of_clients(self, self.pid):
                    return True
                time.sleep(0.02)
        return False

    def usage(self, pid=None):
        """What it uses now; None where there is no /proc."""
        folder = "/proc/%d/" % (pid or self.pid)
        if not os.path.exists(folder + "status"):
            return None
        with open(folder + "status") as file:
            status = dict(line.split(":", 1) for line in file)
        self.peak = int(status["VmHWM"].split()[0]) << 10
        return Usage(
            memory=int(status["VmRSS"].split()[0]) << 10,
            threads=int(status["Threads"]),
            descriptors=len(os.listdir(folder + "fd")),
            blocks=self.blocks)

    def settled_usage(self, fresh):
        """What it uses when the clients have left.

        Waits until there are no more descriptors than at the start, for as long as the relay's
        limits allow them to stay.
        """
        deadline = time.monotonic() + PATIENCE + SETTLE_SECONDS
        usage = self.usage()
        if usage is None:
            return None
        while usage.descriptors > fresh.descriptors:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
            usage = self.usage()
        self.untrimmed = usage.memory
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(1)
        return self.usage()


class Report:
    """Counts of what happened, and the failures."""

    def __init__(self):
        self.lock = threading.Lock()
        self.passed = 0
        self.failures = []
        self.counts = collections.Counter()

    def check(self, passed, message):
        if not passed:
            self.fail(message)
            return
        with self.lock:
            self.passed += 1

    def fail(self, message):
        with self.lock:
            self.failures.append(message)

    def count(self, label):
        with self.lock:
            self.counts[label] += 1


# ---- The clients: each method is one visit --------------------------------------------------

MALFORMED = (
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET /../x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n",
)
FORBIDDEN = (       # path, body, header fields, status
    (CHAT, b'{"model":"m"}', [("Authorization", "Bearer wrong")], 401),
    (CHAT, b'{"model":"other"}', AUTH, 403),
    (CHAT, b"not JSON", AUTH, 400),
    ("/v1/files", b"{}", AUTH, 404),
    (CHAT, b"[" * 100000, AUTH, 400),
    (CHAT, b"5\r\nabcdefgh\r\n0\r\n\r\n", AUTH + CHUNKED, 400),
)


def post_head(length):
    """A request's head as bytes, for clients that do not send it at once."""
    return (b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\n"
            b"Content-Length: %d\r\n\r\n" % (CHAT.encode(), CLIENT_KEY.encode(), length))


class SlowReader(Client):
    """Takes its response a little at a time."""

    def __init__(self, address):
        super().__init__(address, receive_buffer=4096)

    def receive(self, most=2000):
        time.sleep(0.002)
        return super().receive(most)


class RelayStopped(ConnectionError):
    """The relay has got SIGTERM, and takes no more clients."""


class Visitor(threading.Thread):
    """Comes again and again as a client of this kind until `deadline`."""

    def __init__(self, kind, relays, report, deadline, seed):
        super().__init__(daemon=True)
        self.kind = kind                    # the name of a method
        self.relays = relays
        self.relay = None                   # the one that it visits now
        self.report = report
        self.deadline = deadline
        self.dice = random.Random(seed)

    def run(self):
        visit = getattr(self, self.kind)
        while time.monotonic() < self.deadline:
            self.relay = self.dice.choice(self.relays)
            try:
                visit()
            except Exception as error:      # nothing may end a visitor unseen
                self.report_error(error)
            time.sleep(self.dice.random() * 0.02)

    def report_error(self, error):
        if isinstance(error, ConnectionError) and time.monotonic() > self.relay.stopped:
            time.sleep(0.2)
            return
        self.report.fail("%s client of the %s relay: %s: %s" % (
            self.kind, self.relay.name, type(error).__name__, str(error)[:200]))

    def chance(self, probability):
        return self.dice.random() < probability

    def task(self, how, size=None, padding=0):
        """A task for the upstream, and the request body that carries it."""
        seed = self.dice.randrange(1 << 30)
        sizes = (1, 10, 200) if "events" in how else (10, 1000, 20000, 200000)
        size = size or self.dice.choice(sizes)
        if "events" in how:
            size = min(size, 1000)
        if how == "trailing data":
            # In one piece: trailing data that comes when its connection is in use again looks
            # like a response.
            size = 5
        task = {"model": "m", "how": how, "seed": seed, "size": size}

        pad = "x" * padding
        digest = hashlib.md5(pad.encode()).hexdigest()
        return task, json.dumps(dict(task, sum=digest, pad=pad)).encode()

    def connect(self, kind=Client):
        """A client that knows its port, and since when; its worker may be killed."""
        began = time.monotonic()
        client = kind(self.relay.address)
        client.began = began
        client.port = client.sock.getsockname()[1]
        return client

    def start_tls(self, client):
        if self.relay.has_tls:
            client.start_tls()

    def visit(self, exchange, kind=Client):
        """exchange(client) on new connections until the relay has room; the response.

        A full relay responds 503, or closes a connection that is idle.
        """
        for _ in range(200):
            response, cut = self.visit_once(exchange, kind)
            if cut:
                self.report.count(cut)
            elif response is None or response.status != 503:
                return response
            else:
                ours = response.code == "server_busy" and response.get("retry-after")
                self.report.check(ours, "a 503 that is not ours: %r" % response.body)
                self.report.count("turned away with 503")
            if time.monotonic() > self.relay.stopped:
                raise RelayStopped()
            time.sleep(0.05)
        raise RuntimeError("never let in")

    def visit_once(self, exchange, kind):
        """The response to exchange(client), and why it counts for nothing, if that is so."""
        phase = "given up in the handshake"
        client = None
        try:
            with self.connect(kind) as client:
                self.start_tls(client)
                phase = "given up while idle"
                response = exchange(client)
        except (ConnectionError, ssl.SSLEOFError, AssertionError) as error:
            if isinstance(error, AssertionError) and "ended before" not in str(error):
                raise
            return None, self.reason_of_cut(client) or self.reason_of_refusal() or phase

        if response is None or response.complete:
            return response, ""
        if self.relay.has_tls:
            self.report.check(not client.got_close_notify, "%s: TLS says that a response is whole "
                              "that is cut: %d" % (self.relay.name, response.status))
        return response, self.reason_of_cut(client)

    def reason_of_cut(self, client):
        """Why a response may be cut, although the upstream's is whole; empty if it may not."""
        if client and self.relay.killed.get(client.port, 0) > client.began:
            return "cut when their worker was killed"
        if time.monotonic() > self.relay.stopped + GRACE:
            return "cut when the grace time was over"
        return ""

    def reason_of_refusal(self):
        return "refused after SIGTERM" if time.monotonic() > self.relay.stopped else ""

    def check_response(self, response, task):
        right = response.body == right_body(task)
        right = right and response.status == 200 and response.complete
        if not right:
            time.sleep(1)               # for the log to be read
        logged = self.relay.failed.get(response.get("x-request-id"))
        message = "%s: a wrong answer to %r: %d, %d bytes, complete: %s, begins %r; the log: %s" % (
            self.relay.name, task, response.status, len(response.body), response.complete,
            response.body[:20], logged)
        self.report.check(right, message)
        self.check_provider_key(response)
        self.report.count("good answers, " + self.kind)

    def check_cut(self, response, task):
        """What came of a response before it was cut must be right."""
        right = right_body(task).startswith(response.body)
        self.report.check(right, "%s: a response to %r was wrong before it was cut"
                          % (self.relay.name, task))

    def check_provider_key(self, response):
        if not self.relay.has_provider_key:
            return
        if PROVIDER_KEY.encode() in response.raw_head + response.body:
            self.report.fail("a client of the %s relay saw the provider key" % self.relay.name)

    def good(self):
        """Several requests on one connection, at times pipelined."""
        tasks = []
        for _ in range(self.dice.randrange(1, 6)):
            how = self.dice.choice(list(GOOD))
            size = 5 if self.chance(0.5) else None
            tasks.append(self.task(how, size))
        pipelined = self.chance(0.2)

        def exchange(client):
            while tasks:
                batch = tasks[:] if pipelined else tasks[:1]
                for _, body in batch:
                    client.request("POST", CHAT, body, AUTH)
                for task, _ in batch:
                    response = client.read_reply()
                    if response.status == 503:
                        return response
                    if not response.complete and self.reason_of_cut(client):
                        self.check_cut(response, task)
                        return response
                    self.check_response(response, task)
                    tasks.pop(0)
            return None

        self.visit(exchange)

    def broken(self):
        """A good client of an upstream that is not."""
        how = self.dice.choice(list(BROKEN))
        task, body = self.task(how, 5000)

        def exchange(client):
            client.request("POST", CHAT, body, AUTH)
            return client.read_reply()

        response = self.visit(exchange)
        is_error = response.status >= 400
        seen = is_error or not response.complete
        if how in CUT_IN_A_BODY and not is_error:
            seen = seen and right_body(task).startswith(response.body)
        self.report.check(seen, "%s: %r was not seen to be broken: %d, %d bytes %r" % (
            self.relay.name, how, response.status, len(response.body), response.body[:80]))
        self.check_provider_key(response)
        self.report.count("broken answers seen as such")

    def slow(self):
        """Sends and takes a little at a time, but fast enough."""
        how = self.dice.choice(("length", "chunked", "events"))
        size = None
        if self.chance(0.5):
            size = 300
        elif self.chance(0.1):
            size = 500000
        task, body = self.task(how, size)
        data = post_head(len(body)) + body

        def exchange(client):
            for start in range(0, len(data), 40):
                client.send(data[start:start + 40])
                time.sleep(0.01)
            return client.read_reply()

        self.check_response(self.visit(exchange, SlowReader), task)

    def too_slow(self):
        """Sends its head or takes its response so slowly that the relay must end it."""
        with Client(self.relay.address, receive_buffer=4096) as client:
            try:
                self.start_tls(client)
                if self.chance(0.5):
                    self.stop_reading(client)
                else:
                    self.trickle_head(client)
            except OSError:
                pass
        self.report.count("clients that were too slow")

    def stop_reading(self, client):
        _, body = self.task("endless")
        client.request("POST", CHAT, body, AUTH)
        client.sock.recv(1000)
        end = time.monotonic() + 2 * LIMITS["STALL_SECONDS"]
        while time.monotonic() < min(end, self.deadline):
            time.sleep(0.1)

    def trickle_head(self, client):
        client.send(b"POST / HTTP/1.1\r\nX: ")
        for _ in range(100):
            time.sleep(0.1)
            client.send(b"a")

    def vanishing(self):
        """Goes away in the middle of anything, with or without a reset."""
        how = self.dice.choice(
            ("length", "slow events", "silent", "endless", "silent in events", "chunked"))
        size = 200000 if self.chance(0.3) else None
        if how == "slow events":
            size = 100
        _, body = self.task(how, size)
        head = post_head(len(body))
        everything = 1 << 20
        ends = (0, 1, 30, len(head), len(head) + 20, everything, everything, everything)

        with Client(self.relay.address) as client:
            try:
                self.start_tls(client)
                client.send((head + body)[:self.dice.choice(ends)])
                client.sock.settimeout(0.3)
                for _ in range(self.dice.randrange(4)):
                    client.sock.recv(self.dice.choice((1, 500, 65536)))
            except OSError:
                pass
            has_socket = client.sock.fileno() >= 0      # else it ended in the handshake
            if has_socket and self.chance(0.5):
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.report.count("clients that vanished")

    def huge(self):
        """Megabytes up and down; with a provider key not more than AIPROXY_MAX_BODY up."""
        padding = self.dice.choice((1 << 20, 3 << 20, 5 << 20))
        how = self.dice.choice(("length", "chunked", "until close"))
        size = self.dice.choice((10, 1 << 20, 6 << 20))
        task, body = self.task(how, size, padding)
        too_large = self.relay.has_provider_key and len(body) > MAX_BODY

        def exchange(client):
            sent, fields = body, AUTH
            if self.chance(0.5):
                sent = b"".join(chunk(piece) for piece in pieces(body, 1)) + b"0\r\n\r\n"
                fields = AUTH + CHUNKED
            try:
                client.request("POST", CHAT, sent, fields)
            except ConnectionError:
                if not too_large:
                    raise
            return client.read_reply()

        response = self.visit(exchange)
        if too_large:
            self.report.check(response.status == 413, "an upload of %d bytes was answered with %d"
                              % (len(body), response.status))
        else:
            self.check_response(response, task)

    def bad(self):
        """A request that HTTP or the settings forbid."""
        if self.relay.has_provider_key and self.chance(0.5):
            path, body, fields, status = self.dice.choice(FORBIDDEN)
            expected = (status,)

            def exchange(client):
                client.request("POST", path, body, fields)
                return client.read_reply()
        else:
            data = self.dice.choice(MALFORMED)
            expected = range(400, 506)

            def exchange(client):
                client.send(data)
                return client.read_reply()

        response = self.visit(exchange)
        self.report.check(response.status in expected, "a bad request was answered with %d: %r"
                          % (response.status, response.body))
        self.report.count("bad requests refused")

    def crowd(self):
        """Many that connect, send nothing and stay: they must not keep the others out."""
        sockets = []
        try:
            for _ in range(MAX_CONNECTIONS * self.relay.workers + 20):
                sockets.append(socket.create_connection(self.relay.address, PATIENCE))
            time.sleep(0.3)
        finally:
            for sock in sockets:
                sock.close()
        self.report.count("crowds")
        time.sleep(0.5)

    def websocket(self):
        """Bytes through a WebSocket and back, sent and received at the same time."""
        data = os.urandom(50000)
        fields = AUTH + [("Connection", "Upgrade"), ("Upgrade", "websocket")]

        def exchange(client):
            client.request("GET", "/v1/realtime?model=m", None, fields)
            response = client.read_head()
            if response.status == 101:
                response.body = self.send_through(client, data)
                response.complete = len(response.body) == len(data)
            else:
                client.read_body(response)
            return response

        response = self.visit(exchange)
        right = response.status == 101 and response.body == data
        self.report.check(right, "a tunnel's bytes came back wrong: %d" % response.status)
        self.report.count("tunnels")

    def send_through(self, client, data):
        """What comes back."""
        if not self.relay.has_tls:
            threading.Thread(target=client.send, args=(data,), daemon=True).start()
            return client.read_exactly(len(data)) or b""
        # Two threads that use one TLS connection corrupt memory up to CPython 3.12.
        received = b""
        for piece in pieces(data, 1):
            client.send(piece)
            received += client.read_exactly(len(piece)) or b""
        return received


GATED = {       # settings of the relay with a provider key
    "KEY": PROVIDER_KEY,
    "MODELS": "m",
    "PATHS": CHAT + ",GET /v1/realtime",
    "MAX_BODY": MAX_BODY,
    "RATE": "1000000/s",
}
KINDS = {       # methods of Visitor, and how many come at once
    "good": 10,
    "broken": 10,
    "slow": 4,
    "too_slow": 3,
    "vanishing": 6,
    "huge": 2,
    "bad": 3,
    "crowd": 1,
    "websocket": 1,
}

# ---- Chaos ----------------------------------------------------------------------------------


def probe_key(number):
    """The client key that the settings bring with this reload."""
    return "ck-soak-probe-%d" % number


def good_settings(name, number):
    if name == "transparent":
        return {"TIMEOUT": TIMEOUT + number % 2}
    return {"TIMEOUT": TIMEOUT,
            "CLIENT_KEYS": "soak=%s,probe=%s" % (CLIENT_KEY, probe_key(number))}


def write_settings(path, settings):
    """Put a new file in the place of the old one, so that nobody reads half of it."""
    with open(path + ".new", "w") as file:
        for pair in settings.items():
            file.write("AIPROXY_%s=%s\n" % pair)
    os.replace(path + ".new", path)


def ports_of_clients(relay, pid):
    """The client's port of each connection that this worker has accepted."""
    inodes = sockets_of(pid)
    own_port = ":%04X" % relay.address[1]
    ports = set()
    for _ in range(5):                  # the table changes while it is read
        with open("/proc/net/tcp") as file:
            for words in map(str.split, file):
                is_ours = words[1].endswith(own_port) and words[9] in inodes
                if is_ours and words[3] != LISTENING:
                    ports.add(int(words[2].rpartition(":")[2], 16))
    return ports


class Chaos(Visitor):
    """Has the settings read again, kills workers, and sees that nobody else is touched."""

    def __init__(self, relays, report, seed):
        super().__init__("probing", relays, report, math.inf, "chaos %d" % seed)
        self.stopping = threading.Event()
        self.number = 0                     # of the reload
        self.in_force = 0                   # the number of the settings that must be in force
        self.kills = 0
        self.answer = ""                    # what each worker says to the last reload

    def run(self):
        begin = time.monotonic()
        while not self.stopping.wait(begin + (self.number + 1) * RELOAD_SECONDS - time.monotonic()):
            self.number += 1
            for self.relay in self.relays:
                try:
                    self.disturb()
                except Exception as error:      # nothing may end it unseen
                    self.report_error(error)

    def disturb(self):
        """Reload, or kill a worker and reload when the next one is about to start, or has."""
        kills = self.number % 2 == 0
        if kills:
            self.kill()
            time.sleep(self.dice.random() * 0.5)
        before = self.reload()
        self.relay.wait_for_workers()
        wanted = 1 if kills else self.relay.workers
        heard = self.relay.wait_for_lines(self.answer, before + wanted)
        self.report.check(heard, "%s: a worker has not read the settings again" % self.relay.name)
        if not self.relay.has_provider_key:
            return
        if kills:
            time.sleep(0.5)             # the new worker reads them, too, if it is older than they
        self.probe(seconds=1)

    def reload(self):
        """SIGHUP with new settings, every third time with wrong ones."""
        relay = self.relay
        settings = good_settings(relay.name, self.number)
        is_wrong = self.number % 3 == 0
        if is_wrong:
            settings["MAX_TOKENS"] = "many"
        else:
            self.in_force = self.number
        write_settings(relay.env_file, settings)
        self.answer = "nothing has changed" if is_wrong else "are in force"
        self.report.count("wrong reloads" if is_wrong else "reloads")

        before = relay.count_lines(self.answer)
        relay.process.send_signal(signal.SIGHUP)
        return before

    def kill(self):
        """SIGKILL to the worker that is not measured, with whatever clients it has."""
        relay = self.relay
        victims = [pid for pid in relay.worker_pids() if pid != relay.pid]
        self.report.check(len(victims) == relay.workers - 1, "%s: %d other workers"
                          % (relay.name, len(victims)))
        for victim in victims:
            os.kill(victim, signal.SIGSTOP)
            while process_state(victim) != "T":
                time.sleep(0.001)
            now = time.monotonic()
            relay.killed.update((port, now) for port in ports_of_clients(relay, victim))
            os.kill(victim, signal.SIGKILL)
            self.kills += 1
            self.report.count("killed workers")

    def probe(self, seconds):
        """For so long new clients must find the key of the settings in force, and no other."""
        deadline = time.monotonic() + seconds
        others = [number for number in range(self.number + 1) if number != self.in_force]
        while time.monotonic() < deadline:
            self.try_key(self.in_force, 200)
            if others:
                self.try_key(self.dice.choice(others[-3:]), 401)

    def try_key(self, number, status):
        task, body = self.task("length", 5)

        def exchange(client):
            client.request("POST", CHAT, body, [("Authorization", "Bearer " + probe_key(number))])
            return client.read_reply()

        response = self.visit(exchange)
        self.report.check(
            response.status == status, "%s: with the key of reload %d, where %d is in force: %d"
            % (self.relay.name, number, self.in_force, response.status))
        self.report.count("probes")


# ---- The run --------------------------------------------------------------------------------


def run_clients(seconds, relays, report, seed, meanwhile=None):
    """Clients come for so long; `meanwhile` is called in this thread."""
    deadline = time.monotonic() + seconds
    visitors = []
    for kind, count in KINDS.items():
        for number in range(count):
            own_seed = "%s %d %d" % (kind, number, seed)
            visitors.append(Visitor(kind, relays, report, deadline, own_seed))
    for visitor in visitors:
        visitor.start()
    if meanwhile:
        meanwhile()
    for visitor in visitors:
        visitor.join(max(0, deadline - time.monotonic()) + 3 * PATIENCE)
        report.check(not visitor.is_alive(), "a %s client hangs" % visitor.kind)


def start_upstream(report):
    """The upstream's process and its URL."""
    command = [sys.executable, os.path.abspath(__file__), "--upstream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)
    url = process.stdout.readline().strip()

    def read_failures():
        for line in process.stdout:
            report.fail(line.strip())

    threading.Thread(target=read_failures, daemon=True).start()
    return process, url


def start_relays(url, real_limits):
    return [
        Relay("gated", real_limits, UPSTREAM=url, CLIENT_KEYS="soak=" + CLIENT_KEY,
              TIMEOUT=TIMEOUT, **GATED),
        Relay("transparent", real_limits, UPSTREAM=url, TIMEOUT=TIMEOUT),
    ]


def start_chaos_relays(url, real_limits, folder):
    certificate, private = make_certificate(folder)
    several = {"UPSTREAM": url, "WORKERS": 2, "TLS_CERT": certificate, "TLS_KEY": private}
    relays = []
    for spared, (name, settings) in enumerate((("gated", GATED), ("transparent", {}))):
        env_file = os.path.join(folder, name + ".env")
        write_settings(env_file, good_settings(name, 0))
        relays.append(Relay(name, real_limits, env_file, spared, **settings, **several))
    return relays


def print_usage(relay, stages):
    """A table of what the relay used: fresh, warm, in the end."""
    row = "  %-24s %10s %10s %10s"
    print(row % ("", "fresh", "warm", "in the end"))
    print(row % ("memory, MB", *("%.1f" % (usage.memory / 1e6) for usage in stages)))
    print(row % ("threads", *(usage.threads for usage in stages)))
    print(row % ("descriptors", *(usage.descriptors for usage in stages)))
    print(row % ("blocks of memory", "", *(usage.blocks for usage in stages[1:])))

    freed = relay.untrimmed - stages[-1].memory
    print("  %-24s %32.1f" % ("free, but kept by malloc", freed / 1e6))
    print("  %-24s %32.1f" % ("memory at its peak, MB", relay.peak / 1e6))


def check_usage(relay, stages, report):
    fresh, warm, end = stages
    most = warm.memory + MEMORY_SLACK + STACK_SLACK * end.threads
    report.check(end.memory <= most, "%s: memory grew from %d to %d bytes"
                 % (relay.name, warm.memory, end.memory))
    most = warm.blocks * BLOCK_SLACK
    report.check(end.blocks <= most, "%s: blocks of memory grew from %d to %d"
                 % (relay.name, warm.blocks, end.blocks))
    # The executor keeps the threads of the largest crowd; those that were refused had none.
    most = fresh.threads + 2 * MAX_CONNECTIONS
    report.check(end.threads <= most, "%s: %d threads are left, %d at most are for clients"
                 % (relay.name, end.threads, most))
    report.check(end.descriptors <= fresh.descriptors, "%s: %d descriptors are left, %d at first"
                 % (relay.name, end.descriptors, fresh.descriptors))


def stop_all(relays, report):
    """SIGTERM to all of them, and see that they end in time."""
    for relay in relays:
        relay.stopped = time.monotonic()
        relay.process.send_signal(signal.SIGTERM)
    for relay in relays:
        status = relay.process.wait(PATIENCE)
        seconds = time.monotonic() - relay.stopped
        report.check(status == 0, "%s: SIGTERM ended it with %r" % (relay.name, status))
        report.check(seconds < GRACE + END_SLACK, "%s: SIGTERM ended it after %.1f s"
                     % (relay.name, seconds))
        print("SIGTERM ended the %s relay after %.1f s" % (relay.name, seconds))
    time.sleep(0.5)                     # for the last lines to be read


def check_log(relay, report):
    """It must have reported no fault of its own."""
    faults = [line for line in relay.errors if "fault" in line or "Traceback" in line]
    report.check(not faults, "%s said: %s" % (relay.name, "".join(faults)[:2000]))
    for outcome in ("internal_error", "a damaged line"):
        count = relay.outcomes[outcome]
        report.check(not count, "%s: %d times in the log: %s" % (relay.name, count, outcome))
    print("  log: " + ", ".join("%s %d" % pair for pair in relay.outcomes.most_common()))


def check_workers(relay, parent, kills, report):
    """After the clients have left: the parent is as it was, and has as many workers."""
    end = relay.usage(relay.process.pid)
    report.check(end.threads == 1, "%s: the parent has %d threads" % (relay.name, end.threads))
    report.check(end.descriptors == parent.descriptors, "%s: the parent has %d descriptors, %d at "
                 "first" % (relay.name, end.descriptors, parent.descriptors))
    report.check(end.memory <= parent.memory + (1 << 20), "%s: the parent's memory grew from %d to "
                 "%d bytes" % (relay.name, parent.memory, end.memory))

    states = [process_state(pid) for pid in relay.worker_pids()]
    whole = len(states) == relay.workers and "Z" not in states
    report.check(whole, "%s: its workers are %r" % (relay.name, states))
    deaths = relay.count_lines("has ended (signal 9)")
    report.check(deaths == relay.count_lines("has ended (") == kills,
                 "%s: %d workers died, we killed %d" % (relay.name, deaths, kills))

    spared = relay.usage()
    newest = relay.usage([pid for pid in relay.worker_pids() if pid != relay.pid][-1])
    report.check(newest.descriptors <= spared.descriptors, "%s: the newest worker has %d "
                 "descriptors, the spared one %d"
                 % (relay.name, newest.descriptors, spared.descriptors))
    print("  %d workers killed, %d connections with them" % (kills, len(relay.killed)))
    print("  %-24s %10.1f %21.1f" % ("memory of the parent", parent.memory / 1e6, end.memory / 1e6))
    print("  %-24s %32.1f" % ("of the newest worker", newest.memory / 1e6))


def print_summary(report):
    print("\nclients")
    for pair in sorted(report.counts.items()):
        print("  %-32s %8d" % pair)
    for failure, count in collections.Counter(report.failures).most_common(20):
        times = " %d times" % count if count > 1 else ""
        print("FAILED%s: %s" % (times, failure))
    print("%d passed, %d failed" % (report.passed, len(report.failures)))


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=60,
        help="for how long clients come; a quarter of it, 30 s at most, is warm-up")
    parser.add_argument(
        "--real-limits", action="store_true", help="leave the limits in aiproxy.py as they are")
    parser.add_argument(
        "--chaos", action="store_true",
        help="TLS, two workers, reloads, kills, an end under load; needs /proc")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    return parser.parse_args()


def run(options, report, url):
    """Clients for a while, a pause, clients again; then what is left of them in the relays."""
    with tempfile.TemporaryDirectory() as folder:
        if options.chaos:
            relays = start_chaos_relays(url, options.real_limits, folder)
        else:
            relays = start_relays(url, options.real_limits)
        print("soak of %g s on Python %s, seed %d"
              % (options.seconds, sys.version.split()[0], options.seed), flush=True)
        measure(options, report, relays)
        end_relays(options, report, relays)


def measure(options, report, relays):
    """What the relays use: fresh, warm, and when the clients have left."""
    warm_up = min(30, options.seconds / 4)
    fresh = [relay.usage() for relay in relays]
    parents = [relay.usage(relay.process.pid) for relay in relays]
    run_clients(warm_up, relays, report, options.seed)
    warm = [relay.settled_usage(before) for relay, before in zip(relays, fresh)]
    chaos = Chaos(relays, report, options.seed)
    if options.chaos:
        chaos.start()
    run_clients(options.seconds - warm_up, relays, report, options.seed + 1)
    if options.chaos:
        chaos.stopping.set()
        chaos.join()
    end = [relay.settled_usage(before) for relay, before in zip(relays, fresh)]

    for relay, parent, *stages in zip(relays, parents, fresh, warm, end):
        print("\nthe %s relay" % relay.name)
        if all(stages):
            print_usage(relay, stages)
            check_usage(relay, stages, report)
        if options.chaos:
            check_workers(relay, parent, chaos.kills // len(relays), report)


def end_relays(options, report, relays):
    """SIGTERM; with chaos, while clients come."""
    def stop_under_load():
        time.sleep(2)
        stop_all(relays, report)

    print()
    if options.chaos:
        run_clients(2 + GRACE, relays, report, options.seed + 2, stop_under_load)
    else:
        stop_all(relays, report)
    for relay in relays:
        print("\nthe %s relay" % relay.name)
        check_log(relay, report)


def main():
    options = read_options()
    if options.upstream:
        return Upstream().run()
    report = Report()
    upstream, url = start_upstream(report)
    try:
        run(options, report, url)
    finally:
        upstream.kill()

    ended = report.counts["given up while idle"]
    report.check(ended <= 10 + report.passed // 100,
                 "%d connections ended without an answer" % ended)
    print_summary(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
