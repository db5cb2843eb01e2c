"""SIGTERM under load: no new clients, a grace time for running requests, exit status 0.

Responses that need more than the grace time are visibly incomplete.
"""

import errno
import json
import os
import signal
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Client, Program, Relay, chunk, event

LONG = str(PATIENCE * 10)


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


@pytest.fixture
def start(by_hand):
    """start(GRACE=...): the program in front of `by_hand`; it must not report a fault."""
    running = []

    def begin(**settings):
        environ = {"AIPROXY_UPSTREAM": by_hand.url}
        for name, value in settings.items():
            environ["AIPROXY_" + name] = value

        running.append(Program(env=environ))
        return running[-1]

    yield begin
    for program in running:
        program.__exit__()
        assert "Traceback" not in "".join(program.errors)
        assert "fault" not in "".join(program.errors)


def stop_accepting(program, number=signal.SIGTERM):
    """Send the signal and wait until new clients are refused."""
    program.process.send_signal(number)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            Client(program.address).sock.close()
        except ConnectionError:
            return

    pytest.fail("new connections are still taken")


def ask(program, by_hand, version="HTTP/1.1"):
    """A client whose request has reached the upstream, and the upstream's end of it."""
    client = Client(program.address)
    client.request("POST", CHAT, b"{}", version=version)
    peer = by_hand.accept()
    peer.read_until(b"{}")
    return client, peer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_may_finish_within_the_grace_time(by_hand, start, number):
    program = start(GRACE=LONG)
    streamer, streamer_peer = ask(program, by_hand)
    streamer_peer.send(EVENT_HEAD + chunk(event("1")))

    assert streamer.read_head().status == 200
    assert streamer.read_chunk() == event("1")

    waiter, waiter_peer = ask(program, by_hand)
    with streamer, waiter, Client(program.address) as sender, Client(program.address) as uploader:
        sender.send(b"GET /health HTTP/1.1\r\nHo")
        uploader.request("POST", CHAT, bytes(70000), [("Content-Length", "70001")])
        uploader_peer = by_hand.accept()
        uploader_peer.read_until(b"\r\n\r\n")
        stop_accepting(program, number)
        streamer_peer.send(chunk(event("2")))

        assert streamer.read_chunk() == event("2")

        streamer_peer.send(b"0\r\n\r\n")
        assert streamer.read_chunk() == b""
        assert streamer.ended()

        waiter_peer.send(OK)
        assert waiter.read_reply().complete
        assert waiter.ended()

        sender.send(b"st: x\r\n\r\n")
        assert sender.read_reply().status == 200
        assert sender.ended()

        uploader.send(b"a")
        assert len(uploader_peer.read_exactly(70001)) == 70001

        uploader_peer.send(OK)
        assert uploader.read_reply().complete
        assert uploader.ended()
        # at once, with grace time left
        assert program.process.wait(PATIENCE) == 0


def test_idle_clients_do_not_delay_the_end(by_hand, start):
    program = start(GRACE=LONG)
    kept, peer = ask(program, by_hand)
    peer.send(OK)

    with kept, Client(program.address) as silent:
        assert kept.read_reply().complete

        program.process.send_signal(signal.SIGTERM)
        assert kept.ended()
        assert silent.ended()
        assert not kept.data + silent.data
        assert program.process.wait(PATIENCE) == 0


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"

# The HTTP version of a client, an incomplete response, and the last that the client can read of it.
CUTS = {
    "events": ("HTTP/1.1", EVENT_HEAD + chunk(event("1")), b"data: 1\n\n\r\n"),
    "chunked": ("HTTP/1.1", CHUNKED_HEAD + chunk(b"half"), b"half\r\n"),
    "length": ("HTTP/1.1", LENGTH_HEAD + b"half", b"\r\nhalf"),
    "HTTP/1.0": ("HTTP/1.0", CHUNKED_HEAD + chunk(b"half"), b"half"),
}


def test_responses_that_exceed_the_grace_time_are_visibly_incomplete(by_hand, start):
    program = start(GRACE="0.3", LOG="json")
    clients = {}

    for name, (version, answer, last) in CUTS.items():
        clients[name], peer = ask(program, by_hand, version)
        peer.send(answer)
        clients[name].read_until(last)

    unanswered, _ = ask(program, by_hand)
    unfinished = Client(program.address)
    unfinished.request("POST", "/v1/files", b"half", [("Content-Length", "8")])
    by_hand.accept().read_until(b"half")
    program.process.send_signal(signal.SIGTERM)
    rest = b"".join(iter(lambda: clients["events"].read_chunk() or b"", b""))

    assert b'"code": "shutdown"' in rest
    assert b"[DONE]" not in rest

    for name in ("events", "chunked", "length"):
        # no last chunk, no more bytes
        assert clients[name].ended()
        assert not clients[name].data

    with pytest.raises(ConnectionResetError):
        clients["HTTP/1.0"].more()

    assert unanswered.ended()
    assert unfinished.ended()

    for peer in by_hand.peers:
        assert peer.ended()

    assert program.process.wait(PATIENCE) == 0
    program.__exit__()
    outcomes = [json.loads(line)["outcome"] for line in program.lines]
    assert outcomes == ["shutdown"] * 6

    for client in (unanswered, unfinished, *clients.values()):
        client.sock.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(by_hand, start, second):
    program = start(GRACE=LONG)
    client, peer = ask(program, by_hand)
    peer.send(EVENT_HEAD + chunk(event("1")))

    assert client.read_head().status == 200
    assert client.read_chunk() == event("1")

    old, peer = ask(program, by_hand, "HTTP/1.0")
    peer.send(CHUNKED_HEAD + chunk(b"half"))
    old.read_until(b"half")
    stop_accepting(program)

    assert program.stop(second) == 0

    with client:
        try:
            # no last chunk
            assert client.read_chunk() is None
        except ConnectionError:
            pass

    # the one sign of a cut where only the connection's end ends a response
    with old, pytest.raises(ConnectionResetError):
        old.more()


def test_a_head_that_comes_after_the_grace_time_is_cut_and_logged(by_hand, start):
    program = start(GRACE="0.1", LOG="json")
    streaming, peer = ask(program, by_hand)
    peer.send(EVENT_HEAD)
    streaming.read_head()
    clients = {version: ask(program, by_hand, version) for version in ("HTTP/1.0", "HTTP/1.1")}
    program.process.send_signal(signal.SIGTERM)
    streaming.read_until(b"shutdown")           # the grace time is over
    for _, peer in clients.values():
        peer.send(CHUNKED_HEAD + chunk(b"half"))

    for version, (client, _) in clients.items():
        with client:
            try:
                while client.more():
                    assert b"0\r\n\r\n" not in client.data

                assert version == "HTTP/1.1"
            except ConnectionResetError:
                pass

    streaming.sock.close()
    assert program.process.wait(PATIENCE) == 0
    program.__exit__()
    outcomes = [json.loads(line)["outcome"] for line in program.lines]
    assert outcomes == ["shutdown"] * 3


def test_a_signal_before_any_client_ends_it(start):
    assert start(GRACE=LONG).stop() == 0


def test_clients_that_keep_coming_do_not_delay_the_end(by_hand, monkeypatch):
    monkeypatch.setattr(aiproxy, "LISTEN_QUEUE", 20)
    relay = Relay(UPSTREAM=by_hand.url, GRACE="0")
    relay.server.shutdown()
    accept = relay.server.get_request
    came = []

    def accept_while_another_one_comes():
        assert len(came) < 100, "it accepts for as long as clients come"
        with Client(relay.address) as client:
            came.append(client)
            return accept()

    monkeypatch.setattr(relay.server, "get_request", accept_while_another_one_comes)

    relay.server.stop()

    assert len(came) == 20


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EMFILE])
def test_a_client_that_cannot_be_accepted_does_not_cost_those_behind_it(
    by_hand, monkeypatch, number
):
    relay = Relay(UPSTREAM=by_hand.url, GRACE="1")
    relay.server.shutdown()
    accept = relay.server.get_request
    failures = [OSError(number, os.strerror(number))]

    def fail_once():
        if failures:
            raise failures.pop()
        return accept()

    monkeypatch.setattr(relay.server, "get_request", fail_once)
    with relay.client() as client:
        client.request("GET", "/health")
        relay.server.stop()
        assert client.read_reply().status == 200


def test_accepting_that_always_fails_ends_with_the_grace_time(by_hand, monkeypatch):
    def fail():
        calls.append(1)
        time.sleep(0.01)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    calls = []
    relay = Relay(UPSTREAM=by_hand.url, GRACE="0.1")
    relay.server.shutdown()
    monkeypatch.setattr(relay.server, "get_request", fail)
    relay.server.stop()

    assert len(calls) < 20


def test_under_load_every_response_that_begins_is_complete(upstream, start):
    program = start(GRACE=LONG, UPSTREAM=upstream.url)
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + bytes(200000)
    whole = []
    cut = []
    busy = threading.Semaphore(0)

    def load():
        while True:
            try:
                with Client(program.address) as client:
                    client.request("POST", CHAT, b"{}")
                    if not client.more():
                        # it connected after the end
                        return

                    (whole if client.read_reply().complete else cut).append(1)
                    busy.release()
            except ConnectionError:
                return

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        assert busy.acquire(timeout=PATIENCE)

    program.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()

    assert program.process.wait(PATIENCE) == 0
    assert len(whole) >= 40
    assert not cut

    for number in range(len(program.lines)):
        assert program.lines[number].rstrip().endswith(" ok")
