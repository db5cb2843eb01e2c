"""What the upstream sends badly never reaches a client as something good: it is a 502 or seen to be cut, and the next exchange is clean."""
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


def answer(fields=LENGTH, body=BODY, line=b"HTTP/1.1 200 OK"):
    return line + b"\r\n" + TYPE + fields + b"\r\n" + body


def chunked(body):
    return answer(CHUNKED, body)


def status(number, fields=LENGTH, body=BODY):
    return answer(fields, body, b"HTTP/1.1 %d X" % number)


def interim(number, fields=b""):
    return b"HTTP/1.1 %d X\r\n%b\r\n" % (number, fields)


def hang_up(received, how):
    """By a FIN or, "reset", by a RST. Only from the thread that answers: elsewhere a read under way would keep the socket open."""
    if how == "reset":
        received.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        received.connection.close()
    else:
        received.close()


class Scene:
    """One bad or odd answer, what the client makes of it, and a second exchange that must be its own."""

    def __init__(self, upstream, relay, data, after="hold"):
        self.upstream, self.relay, self.data, self.after = upstream, relay(), data, after
        self.faults = []
        self.relay.server.report_fault = self.faults.append
        upstream.answer = self.answer

    def answer(self, received):
        if received.line.startswith("GET /second"):
            return received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nSECOND")
        received.send(self.data)
        if self.after != "hold":
            hang_up(received, self.after)

    def play(self, method="GET", version="HTTP/1.1"):
        reply = self.relay.ask(method, CHAT, b"{}" if method == "POST" else None, version=version)
        self.relay.wait_for_record()        # now the connection is closed or kept
        second = self.relay.ask("GET", "/second")
        assert second.status == 200 and second.body == b"SECOND" and second.complete
        assert [one.line.split(" ")[1] for one in self.upstream.received] == [CHAT, "/second"]     # asked once each
        assert not self.faults and not self.upstream.errors
        return reply

    @property
    def reused(self):
        return self.upstream.received[0].number == self.upstream.received[1].number


RELAYED = {     # name: (bytes, what the upstream does then, status, body)
    "length": (answer(), "hold", 200, BODY),
    "chunked": (chunked(chunk(BODY) + END), "hold", 200, BODY),
    "chunks with extensions": (chunked(b"b;x=y\r\n" + BODY + b"\r\n0;z\r\n\r\n"), "hold", 200, BODY),
    "chunks with trailers": (chunked(chunk(BODY) + b"0\r\nX-Sum: 1\r\nSet-Cookie: a=b\r\n\r\n"), "hold", 200, BODY),
    "chunks one by one": (chunked(b"".join(chunk(b"%c" % byte) for byte in BODY) + END), "hold", 200, BODY),
    "a coding with a space behind": (answer(b"Transfer-Encoding: Chunked \r\n", chunk(BODY) + END), "hold", 200, BODY),
    "until the end": (answer(b""), "close", 200, BODY),
    "HTTP/1.0 until the end": (answer(b"", line=b"HTTP/1.0 200 OK"), "close", 200, BODY),
    "HTTP/1.0 with a length": (answer(line=b"HTTP/1.0 200 OK"), "hold", 200, BODY),
    "events until the end": (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n", "close", 200, b"data: 1\n\n"),
    "a length of 0": (answer(b"Content-Length: 0\r\n", b""), "hold", 200, b""),
    "a length with zeros before": (answer(b"Content-Length: 0011\r\n"), "hold", 200, BODY),
    "no reason": (answer(line=b"HTTP/1.1 200 "), "hold", 200, BODY),
    "no reason and no space": (answer(line=b"HTTP/1.1 200"), "hold", 200, BODY),
    "a reason that is not ASCII": (answer(line=b"HTTP/1.1 200 caf\xc3\xa9 \xff"), "hold", 200, BODY),
    "HTTP/1.2": (answer(line=b"HTTP/1.2 200 OK"), "hold", 200, BODY),
    "100 before": (interim(100) + answer(), "hold", 200, BODY),
    "102 and 103 before": (interim(102) + interim(103, b"Link: </a>\r\nSet-Cookie: a=b\r\n") + answer(), "hold", 200, BODY),
    "100 fields": (answer(LENGTH + b"".join(b"X-%d: y\r\n" % number for number in range(98))), "hold", 200, BODY),
    "204": (interim(204), "hold", 204, b""),
    "204 with a length": (interim(204, b"Content-Length: 5\r\n"), "hold", 204, b""),
    "204 that is chunked": (interim(204, CHUNKED), "hold", 204, b""),
    "205": (interim(205, b"Content-Length: 0\r\n"), "hold", 205, b""),
    "205 with a body": (status(205), "hold", 205, BODY),
    "304": (interim(304, b'ETag: "a"\r\n'), "hold", 304, b""),
    "304 with a length": (interim(304, LENGTH), "hold", 304, b""),
    "304 that is chunked": (interim(304, CHUNKED), "hold", 304, b""),
    **{str(number): (status(number), "hold", number, BODY) for number in (201, 301, 302, 303, 307, 308, 400, 401, 403, 404, 408, 413, 429, 500, 502, 503, 529, 600)},
    "a redirect elsewhere": (status(302, LENGTH + b"Location: /second?elsewhere\r\n"), "hold", 302, BODY),
}


@pytest.mark.parametrize("data,after,code,body", [pytest.param(*row, id=name) for name, row in RELAYED.items()])
def test_what_is_good_is_relayed_and_the_connection_kept_where_it_can_be(upstream, relay, data, after, code, body):
    scene = Scene(upstream, relay, data, after)
    reply = scene.play()
    assert (reply.status, reply.body, reply.complete) == (code, body, True)
    assert reply.get("location") in (None, "/second?elsewhere")
    assert scene.reused == (after == "hold" and not data.startswith(b"HTTP/1.0"))


@pytest.mark.parametrize("fields", [LENGTH, CHUNKED, b""], ids=["length", "chunked", "neither"])
def test_an_answer_to_HEAD_has_no_body_whatever_its_fields_say(upstream, relay, fields):
    scene = Scene(upstream, relay, answer(fields, b""))
    reply = scene.play("HEAD")
    assert reply.status == 200 and reply.get("content-length") == ("11" if fields is LENGTH else None)
    assert scene.reused


@pytest.mark.parametrize("method,data", [
    pytest.param("GET", answer() + POISON, id="behind a length"), pytest.param("GET", chunked(chunk(BODY) + END) + POISON, id="behind chunks"), pytest.param("GET", interim(204) + POISON, id="behind 204"),
    pytest.param("GET", interim(304) + BODY, id="a body to 304"), pytest.param("HEAD", answer(), id="a body to HEAD"), pytest.param("GET", interim(204, LENGTH) + BODY, id="a body to 204"),
    pytest.param("GET", answer(b"Content-Length: 0\r\n", b"") + POISON, id="behind a length of 0")])
def test_what_comes_behind_an_answer_is_nobodys(upstream, relay, method, data):
    scene = Scene(upstream, relay, data)
    with scene.relay.client() as client:
        client.request(method, CHAT)
        reply = client.read_reply(method)
        assert reply.complete and reply.body in (BODY, b"")
        scene.relay.wait_for_record()
        client.request("GET", "/second")        # on the same connection: nothing is left over there either
        assert client.read_reply().body == b"SECOND"
    assert not scene.reused and not scene.faults


BAD = {
    "status": {name: answer(line=line) for name, line in {
        "two digits": b"HTTP/1.1 20 OK", "four digits": b"HTTP/1.1 2000 OK", "underscore": b"HTTP/1.1 2_00 OK", "plus": b"HTTP/1.1 +200 OK", "letters": b"HTTP/1.1 abc OK", "zero first": b"HTTP/1.1 020 OK", "none": b"HTTP/1.1", "two spaces": b"HTTP/1.1  200 OK",
        "HTTP/2.0": b"HTTP/2.0 200 OK", "HTTP/1.10": b"HTTP/1.10 200 OK", "HTTP/1.xyz": b"HTTP/1.xyz 200 OK", "lower case": b"http/1.1 200 OK", "ICY": b"ICY 200 OK", "nul in the reason": b"HTTP/1.1 200 O\0K", "cr in the reason": b"HTTP/1.1 200 O\rK",
        "an empty line before": b"\r\nHTTP/1.1 200 OK", "unasked 101": b"HTTP/1.1 101 Switching Protocols", "17 KB": b"HTTP/1.1 200 " + b"a" * 17000}.items()},
    "field": {name: answer(LENGTH + line + b"\r\n") for name, line in {
        "bare cr": b"X-A: b\rSet-Cookie: evil=1", "cr behind": b"X-A: b\r", "bare lf": b"X-A: b\nSet-Cookie: evil=1", "nul": b"X-A: b\0c", "control": b"X-A: b\x08c", "folded": b"X-A: b\r\n c", "folded by a tab": b"X-A: b\r\n\tc", "space before the colon": b"X-A : b",
        "no colon": b"garbage", "no name": b": b", "space in the name": b"X A: b", "not ASCII in the name": b"X\xe9: b", "101 of them": b"\r\n".join(b"X-%d: y" % number for number in range(99)), "17 KB": b"X: " + b"a" * 17000,
        "above 64 KB": b"\r\n".join([b"X: " + b"a" * 16000] * 5)}.items()},
    "length": {name: answer(b"Content-Length:" + text + b"\r\n") for name, text in {
        "minus": b" -11", "plus": b" +11", "underscore": b" 1_1", "empty": b"", "word": b" abc", "list": b" 11, 11", "hexadecimal": b" 0xb", "no-break space": b" 11\xa0", "twice": b" 11\r\nContent-Length: 12", "twice the same": b" 11\r\nContent-Length: 11",
        "twenty digits": b" 18446744073709551627"}.items()},
    "coding": {name: answer(b"Transfer-Encoding:" + text + b"\r\n", chunk(BODY) + END) for name, text in {
        "unknown": b" foo", "gzip, chunked": b" gzip, chunked", "chunked, chunked": b" chunked, chunked", "chunked, gzip": b" chunked, gzip", "identity": b" identity", "empty": b"", "two fields": b" identity\r\nTransfer-Encoding: chunked",
        "twice": b" chunked\r\nTransfer-Encoding: chunked", "vertical tab": b" chunked\x0b", "and a length": b" chunked\r\nContent-Length: 11"}.items()},
    "whole": {"length and coding": answer(LENGTH + CHUNKED, chunk(BODY) + END), "chunked in HTTP/1.0": answer(CHUNKED, chunk(BODY) + END, b"HTTP/1.0 200 OK"), "lines of lf": answer().replace(b"\r\n", b"\n"), "no head": b"<html>\r\n\r\n</html>",
              "HTTP/0.9": b"<html>hello</html>\n" * 2000, "TLS alert": b"\x15\x03\x01\x00\x02\x02\n", "21 interim answers": interim(100) * 21 + answer(), "interim answers without end": interim(100) * 5000},
}
CLOSED = {"nothing": b"", "status line alone": b"HTTP/1.1 200 OK\r\n", "head cut": answer()[:40], "head without its empty line": answer(body=b"")[:-2], "103 alone": interim(103), "TLS alert": b"\x15\x03\x01\x00\x02\x02\n"}


@pytest.mark.parametrize("data,after", [pytest.param(data, "hold", id="%s: %s" % (group, name)) for group, rows in BAD.items() for name, data in rows.items() if name != "TLS alert"] +
                         [pytest.param(data, after, id="%s: %s" % (after, name)) for name, data in CLOSED.items() for after in ("close", "reset")])
def test_an_answer_that_cannot_be_read_is_a_502_and_nothing_of_it_comes_down(upstream, relay, data, after):
    scene = Scene(upstream, relay, data, after)
    reply = scene.play("POST")
    assert reply.status == 502 and reply.code == "upstream_bad_response" and reply.complete
    assert reply.get("set-cookie") is None and b"evil" not in reply.raw_head + reply.body
    assert not scene.reused


@pytest.mark.parametrize("method,data", [pytest.param("HEAD", answer(b"Content-Length: abc\r\n", b""), id="HEAD"), pytest.param("GET", interim(304, b"Content-Length: 5, 5\r\n"), id="304")])
def test_a_bad_length_is_bad_where_there_is_no_body_too(upstream, relay, method, data):
    assert Scene(upstream, relay, data).play(method).status == 502


CUT = {     # name: (bytes, what the upstream does then, how much of BODY may be seen)
    "length": (answer(b"Content-Length: 22\r\n"), "close", BODY), "length, by a reset": (answer(b"Content-Length: 22\r\n"), "reset", BODY), "length and nothing": (answer(b"Content-Length: 22\r\n", b""), "close", b""),
    "in a chunk": (chunked(b"16\r\n" + BODY), "close", BODY), "between chunks": (chunked(chunk(BODY)), "close", BODY), "between chunks, by a reset": (chunked(chunk(BODY)), "reset", BODY), "chunked and nothing": (chunked(b""), "close", b""),
    "in a size": (chunked(chunk(BODY) + b"1"), "close", BODY), "until the end, by a reset": (answer(b""), "reset", BODY),
    **{"chunk: " + name: (chunked(chunk(BODY) + text), "hold", BODY) for name, text in {
        "not a size": b"zz\r\n", "seventeen digits": b"10000000000000000\r\nx", "minus": b"-5\r\nhello\r\n", "plus": b"+5\r\nhello\r\n", "0x": b"0x5\r\nhello\r\n", "underscore": b"1_0\r\n" + bytes(16) + b"\r\n", "space before": b" 5\r\nhello\r\n",
        "empty": b"\r\n", "lf": b"5\nhello\n", "nul": b"5\0\r\nhello\r\n", "extension of 5 KB": b"5;" + b"a" * 5000, "bad trailer": b"0\r\ngarbage\r\n\r\n", "trailers of 9 KB": b"0\r\n" + b"X: yyyyyyyy\r\n" * 800 + b"\r\n", "lf at the end": b"0\r\n\n"}.items()},
    "chunk: data not ended": (chunked(b"b\r\n" + BODY + b"XX" + END), "hold", BODY),
}


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("data,after,body", [pytest.param(*row, id=name) for name, row in CUT.items()])
def test_a_body_that_breaks_off_or_breaks_the_rules_is_seen_to_be_cut(upstream, relay, data, after, body, version):
    scene = Scene(upstream, relay, data, after)
    try:
        reply = scene.play("POST", version)
    except ConnectionError:                 # HTTP/1.0 has no other sign of a cut than a reset, which may overtake the head
        assert version == "HTTP/1.0"
        return
    assert reply.status == 502 and reply.code == "upstream_bad_response" or not reply.complete and body.startswith(reply.body)
    assert not scene.reused


@pytest.mark.parametrize("place", range(1, 131, 5))
def test_an_answer_in_any_two_pieces_is_the_same_answer(upstream, relay, place, monkeypatch):
    data = interim(103) + chunked(b"5;x\r\n" + BODY[:5] + b"\r\n6\r\n" + BODY[5:] + b"\r\n0\r\nX: y\r\n\r\n")
    assert len(data) == 131
    first_read, receive = threading.Event(), aiproxy.Wire.receive

    def receive_and_tell(wire):
        piece = receive(wire)
        if piece and data.startswith(piece):
            first_read.set()
        return piece
    monkeypatch.setattr(aiproxy.Wire, "receive", receive_and_tell)
    scene = Scene(upstream, relay, data[place:])

    def answer_in_two(received):
        if CHAT in received.line:
            received.send(data[:place])
            assert first_read.wait(PATIENCE)
        scene.answer(received)
    upstream.answer = answer_in_two
    reply = scene.play()
    assert reply.body == BODY and reply.complete and scene.reused


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_reset_in_an_error_that_is_held_is_no_end_of_it(upstream, relay, version):
    def reply(received):
        received.send(answer(b"", BODY, b"HTTP/1.1 429 X"))
        hang_up(received, "reset")
    upstream.answer = reply
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    with running.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")], version)
        try:
            seen = client.read_reply("POST")
        except (ConnectionError, AssertionError):      # HTTP/1.0: a reset that overtakes the head
            seen = None
        assert version == "HTTP/1.0" and seen is None or not seen.complete
    assert running.wait_for_record()["outcome"] in ("upstream_died", "upstream_bad_response")
