"""SIGTERM under load: nobody new, time for those who are here, a visible cut for those who need more, exit status 0."""
import signal
import threading
import time

import pytest

from byhand import ByHand
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Client, Program, chunk, event

LONG = str(PATIENCE * 10)


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


@pytest.fixture
def start(by_hand):
    """start(GRACE=...): the program in front of `by_hand`. At the end it must have said nothing of a fault."""
    running = []

    def begin(**settings):
        running.append(Program(env={"AIPROXY_UPSTREAM": by_hand.url, **{"AIPROXY_" + name: value for name, value in settings.items()}}))
        return running[-1]
    yield begin
    for program in running:
        program.__exit__()
        assert "Traceback" not in "".join(program.errors) and "fault" not in "".join(program.errors)


def stop_accepting(program, number=signal.SIGTERM):
    """Send the signal and wait until nobody new gets in."""
    program.process.send_signal(number)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            Client(program.address).sock.close()
        except ConnectionError:
            return
    pytest.fail("new connections are still taken")


def ask(program, by_hand, version="HTTP/1.1"):
    """A client whose request has reached the upstream, and that one's end of it."""
    client = Client(program.address)
    client.request("POST", CHAT, b"{}", version=version)
    peer = by_hand.accept()
    peer.read_until(b"{}")
    return client, peer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_was_running_gets_to_the_end_within_the_grace_time(by_hand, start, number):
    program = start(GRACE=LONG)
    streaming, sending = ask(program, by_hand)
    sending.send(EVENT_HEAD + chunk(event("1")))
    assert streaming.read_head().status == 200 and streaming.read_chunk() == event("1")
    waiting, thinking = ask(program, by_hand)
    with streaming, waiting, Client(program.address) as asking, Client(program.address) as uploading:
        asking.send(b"GET /health HTTP/1.1\r\nHo")
        uploading.request("POST", CHAT, bytes(70000), [("Content-Length", "70001")])
        taking = by_hand.accept()
        taking.read_until(b"\r\n\r\n")
        stop_accepting(program, number)
        sending.send(chunk(event("2")))
        assert streaming.read_chunk() == event("2")
        sending.send(b"0\r\n\r\n")
        assert streaming.read_chunk() == b"" and streaming.ended()
        thinking.send(OK)
        assert waiting.read_reply().complete and waiting.ended()
        asking.send(b"st: x\r\n\r\n")
        assert asking.read_reply().status == 200 and asking.ended()
        uploading.send(b"a")
        assert len(taking.read_exactly(70001)) == 70001
        taking.send(OK)
        assert uploading.read_reply().complete and uploading.ended()
        assert program.process.wait(PATIENCE) == 0      # at once, with grace time left


def test_idle_clients_do_not_hold_it_up(by_hand, start):
    program = start(GRACE=LONG)
    kept, peer = ask(program, by_hand)
    peer.send(OK)
    with kept, Client(program.address) as silent:
        assert kept.read_reply().complete
        program.process.send_signal(signal.SIGTERM)
        assert kept.ended() and silent.ended() and not kept.data + silent.data
        assert program.process.wait(PATIENCE) == 0


CUTS = {"events": ("HTTP/1.1", EVENT_HEAD + chunk(event("1"))), "chunked": ("HTTP/1.1", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"half")),
        "length": ("HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf"), "HTTP/1.0": ("HTTP/1.0", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"half"))}


def test_whoever_needs_more_than_the_grace_time_is_seen_to_be_cut(by_hand, start):
    program, clients = start(GRACE="0.3"), {}
    for name, (version, answer) in CUTS.items():
        clients[name], peer = ask(program, by_hand, version)
        peer.send(answer)
        clients[name].read_until(b"data: 1\n\n\r\n" if name == "events" else b"half" if version == "HTTP/1.0" else answer[-6:])
    unanswered, _ = ask(program, by_hand)
    program.process.send_signal(signal.SIGTERM)
    rest = b"".join(iter(lambda: clients["events"].read_chunk() or b"", b""))
    assert b'"code": "shutdown"' in rest and b"[DONE]" not in rest
    for name in ("events", "chunked", "length"):
        assert clients[name].ended() and not clients[name].data     # no last chunk, no more bytes
    with pytest.raises(ConnectionResetError):
        clients["HTTP/1.0"].more()
    assert unanswered.ended()
    for peer in by_hand.peers:
        assert peer.ended()
    assert program.process.wait(PATIENCE) == 0
    for client in (unanswered, *clients.values()):
        client.sock.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(by_hand, start, second):
    program = start(GRACE=LONG)
    client, peer = ask(program, by_hand)
    peer.send(EVENT_HEAD + chunk(event("1")))
    assert client.read_head().status == 200 and client.read_chunk() == event("1")
    stop_accepting(program)
    assert program.stop(second) == 0
    with client:
        try:
            assert client.read_chunk() is None      # no last chunk
        except ConnectionError:
            pass


def test_a_signal_before_anybody_came_ends_it(start):
    assert start(GRACE=LONG).stop() == 0


def test_under_load_every_answer_that_begins_is_whole(upstream, start):
    program = start(GRACE=LONG, UPSTREAM=upstream.url)
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + bytes(200000)
    whole, cut, busy = [], [], threading.Semaphore(0)

    def load():
        while True:
            try:
                with Client(program.address) as client:
                    client.request("POST", CHAT, b"{}")
                    if not client.more():
                        return              # had connected after the end
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
    assert len(whole) >= 40 and not cut
    for number in range(len(program.lines)):
        assert program.lines[number].rstrip().endswith(" ok")
