"""With no key set, everything good passes: every method and path, the bytes as they came, and nothing of who the caller is."""
import threading

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, OK, PATIENCE, chunk

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n" + b'{"no":true}'
CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


@pytest.mark.parametrize("path", [
    "/v1/models", "/v1/models/", "/v1/models?", "/v1/models?limit=2&after=%7e%7E", "/v1/files/a%20b%2Fc%c3%a9", "/v1/x/?a=b?c=/..//&d=%zz%00\\{}|^`\"<>", "/v1//double//", "/v1/v1/models", "/chat/completions",
    "/anything/at-all_0.9~!$&'()*+,;=:@", "/v1beta/models/gemini-2.0-flash:streamGenerateContent?alt=sse", "/openai/deployments/gpt-4/chat/completions?api-version=2024-10-21", "/api/v1/chat?key=sk-caller", "/healthy", "/.well-known/x"])
def test_every_path_goes_up_byte_for_byte(upstream, relay, path):
    assert relay().ask("GET", path).status == 200
    assert upstream.received[0].line == "GET %s HTTP/1.1" % path


@pytest.mark.parametrize("method,path", [(method, "/v1/files/file-abc") for method in METHODS] + [(method, path) for method in ("POST", "PUT", "DELETE", "OPTIONS") for path in ("/", "/health")])
def test_every_method_goes_up(upstream, relay, method, path):
    upstream.answer = EMPTY
    assert relay().ask(method, path, b"abc").status == 200
    assert upstream.received[0].line == "%s %s HTTP/1.1" % (method, path) and upstream.received[0].body == b"abc"


def test_an_OPTIONS_that_is_no_preflight_goes_up(upstream, relay):
    running = relay(ORIGINS="*")
    assert running.ask("OPTIONS", "/v1/models", fields=[("Origin", "https://app.example")]).status == 200
    assert upstream.received[0].line == "OPTIONS /v1/models HTTP/1.1"
    assert running.ask("OPTIONS", "/v1/models", fields=[("Origin", "https://app.example"), ("Access-Control-Request-Method", "POST")]).status == 204
    assert len(upstream.received) == 1


@pytest.mark.parametrize("path,expected", [("/v1/chat/completions?a=%2f", "/compatible-mode/v1/chat/completions?a=%2f"), ("/v1/files/", "/compatible-mode/v1/files/"), ("/v1/v1/models", "/compatible-mode/v1/v1/models"),
                                           ("/chat/completions", None), ("/v1x/models", None), ("/compatible-mode/v1/models", None)])
def test_a_base_url_with_a_path_takes_the_place_of_v1_and_serves_nothing_else(upstream, relay, path, expected):
    reply = relay(UPSTREAM=upstream.url + "/compatible-mode/v1/").ask("GET", path)
    assert reply.status == (200 if expected else 404)
    assert [one.line for one in upstream.received] == (["GET %s HTTP/1.1" % expected] if expected else [])


# ---- fields, up


def fields_up(upstream, running, fields, method="GET", body=None):
    """The header lines that the upstream received, Host aside."""
    assert running.ask(method, "/v1/x", body, fields).status == 200
    received = upstream.received[-1]
    assert received.fields("host") == [upstream.url.partition("//")[2]]
    return [line.decode("latin-1") for line in received.head.split(b"\r\n")[1:] if not line.lower().startswith(b"host:")]


def test_fields_go_up_as_they_came_repeated_in_order_and_with_nothing_added(upstream, relay):
    fields = [("X-b", "1"), ("ACCEPT", "*/*"), ("X-B", "2, 3"), ("x-a", ""), ("X-b", "1"), ("User-Agent", "me/1 (caf\xe9)"), ("Accept-Encoding", "br, zstd"), ("Authorization", "Bearer sk-caller"), ("x-api-key", "k"),
              ("OpenAI-Organization", "org"), ("cf-aig-authorization", "Bearer x"), ("cf-aig-cache-ttl", "1"), ("X-Amzn-Bedrock-GuardrailIdentifier", "g"), ("anthropic-version", "2023-06-01"), ("X-Goog-Api-Client", "gl"), ("Priority", "u=1")]
    assert fields_up(upstream, relay(), fields) == ["%s: %s" % field for field in fields]


@pytest.mark.parametrize("method,body,framing", [("GET", None, []), ("DELETE", None, []), ("OPTIONS", None, []), ("POST", None, ["Content-Length: 0"]), ("PUT", None, ["Content-Length: 0"]), ("POST", b"abc", ["Content-Length: 3"]), ("DELETE", b"abc", ["Content-Length: 3"])])
def test_a_request_has_the_framing_that_its_body_needs(upstream, relay, method, body, framing):
    assert fields_up(upstream, relay(), [], method, body) == framing


DROPPED = ["Connection: keep-alive", "Proxy-Connection: keep-alive", "Keep-Alive: timeout=5", "TE: trailers", "Trailer: X-Sum", "Proxy-Authorization: Basic eDp5", "Proxy-Authenticate: Basic", "HTTP2-Settings: AAMAAABkAAQAAP__", "Forwarded: for=1.2.3.4",
           "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Forwarded-Anything: x", "X-Real-IP: 1.2.3.4", "X-Client-IP: 1.2.3.4", "True-Client-IP: 1.2.3.4", "Via: 1.1 x", "CDN-Loop: x", "CF-Connecting-IP: 1.2.3.4", "CF-IPCountry: DE", "CF-Ray: 1",
           "CF-Visitor: {}", "CF-Worker: x", "CF-EW-Via: 15", "X-Fc-Request-Id: 1", "x-vercel-id: 1", "Fly-Client-IP: 1.2.3.4", "X-Amzn-Trace-Id: Root=1", "Sec-Fetch-Site: none", "Sec-CH-UA: x", "Cookie: a=b", "Origin: https://app.example",
           "Referer: https://app.example/", "X_Forwarded_For: 1.2.3.4", "Content_Length: 5", "Transfer_Encoding: chunked"]


@pytest.mark.parametrize("line", DROPPED)
def test_what_tells_of_the_caller_or_was_for_this_hop_does_not_go_up(upstream, relay, line):
    name, _, value = line.partition(": ")
    assert fields_up(upstream, relay(ORIGINS="*"), [("X-Before", "1"), (name, value), ("X-After", "2")]) == ["X-Before: 1", "X-After: 2"]


@pytest.mark.parametrize("connection", [["X-Secret, x-other"], ["x-secret", "X-OTHER"], ["close, X-Secret ,, x-other"], ["", "X-Other,X-SECRET"]])
def test_fields_named_in_any_Connection_field_do_not_go_up(upstream, relay, connection):
    assert fields_up(upstream, relay(), [("Connection", value) for value in connection] + [("X-Secret", "a"), ("X-Kept", "b"), ("x-other", "c"), ("X-Secret", "d")]) == ["X-Kept: b"]


# ---- fields, down


def fields_down(upstream, running, lines):
    """The header lines that came down, without those that we add or write: (Date, x-request-id, Content-Length)."""
    upstream.answer = b"HTTP/1.1 200 OK\r\n" + b"".join(line.encode("latin-1") + b"\r\n" for line in lines) + b"Content-Length: 11\r\n\r\n" + OK[-11:]
    reply = running.ask()
    assert reply.complete and len(reply.all("date")) == len(reply.all("x-request-id")) == len(reply.all("content-length")) == 1
    return [line for line in reply.raw_head.decode("latin-1").split("\r\n")[1:] if line.partition(":")[0].lower() not in ("date", "x-request-id", "content-length")]


def test_fields_come_down_as_they_came_repeated_in_order(upstream, relay):
    lines = ["Retry-After: 7", "x-ratelimit-remaining-requests: 1", "X-b: 1", "openai-organization: org", "openai-processing-ms: 7", "Server: cloudflare", "x-B: 2, 3", "CF-Ray: 1", "Content-Type: text/plain", "X-b: 1", "X-Empty: ", "WWW-Authenticate: Bearer",
             "WWW-Authenticate: Basic", "Content-Encoding: br", "ETag: \"a\"", "X-Text: caf\xe9"]
    assert fields_down(upstream, relay(), lines) == lines


def test_the_upstreams_date_and_request_id_are_the_only_ones(upstream, relay):
    upstream.answer = OK.replace(b"Content-Type", b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-Request-ID: req_theirs\r\nContent-Type")
    reply = relay().ask()
    assert reply.all("date") == ["Thu, 01 Jan 1970 00:00:00 GMT"] and reply.all("x-request-id") == ["req_theirs"]


@pytest.mark.parametrize("line", ["Connection: keep-alive", "Keep-Alive: timeout=5", "Proxy-Connection: x", "Proxy-Authenticate: Basic", "Trailer: X-Sum", "TE: trailers", "Upgrade: h2c", "Set-Cookie: a=b", "Alt-Svc: h3=\":443\"", "Strict-Transport-Security: max-age=1",
                                  "NEL: {}", "Report-To: {}", "Access-Control-Allow-Origin: *", "Access-Control-Allow-Credentials: true", "access-control-expose-headers: x"])
def test_what_was_between_the_upstream_and_us_does_not_come_down(upstream, relay, line):
    assert fields_down(upstream, relay(), ["X-Before: 1", line, line, "X-After: 2"]) == ["X-Before: 1", "X-After: 2"]


def test_fields_named_in_the_upstreams_Connection_do_not_come_down(upstream, relay):
    assert fields_down(upstream, relay(), ["Connection: X-Secret", "X-Secret: a", "Connection: close, x-other", "X-Kept: b", "X-OTHER: c"]) == ["X-Kept: b"]


# ---- bodies, down


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("method,answer", [("HEAD", OK[:-11]), ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"), ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 11\r\n\r\n")], ids=["HEAD", "204", "304"])
def test_an_answer_without_a_body_is_over_with_its_head(upstream, relay, method, answer, version):
    upstream.answer = answer
    with relay().client() as client:
        client.request(method, version=version)
        reply = client.read_reply(method)
        assert reply.status == int(answer[9:12]) and reply.get("transfer-encoding") is None
        assert reply.all("content-length") == (["11"] if b"11" in answer else [])
        if version == "HTTP/1.1":
            client.request("POST", CHAT, b"{}")
            assert client.read_head().status == reply.status
        else:
            assert client.ended() and not client.data


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("framing", ["chunked", "until the end"])
def test_an_answer_without_length_ends_right(upstream, relay, framing, version):
    def answer(received):
        if framing == "chunked":
            return received.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hello ") + chunk(b"world") + b"0\r\nX-Sum: 1\r\n\r\n")
        received.send(b"HTTP/1.1 200 OK\r\n\r\nhello world")
        received.close()
    upstream.answer = answer
    with relay().client() as client:
        client.request(version=version)
        reply = client.read_reply()
        assert reply.body == b"hello world" and reply.complete
        assert reply.get("transfer-encoding") == ("chunked" if version == "HTTP/1.1" else None)
        if version == "HTTP/1.1":       # and the connection lives on
            client.request()
            assert client.read_reply().body == b"hello world"
        else:
            assert reply.get("connection") == "close"


def test_trailers_end_with_us(upstream, relay):
    upstream.answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n" + chunk(b"hello") + b"0\r\nX-Sum: 1\r\n\r\n"
    with relay().client() as client:
        client.request("POST", CHAT, chunk(b"abc") + b"0\r\nX-Up: 1\r\n\r\n", [CHUNKED, ("Connection", "close")])
        while client.more():
            pass
        assert client.data.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n") and b"X-Sum" not in client.data
    assert upstream.received[0].body == b"abc" and b"X-Up" not in upstream.all_bytes


# ---- bodies, up


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_upload_is_sent_on_while_it_still_comes(by_hand, relay, framing):
    first, second = b"a" * 70000, b"b" * 10        # more than what is held back to be sent in one go
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("PUT", "/v1/files", chunk(first) if framing == "chunked" else first, [CHUNKED if framing == "chunked" else ("Content-Length", "70010")])
        peer = by_hand.accept()
        head = peer.read_request_head()
        assert (b"\r\nTransfer-Encoding: chunked\r\n" in head) == (framing == "chunked")
        body = b""
        while body.count(b"a") < 70000:
            body += peer.read_exactly(1000) if framing == "length" else peer.read_chunk()
        client.send(chunk(second) + b"0\r\n\r\n" if framing == "chunked" else second)
        assert (peer.read_exactly(10) if framing == "length" else peer.read_chunk()) == second
        assert framing == "length" or peer.read_chunk() == b""
        peer.send(OK)
        assert client.read_reply().status == 200
        client.request()                    # both connections are in step
        assert peer.read_request_head().startswith(b"GET /v1/models ")
        peer.send(OK)
        assert client.read_reply().status == 200


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_of_a_streamed_upload_only_the_beginning_is_held_however_fast_it_comes(upstream, relay, monkeypatch, framing):
    read_some, open_upstream, held = aiproxy.RequestBody.read_some, aiproxy.Handler.open_upstream, []

    def read_what_is_always_there(body):
        if not body.client.buffer:
            body.client.wait_readable(PATIENCE)
        return read_some(body)

    def open_and_note(handler, prefix):
        held.append(len(prefix))
        return open_upstream(handler, prefix)
    monkeypatch.setattr(aiproxy.RequestBody, "read_some", read_what_is_always_there)
    monkeypatch.setattr(aiproxy.Handler, "open_upstream", open_and_note)
    body = bytes(4 << 20)
    reply = relay().ask("POST", "/v1/files", chunk(body) + b"0\r\n\r\n" if framing == "chunked" else body, [CHUNKED] if framing == "chunked" else [])
    assert reply.status == 200 and upstream.received[0].body == body
    assert held[0] <= aiproxy.HOLD_BYTES + aiproxy.PIECE


def test_an_upload_that_breaks_off_is_not_completed(by_hand, relay):
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", "/v1/files", chunk(b"a" * 70000), [CHUNKED])
        peer = by_hand.accept()
        client.send(b"zz\r\n")
        assert client.read_reply().status == 400 and client.ended()
        while peer.more():
            pass
        assert not peer.data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("spelling", ["100-continue", "100-Continue"])
@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["streamed", "held"])
def test_a_client_that_asks_is_told_to_go_on_once_and_only_by_us(upstream, relay, settings, spelling):
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [("Expect", spelling), ("Content-Length", "13")])
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b'{"model":"m"}')
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert upstream.received[0].field("expect") is None and upstream.received[0].body == b'{"model":"m"}'


@pytest.mark.parametrize("settings,fields,status", [
    ({"PATHS": "/v1/other"}, [], 404), ({"PATHS": "GET " + CHAT}, [], 405), ({"MODELS": "m", "MAX_BODY": "12"}, [], 413), ({"MODELS": "m"}, [("Content-Encoding", "gzip")], 415), ({}, [("Origin", "https://evil.example")], 403),
    ({}, [("X-A ", "b")], 400)], ids=["path", "method", "size", "coding", "origin", "head"])
def test_whoever_does_not_pass_the_gate_is_not_told_to_go_on(upstream, relay, settings, fields, status):
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [("Expect", "100-continue"), ("Content-Length", "13")] + fields)
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 %d " % status)
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("fields,body", [([], b"abc"), ([("Content-Length", "0")], b"")], ids=["body is here already", "no body"])
def test_nobody_is_told_to_go_on_who_need_not_be(upstream, relay, fields, body):
    with relay().client() as client:
        client.request("POST", CHAT, body, [("Expect", "100-continue")] + fields)
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("status", [401, 413, 200])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_early_answer_is_relayed_while_the_upload_still_runs(by_hand, relay, framing, status):
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", "/v1/files", chunk(b"a" * 70000) if framing == "chunked" else b"a" * 70000, [CHUNKED if framing == "chunked" else ("Content-Length", "10000000")])
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" + TOO_LARGE.replace(b"413", b"%d" % status))
        reply = client.read_reply()
        assert reply.status == status and reply.body == b'{"no":true}' and reply.complete
        assert client.ended()               # then both sides close: what still comes belongs to nobody
        while peer.more():
            pass
        assert not peer.data.endswith(b"0\r\n\r\n")


def test_an_early_answer_survives_that_the_upstream_hangs_up_behind_it(by_hand, relay):
    with relay(UPSTREAM=by_hand.url).client() as client:
        def upload():
            try:
                client.request("POST", "/v1/files", bytes(20 << 20))
            except OSError:
                pass                        # nobody reads it to its end
        sender = threading.Thread(target=upload)
        sender.start()
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(TOO_LARGE)
        peer.sock.close()                   # with bytes unread, which makes a reset of it
        reply = client.read_reply()
        assert reply.status == 413 and reply.complete
        sender.join()


def test_both_sides_may_send_at_once_without_a_deadlock(by_hand, relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "LINGER_BYTES", 1 << 60)       # so that the end of the answer is not lost to a reset
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
        others = [threading.Thread(target=target) for target in (upload, download)]
        for other in others:
            other.start()
        reply = client.read_reply()         # 4 MB of the upload are taken in at most, so its end may be a reset
        assert reply.status == 200 and len(reply.body) > 0
        client.sock.close()
        for other in others:
            other.join()
