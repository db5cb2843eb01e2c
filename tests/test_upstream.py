"""The upstream side: keep-alive, retries, redirects, proxies and certificates."""

import os
import socket
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import (
    CHAT,
    EVENT_HEAD,
    OK,
    PATIENCE,
    Received,
    Upstream,
    chunk,
    event,
    make_certificate,
    server_tls,
)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """get(name) returns the paths of a certificate for this host name and of its private key."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_certificate(str(tmp_path_factory.mktemp("tls")), name)
        return made[name]

    return get


@pytest.fixture
def tls_upstream(certificates, monkeypatch):
    """An HTTPS upstream at `localhost` whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", certificates("localhost")[0])
    with Upstream(tls=server_tls(*certificates("localhost"))) as fake:
        yield fake


@pytest.fixture(params=["plain", "tls"])
def either(request):
    """A plain and a TLS upstream."""
    return request.getfixturevalue("upstream" if request.param == "plain" else "tls_upstream")


RESPONSES = {
    "length": OK,
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2;x=y\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n"
    ),
    "events": EVENT_HEAD + chunk(event("1")) + b"0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "error": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("kind", list(RESPONSES))
def test_a_connection_is_reused(either, relay, kind):
    either.answer = RESPONSES[kind]
    running = relay(UPSTREAM=either.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

    ask_in_turn(running, 3)

    assert either.connections == 1
    assert len(either.received) == 3


def ask_in_turn(running, times):
    """Send several requests on one client connection; return the last reply.

    When the client asks again, the upstream connection of its last request is back in the pool.
    """
    with running.client() as client:
        for _ in range(times):
            client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
            reply = client.read_reply()
            assert reply.complete
    return reply


NOT_REUSABLE = {
    "close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("response", list(NOT_REUSABLE.values()), ids=list(NOT_REUSABLE))
def test_a_connection_that_will_close_is_not_reused(either, relay, response):
    either.answer = response
    ask_in_turn(relay(UPSTREAM=either.url), 2)
    assert either.connections == 2


def send_unsolicited_bytes(received):
    received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")


IDLE_EVENTS = {
    "closed": Received.close,
    "reset": Received.reset,
    "stray bytes": send_unsolicited_bytes,
}


@pytest.mark.parametrize("act", list(IDLE_EVENTS.values()), ids=list(IDLE_EVENTS))
def test_an_idle_connection_that_closed_or_sent_bytes_is_not_reused(either, relay, act):
    answered = threading.Event()
    acted = threading.Event()

    def answer(received):
        received.send(OK)
        if received.number == 1:
            assert answered.wait(PATIENCE)
            act(received)
            acted.set()

    either.answer = answer
    running = relay(UPSTREAM=either.url)
    assert running.chat().body == b'{"ok":true}'
    # With the record the connection is back in the pool.
    running.wait_for_record()

    answered.set()
    assert acted.wait(PATIENCE)
    wait_until_readable(running.server.service.upstream_handler.pool.idle)

    assert running.chat().body == b'{"ok":true}'
    assert either.connections == 2
    assert len(either.received) == 2


def wait_until_readable(idle):
    """Wait until the upstream's action has reached the relay's end of the one idle connection."""
    ((connection, _),) = idle
    assert aiproxy.wait_ready(connection, aiproxy.READ, PATIENCE)


def close_from_the_second_request_on(upstream):
    def answer(received):
        if len(upstream.received) == 1:
            received.send(OK)
        else:
            received.close()

    upstream.answer = answer


def test_a_request_that_may_have_been_processed_is_not_sent_twice(either, relay):
    close_from_the_second_request_on(either)
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200
    # With the record the connection is back in the pool.
    assert running.wait_for_record()

    reply = running.ask("POST", CHAT, b"{}")

    assert (reply.status, reply.code) == (502, "upstream_bad_response")
    assert len(either.received) == 2
    assert either.connections == 1


IDEMPOTENT = {
    "GET": ("GET", None, []),
    "HEAD": ("HEAD", None, []),
    "Idempotency-Key": ("POST", b"{}", [("Idempotency-Key", "one")]),
}


@pytest.mark.parametrize("method,body,fields", list(IDEMPOTENT.values()), ids=list(IDEMPOTENT))
def test_what_may_be_carried_out_twice_is_sent_again_once(either, relay, method, body, fields):
    close_from_the_second_request_on(either)
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200
    assert running.wait_for_record()

    assert running.ask(method, CHAT, body, fields).status == 502

    assert len(either.received) == 3
    assert either.connections == 2
    assert either.received[1].head == either.received[2].head


def test_a_request_on_a_new_connection_is_not_sent_again(either, relay):
    either.answer = Received.close

    assert relay(UPSTREAM=either.url).ask("GET").status == 502
    assert len(either.received) == 1


@pytest.mark.parametrize("begin", [b"HTTP/1.1 20", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_a_request_whose_response_had_begun_is_not_sent_again(either, relay, begin):
    def answer(received):
        received.send(OK if len(either.received) == 1 else begin)
        if len(either.received) > 1:
            received.close()

    either.answer = answer
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200
    assert running.wait_for_record()

    assert running.ask("GET").status == 502
    assert len(either.received) == 2


@pytest.mark.parametrize("says,connections", [
    (b"timeout=1", 2), (b"timeout=1, max=100", 2), (b"max=5,Timeout = 1", 2), (b"timeout=0", 2),
    (b"timeout=60", 1), (b"max=100", 1), (b"timeout=x", 1),
])
def test_a_connection_is_kept_only_as_long_as_its_upstream_says(
    upstream, relay, says, connections
):
    upstream.answer = OK.replace(b"\r\n\r\n", b"\r\nKeep-Alive: " + says + b"\r\n\r\n", 1)
    running = relay()

    ask_in_turn(running, 2)

    assert upstream.connections == connections


def test_the_address_that_worked_last_comes_first(upstream, relay, monkeypatch):
    original_getaddrinfo = socket.getaddrinfo
    original_connect = socket.socket.connect
    dead = socket.socket()
    dead.bind(("127.0.0.1", 0))             # no listen(): connections are refused
    dead_port = dead.getsockname()[1]
    tried = []

    def getaddrinfo(host, port, *rest):
        if host != "provider.test":
            return original_getaddrinfo(host, port, *rest)
        ports = (dead_port, upstream.port)
        return [original_getaddrinfo("127.0.0.1", port, *rest)[0] for port in ports]

    def connect(sock, address):
        if address[1] in (dead_port, upstream.port):
            tried.append(address[1])
        return original_connect(sock, address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    upstream.answer = OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n", 1)
    running = relay(UPSTREAM="http://provider.test")

    for _ in range(3):
        assert running.chat().status == 200
    dead.close()

    assert tried == [dead_port] + [upstream.port] * 3


def test_early_hints_come_down_in_a_transparent_relay_only(upstream, relay):
    upstream.answer = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nSet-Cookie: a=b\r\n\r\n"
        b"HTTP/1.1 102 Processing\r\n\r\n" + OK)

    with relay().client() as client:
        client.request("GET")
        hints = client.read_until(b"\r\n\r\n")
        assert hints == b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    with relay().client() as client:
        client.request("GET", version="HTTP/1.0")
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    with relay(KEY="sk-hidden-key").client() as client:
        client.request("GET", fields=[("Host", "localhost")])
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_an_early_hint_that_repeats_a_field_of_the_operators_does_not_come_down(upstream, relay):
    upstream.answer = b"HTTP/1.1 103 Early Hints\r\nLink: </tenant-0123456789>\r\n\r\n" + OK
    with relay(UPSTREAM_HEADERS="X-Tenant: tenant-0123456789").client() as client:
        client.request("GET")
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_an_upload_that_the_upstream_interrupted_is_not_sent_again(either, relay):
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200
    assert running.wait_for_record()

    with running.client() as client:
        client.request("POST", CHAT, b"x" * 100000, [("Content-Length", "200000")])
        socket.socket.shutdown(either.wait_for(2).connection, socket.SHUT_RDWR)
        assert client.read_reply().code == "upstream_bad_response"

    assert len(either.received) == 2
    assert either.connections == 1


def redirect(location, status=302):
    head = "HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"
    return (head % (status, location)).encode("latin-1")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_relayed_and_not_followed(upstream, hidden, status):
    with Upstream() as elsewhere:
        location = elsewhere.url + "/x"
        upstream.answer = redirect(location, status)

        reply = hidden.ask("GET", "/v1/models", None, [("x-api-key", "ck-alice")])

        assert reply.status == status
        assert reply.get("location") == location
        assert not elsewhere.connections
        assert len(upstream.received) == 1


# The path of the base URL, the upstream's Location where %s is its own URL, and ours.
LOCATIONS = [
    ("", "%s/v1/models/m", "/v1/models/m"),
    ("", "%s/v1/models/m?x=1#y", "/v1/models/m?x=1#y"),
    ("", "%s", "/"),
    ("", "%s?x", "/?x"),
    ("", "HTTP://u:p@LOCALHOST:%d/x", "/x"),
    ("", "//localhost:%d/x", "/x"),
    ("", "//localhost.:%d/x", "/x"),
    ("", "/v1/models/m", "/v1/models/m"),
    ("", "m?x", "/v1/m?x"),
    ("", "../m", "/m"),
    ("", "?x", "/v1/models?x"),
    ("", "\xe4", "/v1/\xe4"),
    ("/api/v4", "%s/api/v4/models/m", "/v1/models/m"),
    ("/api/v4", "/api/v4/models/m", "/v1/models/m"),
    ("/api/v4", "m", "/v1/m"),
    ("/api/v4", "/api/v4", "/v1"),
    ("/api/v4", "%s/api/v44/x", "/api/v44/x"),
]
ELSEWHERE = [
    "https://elsewhere.test/x", "//elsewhere.test/x", "http://localhost:1/x", "https://localhost/x",
    "http://localhost@elsewhere.test/", "mailto:a@b.test", "%s//elsewhere.test/x", "http://[/x",
    "/\\elsewhere.test/x", "http://localhost:x/",
]


@pytest.fixture
def by_name(upstream, relay):
    """start(base) returns a relay with a provider key whose upstream is called localhost."""
    def start(base=""):
        url = upstream.url.replace("127.0.0.1", "localhost") + base
        return relay(UPSTREAM=url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    return start


def fill_in(location, upstream):
    if "%d" in location:
        return location % upstream.port
    return location.replace("%s", "http://localhost:%d" % upstream.port)


@pytest.mark.parametrize("base,location,expected", LOCATIONS)
def test_a_location_on_the_upstreams_host_becomes_a_path_of_ours(
    upstream, by_name, base, location, expected
):
    upstream.answer = redirect(fill_in(location, upstream), 307)
    running = by_name(base)
    client_key = [("x-api-key", "ck-alice")]

    for method, body in (("GET", None), ("POST", b"{}")):
        path = "/v1/models" if method == "GET" else CHAT
        if path == CHAT and not location.startswith(("%", "/", "H")):
            continue                # relative to another path
        reply = running.ask(method, path, body, client_key)
        assert reply.status == 307
        assert reply.all("location") == [expected]


@pytest.mark.parametrize("location", ELSEWHERE)
def test_a_redirect_elsewhere_is_refused_if_it_would_take_a_body_there(upstream, by_name, location):
    upstream.answer = redirect(fill_in(location, upstream))
    running = by_name()

    reply = running.chat()

    assert (reply.status, reply.code) == (502, "upstream_bad_response")
    assert reply.get("location") is None
    assert reply.get("x-should-retry") == "false"
    assert b"elsewhere" not in reply.body

    reply = running.ask("GET", "/v1/models", None, [("x-api-key", "ck-alice")])
    assert (reply.status, reply.get("location")) == (302, fill_in(location, upstream))


def test_a_location_in_a_success_is_no_redirect(upstream, by_name):
    upstream.answer = redirect("https://elsewhere.test/x", 201)
    assert by_name().chat().get("location") == "https://elsewhere.test/x"


def test_a_transparent_relay_leaves_redirects_alone(upstream, relay):
    upstream.answer = redirect(upstream.url + "/v1/x")
    assert relay().chat().get("location") == upstream.url + "/v1/x"


def test_only_http_and_https_urls_can_be_opened(relay):
    handlers = relay().server.service.opener.handle_open
    assert set(handlers) <= {"http", "https"}


def test_each_of_many_concurrent_clients_receives_its_own_response(either, relay):
    def echo(received):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(received.body)
        received.send(head + received.body)

    either.answer = echo
    running = relay(UPSTREAM=either.url)
    wrong = []

    def ask(number):
        with running.client() as client:
            for turn in range(10):
                client.request("POST", CHAT, b"%d.%d" % (number, turn))
                if client.read_reply().body != b"%d.%d" % (number, turn):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert len(either.received) == 80
    assert either.connections <= 8


# -- proxies


class Proxy(Upstream):
    """A proxy that is its own upstream: it answers every request, over TLS after a CONNECT."""

    def __init__(self, tls=None, connect=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        super().__init__()
        self.inner = tls
        self.connect = connect
        self.answer = self.serve_or_connect

    def serve_or_connect(self, received):
        if not received.line.startswith("CONNECT "):
            received.send(OK)
            return

        received.send(self.connect)
        if self.connect.startswith(b"HTTP/1.1 200"):
            tls = self.inner.wrap_socket(received.connection, server_side=True)
            rest = b""
            while rest is not None:
                inner = type(received)(tls, received.number)
                rest = self.read_request(inner, rest)
                if rest is not None:
                    inner.send(OK)


@pytest.fixture
def resolves(monkeypatch):
    """resolves(port) lets provider.test resolve to this machine, always to this port."""
    original = socket.getaddrinfo

    def resolve_to(port):
        def getaddrinfo(host, *rest):
            if host == "provider.test":
                return original("127.0.0.1", port, *rest[1:])
            return original(host, *rest)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return resolve_to


def test_a_plain_upstream_is_reached_through_http_proxy(relay, monkeypatch):
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", "http://me:pass%%40word@127.0.0.1:%d" % proxy.port)
        running = relay(
            UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"
        )

        assert ask_in_turn(running, 2).body == b'{"ok":true}'

        line = "POST http://provider.test%s HTTP/1.1" % CHAT
        assert [received.line for received in proxy.received] == [line, line]
        received = proxy.received[0]
        assert received.field("host") == "provider.test"
        assert received.field("authorization") == "Bearer sk-hidden-key"
        assert received.field("proxy-authorization") == "Basic bWU6cGFzc0B3b3Jk"
        assert proxy.connections == 1


def test_a_proxy_for_a_tls_upstream_sees_no_provider_key(relay, monkeypatch, certificates):
    monkeypatch.setenv("SSL_CERT_FILE", certificates("provider.test")[0])
    with Proxy(tls=server_tls(*certificates("provider.test"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", "http://me:word@127.0.0.1:%d" % proxy.port)
        running = relay(
            UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"
        )

        assert ask_in_turn(running, 2).body == b'{"ok":true}'

        connect, first, second = proxy.received
        assert connect.line.startswith("CONNECT provider.test:443 ")
        assert connect.field("proxy-authorization") == "Basic bWU6d29yZA=="
        assert b"sk-hidden-key" not in connect.head
        for received in (first, second):
            assert received.line == "POST %s HTTP/1.1" % CHAT
            assert received.field("authorization") == "Bearer sk-hidden-key"
            assert received.field("proxy-authorization") is None


FAILED_CONNECTS = {
    "407": b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
    "502": b"HTTP/1.1 502 No\r\n\r\n",
    "rubbish": b"rubbish\r\n\r\n",
    "bytes before TLS": b"HTTP/1.1 299 Go on\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("connect", list(FAILED_CONNECTS.values()), ids=list(FAILED_CONNECTS))
def test_a_proxy_that_refuses_is_an_unreachable_upstream(relay, monkeypatch, connect):
    with Proxy(connect=connect) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret-word@127.0.0.1:%d" % proxy.port)
        running = relay(
            UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"
        )

        reply = running.chat()

        assert (reply.status, reply.code) == (502, "upstream_unreachable")
        assert b"s3cret-word" not in reply.body


@pytest.mark.parametrize("settings", [{}, {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"}],
                         ids=["transparent", "provider key"])
def test_what_a_proxy_says_of_its_own_credentials_stays_here(relay, monkeypatch, settings):
    def answer(received):
        received.send(b"HTTP/1.1 407 No\r\nContent-Length: %d\r\n\r\n%b"
                      % (len(received.head), received.head))

    with Proxy() as proxy:
        proxy.answer = answer
        monkeypatch.setenv("HTTP_PROXY", "http://me:s3cret-word@127.0.0.1:%d" % proxy.port)
        reply = relay(UPSTREAM="http://provider.test", **settings).chat()

    assert (reply.status, reply.code) == (502, "upstream_unreachable")
    assert b"Basic" not in reply.body and b"407" in reply.body


@pytest.mark.parametrize("name", ["provider.test", ".test", "*"])
def test_no_proxy_is_honoured(upstream, relay, monkeypatch, resolves, name):
    resolves(upstream.port)
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", name)
        running = relay(
            UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"
        )

        assert running.chat().status == 200
        assert len(upstream.received) == 1
        assert not proxy.connections


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_a_loopback_upstream_is_never_reached_through_a_proxy(relay, monkeypatch, host):
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with socket.socket() as nobody:
            # Bound, but it does not listen.
            nobody.bind(("127.0.0.1", 0))
            running = relay(UPSTREAM="http://%s:%d" % (host, nobody.getsockname()[1]))
            assert running.chat().code == "upstream_unreachable"
        assert not proxy.connections


UNUSABLE = [
    "http://me:pa/ss@proxy.test:8080",
    "http://me:1#ss@proxy.test:8080",
    "http://me:1?ss@proxy.test:8080",
    "http://:80",
    "http://proxy.test:port",
    "http://proxy.test:99999",
    "http://proxy.test:0",
    "http://proxy.test/path",
    "proxy:x",
    "socks5://me:s3cret@127.0.0.1:1080",
    "SOCKS5h://127.0.0.1:1080",
    "socks4://127.0.0.1:1080",
    "https://proxy.test:8443",
    "ftp://proxy.test",
]


@pytest.mark.parametrize("url", UNUSABLE)
@pytest.mark.parametrize("name,scheme", [
    ("HTTPS_PROXY", "https"),
    ("http_proxy", "http"),
    ("ALL_PROXY", "https"),
    ("all_proxy", "http"),
])
def test_a_proxy_that_cannot_be_used_stops_the_start_and_is_not_shown(
    monkeypatch, name, scheme, url
):
    monkeypatch.setenv(name, url)
    with pytest.raises(aiproxy.SettingError) as raised:
        aiproxy.Settings({"AIPROXY_UPSTREAM": scheme + "://provider.test"})
    assert str(raised.value).startswith(name + ": ")
    assert url not in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("environ,upstream,shown", [
    ({"ALL_PROXY": "http://me:pw@a.test:1"}, "https://provider.test", ("ALL_PROXY", "a.test:1")),
    ({"ALL_PROXY": "a.test:1"}, "http://provider.test", ("ALL_PROXY", "a.test:1")),
    (
        {"ALL_PROXY": "socks5://a.test:1", "HTTPS_PROXY": "http://b.test:2/"},
        "https://provider.test",
        ("HTTPS_PROXY", "b.test:2"),
    ),
    ({"HTTP_PROXY": "socks5://a.test:1"}, "https://provider.test", None),
    ({"ALL_PROXY": "socks5://a.test:1"}, "http://127.1:11434", None),
    ({"ALL_PROXY": "socks5://a.test:1", "NO_PROXY": "*"}, "http://provider.test", None),
], ids=str)
def test_a_proxy_is_shown_among_the_settings_in_force(monkeypatch, environ, upstream, shown):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = aiproxy.Settings({"AIPROXY_UPSTREAM": upstream})

    in_force = [pair for pair in settings.shown.items() if pair[0].endswith("_PROXY")]
    assert in_force == ([shown] if shown else [])


# -- certificates


def test_a_trusted_certificate_is_accepted(tls_upstream, relay):
    running = relay(UPSTREAM=tls_upstream.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    assert running.chat().body == b'{"ok":true}'
    assert tls_upstream.received[0].field("host") == "localhost:%d" % tls_upstream.port


CERTIFICATES = {  # what is wrong: (the host name served, the host name trusted)
    "not trusted": ("localhost", "provider.test"),
    "for another name": ("provider.test", "provider.test"),
}


@pytest.mark.parametrize("case", list(CERTIFICATES))
def test_an_unverified_upstream_receives_nothing(relay, monkeypatch, certificates, case):
    served, trusted = CERTIFICATES[case]
    monkeypatch.setenv("SSL_CERT_FILE", certificates(trusted)[0])
    with Upstream(tls=server_tls(*certificates(served))) as fake:
        running = relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

        reply = running.chat()

        assert (reply.status, reply.code) == (502, "upstream_tls_error")
        assert reply.get("x-should-retry") == "false"
        assert not fake.all_bytes


@pytest.mark.parametrize("family", [socket.AF_INET, 9999], ids=["nobody listens", "no such family"])
def test_all_addresses_of_a_host_name_are_tried(upstream, relay, monkeypatch, family):
    original = socket.getaddrinfo

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        results = [
            (family, socket.SOCK_STREAM, 6, "", nobody.getsockname()),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", upstream.port)),
        ]

        def getaddrinfo(host, *rest):
            if host == "provider.test":
                return results
            return original(host, *rest)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        running = relay(
            UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"
        )

        assert running.chat().status == 200


def test_the_time_that_a_look_up_takes_counts(upstream, relay, monkeypatch):
    """It cannot be interrupted, but what it leaves of the time to connect is what there is."""
    running = relay(UPSTREAM=upstream.url, CONNECT_TIMEOUT="0.1")
    look_up = socket.getaddrinfo

    def slowly(*args):
        time.sleep(0.2)
        return look_up(*args)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    reply = running.chat()

    assert (reply.status, reply.code) == (504, "upstream_timeout")
    assert not upstream.received


def test_broken_tls_in_the_middle_of_an_upload_is_an_error_at_once(
        certificates, relay, monkeypatch):
    """Nothing more can be read of such a connection, however long it stays open."""
    monkeypatch.setenv("SSL_CERT_FILE", certificates("localhost")[0])
    with ByHand() as by_hand:
        url = by_hand.url.replace("http://127.0.0.1", "https://localhost")
        client = relay(UPSTREAM=url).client()
        client.request("POST", "/v1/files", b"x" * 100000, [("Content-Length", "200000")])
        peer = by_hand.accept()
        tls = server_tls(*certificates("localhost")).wrap_socket(peer.sock, server_side=True)
        tls.recv(10)
        os.write(tls.fileno(), b"\x17\x03\x03\0\x20" + bytes(32))      # a record with a bad MAC

        with client, tls:
            assert client.read_reply().code == "upstream_bad_response"
