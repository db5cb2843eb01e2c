"""A relay without a provider key passes everything that is well-formed.

Every method and path, and the bytes unchanged, but nothing about who the client is.
"""

import threading

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, OK, PATIENCE, chunk

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
TOO_LARGE = (
    b"HTTP/1.1 413 Too Large\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n"
    b'{"no":true}'
)
CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


PATHS = [
    "/v1/models",
    "/v1/models/",
    "/v1/models?",
    "/v1/models?limit=2&after=%7e%7E",
    "/v1/files/a%20b%2Fc%c3%a9",
    "/v1/x/?a=b?c=/..//&d=%zz%00\\{}|^`\"<>",
    "/v1//double//",
    "/v1/v1/models",
    "/chat/completions",
    "/anything/at-all_0.9~!$&'()*+,;=:@",
    "/v1beta/models/gemini-2.0-flash:streamGenerateContent?alt=sse",
    "/openai/deployments/gpt-4/chat/completions?api-version=2024-10-21",
    "/api/v1/chat?key=sk-caller",
    "/healthy",
    "/.well-known/x",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_goes_up_byte_for_byte(upstream, relay, path):
    assert relay().ask("GET", path).status == 200
    assert upstream.received[0].line == "GET %s HTTP/1.1" % path


METHODS_AND_PATHS = [
    ("GET", "/v1/files/file-abc"),
    ("HEAD", "/v1/files/file-abc"),
    ("POST", "/v1/files/file-abc"),
    ("PUT", "/v1/files/file-abc"),
    ("PATCH", "/v1/files/file-abc"),
    ("DELETE", "/v1/files/file-abc"),
    ("OPTIONS", "/v1/files/file-abc"),
    ("POST", "/"),
    ("POST", "/health"),
    ("PUT", "/"),
    ("PUT", "/health"),
    ("DELETE", "/"),
    ("DELETE", "/health"),
    ("OPTIONS", "/health"),
]


@pytest.mark.parametrize("method,path", METHODS_AND_PATHS)
def test_every_method_goes_up(upstream, relay, method, path):
    upstream.answer = EMPTY
    assert relay().ask(method, path, b"abc").status == 200
    assert upstream.received[0].line == "%s %s HTTP/1.1" % (method, path)
    assert upstream.received[0].body == b"abc"


def test_a_path_that_is_allowed_for_any_method_is_so_for_unknown_ones(upstream, relay):
    running = relay(PATHS="* /dav/*, /v1/x")
    assert running.ask("PROPFIND", "/dav/a").status == 200
    assert running.ask("PROPFIND", "/v1/x").status == 405
    assert [received.line for received in upstream.received] == ["PROPFIND /dav/a HTTP/1.1"]


def test_an_OPTIONS_request_that_is_no_preflight_goes_up(upstream, relay):
    running = relay(ORIGINS="*")
    fields = [("Origin", "https://app.example")]
    preflight = fields + [("Access-Control-Request-Method", "POST")]

    assert running.ask("OPTIONS", "/v1/models", fields=fields).status == 200
    assert upstream.received[0].line == "OPTIONS /v1/models HTTP/1.1"

    assert running.ask("OPTIONS", "/v1/models", fields=preflight).status == 204
    assert len(upstream.received) == 1


PATHS_BELOW_A_BASE_URL = [  # what a client asks for, what goes up
    ("/v1/chat/completions?a=%2f", "/compatible-mode/v1/chat/completions?a=%2f"),
    ("/v1/files/", "/compatible-mode/v1/files/"),
    ("/v1/v1/models", "/compatible-mode/v1/v1/models"),
    ("/chat/completions", None),
    ("/v1x/models", None),
    ("/compatible-mode/v1/models", None),
]


@pytest.mark.parametrize("path,expected", PATHS_BELOW_A_BASE_URL)
def test_a_base_url_with_a_path_replaces_v1_and_serves_nothing_else(
    upstream, relay, path, expected
):
    running = relay(UPSTREAM=upstream.url + "/compatible-mode/v1/")

    reply = running.ask("GET", path)

    lines = [received.line for received in upstream.received]
    if expected:
        assert reply.status == 200
        assert lines == ["GET %s HTTP/1.1" % expected]
    else:
        assert reply.status == 404
        assert lines == []


# -- request headers


def fields_up(upstream, running, fields, method="GET", body=None):
    """Send a request; return the header lines that the upstream received, without Host."""
    assert running.ask(method, "/v1/x", body, fields).status == 200

    received = upstream.received[-1]
    assert received.fields("host") == [upstream.url.partition("//")[2]]
    lines = received.head.decode("latin-1").split("\r\n")[1:]
    return [line for line in lines if not line.lower().startswith("host:")]


def test_request_headers_go_up_unchanged_in_order_with_duplicates(upstream, relay):
    fields = [
        ("X-b", "1"),
        ("ACCEPT", "*/*"),
        ("X-B", "2, 3"),
        ("x-a", ""),
        ("X-b", "1"),
        ("User-Agent", "me/1 (caf\xe9)"),
        ("Accept-Encoding", "br, zstd"),
        ("Authorization", "Bearer sk-caller"),
        ("x-api-key", "k"),
        ("OpenAI-Organization", "org"),
        ("cf-aig-authorization", "Bearer x"),
        ("cf-aig-cache-ttl", "1"),
        ("X-Amzn-Bedrock-GuardrailIdentifier", "g"),
        ("anthropic-version", "2023-06-01"),
        ("X-Goog-Api-Client", "gl"),
        ("Priority", "u=1"),
    ]
    assert fields_up(upstream, relay(), fields) == ["%s: %s" % field for field in fields]


FRAMINGS = [
    ("GET", None, []),
    ("DELETE", None, []),
    ("OPTIONS", None, []),
    ("POST", None, ["Content-Length: 0"]),
    ("PUT", None, ["Content-Length: 0"]),
    ("POST", b"abc", ["Content-Length: 3"]),
    ("DELETE", b"abc", ["Content-Length: 3"]),
]


@pytest.mark.parametrize("method,body,framing", FRAMINGS)
def test_a_request_has_the_framing_that_its_body_needs(upstream, relay, method, body, framing):
    assert fields_up(upstream, relay(), [], method, body) == framing


NOT_SENT_UP = [
    "Proxy: http://evil.example",
    "proxy: x",
    "Connection: keep-alive",
    "Proxy-Connection: keep-alive",
    "Keep-Alive: timeout=5",
    "TE: trailers",
    "Trailer: X-Sum",
    "Proxy-Authorization: Basic eDp5",
    "Proxy-Authenticate: Basic",
    "HTTP2-Settings: AAMAAABkAAQAAP__",
    "Forwarded: for=1.2.3.4",
    "X-Forwarded-For: 1.2.3.4",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Anything: x",
    "X-Real-IP: 1.2.3.4",
    "X-Client-IP: 1.2.3.4",
    "True-Client-IP: 1.2.3.4",
    "Via: 1.1 x",
    "CDN-Loop: x",
    "CF-Connecting-IP: 1.2.3.4",
    "CF-IPCountry: DE",
    "CF-Ray: 1",
    "CF-Visitor: {}",
    "CF-Worker: x",
    "CF-EW-Via: 15",
    "X-Fc-Request-Id: 1",
    "x-vercel-id: 1",
    "Fly-Client-IP: 1.2.3.4",
    "X-Amzn-Trace-Id: Root=1",
    "Sec-Fetch-Site: none",
    "Sec-CH-UA: x",
    "Cookie: a=b",
    "Origin: https://app.example",
    "Referer: https://app.example/",
    "X_Forwarded_For: 1.2.3.4",
    "Content_Length: 5",
    "Transfer_Encoding: chunked",
]


@pytest.mark.parametrize("line", NOT_SENT_UP)
def test_headers_about_the_client_or_this_hop_do_not_go_up(upstream, relay, line):
    name, _, value = line.partition(": ")
    fields = [("X-Before", "1"), (name, value), ("X-After", "2")]
    lines = fields_up(upstream, relay(ORIGINS="*"), fields)
    assert lines == ["X-Before: 1", "X-After: 2"]


CONNECTION_FIELDS = [
    ["X-Secret, x-other"],
    ["x-secret", "X-OTHER"],
    ["close, X-Secret ,, x-other"],
    ["", "X-Other,X-SECRET"],
]


@pytest.mark.parametrize("connection", CONNECTION_FIELDS)
def test_headers_named_in_any_Connection_field_do_not_go_up(upstream, relay, connection):
    fields = [("Connection", value) for value in connection]
    fields += [("X-Secret", "a"), ("X-Kept", "b"), ("x-other", "c"), ("X-Secret", "d")]
    assert fields_up(upstream, relay(), fields) == ["X-Kept: b"]


# -- response headers

WRITTEN_BY_THE_RELAY = ("date", "x-request-id", "content-length")


def fields_down(upstream, running, lines):
    """Answer with `lines`; return the header lines that the client received.

    Without those that the relay itself adds or writes, which must appear once each.
    """
    upstream.answer = (
        b"HTTP/1.1 200 OK\r\n"
        + b"".join(line.encode("latin-1") + b"\r\n" for line in lines)
        + b"Content-Length: 11\r\n\r\n"
        + OK[-11:]
    )

    reply = running.ask()

    assert reply.complete
    for name in WRITTEN_BY_THE_RELAY:
        assert len(reply.all(name)) == 1
    received = reply.raw_head.decode("latin-1").split("\r\n")[1:]
    return [
        line for line in received if line.partition(":")[0].lower() not in WRITTEN_BY_THE_RELAY
    ]


def test_response_headers_are_relayed_unchanged_in_order_with_duplicates(upstream, relay):
    lines = [
        "Retry-After: 7",
        "x-ratelimit-remaining-requests: 1",
        "X-b: 1",
        "openai-organization: org",
        "openai-processing-ms: 7",
        "Server: cloudflare",
        "x-B: 2, 3",
        "CF-Ray: 1",
        "Content-Type: text/plain",
        "X-b: 1",
        "X-Empty: ",
        "WWW-Authenticate: Bearer",
        "WWW-Authenticate: Basic",
        "Content-Encoding: br",
        "ETag: \"a\"",
        "X-Text: caf\xe9",
    ]
    assert fields_down(upstream, relay(), lines) == lines


def test_date_and_request_id_of_the_upstream_are_kept_and_not_added_again(upstream, relay):
    upstream.answer = OK.replace(
        b"Content-Type",
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-Request-ID: req_1\r\nContent-Type",
    )

    reply = relay().ask()

    assert reply.all("date") == ["Thu, 01 Jan 1970 00:00:00 GMT"]
    assert reply.all("x-request-id") == ["req_1"]


NOT_RELAYED = [
    "Connection: keep-alive",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: x",
    "Proxy-Authenticate: Basic",
    "Trailer: X-Sum",
    "TE: trailers",
    "Upgrade: h2c",
    "Set-Cookie: a=b",
    "Alt-Svc: h3=\":443\"",
    "Strict-Transport-Security: max-age=1",
    "NEL: {}",
    "Report-To: {}",
    "Access-Control-Allow-Origin: *",
    "Access-Control-Allow-Credentials: true",
    "access-control-expose-headers: x",
]


@pytest.mark.parametrize("line", NOT_RELAYED)
def test_headers_about_the_upstreams_host_or_this_hop_are_not_relayed(upstream, relay, line):
    lines = fields_down(upstream, relay(), ["X-Before: 1", line, line, "X-After: 2"])
    assert lines == ["X-Before: 1", "X-After: 2"]


def test_headers_named_in_the_upstreams_Connection_field_are_not_relayed(upstream, relay):
    lines = [
        "Connection: X-Secret",
        "X-Secret: a",
        "Connection: close, x-other",
        "X-Kept: b",
        "X-OTHER: c",
    ]
    assert fields_down(upstream, relay(), lines) == ["X-Kept: b"]


# -- response bodies

WITHOUT_A_BODY = [
    pytest.param("HEAD", OK[:-11], id="HEAD"),
    pytest.param("GET", b"HTTP/1.1 204 No Content\r\n\r\n", id="204"),
    pytest.param("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 11\r\n\r\n", id="304"),
]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("method,answer", WITHOUT_A_BODY)
def test_a_response_without_a_body_ends_with_its_head(upstream, relay, method, answer, version):
    upstream.answer = answer

    with relay().client() as client:
        client.request(method, version=version)
        reply = client.read_reply(method)
        assert reply.status == int(answer[9:12])
        assert reply.get("transfer-encoding") is None
        assert reply.all("content-length") == (["11"] if b"11" in answer else [])

        if version == "HTTP/1.1":
            client.request("POST", CHAT, b"{}")
            assert client.read_head().status == reply.status
        else:
            assert client.ended()
            assert not client.data


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("framing", ["chunked", "until the end"])
def test_a_response_without_a_length_ends_where_it_should(upstream, relay, framing, version):
    def answer(received):
        if framing == "chunked":
            received.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        else:
            received.send(b"HTTP/1.1 200 OK\r\n\r\nhello world")
            received.close()

    body = chunk(b"hello ") + chunk(b"world") + b"0\r\nX-Sum: 1\r\n\r\n"
    upstream.answer = answer

    with relay().client() as client:
        client.request(version=version)
        reply = client.read_reply()
        assert reply.body == b"hello world"
        assert reply.complete
        assert reply.get("transfer-encoding") == ("chunked" if version == "HTTP/1.1" else None)

        # In HTTP/1.1 the connection stays open.
        if version == "HTTP/1.1":
            client.request()
            assert client.read_reply().body == b"hello world"
        else:
            assert reply.get("connection") == "close"


def test_trailers_are_not_relayed_in_either_direction(upstream, relay):
    upstream.answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        + chunk(b"hello")
        + b"0\r\nX-Sum: 1\r\n\r\n"
    )
    body = chunk(b"abc") + b"0\r\nX-Up: 1\r\n\r\n"

    with relay().client() as client:
        client.request("POST", CHAT, body, [CHUNKED, ("Connection", "close")])
        while client.more():
            pass
        assert client.data.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert b"X-Sum" not in client.data

    assert upstream.received[0].body == b"abc"
    assert b"X-Up" not in upstream.all_bytes


# -- request bodies


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_upload_is_relayed_while_it_is_still_arriving(by_hand, relay, framing):
    # More than is buffered to be sent in one go.
    first = b"a" * 70000
    second = b"b" * 10

    with relay(UPSTREAM=by_hand.url).client() as client:
        if framing == "chunked":
            client.request("PUT", "/v1/files", chunk(first), [CHUNKED])
        else:
            client.request("PUT", "/v1/files", first, [("Content-Length", "70010")])

        peer = by_hand.accept()
        head = peer.read_request_head()
        assert (b"\r\nTransfer-Encoding: chunked\r\n" in head) == (framing == "chunked")
        body = b""
        while body.count(b"a") < 70000:
            body += peer.read_chunk() if framing == "chunked" else peer.read_exactly(1000)

        if framing == "chunked":
            client.send(chunk(second) + b"0\r\n\r\n")
            assert peer.read_chunk() == second
            assert peer.read_chunk() == b""
        else:
            client.send(second)
            assert peer.read_exactly(10) == second

        peer.send(OK)
        assert client.read_reply().status == 200

        # Both connections are ready for the next request.
        client.request()
        assert peer.read_request_head().startswith(b"GET /v1/models ")
        peer.send(OK)
        assert client.read_reply().status == 200


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_only_the_beginning_of_a_streamed_upload_is_buffered_however_fast_it_arrives(
    upstream, relay, monkeypatch, framing
):
    read = aiproxy.Upload.read
    ask_upstream = aiproxy.Handler.ask_upstream
    prefix_lengths = []

    def wait_and_read(upload):
        if not upload.client.buffer:
            aiproxy.wait_ready(upload.client, aiproxy.READ, PATIENCE)
        return read(upload)

    def ask_and_note(handler, prefix):
        prefix_lengths.append(len(prefix))
        return ask_upstream(handler, prefix)

    monkeypatch.setattr(aiproxy.Upload, "read", wait_and_read)
    monkeypatch.setattr(aiproxy.Handler, "ask_upstream", ask_and_note)
    body = bytes(4 << 20)

    if framing == "chunked":
        reply = relay().ask("POST", "/v1/files", chunk(body) + b"0\r\n\r\n", [CHUNKED])
    else:
        reply = relay().ask("POST", "/v1/files", body)

    assert reply.status == 200
    assert upstream.received[0].body == body
    assert prefix_lengths[0] <= aiproxy.PREFETCH_BYTES + aiproxy.READ_SIZE


def test_an_upload_that_turns_out_malformed_is_not_completed(by_hand, relay):
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", "/v1/files", chunk(b"a" * 70000), [CHUNKED])
        peer = by_hand.accept()

        client.send(b"zz\r\n")

        assert client.read_reply().status == 400
        assert client.ended()
        while peer.more():
            pass
        assert not peer.data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("spelling", ["100-continue", "100-Continue"])
@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["streamed", "buffered"])
def test_the_relay_itself_sends_100_Continue_once(upstream, relay, settings, spelling):
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [("Expect", spelling), ("Content-Length", "13")])
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b'{"model":"m"}')
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    assert upstream.received[0].field("expect") is None
    assert upstream.received[0].body == b'{"model":"m"}'


REFUSED = [
    pytest.param({"PATHS": "/v1/other"}, [], 404, id="path"),
    pytest.param({"PATHS": "GET " + CHAT}, [], 405, id="method"),
    pytest.param({"MODELS": "m", "MAX_BODY": "12"}, [], 413, id="size"),
    pytest.param({"MODELS": "m"}, [("Content-Encoding", "gzip")], 415, id="coding"),
    pytest.param({}, [("Origin", "https://evil.example")], 403, id="origin"),
    pytest.param({}, [("X-A ", "b")], 400, id="head"),
]


@pytest.mark.parametrize("settings,fields,status", REFUSED)
def test_a_refused_request_receives_no_100_Continue(upstream, relay, settings, fields, status):
    expect = [("Expect", "100-continue"), ("Content-Length", "13")]
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", expect + fields)
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 %d " % status)
    assert upstream.all_bytes == b""


NO_NEED_TO_WAIT = [
    pytest.param([], b"abc", id="body is here already"),
    pytest.param([("Content-Length", "0")], b"", id="no body"),
]


@pytest.mark.parametrize("fields,body", NO_NEED_TO_WAIT)
def test_100_Continue_is_not_sent_where_it_is_not_needed(upstream, relay, fields, body):
    with relay().client() as client:
        client.request("POST", CHAT, body, [("Expect", "100-continue")] + fields)
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("status", [401, 413, 200])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_early_response_is_relayed_while_the_upload_still_runs(by_hand, relay, framing, status):
    first = b"a" * 70000
    early_response = TOO_LARGE.replace(b"413", b"%d" % status)

    with relay(UPSTREAM=by_hand.url).client() as client:
        if framing == "chunked":
            client.request("POST", "/v1/files", chunk(first), [CHUNKED])
        else:
            client.request("POST", "/v1/files", first, [("Content-Length", "10000000")])

        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" + early_response)

        reply = client.read_reply()
        assert reply.status == status
        assert reply.body == b'{"no":true}'
        assert reply.complete

        # Then both connections close, because the rest of the upload has no reader.
        assert client.ended()
        while peer.more():
            pass
        assert not peer.data.endswith(b"0\r\n\r\n")


def test_an_early_response_is_complete_even_if_the_upstream_closes_after_it(by_hand, relay):
    with relay(UPSTREAM=by_hand.url).client() as client:

        def upload():
            try:
                client.request("POST", "/v1/files", bytes(20 << 20))
            except OSError:
                # Nobody reads it to its end.
                pass

        sender = threading.Thread(target=upload)
        sender.start()
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(TOO_LARGE)
        # To close a socket with unread bytes sends a reset.
        peer.sock.close()

        reply = client.read_reply()
        assert reply.status == 413
        assert reply.complete
        sender.join()


def test_both_sides_can_send_at_once_without_a_deadlock(by_hand, relay, monkeypatch):
    # A lingering close without limits, so that no reset destroys the end of the response.
    monkeypatch.setattr(aiproxy, "LINGER_SECONDS", PATIENCE)
    size = 16 << 20

    with relay(UPSTREAM=by_hand.url).client() as client:

        def upload():
            try:
                client.request("POST", "/v1/files", bytes(size))
            except OSError:
                pass

        def download():
            peer = by_hand.accept()
            peer.read_request_head()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))

        threads = [threading.Thread(target=target) for target in (upload, download)]
        for thread in threads:
            thread.start()

        reply = client.read_reply()
        assert reply.status == 200
        assert len(reply.body) == size

        client.sock.close()
        for thread in threads:
            thread.join()
