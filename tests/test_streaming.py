"""Events are relayed as they arrive, and a response that is cut short is visibly incomplete."""

import json
import threading

import pytest

from support import CHAT, EVENT_HEAD, PATIENCE, chunk, event

AUTH = [("Authorization", "Bearer ck-alice")]
CHUNKED_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def test_an_event_is_relayed_before_the_next_one_is_sent(upstream, hidden):
    read = [threading.Event() for _ in range(5)]

    def answer(received):
        received.send(EVENT_HEAD)
        for number, gate in enumerate(read):
            received.send(chunk(event(str(number))))
            assert gate.wait(PATIENCE), "event %d was not read by the client" % number

        received.send(b"0\r\n\r\n")

    upstream.answer = answer
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        reply = client.read_head()
        assert reply.get("transfer-encoding") == "chunked"

        for number, gate in enumerate(read):
            assert client.read_chunk() == event(str(number))
            gate.set()

        assert client.read_chunk() == b""

    assert not upstream.errors
    assert hidden.wait_for_record()["outcome"] == "ok"


def test_an_http10_client_gets_the_stream_as_an_until_close_body(upstream, hidden):
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")))
        assert gate.wait(PATIENCE)
        received.send(chunk(event("two")) + b"0\r\n\r\n")

    upstream.answer = answer
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH, version="HTTP/1.0")
        reply = client.read_head()
        assert reply.get("transfer-encoding") is None
        assert reply.get("content-length") is None
        assert client.read_until(b"\n\n") == event("one")

        gate.set()
        assert client.read_until(b"\n\n") == event("two")
        assert client.ended()


@pytest.mark.parametrize(
    "control,expected",
    [(b"", ["no-cache"]), (b"Cache-Control: private\r\n", ["private"])],
    ids=["added", "kept"],
)
def test_event_streams_tell_proxies_in_front_not_to_buffer_them(
    upstream, hidden, control, expected
):
    upstream.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        + control
        + b"Content-Length: 9\r\n\r\ndata: 1\n\n"
    )
    reply = hidden.chat()

    assert reply.get("x-accel-buffering") == "no"
    assert reply.all("cache-control") == expected
    assert reply.body == b"data: 1\n\n"
    assert reply.complete


# The head of a response besides its first line, and what the one that comes down adds to it.
UNBUFFERED = ["x-accel-buffering: no"]
LENGTHS = [
    pytest.param("application/x-ndjson", "Transfer-Encoding: chunked", UNBUFFERED, id="NDJSON"),
    pytest.param("application/json", "Transfer-Encoding: chunked", UNBUFFERED, id="JSON"),
    pytest.param("audio/mpeg", "Connection: close", UNBUFFERED, id="until close"),
    pytest.param("application/x-ndjson", "Content-Length: 0", [], id="declared"),
]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("media_type,framing,added", LENGTHS)
def test_no_proxy_in_front_should_buffer_a_response_without_a_declared_length(
    upstream, hidden, media_type, framing, added, version
):
    def answer(received):
        head = "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n" % (media_type, framing)
        received.send(head.encode() + (b"0\r\n\r\n" if "chunked" in framing else b""))
        if "close" in framing:
            received.close()

    upstream.answer = answer
    reply = hidden.ask("POST", CHAT, b"{}", AUTH, version)
    names = ("x-accel-buffering", "cache-control")
    assert ["%s: %s" % field for field in reply.fields if field[0] in names] == added


HEARTBEAT = b": keep-alive\n\n"
GZIP = EVENT_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
# The head of a response, the beginning of its body and the rest.
NO_HEARTBEATS = {
    "inside an event": (EVENT_HEAD, chunk(b"data: 1\n"), chunk(b"data: 2\n\n") + b"0\r\n\r\n"),
    "compressed": (GZIP, chunk(b"\x1f\x8b\n\n"), b"0\r\n\r\n"),
    "JSON": (CHUNKED_HEAD, chunk(b"\n\n"), b"0\r\n\r\n"),
    "with a length": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 10\r\n\r\n",
        b"data: 1\n\n", b"\n"),
}


def test_a_silent_stream_gets_comments_between_its_events_and_no_other_response_does(
    upstream, relay
):
    gate = threading.Event()
    beats = [threading.Event(), threading.Event()]

    def answer(received):
        name = received.field("x-name")
        if name:
            head, begin, rest = NO_HEARTBEATS[name]
            received.send(head + begin)
            assert gate.wait(PATIENCE)
            received.send(rest)
            return
        received.send(EVENT_HEAD)
        assert beats[0].wait(PATIENCE)
        received.send(chunk(event("1")))
        assert beats[1].wait(PATIENCE)
        received.send(b"0\r\n\r\n")

    upstream.answer = answer
    running = relay(HEARTBEAT="0.05")
    clients = {name: running.client() for name in NO_HEARTBEATS}
    replies = {}
    for name, client in clients.items():
        client.request("POST", CHAT, b"{}", [("X-Name", name)])
        replies[name] = client.read_head()

    with running.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        client.read_head()
        assert client.read_chunk() == HEARTBEAT
        beats[0].set()
        pieces = [client.read_chunk()]
        while event("1") not in pieces or pieces[-1] != HEARTBEAT:
            pieces.append(client.read_chunk())
        beats[1].set()
        while pieces[-1]:
            pieces.append(client.read_chunk())
        assert set(pieces) == {HEARTBEAT, event("1"), b""}

    gate.set()
    for name, client in clients.items():
        client.read_body(replies[name])
        assert replies[name].complete
        assert HEARTBEAT not in replies[name].body
        client.sock.close()
    assert not upstream.errors


def test_a_compressed_response_is_relayed_unchanged(upstream, hidden):
    coded = b"\x1f\x8b\x08 not really gzip, and nobody looks"
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    upstream.answer = head % len(coded) + coded
    reply = hidden.chat()

    assert reply.body == coded
    assert reply.get("content-encoding") == "gzip"


def cut_short(upstream, relay, head, body, version="HTTP/1.1"):
    """The reply to a request whose upstream dies after `body`."""

    def answer(received):
        received.send(head + body)
        received.close()

    upstream.answer = answer
    return relay.ask("POST", CHAT, b"{}", AUTH, version)


def test_an_incomplete_content_length_body_stays_incomplete(upstream, hidden):
    reply = cut_short(upstream, hidden, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"half")

    assert reply.body == b"half"
    assert not reply.complete
    assert hidden.wait_for_record()["outcome"] == "upstream_died"


def test_an_incomplete_chunked_body_gets_no_last_chunk(upstream, hidden):
    reply = cut_short(upstream, hidden, CHUNKED_HEAD, chunk(b'{"half":'))

    assert reply.body == b'{"half":'
    assert not reply.complete


@pytest.mark.parametrize("framing", ["chunked", "broken chunk"])
def test_a_stream_that_ends_early_between_events_gets_one_error_event(upstream, hidden, framing):
    broken = b"zz\r\n" if framing == "broken chunk" else b""
    reply = cut_short(upstream, hidden, EVENT_HEAD, chunk(event("one")) + broken)
    first, last_event, end = reply.body.split(b"\n\n")

    assert first == b"data: one"
    assert end == b""
    assert not reply.complete

    error = json.loads(last_event[len("data: ") :])["error"]

    assert error["code"] == "upstream_died"
    assert error["type"] == "server_error"
    assert b"[DONE]" not in reply.body


def test_a_stream_that_ends_early_inside_an_event_gets_no_error_event(upstream, hidden):
    reply = cut_short(upstream, hidden, EVENT_HEAD, chunk(b"data: one\n\ndata: tw"))

    assert reply.body == b"data: one\n\ndata: tw"
    assert not reply.complete


def test_a_compressed_stream_gets_no_uncompressed_error_event(upstream, hidden):
    head = EVENT_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    reply = cut_short(upstream, hidden, head, chunk(b"\n\n"))

    assert reply.body == b"\n\n"
    assert not reply.complete


def test_an_http10_client_sees_an_incomplete_body_by_a_reset(upstream, hidden):
    reply = cut_short(upstream, hidden, CHUNKED_HEAD, chunk(b"half"), "HTTP/1.0")
    assert not reply.complete


def test_a_chunked_response_never_announces_its_close(upstream, hidden):
    upstream.answer = EVENT_HEAD + chunk(event("1")) + b"0\r\n\r\n"
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH + [("Connection", "close")])
        reply = client.read_reply()
        assert reply.complete
        assert reply.get("connection") is None
        assert client.ended()


def test_a_slow_client_slows_its_upstream_down_and_loses_nothing(upstream, hidden):
    # 16 MB: more than all socket buffers on the way
    body = bytes(range(256)) * 4096 * 16
    sent = threading.Event()

    def answer(received):
        received.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        sent.set()

    upstream.answer = answer
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        reply = client.read_head()
        assert not sent.wait(0.3), "the relay took 16 MB that nobody read"

        client.read_body(reply)
        assert reply.body == body
        assert reply.complete


@pytest.mark.parametrize("end,is_whole", [
    (b"", True), (b"data: [DONE]\n", True), (b'data: {"delta":"hel', False)])
def test_a_stream_that_its_connection_ends_inside_a_line_is_cut(upstream, hidden, end, is_whole):
    """An upstream process that dies closes its connections as cleanly as one that is done."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    def answer(received):
        received.send(head + event("1") + end)
        received.close()

    upstream.answer = answer
    reply = hidden.chat()

    assert reply.body == event("1") + end
    assert reply.complete == is_whole
    assert hidden.wait_for_record()["outcome"] == ("ok" if is_whole else "upstream_died")
