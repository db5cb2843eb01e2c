"""AIPROXY_UPSTREAM_HEADERS: the operator's header fields go up with every request.

They replace the client's, and what they hold never comes down and is never logged.
"""

import json
import threading

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, PATIENCE, Client, Program, chunk

ORGANIZATION = "org-0123456789abcdef"
PAGE = "https://app.example/?a=b:c"
FIELDS = "OpenAI-Organization: %s; HTTP-Referer: %s;User-Agent:  relay/1 (test)" % (
    ORGANIZATION, PAGE)
SETTINGS = {
    "provider key": {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"},
    "transparent": {},
}
# The same names as clients and CGI-like servers may spell them.
OF_THE_CLIENT = [
    ("openai-organization", "org-of-the-client"),
    ("OpenAI_Organization", "org-of-the-client"),
    ("User-Agent", "client/1"),
    ("user_agent", "client/2"),
    ("HTTP-Referer", "https://client.example"),
]


def check_fields(received):
    assert received.fields("openai-organization") == [ORGANIZATION]
    assert received.fields("http-referer") == [PAGE]
    assert received.fields("user-agent") == ["relay/1 (test)"]
    assert received.fields("openai_organization") == received.fields("user_agent") == []
    assert b"client" not in received.head.lower().replace(b"host: ", b"")


# -- what they may be

VALID = [
    ("", []),
    ("A: b", [(b"A", b"b")]),
    ("A:b; ", [(b"A", b"b")]),
    ("A: b c:d=e; x-y: \"1, 2\"", [(b"A", b"b c:d=e"), (b"x-y", b'"1, 2"')]),
    ("'A: b'; \"C: d\"", [(b"A", b"b"), (b"C", b"d")]),
    ("Cookie: a=b", [(b"Cookie", b"a=b")]),
    ("X-Forwarded-For: 10.0.0.1", [(b"X-Forwarded-For", b"10.0.0.1")]),
]


@pytest.mark.parametrize("text,fields", VALID, ids=lambda value: ascii(value)[:30])
def test_fields_are_separated_by_semicolons(text, fields):
    assert aiproxy.Settings({"AIPROXY_UPSTREAM_HEADERS": text}).upstream_headers == fields


INVALID = [
    "s3cret",
    "A: s3cret; s3cret",
    "A B: s3cret",
    "A : s3cret",
    ": s3cret",
    "A:",
    "A: s3cret\r\nB: c",
    "A: s3cret\0",
    "A: s3cret\xe9",
    "A: \u201cs3cret\u201d",
    "A: s3cret; a: s3cret",
    "X-A: s3cret; x_a: s3cret",
    ";",
]
RESERVED = [
    "Host", "content-length", "Transfer-Encoding", "Transfer_Encoding", "Connection", "Keep-Alive",
    "TE", "Trailer", "Upgrade", "Expect", "Proxy-Authorization", "Proxy-Connection",
    "HTTP2-Settings", "Content-Type", "Content-Encoding", "Accept-Encoding", "Idempotency-Key",
    "Sec-WebSocket-Key", "sec_websocket_protocol",
]


@pytest.mark.parametrize("text", INVALID + [name + ": s3cret" for name in RESERVED], ids=ascii)
def test_what_is_no_field_or_not_the_operators_stops_the_start_and_is_not_shown(text):
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings({"AIPROXY_UPSTREAM_HEADERS": text})

    assert str(caught.value).startswith("AIPROXY_UPSTREAM_HEADERS: got something that is not shown")
    assert "s3cret" not in str(caught.value)


KEYS = [
    ({}, "Authorization"),
    ({}, "authorization"),
    ({}, "x-api-key"),
    ({}, "api_key"),
    ({}, "X-Goog-Api-Key"),
    ({}, "Ocp-Apim-Subscription-Key"),
    ({"AIPROXY_KEY": "sk-hidden-key"}, "Authorization"),
    ({"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_KEY_HEADER": "X-Custom"}, "x_custom"),
    ({"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_UPSTREAM": "anthropic"}, "x-api-key"),
]


@pytest.mark.parametrize("environ,name", KEYS)
def test_a_key_belongs_where_it_is_guarded(environ, name):
    with pytest.raises(aiproxy.SettingError, match="belongs in AIPROXY_KEY") as caught:
        aiproxy.Settings({**environ, "AIPROXY_UPSTREAM_HEADERS": name + ": s3cret"})

    assert "s3cret" not in str(caught.value)


def test_beside_a_provider_key_a_gateway_may_have_one_of_its_own():
    settings = aiproxy.Settings({"AIPROXY_KEY": "sk-hidden-key",
                                 "AIPROXY_UPSTREAM_HEADERS": "x-api-key: s3cret-1"})
    assert settings.upstream_headers == [(b"x-api-key", b"s3cret-1")]


def test_check_and_help_show_the_names_alone(monkeypatch):
    shown = aiproxy.Settings({"AIPROXY_UPSTREAM_HEADERS": FIELDS}).shown

    names = "OpenAI-Organization: ***; HTTP-Referer: ***; User-Agent: ***"
    assert shown["AIPROXY_UPSTREAM_HEADERS"] == names
    assert ORGANIZATION not in str(shown)

    row = aiproxy.find_option("AIPROXY_UPSTREAM_HEADERS")._replace(default=FIELDS)
    monkeypatch.setattr(aiproxy, "OPTIONS", (row,))
    assert ORGANIZATION not in aiproxy.make_parser().format_help()


def test_in_the_file_they_may_be_a_list(monkeypatch):
    row = aiproxy.find_option("AIPROXY_UPSTREAM_HEADERS")._replace(default=["A: b", "C: d, e"])
    others = tuple(one for one in aiproxy.OPTIONS if one.name != row.name)
    monkeypatch.setattr(aiproxy, "OPTIONS", others + (row,))

    assert aiproxy.Settings({}).upstream_headers == [(b"A", b"b"), (b"C", b"d, e")]


# -- what goes up

@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_they_go_up_once_in_the_place_of_the_clients(upstream, relay, settings):
    running = relay(UPSTREAM_HEADERS=FIELDS, **settings)
    auth = [("Authorization", "Bearer ck-alice")]

    assert running.chat(fields=OF_THE_CLIENT).status == 200
    assert running.ask("GET", "/v1/models", fields=auth + OF_THE_CLIENT).status == 200

    for received in upstream.received[:2]:
        check_fields(received)
    assert upstream.received[0].body == b'{"model":"m","messages":[]}'


def test_they_go_up_with_an_upgrade(upstream, relay):
    running = relay(UPSTREAM_HEADERS=FIELDS)
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
               ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]
    upstream.answer = (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                       b"Upgrade: websocket\r\nX-Echo: %s\r\n\r\n" % ORGANIZATION.encode())

    with running.client() as client:
        client.request("GET", "/v1/realtime", fields=upgrade + OF_THE_CLIENT)
        reply = client.read_head()

    assert reply.status == 101
    assert reply.get("x-echo") is None
    check_fields(upstream.wait_for())
    assert upstream.received[0].fields("upgrade") == ["websocket"]


def test_they_go_up_to_workers_ai_and_its_errors_do_not_show_them(upstream, relay):
    running = relay(
        UPSTREAM="workers-ai", UPSTREAM_HEADERS=FIELDS, CLIENT_KEYS="ck-alice",
        CLOUDFLARE_ACCOUNT_ID="account-1", CLOUDFLARE_API_TOKEN="cf-token-of-ours",
        CLOUDFLARE_API_BASE_URL=upstream.url)
    error = {"code": 5004, "message": "AiError: nothing for %s here" % ORGANIZATION}
    upstream.answer = answer(400, json.dumps({"success": False, "errors": [error]}).encode())
    message = {"role": "user", "content": "Hello?"}
    body = json.dumps({"model": "@cf/meta/llama-3.1-8b-instruct", "messages": [message]})

    reply = running.chat(body.encode(), fields=OF_THE_CLIENT)

    assert reply.status == 400
    assert reply.json["error"]["message"] == "nothing for *** here"
    check_fields(upstream.wait_for())


# -- what comes down

def answer(status, body, fields=b""):
    return b"HTTP/1.1 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body)


def error_of(text):
    return json.dumps({"error": {"message": text, "code": "rate_limit_exceeded"}}).encode()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_an_error_that_names_a_value_comes_down_with_stars(upstream, relay, settings):
    running = relay(UPSTREAM_HEADERS=FIELDS, **settings)
    text = "Rate limit reached in organization %s on tokens per min for %s."
    body = error_of(text % (ORGANIZATION, PAGE)).replace(b"/", b"\\/")
    upstream.answer = answer(429, body, b"Retry-After: 7\r\nX-Org: %s\r\n" % ORGANIZATION.encode())

    reply = running.chat()

    assert (reply.status, reply.complete, reply.get("retry-after")) == (429, True, "7")
    assert reply.get("x-org") is None
    assert reply.code == "rate_limit_exceeded"
    stars = "*" * (len(PAGE) + PAGE.count("/"))
    assert reply.json["error"]["message"] == text % ("*" * len(ORGANIZATION), stars)


@pytest.mark.parametrize("cut", range(1, len(ORGANIZATION), 6))
def test_a_value_that_comes_in_two_pieces_is_masked(upstream, relay, cut):
    running = relay(UPSTREAM_HEADERS=FIELDS)
    value = ORGANIZATION.encode()
    beginning_is_down = threading.Event()

    def respond(received):
        head = EVENT_HEAD.replace(b"200 OK", b"400 Bad")
        # More than is read before the head goes down.
        received.send(head + chunk(b"a" * 70000 + value[:cut]))
        beginning_is_down.wait(PATIENCE)
        received.send(chunk(value[cut:] + b" b ") + chunk(value[:-1]) + b"0\r\n\r\n")

    upstream.answer = respond
    with running.client() as client:
        client.request("POST", CHAT, b"{}")
        reply = client.read_head()
        beginning_is_down.set()
        client.read_body(reply)

    assert reply.complete
    assert reply.body.endswith(b"a" + b"*" * len(value) + b" b " + value[:-1])


def test_answers_and_short_or_common_values_are_left_alone(upstream, relay):
    running = relay(UPSTREAM_HEADERS="X-Title: my-app; Accept: application/json; X-Form: "
                    "application/json; X-Org: " + ORGANIZATION)
    fields = b"Content-Type: application/json\r\nX-Short: my-app\r\n"
    for status, text in ((200, ORGANIZATION), (400, "my-app wants application/json")):
        upstream.answer = answer(status, error_of(text), fields)
        reply = running.chat()

        assert (reply.status, reply.body) == (status, error_of(text))
        assert reply.get("content-type") == "application/json"
        assert reply.get("x-short") == "my-app"


def test_behind_a_scheme_the_credential_alone_counts():
    text = "cf-aig-authorization: Bearer s3cret-1"
    settings = aiproxy.Settings({"AIPROXY_UPSTREAM_HEADERS": text})

    assert settings.masked_values == [b"s3cret-1"]
    assert aiproxy.Log("text", settings.log_secrets).redact("/x?s3cret-1", 100) == "/x?***"


def test_the_log_does_not_show_them(upstream):
    upstream.answer = answer(400, b"{}", b"X-Request-Id: %s-1\r\n" % ORGANIZATION.encode())
    environ = {"AIPROXY_UPSTREAM": upstream.url, "AIPROXY_UPSTREAM_HEADERS": FIELDS}
    with Program(env=environ) as program:
        with Client(program.address) as client:
            client.request("GET", "/v1/files/" + ORGANIZATION)
            assert client.read_reply().status == 400
        program.wait_for_line(program.lines, r"/v1/files/\*\*\* ")

        assert ORGANIZATION not in "".join(program.lines + program.errors)
        assert ORGANIZATION.encode() in upstream.all_bytes
