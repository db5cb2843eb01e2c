"""The main job: a request goes up with the hidden key and its body untouched, and the answer comes down as it is."""
import os
import urllib.parse

import pytest

import aiproxy
from support import CHAT, OK, chunk

AUTH = [("Authorization", "Bearer ck-alice")]
PROVIDER_KEY_FIELDS = {"anthropic": ("x-api-key", "sk-hidden-key")}     # every other row: Authorization, as Bearer


@pytest.mark.parametrize("name", sorted(set(aiproxy.PROVIDERS) - {"workers-ai"}))      # whose answers are translated: test_workers_ai.py
def test_the_key_goes_where_the_providers_row_says(upstream, relay, monkeypatch, name):
    base, field, paths = aiproxy.PROVIDERS[name]
    base = urllib.parse.urlsplit(base).path
    monkeypatch.setitem(aiproxy.PROVIDERS, name, (upstream.url + base, field, paths))     # the row, on a host of ours
    running = relay(UPSTREAM=name, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    for number, path in enumerate(paths):
        assert running.ask("POST", path, b"{}", AUTH).status == 200
        received = upstream.received[number]
        assert received.line == "POST %s HTTP/1.1" % (base + path[3:] if base else path)
        for key_field in ("authorization", "x-api-key", "api-key", "x-goog-api-key"):
            wanted, value = PROVIDER_KEY_FIELDS.get(name, ("authorization", "Bearer sk-hidden-key"))
            assert received.fields(key_field) == ([value] if key_field == wanted else [])


@pytest.mark.parametrize("field,value", [("Authorization", "Bearer sk-hidden-key"), ("x-api-key", "sk-hidden-key"), ("api-key", "sk-hidden-key"), ("X-Custom", "sk-hidden-key")])
def test_the_field_of_the_key_can_be_set(upstream, relay, field, value):
    assert relay(KEY="sk-hidden-key", KEY_HEADER=field, CLIENT_KEYS="ck-alice").ask("POST", CHAT, b"{}", AUTH + [("X-Custom", "theirs")]).status == 200
    assert upstream.received[0].fields(field) == [value] and upstream.all_bytes.count(b"sk-hidden-key") == 1


def test_several_provider_keys_take_turns(upstream, relay):
    running = relay(KEY="sk-1,sk-2", CLIENT_KEYS="ck-alice")
    for _ in range(4):
        running.chat()
    assert sorted(received.field("authorization") for received in upstream.received) == ["Bearer sk-1"] * 2 + ["Bearer sk-2"] * 2


BODIES = [b"", b"{}", b'{"model" :"m",\r\n "n": 1.0, "x":"\\u00e4\xc3\xa4", "x":2}', bytes(range(256)) * 4, os.urandom(300000)]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("mode", ["hidden", "transparent"])
@pytest.mark.parametrize("body", BODIES, ids=["empty", "small", "odd JSON", "any bytes", "large"])
def test_the_body_goes_up_byte_for_byte(upstream, relay, body, mode, framing):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice") if mode == "hidden" else relay()
    pieces = [body[:1], body[1:1000], body[1000:]]
    sent, fields = (body, []) if framing == "length" else (b"".join(chunk(p) for p in pieces if p) + b"0\r\n\r\n", [("Transfer-Encoding", "chunked")])
    assert running.ask("POST", CHAT, sent, AUTH + fields).status == 200
    assert upstream.received[0].whole and upstream.received[0].body == body


PATHS = [("/v1/chat/completions", CHAT), ("/v1/v1/chat/completions", CHAT), ("/chat/completions", CHAT), ("/embeddings", "/v1/embeddings"), ("/v1/chat/completions?a=%2F&b", CHAT + "?a=%2F&b")]


@pytest.mark.parametrize("path,expected", PATHS)
def test_a_slightly_wrong_base_url_is_mended_where_a_key_is_hidden(upstream, hidden, relay, path, expected):
    assert hidden.ask("POST", path, b"{}", AUTH).status == 200 and upstream.received[0].line == "POST %s HTTP/1.1" % expected
    assert relay().ask("POST", path, b"{}").status == 200 and upstream.received[1].line == "POST %s HTTP/1.1" % path


@pytest.mark.parametrize("base,path,expected", [
    ("", "/v1/embeddings", "/v1/embeddings"), ("/", "/v1/embeddings", "/v1/embeddings"), ("/some/v4", "/v1/embeddings", "/some/v4/embeddings"),
    ("/some/v4/", "/v1/embeddings", "/some/v4/embeddings"), ("/v1", "/v1/embeddings", "/v1/embeddings"), ("/v1", "/v2/x", None), ("", "/v2/x", "/v2/x")])
def test_a_path_in_the_base_url_takes_the_place_of_v1(upstream, relay, base, path, expected):
    reply = relay(UPSTREAM=upstream.url + base).ask("POST", path, b"{}")
    assert (reply.status, [received.line for received in upstream.received]) == ((200, ["POST %s HTTP/1.1" % expected]) if expected else (404, []))


NAMED = [("Content-Type", "application/json"), ("Accept", "text/event-stream"), ("User-Agent", "OpenAI/JS 4"), ("Idempotency-Key", "i-1"), ("OpenAI-Beta", "b=1"),
         ("anthropic-version", "2023-06-01"), ("anthropic-beta", "x,y")]
ABOUT_THE_CALLER = [(name, "about-the-caller") for name in (
    "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "X-Client-IP", "True-Client-IP", "Via", "CDN-Loop", "CF-Connecting-IP", "CF-IPCountry", "CF-Ray", "CF-Visitor",
    "CF-Worker", "CF-EW-Via", "X-FC-Request-Id", "X-Vercel-Id", "Fly-Client-IP", "X-Amzn-Trace-Id", "Sec-Fetch-Site", "Sec-CH-UA", "Cookie", "Origin", "Referer")]
THIS_HOP = [("Connection", "keep-alive, X-Mine"), ("X-Mine", "about-this-hop"), ("Keep-Alive", "about-this-hop"), ("TE", "about-this-hop"), ("Trailer", "about-this-hop"),
            ("Proxy-Connection", "about-this-hop"), ("Proxy-Authorization", "about-this-hop"), ("Upgrade", "about-this-hop"), ("HTTP2-Settings", "about-this-hop")]
FOR_THE_PROVIDER = [("cf-aig-cache-ttl", "1"), ("x-amzn-bedrock-trace", "1"), ("X-Stainless-Lang", "js"), ("X-Twice", "1"), ("X-Twice", "2")]


def names_and_values(received):
    return [tuple(line.split(": ", 1)) for line in received.head.decode("latin-1").split("\r\n")[1:]]


def test_with_a_hidden_key_the_provider_learns_nothing_of_the_caller(upstream, hidden):
    assert hidden.ask("POST", CHAT, b"{}", AUTH + NAMED + ABOUT_THE_CALLER + THIS_HOP + FOR_THE_PROVIDER + [("X-Custom", "mine")]).status == 200
    assert sorted(names_and_values(upstream.received[0])) == sorted(
        NAMED + [("Host", "127.0.0.1:%d" % upstream.port), ("Content-Length", "2"), ("Authorization", "Bearer sk-hidden-key")])


def test_a_transparent_relay_sends_everything_else_as_it_came(upstream, relay):
    own = [("Authorization", "Bearer their-own"), ("x-api-key", "their-own"), ("X-Custom", "mine")]
    assert relay(ORIGINS="*").ask("POST", CHAT, b"{}", own + NAMED + ABOUT_THE_CALLER + THIS_HOP + FOR_THE_PROVIDER).status == 200
    received = names_and_values(upstream.received[0])
    assert [field for field in received if field[0] not in ("Host", "Content-Length")] == own + NAMED + FOR_THE_PROVIDER
    assert ("Host", "127.0.0.1:%d" % upstream.port) in received and b"about-" not in upstream.all_bytes


@pytest.mark.parametrize("accepted,sent", [("br", "identity"), ("gzip, br, zstd, deflate", "gzip, deflate"), ("identity", "identity"), ("*", "identity"), ("gzip;q=0.5", "gzip;q=0.5")])
def test_with_a_hidden_key_only_codings_that_we_can_read_are_asked_for(upstream, relay, accepted, sent):
    relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat(fields=[("Accept-Encoding", accepted)])
    relay().chat(fields=[("Accept-Encoding", accepted)])
    assert [received.field("accept-encoding") for received in upstream.received] == [sent, accepted]


@pytest.mark.parametrize("status", [200, 201, 204, 205, 301, 304, 400, 404, 418, 429, 500, 503, 529, 599])
@pytest.mark.parametrize("mode", ["hidden", "transparent"])
def test_status_and_reason_come_down_as_they_are(upstream, relay, status, mode):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice") if mode == "hidden" else relay()
    body = b"" if status in (204, 205, 304) else b"said so"
    upstream.answer = b"HTTP/1.1 %d As I Said\r\n%b\r\n" % (status, b"" if status in (204, 304) else b"Content-Length: %d\r\n" % len(body)) + body
    with running.client() as client:
        for _ in range(2):                          # the connection lives on, so the first answer's end was known
            client.request("POST", CHAT, b"{}", AUTH)
            reply = client.read_reply()
            assert reply.status_line == "HTTP/1.1 %d As I Said" % status and reply.body == body and reply.complete
            if status not in (204, 304):
                assert reply.get("content-length") == str(len(body))


DOWN = [("Content-Type", "application/vnd.x+json; charset=latin-1"), ("X-Twice", "1"), ("x-ratelimit-remaining-tokens", "7"), ("X-Twice", "2"), ("ETag", '"e"'), ("openai-processing-ms", "9"),
        ("Retry-After", "3"), ("Cache-Control", "no-store"), ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"), ("Location", "http://elsewhere.test/"), ("X-Latin", "gr\xfcn"), ("x-request-id", "up-1")]
NEVER_DOWN = [(name, "not-for-the-client") for name in ("Set-Cookie", "Alt-Svc", "Strict-Transport-Security", "NEL", "Report-To", "Access-Control-Allow-Origin", "Access-Control-Allow-Credentials",
                                                        "Keep-Alive", "Proxy-Authenticate", "Trailer", "X-Theirs")] + [("Connection", "x-theirs")]
WITH_A_HIDDEN_KEY = [(name, "about-the-owner") for name in ("Server", "openai-organization", "OpenAI-Project")]


@pytest.mark.parametrize("mode", ["hidden", "transparent"])
def test_end_to_end_fields_come_down_repeated_and_in_order(upstream, relay, mode):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS="https://a.example") if mode == "hidden" else relay(ORIGINS="https://a.example")
    fields = "".join("%s: %s\r\n" % field for field in DOWN[:4] + NEVER_DOWN + WITH_A_HIDDEN_KEY + DOWN[4:])
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + fields.encode("latin-1") + b"\r\n{}"
    reply = running.chat()
    kept = DOWN if mode == "hidden" else DOWN[:4] + WITH_A_HIDDEN_KEY + DOWN[4:]
    assert reply.fields[:len(kept)] == [(name.lower(), value) for name, value in kept]
    assert reply.fields[len(kept):] == [("vary", "Origin"), ("content-length", "2")] and reply.body == b"{}"


def test_fields_that_hold_the_key_do_not_come_down(upstream, hidden):
    names = ["X-Echo", "Content-Location", "x-request-id", "request-id", "x-ratelimit-key"]
    upstream.answer = OK.replace(b"\r\n\r\n", b"".join(b"\r\n%b: a sk-hidden-key b" % name.encode() for name in names) + b"\r\nX-Kept: yes\r\n\r\n")
    reply = hidden.chat()
    assert reply.status == 200 and reply.get("x-kept") == "yes" and b"sk-hidden" not in reply.raw_head
    assert "sk-hidden" not in str(hidden.wait_for_record())


@pytest.mark.parametrize("field,value", [("x-request-id", "up-1"), ("request-id", "req_011"), (None, None)])
def test_a_request_id_stands_in_every_answer_and_log_line(upstream, hidden, field, value):
    upstream.answer = OK.replace(b"\r\n\r\n", b"\r\n%b: %b\r\n\r\n" % (field.encode(), value.encode())) if field else OK
    reply = hidden.chat()
    assert reply.all("x-request-id") == [hidden.wait_for_record()["request_id"]] and reply.get("x-request-id")
    assert value in (None, reply.get("x-request-id")) and (field != "request-id" or reply.get("request-id") == value)
    assert hidden.chat(key="wrong").get("x-request-id") == hidden.wait_for_record(2)["request_id"] != value


def test_a_head_has_a_length_and_no_body(upstream, hidden):
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"
    with hidden.client() as client:
        for number in (1, 2):
            client.request("HEAD", "/v1/models", None, AUTH)
            reply = client.read_reply("HEAD")
            assert reply.status == 200 and reply.get("content-length") == "1234" and upstream.wait_for(number).line == "HEAD /v1/models HTTP/1.1"


def test_interim_answers_are_not_the_answer(upstream, hidden):
    upstream.answer = b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK
    reply = hidden.chat()
    assert reply.status == 200 and reply.body == b'{"ok":true}' and reply.get("link") is None


def test_a_transparent_relay_passes_every_method(upstream, relay):
    running = relay(ORIGINS="*")
    for number, method in enumerate(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"], 1):
        assert running.ask(method, "/v1/files/1", b"x" if method in ("PUT", "PATCH", "POST") else None).status == 200
        assert upstream.wait_for(number).line == "%s /v1/files/1 HTTP/1.1" % method


def test_a_request_id_that_the_upstream_keeps_for_itself_is_replaced(upstream, hidden):
    upstream.answer = OK.replace(b"\r\n\r\n", b"\r\nConnection: x-request-id\r\nx-request-id: up-1\r\n\r\n")
    assert len(hidden.chat().all("x-request-id")) == 1
