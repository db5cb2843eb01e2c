"""A response that begins before the request's body has ended: both are relayed at once.

Until the response has ended. Then both sides close, because the rest of the body has no reader.
"""
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, PATIENCE, chunk

HIDDEN = {"KEY": "sk-hidden-key", "CLIENT_KEYS": "alice=ck-alice"}
EARLY_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
)
EARLY_EVENTS = EARLY_HEAD.replace(b"text/plain", b"text/event-stream")
LAST = b"0\r\n\r\n"


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


@pytest.fixture(autouse=True)
def no_long_wait_for_the_body(monkeypatch):
    """Send a request up soon after its first bytes: the clients of these tests pause there."""
    monkeypatch.setattr(aiproxy, "PREFETCH_SECONDS", 0.05)


def begin_upload(by_hand, running, framing, length=1000000, head=EARLY_HEAD):
    """Send the first 100 bytes of a body, and let the upstream answer with its head and 'begun'."""
    client = running.client()
    fields = [("Authorization", "Bearer ck-alice")]
    if framing == "chunked":
        fields.append(("Transfer-Encoding", "chunked"))
        client.request("POST", CHAT, chunk(bytes(100)), fields)
    else:
        client.request("POST", CHAT, bytes(100), fields + [("Content-Length", str(length))])
    peer = by_hand.accept()
    assert (b"chunked" in peer.read_request_head()) == (framing == "chunked")
    peer.send(head + chunk(b"begun"))
    assert client.read_head().status == 200
    assert client.read_chunk() == b"begun"
    return client, peer


def read_body(client, size):
    """So many bytes of a chunked body, however the relay has cut them into chunks."""
    pieces = []
    while size > 0:
        pieces.append(client.read_chunk())
        size -= len(pieces[-1])
    return b"".join(pieces)


@pytest.mark.parametrize("settings", [{}, HIDDEN], ids=["transparent", "provider key"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_body_goes_on_while_the_response_is_relayed(by_hand, relay, settings, framing):
    running = relay(UPSTREAM=by_hand.url, **settings)
    client, peer = begin_upload(by_hand, running, framing, length=100 + 3 * 5)
    with client:
        for word in (b"word1", b"word2", b"word3"):
            client.send(chunk(word) if framing == "chunked" else word)
            peer.read_until(word)
            peer.send(chunk(b"heard " + word))
            assert client.read_chunk() == b"heard " + word
        if framing == "chunked":
            client.send(LAST)
            peer.read_until(LAST)
        peer.send(LAST)
        assert client.read_chunk() == b""

    assert running.wait_for_record()["outcome"] == "ok"


@pytest.mark.parametrize("settings", [{}, HIDDEN], ids=["transparent", "provider key"])
def test_megabytes_both_ways_at_once_arrive_whole(by_hand, relay, settings):
    size = 16 << 20
    running = relay(UPSTREAM=by_hand.url, **settings)
    client, peer = begin_upload(by_hand, running, "length", length=100 + size)
    with client:
        received = []
        threads = [
            threading.Thread(target=client.send, args=(b"u" * size,)),
            threading.Thread(target=peer.send, args=(chunk(b"d" * size),)),
            threading.Thread(target=lambda: received.append(peer.read_exactly(100 + size))),
        ]
        for thread in threads:
            thread.start()

        assert read_body(client, size) == b"d" * size

        for thread in threads:
            thread.join(PATIENCE)
        assert received[0].endswith(b"u" * size)
        peer.send(LAST)
        assert client.read_chunk() == b""


def test_a_client_that_does_not_read_can_still_send_its_body(by_hand, relay):
    client, peer = begin_upload(by_hand, relay(UPSTREAM=by_hand.url), "length", 100 + 100000)
    with client:
        # More than all buffers between the upstream and the client hold.
        sender = threading.Thread(target=peer.send, args=(chunk(bytes(16 << 20)) + LAST,))
        sender.start()
        client.send(b"u" * 100000)
        assert peer.read_exactly(100 + 100000).endswith(b"u" * 100000)

        assert len(read_body(client, 16 << 20)) == 16 << 20
        assert client.read_chunk() == b""
        sender.join()


def test_both_sides_close_when_the_response_ends_first(by_hand, relay):
    client, peer = begin_upload(by_hand, relay(UPSTREAM=by_hand.url), "chunked")
    with client:
        peer.send(LAST)
        assert client.read_chunk() == b""
        assert client.ended()
        while peer.more():
            pass
        assert not peer.data.endswith(LAST)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_disconnect_while_both_go_on_closes_the_upstream_connection(by_hand, relay, framing):
    running = relay(UPSTREAM=by_hand.url)
    client, peer = begin_upload(by_hand, running, framing)
    client.sock.close()

    while peer.more():
        pass

    assert not peer.data.endswith(LAST)
    assert running.wait_for_record()["outcome"] in ("client_gone", "incomplete_body")


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n"], ids=["size", "line end"])
def test_a_malformed_rest_of_the_body_cuts_both_sides(by_hand, relay, rest):
    running = relay(UPSTREAM=by_hand.url)
    client, peer = begin_upload(by_hand, running, "chunked", head=EARLY_EVENTS)
    with client:
        client.send(rest)
        # The error event of a stream that is cut inside an event would be part of it.
        assert client.read_chunk() is None
        while peer.more():
            pass
        assert not peer.data.endswith(LAST)

    assert running.wait_for_record()["outcome"] == "bad_request"


@pytest.mark.parametrize("settings,rest,reason", [
    ({}, b"zz\r\n", b"malformed"), (dict(HIDDEN, MAX_BODY="1KB"), b"400\r\n", b"too large")])
def test_the_event_of_a_cut_blames_whoever_it_was(by_hand, relay, settings, rest, reason):
    running = relay(UPSTREAM=by_hand.url, **settings)
    client, peer = begin_upload(by_hand, running, "chunked", head=EARLY_EVENTS)
    with client:
        peer.send(chunk(b"\n\n"))
        assert client.read_chunk() == b"\n\n"
        client.send(rest)
        told = client.read_chunk()
        assert client.read_chunk() is None

    assert reason in told.replace(b"larger than allowed", b"too large")
    assert b"upstream closed" not in told


def test_a_body_that_gets_too_large_is_cut_at_the_size_of_its_chunk(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, MAX_BODY="1KB", **HIDDEN)
    client, peer = begin_upload(by_hand, running, "chunked")
    with client:
        client.send(b"400\r\n")
        assert client.read_chunk() is None
        while peer.more():
            pass
        assert not peer.data.endswith(LAST)

    assert running.wait_for_record()["outcome"] == "request_too_large"


def test_a_body_that_comes_too_slowly_is_cut_while_the_response_is_relayed(
    by_hand, relay, monkeypatch
):
    monkeypatch.setattr(aiproxy, "STALL_SECONDS", 2)        # time enough for the response to begin
    running = relay(UPSTREAM=by_hand.url)
    client, peer = begin_upload(by_hand, running, "chunked")
    with client:
        assert client.read_chunk() is None
        while peer.more():
            pass

    assert running.wait_for_record()["outcome"] == "request_timeout"


def test_a_response_head_that_comes_in_pieces_does_not_stop_the_body(by_hand, relay):
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", CHAT, bytes(100000), [("Content-Length", "200000")])
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(EARLY_HEAD[:20])
        assert len(peer.read_exactly(100000)) == 100000
        client.send(bytes(100000))
        assert len(peer.read_exactly(100000)) == 100000
        peer.send(EARLY_HEAD[20:] + LAST)

        assert client.read_reply().complete


def test_a_response_without_a_length_that_is_reset_under_the_upload_is_cut(by_hand, relay):
    """The reset may be told to whoever sends, and then a read shows a clean end."""
    running = relay(UPSTREAM=by_hand.url)
    with running.client() as client:
        client.request("POST", CHAT, bytes(100), [("Content-Length", str(1 << 30))])
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nbegun")
        assert client.read_head().status == 200
        assert client.read_chunk() == b"begun"

        client.sock.setblocking(False)
        with pytest.raises(BlockingIOError):        # the upstream takes nothing: all is full
            while True:
                client.sock.send(bytes(1 << 20))
                time.sleep(0.01)
        client.sock.settimeout(PATIENCE)
        peer.reset()
        assert client.read_chunk() is None

    assert running.wait_for_record()["outcome"] == "upstream_died"
