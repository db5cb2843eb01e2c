"""Request smuggling: a request that could be read in two ways is refused.

Its connection closes, and the upstream never sees a byte of it.
"""

import pytest

import aiproxy
from support import OK, PATIENCE, Relay, Upstream

GET = b"GET /v1/models HTTP/1.1"
POST = b"POST /v1/chat/completions HTTP/1.1"
POST_1_0 = b"POST /v1/chat/completions HTTP/1.0"
CHUNKED = b"Transfer-Encoding: chunked"
KEY = b"Authorization: Bearer ck-alice"
JSON = b'{"a":1}'
# One good chunk, and the last chunk.
WHOLE = b"7\r\n" + JSON + b"\r\n"
END = b"0\r\n\r\n"


def request(line, *fields, body=b"", host=b"Host: relay.test"):
    lines = [line, *fields] if host is None else [line, host, *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def post(*fields, body=JSON):
    return request(POST, *fields, body=body)


def chunked(body, *fields):
    return post(CHUNKED, *fields, body=body)


# Follows every malformed request: it must never be carried out.
NEXT = request(b"GET /smuggled HTTP/1.1")


class RelayWithUpstream:
    """A relay and its upstream, shared by all cases of a table."""

    def __init__(self, upstream, relay):
        self.upstream = upstream
        self.relay = relay

    def exchange(self, data, split=False, half_close=False):
        """Send `data`, whole or in small pieces; return a client that has read nothing yet."""
        self.upstream.all_bytes = b""
        self.upstream.received = []
        client = self.relay.client()
        size = max(1, len(data) // 500) if split else len(data)
        try:
            for start in range(0, len(data), size):
                client.send(data[start:start + size])
            if half_close:
                client.sock.shutdown(1)
        except OSError:
            # Refused before the end: the response is there to read.
            pass
        return client

    def check_refused(self, data, statuses, split=False):
        with self.exchange(data, split) as client:
            reply = client.read_reply()
            assert reply.status in statuses, reply.body
            assert reply.status_line.startswith("HTTP/1.1 ")
            assert reply.complete
            assert reply.get("connection") == "close"
            assert set(reply.json["error"]) == {"message", "type", "param", "code"}
            assert client.ended()
        assert self.upstream.all_bytes == b""


def answer_without_a_body_to_head(received):
    received.send(OK[:-11] if received.line.startswith("HEAD") else OK)


def start_relay(**settings):
    """Run a relay and its upstream for all cases of a table.

    The relay buffers a body so long that nothing is sent up before the malformed part arrives,
    however slow the machine.
    """
    faults = []

    def note_fault(server, error):
        faults.append(aiproxy.format_traceback(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiproxy, "PREFETCH_SECONDS", PATIENCE)
        patch.setattr(aiproxy.Server, "report_fault", note_fault)
        with Upstream(answer=answer_without_a_body_to_head) as upstream:
            relay = Relay(UPSTREAM=upstream.url, **settings)
            yield RelayWithUpstream(upstream, relay)
            relay.close()
            assert not faults


@pytest.fixture(scope="module")
def transparent():
    """A relay that refuses nothing but malformed requests: it is open, for any Host and rate."""
    has_rates = any(option.name == "AIPROXY_RATE" for option in aiproxy.OPTIONS)
    rate = {"RATE": "1000000/s"} if has_rates else {}       # see test_sections.py
    yield from start_relay(OPEN="1", **rate)


@pytest.fixture(scope="module")
def restricted():
    """A relay that asks for a client key and passes only some paths."""
    yield from start_relay(
        KEY="sk-hidden-key",
        CLIENT_KEYS="alice=ck-alice",
        PATHS="/v1/chat/completions, GET /v1/models, * /v1/models/*, * /v1/files/*/content",
    )


def cases(group, statuses, make, texts):
    """Parameters from {name: text}: make(text) is a request that gets one of `statuses`."""
    return [
        pytest.param(make(text), statuses, id="%s: %s" % (group, name))
        for name, text in texts.items()
    ]


def raw(text):
    return text


def target(text):
    return request(b"GET " + text + b" HTTP/1.1")


def version(text):
    return request(b"GET /v1/models " + text)


def method(text):
    return request(text + b" /v1/models HTTP/1.1")


def field(text):
    return request(GET, text, b"X-After: 1")


def length(text):
    return post(b"Content-Length: " + text)


def coding(text):
    return post(b"Transfer-Encoding: " + text, body=WHOLE + END)


def host(text):
    return request(GET, host=b"Host: " + text)


REFUSED = [
    *cases("request line", [400], request, {
        "two spaces": b"GET  /v1/models HTTP/1.1",
        "tab": b"GET\t/v1/models HTTP/1.1",
        "vertical tab": b"GET\x0b/v1/models\x0bHTTP/1.1",
        "no-break space": b"GET\xa0/v1/models\xa0HTTP/1.1",
        "file separator": b"GET\x1c/v1/models\x1cHTTP/1.1",
        "next line": b"GET\x85/v1/models\x85HTTP/1.1",
        "space after": GET + b" ",
        "space before": b" " + GET,
        "no target": b"GET HTTP/1.1",
        "no version": b"GET /v1/models ",
        "four words": b"GET /v1/models x HTTP/1.1",
        "one word": b"GARBAGE",
        "cr after": GET + b"\r",
        "json": b'{"model": "m"}',
        "PROXY protocol": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2",
        "a response": b"HTTP/1.1 200 OK",
    }),
    *cases("request line", [400], raw, {
        "HTTP/0.9": b"GET /v1/models\r\n",
        "ends in lf": GET + b"\nHost: relay.test\r\n\r\n",
        "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
        "five empty lines": b"\r\n" * 5 + request(GET),
        "an empty line of lf": b"\n" + request(GET),
        "an empty line of cr": b"\r" + request(GET),
    }),
    *cases("request line", [414], raw, {
        "longer than 16 KB": target(b"/" + b"a" * 17000),
        "without an end": b"A" * 17000,
    }),
    *cases("version", [505], version, {
        "2.0": b"HTTP/2.0",
        "3.0": b"HTTP/3.0",
        "0.9": b"HTTP/0.9",
    }),
    *cases("version", [400], version, {
        "lower case": b"http/1.1",
        "two digits": b"HTTP/1.10",
        "leading zero": b"HTTP/01.1",
        "underscore": b"HTTP/1_0.1",
        "plus": b"HTTP/+1.1",
        "superscript": b"HTTP/1.\xb9",
        "major alone": b"HTTP/1",
        "space": b"HTTP/ 1.1",
        "comma": b"HTTP/1,1",
        "another protocol": b"ICAP/1.0",
        "no slash": b"HTTP1.1",
    }),
    *cases("version", [400, 505], raw, {
        "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    }),
    *cases("method", [405], method, {
        "TRACE": b"TRACE",
    }),
    *cases("method", [405], raw, {
        "CONNECT": request(b"CONNECT evil.test:443 HTTP/1.1"),
    }),
    *cases("method", [400], method, {
        "control": b"GE\x01T",
        "nul": b"GET\0",
        "parenthesis": b"GE(T",
        "not ASCII": b"G\xc9T",
        "none": b"",
    }),
    *cases("target", [400], target, {
        "at": b"@evil.test/v1/models",
        "port and at": b":443@evil.test/",
        "scheme alone": b"https:/v1/models",
        "ftp": b"ftp://evil.test/x",
        "file": b"file:///etc/passwd",
        "absolute of another host": b"http://evil.test/v1/models",
        "absolute with user info": b"http://relay.test@evil.test/v1/models",
        "absolute with our user info": b"http://u:p@relay.test/v1/models",
        "absolute with another port": b"http://relay.test:1/v1/models",
        "absolute without host": b"http:///v1/models",
        "authority": b"evil.test:443",
        "word": b"admin",
        "star with GET": b"*",
        "star and path": b"*/v1",
        "two slashes": b"//evil.test/",
        "three slashes": b"///evil.test",
        "absolute with two slashes": b"http://relay.test//evil.test",
        "query alone": b"?x=1",
        "fragment": b"/v1/models#x",
        "fragment in the query": b"/v1/models?a#x",
        "backslash": b"/v1\\models",
        "slash backslash": b"/\\evil.test",
        "dots": b"/v1/../admin",
        "one dot": b"/v1/./models",
        "dots at the end": b"/v1/models/..",
        "dot at the end": b"/v1/models/.",
        "dots encoded": b"/v1/%2e%2e/admin",
        "dots half encoded": b"/v1/.%2E/admin",
        "dots doubly encoded": b"/v1/%252e%252e/admin",
        "dots and encoded slash": b"/v1/..%2fadmin",
        "dots and doubly encoded slash": b"/v1/..%252fadmin",
        "dots and encoded backslash": b"/v1/..%5cadmin",
        "encoded slash and dots": b"/v1%2f../admin",
        "dots with a parameter": b"/v1/..;/admin",
        "dots with an encoded parameter": b"/v1/..%3b/admin",
        "nul encoded": b"/v1/models%00.json",
        "bad escape": b"/v1/models%zz",
        "cut escape": b"/v1/models%2",
        "control": b"/v1/\x01models",
        "nul": b"/v1/\0models",
        "DEL": b"/v1/\x7fmodels",
        "cr": b"/v1/mo\rdels",
        "lf": b"/v1/mo\ndels",
        "not ASCII": b"/v1/\xc3\xa9",
    }),
    *cases("host", [400], host, {
        "empty": b"",
        "path": b"relay.test/x",
        "comma": b"relay.test, evil.test",
        "space": b"relay.test evil.test",
        "user info": b"u@relay.test",
        "port alone": b":8000",
        "port of letters": b"relay.test:http",
        "port of six digits": b"relay.test:123456",
        "two ports": b"relay.test:1:2",
        "open bracket": b"[::1",
        "bracket of letters": b"[evil.test]",
        "backslash": b"relay.test\\evil",
        "fragment": b"relay.test#evil",
        "query": b"relay.test?evil",
        "not ASCII": b"rel\xc3\xa4y.test",
        "nul": b"relay.test\0evil",
        "percent": b"relay%2etest",
    }),
    *cases("host", [400], raw, {
        "none": request(GET, host=None),
        "twice": request(GET, b"Host: relay.test"),
        "two names": request(GET, b"Host: evil.test"),
        "twice in other case": request(GET, b"HOST: relay.test"),
    }),
    *cases("field", [400], field, {
        "space before the colon": b"X-A : b",
        "tab before the colon": b"X-A\t: b",
        "no colon": b"garbage",
        "no name": b": b",
        "space in the name": b"X A: b",
        "control in the name": b"X\x01A: b",
        "parenthesis in the name": b"X(a): b",
        "not ASCII in the name": b"X\xe9: b",
        "backslash in the name": b"X\\A: b",
        "nul": b"X-A: b\0c",
        "bell": b"X-A: b\x07c",
        "DEL": b"X-A: b\x7fc",
        "vertical tab": b"X-A: \x0bb",
        "bare cr": b"X-A: b\rc",
        "bare cr and a field": b"X-A: b\rTransfer-Encoding: chunked",
        "two crs": b"X-A: b\r\rX-B: c",
        "cr after": b"X-A: b\r",
        "bare lf": b"X-A: b\nX-B: c",
        "two lfs": b"X-A:\n\nGET /smuggled HTTP/1.1",
        "crlf and lf": b"X-A: b\r\n\nGET /smuggled HTTP/1.1",
        "folded by a space": b"X-A: b\r\n c",
        "folded by a tab": b"X-A: b\r\n\tc",
        "folded and empty": b"X-A: b\r\n \r\nX-B: c",
        "From here": b"From here",
        "Authorization twice": b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        "Content-Type twice": b"Content-Type: a/b\r\nContent-Type: a/b",
        "Origin twice": b"Origin: http://a\r\nOrigin: http://b",
    }),
    *cases("field", [400], raw, {
        "folded at the first line": GET + b"\r\n X: y\r\nHost: relay.test\r\n\r\n",
        "length folded at the first line": (
            POST + b"\r\n Content-Length: 7\r\nHost: relay.test\r\n\r\n" + JSON
        ),
        "lines of lf": b"GET /v1/models HTTP/1.1\nHost: relay.test\n\n",
        "ends in lf lf": b"GET /v1/models HTTP/1.1\r\nHost: relay.test\n\n",
    }),
    *cases("field", [417], field, {
        "unknown expectation": b"Expect: miracles",
        "expectation and more": b"Expect: 100-continue, miracles",
    }),
    *cases("field", [431], field, {
        "101 of them": b"\r\n".join(b"X-%d: y" % number for number in range(99)),
        "longer than 16 KB": b"X: " + b"a" * 17000,
        "above 64 KB": b"\r\n".join([b"X: " + b"a" * 16000] * 5),
    }),
    *cases("field", [431], raw, {
        "without an end": GET + b"\r\n" + b"X: y\r\n" * 12000,
    }),
    *cases("length", [400], length, {
        "plus": b"+7",
        "minus zero": b"-0",
        "minus": b"-7",
        "hexadecimal": b"0x7",
        "exponent": b"7e0",
        "point": b"7.0",
        "underscore": b"0_7",
        "space inside": b"7 7",
        "list of the same": b"7, 7",
        "list of two": b"7, 8",
        "list with zero": b"0, 7",
        "list cut off": b"7,",
        "quoted": b'"7"',
        "no-break space": b"7\xa0",
        "superscript": b"\xb2",
        "vertical tab": b"\x0b7",
        "empty": b"",
        "word": b"abc",
        "parameter": b"7;x",
        "twenty digits": b"18446744073709551623",
        "twice the same": b"7\r\nContent-Length: 7",
        "twice": b"7\r\nContent-Length: 30",
        "twice in other case": b"7\r\nCONTENT-LENGTH: 7",
    }),
    *cases("length", [400], field, {
        "space instead of a colon": b"Content-Length 7",
        "after a bad name": b"X\xff: 1\r\nContent-Length: 7",
    }),
    *cases("coding", [400, 501], coding, {
        "twice in a list": b"chunked, chunked",
        "gzip after": b"chunked, gzip",
        "gzip before": b"gzip, chunked",
        "identity before": b"identity, chunked",
        "identity": b"identity",
        "comma after": b"chunked,",
        "comma before": b",chunked",
        "quoted": b'"chunked"',
        "single quotes": b"'chunked'",
        "suffix": b"chunkedx",
        "prefix": b"xchunked",
        "vertical tab": b"chunked\x0b",
        "nul": b"chunked\0",
        "no-break space": b"\xa0chunked",
        "not ASCII": b"\xffchunked\xff",
        "unknown": b"pigeons",
        "kelvin sign": "chun\u212aed".encode(),
        "parameter": b"chunked;x=1",
        "empty": b"",
        "two fields": b"chunked\r\nTransfer-Encoding: identity",
        "two fields the same": b"chunked\r\nTransfer-Encoding: chunked",
        "folded": b"\r\n chunked",
        "folded after": b"chunked\r\n\t",
    }),
    *cases("coding", [400], field, {
        "space before the colon": b"Transfer-Encoding : chunked",
        "space in the name": b"Transfer-Encoding x: chunked",
        "backslash in the name": b"Transfer\\Encoding: chunked",
        "prefixed name": b"\xffTransfer-Encoding: chunked",
        "folded name": b"Transfer-\r\n Encoding: chunked",
        "led by a space": b" Transfer-Encoding: chunked",
        "after a bare cr": b"X: y\rTransfer-Encoding: chunked",
        "after two lfs": b"X: y\n\nTransfer-Encoding: chunked",
    }),
    *cases("coding", [400], raw, {
        "length, then chunked": post(b"Content-Length: 30", CHUNKED, body=END),
        "chunked, then length": post(CHUNKED, b"Content-Length: 5", body=END),
        "chunked and length 0": post(b"Content-Length: 0", CHUNKED, body=END),
        "unknown and length": post(b"Content-Length: 7", b"Transfer-Encoding: xchunked"),
        "chunked in HTTP/1.0": request(POST_1_0, CHUNKED, body=WHOLE + END),
    }),
    *cases("chunk", [400], chunked, {
        "0x": b"0x7\r\n" + JSON + b"\r\n" + END,
        "minus": b"-7\r\n" + JSON + b"\r\n" + END,
        "plus": b"+7\r\n" + JSON + b"\r\n" + END,
        "underscore": b"0_7\r\n" + JSON + b"\r\n" + END,
        "space after": b"7 \r\n" + JSON + b"\r\n" + END,
        "space before": b" 7\r\n" + JSON + b"\r\n" + END,
        "no size": b"\r\n" + JSON + b"\r\n" + END,
        "size and junk": b"7xyz\r\n" + JSON + b"\r\n" + END,
        "seventeen digits": b"10000000000000007\r\n" + JSON + b"\r\n" + END,
        "data too long": b"5\r\n" + JSON + b"\r\n" + END,
        "data not ended": WHOLE[:-2] + b"XX" + END,
        "data ended by lf": WHOLE[:-2] + b"\n" + END,
        "lf everywhere": b"7\n" + JSON + b"\n0\n\n",
        "lf at the last": WHOLE + b"0\n\r\n",
        "lf at the end": WHOLE + b"0\r\n\n",
        "two crs": b"7\r\r\n" + JSON + b"\r\n" + END,
        "nul": b"7\0\r\n" + JSON + b"\r\n" + END,
        "extension with lf": b"7;a\nX\r\n" + JSON + b"\r\n" + END,
        "extension with cr": b"2;\rXxx\r\n10\r\n\r\nAAAAAAAAAAAAAA\r\n" + END,
        "extension after a cr": b"7\r\r;a\r\n" + JSON + b"\r\n" + END,
        "extension with nul": b"7;\0\r\n" + JSON + b"\r\n" + END,
        "extension of 64 KB": b"7;" + b"a" * 65536 + b"\r\n" + JSON + b"\r\n" + END,
        "spilled": b"5\r\nAAAAAXX2\r\nBB\r\n" + END,
        "trailer with a space": WHOLE + b"0\r\nX : y\r\n\r\n",
        "trailer without a colon": WHOLE + b"0\r\ngarbage\r\n\r\n",
        "101 trailer fields": WHOLE + b"0\r\n" + b"a:\r\n" * 101 + b"\r\n",
        "trailer with a length": WHOLE + b"0\r\nContent-Length: 99\r\n\r\n",
        "trailer with a coding": WHOLE + b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "trailer with Host": WHOLE + b"0\r\nHost: evil.test\r\n\r\n",
        "trailer with a key": WHOLE + b"0\r\nAuthorization: Bearer x\r\n\r\n",
        "trailers of 9 KB": WHOLE + b"0\r\n" + b"X: yyyyyyyy\r\n" * 800 + b"\r\n",
        "trailer folded": WHOLE + b"0\r\nX: y\r\n z\r\n\r\n",
    }),
]


@pytest.mark.parametrize("data,statuses", REFUSED)
def test_a_request_that_could_be_read_in_two_ways_is_refused(transparent, data, statuses):
    transparent.check_refused(data + NEXT, statuses)


@pytest.mark.parametrize("data,statuses", REFUSED)
def test_it_is_refused_as_well_when_it_arrives_byte_by_byte(transparent, data, statuses):
    transparent.check_refused(data, statuses, split=True)


SECOND = request(b"GET /second HTTP/1.1")
POSTED = (POST, JSON)
UPGRADE_TO_H2C = [
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAMAAABkAAQAAP__",
]
# name: (bytes, what the upstream receives, whether the connection stays open)
ACCEPTED = {
    "plain": (request(GET), [GET], True),
    "four empty lines before": (b"\r\n" * 4 + request(GET), [GET], True),
    "HTTP/1.0 without Host": (request(b"GET /v1/models HTTP/1.0", host=None), [GET], False),
    "HTTP/1.2": (request(b"GET /v1/models HTTP/1.2"), [GET], True),
    "space and tab around a value": (request(GET, b"X-A:\t b \t"), [GET], True),
    "an empty value": (request(GET, b"X-A:", b"X-B: "), [GET], True),
    "a value that is not ASCII": (request(GET, b"X-A: caf\xc3\xa9 \xff"), [GET], True),
    "every character of a token": (request(GET, b"!#$%&'*+-.^_`|~09AZaz: y"), [GET], True),
    "100 fields": (request(GET, *(b"X-%d: y" % number for number in range(99))), [GET], True),
    "a line of 16 KB": (request(GET, b"X: " + b"a" * 16381), [GET], True),
    "a target of 8000 bytes": (
        request(b"GET /" + b"a" * 8000 + b" HTTP/1.1"),
        [b"GET /" + b"a" * 8000 + b" HTTP/1.1"], True,
    ),
    "Host with a port": (request(GET, host=b"Host: relay.test:8000"), [GET], True),
    "Host with an empty port": (request(GET, host=b"Host: relay.test:"), [GET], True),
    "Host with a dot after": (request(GET, host=b"Host: relay.test."), [GET], True),
    "Host of IPv6": (request(GET, host=b"Host: [::1]:8000"), [GET], True),
    "absolute target": (request(b"GET http://relay.test/v1/models HTTP/1.1"), [GET], True),
    "absolute target in other case": (
        request(b"GET HTTP://RELAY.test/v1/models HTTP/1.1"),
        [GET], True,
    ),
    "absolute target without a path": (
        request(b"POST http://relay.test HTTP/1.1", b"Content-Length: 0"),
        [b"POST / HTTP/1.1"], True,
    ),
    "absolute target with a query alone": (
        request(b"POST http://relay.test?a=1 HTTP/1.1", b"Content-Length: 0"),
        [b"POST /?a=1 HTTP/1.1"], True,
    ),
    "a length of 0": (request(GET, b"Content-Length: 0"), [GET], True),
    "a length with zeros before": (post(b"Content-Length: 007"), [POSTED], True),
    "a length twice as underscored field": (
        post(b"Content-Length: 7", b"Content_Length: 3"),
        [POSTED], True,
    ),
    "GET with a body": (request(GET, b"Content-Length: 7", body=JSON), [(GET, JSON)], True),
    "GET with a chunked body": (request(GET, CHUNKED, body=WHOLE + END), [(GET, JSON)], True),
    "GET with an empty chunked body": (request(GET, CHUNKED, body=END), [GET], True),
    "DELETE with a body": (
        request(b"DELETE /v1/files/a HTTP/1.1", b"Content-Length: 7", body=JSON),
        [(b"DELETE /v1/files/a HTTP/1.1", JSON)], True,
    ),
    "OPTIONS with a body": (
        request(b"OPTIONS /v1/models HTTP/1.1", b"Content-Length: 7", body=JSON),
        [(b"OPTIONS /v1/models HTTP/1.1", JSON)], True,
    ),
    "chunked": (chunked(WHOLE + END), [POSTED], True),
    "chunked in capitals, with a space after": (
        post(b"Transfer-Encoding: CHUNKED ", body=WHOLE + END),
        [POSTED], True,
    ),
    "a size in capitals": (chunked(b'A\r\n{"a":1234}\r\n' + END), [(POST, b'{"a":1234}')], True),
    "a size with zeros before": (
        chunked(b"0000000000000007\r\n" + WHOLE[3:] + b"000\r\n\r\n"),
        [POSTED], True,
    ),
    "extensions": (chunked(b'7;a=b;c="d;e"\r\n' + WHOLE[3:] + b"0;end\r\n\r\n"), [POSTED], True),
    "trailers": (chunked(WHOLE + b"0\r\nX-Sum: abc\r\nX-B:\r\n\r\n"), [POSTED], True),
    "data that looks like chunks": (
        chunked(b"5\r\n0\r\n\r\n\r\n2\r\n{}\r\n" + END),
        [(POST, b"0\r\n\r\n{}")], True,
    ),
    "1000 chunks of a byte": (
        chunked(b"1\r\n \r\n" * 1000 + WHOLE + END),
        [(POST, b" " * 1000 + JSON)], True,
    ),
    "a coding named in Connection": (
        chunked(WHOLE + END, b"Connection: Transfer-Encoding"),
        [POSTED], True,
    ),
    "a length named in Connection": (
        post(b"Content-Length: 7", b"Connection: Content-Length, Host"),
        [POSTED], True,
    ),
    "an empty line after a body": (
        post(b"Content-Length: 7") + b"\r\n" + request(GET),
        [POSTED, GET], True,
    ),
    "two at once": (request(GET) + SECOND, [GET, b"GET /second HTTP/1.1"], True),
    "a chunked one and another": (
        chunked(WHOLE + END) + SECOND,
        [POSTED, b"GET /second HTTP/1.1"], True,
    ),
    "twenty at once": (request(GET) * 20, [GET] * 20, True),
    "HEAD and another": (
        request(b"HEAD /v1/models HTTP/1.1") + SECOND,
        [b"HEAD /v1/models HTTP/1.1", b"GET /second HTTP/1.1"], True,
    ),
    "nothing after close": (request(GET, b"Connection: close") + NEXT, [GET], False),
    "nothing after close in a list": (
        request(GET, b"Connection: foo, Close") + NEXT,
        [GET], False,
    ),
    "nothing after close in a second field": (
        request(GET, b"Connection: keep-alive", b"Connection: close") + NEXT,
        [GET], False,
    ),
    "nothing after HTTP/1.0": (
        request(b"GET /v1/models HTTP/1.0", b"Connection: keep-alive") + NEXT,
        [GET], False,
    ),
    "an expectation in HTTP/1.0": (
        request(POST_1_0, b"Content-Length: 7", b"Expect: 100-continue", body=JSON),
        [POSTED], False,
    ),
    "h2c that is not passed on": (
        request(GET, *UPGRADE_TO_H2C),
        [GET], True,
    ),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("data,received,stays_open", list(ACCEPTED.values()), ids=list(ACCEPTED))
def test_a_good_request_passes_and_the_next_one_is_read_right(
    transparent, data, received, stays_open, split
):
    expected = [item if isinstance(item, tuple) else (item, b"") for item in received]

    with transparent.exchange(data, split) as client:
        for sent, _ in expected:
            reply = client.read_reply(sent.split(b" ")[0].decode())
            assert reply.status == 200
            assert reply.complete
        if stays_open:
            client.send(request(b"GET /last HTTP/1.1", b"Connection: close"))
            assert client.read_reply().status == 200
            expected = expected + [(b"GET /last HTTP/1.1", b"")]
        assert client.ended()

    requests = transparent.upstream.received
    assert [(received.line.encode(), received.body) for received in requests] == expected
    for received in requests:
        framing = received.fields("content-length") + received.fields("transfer-encoding")
        assert len(framing) <= 1
        assert not received.fields("content_length")


TRUNCATED = {
    "head without its empty line": request(GET)[:-2],
    "head without its last lf": request(GET)[:-1],
    "request line": b"GET /v1/mo",
    "length": post(b"Content-Length: 100"),
    "data": chunked(b"7\r\n{"),
    "size": chunked(WHOLE + b"1"),
    "no last chunk": chunked(WHOLE),
    "last chunk without its empty line": chunked(WHOLE + b"0\r\n"),
    "trailers": chunked(WHOLE + b"0\r\nX: y\r\n"),
}


@pytest.mark.parametrize("data", list(TRUNCATED.values()), ids=list(TRUNCATED))
def test_a_truncated_request_is_not_sent_up(transparent, data):
    with transparent.exchange(data, half_close=True) as client:
        while not client.data.endswith(b"}") and client.more():
            pass
        assert client.data == b"" or client.read_reply().status == 400
        assert client.ended()
    assert transparent.upstream.all_bytes == b""


def test_a_body_without_a_length_is_read_as_a_malformed_next_request(transparent):
    with transparent.exchange(post(body=JSON + b"\r\n\r\n")) as client:
        assert client.read_reply().status == 200
        assert client.read_reply().status == 400
        assert client.ended()

    (received,) = transparent.upstream.received
    assert received.line.encode() == POST
    assert received.body == b""


@pytest.mark.parametrize("name", [b"PROPFIND", b"get", b"A" * 3000, b"GETX", b"M-SEARCH"])
def test_an_unknown_method_goes_up_only_without_keys_of_ours(transparent, restricted, name):
    line = name + b" /v1/models HTTP/1.1"
    with transparent.exchange(request(line, b"Content-Length: 4", body=b"<x/>")) as client:
        assert client.read_reply().status == 200
    (received,) = transparent.upstream.received
    assert received.line.encode() == line
    assert received.body == b"<x/>"

    restricted.check_refused(request(line, KEY), [501])


def test_a_405_names_the_allowed_methods(transparent):
    with transparent.exchange(method(b"TRACE")) as client:
        assert client.read_reply().get("allow") == "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"



NOT_FOUND = [
    b"/v1/files",
    b"/v1/filesx",
    b"/v1/files/a",
    b"/v1/files/a/content/b",
    b"/v1/files/a/b/content",
    b"/v1//batches",
    b"/v1/files//content",
    b"/V1/files/a/content",
    b"/v1/files/a%2Fb/content",
    b"/v1/batches/",
    b"/v1/files/a%3fb/content",
    b"/v1/files/a%0d%0ab/content",
    b"/v1/files/%c0%ae%c0%ae/content",
    b"/v1/files/%ef%bc%8e%ef%bc%8e/content",
    b"/v1/files/a%25b/content",
    b"/v1/chat/completions;x",
    b"/v1/chat%2fcompletions",
    b"/v1/%63hat/completions",
    b"/v1/chat/completions%20",
    b"/v1/models/a//b%ff",
    b"/v1/batches",
    b"/admin",
    b"/.env",
    b"/v1",
]
MALFORMED = [
    b"/v1/files/../content",
    b"/v1/files/%2e%2e/content",
    b"/v1/files/a%2f..%2fb/content",
    b"/v1/files/..%2f/content",
    b"/v1/models/..",
    b"/v1/models/%2e",
    b"/v1/models/a%5c..%5cb",
    b"/v1/models/%252e%252e",
    b"/v1/models/a?key=ck-alice",
]
FORBIDDEN_PATHS = [(path, [404]) for path in NOT_FOUND] + [(path, [400]) for path in MALFORMED]


@pytest.mark.parametrize(
    "path,statuses", FORBIDDEN_PATHS, ids=[path.decode("latin-1") for path, _ in FORBIDDEN_PATHS]
)
def test_no_spelling_of_a_path_gets_around_the_allowed_paths(restricted, path, statuses):
    restricted.check_refused(request(b"GET " + path + b" HTTP/1.1", KEY), statuses)


ALLOWED_PATHS = [
    b"/v1/files/file-abc123/content",
    b"/v1/files/a%20b/content?x=%00",
    b"/v1/models/org%2Fmodel:free",
    b"/v1/models/gpt-4.1",
    b"/v1/models/org/model",
    b"/v1/models/%E9%80%9A%E4%B9%89/max",
    b"/v1/models?limit=..%2f",
]


@pytest.mark.parametrize("path,sent", [
    (b"/v1//files/a/content", b"/v1/files/a/content"),
    (b"//v1/files///a/content/", b"/v1/files/a/content"),
    (b"http://relay.test//v1/models/", b"/v1/models"),
    (b"/v1/v1//models?a=//", b"/v1/models?a=//"),
])
def test_doubled_slashes_and_a_trailing_one_are_dropped(restricted, path, sent):
    with restricted.exchange(request(b"GET " + path + b" HTTP/1.1", KEY)) as client:
        assert client.read_reply().status == 200
    (received,) = restricted.upstream.received
    assert received.line.encode() == b"GET " + sent + b" HTTP/1.1"


def test_a_404_names_the_nearest_allowed_path(restricted):
    with restricted.exchange(request(b"POST /v1/chat/completion HTTP/1.1", KEY)) as client:
        reply = client.read_reply()
    assert reply.status == 404
    assert "Did you mean /v1/chat/completions?" in reply.json["error"]["message"]


@pytest.mark.parametrize("path", ALLOWED_PATHS)
def test_an_allowed_path_goes_up_byte_for_byte(restricted, path):
    line = b"GET " + path + b" HTTP/1.1"
    with restricted.exchange(request(line, KEY)) as client:
        assert client.read_reply().status == 200
    assert [received.line.encode() for received in restricted.upstream.received] == [line]


EXPECT = b"Expect: 100-continue"
TOO_LONG = b"Content-Length: 99999999999"
REFUSED_BY_A_CHECK = {  # name: (bytes, status)
    "no key, chunked": (post(CHUNKED, body=WHOLE + END), 401),
    "no key": (post(b"Content-Length: 7"), 401),
    "no key, 100-continue": (post(b"Content-Length: 7", EXPECT, body=b""), 401),
    "above the limit": (post(TOO_LONG, KEY), 413),
    "above the limit, 100-continue": (post(TOO_LONG, KEY, EXPECT, body=b""), 413),
    "two keys in one field": (post(b"Authorization: Bearer ck-alice, Bearer other"), 401),
    "two keys in two fields": (post(KEY, b"x-api-key: ck-other"), 400),
    "wrong method": (
        request(b"PUT /v1/chat/completions HTTP/1.1", KEY, CHUNKED, body=WHOLE + END),
        405,
    ),
}


@pytest.mark.parametrize(
    "data,status", list(REFUSED_BY_A_CHECK.values()), ids=list(REFUSED_BY_A_CHECK)
)
def test_nothing_is_carried_out_after_a_refused_request(restricted, data, status):
    """Nor does the client receive 100 Continue: the first and only response is the refusal."""
    if data.endswith(END):
        data += NEXT

    with restricted.exchange(data) as client:
        first = client.read_until(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 %d " % status)
        client.data = first + client.data
        assert client.read_reply().complete
        assert client.ended()
    assert restricted.upstream.all_bytes == b""


def test_the_same_client_key_in_two_header_fields_is_accepted(restricted):
    with restricted.exchange(request(GET, KEY, b"x-api-key: ck-alice")) as client:
        assert client.read_reply().status == 200


@pytest.mark.parametrize("field", ["Bad Field", "X: " + "x" * 20000], ids=["malformed", "large"])
def test_a_HEAD_whose_head_is_broken_gets_no_body(relay, field):
    with relay().client() as client:
        client.send(("HEAD /v1/models HTTP/1.1\r\nHost: a\r\n%s\r\n\r\n" % field).encode())
        reply = client.read_head()
        assert reply.status in (400, 431)
        assert not client.data and client.ended()
