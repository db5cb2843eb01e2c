#!/usr/bin/env python3
"""A soak: python3 tests/soak.py --seconds 60

Two relays run as processes, one that hides a key and one that is transparent, in front of one upstream that stalls, resets, lies
about lengths and sends garbage. Good, bad, slow, vanishing and huge clients come all at once. In the end

- every answer that a good client got was right byte for byte, and every answer that the upstream broke was seen to be broken;
- memory, threads and file descriptors of the relays are back where they were after the warm-up;
- neither said a word of a fault, no client saw the provider key, the upstream saw no client key, and SIGTERM ends both with 0.

The limits of aiproxy.py that are half a minute or more are cut to a few seconds, so that a minute sees them all reached often;
--real-limits leaves them alone. Memory and descriptors are read from /proc: elsewhere these two checks are left out.
The last line is "N passed, N failed"; exit status 1 if any failed.
"""
import argparse
import collections
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from support import CHAT, EVENT_HEAD, PATIENCE, PROGRAM, Client, chunk, clean_environ, event  # noqa: E402

PROVIDER_KEY, CLIENT_KEY = "sk-soak-provider-key", "ck-soak-client-key"
AUTH = [("Authorization", "Bearer " + CLIENT_KEY)]
TIMEOUT = 8             # AIPROXY_TIMEOUT: long enough for a machine that stumbles
LIMITS = dict(HEAD_SECONDS=5, STALL_SECONDS=5, BODY_GRACE=5, POOL_SECONDS=5, IDLE_SECONDS=6, SPARE_SECONDS=2)
MAX_BODY = 4 << 20
CLIENTS = 128           # AIPROXY_MAX_CONNECTIONS: a crowd reaches it
MEMORY_SLACK = 4 << 20  # bytes that a relay may hold more than after the warm-up
# How a relay is run: with the limits above, and giving back at SIGUSR1 what glibc keeps although it is free, which is no leak: places between what
# is in use, and caches. The report tells both.
RUN = """import ctypes, signal, sys, aiproxy
vars(aiproxy).update(%r)
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda *_: getattr(ctypes.CDLL(None), "malloc_trim", int)(0))
sys.exit(aiproxy.main())
"""

# ---- What is asked for, and what the right answer is. A request's body says how the upstream shall answer it. ----------------


def truth(want):
    """The body of the right answer."""
    if want["how"] == "a usage that hurts":
        return b'{"usage":{"seed":%d,"a":' % want["seed"] + b"[" * 30000
    if "events" in want["how"]:
        return b"".join(event(json.dumps({"seed": want["seed"], "n": n})) for n in range(want["size"])) + event("[DONE]")
    return (hashlib.sha512(b"%d" % want["seed"]).digest() * (want["size"] // 64 + 1))[:want["size"]]


def pieces(data, seed):
    """`data` in pieces of every size."""
    dice, at = random.Random(seed), 0
    while at < len(data):
        size = dice.choice((1, 2, 15, 100, 1000, 10000, 70000))
        yield data[at:at + size]
        at += size


def with_length(body, length=None):
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def stall(peer, want):
    """Say no more until the other side hangs up."""
    peer.settimeout(60)
    while peer.recv(65536):
        pass
    raise ConnectionResetError()


def reset(peer, want):
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raise ConnectionResetError()


def hang_up(peer, want):
    raise ConnectionResetError()


def send_chunked(peer, body, pause=0.0):
    peer.sendall(EVENT_HEAD)
    for piece in pieces(body, len(body)):
        peer.sendall(chunk(piece))
        if pause:
            time.sleep(pause)
    peer.sendall(b"0\r\n\r\n")


def send_until_close(peer, want):
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + truth(want))
    peer.shutdown(socket.SHUT_WR)
    stall(peer, want)


GOOD = {        # how: what the upstream does
    "length": lambda peer, want: peer.sendall(with_length(truth(want))),
    "chunked": lambda peer, want: send_chunked(peer, truth(want)),
    "until close": send_until_close,
    "events": lambda peer, want: [peer.sendall(EVENT_HEAD)] + [peer.sendall(chunk(one + b"\n\n")) for one in truth(want).split(b"\n\n")[:-1]] + [peer.sendall(b"0\r\n\r\n")],
    "slow events": lambda peer, want: send_chunked(peer, truth(want), 0.005),
    "more than it said": lambda peer, want: peer.sendall(with_length(truth(want)) + with_length(b"poison")),
    "a usage that hurts": lambda peer, want: peer.sendall(EVENT_HEAD + chunk(truth(want)) + b"0\r\n\r\n"),
}


def half(want):
    return truth(want)[:want["size"] // 2]


def after(data, act):
    """An upstream that sends `data`, bytes or made of the request, and then does `act`."""
    def behave(peer, want):
        peer.sendall(data(want) if callable(data) else data)
        act(peer, want)
    return behave


BROKEN = {      # an answer of these must be seen to be none: an error of ours, or cut
    "silent": stall,
    "silent in a head": after(b"HTTP/1.1 200 OK\r\nX: ", stall),
    "silent in a body": after(lambda want: with_length(half(want), want["size"]), stall),
    "silent in events": after(lambda want: EVENT_HEAD + chunk(event("1")), stall),
    "reset": reset,
    "reset in a head": after(b"HTTP/1.1 200 OK\r\nX: ", reset),
    "reset in a body": after(lambda want: with_length(half(want), want["size"]), reset),
    "hang-up in events": after(lambda want: EVENT_HEAD + chunk(event("1")), hang_up),
    "less than it said": after(lambda want: with_length(half(want), want["size"]), hang_up),
    "two lengths": after(lambda want: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n" + with_length(truth(want))[17:], hang_up),
    "length and chunked": after(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", hang_up),
    "a length of nonsense": after(b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n12345", hang_up),
    "garbage": after(lambda want: truth(want), stall),
    "garbage in a head": after(b"HTTP/1.1 200 OK\r\nX\x00: \x01\r\n\r\n", hang_up),
    "garbage for a chunk": after(EVENT_HEAD + chunk(event("1")) + b"zz\r\n\r\n", stall),
    "a chunk without end": after(EVENT_HEAD + b"ffffffffffffffff\r\n" + bytes(100000), hang_up),
    "a head without end": after(b"HTTP/1.1 200 OK\r\n" + b"X: %b\r\n" % (b"a" * 1000) * 100, stall),
    "interim answers only": after(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, stall),
    "the key in an error": after(lambda want: b"HTTP/1.1 403 No\r\nConnection: close\r\nContent-Length: 99\r\n\r\n" + PROVIDER_KEY.encode().center(99), hang_up),
}


class Upstream:
    """Does as each request says. A thread for each connection, all in a process of its own, which says on stdout where it is and what it found wrong."""

    def run(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.say("http://127.0.0.1:%d" % self.listener.getsockname()[1])
        while True:
            peer = self.listener.accept()[0]
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def say(self, line):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def serve(self, peer):
        with peer, peer.makefile("rb") as stream:
            try:
                while True:
                    peer.settimeout(PATIENCE * 3)
                    head = b""
                    while not head.endswith(b"\r\n\r\n"):
                        line = stream.readline()
                        if not line:
                            return
                        head += line
                    self.answer(peer, stream, head.lower())
            except (OSError, ValueError):
                pass                            # the relay hung up, as its client had

    def answer(self, peer, stream, head):
        if b"ck-soak" in head and b"sk-soak" in head or b"x-forwarded-for" in head:
            self.say("the upstream saw a client's key or address")
        if b"upgrade: websocket" in head:
            peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            while True:
                data = peer.recv(65536)
                peer.sendall(data)
                if not data:
                    raise ConnectionResetError()
        body = b""
        if b"transfer-encoding: chunked" in head:
            while True:
                size = int(stream.readline(), 16)
                body += stream.read(size + 2)[:-2]
                if not size:
                    break
        elif b"content-length: " in head:
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = stream.read(length)
            if len(body) < length:
                raise ConnectionResetError()
        want = json.loads(body)
        if hashlib.md5(want.pop("pad", "").encode()).hexdigest() != want["sum"]:
            self.say("an upload arrived damaged")
        if want["how"] == "endless":
            peer.sendall(EVENT_HEAD)
            while True:
                peer.sendall(chunk(event("x" * 50000)))
                time.sleep(0.01)
        (GOOD.get(want["how"]) or BROKEN[want["how"]])(peer, want)


# ---- The relays ----------------------------------------------------------------------------------------------------------------


class Relay:
    """aiproxy.py as a process, what it says, and what it uses."""

    def __init__(self, name, real_limits, **settings):
        self.name, self.gated = name, "KEY" in settings
        environ = {"AIPROXY_" + key: str(value) for key, value in settings.items()}
        environ.update(AIPROXY_PORT="0", AIPROXY_LOG="json", AIPROXY_TIMEOUT=str(TIMEOUT), AIPROXY_MAX_CONNECTIONS=str(CLIENTS), PYTHONPATH=os.path.dirname(PROGRAM))
        self.process = subprocess.Popen([sys.executable, "-c", RUN % ({} if real_limits else LIMITS)], env=clean_environ(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.said, self.outcomes, self.lines, self.address = [], collections.Counter(), 0, None
        while self.address is None:
            line = self.process.stderr.readline()
            self.said.append(line)
            assert line, "the relay did not start: %s" % "".join(self.said)
            if " on http://" in line:
                self.address = "127.0.0.1", int(line.rpartition(":")[2])
        for read in (self.read_said, self.read_log):
            threading.Thread(target=read, daemon=True).start()

    def read_said(self):
        self.said += self.process.stderr

    def read_log(self):
        for line in self.process.stdout:
            self.outcomes[json.loads(line)["outcome"]] += 1

    def uses(self):
        """(bytes of memory, threads, file descriptors); None where there is no /proc."""
        folder = "/proc/%d/" % self.process.pid
        if not os.path.exists(folder + "status"):
            return None
        with open(folder + "status") as file:
            status = dict(line.split(":", 1) for line in file)
        self.peak = int(status["VmHWM"].split()[0]) << 10
        return int(status["VmRSS"].split()[0]) << 10, int(status["Threads"]), len(os.listdir(folder + "fd"))

    def settle(self, fresh):
        """What it uses when nobody is there any more; waits as long as its limits say for threads and connections to end."""
        deadline, now = time.monotonic() + PATIENCE + 40, self.uses()
        while now and time.monotonic() < deadline and (now[1] > fresh[1] or now[2] > fresh[2]):
            time.sleep(0.2)
            now = self.uses()
        self.untrimmed = now and now[0]
        if now:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1)
        return self.uses()


class Report:
    """Counts of what was seen, and the failures."""

    def __init__(self):
        self.lock, self.passed, self.failures, self.seen = threading.Lock(), 0, [], collections.Counter()

    def check(self, right, what):
        with self.lock:
            self.passed += bool(right)
        if not right:
            self.fail(what)

    def fail(self, what):
        with self.lock:
            self.failures.append(what)

    def count(self, what):
        with self.lock:
            self.seen[what] += 1


# ---- The clients: each method is one visit ------------------------------------------------------------------------------------


class Visitor(threading.Thread):
    """Comes again and again as `kind` until `deadline`."""

    def __init__(self, kind, relays, report, deadline, seed):
        super().__init__(daemon=True)
        self.kind, self.relays, self.report, self.deadline, self.dice = kind, relays, report, deadline, random.Random(seed)

    def run(self):
        while time.monotonic() < self.deadline:
            self.relay = self.dice.choice(self.relays)
            try:
                getattr(self, self.kind)()
            except Exception as error:      # nothing here may end a visitor unseen
                self.report.fail("%s client of the %s relay: %s: %s" % (self.kind, self.relay.name, type(error).__name__, str(error)[:200]))
            time.sleep(self.dice.random() * 0.02)

    def want(self, how, size=None, pad=0):
        """A request's body and what it asks for."""
        want = {"model": "m", "how": how, "seed": self.dice.randrange(1 << 30), "size": size or self.dice.choice((1, 10, 200) if "events" in how else (10, 1000, 20000, 200000))}
        extra = {"sum": hashlib.md5(b"x" * pad).hexdigest(), "pad": "x" * pad}
        if how == "more than it said":      # in one piece: a surplus that comes after its connection was used again looks like an answer
            want["size"] = 5
        if "events" in how:
            want["size"] = min(want["size"], 1000)
        return want, json.dumps(dict(want, **extra)).encode()

    def visit(self, exchange, receive_buffer=None):
        """exchange(client) on new connections until it is not turned away: a full relay says 503 or gives up whoever is idle."""
        for _ in range(200):
            try:
                with Client(self.relay.address, receive_buffer) as client:
                    reply = exchange(client)
            except (ConnectionError, AssertionError) as error:
                if isinstance(error, AssertionError) and "ended before" not in str(error):
                    raise
                self.report.count("given up while idle")
                continue
            if reply is None or reply.status != 503:
                return reply
            self.report.check(reply.code == "server_busy" and reply.get("retry-after"), "a 503 that is not ours: %r" % reply.body)
            self.report.count("turned away with 503")
            time.sleep(0.05)
        raise RuntimeError("never let in")

    def check_reply(self, reply, want):
        right = reply.status == 200 and reply.complete and reply.body == truth(want)
        self.report.check(right, "%s: a wrong answer to %r: %d %s, %d bytes, complete: %s, begins %r" % (
            self.relay.name, want, reply.status, "right" if right else "wrong", len(reply.body), reply.complete, reply.body[:60]))
        self.check_secret(reply)
        self.report.count("good answers, " + self.kind)

    def check_secret(self, reply):
        if PROVIDER_KEY.encode() in reply.raw_head + reply.body:
            self.report.fail("a client of the %s relay saw the provider key" % self.relay.name) if self.relay.gated else None

    def good(self):
        asked = [self.want(self.dice.choice(list(GOOD)), 5 if self.dice.random() < 0.5 else None) for _ in range(self.dice.randrange(1, 6))]
        pipelined = self.dice.random() < 0.2

        def exchange(client):
            while asked:
                batch = asked[:] if pipelined else asked[:1]
                for _, body in batch:
                    client.request("POST", CHAT, body, AUTH)
                for want, _ in batch:
                    reply = client.read_reply()
                    if reply.status == 503:
                        return reply
                    self.check_reply(reply, want)
                    asked.pop(0)
            return None
        self.visit(exchange)

    def broken(self):
        """A good client of an upstream that is not."""
        want, body = self.want(self.dice.choice(list(BROKEN)), 5000)

        def exchange(client):
            client.request("POST", CHAT, body, AUTH)
            return client.read_reply()
        reply = self.visit(exchange)
        seen = reply.status >= 400 or not reply.complete
        if want["how"] in ("less than it said", "silent in a body", "reset in a body"):
            seen = seen and (reply.status >= 400 or truth(want).startswith(reply.body))
        self.report.check(seen, "%s: %r was not seen to be broken: %d, %d bytes %r" % (self.relay.name, want["how"], reply.status, len(reply.body), reply.body[:80]))
        self.check_secret(reply)
        self.report.count("broken answers seen as such")

    def slow(self):
        """Sends and takes a little at a time, but fast enough."""
        want, body = self.want(self.dice.choice(("length", "chunked", "events")), 300 if self.dice.random() < 0.5 else 500000 if self.dice.random() < 0.1 else None)

        def exchange(client):
            head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), CLIENT_KEY.encode(), len(body))
            for at in range(0, len(head + body), 40):
                client.send((head + body)[at:at + 40])
                time.sleep(0.01)
            recv, client.more = client.sock.recv, lambda: take()

            def take():
                time.sleep(0.002)
                data = recv(2000)
                client.data += data
                return bool(data)
            return client.read_reply()
        self.check_reply(self.visit(exchange, receive_buffer=4096), want)

    def too_slow(self):
        """Sends its head or takes its answer so slowly that it must be let go."""
        with Client(self.relay.address, receive_buffer=4096) as client:
            try:
                if self.dice.random() < 0.5:
                    client.request("POST", CHAT, self.want("endless")[1], AUTH)
                    client.sock.recv(1000)
                    until = time.monotonic() + 2 * LIMITS["STALL_SECONDS"]
                    while time.monotonic() < min(until, self.deadline):
                        time.sleep(0.1)
                else:
                    client.send(b"POST / HTTP/1.1\r\nX: ")
                    for _ in range(100):
                        time.sleep(0.1)
                        client.send(b"a")
            except OSError:
                pass
        self.report.count("clients that were too slow")

    def vanishing(self):
        """Goes away in mid-anything, with or without a reset."""
        want, body = self.want(self.dice.choice(("length", "slow events", "silent", "endless", "silent in events", "chunked")), 200000 if self.dice.random() < 0.3 else None)
        if want["how"] == "slow events":
            want, body = self.want("slow events", 100)
        head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), CLIENT_KEY.encode(), len(body))
        with Client(self.relay.address) as client:
            try:
                client.send((head + body)[:self.dice.choice((0, 1, 30, len(head), len(head) + 20, 1 << 20, 1 << 20, 1 << 20))])
                client.sock.settimeout(0.3)
                for _ in range(self.dice.randrange(4)):
                    client.sock.recv(self.dice.choice((1, 500, 65536)))
            except OSError:
                pass
            if self.dice.random() < 0.5:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.report.count("clients that vanished")

    def huge(self):
        """Megabytes up and down; with a hidden key not more than AIPROXY_MAX_BODY up."""
        pad = self.dice.choice((1 << 20, 3 << 20, 5 << 20))
        want, body = self.want(self.dice.choice(("length", "chunked", "until close")), self.dice.choice((10, 1 << 20, 6 << 20)), pad)
        refused = self.relay.gated and len(body) > MAX_BODY

        def exchange(client):
            form = self.dice.random() < 0.5
            try:
                client.request("POST", CHAT, b"".join(chunk(piece) for piece in pieces(body, 1)) + b"0\r\n\r\n" if form else body, AUTH + ([("Transfer-Encoding", "chunked")] if form else []))
            except ConnectionError:
                if not refused:
                    raise
            return client.read_reply()
        if refused:
            reply = self.visit(exchange)
            self.report.check(reply.status == 413, "an upload of %d bytes was answered with %d" % (len(body), reply.status))
        else:
            self.check_reply(self.visit(exchange), want)

    BAD = [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
           b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"GET /../x HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n",
           b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n"]
    REFUSED = [(CHAT, b'{"model":"m"}', [("Authorization", "Bearer wrong")], 401), (CHAT, b'{"model":"other"}', AUTH, 403), (CHAT, b"not JSON", AUTH, 400), ("/v1/files", b"{}", AUTH, 404),
               (CHAT, b"[" * 100000, AUTH, 400), (CHAT, b"5\r\nabcdefgh\r\n0\r\n\r\n", AUTH + [("Transfer-Encoding", "chunked")], 400)]

    def bad(self):
        if self.relay.gated and self.dice.random() < 0.5:
            path, body, fields, expected = self.dice.choice(self.REFUSED)

            def exchange(client):
                client.request("POST", path, body, fields)
                return client.read_reply()
        else:
            data, expected = self.dice.choice(self.BAD), None

            def exchange(client):
                client.send(data)
                return client.read_reply()
        reply = self.visit(exchange)
        self.report.check(reply.status == expected or expected is None and 400 <= reply.status <= 505, "a bad request was answered with %d: %r" % (reply.status, reply.body))
        self.report.count("bad requests refused")

    def crowd(self):
        """Many that come, say nothing, and stay a while: they must not keep the others out."""
        clients = []
        try:
            for _ in range(CLIENTS + 20):
                clients.append(socket.create_connection(self.relay.address, PATIENCE))
            time.sleep(0.3)
        finally:
            for client in clients:
                client.close()
        self.report.count("crowds")
        time.sleep(0.5)

    def websocket(self):
        data = os.urandom(50000)

        def exchange(client):
            client.request("GET", "/v1/realtime?model=m", None, AUTH + [("Connection", "Upgrade"), ("Upgrade", "websocket")])
            reply = client.read_head()
            if reply.status == 101:
                threading.Thread(target=client.send, args=(data,), daemon=True).start()
                reply.body = client.read_exactly(len(data))
            else:
                client.read_body(reply)
            return reply
        reply = self.visit(exchange)
        self.report.check(reply.status == 101 and reply.body == data, "a tunnel's bytes came back wrong: %d" % reply.status)
        self.report.count("tunnels")


KINDS = {"good": 10, "broken": 10, "slow": 4, "too_slow": 3, "vanishing": 6, "huge": 2, "bad": 3, "crowd": 1, "websocket": 1}


def run_clients(seconds, relays, report, seed):
    deadline = time.monotonic() + seconds
    visitors = [Visitor(kind, relays, report, deadline, "%s %d %d" % (kind, number, seed)) for kind, count in KINDS.items() for number in range(count)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(max(0, deadline - time.monotonic()) + 3 * PATIENCE)
        report.check(not visitor.is_alive(), "a %s client hangs" % visitor.kind)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for how long clients come; a quarter of it, 30 s at most, is warm-up")
    parser.add_argument("--real-limits", action="store_true", help="leave the limits in aiproxy.py as they are")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    if options.upstream:
        return Upstream().run()
    report = Report()
    upstream = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--upstream"], stdout=subprocess.PIPE, universal_newlines=True)
    url = upstream.stdout.readline().strip()
    threading.Thread(target=lambda: [report.fail(line.strip()) for line in upstream.stdout], daemon=True).start()
    relays = [Relay("gated", options.real_limits, UPSTREAM=url, KEY=PROVIDER_KEY, CLIENT_KEYS="soak=" + CLIENT_KEY, MODELS="m", PATHS=CHAT + ",GET /v1/realtime", MAX_BODY=MAX_BODY,
                    RATE="1000000/s"),
              Relay("transparent", options.real_limits, UPSTREAM=url)]
    print("soak of %g s on Python %s, seed %d" % (options.seconds, sys.version.split()[0], options.seed), flush=True)
    fresh = [relay.uses() for relay in relays]
    warm_up = min(30, options.seconds / 4)
    run_clients(warm_up, relays, report, options.seed)
    warm = [relay.settle(before) for relay, before in zip(relays, fresh)]
    run_clients(options.seconds - warm_up, relays, report, options.seed + 1)
    settled = [relay.settle(before) for relay, before in zip(relays, fresh)]

    for relay, *stages in zip(relays, fresh, warm, settled):
        print("\nthe %s relay" % relay.name)
        if all(stages):
            print("  %-24s %10s %10s %10s" % ("", "fresh", "warm", "in the end"))
            for name, *values in zip(("memory, MB", "threads", "descriptors"), *stages):
                print("  %-24s %10s %10s %10s" % ((name,) + tuple("%.1f" % (value / 1e6) if "MB" in name else value for value in values)))
            print("  %-24s %32.1f" % ("free, but kept by malloc", (relay.untrimmed - stages[2][0]) / 1e6))
            print("  %-24s %32.1f" % ("memory at its peak, MB", relay.peak / 1e6))
            report.check(stages[2][0] <= stages[1][0] + MEMORY_SLACK, "%s: memory grew from %d to %d bytes" % (relay.name, stages[1][0], stages[2][0]))
            report.check(stages[2][1] <= stages[0][1], "%s: %d threads are left, %d at first" % (relay.name, stages[2][1], stages[0][1]))
            report.check(stages[2][2] <= stages[0][2], "%s: %d descriptors are left, %d at first" % (relay.name, stages[2][2], stages[0][2]))
        relay.process.send_signal(signal.SIGTERM)
        status = relay.process.wait(PATIENCE)
        report.check(status == 0, "%s: SIGTERM ended it with %r" % (relay.name, status))
        time.sleep(0.2)                     # for the last lines to be read
        said = "".join(relay.said)
        report.check("Traceback" not in said and "fault" not in said, "%s said: %s" % (relay.name, "".join(line for line in relay.said if "fault" in line or "Traceback" in line)[:2000]))
        report.check(not relay.outcomes["internal_error"], "%s: %d internal errors in the log" % (relay.name, relay.outcomes["internal_error"]))
        print("  log: " + ", ".join("%s %d" % pair for pair in relay.outcomes.most_common()))
    upstream.kill()
    report.check(report.seen["given up while idle"] <= 10 + report.passed // 100, "%d connections ended without an answer" % report.seen["given up while idle"])
    print("\nclients\n" + "\n".join("  %-32s %8d" % pair for pair in sorted(report.seen.items())))
    for failure, count in collections.Counter(report.failures).most_common(20):
        print("FAILED%s: %s" % (" %d times" % count if count > 1 else "", failure))
    print("%d passed, %d failed" % (report.passed, len(report.failures)))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
