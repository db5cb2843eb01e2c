"""A WebSocket is a tunnel after its handshake; no other upgrade gets through."""

import socket
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import OK, allow_no_silence

UPGRADE = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "WebSocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
)
REALTIME = "/v1/realtime?model=gpt-realtime"
KEY = [("Authorization", "Bearer ck-alice")]
PROVIDER_KEY = {
    "KEY": "sk-hidden-key",
    "CLIENT_KEYS": "alice=ck-alice",
    "PATHS": "GET /v1/realtime",
}


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


def fields_of(head):
    return [line.decode("latin-1") for line in head.split(b"\r\n")[1:] if line]


def open_tunnel(by_hand, running, fields=(), early=b"", answer=SWITCH + b"\r\n", path=REALTIME):
    """Make a handshake.

    The client, the reply that it read, the upstream's end, and the head that came there.
    """
    client = running.client()
    client.request("GET", path, fields=UPGRADE + list(fields))
    client.send(early)
    peer = by_hand.accept()
    head = peer.read_until(b"\r\n\r\n")
    peer.send(answer)
    return client, client.read_head(), peer, head


def test_the_handshake_is_relayed_and_then_bytes_both_ways(by_hand, relay):
    fields = [
        ("Sec-WebSocket-Protocol", "realtime"),
        ("Sec-WebSocket-Extensions", "permessage-deflate"),
        ("OpenAI-Beta", "realtime=v1"),
        ("Authorization", "Bearer sk-caller"),
    ]
    client, reply, peer, head = open_tunnel(by_hand, relay(UPSTREAM=by_hand.url), fields)
    sent = fields_of(head)
    upgrade = [line for line in sent if line.lower().startswith(("connection", "upgrade"))]

    assert head.startswith(b"GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\n")
    assert upgrade == ["Connection: Upgrade", "Upgrade: websocket"]
    assert sent.count("Sec-WebSocket-Version: 13") == 1
    assert sent.count("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==") == 1
    assert sent.count("Sec-WebSocket-Protocol: realtime") == 1
    assert sent.count("Sec-WebSocket-Extensions: permessage-deflate") == 1
    assert sent.count("OpenAI-Beta: realtime=v1") == 1
    assert sent.count("Authorization: Bearer sk-caller") == 1

    assert reply.status == 101
    assert reply.status_line == "HTTP/1.1 101 Switching Protocols"
    assert reply.all("connection") == ["Upgrade"]
    assert reply.all("upgrade") == ["websocket"]
    assert reply.all("sec-websocket-accept") == ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]
    assert reply.get("content-length") is None
    assert reply.get("transfer-encoding") is None

    with client:
        # any bytes, not only frames
        for number in range(3):
            client.send(b"\x81\x05up %d\0\r\n\r\n" % number)
            assert peer.read_exactly(11) == b"\x81\x05up %d\0\r\n\r\n" % number
            peer.send(b"GET / HTTP/1.1\r\n%d" % number)
            assert client.read_exactly(17) == b"GET / HTTP/1.1\r\n%d" % number


def test_bytes_sent_before_the_end_of_the_handshake_are_not_lost(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url)
    answer = SWITCH + b"\r\nearly down"
    client, _, peer, _ = open_tunnel(by_hand, running, early=b"early up", answer=answer)

    with client:
        assert client.read_exactly(10) == b"early down"
        assert peer.read_exactly(8) == b"early up"


@pytest.mark.parametrize("leaves", ["client", "upstream"])
def test_when_either_side_closes_the_other_gets_the_rest_and_is_closed(
    by_hand, relay, monkeypatch, leaves
):
    monkeypatch.setattr(aiproxy, "HALF_SECONDS", 0.2)
    monkeypatch.setattr(aiproxy, "UNTOLD_SECONDS", 0.2)
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)
    first, second = (client, peer) if leaves == "client" else (peer, client)

    with client:
        first.send(b"last words" * 10000)
        first.sock.close()
        assert second.read_exactly(100000) == b"last words" * 10000
        assert second.ended()

    record = running.wait_for_record()

    assert record["status"] == 101
    assert record["outcome"] == "ok"
    assert record["bytes"] == (0 if leaves == "client" else 100000)


@pytest.mark.parametrize("ends", ["client", "upstream"])
def test_when_one_side_ends_its_sending_the_other_may_go_on(by_hand, relay, ends):
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)
    first, second = (client, peer) if ends == "client" else (peer, client)

    with client:
        first.send(b"last words")
        first.sock.shutdown(socket.SHUT_WR)
        assert second.read_exactly(10) == b"last words"
        assert second.ended()
        for number in range(3):
            second.send(b"more %d" % number)
            assert first.read_exactly(6) == b"more %d" % number
        second.sock.shutdown(socket.SHUT_WR)
        assert first.ended()

    record = running.wait_for_record()

    assert record["outcome"] == "ok"
    assert record["bytes"] == (18 if ends == "client" else 10)


def test_a_side_that_goes_on_silently_after_the_others_end_is_cut(by_hand, relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "HALF_SECONDS", 0.2)
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)

    with client:
        client.sock.shutdown(socket.SHUT_WR)
        assert peer.ended()
        assert client.ended()

    assert running.wait_for_record()["outcome"] == "ok"


def test_both_sides_may_send_more_than_the_buffers_hold_at_once(by_hand, relay):
    client, _, peer, _ = open_tunnel(by_hand, relay(UPSTREAM=by_hand.url))
    # 16 MB each way
    up = bytes(range(256)) * (1 << 16)
    down = bytes(range(255, -1, -1)) * (1 << 16)

    with client:
        threading.Thread(target=client.send, args=(up,)).start()
        threading.Thread(target=peer.send, args=(down,)).start()
        received = []
        reader = threading.Thread(target=lambda: received.append(peer.read_exactly(len(up))))
        reader.start()

        assert client.read_exactly(len(down)) == down

        reader.join()
        assert received == [up]


def test_a_client_that_is_reset_while_the_upstream_takes_nothing_is_seen(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)
    client.sock.setblocking(False)
    with pytest.raises(BlockingIOError):            # all is full
        while True:
            client.sock.send(bytes(1 << 20))
            time.sleep(0.02)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.sock.close()

    assert running.wait_for_record()["status"] == 101       # long before AIPROXY_TIMEOUT
    with pytest.raises(ConnectionError):
        while peer.more():
            peer.data = b""
        raise ConnectionError("it may also end so")


def test_a_silent_tunnel_is_closed(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)

    with client:
        allow_no_silence(running)
        assert client.ended()
        assert peer.ended()

    assert running.wait_for_record()["outcome"] == "idle"


@pytest.mark.parametrize("settings", [{}, PROVIDER_KEY], ids=["no provider key", "provider key"])
def test_the_response_of_an_upstream_that_does_not_switch_is_relayed(by_hand, relay, settings):
    running = relay(UPSTREAM=by_hand.url, **settings)
    answer = (
        b"HTTP/1.1 426 Upgrade Required\r\n"
        b"Upgrade: websocket\r\n"
        b"Content-Length: 2\r\n\r\n"
        b"no"
    )
    client, reply, peer, _ = open_tunnel(by_hand, running, KEY, answer=answer)

    with client:
        client.read_body(reply)
        assert reply.status == 426
        assert reply.body == b"no"
        assert reply.get("upgrade") is None


@pytest.mark.parametrize(
    "fields",
    [b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"Connection: Upgrade\r\n", b""],
    ids=["another protocol", "no protocol", "nothing"],
)
def test_an_invalid_101_is_a_502(by_hand, relay, fields):
    answer = b"HTTP/1.1 101 Switching Protocols\r\n" + fields + b"\r\n"
    client, reply, _, _ = open_tunnel(by_hand, relay(UPSTREAM=by_hand.url), answer=answer)

    with client:
        assert reply.status == 502


# ---- with a provider key configured

PROTOCOL = "Sec-WebSocket-Protocol"


@pytest.mark.parametrize("fields,sent", [
    (KEY, []),
    ([("x-api-key", "ck-alice")], []),
    (
        [(PROTOCOL, "realtime, openai-insecure-api-key.ck-alice, openai-beta.realtime-v1")],
        ["Sec-WebSocket-Protocol: realtime, openai-beta.realtime-v1"],
    ),
    (
        [(PROTOCOL, "realtime"), (PROTOCOL, "openai-insecure-api-key.ck-alice")],
        ["Sec-WebSocket-Protocol: realtime"],
    ),
    ([(PROTOCOL, "openai-insecure-api-key.ck-alice")], []),
    ([("Sec_WebSocket_Protocol", "openai-insecure-api-key.ck-alice")], []),
], ids=[
    "Authorization",
    "x-api-key",
    "subprotocol",
    "subprotocol in a field of its own",
    "subprotocol alone",
    "subprotocol spelt with underscores",
])
def test_the_provider_key_is_sent_upstream_and_the_client_key_never(by_hand, relay, fields, sent):
    running = relay(UPSTREAM=by_hand.url, **PROVIDER_KEY)
    others = [("Cookie", "a=b"), ("Origin", "https://app.example"), ("X-Secret", "c")]
    client, reply, peer, head = open_tunnel(by_hand, running, fields + others)
    up = fields_of(head)
    dropped = ("cookie", "origin", "x-secret", "x-api-key")

    with client:
        assert reply.status == 101
        assert b"ck-alice" not in head
        assert b"openai-insecure-api-key" not in head
        assert up.count("Authorization: Bearer sk-hidden-key") == 1
        assert "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==" in up
        assert [line for line in up if line.lower().startswith("sec-websocket-protocol")] == sent
        assert not [line for line in up if line.lower().startswith(dropped)]

        client.send(b"hello")
        assert peer.read_exactly(5) == b"hello"

        peer.sock.close()
        assert client.ended()

    assert running.wait_for_record()["client"] == "alice"


def test_without_client_keys_a_key_in_the_subprotocol_is_not_sent_upstream(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, KEY="sk-hidden-key", PATHS="GET /v1/realtime")
    fields = [(PROTOCOL, "realtime, openai-insecure-api-key.whatever")]
    client, reply, _, head = open_tunnel(by_hand, running, fields)

    with client:
        assert reply.status == 101
        assert b"whatever" not in head
        assert b"Sec-WebSocket-Protocol: realtime\r\n" in head


def test_without_a_provider_key_the_key_in_the_subprotocol_is_sent_upstream(by_hand, relay):
    fields = [(PROTOCOL, "realtime, openai-insecure-api-key.sk-caller")]
    client, _, _, head = open_tunnel(by_hand, relay(UPSTREAM=by_hand.url), fields)
    sent = fields_of(head)

    with client:
        assert "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-caller" in sent


@pytest.mark.parametrize("path,fields,settings,status", [
    ("/v1/realtime", [], {}, 401),
    ("/v1/realtime", [(PROTOCOL, "realtime, openai-insecure-api-key.wrong")], {}, 401),
    ("/v1/other", KEY, {}, 404),
    ("/v1/realtime", KEY, {"PATHS": "/v1/realtime"}, 405),
    ("/v1/realtime", KEY, {"PATHS": ""}, 404),
    ("/v1/realtime?model=other", KEY, {"MODELS": "gpt-realtime"}, 403),
    ("/v1/realtime?model=gpt-realtime&model=other", KEY, {"MODELS": "gpt-realtime"}, (400, 403)),
    ("/v1/realtime?mod%65l=other", KEY, {"MODELS": "gpt-realtime"}, (400, 403)),
    ("/v1/realtime", KEY, {"MODELS": "gpt-realtime"}, (400, 403)),
    ("/v1/realtime?deployment=other", KEY, {"MODELS": "gpt-realtime"}, 403),
    ("/v1/realtime?model=gpt-realtime&deployment=other", KEY, {"MODELS": "gpt-realtime"}, 400),
    ("/v1/realtime?key=ck-alice", KEY, {}, 400),
], ids=[
    "no key",
    "wrong key",
    "other path",
    "other method",
    "path not named",
    "model not allowed",
    "two models",
    "model encoded",
    "no model",
    "deployment not allowed",
    "a deployment beside the model",
    "key in the query",
])
def test_a_handshake_passes_the_same_checks_as_any_request(
    upstream, relay, path, fields, settings, status
):
    reply = relay(**{**PROVIDER_KEY, **settings}).ask("GET", path, fields=UPGRADE + fields)

    assert reply.status in (status if isinstance(status, tuple) else (status,))
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime/x?model=m"])
@pytest.mark.parametrize("rule", [{"MODELS": "m"}, {"MAX_TOKENS": 9}, {"MAX_CHARS": 9}], ids=str)
@pytest.mark.parametrize("mode", [{}, dict(PROVIDER_KEY, PATHS="*")], ids=["transparent", "key"])
def test_where_a_rule_would_read_the_frames_an_upgrade_is_refused(
    upstream, relay, path, rule, mode
):
    reply = relay(**mode, **rule).ask("GET", path, fields=UPGRADE + (KEY if mode else []))
    assert (reply.status, reply.code) == (403, "websocket_not_allowed")
    assert upstream.all_bytes == b""


def test_an_alias_in_the_query_of_a_handshake_is_replaced(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, MODELS="rt=gpt-realtime,gpt-*", **PROVIDER_KEY)
    for name, sent in (("rt", b"gpt-realtime"), ("gpt-x", b"gpt-x")):
        with running.client() as client:
            client.request("GET", "/v1/realtime?a=b&model=" + name, None, UPGRADE + KEY)
            head = by_hand.accept().read_until(b"\r\n\r\n")
        assert head.startswith(b"GET /v1/realtime?a=b&model=%b HTTP/1.1" % sent)


def test_a_handshake_for_an_allowed_model_is_relayed(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, MODELS="gpt-realtime", **PROVIDER_KEY)
    client, reply, _, head = open_tunnel(by_hand, running, KEY)

    with client:
        assert reply.status == 101
        assert head.startswith(b"GET /v1/realtime?model=gpt-realtime ")


# ---- no other upgrade


@pytest.mark.parametrize(
    "settings",
    [{}, {**PROVIDER_KEY, "PATHS": "* /v1/realtime"}],
    ids=["no provider key", "provider key"],
)
@pytest.mark.parametrize("method,fields", [
    (
        "GET",
        [
            ("Connection", "Upgrade, HTTP2-Settings"),
            ("Upgrade", "h2c"),
            ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
        ],
    ),
    ("GET", [("Connection", "Upgrade"), ("Upgrade", "h2c, websocket")]),
    ("GET", [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Upgrade", "h2c")]),
    ("GET", [("Connection", "Upgrade"), ("Upgrade", "TLS/1.0")]),
    ("GET", [("Connection", "Upgrade"), ("Upgrade", "websocket/13")]),
    ("GET", [("Upgrade", "websocket")]),
    ("GET", [("Connection", "close"), ("Upgrade", "websocket")]),
    ("GET", [("Connection", "Upgrade")]),
], ids=[
    "h2c",
    "h2c and websocket",
    "websocket and h2c",
    "TLS",
    "with a version",
    "not in Connection",
    "close in Connection",
    "nothing named",
])
def test_every_other_upgrade_is_an_ordinary_request(upstream, relay, settings, method, fields):
    upstream.answer = OK.replace(
        b"Content-Type", b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Type"
    )
    reply = relay(**settings).ask(method, "/v1/realtime", fields=KEY + fields)

    assert reply.status == 200
    assert reply.complete
    assert reply.get("upgrade") is None

    received = upstream.received[0]

    assert received.field("upgrade") is None
    assert received.field("connection") is None
    assert received.field("http2-settings") is None


def test_a_101_to_a_request_without_an_upgrade_is_a_502(upstream, relay):
    upstream.answer = SWITCH + b"\r\n"
    assert relay().ask().status == 502
