"""A malformed response never reaches a client as a good one.

It becomes a 502 or is visibly cut, and the next exchange is clean.
"""

import socket
import threading

import pytest

import aiproxy
from support import CHAT, PATIENCE, chunk

TYPE = b"Content-Type: application/json\r\n"
BODY = b'{"ok":true}'
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: 11\r\n"
END = b"0\r\n\r\n"
POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON"


def response(fields=LENGTH, body=BODY, line=b"HTTP/1.1 200 OK"):
    return line + b"\r\n" + TYPE + fields + b"\r\n" + body


def chunked(body):
    return response(CHUNKED, body)


def status(number, fields=LENGTH, body=BODY):
    return response(fields, body, b"HTTP/1.1 %d X" % number)


def interim(number, fields=b""):
    return b"HTTP/1.1 %d X\r\n%b\r\n" % (number, fields)


def close_connection(received, how):
    """Close the connection by a FIN or, with "reset", by a RST.

    Only from the thread that answers: elsewhere a read under way would keep the socket open.
    """
    if how == "reset":
        received.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        received.connection.close()
    else:
        received.close()


class Scene:
    """One malformed or unusual response, what the client reads, and a second exchange after it."""

    def __init__(self, upstream, relay, data, after="stay open"):
        self.upstream = upstream
        self.relay = relay()
        self.data = data
        self.after = after
        self.faults = []
        self.relay.server.report_fault = self.faults.append
        upstream.answer = self.answer

    def answer(self, received):
        if received.line.startswith("GET /second"):
            received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nSECOND")
            return

        received.send(self.data)
        if self.after != "stay open":
            close_connection(received, self.after)

    def play(self, method="GET", version="HTTP/1.1"):
        body = b"{}" if method == "POST" else None
        reply = self.relay.ask(method, CHAT, body, version=version)
        # With the record the upstream connection is closed or back in the pool.
        self.relay.wait_for_record()

        second = self.relay.ask("GET", "/second")
        assert second.status == 200
        assert second.body == b"SECOND"
        assert second.complete
        # Each request was sent once.
        paths = [received.line.split(" ")[1] for received in self.upstream.received]
        assert paths == [CHAT, "/second"]
        assert not self.faults
        assert not self.upstream.errors
        return reply

    @property
    def reused(self):
        first, second = self.upstream.received
        return first.number == second.number


STATUSES = [201, 301, 302, 303, 307, 308]
STATUSES += [400, 401, 403, 404, 408, 413, 429]
STATUSES += [500, 502, 503, 529, 600]
# name: (bytes, what the upstream does then, status, body)
RELAYED = {
    "length": (response(), "stay open", 200, BODY),
    "chunked": (chunked(chunk(BODY) + END), "stay open", 200, BODY),
    "chunks with extensions": (
        chunked(b"b;x=y\r\n" + BODY + b"\r\n0;z\r\n\r\n"),
        "stay open", 200, BODY,
    ),
    "chunks with trailers": (
        chunked(chunk(BODY) + b"0\r\nX-Sum: 1\r\nSet-Cookie: a=b\r\n\r\n"),
        "stay open", 200, BODY,
    ),
    "chunks one by one": (
        chunked(b"".join(chunk(b"%c" % byte) for byte in BODY) + END),
        "stay open", 200, BODY,
    ),
    "a coding with a space after": (
        response(b"Transfer-Encoding: Chunked \r\n", chunk(BODY) + END),
        "stay open", 200, BODY,
    ),
    "until the end": (response(b""), "close", 200, BODY),
    "HTTP/1.0 until the end": (response(b"", line=b"HTTP/1.0 200 OK"), "close", 200, BODY),
    "HTTP/1.0 with a length": (response(line=b"HTTP/1.0 200 OK"), "stay open", 200, BODY),
    "events until the end": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
        "close", 200, b"data: 1\n\n",
    ),
    "a length of 0": (response(b"Content-Length: 0\r\n", b""), "stay open", 200, b""),
    "a length with zeros before": (response(b"Content-Length: 0011\r\n"), "stay open", 200, BODY),
    "no reason": (response(line=b"HTTP/1.1 200 "), "stay open", 200, BODY),
    "no reason and no space": (response(line=b"HTTP/1.1 200"), "stay open", 200, BODY),
    "a reason that is not ASCII": (
        response(line=b"HTTP/1.1 200 caf\xc3\xa9 \xff"),
        "stay open", 200, BODY,
    ),
    "HTTP/1.2": (response(line=b"HTTP/1.2 200 OK"), "stay open", 200, BODY),
    "100 before": (interim(100) + response(), "stay open", 200, BODY),
    "102 and 103 before": (
        interim(102) + interim(103, b"Link: </a>\r\nSet-Cookie: a=b\r\n") + response(),
        "stay open", 200, BODY,
    ),
    "100 fields": (
        response(LENGTH + b"".join(b"X-%d: y\r\n" % number for number in range(98))),
        "stay open", 200, BODY,
    ),
    "204": (interim(204), "stay open", 204, b""),
    "204 with a length": (interim(204, b"Content-Length: 5\r\n"), "stay open", 204, b""),
    "204 that is chunked": (interim(204, CHUNKED), "stay open", 204, b""),
    "205": (interim(205, b"Content-Length: 0\r\n"), "stay open", 205, b""),
    "205 with a body": (status(205), "stay open", 205, BODY),
    "304": (interim(304, b'ETag: "a"\r\n'), "stay open", 304, b""),
    "304 with a length": (interim(304, LENGTH), "stay open", 304, b""),
    "304 that is chunked": (interim(304, CHUNKED), "stay open", 304, b""),
    **{str(number): (status(number), "stay open", number, BODY) for number in STATUSES},
    "a redirect elsewhere": (
        status(302, LENGTH + b"Location: /second?elsewhere\r\n"),
        "stay open", 302, BODY,
    ),
}


@pytest.mark.parametrize("data,after,code,body", list(RELAYED.values()), ids=list(RELAYED))
def test_a_good_response_is_relayed_and_its_connection_reused_where_possible(
    upstream, relay, data, after, code, body
):
    scene = Scene(upstream, relay, data, after)

    reply = scene.play()

    assert (reply.status, reply.body, reply.complete) == (code, body, True)
    assert reply.get("location") in (None, "/second?elsewhere")
    assert scene.reused == (after == "stay open" and not data.startswith(b"HTTP/1.0"))


@pytest.mark.parametrize("fields", [LENGTH, CHUNKED, b""], ids=["length", "chunked", "neither"])
def test_a_response_to_HEAD_has_no_body_whatever_its_headers_say(upstream, relay, fields):
    scene = Scene(upstream, relay, response(fields, b""))

    reply = scene.play("HEAD")

    assert reply.status == 200
    assert reply.get("content-length") == ("11" if fields is LENGTH else None)
    assert scene.reused


EMPTY = response(b"Content-Length: 0\r\n", b"")
TRAILING_DATA = {  # name: (method, bytes)
    "after a length": ("GET", response() + POISON),
    "after chunks": ("GET", chunked(chunk(BODY) + END) + POISON),
    "after 204": ("GET", interim(204) + POISON),
    "a body to 304": ("GET", interim(304) + BODY),
    "a body to HEAD": ("HEAD", response()),
    "a body to 204": ("GET", interim(204, LENGTH) + BODY),
    "after a length of 0": ("GET", EMPTY + POISON),
}


@pytest.mark.parametrize("method,data", list(TRAILING_DATA.values()), ids=list(TRAILING_DATA))
def test_trailing_data_after_a_response_reaches_nobody(upstream, relay, method, data):
    scene = Scene(upstream, relay, data)
    with scene.relay.client() as client:
        client.request(method, CHAT)
        reply = client.read_reply(method)
        assert reply.complete
        assert reply.body in (BODY, b"")

        # Nothing is left over on the client connection either.
        scene.relay.wait_for_record()
        client.request("GET", "/second")
        assert client.read_reply().body == b"SECOND"
    assert not scene.reused
    assert not scene.faults


BAD_STATUS_LINES = {
    "two digits": b"HTTP/1.1 20 OK",
    "four digits": b"HTTP/1.1 2000 OK",
    "underscore": b"HTTP/1.1 2_00 OK",
    "plus": b"HTTP/1.1 +200 OK",
    "letters": b"HTTP/1.1 abc OK",
    "zero first": b"HTTP/1.1 020 OK",
    "none": b"HTTP/1.1",
    "two spaces": b"HTTP/1.1  200 OK",
    "HTTP/2.0": b"HTTP/2.0 200 OK",
    "HTTP/1.10": b"HTTP/1.10 200 OK",
    "HTTP/1.xyz": b"HTTP/1.xyz 200 OK",
    "lower case": b"http/1.1 200 OK",
    "ICY": b"ICY 200 OK",
    "nul in the reason": b"HTTP/1.1 200 O\0K",
    "cr in the reason": b"HTTP/1.1 200 O\rK",
    "an empty line before": b"\r\nHTTP/1.1 200 OK",
    "unasked 101": b"HTTP/1.1 101 Switching Protocols",
    "17 KB": b"HTTP/1.1 200 " + b"a" * 17000,
}
BAD_FIELDS = {
    "bare cr": b"X-A: b\rSet-Cookie: evil=1",
    "cr after": b"X-A: b\r",
    "bare lf": b"X-A: b\nSet-Cookie: evil=1",
    "nul": b"X-A: b\0c",
    "control": b"X-A: b\x08c",
    "folded": b"X-A: b\r\n c",
    "folded by a tab": b"X-A: b\r\n\tc",
    "space before the colon": b"X-A : b",
    "no colon": b"garbage",
    "no name": b": b",
    "space in the name": b"X A: b",
    "not ASCII in the name": b"X\xe9: b",
    "101 of them": b"\r\n".join(b"X-%d: y" % number for number in range(99)),
    "17 KB": b"X: " + b"a" * 17000,
    "above 64 KB": b"\r\n".join([b"X: " + b"a" * 16000] * 5),
}
BAD_LENGTHS = {
    "minus": b" -11",
    "plus": b" +11",
    "underscore": b" 1_1",
    "empty": b"",
    "word": b" abc",
    "list": b" 11, 11",
    "hexadecimal": b" 0xb",
    "no-break space": b" 11\xa0",
    "twice": b" 11\r\nContent-Length: 12",
    "twice the same": b" 11\r\nContent-Length: 11",
    "twenty digits": b" 18446744073709551627",
}
BAD_CODINGS = {
    "unknown": b" foo",
    "gzip, chunked": b" gzip, chunked",
    "chunked, chunked": b" chunked, chunked",
    "chunked, gzip": b" chunked, gzip",
    "identity": b" identity",
    "empty": b"",
    "two fields": b" identity\r\nTransfer-Encoding: chunked",
    "twice": b" chunked\r\nTransfer-Encoding: chunked",
    "vertical tab": b" chunked\x0b",
    "and a length": b" chunked\r\nContent-Length: 11",
}
BAD_RESPONSES = {
    "length and coding": response(LENGTH + CHUNKED, chunk(BODY) + END),
    "chunked in HTTP/1.0": response(CHUNKED, chunk(BODY) + END, b"HTTP/1.0 200 OK"),
    "lines of lf": response().replace(b"\r\n", b"\n"),
    "no head": b"<html>\r\n\r\n</html>",
    "HTTP/0.9": b"<html>hello</html>\n" * 2000,
    "101 interim responses": interim(100) * 101 + response(),
    "interim responses without end": interim(100) * 5000,
}
# Sent before the upstream closes the connection.
CLOSED = {
    "nothing": b"",
    "status line alone": b"HTTP/1.1 200 OK\r\n",
    "head cut": response()[:40],
    "head without its empty line": response(body=b"")[:-2],
    "103 alone": interim(103),
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\n",
}


def malformed_responses():
    """Parameters: the bytes, and what the upstream does after them."""
    for name, line in BAD_STATUS_LINES.items():
        yield pytest.param(response(line=line), "stay open", id="status: " + name)
    for name, line in BAD_FIELDS.items():
        yield pytest.param(response(LENGTH + line + b"\r\n"), "stay open", id="field: " + name)
    for name, text in BAD_LENGTHS.items():
        data = response(b"Content-Length:" + text + b"\r\n")
        yield pytest.param(data, "stay open", id="length: " + name)
    for name, text in BAD_CODINGS.items():
        data = response(b"Transfer-Encoding:" + text + b"\r\n", chunk(BODY) + END)
        yield pytest.param(data, "stay open", id="coding: " + name)
    for name, data in BAD_RESPONSES.items():
        yield pytest.param(data, "stay open", id="whole: " + name)
    for name, data in CLOSED.items():
        yield pytest.param(data, "close", id="close: " + name)
        yield pytest.param(data, "reset", id="reset: " + name)


@pytest.mark.parametrize("data,after", list(malformed_responses()))
def test_a_malformed_response_is_a_502_and_nothing_of_it_is_relayed(upstream, relay, data, after):
    scene = Scene(upstream, relay, data, after)

    reply = scene.play("POST")

    assert reply.status == 502
    assert reply.code == "upstream_bad_response"
    assert reply.complete
    assert reply.get("set-cookie") is None
    assert b"evil" not in reply.raw_head + reply.body
    assert not scene.reused


BAD_LENGTH_WITHOUT_A_BODY = [
    pytest.param("HEAD", response(b"Content-Length: abc\r\n", b""), id="HEAD"),
    pytest.param("GET", interim(304, b"Content-Length: 5, 5\r\n"), id="304"),
]


@pytest.mark.parametrize("method,data", BAD_LENGTH_WITHOUT_A_BODY)
def test_a_malformed_length_is_a_502_even_where_there_is_no_body(upstream, relay, method, data):
    scene = Scene(upstream, relay, data)
    assert scene.play(method).status == 502


BAD_CHUNKS = {
    "not a size": b"zz\r\n",
    "seventeen digits": b"10000000000000000\r\nx",
    "minus": b"-5\r\nhello\r\n",
    "plus": b"+5\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "underscore": b"1_0\r\n" + bytes(16) + b"\r\n",
    "space before": b" 5\r\nhello\r\n",
    "empty": b"\r\n",
    "lf": b"5\nhello\n",
    "nul": b"5\0\r\nhello\r\n",
    "extension of 5 KB": b"5;" + b"a" * 5000,
    "bad trailer": b"0\r\ngarbage\r\n\r\n",
    "trailers of 9 KB": b"0\r\n" + b"X: yyyyyyyy\r\n" * 800 + b"\r\n",
    "lf at the end": b"0\r\n\n",
}
# name: (bytes, what the upstream does then, how much of BODY the client may read)
CUT = {
    "length": (response(b"Content-Length: 22\r\n"), "close", BODY),
    "length, by a reset": (response(b"Content-Length: 22\r\n"), "reset", BODY),
    "length and nothing": (response(b"Content-Length: 22\r\n", b""), "close", b""),
    "in a chunk": (chunked(b"16\r\n" + BODY), "close", BODY),
    "between chunks": (chunked(chunk(BODY)), "close", BODY),
    "between chunks, by a reset": (chunked(chunk(BODY)), "reset", BODY),
    "chunked and nothing": (chunked(b""), "close", b""),
    "in a size": (chunked(chunk(BODY) + b"1"), "close", BODY),
    "until the end, by a reset": (response(b""), "reset", BODY),
    **{
        "chunk: " + name: (chunked(chunk(BODY) + text), "stay open", BODY)
        for name, text in BAD_CHUNKS.items()
    },
    "chunk: data not ended": (chunked(b"b\r\n" + BODY + b"XX" + END), "stay open", BODY),
}


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("data,after,body", list(CUT.values()), ids=list(CUT))
def test_a_truncated_or_malformed_body_is_visibly_cut(upstream, relay, data, after, body, version):
    scene = Scene(upstream, relay, data, after)

    try:
        reply = scene.play("POST", version)
    except ConnectionError:
        # HTTP/1.0 has no other sign of a cut than a reset, which may overtake the head.
        assert version == "HTTP/1.0"
        return

    is_error = reply.status == 502 and reply.code == "upstream_bad_response"
    is_cut = not reply.complete and body.startswith(reply.body)
    assert is_error or is_cut
    assert not scene.reused


@pytest.mark.parametrize("place", range(1, 131, 5))
def test_a_response_in_any_two_pieces_is_the_same_response(upstream, relay, place, monkeypatch):
    chunks = b"5;x\r\n" + BODY[:5] + b"\r\n" + b"6\r\n" + BODY[5:] + b"\r\n"
    data = interim(103) + chunked(chunks + b"0\r\nX: y\r\n\r\n")
    assert len(data) == 131

    first_read = threading.Event()
    receive = aiproxy.BufferedSocket.receive

    def receive_and_signal(wire):
        piece = receive(wire)
        if piece and data.startswith(piece):
            first_read.set()
        return piece

    monkeypatch.setattr(aiproxy.BufferedSocket, "receive", receive_and_signal)
    scene = Scene(upstream, relay, data[place:])

    def answer_in_two(received):
        if CHAT in received.line:
            received.send(data[:place])
            assert first_read.wait(PATIENCE)
        scene.answer(received)

    upstream.answer = answer_in_two

    reply = scene.play()

    assert reply.body == BODY
    assert reply.complete
    assert scene.reused


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_reset_does_not_complete_a_buffered_error_response(upstream, relay, version):
    def send_and_reset(received):
        received.send(response(b"", BODY, b"HTTP/1.1 429 X"))
        close_connection(received, "reset")

    upstream.answer = send_and_reset
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

    with running.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")], version)
        try:
            seen = client.read_reply("POST")
        except (ConnectionError, AssertionError):
            # HTTP/1.0: the reset overtook the head.
            seen = None
        assert version == "HTTP/1.0" and seen is None or not seen.complete
    assert running.wait_for_record()["outcome"] in ("upstream_died", "upstream_bad_response")
