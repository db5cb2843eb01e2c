"""The main job: relay a request and its response.

The request goes up with the provider key and an unchanged body; the response comes down unchanged.
"""

import os
import urllib.parse

import pytest

import aiproxy
from support import CHAT, OK, chunk

AUTH = [("Authorization", "Bearer ck-alice")]
SETTINGS = {  # with and without a provider key
    "hidden": {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"},
    "transparent": {},
}
KEY_FIELDS = ["authorization", "x-api-key", "api-key", "x-goog-api-key"]
# One of each kind. All rows: test_a_base_url_typed_by_hand_finds_the_row_of_its_provider.
PROVIDERS = ["openai", "anthropic", "gemini", "zhipu", "github", "perplexity", "ollama"]


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_provider_key_goes_into_the_header_field_of_its_provider(
    upstream, relay, monkeypatch, name
):
    row = aiproxy.PROVIDERS[name]
    base = urllib.parse.urlsplit(row.base_url).path
    paths = row.paths
    # The provider's row, but with our upstream as its host.
    monkeypatch.setitem(aiproxy.PROVIDERS, name, row._replace(base_url=upstream.url + base))
    running = relay(UPSTREAM=name, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

    expected = dict.fromkeys(KEY_FIELDS, [])
    if name == "anthropic":
        expected["x-api-key"] = ["sk-hidden-key"]
    else:
        expected["authorization"] = ["Bearer sk-hidden-key"]

    for number, path in enumerate(paths):
        assert running.ask("POST", path, b"{}", AUTH).status == 200
        received = upstream.received[number]
        path_up = base + path[3:] if base else path
        assert received.line == "POST %s HTTP/1.1" % path_up
        assert {name: received.fields(name) for name in KEY_FIELDS} == expected


CONFIGURED_FIELDS = [
    ("Authorization", "Bearer sk-hidden-key"),
    ("x-api-key", "sk-hidden-key"),
    ("api-key", "sk-hidden-key"),
    ("X-Custom", "sk-hidden-key"),
]


@pytest.mark.parametrize("field,value", CONFIGURED_FIELDS)
def test_the_header_field_of_the_provider_key_can_be_configured(upstream, relay, field, value):
    running = relay(KEY="sk-hidden-key", KEY_HEADER=field, CLIENT_KEYS="ck-alice")

    reply = running.ask("POST", CHAT, b"{}", AUTH + [("X-Custom", "from-the-client")])

    assert reply.status == 200
    assert upstream.received[0].fields(field) == [value]
    assert upstream.all_bytes.count(b"sk-hidden-key") == 1


def test_several_provider_keys_take_turns(upstream, relay):
    running = relay(KEY="sk-1,sk-2", CLIENT_KEYS="ck-alice")

    for _ in range(4):
        running.chat()

    keys = sorted(received.field("authorization") for received in upstream.received)
    assert keys == ["Bearer sk-1", "Bearer sk-1", "Bearer sk-2", "Bearer sk-2"]


BODIES = [
    b"",
    b"{}",
    b'{"model" :"m",\r\n "n": 1.0, "x":"\\u00e4\xc3\xa4", "x":2}',
    bytes(range(256)) * 4,
    os.urandom(300000),
]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("mode", list(SETTINGS))
@pytest.mark.parametrize("body", BODIES, ids=["empty", "small", "odd JSON", "any bytes", "large"])
def test_the_body_goes_up_byte_for_byte(upstream, relay, body, mode, framing):
    running = relay(**SETTINGS[mode])
    if framing == "length":
        data = body
        fields = AUTH
    else:
        pieces = [body[:1], body[1:1000], body[1000:]]
        data = b"".join(chunk(piece) for piece in pieces if piece) + b"0\r\n\r\n"
        fields = AUTH + [("Transfer-Encoding", "chunked")]

    assert running.ask("POST", CHAT, data, fields).status == 200

    assert upstream.received[0].whole
    assert upstream.received[0].body == body


PATHS = [  # what a client asks for, what the provider receives if we inject its key
    ("/v1/chat/completions", CHAT),
    ("/v1/v1/chat/completions", CHAT),
    ("/chat/completions", CHAT),
    ("/embeddings", "/v1/embeddings"),
    ("/v1/chat/completions?a=%2F&b", CHAT + "?a=%2F&b"),
]


@pytest.mark.parametrize("path,expected", PATHS)
def test_a_slightly_wrong_base_url_is_fixed_if_a_provider_key_is_configured(
    upstream, hidden, relay, path, expected
):
    assert hidden.ask("POST", path, b"{}", AUTH).status == 200
    assert upstream.received[0].line == "POST %s HTTP/1.1" % expected

    assert relay().ask("POST", path, b"{}").status == 200
    assert upstream.received[1].line == "POST %s HTTP/1.1" % path


BASE_URLS = [  # the path of the base URL, what a client asks for, what goes up
    ("", "/v1/embeddings", "/v1/embeddings"),
    ("/", "/v1/embeddings", "/v1/embeddings"),
    ("/some/v4", "/v1/embeddings", "/some/v4/embeddings"),
    ("/some/v4/", "/v1/embeddings", "/some/v4/embeddings"),
    ("/v1", "/v1/embeddings", "/v1/embeddings"),
    ("/v1", "/v2/x", None),
    ("", "/v2/x", "/v2/x"),
]


@pytest.mark.parametrize("base,path,expected", BASE_URLS)
def test_a_path_in_the_base_url_replaces_v1(upstream, relay, base, path, expected):
    running = relay(UPSTREAM=upstream.url + base)

    reply = running.ask("POST", path, b"{}")

    lines = [received.line for received in upstream.received]
    if expected:
        assert reply.status == 200
        assert lines == ["POST %s HTTP/1.1" % expected]
    else:
        assert reply.status == 404
        assert lines == []


NAMED = [
    ("Content-Type", "application/json"),
    ("Accept", "text/event-stream"),
    ("User-Agent", "OpenAI/JS 4"),
    ("Idempotency-Key", "i-1"),
    ("OpenAI-Beta", "b=1"),
    ("anthropic-version", "2023-06-01"),
    ("anthropic-beta", "x,y"),
]
ABOUT_THE_CLIENT = [
    (name, "about-the-client")
    for name in (
        "Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Real-IP",
        "X-Client-IP",
        "True-Client-IP",
        "Via",
        "CDN-Loop",
        "CF-Connecting-IP",
        "CF-IPCountry",
        "CF-Ray",
        "CF-Visitor",
        "CF-Worker",
        "CF-EW-Via",
        "X-FC-Request-Id",
        "X-Vercel-Id",
        "Fly-Client-IP",
        "X-Amzn-Trace-Id",
        "Sec-Fetch-Site",
        "Sec-CH-UA",
        "Cookie",
        "Origin",
        "Referer",
    )
]
HOP_BY_HOP = [
    ("Connection", "keep-alive, X-Mine"),
    ("X-Mine", "about-this-hop"),
    ("Keep-Alive", "about-this-hop"),
    ("TE", "about-this-hop"),
    ("Trailer", "about-this-hop"),
    ("Proxy-Connection", "about-this-hop"),
    ("Proxy-Authorization", "about-this-hop"),
    ("Upgrade", "about-this-hop"),
    ("HTTP2-Settings", "about-this-hop"),
]
FOR_THE_PROVIDER = [
    ("cf-aig-cache-ttl", "1"),
    ("x-amzn-bedrock-trace", "1"),
    ("X-Stainless-Lang", "js"),
    ("X-Twice", "1"),
    ("X-Twice", "2"),
]


def names_and_values(received):
    lines = received.head.decode("latin-1").split("\r\n")[1:]
    return [tuple(line.split(": ", 1)) for line in lines]


def test_with_a_provider_key_nothing_about_the_client_goes_up(upstream, hidden):
    fields = AUTH + NAMED + ABOUT_THE_CLIENT + HOP_BY_HOP + FOR_THE_PROVIDER
    fields += [("X-Custom", "mine")]

    assert hidden.ask("POST", CHAT, b"{}", fields).status == 200

    expected = NAMED + [
        ("Host", "127.0.0.1:%d" % upstream.port),
        ("Content-Length", "2"),
        ("Authorization", "Bearer sk-hidden-key"),
        ("Accept-Encoding", "identity"),
    ]
    assert sorted(names_and_values(upstream.received[0])) == sorted(expected)


def test_a_transparent_relay_sends_all_other_headers_up_unchanged(upstream, relay):
    own = [("Authorization", "Bearer my-own"), ("x-api-key", "my-own"), ("X-Custom", "mine")]
    fields = own + NAMED + ABOUT_THE_CLIENT + HOP_BY_HOP + FOR_THE_PROVIDER

    assert relay(ORIGINS="*").ask("POST", CHAT, b"{}", fields).status == 200

    received = names_and_values(upstream.received[0])
    others = [field for field in received if field[0] not in ("Host", "Content-Length")]
    assert others == own + NAMED + FOR_THE_PROVIDER
    assert ("Host", "127.0.0.1:%d" % upstream.port) in received
    assert b"about-" not in upstream.all_bytes


@pytest.mark.parametrize("accepted", ["br", "gzip, br, deflate", "identity", "*", "gzip;q=0.5"])
def test_with_a_provider_key_the_upstream_is_asked_for_no_content_coding(
    upstream, hidden, relay, accepted
):
    fields = [("Accept-Encoding", accepted)]

    hidden.chat(fields=fields)
    relay().chat(fields=fields)

    with_key, without_key = upstream.received
    assert with_key.field("accept-encoding") == "identity"
    assert without_key.field("accept-encoding") == accepted


STATUSES = [200, 201, 204, 205, 301, 304, 400, 404, 418, 429, 500, 503, 529, 599]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("mode", list(SETTINGS))
def test_status_and_reason_are_relayed_unchanged(upstream, relay, status, mode):
    running = relay(**SETTINGS[mode])
    body = b"" if status in (204, 205, 304) else b"said so"
    head = b"HTTP/1.1 %d As I Said\r\n" % status
    if status not in (204, 304):
        head += b"Content-Length: %d\r\n" % len(body)
    upstream.answer = head + b"\r\n" + body

    with running.client() as client:
        # Twice on one connection, which shows that the end of the first response was clear.
        for _ in range(2):
            client.request("POST", CHAT, b"{}", AUTH)
            reply = client.read_reply()
            assert reply.status_line == "HTTP/1.1 %d As I Said" % status
            assert reply.body == body
            assert reply.complete
            if status not in (204, 304):
                assert reply.get("content-length") == str(len(body))


RELAYED = [
    ("Content-Type", "application/vnd.x+json; charset=latin-1"),
    ("X-Twice", "1"),
    ("x-ratelimit-remaining-tokens", "7"),
    ("X-Twice", "2"),
    ("ETag", '"e"'),
    ("openai-processing-ms", "9"),
    ("Retry-After", "3"),
    ("Cache-Control", "no-store"),
    ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("Location", "http://elsewhere.test/"),
    ("X-Latin", "gr\xfcn"),
    ("x-request-id", "up-1"),
]
DROPPED = [
    (name, "not-for-the-client")
    for name in (
        "Set-Cookie",
        "Alt-Svc",
        "Strict-Transport-Security",
        "NEL",
        "Report-To",
        "Access-Control-Allow-Origin",
        "Access-Control-Allow-Credentials",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Trailer",
        "X-Hop",
    )
] + [("Connection", "x-hop")]
# Relayed by a transparent relay, but not where a provider key is configured.
ABOUT_THE_OWNER = [
    ("Server", "about-the-owner"),
    ("openai-organization", "about-the-owner"),
    ("OpenAI-Project", "about-the-owner"),
    ("anthropic-organization-id", "about-the-owner"),
]


@pytest.mark.parametrize("mode", list(SETTINGS))
def test_end_to_end_headers_are_relayed_in_order_with_duplicates(upstream, relay, mode):
    running = relay(ORIGINS="https://a.example", **SETTINGS[mode])
    fields = RELAYED[:4] + DROPPED + ABOUT_THE_OWNER + RELAYED[4:]
    head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
    head += "".join("%s: %s\r\n" % field for field in fields)
    upstream.answer = head.encode("latin-1") + b"\r\n{}"

    reply = running.chat()

    if mode == "hidden":
        relayed = RELAYED
    else:
        relayed = RELAYED[:4] + ABOUT_THE_OWNER + RELAYED[4:]
    expected = [(name.lower(), value) for name, value in relayed]
    without_cors = [field for field in reply.fields if field != ("vary", "Origin")]
    assert without_cors == expected + [("content-length", "2")]
    assert reply.body == b"{}"


def test_header_fields_that_contain_the_provider_key_are_not_relayed(upstream, hidden):
    names = ["X-Echo", "Content-Location", "x-request-id", "request-id", "x-ratelimit-key"]
    fields = ["%s: a sk-hidden-key b" % name for name in names] + ["X-Kept: yes"]
    upstream.answer = with_fields(OK, *fields)

    reply = hidden.chat()

    assert reply.status == 200
    assert reply.get("x-kept") == "yes"
    assert b"sk-hidden" not in reply.raw_head
    assert "sk-hidden" not in str(hidden.wait_for_record())


def test_none_of_several_provider_keys_is_relayed(upstream, relay):
    running = relay(KEY="sk-hidden-one,sk-hidden-two", CLIENT_KEYS="ck-alice")
    upstream.answer = with_fields(OK, "X-One: sk-hidden-one", "X-Two: sk-hidden-two", "X-Kept: yes")

    reply = running.chat()

    assert reply.get("x-kept") == "yes"
    assert b"sk-hidden" not in reply.raw_head


def with_fields(response, *fields):
    """The response with more header fields."""
    head, _, body = response.partition(b"\r\n\r\n")
    return b"\r\n".join([head, *(field.encode() for field in fields)]) + b"\r\n\r\n" + body


REQUEST_IDS = [("x-request-id", "up-1"), ("request-id", "req_011"), (None, None)]


@pytest.mark.parametrize("field,value", REQUEST_IDS)
def test_every_response_and_log_line_has_a_request_id(upstream, hidden, field, value):
    if field:
        upstream.answer = with_fields(OK, "%s: %s" % (field, value))

    reply = hidden.chat()

    assert reply.all("x-request-id") == [hidden.wait_for_record()["request_id"]]
    assert reply.get("x-request-id")
    if field:
        assert reply.get("x-request-id") == value
    if field == "request-id":
        assert reply.get("request-id") == value

    refusal = hidden.chat(key="wrong")
    assert refusal.get("x-request-id") == hidden.wait_for_record(2)["request_id"]
    assert refusal.get("x-request-id") != value


def test_a_response_to_HEAD_has_a_length_and_no_body(upstream, hidden):
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"
    with hidden.client() as client:
        for number in (1, 2):
            client.request("HEAD", "/v1/models", None, AUTH)
            reply = client.read_reply("HEAD")
            assert reply.status == 200
            assert reply.get("content-length") == "1234"
            assert upstream.wait_for(number).line == "HEAD /v1/models HTTP/1.1"


def test_interim_responses_are_not_relayed(upstream, hidden):
    early_hints = b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"
    upstream.answer = early_hints + b"HTTP/1.1 100 Continue\r\n\r\n" + OK

    reply = hidden.chat()

    assert reply.status == 200
    assert reply.body == b'{"ok":true}'
    assert reply.get("link") is None


def test_a_transparent_relay_passes_every_method(upstream, relay):
    running = relay(ORIGINS="*")
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

    for number, method in enumerate(methods, 1):
        body = b"x" if method in ("PUT", "PATCH", "POST") else None
        assert running.ask(method, "/v1/files/1", body).status == 200
        assert upstream.wait_for(number).line == "%s /v1/files/1 HTTP/1.1" % method


def test_a_request_id_named_in_Connection_is_replaced(upstream, hidden):
    upstream.answer = with_fields(OK, "Connection: x-request-id", "x-request-id: up-1")
    assert len(hidden.chat().all("x-request-id")) == 1
