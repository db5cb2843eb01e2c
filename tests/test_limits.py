"""Limits of time and number: slow, silent and too many clients are disconnected in time.

So are slow upstreams, and no other request is affected.
"""

import http.client
import socket
import sys
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, EVENT_HEAD, OK, PATIENCE, allow_no_silence, chunk, event, watch

KEY = ("Authorization", "Bearer ck-alice")
CHUNKED = ("Transfer-Encoding", "chunked")
# seconds: a limit that a test waits for, and one that it never reaches
SHORT = 0.3
LONG = 3600


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


@pytest.fixture
def limit(monkeypatch):
    """limit(HEAD_SECONDS=...): another value for a constant of aiproxy.py."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(aiproxy, name, value)

    return change


def trickle(client, data=b"a"):
    """Send `data` again and again until a response arrives.

    The status of the response; None if there was none in time.
    """
    client.sock.settimeout(0.05)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.send(data)
        except OSError:
            # it has been disconnected: the response is there
            pass
        try:
            client.more()
            client.sock.settimeout(PATIENCE)
            return client.read_reply().status
        except socket.timeout:
            pass

    return None


def let_time_pass(relay):
    """Wait until HEAD_SECONDS have passed on the relay's own clock.

    A new connection may be silent for that long.
    """
    with relay.client() as silent:
        assert silent.read_reply().status == 408


# ---- a request's head and body


def test_a_new_client_that_sends_nothing_gets_a_408(relay, limit):
    limit(HEAD_SECONDS=SHORT)
    running = relay()

    with running.client() as client:
        reply = client.read_reply()
        assert reply.status == 408
        assert reply.code == "request_timeout"
        assert client.ended()

    assert running.wait_for_record()["outcome"] == "request_timeout"


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["request line", "fields"])
def test_a_head_sent_a_byte_at_a_time_has_one_deadline(upstream, relay, limit, first):
    limit(HEAD_SECONDS=SHORT)
    with relay().client() as client:
        client.send(first)
        assert trickle(client) == 408
        assert client.ended()

    assert upstream.all_bytes == b""


def test_empty_lines_do_not_extend_the_deadline(relay, limit):
    limit(IDLE_SECONDS=LONG)
    with relay().client() as client:
        client.request()
        assert client.read_reply().status == 200
        limit(HEAD_SECONDS=SHORT)
        client.send(b"\r\n" * 4)
        assert client.read_reply().status == 408


@pytest.mark.parametrize("empty_lines", [0, 1, 2])
def test_a_keep_alive_client_may_be_idle_for_longer_than_a_head_may_take(
        relay, limit, empty_lines):
    """Also behind empty lines that come late behind a body: they begin no request."""
    limit(IDLE_SECONDS=LONG)
    running = relay()

    with running.client() as client:
        client.request()
        assert client.read_reply().status == 200

        limit(HEAD_SECONDS=SHORT)
        let_time_pass(running)
        for _ in range(empty_lines):
            client.send(b"\r\n")
            let_time_pass(running)
        # it is still connected
        client.request()
        assert client.read_reply().status == 200

        client.send(b"G")
        assert client.read_reply().status == 408
        assert client.ended()


def test_an_empty_line_behind_a_request_begins_no_other(relay, limit):
    limit(IDLE_SECONDS=LONG)
    running = relay()
    with running.client() as client:
        client.request("POST", CHAT, b"{}\r\n", [("Content-Length", "2")])
        assert client.read_reply().status == 200

        limit(HEAD_SECONDS=SHORT)
        let_time_pass(running)
        client.request()
        assert client.read_reply().status == 200


def test_an_idle_keep_alive_client_is_disconnected_without_a_response(relay, limit):
    limit(IDLE_SECONDS=SHORT, HEAD_SECONDS=LONG)
    with relay().client() as client:
        client.request()
        assert client.read_reply().status == 200
        assert client.ended()
        assert not client.data


@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["streamed", "buffered"])
@pytest.mark.parametrize("manner", ["silent", "a byte at a time", "a chunk at a time"])
def test_a_body_below_the_minimum_data_rate_is_refused(upstream, relay, limit, manner, settings):
    limit(BODY_GRACE=SHORT, PREFETCH_SECONDS=LONG)
    framing = CHUNKED if "chunk" in manner else ("Content-Length", "1000000")

    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [framing])
        if manner == "silent":
            assert client.read_reply().status == 408
        else:
            assert trickle(client, chunk(b"a") if "chunk" in manner else b"a") == 408
        assert client.ended()

    assert upstream.all_bytes == b""


@pytest.mark.parametrize(
    "framing", [CHUNKED, ("Content-Length", "1000000")], ids=["chunked", "length"]
)
def test_an_upload_that_becomes_too_slow_stays_incomplete_upstream(by_hand, relay, limit, framing):
    body, more = bytes(70000), b"more"
    if framing == CHUNKED:
        body, more = chunk(body), chunk(more)

    limit(BODY_GRACE=SHORT, BODY_RATE=1 << 20)
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", "/v1/files", body, [framing])
        peer = by_hand.accept()
        client.send(more)
        assert client.read_reply().status == 408
        assert client.ended()

        while peer.more():
            pass

        assert b"\r\n\r\n" in peer.data
        assert not peer.data.endswith(b"0\r\n\r\n")


def test_a_fast_beginning_pays_for_no_slow_end(relay, limit):
    """Else a client could keep its place, and the memory of its body, for hours."""
    limit(BODY_GRACE=SHORT, STALL_SECONDS=SHORT)
    with relay(KEY="sk-hidden-key").client() as client:
        # at BODY_RATE, enough for 1000 s
        client.request("POST", CHAT, b"x" * 1024000, [("Content-Length", "2000000")])
        assert trickle(client) == 408


def test_a_body_above_the_minimum_data_rate_may_take_as_long_as_it_needs(upstream, relay, limit):
    limit(BODY_GRACE=SHORT, BODY_RATE=1)
    running = relay()
    # at BODY_RATE, enough for 6000 s
    body = b"a" * PATIENCE * 100

    with running.client() as client:
        client.request("POST", "/v1/files", body, [("Content-Length", str(len(body) + 1))])
        limit(HEAD_SECONDS=2 * SHORT)
        let_time_pass(running)
        client.send(b"b")
        assert client.read_reply().status == 200

    assert upstream.received[0].body.endswith(b"ab")


@pytest.mark.parametrize(
    "framing", [CHUNKED, ("Content-Length", "1000000")], ids=["chunked", "length"]
)
@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["streamed", "buffered"])
def test_a_fast_beginning_earns_no_long_silence(upstream, relay, limit, framing, settings):
    limit(STALL_SECONDS=SHORT, BODY_RATE=1)
    # at BODY_RATE, enough for a day
    body = bytes(90000)

    with relay(**settings).client() as client:
        client.request("POST", CHAT, chunk(body) if framing == CHUNKED else body, [framing])
        assert client.read_reply().status == 408
        assert client.ended()


@pytest.mark.parametrize("seconds", [0, 1 << 31, 1e300, float("inf")])
def test_a_wait_may_be_of_any_length(seconds):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"a")
        connection = aiproxy.BufferedSocket(ours)
        assert aiproxy.wait_ready(connection, aiproxy.READ, seconds) == [connection]


def test_back_pressure_from_the_upstream_does_not_make_a_body_too_slow(by_hand, relay, limit):
    limit(BODY_GRACE=SHORT, BODY_RATE=1 << 30)
    running = relay(UPSTREAM=by_hand.url)

    with running.client() as client:
        # more than fits into the socket buffers on the way
        body = bytes(20 << 20)
        sender = threading.Thread(target=client.request, args=("POST", "/v1/files", body))
        sender.start()
        peer = by_hand.accept()
        peer.read_request_head()
        limit(HEAD_SECONDS=2 * SHORT)
        let_time_pass(running)

        assert peer.read_exactly(len(body)) == body

        peer.send(OK)
        assert client.read_reply().status == 200

        sender.join()


# ---- a client that does not read its response


def endless(received):
    received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
    while True:
        received.send(bytes(65536))


def test_a_client_that_reads_nothing_is_disconnected_and_so_is_its_upstream(upstream, relay, limit):
    limit(STALL_SECONDS=SHORT)
    ended = threading.Event()

    def answer(received):
        try:
            endless(received)
        except OSError:
            ended.set()

    upstream.answer = answer
    running = relay()

    with running.client() as client:
        client.request()
        assert ended.wait(PATIENCE)
        assert running.wait_for_record()["outcome"] == "client_stalled"
        assert not client.read_reply().complete


def test_the_upstream_does_not_time_out_under_back_pressure_from_the_client(
    upstream, relay, monkeypatch
):
    body = bytes(16 << 20)
    on_tick = aiproxy.ResponseJob.on_tick
    held_back = threading.Semaphore(0)

    def tick_much_later(job):
        if job.unsent:
            job.loop.now += 1000
        on_tick(job)
        if job.unsent:
            held_back.release()

    monkeypatch.setattr(aiproxy.ResponseJob, "on_tick", tick_much_later)
    monkeypatch.setattr(aiproxy, "STALL_SECONDS", LONG)
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    with relay(TIMEOUT=100).client() as client:
        client.request()
        for _ in range(2):
            assert held_back.acquire(timeout=PATIENCE)
        assert client.read_reply().complete


# ---- the upstream


def test_a_tls_upstream_that_does_not_answer_the_handshake_is_a_504(by_hand, relay):
    reply = relay(UPSTREAM=by_hand.url.replace("http:", "https:"), CONNECT_TIMEOUT=SHORT).ask()

    assert reply.status == 504
    assert reply.code == "upstream_timeout"
    assert "AIPROXY_CONNECT_TIMEOUT" in reply.json["error"]["message"]


def test_an_upstream_that_does_not_accept_connections_is_a_504(relay):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # they fill its queue
        waiting = [socket.socket() for _ in range(8)]

        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())

        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        reply = relay(UPSTREAM=url, CONNECT_TIMEOUT=SHORT).ask()
        assert reply.status == 504
        assert reply.code == "upstream_timeout"

        for one in waiting:
            one.close()


@pytest.mark.parametrize(
    "first_bytes",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"],
    ids=["nothing", "half a head", "an interim response"],
)
def test_an_upstream_that_sends_no_head_in_time_is_a_504(by_hand, relay, first_bytes):
    with relay(UPSTREAM=by_hand.url, TIMEOUT=SHORT).client() as client:
        client.request("POST", CHAT, b"{}")
        peer = by_hand.accept()
        peer.send(first_bytes)
        reply = client.read_reply()

        assert reply.status == 504
        assert reply.code == "upstream_timeout"
        assert "AIPROXY_TIMEOUT" in reply.json["error"]["message"]

        peer.read_request_head()
        assert peer.read_exactly(2) == b"{}"
        assert peer.ended()


def test_pipelined_bytes_do_not_give_the_upstream_more_time(by_hand, relay):
    with relay(UPSTREAM=by_hand.url, TIMEOUT=SHORT).client() as client:
        client.request("POST", CHAT, b"{}")
        by_hand.accept()
        assert trickle(client) == 504


def test_an_upstream_that_does_not_read_the_body_is_a_504(by_hand, relay):
    with relay(UPSTREAM=by_hand.url, TIMEOUT=SHORT).client() as client:

        def upload():
            try:
                client.request("POST", "/v1/files", bytes(20 << 20))
            except OSError:
                pass

        sender = threading.Thread(target=upload)
        sender.start()
        by_hand.accept()

        assert client.read_reply().status == 504

        sender.join()


@pytest.mark.parametrize(
    "head,body",
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"half"), (EVENT_HEAD, chunk(event("1")))],
    ids=["length", "events"],
)
def test_an_upstream_that_times_out_after_its_head_is_disconnected(by_hand, relay, head, body):
    running = relay(UPSTREAM=by_hand.url)
    with running.client() as client:
        client.request("POST", CHAT, b"{}")
        peer = by_hand.accept()
        peer.send(head + body)
        reply = client.read_head()
        allow_no_silence(running)
        client.read_body(reply)

        assert reply.status == 200
        assert not reply.complete
        assert (b'"code": "upstream_timeout"' in reply.body) == (head is EVENT_HEAD)

        peer.read_request_head()
        assert peer.read_exactly(2) == b"{}"
        assert peer.ended()

    assert running.wait_for_record()["outcome"] == "upstream_timeout"


def exchange(by_hand, client, peer=None):
    """One request and its response; the upstream's end of the connection that it used."""
    client.request()
    peer = peer or by_hand.accept()
    peer.read_request_head()
    peer.send(OK)

    assert client.read_reply().status == 200

    return peer


def test_an_idle_upstream_connection_is_closed_in_time(by_hand, relay, limit):
    limit(POOL_SECONDS=SHORT)
    with relay(UPSTREAM=by_hand.url).client() as client:
        peer = exchange(by_hand, client)
        # without another request
        assert peer.ended()
        exchange(by_hand, client)


def test_the_pool_keeps_a_limited_number_of_idle_connections(by_hand, relay, limit):
    limit(POOL_SIZE=2, POOL_SECONDS=LONG)
    running = relay(UPSTREAM=by_hand.url)
    clients = [running.client() for _ in range(4)]

    for client in clients:
        client.request()

    peers = [by_hand.accept() for _ in clients]
    for number, peer in enumerate(peers):
        peer.read_request_head()
        peer.send(OK)
        assert running.wait_for_record(number + 1)

    for client in clients:
        assert client.read_reply().status == 200

    assert peers[0].ended()
    assert peers[1].ended()

    with running.client() as client:
        # the newest is taken first
        for peer in (peers[3], peers[3]):
            exchange(by_hand, client, peer)

    for client in clients:
        client.sock.close()


# ---- many clients


def test_too_many_clients_get_a_503_at_once_and_running_requests_continue(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=2)
    with running.client() as first, running.client() as second:
        for client in (first, second):
            client.request()

        peers = [by_hand.accept(), by_hand.accept()]
        refused = [
            ("GET", "/health", None),
            ("OPTIONS", "*", None),
            ("POST", CHAT, bytes(1 << 20)),
        ]

        for method, path, body in refused:
            with running.client() as third:
                third.request(method, path, body)
                reply = third.read_reply()
                assert reply.status == 503
                assert reply.code == "server_busy"
                assert int(reply.get("retry-after")) > 0
                assert third.ended()

        for peer in peers:
            peer.read_request_head()
            peer.send(OK)

        for client in (first, second):
            assert client.read_reply().status == 200

    assert by_hand.nobody_came()


@pytest.mark.parametrize("kind", ["kept alive", "new"])
def test_the_longest_idle_client_makes_room_for_a_new_one(by_hand, relay, monkeypatch, kind):
    monkeypatch.setattr(aiproxy, "NEW_SECONDS", 0)
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=3)
    idle = watch(monkeypatch, running.server, "mark_idle")

    def connect(asks):
        client = running.client()
        assert idle()

        if asks:
            client.request("GET", "/health")
            assert client.read_reply().status == 200
            assert idle()

        return client

    asks = kind == "kept alive"
    with connect(asks=False) as busy:
        busy.request()
        peer = by_hand.accept()

        with connect(asks) as older, connect(asks) as younger, running.client() as newcomer:
            assert older.ended()
            assert not older.data

            newcomer.request()
            other = by_hand.accept()
            younger.request("GET", "/health")

            assert younger.read_reply().status == 200

            for one, client in ((peer, busy), (other, newcomer)):
                one.read_request_head()
                one.send(OK)
                assert client.read_reply().status == 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_a_client_that_still_takes_its_response_is_not_idle(by_hand, relay, monkeypatch):
    """Hung up on, it would lose the rest to a reset as soon as it sent its next request."""
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=1)
    idle = watch(monkeypatch, running.server, "mark_idle")
    body = b"x" * 300000
    with running.client(receive_buffer=4096) as client:
        assert idle()
        client.request()
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert idle()
        with running.client() as newcomer:
            assert newcomer.read_reply().status == 503

        client.request("GET", "/health")
        assert client.read_reply().body == body
        assert client.read_reply().status == 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_a_client_that_never_takes_its_responses_makes_room(by_hand, relay, monkeypatch, limit):
    """Whatever else it sends."""
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=1)
    idle = watch(monkeypatch, running.server, "mark_idle")
    limit(TAKING_SECONDS=SHORT)
    with running.client(receive_buffer=4096) as client:
        assert idle()
        client.request()
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300000)
        assert idle()
        deadline = time.monotonic() + PATIENCE
        status = 503
        while status == 503:
            assert time.monotonic() < deadline
            client.request("GET", "/health")
            assert idle()
            with running.client() as newcomer:
                newcomer.request("GET", "/health")
                status = newcomer.read_reply().status
        assert status == 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_a_client_that_has_taken_all_gets_new_seconds(by_hand, relay, monkeypatch, limit):
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=1)
    idle = watch(monkeypatch, running.server, "mark_idle")
    limit(TAKING_SECONDS=LONG)

    def is_refused():
        with running.client() as newcomer:
            newcomer.request("GET", "/health")
            return newcomer.read_reply().status == 503

    with running.client(receive_buffer=4096) as client:
        assert idle()
        client.request()
        peer = by_hand.accept()
        for request in (1, 2):
            if request == 2:
                client.request()
            peer.read_request_head()
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300000)
            assert idle()
            assert is_refused()
            began, = running.server.shared["room"].taking.values()
            if request == 1:
                first = began
                assert client.read_reply().complete
        assert began > first


def test_nobody_has_the_descriptor_of_a_client_that_is_hung_up_on(relay, monkeypatch):
    """Else the end of one client could be that of another, whose socket has its number."""
    running = relay(MAX_CONNECTIONS=1)
    monkeypatch.setattr(aiproxy, "NEW_SECONDS", 0)
    idle = watch(monkeypatch, running.server, "mark_idle")
    leaving = threading.Event()
    is_open = []
    shutdown_request = running.server.shutdown_request
    hang_up = aiproxy.hang_up

    def tell(sock):
        leaving.set()
        shutdown_request(sock)

    def leave_first(sock):
        client.sock.close()
        assert leaving.wait(PATIENCE)       # its thread has seen that, and is about to close it
        time.sleep(0.1)
        is_open.append(sock.fileno() >= 0)
        hang_up(sock)

    monkeypatch.setattr(running.server, "shutdown_request", tell)
    monkeypatch.setattr(aiproxy, "hang_up", leave_first)
    client = running.client()
    assert idle()
    with running.client() as newcomer:
        newcomer.request("GET", "/health")
        assert newcomer.read_reply().status == 200
    assert is_open == [True]


def test_a_client_whose_first_request_is_on_its_way_gives_up_no_place(relay, monkeypatch):
    """Else at the limit each new client would cost the one before it, and none be served."""
    running = relay(MAX_CONNECTIONS=1)
    idle = watch(monkeypatch, running.server, "mark_idle")
    with running.client() as client:
        assert idle()
        with running.client() as newcomer:
            assert newcomer.read_reply().status == 503

        client.request("GET", "/health")
        assert client.read_reply().status == 200


def test_a_client_whose_request_has_just_arrived_is_not_idle(relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "NEW_SECONDS", 0)
    running = relay(MAX_CONNECTIONS=1)
    arrived = threading.Event()
    evicted = threading.Event()
    mark_busy = running.server.mark_busy
    evict = running.server.evict

    def mark_busy_late(handler):
        if not arrived.is_set():
            arrived.set()
            assert evicted.wait(PATIENCE)
        return mark_busy(handler)

    def give_up_and_tell(*args):
        is_evicted = evict(*args)
        evicted.set()
        return is_evicted

    monkeypatch.setattr(running.server, "mark_busy", mark_busy_late)
    monkeypatch.setattr(running.server, "evict", give_up_and_tell)

    with running.client() as client:
        client.request()
        assert arrived.wait(PATIENCE)
        with running.client():
            assert client.read_reply().status == 200


def wait_until_no_client(running):
    """Wait until the relay counts no connection any more."""
    server = running.server
    with server.client_ended:
        ended = server.client_ended.wait_for(lambda: not server.clients, PATIENCE)
        assert ended, server.clients


def test_a_reset_right_after_a_response_causes_no_warning(relay, monkeypatch):
    running = relay(KEY="sk-hidden")
    warnings = []
    monkeypatch.setattr(running.server.log, "warn", warnings.append)
    client = running.client()

    def record(line):
        # the response has been sent, the connection is not closed yet
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        running.record(line)

    monkeypatch.setattr(running.server.log, "write", record)
    client.request("GET", "/nothing", fields=[("Connection", "close")])

    assert running.wait_for_record()["status"] == 404

    wait_until_no_client(running)

    assert not warnings


@pytest.mark.parametrize(
    "how", ["after a response", "during a response", "in a head", "when idle", "refused"]
)
def test_a_client_that_resets_its_connection_frees_its_place(by_hand, relay, how):
    running = relay(UPSTREAM=by_hand.url)
    client = running.client()
    has_left = threading.Event()

    def leave():
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        has_left.set()

    if how == "in a head":
        client.send(b"GET /")
        leave()
    elif how == "during a response":
        client.request()
        by_hand.accept().send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
        client.read_until(b"half")
        leave()
    elif how == "when idle":
        exchange(by_hand, client)
        leave()
    else:
        # Between the response and the close: that is when the log line is written.
        running.server.log.write = lambda record: leave()
        fields = [("Connection", "close")]

        if how == "refused":
            fields.append(("X-A ", "b"))

        client.request(fields=fields)
        if how == "after a response":
            peer = by_hand.accept()
            peer.read_request_head()
            peer.send(OK)

    assert has_left.wait(PATIENCE)

    wait_until_no_client(running)


def test_a_thread_that_cannot_start_frees_its_place(relay, monkeypatch, limit):
    limit(BUSY_SECONDS=SHORT)
    running = relay(MAX_CONNECTIONS=1)
    failed = threading.Event()
    start = threading.Thread.start

    def fail_once(thread):
        if failed.is_set() or not thread.name.startswith("client"):
            return start(thread)

        failed.set()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with running.client() as client:
        assert client.read_reply().status == 503
        assert failed.is_set()

    assert running.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    "hard,setting,maximum", [(264, 1024, 100), (264, 50, 50), ("none", 1024, 1024)]
)
def test_the_limit_of_open_files_is_raised_and_bounds_the_number_of_clients(
    relay, monkeypatch, hard, setting, maximum
):
    resource = pytest.importorskip("resource")      # not on Windows
    if hard == "none":
        hard = resource.RLIM_INFINITY
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: calls.append(limits))
    server = relay(MAX_CONNECTIONS=setting).server

    assert calls == [(hard, hard)]
    assert server.capacity == maximum

    warning = "room for %d clients, not %d" % (maximum, setting)

    assert (warning in "".join(aiproxy.warnings(server))) == (maximum < setting)


# ---- refusals during an upload


def test_a_chunk_that_is_too_large_is_refused_at_its_size(relay):
    with relay(MAX_BODY="1KB", KEY="sk-hidden-key").client() as client:
        client.request("POST", CHAT, b"401\r\n", [CHUNKED, ("Host", "localhost")])
        assert client.read_reply().status == 413


UPLOADS = [
    pytest.param({"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"}, {}, 401, id="401"),
    pytest.param(
        {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", "MAX_BODY": "1MB"},
        dict([KEY]),
        413,
        id="413",
    ),
    pytest.param({"PATHS": "/v1/other"}, {}, 404, id="404"),
    pytest.param({}, {"Expect": "miracles"}, 417, id="417"),
]


@pytest.mark.parametrize("settings,fields,status", UPLOADS)
def test_a_client_whose_upload_of_20_MB_is_refused_can_read_why(
    upstream, relay, settings, fields, status
):
    running = relay(**settings)
    connection = http.client.HTTPConnection(*running.address, timeout=PATIENCE)

    try:
        connection.request("POST", CHAT, bytes(20 << 20), fields)
    except ConnectionError:
        # a reset may stop it, but the response must be there to read
        pass

    assert connection.getresponse().status == status

    connection.close()

    assert upstream.all_bytes == b""


@pytest.mark.parametrize("settings,fields,status", UPLOADS)
def test_a_refused_upload_of_3_MB_is_read_to_its_end_and_not_as_requests(
    upstream, relay, limit, settings, fields, status
):
    limit(LINGER_SECONDS=PATIENCE)
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [("Content-Length", "100000000")] + list(fields.items()))
        reply = client.read_reply()
        assert reply.status == status

        # a reset would stop this
        client.send(smuggled * (3 * (1 << 20) // len(smuggled)))
        assert client.ended()

    assert upstream.all_bytes == b""


def test_a_lingering_close_ends_although_the_client_goes_on_sending(relay, limit):
    limit(LINGER_SECONDS=SHORT)
    fields = [("Expect", "miracles"), ("Content-Length", "100000000000")]

    with relay().client() as client:
        client.request("POST", CHAT, b"", fields)
        assert client.read_reply().status == 417
        begin = time.monotonic()

        with pytest.raises(ConnectionError):
            while time.monotonic() < begin + PATIENCE:
                client.send(bytes(65536))


def test_a_lingering_close_ends_when_the_client_is_silent(relay, limit):
    limit(LINGER_SILENCE=SHORT)
    running = relay()

    with running.client() as client:
        client.request("POST", CHAT, b"", [("Expect", "miracles"), ("Content-Length", "1000")])
        assert client.read_reply().status == 417
        wait_for_lingering(running, 1)
        wait_for_lingering(running, 0)
        with pytest.raises(ConnectionError):
            while True:
                client.send(b"x")


def wait_for_lingering(running, count):
    deadline = time.monotonic() + PATIENCE
    while len(aiproxy.find_room(running.server).lingering) != count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(aiproxy.find_room(running.server).lingering) == count


def test_lingering_clients_count_and_are_given_up_for_new_ones(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS=3)
    refused = [running.client() for _ in range(3)]
    for number, client in enumerate(refused, 1):
        client.request("POST", CHAT, b"", [("Expect", "miracles"), ("Content-Length", "1000")])
        assert client.read_reply().status == 417
        wait_for_lingering(running, number)
    wait_until_no_client(running)

    monkeypatch.setattr(aiproxy, "SPARE_FILES", 0)
    with running.client() as client:
        client.request("GET", "/health")
        assert client.read_reply().status == 200
        assert len(aiproxy.find_room(running.server).lingering) == 2

    for client in refused:
        client.sock.close()
    wait_for_lingering(running, 0)


def test_a_client_that_takes_a_byte_now_and_then_is_cut(upstream, relay, limit):
    limit(STALL_SECONDS=0.3, BODY_RATE=1 << 30)
    size = 32 << 20
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size

    def answer(received):
        received.send(head)
        received.send(bytes(size))

    upstream.answer = answer
    running = relay()
    taken = 0
    with running.client(receive_buffer=4096) as client:
        client.request("GET")
        while not running.records and taken < 300:
            client.sock.recv(1000)
            taken += 1
            time.sleep(0.02)

    assert running.wait_for_record()["outcome"] == "client_stalled"



def test_a_401_from_the_upstream_during_an_upload_becomes_a_502(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    with running.client() as client:
        client.request("POST", CHAT, bytes(70000), [KEY, ("Content-Length", "1000000")])
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        reply = client.read_reply()

        assert reply.status == 502
        assert reply.code == "upstream_credentials_rejected"
        assert client.ended()


def test_with_a_provider_key_a_streamed_body_above_the_limit_is_cut_off(by_hand, relay):
    running = relay(
        UPSTREAM=by_hand.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MAX_BODY="100000"
    )
    with running.client() as client:
        client.request("POST", CHAT, chunk(bytes(70000)), [KEY, CHUNKED])
        peer = by_hand.accept()
        peer.read_until(b"\r\n\r\n")
        client.send(chunk(bytes(70000)))

        assert client.read_reply().status == 413
        assert client.ended()

        while peer.more():
            pass

        assert not peer.data.endswith(b"0\r\n\r\n")


def test_a_half_close_by_the_client_counts_as_a_disconnect(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url)
    with running.client() as client:
        client.request()
        peer = by_hand.accept()
        peer.read_request_head()
        client.sock.shutdown(socket.SHUT_WR)
        assert peer.ended()

    assert running.wait_for_record()["outcome"] == "client_gone"


def test_a_response_of_our_own_that_is_not_taken_is_never_followed_by_another(
    relay, limit
):
    limit(STALL_SECONDS=SHORT)
    models = ",".join("m%d" % number + "x" * 1000 for number in range(8000))

    running = relay(MODELS=models)
    with running.client() as client:
        client.request()
        client.request("GET", "/health")
        head = client.read_head()
        client.read_exactly(1)
        # it stalls while nobody reads; then all that was sent is read
        assert running.wait_for_record()["outcome"] == "client_stalled"
        client.read_body(head)

    assert not head.complete
    assert b"healthy" not in head.body


def test_the_end_of_a_cut_response_comes_apart_from_its_last_bytes(upstream, relay, limit):
    """A browser that sees both at once may drop the event that says what happened."""
    limit(CUT_SECONDS=LONG)

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("1")))
        received.reset()

    upstream.answer = answer
    running = relay()
    with running.client() as client:
        client.request("POST", CHAT, b"{}")
        head = client.read_head()
        assert head.status == 200
        told = b""
        while b"upstream_died" not in told:
            told += client.read_chunk()
        assert not client.data
        client.sock.settimeout(0.3)
        with pytest.raises(socket.timeout):
            client.sock.recv(1)

    wait_until_no_client(running)               # its leaving is the end, long before LONG


def test_a_thread_that_cannot_start_once_holds_up_no_later_client(relay, monkeypatch, limit):
    limit(BUSY_SECONDS=SHORT)
    running = relay()
    start = threading.Thread.start
    failed = threading.Event()

    def fail_once(thread):
        if failed.is_set() or not thread.name.startswith("client"):
            return start(thread)
        failed.set()
        raise RuntimeError("can't start new thread")

    with running.client() as first:
        first.request("GET", "/health")
        assert first.read_reply().status == 200
        monkeypatch.setattr(threading.Thread, "start", fail_once)
        with running.client() as refused:
            assert refused.read_reply().status == 503
        assert failed.is_set()

    others = [running.client() for _ in range(4)]
    try:
        for client in others:
            client.request("GET", "/health")
            assert client.read_reply().status == 200
    finally:
        for client in others:
            client.sock.close()


def test_a_client_is_served_or_refused_and_never_both(relay, monkeypatch):
    """The executor keeps the call for which it could start no thread; a busy one may take it."""
    running = relay()
    start = threading.Thread.start
    taken = threading.Event()
    served = []
    serve = running.server.process_request_thread

    def fail_late(thread):
        start(thread)
        if thread.name.startswith("client"):
            # the kept call is taken before anybody learns that no thread could be started
            assert taken.wait(PATIENCE)
            raise RuntimeError("can't start new thread")

    def process_request_thread(request, client_address):
        served.append(request)
        taken.set()
        return serve(request, client_address)

    monkeypatch.setattr(running.server, "process_request_thread", process_request_thread)
    monkeypatch.setattr(threading.Thread, "start", fail_late)
    with running.client() as client:
        client.request("GET", "/health", fields=[("Connection", "close")])
        assert client.read_reply().status == 200
        assert client.ended()
        assert not client.data
    assert len(served) == 1


def test_an_idle_client_that_has_just_hung_up_makes_room(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS=1)
    gate = threading.Event()
    has_hung_up = threading.Event()
    wait_ready = aiproxy.wait_ready

    def late(connection, mask, seconds, other=None):
        ready = wait_ready(connection, mask, seconds, other)
        if seconds == aiproxy.IDLE_SECONDS:
            has_hung_up.set()
            assert gate.wait(PATIENCE)
        return ready

    monkeypatch.setattr(aiproxy, "wait_ready", late)
    with running.client() as first:
        first.request("GET", "/health")
        assert first.read_reply().status == 200
    assert has_hung_up.wait(PATIENCE)

    try:
        assert running.ask("GET", "/health").status == 200
    finally:
        gate.set()
