"""Nothing grows without a bound: rates, connections of one client, threads, lines, bytes.

Sizes of heads and bodies are in test_requests.py; the number of all clients, idle upstream
connections and the lingering close are in test_limits.py.
"""

import contextlib
import gc
import socket
import sys
import threading
import tracemalloc

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Client, chunk, event, watch

# ---- what is remembered of clients


def test_the_least_recently_seen_client_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(aiproxy, "MAX_BUCKETS", 3)
    buckets = aiproxy.RateLimiter(1, 3600)

    for client in ("alice", "bob", "carol", "alice", "dave"):
        buckets.take(client, 1000.0)

    assert set(buckets.buckets) == {"alice", "carol", "dave"}
    assert buckets.take("alice", 1001.0) is not None
    assert buckets.take("bob", 1001.0) is None
    assert len(buckets.buckets) == 3


def test_a_long_client_address_is_not_remembered_in_full(relay):
    running = relay(RATE="5/min")

    assert running.ask(fields=[("X-Forwarded-For", "1" * 15000)]).status == 200
    assert max(map(len, running.server.service.rate_limiter.buckets)) < 100


@pytest.mark.parametrize("address,network", [
    ("192.0.2.1", "192.0.2.1"),
    ("::ffff:192.0.2.1", "192.0.2.1"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
    ("2001:0DB8:0001:0002::", "2001:db8:1:2::"),
    ("fe80::1%eth0", "fe80::"),
    ("2001:db8::1", "2001:db8::"),
    ("unknown", "unknown"),
])
def test_an_ipv4_address_counts_by_itself_and_an_ipv6_address_by_its_64(address, network):
    assert aiproxy.network_of(address) == network


# ---- connections of one client


@pytest.fixture
def coming_from(relay, monkeypatch):
    """coming_from(address, ...): a relay with AIPROXY_MAX_PER_CLIENT=2.

    Its connections seem to come from these addresses, one after the other.
    """

    def start(*addresses):
        running = relay(MAX_PER_CLIENT="2")
        remaining = list(addresses)
        accept = running.server.get_request
        def get_request():
            return accept()[0], (remaining.pop(0), 1)

        monkeypatch.setattr(running.server, "get_request", get_request)
        return running

    return start


def wait_until_no_client(running):
    """Wait until the relay counts no connection any more."""
    server = running.server
    with server.client_ended:
        assert server.client_ended.wait_for(
            lambda: not (server.clients or aiproxy.find_room(server).lingering), PATIENCE)
        assert not aiproxy.find_room(server).counts
        assert not server.idle


def status_of(client, then=b"G"):
    """The status that a client gets; it stays connected if that is 200, and not idle.

    For it has begun its next request.
    """
    client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + then)
    return client.read_reply().status


@pytest.mark.parametrize("addresses,statuses", [
    (["192.0.2.1"] * 3, [200, 200, 503]),
    (["192.0.2.1", "192.0.2.2"] * 2, [200] * 4),
    (["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"], [200, 200, 503, 200]),
    (
        ["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff::3", "2001:db8:1:3::1"],
        [200, 200, 503, 200],
    ),
    (["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1"], [200, 200, 503]),
    (["127.0.0.1"] * 4, [200] * 4),
    (["127.1.2.3"] * 4, [200] * 4),
    (["::1"] * 4, [200] * 4),
    (["::ffff:127.0.0.1"] * 4, [200] * 4),
    (["::2"] * 3, [200, 200, 503]),
], ids=lambda value: " ".join(value) if isinstance(value[0], str) else "")
def test_one_address_has_a_limited_number_of_connections_and_loopback_any(
    coming_from, addresses, statuses
):
    running = coming_from(*addresses)
    clients = []

    try:
        for expected in statuses:
            clients.append(running.client())
            assert status_of(clients[-1]) == expected
    finally:
        for client in clients:
            client.sock.close()


def test_one_connection_too_many_can_read_why_and_the_others_continue(coming_from):
    running = coming_from(*["192.0.2.1"] * 3)
    with contextlib.ExitStack() as clients:
        first = clients.enter_context(running.client())
        assert status_of(first) == 200
        second = clients.enter_context(running.client())
        assert status_of(second) == 200

        third = clients.enter_context(running.client())
        third.request("POST", CHAT, bytes(1 << 20))
        reply = third.read_reply()
        assert reply.status == 503
        assert reply.code == "server_busy"
        assert reply.get("retry-after")
        assert third.ended()

        for client in (first, second):
            client.send(b"ET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.read_reply().status == 200

    record = next(record for record in running.records if record["status"] == 503)
    assert record["client"] == "192.0.2.1"
    assert record["outcome"] == "server_busy"
    assert record["request_id"] == reply.get("x-request-id")


def test_a_connection_that_has_ended_no_longer_counts(coming_from):
    running = coming_from(*["192.0.2.1"] * 9)
    for _ in range(2):
        with contextlib.ExitStack() as clients:
            for expected in (200, 200, 503):
                assert status_of(clients.enter_context(running.client())) == expected
        wait_until_no_client(running)


def test_an_address_gives_up_its_own_idle_connections_first(coming_from, monkeypatch):
    running = coming_from("192.0.2.2", *["192.0.2.1"] * 4)
    idle = watch(monkeypatch, running.server, "mark_idle")

    def idle_client():
        client = running.client()
        assert idle()
        assert status_of(client, then=b"") == 200
        assert idle()
        return client

    with idle_client() as other, idle_client() as first, idle_client() as second:
        with running.client() as third, running.client() as fourth:
            assert status_of(third) == 200
            assert first.ended()
            assert status_of(fourth) == 200
            assert second.ended()
            assert status_of(other) == 200


def test_a_trusted_proxy_has_any_number_of_connections(relay, monkeypatch):
    running = relay(MAX_PER_CLIENT="1", TRUSTED_PROXIES="private")
    accept = running.server.get_request
    monkeypatch.setattr(running.server, "get_request", lambda: (accept()[0], ("172.17.0.1", 1)))

    with running.client() as first, running.client() as second, running.client() as third:
        assert [status_of(client) for client in (first, second, third)] == [200, 200, 200]


@pytest.mark.parametrize("place", ["has_sent", "shutdown_request"])
def test_an_idle_client_that_has_hung_up_takes_no_place(relay, monkeypatch, place):
    """Wherever the thread that served it is: before it has seen that, or at its end."""
    running = relay(MAX_CONNECTIONS="1")
    owner = aiproxy if place == "has_sent" else running.server
    idle = watch(monkeypatch, running.server, "mark_idle")
    original = getattr(owner, place)
    main_thread = running.thread
    arrived = threading.Event()
    served = threading.Event()

    def wait_for_newcomer(*args):
        if threading.current_thread() is not main_thread and not arrived.is_set():
            arrived.set()
            assert served.wait(PATIENCE)
        return original(*args)

    with running.client() as client:
        assert idle()
        assert status_of(client, then=b"") == 200
        assert idle()
        monkeypatch.setattr(owner, place, wait_for_newcomer)
    assert arrived.wait(PATIENCE)

    with running.client() as newcomer:
        assert status_of(newcomer) == 200
        served.set()


# ---- threads, lines, bytes


def test_a_client_above_the_maximum_starts_no_thread(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS="1")
    monkeypatch.setattr(running.server, "evict", lambda *args: False)
    monkeypatch.setattr(aiproxy, "BUSY_SECONDS", 0.1)

    with running.client() as first:
        assert status_of(first) == 200

        before = threading.active_count()
        refused = [running.client() for _ in range(20)]
        assert [client.read_reply().status for client in refused] == [503] * 20
        assert threading.active_count() <= before

        for client in refused:
            client.sock.close()


def test_a_thread_serves_one_client_after_the_other(relay):
    running = relay()
    running.ask("GET", "/health")

    wait_until_no_client(running)

    before = set(threading.enumerate())

    for _ in range(20):
        with running.client() as client:
            assert status_of(client) == 200
        wait_until_no_client(running)

    assert len(set(threading.enumerate()) - before) <= 1


def test_log_lines_that_cannot_be_written_are_dropped_and_counted():
    # its thread does not run, as if stdout were blocked
    log = aiproxy.QueuedLog("text", [])
    for _ in range(aiproxy.MAX_LOG_LINES + 5):
        log.write(aiproxy.Record("192.0.2.1"))

    writer = log.writers[sys.stdout]
    assert writer.queue.qsize() == aiproxy.MAX_LOG_LINES == 10000
    assert writer.lost == 5


def test_pipelined_bytes_are_buffered_up_to_a_limit(upstream, relay, monkeypatch):
    gate = threading.Event()
    handlers = []
    begin = aiproxy.Handler.start_request

    def start_request(handler):
        handlers.append(handler)
        return begin(handler)

    monkeypatch.setattr(aiproxy.Handler, "start_request", start_request)

    def answer(received):
        assert gate.wait(PATIENCE)
        received.send(OK)

    upstream.answer = answer
    with relay().client() as client:
        client.request("POST", CHAT, b"{}")
        upstream.wait_for()
        client.sock.settimeout(0.3)

        with pytest.raises(socket.timeout):
            # more than fits into all buffers on the way
            client.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * (1 << 20))

        assert len(handlers[0].client.buffer) <= aiproxy.MAX_PIPELINED_BYTES + aiproxy.READ_SIZE

        gate.set()
        client.sock.settimeout(PATIENCE)
        assert client.read_reply().body == b'{"ok":true}'


def test_the_listen_queue_is_long_enough_for_a_burst_of_clients(relay):
    running = relay()
    # faster than the accepting thread can accept them
    clients = [Client(running.address) for _ in range(300)]

    try:
        for client in clients:
            client.request("GET", "/health")
        assert {client.read_reply().status for client in clients} == {200}
    finally:
        for client in clients:
            client.sock.close()


# ---- bodies that come in many pieces


class Pieces:
    """A body of 64 MB in pieces of 1 KB, all of them here already."""

    length = None

    def __init__(self):
        self.left = 65536
        self.done = False

    def read(self):
        self.left -= 1
        self.done = self.left == 0
        return bytes(1024)


def read_all_of_a_response():
    exchange = aiproxy.Exchange(None, None, None)
    exchange.body = Pieces()
    exchange.prefetch(1 << 30, PATIENCE)
    return exchange.prefetched


def read_all_of_a_request():
    return aiproxy.Upload(None, Pieces()).read_beginning(1 << 30)


@pytest.mark.parametrize("read", [read_all_of_a_response, read_all_of_a_request])
def test_a_body_in_many_pieces_is_read_in_linear_time(read):
    """Joined piece by piece it would be copied 32,768 times: 2 TB, some minutes."""
    bodies = []
    thread = threading.Thread(target=lambda: bodies.append(read()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert [len(body) for body in bodies] == [64 << 20]


# ---- the memory of bodies

MEGABYTE = 1 << 20


@pytest.fixture
def allocated():
    """allocated(): the bytes that Python has allocated since the test began."""
    gc.collect()
    gc.disable()        # what is only freed by the collector counts as kept
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gc.enable()


def large_body(megabytes, model="m"):
    text = b"a" * (megabytes * MEGABYTE)
    return b'{"model": "%b", "messages": [{"content": "%b"}]}' % (model.encode(), text)


STREAMS = {
    "inspected": {"MODELS": "m"},
    "edited": {"MODELS": "m=other", "MAX_TOKENS": "100"},
    "several provider keys": {"KEY": "sk-first-key,sk-second-key"},
    "Workers AI": {
        "UPSTREAM": "workers-ai", "CLOUDFLARE_ACCOUNT_ID": "acc", "CLOUDFLARE_API_TOKEN": "tok-1",
        "MODELS": "m=@cf/x/y", "MAX_CHARS": "99999999"},
}


@pytest.mark.parametrize("settings", STREAMS.values(), ids=list(STREAMS))
def test_nothing_of_a_body_is_kept_while_its_response_streams(
    upstream, relay, allocated, settings
):
    gate = threading.Event()

    def answer(received):
        received.body = b""
        received.send(EVENT_HEAD + chunk(event('{"response": "a"}')))
        assert gate.wait(PATIENCE)
        received.send(chunk(event("[DONE]")) + b"0\r\n\r\n")

    upstream.answer = answer
    if settings.get("UPSTREAM"):
        settings = dict(settings, CLOUDFLARE_API_BASE_URL=upstream.url)
    running = relay(**settings)
    body = large_body(8).replace(b"{", b'{"stream": true, ', 1)
    fields = [("Authorization", "Bearer sk-mine")]

    with running.client() as client:
        client.request("POST", CHAT, body, fields)
        body = None
        assert client.read_head().status == 200
        assert client.read_chunk()
        upstream.all_bytes = b""
        assert allocated() < 4 * MEGABYTE
        assert running.server.service.body_budget.held == 0
        gate.set()


def broken_off(client, body):
    client.request("POST", CHAT, body[:-10], [("Content-Length", str(len(body)))])


def malformed(client, body):
    client.request("POST", CHAT, body[:-1] + b"]")


def malformed_chunk(client, body):
    field = ("Transfer-Encoding", "chunked")
    client.request("POST", CHAT, chunk(body) + b"x\r\n", [field])


def not_allowed(client, body):
    client.request("POST", CHAT, body.replace(b'"m"', b'"n"', 1))


@pytest.mark.parametrize("send", [broken_off, malformed, malformed_chunk, not_allowed])
def test_nothing_of_a_refused_body_is_kept(relay, allocated, send):
    running = relay(MODELS="m")
    for _ in range(2):
        with running.client() as client:
            send(client, large_body(8))
            client.sock.shutdown(socket.SHUT_WR)
            client.read_reply()

    wait_until_no_client(running)
    assert allocated() < 4 * MEGABYTE
    assert running.server.service.body_budget.held == 0


@pytest.mark.parametrize("settings", [
    {"MODELS": "m"},
    {"KEY": "sk-first-key,sk-second-key"},
], ids=["inspected", "several provider keys"])
def test_all_bodies_that_are_held_share_one_budget(upstream, relay, settings):
    running = relay(MAX_BODY="1MB", **settings)
    body = b'{"model": "m", "x": "%b"}' % bytes(MEGABYTE - 40).replace(b"\0", b"a")
    half = len(body) // 2
    clients = []

    try:
        for _ in range(16):
            client = running.client()
            clients.append(client)
            client.request("POST", CHAT, body[:half], [("Content-Length", str(len(body)))])
        budget = running.server.service.body_budget
        while budget.held < 16 * half:
            threading.Event().wait(0.01)

        with running.client() as late:
            late.request("POST", CHAT, body)
            reply = late.read_reply()
            assert reply.status == 503
            assert reply.code == "server_busy"
            assert reply.get("retry-after")

        # a small one is no burden, and what leaves makes room
        small = b'{"model": "m", "x": "%b"}' % (b"a" * 900)
        assert budget.held + len(small) > 8 * MEGABYTE
        assert running.ask("POST", CHAT, small).status == 200
        for client in clients:
            client.sock.close()
        while budget.held:
            threading.Event().wait(0.01)
        assert running.ask("POST", CHAT, body).status == 200
    finally:
        for client in clients:
            client.sock.close()


def test_large_bodies_are_parsed_one_at_a_time(relay, monkeypatch):
    running = relay(MODELS="m")
    inside = threading.Semaphore(0)
    gate = threading.Event()
    parse = aiproxy.parse_object
    sizes = []

    def parse_object(body):
        sizes.append(len(body))
        if len(body) > MEGABYTE:
            inside.release()
            assert gate.wait(PATIENCE)
        return parse(body)

    monkeypatch.setattr(aiproxy, "parse_object", parse_object)
    with running.client() as first, running.client() as second:
        for client in (first, second):
            client.request("POST", CHAT, large_body(2))
        assert inside.acquire(timeout=PATIENCE)
        while running.server.service.body_budget.held < 4 * MEGABYTE:
            threading.Event().wait(0.01)

        # small ones do not wait
        assert running.ask("POST", CHAT, b'{"model": "m"}').status == 200
        assert len([size for size in sizes if size > MEGABYTE]) == 1
        gate.set()
        assert [first.read_reply().status, second.read_reply().status] == [200, 200]


EDITED = {
    "plain": b"a",
    "an emoji makes the rest four times as large": "a".encode() * 1000 + "\U0001f600".encode(),
    "line ends": b"\\n",
}


@pytest.mark.parametrize("unit", EDITED.values(), ids=list(EDITED))
def test_a_body_is_edited_in_a_few_times_its_size(allocated, unit):
    text = unit * (2 * MEGABYTE // len(unit))
    body = b'{"x": "%b", "model": "m"}' % text
    before = allocated()
    edited = aiproxy.edit_members(body, {"model": "other"})

    assert edited == body[:-4] + b'"other"}'
    assert tracemalloc.get_traced_memory()[1] - before < 8 * len(body)


def test_blank_space_of_a_megabyte_is_skipped_in_linear_time():
    blank = b" \n\t\r" * (MEGABYTE // 4)
    body = blank.join([b"", b"{", b'"x"', b": [", b'], "model": "m"', b"}"])
    thread = threading.Thread(target=aiproxy.parse_object, args=(body + blank,), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert aiproxy.edit_members(body, {"model": "n"}) == body.replace(b'"m"', b'"n"')
