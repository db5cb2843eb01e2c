"""Client keys are required, compared as bytes, logged by name, and never sent upstream."""

import pytest

from support import CHAT

BODY = b'{"model":"m"}'
UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]

# How a client sends its client key, and the status of the response.
CREDENTIALS = [
    pytest.param([("Authorization", "Bearer ck-alice")], 200, id="bearer"),
    pytest.param([("authorization", "bearer  ck-alice")], 200, id="bearer in another case"),
    pytest.param([("x-api-key", "ck-alice")], 200, id="x-api-key"),
    pytest.param([("api-key", "ck-alice")], 200, id="api-key"),
    pytest.param([("x-goog-api-key", "ck-alice")], 200, id="x-goog-api-key"),
    pytest.param(
        [("Authorization", "Bearer ck-alice"), ("x-api-key", "ck-alice")],
        200,
        id="the same key in two fields",
    ),
    pytest.param(
        [("Authorization", "Basic Y2s6"), ("x-api-key", "ck-alice")],
        200,
        id="a key and another scheme",
    ),
    pytest.param(
        [("Authorization", "Bearer ck-alice"), ("x-api-key", "ck-bob")],
        400,
        id="two different keys",
    ),
    pytest.param(
        [("x-api-key", "ck-alice"), ("x-api-key", "ck-bob")],
        400,
        id="two different keys in one field",
    ),
    pytest.param(
        [("Authorization", "Bearer ck-alice"), ("Authorization", "Bearer ck-alice")],
        400,
        id="authorization duplicate",
    ),
    pytest.param([], 401, id="none"),
    pytest.param([("Authorization", "Bearer ")], 401, id="empty"),
    pytest.param([("Authorization", "Bearer wrong")], 401, id="wrong"),
    pytest.param([("Authorization", "Bearer ck-alic")], 401, id="too short"),
    pytest.param([("Authorization", "Bearer ck-alicee")], 401, id="too long"),
    pytest.param([("Authorization", "Bearer CK-ALICE")], 401, id="in capitals"),
    pytest.param([("Authorization", "Bearer ck-\xe4lice")], 401, id="not ASCII"),
    pytest.param([("Authorization", "Bearer alice")], 401, id="the name"),
    pytest.param([("Authorization", "Bearer alice=ck-alice")], 401, id="name and key"),
    pytest.param([("Authorization", "ck-alice")], 401, id="without a scheme"),
    pytest.param([("Authorization", "Basic ck-alice")], 401, id="basic"),
    pytest.param([("Cookie", "key=ck-alice")], 401, id="cookie"),
    pytest.param([("Authorization", "Bearer sk-hidden-key")], 401, id="the provider key"),
]


@pytest.mark.parametrize("fields,status", CREDENTIALS)
def test_only_a_configured_client_key_is_accepted(upstream, relay, fields, status):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice,bob=ck-bob")
    reply = running.ask("POST", CHAT, BODY, fields)

    assert reply.status == status
    assert len(upstream.received) == (status == 200)
    assert b"ck-" not in upstream.all_bytes + reply.raw_head + reply.body

    record = running.wait_for_record()

    assert record["client"] == ("alice" if status == 200 else "127.0.0.1")
    assert "ck-" not in str(record)

    if status == 401:
        assert reply.code == "invalid_api_key"
        assert reply.get("www-authenticate") == "Bearer"


def test_each_client_is_logged_by_its_name_or_else_by_its_number(relay):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-1, ck-2 ,carol=ck=3==")
    clients = [("ck-1", "alice"), ("ck-2", "client2"), ("ck=3==", "carol")]

    for number, (key, name) in enumerate(clients, 1):
        assert running.chat(key=key).status == 200
        assert running.wait_for_record(number)["client"] == name


@pytest.mark.parametrize("method,path", [
    ("GET", "/v1/files"),
    ("DELETE", CHAT),
    ("GET", "/v1/models"),
    ("OPTIONS", CHAT),
    ("POST", CHAT + "?key=1"),
])
def test_without_a_client_key_every_request_is_refused(upstream, hidden, method, path):
    assert hidden.ask(method, path).status in (400, 401)
    assert not upstream.received


@pytest.mark.parametrize("query", [
    "?key=ck-alice", "?a=1&key=x", "?key", "?%6bey=x", "?KEY=x", "?api_key=x", "?Access_Token=x",
    "?x=ck-alice", "?a&x=ck%2dalice&b", "?ck-alice", "?a=1&%63k-alice=",
    "?authorization=Bearer%20ck-alice", "?x=Bearer+ck-alice",
])
def test_a_key_in_the_query_is_refused(upstream, hidden, query):
    reply = hidden.ask("POST", CHAT + query, BODY, [("Authorization", "Bearer ck-alice")])

    assert (reply.status, reply.code) == (400, "key_in_query")
    assert b"ck-alice" not in reply.body
    assert not upstream.received


def test_a_query_without_a_key_is_sent_upstream_unchanged(upstream, hidden):
    path = CHAT + "?api-version=1&k%65ys=a+b&x=key&y=ck-alicf"
    reply = hidden.ask("POST", path, BODY, [("x-api-key", "ck-alice")])

    assert reply.status == 200
    query = "api-version=1&k%65ys=a+b&x=key&y=ck-alicf"
    assert upstream.received[0].line == "POST %s?%s HTTP/1.1" % (CHAT, query)


def test_client_keys_protect_a_loopback_upstream_that_needs_no_key(upstream, relay):
    running = relay(CLIENT_KEYS="ck-alice")

    assert running.chat(key=None).status == 401
    assert not upstream.received
    assert running.chat().status == 200
    assert upstream.received[0].field("authorization") is None
    assert b"ck-alice" not in upstream.all_bytes


@pytest.mark.parametrize("method,path,body,status", [
    ("POST", "/api/chat", b'{"model":"small"}', 404),
    ("POST", CHAT, b'{"model":"big"}', 403),
    ("POST", "/v1//chat/completions/", b'{"model":"big"}', 403),
    ("POST", "/v1/embeddings", b'{"model":"big"}', 403),
    ("POST", CHAT + "?key=x", b'{"model":"small"}', 400),
    ("DELETE", "/api/delete", None, 404),
    ("PROPFIND", CHAT, None, 501),
    ("GET", "/api/tags", None, 404),
    ("GET", CHAT, None, 405),
])
def test_client_keys_alone_guard_an_upstream_as_a_provider_key_does(
    upstream, relay, method, path, body, status
):
    running = relay(CLIENT_KEYS="ck-alice", MODELS="small")
    reply = running.ask(method, path, body, [("x-api-key", "ck-alice")])
    assert reply.status == status
    assert not upstream.received


def test_client_keys_alone_keep_what_a_client_sends_to_the_allowed_fields(upstream, relay):
    fields = [("X-Secret", "x"), ("Cookie", "a=b"), ("Accept", "a/b"), ("Accept-Encoding", "gzip")]
    assert relay(CLIENT_KEYS="ck-alice").chat(fields=fields).status == 200
    received = upstream.received[0]
    assert received.field("accept") == "a/b"
    assert received.field("accept-encoding") == "identity"
    assert received.field("x-secret") is None
    assert received.field("cookie") is None


def test_a_browser_may_send_its_client_key_as_a_websocket_subprotocol(upstream, relay):
    upstream.answer = (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Connection: Upgrade\r\n"
        b"Upgrade: websocket\r\n"
        b"Sec-WebSocket-Protocol: realtime\r\n\r\n"
        b"hello"
    )
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice", PATHS="GET /v1/realtime")
    protocol = ("Sec-WebSocket-Protocol", "realtime, openai-insecure-api-key.ck-alice")

    with running.client() as client:
        client.request("GET", "/v1/realtime", None, UPGRADE + [protocol])
        reply = client.read_head()
        assert reply.status == 101
        assert client.read_exactly(5) == b"hello"

    received = upstream.received[0]

    assert received.field("sec-websocket-protocol") == "realtime"
    assert received.field("authorization") == "Bearer sk-hidden-key"
    assert b"ck-alice" not in upstream.all_bytes


@pytest.mark.parametrize("query", ["?token=a+B/c==", "?token=a%2BB%2Fc%3D%3D"])
def test_a_key_with_a_plus_is_found_in_the_query(upstream, relay, query):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="one=a+B/c==")
    reply = running.ask("POST", CHAT + query, BODY, [("Authorization", "Bearer a+B/c==")])
    assert (reply.status, reply.code) == (400, "key_in_query")
    assert not upstream.received
