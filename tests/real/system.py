"""The program under another Python or system, seen from this one: what users feel of it.

    AIPROXY_TEST_PYTHON="wine python.exe" python3 system.py
"""

import json
import os
import signal
import socket
import tempfile
import threading
import time

from stand import Checks, check_calm, start
from support import (
    CHAT, EVENT_HEAD, OK, PYTHON, Client, Program, Upstream, chunk, client_tls, event,
    make_certificate, server_tls,
)

SOON = 20       # seconds for what takes milliseconds where the machine is not busy
UNDER_WINE = os.path.basename(PYTHON[0]) == "wine"
KEYS = {"KEY": "sk-hidden-key", "CLIENT_KEYS": "alice=ck-alice"}
AUTH = [("Authorization", "Bearer ck-alice")]


def stream_by_hand(upstream, program, tls=False):
    """Check that the client has each event before the upstream sends the next one."""
    received_one = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")))
        assert received_one.wait(SOON), "the first event was held back"
        received.send(chunk(event("two")) + chunk(b""))

    upstream.answer = answer
    with Client(program.address, tls=tls) as client:
        client.request("POST", CHAT, b"{}", AUTH)
        assert client.read_head().status == 200
        assert client.read_chunk() == event("one")
        received_one.set()
        assert client.read_chunk() == event("two")
        assert client.read_chunk() == b""
    assert not upstream.errors, upstream.errors


def cancel(upstream, program, first):
    """Check that the upstream's connection is closed when the client leaves."""
    closed = []
    done = threading.Event()

    def answer(received):
        received.send(first)
        closed.append(received.wait_closed())
        done.set()

    upstream.answer = answer
    count = len(upstream.received)
    with Client(program.address) as client:
        client.request("POST", CHAT, b"{}", AUTH)
        upstream.wait_for(count + 1)
        if first:
            assert client.read_head().status == 200
    left = time.monotonic()
    assert done.wait(SOON) and closed[0] is not None, "the upstream was not told"
    assert time.monotonic() - left < SOON


def ask(program, body=b"{}", fields=AUTH, path=CHAT):
    with Client(program.address) as client:
        client.request("POST", path, body, fields)
        return client.read_reply()


def check_refusals(upstream, program):
    upstream.answer = OK
    count = len(upstream.received)
    smuggled = [("Content-Length", "2"), ("Transfer-Encoding", "chunked")]
    deep = b'{"a":' * 100000 + b"1" + b"}" * 100000
    assert ask(program, fields=()).status == 401
    assert ask(program, path="/v1/files").status in (403, 404)
    assert ask(program, b'{"model":"other"}').status in (400, 403, 404)
    assert ask(program, b'{"model":"m","model":"other"}').status == 400
    assert ask(program, deep).status == 400
    assert ask(program, fields=AUTH + smuggled).status == 400
    assert ask(program, bytes(3 << 20)).status == 413
    assert len(upstream.received) == count, "a refused request went up"


def check_big_bodies(upstream, program):
    size = 20 << 20
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    body = b'{"model":"m","text":"%b"}' % (b"x" * 1900000)
    reply = ask(program, body)
    assert reply.complete and len(reply.body) == size
    assert upstream.received[-1].body == body


def check_cut(upstream, program):
    def answer(received):
        received.send(EVENT_HEAD + b"9\r\nhalf")
        received.close()

    upstream.answer = answer
    assert not ask(program).complete
    with Client(program.address) as client:
        client.request("POST", CHAT, b"{}", AUTH, version="HTTP/1.0")
        assert not client.read_reply().complete, "an HTTP/1.0 client took half for the whole"


def check_deep_json(upstream, program):
    """The deepest body that passes, in many threads at once: a thread's stack must hold it."""
    upstream.answer = OK
    body = b'{"model":"m","a":' + b"[" * 98 + b"]" * 98 + b"}"
    statuses = []

    def send():
        statuses.append(ask(program, body).status)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 16, statuses


def check_demo(program):
    body = json.dumps({"model": "demo", "stream": True, "messages": []}).encode()
    with Client(program.address) as client:
        client.request("POST", CHAT, body)
        reply = client.read_head()
        assert reply.status == 200
        began = time.monotonic()
        pieces = 0
        while client.read_chunk():
            pieces += 1
    assert pieces > 5 and time.monotonic() - began > 0.5, "the events came together"


def check_tls(checks):
    with tempfile.TemporaryDirectory() as folder, Upstream() as plain:
        certificate, key = make_certificate(folder)
        files = {"TLS_CERT": certificate, "TLS_KEY": key}
        with start(plain.url, **KEYS, **files) as program:
            with checks("HTTPS to clients: each event at once"):
                stream_by_hand(plain, program, tls=True)
        with Upstream(tls=server_tls(certificate, key)) as upstream:
            settings = {"AIPROXY_" + name: value for name, value in KEYS.items()}
            settings.update(AIPROXY_UPSTREAM=upstream.url, SSL_CERT_FILE=certificate)
            with Program(env=settings) as program:
                with checks("HTTPS to the upstream: each event at once"):
                    stream_by_hand(upstream, program)
                with checks("HTTPS to the upstream: a client that leaves cancels"):
                    cancel(upstream, program, EVENT_HEAD + chunk(event("one")))


def check_end(checks, number):
    with Upstream() as upstream, start(upstream.url, **KEYS) as program:
        with checks("%s ends it with 0, a running stream cut visibly" % number.name):
            upstream.answer = lambda received: received.send(EVENT_HEAD + chunk(event("one")))
            with Client(program.address) as client:
                client.request("POST", CHAT, b"{}", AUTH)
                client.read_head()
                client.read_chunk()
                assert program.stop(number) == 0
                end = client.read_chunk()
                while end:      # the error event
                    end = client.read_chunk()
                assert end is None, "the cut looks like an end"


if __name__ == "__main__":
    checks = Checks()
    print("python: %s" % " ".join(PYTHON), flush=True)
    with Program("--demo") as program:
        with checks("the demo comes up, and its words come one by one"):
            check_demo(program)
            check_calm(program)
    with Upstream() as upstream:
        with start(upstream.url, MODELS="m", DEFAULT_MODEL="m", MAX_BODY="2MB", **KEYS) as program:
            with checks("each event comes before the next one is sent"):
                stream_by_hand(upstream, program)
            for phase, first in (
                ("before the head", b""),
                ("in a stream", EVENT_HEAD + chunk(event("one"))),
                ("in a body", OK[:-4]),
            ):
                with checks("a client that leaves %s cancels" % phase):
                    cancel(upstream, program, first)
            with checks("what must be refused is refused, and never goes up"):
                check_refusals(upstream, program)
            with checks("2 MB up and 20 MB down, every byte"):
                check_big_bodies(upstream, program)
            with checks("a cut response looks cut"):
                check_cut(upstream, program)
            with checks("the deepest JSON that passes fits into a thread's stack"):
                check_deep_json(upstream, program)
            with checks("neither a traceback nor a fault was printed"):
                check_calm(program)
    check_tls(checks)
    check_end(checks, signal.SIGINT)
    if not UNDER_WINE:      # which ends the process itself
        check_end(checks, signal.SIGTERM)
    checks.end()
