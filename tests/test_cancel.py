"""When a client disconnects, its upstream connection is closed: in every phase, also over TLS."""

import queue
import select
import socket
import sys
import threading

import pytest

from byhand import ByHand
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Upstream, chunk, event
from test_upstream import certificates, either, tls_upstream  # noqa: F401

AUTH = [("Authorization", "Bearer ck-alice")]
# seconds; it takes milliseconds, but a machine can be slow
SOON = 5
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\nhalf"

PHASES = {
    "mid-stream": (EVENT_HEAD + chunk(event("one")), b"\n\n"),
    "before the first byte": (b"", b""),
    "not streaming": (HALF, b"half"),
}


@pytest.fixture
def running(either, relay):  # noqa: F811
    """A relay in front of a plain and of a TLS upstream.

    `closed` gets the seconds until the upstream connection was closed, None if it was not.
    """
    started = relay(UPSTREAM=either.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    started.upstream = either
    started.closed = queue.Queue()
    return started


def close(client):
    client.sock.close()


def reset(client):
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.sock.close()


def shut_down_sending(client):
    client.sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [close, reset, shut_down_sending])
@pytest.mark.parametrize("phase", list(PHASES))
def test_when_the_client_disconnects_the_upstream_connection_is_closed(running, phase, leave):
    first, seen = PHASES[phase]

    def answer(received):
        received.send(first)
        running.closed.put(received.wait_closed())

    running.upstream.answer = answer
    with running.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        running.upstream.wait_for()

        if seen:
            client.read_until(seen)

        leave(client)
        took = running.closed.get(timeout=2 * PATIENCE)

    assert took is not None
    assert took < SOON
    assert running.wait_for_record()["outcome"] == "client_gone"


def test_a_disconnect_during_an_upload_closes_the_upstream_connection(running):
    with running.client() as client:
        client.request("POST", CHAT, b"x" * 70000, AUTH + [("Content-Length", "100000")])
        received = running.upstream.wait_for()

    assert received.wait_closed() is not None
    assert not received.whole


def test_a_disconnect_under_back_pressure_is_detected(running):
    def answer(received):
        received.send(EVENT_HEAD)
        try:
            # until all buffers on the way are full, and then until the relay closes
            while True:
                received.send(chunk(b"x" * 65536))
        except OSError:
            running.closed.put(True)

    running.upstream.answer = answer
    with running.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        client.read_head()

    assert running.closed.get(timeout=PATIENCE)


@pytest.mark.parametrize("phase", list(PHASES))
def test_pipelined_bytes_are_not_taken_for_a_disconnect(running, phase):
    first, seen = PHASES[phase]
    gate = threading.Event()
    rest = {
        "mid-stream": chunk(event("two")) + b"0\r\n\r\n",
        "before the first byte": OK,
        "not streaming": b"x" * 96,
    }[phase]

    def answer(received):
        received.send(first)
        assert gate.wait(PATIENCE)
        received.send(rest)
        running.upstream.answer = OK

    running.upstream.answer = answer
    with running.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        running.upstream.wait_for()

        if seen:
            reply = client.read_head()

        client.request("POST", CHAT, b'{"early":1}', AUTH)
        # time enough for the relay to see the early bytes
        assert running.ask("GET", "/health").status == 200

        gate.set()
        reply = reply if seen else client.read_head()
        client.read_body(reply)

        assert reply.complete
        assert client.read_reply().body == b'{"ok":true}'

    assert not running.upstream.errors
    assert running.upstream.received[1].body == b'{"early":1}'
    assert [running.wait_for_record(number)["outcome"] for number in (1, 2, 3)] == ["ok"] * 3


# Only there does the system tell of an end that stands behind bytes which nobody reads.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="poll knows no POLLRDHUP")


# A little, and more than the relay reads of it while a response is running. (What does not fit the
# system's buffers either hides the end: it stands behind it.)
@pytest.mark.parametrize("phase,leave,size", [
    ("before the first byte", close, 2),
    pytest.param("before the first byte", close, 100000, marks=on_linux),
    pytest.param("before the first byte", reset, 100000, marks=on_linux),
    pytest.param("mid-stream", close, 100000, marks=on_linux),
    pytest.param("mid-stream", reset, 100000, marks=on_linux),
    pytest.param("mid-stream", shut_down_sending, 100000, marks=on_linux),
])
def test_a_disconnect_after_pipelined_bytes_is_detected(running, phase, leave, size):
    first, seen = PHASES[phase]

    def answer(received):
        received.send(first)
        running.closed.put(received.wait_closed())

    running.upstream.answer = answer
    with running.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        running.upstream.wait_for()
        if seen:
            client.read_until(seen)

        client.request("POST", CHAT, b"x" * size, AUTH)
        assert running.ask("GET", "/health").status == 200

        leave(client)
        took = running.closed.get(timeout=2 * PATIENCE)

    assert took is not None
    assert took < SOON
    assert len(running.upstream.received) == 1


@on_linux
def test_a_reset_while_the_upstream_takes_no_upload_is_detected(relay):
    with ByHand() as by_hand:
        running = relay(UPSTREAM=by_hand.url)
        client = running.client()
        client.request("POST", CHAT, b"", [("Content-Length", "100000000")])
        by_hand.accept()
        fill_buffers(client)
        reset(client)

        assert running.wait_for_record()["outcome"] == "client_gone"


def fill_buffers(client):
    """Send until nothing on the way takes more."""
    client.sock.setblocking(False)
    while select.select([], [client.sock], [], 0.5)[1]:
        client.sock.send(b"x" * 65536)


def test_a_disconnect_does_not_affect_other_clients(relay):
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")))
        gate.wait(PATIENCE)
        received.send(chunk(event("two")) + b"0\r\n\r\n")

    with Upstream(answer=answer) as fake:
        running = relay(UPSTREAM=fake.url)
        with running.client() as leaver, running.client() as other:
            for client in (leaver, other):
                client.request("POST", CHAT, b"{}")
                client.read_until(b"one\n\n")

            leaver.sock.close()
            assert running.wait_for_record()["outcome"] == "client_gone"

            gate.set()
            assert b"two" in other.read_until(b"0\r\n\r\n")
        assert running.wait_for_record(2)["outcome"] == "ok"
