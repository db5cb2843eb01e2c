"""Caddy, nginx, HAProxy and a tunnel in front of the relay: what each must let through or refuse.

Events one by one, clients that leave, silence, a body that is too large, the client's address,
the loopback guard, and connections that stay open while nobody asks.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import threading
import time

from fronts import FIELDS, KEYS, README, Connection, Front, caddy, check_front, free_port, nginx
from fronts import recipe, write
from stand import Checks, check_calm, start
from support import (
    CHAT,
    EVENT_HEAD,
    OK,
    PATIENCE,
    Upstream,
    chunk,
    event,
    make_certificate,
    server_tls,
)

SILENCE = 3             # seconds that a front waits for the relay: stands for a balancer's minutes
LONG_SILENCE = 8        # seconds
TOO_LARGE = 40 << 20    # bytes of a body
VISITOR = "203.0.113.9"     # whom the tunnel brings

# `abortonclose` must stand where the frontend sees it, too: in the backend alone it does not notice
# a client that leaves before the first byte, nor, without it, one that leaves a silent stream.
HAPROXY = """
defaults
    mode http
    option abortonclose
    timeout connect 10s
    timeout client 600s
    timeout server 600s
frontend relay
    bind :443 ssl crt /etc/haproxy/relay.pem
    default_backend relay
backend relay
    option forwardfor
    option httpchk
    server relay 127.0.0.1:8000 check
"""


def edit(text, *changes):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def own_address():
    """An address of this machine that is not loopback: who comes by it counts as a stranger."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((VISITOR, 9))      # nothing is sent
        return sock.getsockname()[0]


# Each front with the README's lines in front of a relay at `address`, but for the seconds of
# silence that it bears. `host`: what it makes of the Host field, where that is not kept.

def make_nginx(folder, address, silence, host):
    """With connections that it keeps, which takes a group of servers."""
    location = edit(recipe("nginx"), ("127.0.0.1:8000", "aiproxy"), ("600s", "%ds" % silence))
    if host:
        location = edit(location, ("$host", host))
    return nginx(folder, location, "upstream aiproxy { server %s; keepalive 8; }" % address)


def make_caddy(folder, address, silence, host):
    lines = "transport http {\n read_timeout %ds\n }\n" % silence
    if host:
        lines += "header_up Host %s\n" % host
    there = "127.0.0.1:8000"
    return caddy(folder, edit(recipe("Caddy"), (there, "%s {\n%s}" % (address, lines))))


def make_haproxy(folder, address, silence, host):
    certificate, private = make_certificate(folder, "relay.example")
    pem = write(folder, "relay.pem", open(certificate).read() + open(private).read())
    port = free_port()
    config = edit(HAPROXY, ("127.0.0.1:8000", address), (":443", ":%d" % port),
                  ("/etc/haproxy/relay.pem", pem), ("server 600s", "server %ds" % silence),
                  (" check", " check inter 600s pool-purge-delay 600s"))
    if host:
        config += "    http-request set-header Host %s\n" % host
    command = ["haproxy", "-db", "-f", write(folder, "haproxy.cfg", config)]
    return Front(folder, command, port, authority=certificate)


class Tunnel:
    """Like cloudflared: TLS ends elsewhere, and a program on this machine asks for a visitor."""

    fields = (b"X-Forwarded-For", b"CF-Connecting-IP")

    def __init__(self, folder, address, silence, host):
        self.authority, private = make_certificate(folder, "relay.example")
        self.tls = server_tls(self.authority, private)
        self.relay = address.split(":")
        self.silence = silence
        self.host = host
        self.idle = []              # connections to the relay
        self.listener = socket.create_server(("", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.tls.wrap_socket(sock, server_side=True) as visitor:
                while self.relay_one(visitor):
                    pass

    def relay_one(self, visitor):
        """One request and its answer. Can another follow?"""
        request = b""
        while b"\r\n\r\n" not in request:
            piece = visitor.recv(65536)
            if not piece:
                return False
            request += piece
        relay = self.idle.pop() if self.idle else socket.create_connection(self.relay, PATIENCE)
        relay.sendall(self.edit_head(request))
        if not self.pump(visitor, relay):
            relay.close()
            return False
        self.idle.append(relay)
        return True

    def edit_head(self, request):
        lines = b"".join(b"\r\n%b: %b" % (name, VISITOR.encode()) for name in self.fields)
        head, _, rest = request.partition(b"\r\n\r\n")
        if self.host:
            head = re.sub(br"(?i)\r\nhost: [^\r]*", b"\r\nHost: " + self.host.encode(), head)
        return head + lines + b"\r\n\r\n" + rest

    def pump(self, visitor, relay):
        """Pass on both ways until the answer is whole. False if the connections must end."""
        answer = b""
        while not is_whole(answer):
            ready = select.select([visitor, relay], [], [], self.silence)[0]
            if not ready:
                return False
            if relay in ready:
                piece = relay.recv(65536)
                visitor.sendall(piece)
                answer += piece
            elif visitor in ready:
                piece = visitor.recv(65536)
                while visitor.pending():        # no selector sees it
                    piece += visitor.recv(65536)
                relay.sendall(piece)
            if not piece:
                return False
        if b"\r\nConnection: close" in answer:
            while visitor.recv(65536):      # so that the visitor reads what it was answered
                pass
            return False
        return True


def is_whole(answer):
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(br"(?i)\r\ncontent-length: (\d+)", head)
    if length:
        return len(body) >= int(length[1])
    return bool(end) and (body.endswith(b"0\r\n\r\n") or b" 204 " in head[:16])


FRONTS = {"nginx": make_nginx, "Caddy": make_caddy, "HAProxy": make_haproxy, "tunnel": Tunnel}


def ask(front, address="127.0.0.1", path=CHAT, key=FIELDS["Authorization"]):
    """The status and the body of a short question, from one of this machine's addresses."""
    with contextlib.closing(Connection(front, address)) as connection:
        connection.request("POST", path, b'{"model":"m"}', dict(FIELDS, Authorization=key))
        response = connection.getresponse()
        return response.status, response.read()


def check_upload(checks, name, front, upstream, folder):
    """A client that has 40 MB to send is refused, and can read why.

    Not over HTTP/2: there curl 7.88 sometimes loses what an early answer says, whoever gives it.
    """
    received = len(upstream.received)
    path = os.path.join(folder, "large")
    with open(path, "wb") as file:
        file.truncate(TOO_LARGE)
    scheme = "https" if front.authority else "http"
    command = ["curl", "-sS", "--http1.1", "-w", "\n%{http_code}", "-H", "Expect:"]
    command += ["--resolve", "relay.example:%d:127.0.0.1" % front.port]
    command += ["--cacert", front.authority] if front.authority else []
    command += ["-H", "Authorization: " + FIELDS["Authorization"]]
    command += ["%s://relay.example:%d%s" % (scheme, front.port, CHAT)]
    for way, more in (("length", []), ("chunks", ["-H", "Transfer-Encoding: chunked"])):
        with checks("%s: a body of 40 MB, sent by its %s, is refused readably" % (name, way)):
            upstream.answer = OK
            more += ["-X", "POST", "-T", path]
            done = subprocess.run(command + more, timeout=60, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            said = done.stdout.decode()
            print("       " + said[:80].replace("\n", " "))
            assert said.endswith("\n413"), (done.returncode, said)
            assert "request_too_large" in said, said
            assert not any(one.whole for one in upstream.received[received:])


def check_addresses(checks, name, front, relay, here):
    """The log names who asked the front, not the front."""
    for address in ("127.0.0.1", here):
        with checks("%s: the log names the client %s" % (name, address)):
            path = "/asked-of-%s-by-%s" % (name.replace(" ", "-"), address)
            ask(front, address, path, "Bearer not-a-client-key")
            line = relay.wait_for_line(relay.lines, ".*%s.*" % path)[0]
            client = json.loads(line)["client"]
            assert client == (VISITOR if isinstance(front, Tunnel) else address), line


def check_guard(checks, name, kept, rewritten, upstream, here):
    """Without client keys nobody else is served, whatever the front makes of Host."""
    received = len(upstream.received)
    upstream.answer = OK
    with checks(name + ": a stranger is refused without client keys"):
        status, body = ask(kept, here)
        assert status == 403 and b"host_not_allowed" in body, (status, body)
    with checks(name + ": also where the front asks for localhost"):
        status, body = ask(rewritten, here)
        assert status == 403 and b"host_not_allowed" in body, (status, body)
        assert len(upstream.received) == received
    if name != "tunnel":
        with checks(name + ": who is on this machine is served"):
            assert ask(rewritten)[0] == 200
        return
    with checks("tunnel: also where CF-Connecting-IP alone names the stranger"):
        rewritten.fields = (b"CF-Connecting-IP",)
        assert ask(rewritten)[0] == 403


def ports_to(address):
    """The local ports of the open connections to an address."""
    host, port = address.split(":")
    number = int.from_bytes(socket.inet_aton(host), "little")
    wanted = "%08X:%04X" % (number, int(port))
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file]
    return {row[1] for row in rows if row[2] == wanted and row[3] == "01"}


def read_stream(front):
    """The body of a stream as far as it comes, and whether it ends like a whole one."""
    body = b""
    with contextlib.closing(Connection(front)) as connection:
        connection.request("POST", CHAT, b'{"model":"m","stream":true}', FIELDS)
        response = connection.getresponse()
        try:
            for piece in iter(lambda: response.read1(65536), b""):
                body += piece
        except (OSError, http.client.HTTPException):
            return body, False
    return body, True


def check_looks_cut(name, is_whole):
    """All but old Caddys: before its pull request 5952 (of 2023) it ended what it cut cleanly."""
    print("       %s" % ("ended as if it were whole" if is_whole else "cut"))
    assert name == "Caddy" or not is_whole


def check_death(checks, name, front, upstream):
    """An upstream that dies in the middle of a stream."""

    def die(received):
        received.send(EVENT_HEAD + chunk(event("first")))
        received.reset()

    with checks(name + ": a stream whose upstream dies looks cut"):
        upstream.answer = die
        body, is_whole = read_stream(front)
        assert b"upstream_died" in body and b"[DONE]" not in body, body
        check_looks_cut(name, is_whole)


def check_silence(checks, beating, plain, fronts):
    """All fronts at once: a stream with heartbeats, one without, and a connection without use.

    `beating` and `plain` are the upstreams of the relays with heartbeats and without.
    """
    go_on = threading.Event()
    given_up = threading.Semaphore(0)

    def pause(received):
        received.send(EVENT_HEAD + chunk(event("first")))
        assert go_on.wait(PATIENCE)
        received.send(chunk(event("second")) + b"0\r\n\r\n")

    def wait(received):
        received.send(EVENT_HEAD + chunk(event("first")))
        if received.wait_closed() is not None:
            given_up.release()

    beating.answer = pause
    plain.answer = wait
    executor = concurrent.futures.ThreadPoolExecutor(2 * len(fronts))
    kept = {name: executor.submit(read_stream, front["beating"]) for name, front in fronts.items()}
    cut = {name: executor.submit(read_stream, front["plain"]) for name, front in fronts.items()}
    time.sleep(LONG_SILENCE)
    go_on.set()
    for name in fronts:
        with checks("%s: %d s of silence with heartbeats do no harm" % (name, LONG_SILENCE)):
            body, is_whole = kept[name].result(PATIENCE)
            assert body.startswith(event("first")) and body.endswith(event("second")), body
            assert body.count(b": keep-alive\n\n") >= LONG_SILENCE // SILENCE, body
            assert is_whole
        with checks("%s: without heartbeats the stream is cut after %d s" % (name, SILENCE)):
            body, is_whole = cut[name].result(PATIENCE)
            assert body == event("first"), body
            check_looks_cut(name, is_whole)
    with checks("all fronts: what was cut has stopped upstream"):
        for _ in fronts:
            assert given_up.acquire(timeout=PATIENCE)


class Idle:
    """A connection from a front to the relay that is kept while nobody asks."""

    def __init__(self, front, address):
        self.front = front
        self.address = address
        self.client = Connection(front)         # HAProxy keeps the two together
        before = ports_to(address)
        self.ask()
        self.ports = ports_to(address) - before

    def ask(self):
        self.client.request("POST", CHAT, b'{"model":"m"}', FIELDS)
        response = self.client.getresponse()
        assert response.read() == b'{"ok":true}'

    def check(self):
        assert len(self.ports) == 1, self.ports
        before = ports_to(self.address)
        assert self.ports <= before, "it is closed"
        self.ask()
        assert ports_to(self.address) <= before, "it was not used"
        self.client.close()


def start_fronts(stack, relays):
    """By name of the front and of its relay."""
    fronts = {name: {} for name in FRONTS}
    for name, make in FRONTS.items():
        for relay, how in relays.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            fronts[name][relay] = stack.enter_context(make(folder, *how))
    return fronts


def main():
    checks = Checks()
    here = own_address()
    settings = {name.replace("AIPROXY_", ""): value for name, value in KEYS.items()}
    settings.update(HEARTBEAT=1, HOST="0.0.0.0", TRUSTED_PROXIES=here, LOG="json")
    settings["MAX_BODY"] = "4MB"        # so that what is refused in the middle is soon there
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        upstream = enter(Upstream())
        other = enter(Upstream())
        beating = enter(start(upstream.url, **settings))
        plain = enter(start(other.url, KEY=KEYS["AIPROXY_KEY"], OPEN=1, RATE="99/s", LOG="json"))
        guarded = enter(start(other.url, KEY=KEYS["AIPROXY_KEY"]))
        plain_at = "127.0.0.1:%d" % plain.address[1]
        beating_at = "%s:%d" % (here, beating.address[1])       # as on another machine
        guarded_at = "127.0.0.1:%d" % guarded.address[1]
        fronts = start_fronts(stack, {
            "patient": (beating_at, 600, None),
            "beating": (beating_at, SILENCE, None),
            "plain": (plain_at, SILENCE, None),
            "idle": (plain_at, 600, None),
            "kept": (guarded_at, 600, None),
            "rewritten": (guarded_at, 600, "localhost:8000"),
        })
        idle = {name: Idle(front["idle"], plain_at) for name, front in fronts.items()}
        with checks("HAProxy: it runs with the README's lines"):
            lines = re.findall(r"`((?:option|timeout) [a-z0-9 ]+)`", README)
            assert len(set(lines)) == 5 and all("    %s\n" % line in HAPROXY for line in lines)
        with checks("HAProxy: its health check is answered"):
            plain.wait_for_line(plain.lines, r'"OPTIONS", "path": "/".*"status": 204')
        folder = enter(tempfile.TemporaryDirectory())
        for name, front in fronts.items():
            check_front(checks, name, front["patient"], upstream)
            check_death(checks, name, front["patient"], upstream)
            check_upload(checks, name, front["patient"], upstream, folder)
            other.answer = OK
            check_addresses(checks, name + " elsewhere", front["patient"], beating, here)
            check_addresses(checks, name, front["plain"], plain, here)
            check_guard(checks, name, front["kept"], front["rewritten"], other, here)
        check_silence(checks, upstream, other, fronts)
        other.answer = OK
        for name in fronts:
            with checks(name + ": its idle connection to the relay is used again"):
                idle[name].check()
        for relay in (beating, plain, guarded):
            with checks("no fault was printed"):
                check_calm(relay)
    checks.end()


if __name__ == "__main__":
    main()
