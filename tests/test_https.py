"""Over HTTPS everything is as it is over plain HTTP, and an end says whether it is one.

The first part runs tests of other files against a relay that serves TLS: pytest looks for the
fixture `relay` in the file in which it finds a test.
"""
import contextlib
import socket
import ssl
import subprocess
import threading
import time

import pytest

import aiproxy
from support import (
    CHAT, EVENT_HEAD, PATIENCE, Client, Program, Relay, chunk, client_tls, event, make_certificate,
    run_program,
)

# Behaviour that must not change (these names are fixtures and tests for pytest, too).
from test_both_directions import (  # noqa: F401
    by_hand,
    test_both_sides_close_when_the_response_ends_first,
)
from test_cancel import (  # noqa: F401
    running,
    test_a_disconnect_after_pipelined_bytes_is_detected,
    test_a_disconnect_does_not_affect_other_clients,
    test_a_disconnect_during_an_upload_closes_the_upstream_connection,
    test_a_disconnect_under_back_pressure_is_detected,
    test_pipelined_bytes_are_not_taken_for_a_disconnect,
    test_when_the_client_disconnects_the_upstream_connection_is_closed,
)
from test_limits import (  # noqa: F401
    limit,
    test_a_client_that_takes_a_byte_now_and_then_is_cut,
    test_a_lingering_close_ends_when_the_client_is_silent,
    test_a_refused_upload_of_3_MB_is_read_to_its_end_and_not_as_requests,
    test_the_longest_idle_client_makes_room_for_a_new_one,
)
from test_requests import (  # noqa: F401
    start_relay,
    test_nothing_is_carried_out_after_a_refused_request,
)
from test_streaming import (  # noqa: F401
    test_an_event_is_relayed_before_the_next_one_is_sent,
    test_an_http10_client_gets_the_stream_as_an_until_close_body,
    test_an_http10_client_sees_an_incomplete_body_by_a_reset,
    test_an_incomplete_chunked_body_gets_no_last_chunk,
    test_an_incomplete_content_length_body_stays_incomplete,
)
from test_websocket import (  # noqa: F401
    open_tunnel,
    test_bytes_sent_before_the_end_of_the_handshake_are_not_lost,
    test_when_either_side_closes_the_other_gets_the_rest_and_is_closed,
)

HIDDEN = {"KEY": "sk-hidden-key", "CLIENT_KEYS": "alice=ck-alice"}
AUTH = [("Authorization", "Bearer ck-alice")]


@pytest.fixture
def relay(upstream, client_certificate):
    """As in conftest.py, but for HTTPS."""
    running = []

    def start(**settings):
        settings.setdefault("UPSTREAM", upstream.url)
        running.append(Relay(**client_certificate, **settings))
        return running[-1]

    yield start

    for one in running:
        one.close()


@pytest.fixture
def hidden(relay):
    return relay(**HIDDEN)


@pytest.fixture
def either(upstream):
    return upstream


@pytest.fixture(scope="module")
def restricted(client_certificate):
    yield from start_relay(
        **client_certificate, **HIDDEN,
        PATHS="/v1/chat/completions, GET /v1/models, * /v1/models/*, * /v1/files/*/content")


# -- the connection

def test_TLS_1_2_and_newer_are_spoken_with_http_1_1(hidden):
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_tls()
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        with context.wrap_socket(socket.create_connection(hidden.address)) as sock:
            assert sock.version() == version.name.replace("_", ".")
            assert sock.selected_alpn_protocol() == "http/1.1"
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_plain_http_gets_a_plain_400_that_says_so(hidden):
    with Client(hidden.address) as client:
        client.request("POST", CHAT, b"{}", AUTH)
        reply = client.read_reply()
        assert (reply.status, reply.code) == (400, "https_required")
        assert reply.complete and client.ended()
    assert hidden.wait_for_record()["outcome"] == "https_required"
    assert hidden.ask("GET", "/health").status == 200


GARBAGE = {
    "a byte": b"\x16",
    "no handshake": b"\x16\x03\x01\x00\x05hello",
    "a broken hello": b"\x16\x03\x01\x02\x00\x01" + bytes(600),
    "garbage": b"\x16" * 100,
}


@pytest.mark.parametrize("data", list(GARBAGE.values()), ids=list(GARBAGE))
def test_garbage_is_hung_up_on_without_a_word_in_the_log(hidden, capfd, data, no_thread_fails):
    with socket.create_connection(hidden.address, PATIENCE) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        # It may have been hung up on by now: ENOTCONN is an OSError of no special class.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                pass
    assert hidden.ask("GET", "/health").status == 200
    assert hidden.wait_for_record()["path"] == "/health"
    assert capfd.readouterr().err == ""


def test_a_handshake_is_part_of_the_time_for_the_first_head(hidden, limit):  # noqa: F811
    limit(HEAD_SECONDS=0.3)
    began = time.monotonic()
    with Client(hidden.address) as silent, Client(hidden.address) as slow:
        slow.send(b"\x16\x03\x01")
        assert silent.ended() and slow.ended()
    assert 0.2 < time.monotonic() - began < 20      # HEAD_SECONDS is 30 otherwise


def test_slow_handshakes_hold_up_nobody(hidden):
    slow = [Client(hidden.address) for _ in range(20)]
    for client in slow:
        client.send(b"\x16\x03\x01\x02")
    assert hidden.chat().status == 200
    for client in slow:
        client.sock.close()


def test_a_client_whose_handshake_is_not_over_makes_room(relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "NEW_SECONDS", 0)
    running = relay(**HIDDEN, MAX_CONNECTIONS=2)
    with Client(running.address), Client(running.address):
        deadline = time.monotonic() + PATIENCE
        while len(running.server.idle) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.chat().status == 200


def test_a_session_is_resumed(hidden):
    context = client_tls()
    session = None
    for is_resumed in (False, True):
        with context.wrap_socket(socket.create_connection(hidden.address), session=session) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
            assert sock.session_reused == is_resumed
            session = sock.session


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_megabytes_pass_both_ways(upstream, hidden, framing):
    size = 3 << 20
    begin = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    upstream.answer = lambda received: received.send(begin + received.body)
    body = bytes(range(256)) * (size // 256)
    fields = AUTH + [("Transfer-Encoding", "chunked")] if framing == "chunked" else AUTH
    with hidden.client() as client:
        for _ in range(2):
            sent = chunk(body) + b"0\r\n\r\n" if framing == "chunked" else body
            # One after the other: before 3.13 an SSLSocket is for one thread at a time.
            client.request("POST", CHAT, sent, fields)
            assert client.read_reply().body == body


def test_who_sends_20_MB_in_vain_can_read_why(hidden):
    with hidden.client() as client:
        try:
            client.request("POST", CHAT, bytes(20 << 20))
        except ConnectionError:
            pass                            # a reset may stop it, but the response must be there
        assert client.read_reply().status == 401


# -- ends

def answer_stream(end):
    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")) + end)
        if not end:
            received.close()
    return answer


@pytest.mark.parametrize("fields", [[], [("Connection", "close")]], ids=["kept", "close"])
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
def test_close_notify_is_sent_at_a_clean_end_and_never_at_a_cut(upstream, hidden, version, fields):
    for end, is_clean in ((b"0\r\n\r\n", True), (b"", False)):
        upstream.answer = answer_stream(end)
        with hidden.client() as client:
            client.request("POST", CHAT, b"{}", AUTH + fields, version)
            assert client.read_head().status == 200
            if is_clean and version == "HTTP/1.1":
                assert b"0\r\n\r\n" in client.read_until(b"0\r\n\r\n")
                if not fields:
                    continue
            try:
                while client.more():
                    pass
                saw_an_end = True
            except ConnectionError:
                saw_an_end = False
        assert saw_an_end == is_clean


def test_an_error_of_our_own_ends_cleanly(hidden):
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}")
        assert client.read_reply().status == 401
        assert not client.more()            # a ConnectionError without close_notify


@pytest.mark.parametrize("phase", ["before the head", "mid-stream", "not streaming"])
def test_a_client_that_says_close_notify_has_gone(upstream, hidden, phase):
    first = {"before the head": b"", "mid-stream": EVENT_HEAD + chunk(event("one")),
             "not streaming": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"}[phase]
    upstream.answer = lambda received: received.send(first)
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        received = upstream.wait_for()
        if first:
            client.read_until(b"one\n\n" if b"one" in first else b"half")
        say_close_notify(client)
        assert received.wait_closed() is not None
    assert hidden.wait_for_record()["outcome"] == "client_gone"


def say_close_notify(client):
    """End this direction of TLS only, and do not wait for the other."""
    client.sock.settimeout(0)
    try:
        client.sock.unwrap()
    except ssl.SSLError:            # it has not said so itself, or has hung up already
        pass
    client.sock.settimeout(PATIENCE)


def test_a_websocket_client_may_end_its_half(by_hand, relay):  # noqa: F811
    running = relay(UPSTREAM=by_hand.url)
    client, _, peer, _ = open_tunnel(by_hand, running)
    with client:
        client.send(b"last words")
        say_close_notify(client)
        assert peer.read_exactly(10) == b"last words"
        assert peer.ended()
        peer.send(b"and more")
        assert client.read_exactly(8) == b"and more"
        peer.sock.close()
        assert not client.more()


# -- many, and one too many

def test_a_tls_client_that_finds_no_room_can_read_why(relay, upstream):
    gate = threading.Event()
    upstream.answer = lambda received: gate.wait(PATIENCE)
    running = relay(**HIDDEN, MAX_CONNECTIONS=1, ORIGINS="https://app.example")
    with running.client() as first:
        first.request("POST", CHAT, b"{}", AUTH)
        upstream.wait_for()
        reply = running.chat(fields=[("Origin", "https://app.example")])
        assert (reply.status, reply.code) == (503, "server_busy")
        assert reply.get("access-control-allow-origin") == "https://app.example"
        gate.set()


def test_only_so_many_refusals_a_second_cost_a_handshake(relay, upstream, monkeypatch):
    monkeypatch.setattr(aiproxy, "TLS_REFUSALS", 1)
    gate = threading.Event()
    upstream.answer = lambda received: gate.wait(PATIENCE)
    running = relay(**HIDDEN, MAX_CONNECTIONS=1)
    with running.client() as first:
        first.request("POST", CHAT, b"{}", AUTH)
        upstream.wait_for()
        statuses = []
        for _ in range(4):
            try:
                statuses.append(running.chat().status)
            except OSError:
                statuses.append("hung up")
        gate.set()
    assert statuses[0] == 503 and set(statuses) <= {503, "hung up"}
    assert "hung up" in statuses


def test_many_streams_at_once_are_relayed_whole(upstream, hidden):
    count, events = 100, 20
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD)
        gate.wait(PATIENCE)
        for number in range(events):
            received.send(chunk(event("number %d" % number)))
        received.send(b"0\r\n\r\n")

    upstream.answer = answer
    clients = [hidden.client() for _ in range(count)]
    for client in clients:
        client.request("POST", CHAT, b"{}", AUTH)
    heads = [client.read_head() for client in clients]
    gate.set()
    for client, reply in zip(clients, heads):
        client.read_body(reply)
        assert reply.complete and reply.body.count(b"number") == events
        client.sock.close()


# -- our own pages and the settings

def test_a_page_from_our_own_https_address_may_call_us(relay):
    running = relay(KEY="sk-hidden-key")
    for scheme, status in (("https", 200), ("http", 403)):
        fields = [("Origin", "%s://127.0.0.1:8000" % scheme)]
        assert running.ask("GET", "/v1/models", fields=fields).status == status


def test_the_banner_says_https_and_the_demo_answers(client_certificate):
    environ = {"AIPROXY_" + name: value for name, value in client_certificate.items()}
    with Program("--demo", env=environ) as program:
        assert program.url.startswith("https://127.0.0.1:")
        program.wait_for_line(program.errors, "First event after")


def settings_error(**settings):
    with pytest.raises(aiproxy.SettingError) as caught:
        aiproxy.Settings({"AIPROXY_" + name: str(value) for name, value in settings.items()})
    return str(caught.value)


def test_a_certificate_that_cannot_be_used_stops_the_start(client_certificate, tmp_path):
    certificate, key = client_certificate["TLS_CERT"], client_certificate["TLS_KEY"]
    other = make_certificate(str(tmp_path), key="other")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

    assert settings_error(TLS_KEY=key).startswith("AIPROXY_TLS_KEY is set but AIPROXY_TLS_CERT")
    for cert in (str(tmp_path / "missing"), str(tmp_path), key, broken, certificate):
        message = settings_error(TLS_CERT=cert)
        assert message.startswith("AIPROXY_TLS_CERT: ") and "\n" not in message
        assert (str(cert) in message) == ("cannot be read" in message)
    for private in (str(tmp_path / "missing"), certificate, other[1]):
        message = settings_error(TLS_CERT=certificate, TLS_KEY=private)
        assert message.startswith("AIPROXY_TLS_KEY: ") and "\n" not in message
    assert "does not belong" in settings_error(TLS_CERT=certificate, TLS_KEY=other[1])


def test_the_key_may_stand_in_the_certificates_file(client_certificate, tmp_path):
    both = tmp_path / "both.pem"
    texts = [open(path).read() for path in client_certificate.values()]
    both.write_text("".join(texts))
    settings = aiproxy.Settings({"AIPROXY_TLS_CERT": str(both)})
    assert settings.scheme == "https"
    assert "PRIVATE" not in str(settings.shown)


def test_an_encrypted_key_is_an_error_and_no_prompt(client_certificate, tmp_path):
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-aes128", "-passout", "pass:secret-word"]
    command += ["-in", client_certificate["TLS_KEY"], "-out", str(locked)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    environ = {"AIPROXY_TLS_CERT": client_certificate["TLS_CERT"], "AIPROXY_TLS_KEY": str(locked)}
    done = run_program("--check", env=environ)
    assert done.returncode == 2
    assert "AIPROXY_TLS_KEY: the private key is encrypted" in done.stderr


def test_an_option_that_pypy_does_not_name_is_set(client_certificate, monkeypatch):
    monkeypatch.delattr(ssl, "OP_NO_RENEGOTIATION", raising=False)
    files = {"AIPROXY_" + name: path for name, path in client_certificate.items()}
    assert aiproxy.Settings(files).tls.options & 1 << 30
