"""The way up: connections kept alive, requests never sent twice, redirects not followed, proxies honoured, certificates verified."""
import socket
import threading

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Upstream, chunk, event, make_certificate, server_tls


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """get(name) → the paths of a certificate for this host name and of its key, made once."""
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


ANSWERS = {"length": OK, "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n", "events": EVENT_HEAD + chunk(event("1")) + b"0\r\n\r\n",
           "no content": b"HTTP/1.1 204 No Content\r\n\r\n", "error": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}"}


@pytest.mark.parametrize("kind", list(ANSWERS))
def test_a_connection_is_used_again(either, relay, kind):
    either.answer = ANSWERS[kind]
    ask_in_turn(relay(UPSTREAM=either.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice"), 3)
    assert either.connections == 1 and len(either.received) == 3


def ask_in_turn(running, times):
    """The last of several replies to one client: when it asks again, the upstream connection of its last request has been given back."""
    with running.client() as client:
        for _ in range(times):
            client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
            reply = client.read_reply()
            assert reply.complete
    return reply


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"], ids=["close", "HTTP/1.0"])
def test_a_connection_that_ends_is_not_used_again(either, relay, head):
    either.answer = head
    ask_in_turn(relay(UPSTREAM=either.url), 2)
    assert either.connections == 2


@pytest.mark.parametrize("act", [lambda received: received.close(), lambda received: received.reset(), lambda received: received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")],
                         ids=["closed", "reset", "stray bytes"])
def test_an_idle_connection_that_ended_or_spoke_out_of_turn_is_not_trusted(either, relay, act):
    answered, acted = threading.Event(), threading.Event()

    def answer(received):
        received.send(OK)
        if received.number == 1:
            assert answered.wait(PATIENCE)
            act(received)
            acted.set()
    either.answer = answer
    running = relay(UPSTREAM=either.url)
    assert running.chat().body == b'{"ok":true}'
    running.wait_for_record()                   # the connection has been given back
    answered.set()
    assert acted.wait(PATIENCE)
    wait_until_readable(running.server.upstreams.idle)
    assert running.chat().body == b'{"ok":true}'
    assert either.connections == 2 and len(either.received) == 2


def wait_until_readable(idle):
    """Until what the upstream did has reached the relay's side of the one idle connection."""
    (connection, _), = idle
    assert aiproxy.wait(PATIENCE, connection.wire, aiproxy.READ)


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_request_that_may_have_been_processed_is_never_sent_twice(either, relay, method):
    def answer(received):
        received.send(OK) if len(either.received) == 1 else received.close()
    either.answer = answer
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200 and running.wait_for_record()       # its connection has been given back
    reply = running.ask(method, CHAT, b"{}" if method == "POST" else None)
    assert (reply.status, reply.code) == (502, "upstream_bad_response") and len(either.received) == 2 and either.connections == 1


def test_an_upload_that_breaks_off_is_not_sent_again(either, relay):
    running = relay(UPSTREAM=either.url)
    assert running.chat().status == 200 and running.wait_for_record()
    with running.client() as client:
        client.request("POST", CHAT, b"x" * 100000, [("Content-Length", "200000")])
        socket.socket.shutdown(either.wait_for(2).connection, socket.SHUT_RDWR)
        assert client.read_reply().code == "upstream_bad_response"
    assert len(either.received) == 2 and either.connections == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_relayed_and_not_followed(upstream, hidden, status):
    with Upstream() as elsewhere:
        upstream.answer = b"HTTP/1.1 %d Moved\r\nLocation: %b/x\r\nContent-Length: 0\r\n\r\n" % (status, elsewhere.url.encode())
        reply = hidden.chat()
        assert reply.status == status and reply.get("location") == elsewhere.url + "/x"
        assert not elsewhere.connections and len(upstream.received) == 1


def test_only_http_can_be_opened(relay):
    handlers = relay().server.opener.handle_open
    assert set(handlers) <= {"http", "https"}


def test_answers_that_cross_stay_with_their_clients(either, relay):
    """Many at once over few connections: each client gets the answer to its own request."""
    def answer(received):
        received.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(received.body) + received.body)
    either.answer = answer
    running, wrong = relay(UPSTREAM=either.url), []

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
    assert not wrong and len(either.received) == 80 and either.connections <= 8


# -- proxies on the way


class Proxy(Upstream):
    """A proxy that is its own upstream: it answers what it is asked, over TLS behind a CONNECT."""

    def __init__(self, tls=None, connect=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        super().__init__()
        self.inner, self.answer, self.connect = tls, self.serve_or_connect, connect

    def serve_or_connect(self, received):
        if not received.line.startswith("CONNECT "):
            return received.send(OK)
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
    """resolves(port): the name provider.test is this machine, on `port`, whatever port was asked for."""
    def to(port):
        original = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: original(*(("127.0.0.1", port) + rest[1:] if host == "provider.test" else (host,) + rest)))
    return to


def test_a_plain_upstream_is_asked_through_http_proxy(relay, monkeypatch):
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", "http://me:pass%%40word@127.0.0.1:%d" % proxy.port)
        running = relay(UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
        assert ask_in_turn(running, 2).body == b'{"ok":true}'
        assert [received.line for received in proxy.received] == ["POST http://provider.test%s HTTP/1.1" % CHAT] * 2
        received = proxy.received[0]
        assert received.field("host") == "provider.test" and received.field("authorization") == "Bearer sk-hidden-key"
        assert received.field("proxy-authorization") == "Basic bWU6cGFzc0B3b3Jk" and proxy.connections == 1


def test_a_tls_upstream_is_reached_by_connect_and_the_proxy_learns_no_key(relay, monkeypatch, certificates):
    monkeypatch.setenv("SSL_CERT_FILE", certificates("provider.test")[0])
    with Proxy(tls=server_tls(*certificates("provider.test"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", "http://me:word@127.0.0.1:%d" % proxy.port)
        running = relay(UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
        assert ask_in_turn(running, 2).body == b'{"ok":true}'
        connect, first, second = proxy.received
        assert connect.line.startswith("CONNECT provider.test:443 ") and connect.field("proxy-authorization") == "Basic bWU6d29yZA=="
        assert b"sk-hidden-key" not in connect.head
        for received in (first, second):
            assert received.line == "POST %s HTTP/1.1" % CHAT and received.field("authorization") == "Bearer sk-hidden-key" and received.field("proxy-authorization") is None


@pytest.mark.parametrize("connect", [b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 502 No\r\n\r\n", b"rubbish\r\n\r\n"], ids=["407", "502", "rubbish"])
def test_a_proxy_that_refuses_is_an_unreachable_upstream(relay, monkeypatch, connect):
    with Proxy(connect=connect) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret-word@127.0.0.1:%d" % proxy.port)
        reply = relay(UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat()
        assert (reply.status, reply.code) == (502, "upstream_unreachable") and b"s3cret-word" not in reply.body


@pytest.mark.parametrize("name", ["provider.test", ".test", "*"])
def test_no_proxy_is_honoured(upstream, relay, monkeypatch, resolves, name):
    resolves(upstream.port)
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", name)
        assert relay(UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat().status == 200
        assert len(upstream.received) == 1 and not proxy.connections


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_a_loopback_upstream_is_never_asked_through_a_proxy(relay, monkeypatch, host):
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))           # bound, but it does not listen
            assert relay(UPSTREAM="http://%s:%d" % (host, nobody.getsockname()[1])).chat().code == "upstream_unreachable"
        assert not proxy.connections


# -- certificates


def test_a_certificate_that_is_trusted_is_accepted(tls_upstream, relay):
    assert relay(UPSTREAM=tls_upstream.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat().body == b'{"ok":true}'
    assert tls_upstream.received[0].field("host") == "localhost:%d" % tls_upstream.port


CERTIFICATES = {"not trusted": ("localhost", "provider.test"), "for another name": ("provider.test", "provider.test")}


@pytest.mark.parametrize("case", list(CERTIFICATES))
def test_a_certificate_that_cannot_be_verified_gets_no_request(relay, monkeypatch, certificates, case):
    served, trusted = CERTIFICATES[case]
    monkeypatch.setenv("SSL_CERT_FILE", certificates(trusted)[0])
    with Upstream(tls=server_tls(*certificates(served))) as fake:
        reply = relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat()
        assert (reply.status, reply.code, reply.get("x-should-retry")) == (502, "upstream_tls_error", "false")
        assert not fake.all_bytes


def test_names_are_tried_at_all_their_addresses(upstream, relay, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (nobody.getsockname(), ("127.0.0.1", upstream.port))]
        original = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: places if host == "provider.test" else original(host, *rest))
        assert relay(UPSTREAM="http://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat().status == 200
