"""Times, limits, ends: whoever is slow, silent or too many is let go in time, and nobody else notices."""
import http.client
import resource
import socket
import threading
import time

import pytest

import aiproxy
from byhand import ByHand
from support import CHAT, EVENT_HEAD, OK, PATIENCE, chunk, event

KEY = ("Authorization", "Bearer ck-alice")
CHUNKED = ("Transfer-Encoding", "chunked")
SHORT, LONG = 0.3, 3600     # seconds: a limit that a test waits for, and one that it never reaches


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
    """Send a piece of `data` again and again until an answer comes. Its status; None if none came."""
    client.sock.settimeout(0.05)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.send(data)
        except OSError:
            pass                            # it has been let go: the answer is there
        try:
            client.more()
            client.sock.settimeout(PATIENCE)
            return client.read_reply().status
        except socket.timeout:
            pass
    return None


def let_time_pass(relay):
    """Wait until HEAD_SECONDS have passed on the relay's own clock: that long a new connection may be silent."""
    with relay.client() as silent:
        assert silent.read_reply().status == 408


# ---- a request's head and body


def test_a_new_client_that_says_nothing_is_let_go(relay, limit):
    limit(HEAD_SECONDS=SHORT)
    running = relay()
    with running.client() as client:
        reply = client.read_reply()
        assert reply.status == 408 and reply.code == "request_timeout" and client.ended()
    assert running.wait_for_record()["outcome"] == "request_timeout"


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["request line", "fields"])
def test_a_head_that_comes_a_byte_at_a_time_has_a_deadline_in_all(upstream, relay, limit, first):
    limit(HEAD_SECONDS=SHORT)
    with relay().client() as client:
        client.send(first)
        assert trickle(client) == 408 and client.ended()
    assert upstream.all_bytes == b""


def test_empty_lines_do_not_buy_time(relay, limit):
    limit(HEAD_SECONDS=1, IDLE_SECONDS=LONG)
    with relay().client() as client:
        client.request()
        assert client.read_reply().status == 200
        client.send(b"\r\n")
        assert client.read_reply().status == 408


def test_a_kept_client_has_its_own_time_to_be_idle_and_then_a_heads(relay, limit):
    limit(HEAD_SECONDS=1, IDLE_SECONDS=LONG)
    running = relay()
    with running.client() as client:
        client.request()
        assert client.read_reply().status == 200
        let_time_pass(running)
        client.request()                    # still there
        assert client.read_reply().status == 200
        client.send(b"G")
        assert client.read_reply().status == 408 and client.ended()


def test_a_kept_client_that_stays_idle_is_closed_without_a_word(relay, limit):
    limit(IDLE_SECONDS=SHORT, HEAD_SECONDS=LONG)
    with relay().client() as client:
        client.request()
        assert client.read_reply().status == 200
        assert client.ended() and not client.data


@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["streamed", "held"])
@pytest.mark.parametrize("manner", ["silent", "a byte at a time", "a chunk at a time"])
def test_a_body_slower_than_its_pace_is_refused(upstream, relay, limit, manner, settings):
    limit(BODY_GRACE=SHORT, HOLD_SECONDS=LONG)
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [CHUNKED if "chunk" in manner else ("Content-Length", "1000000")])
        if manner == "silent":
            assert client.read_reply().status == 408
        else:
            assert trickle(client, chunk(b"a") if "chunk" in manner else b"a") == 408
        assert client.ended()
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("framing", [CHUNKED, ("Content-Length", "1000000")], ids=["chunked", "length"])
def test_what_was_already_going_up_is_cut_off_when_the_rest_is_too_slow(by_hand, relay, limit, framing):
    limit(BODY_GRACE=1, BODY_RATE=1 << 20)
    with relay(UPSTREAM=by_hand.url).client() as client:
        client.request("POST", "/v1/files", chunk(bytes(70000)) if framing == CHUNKED else bytes(70000), [framing])
        peer = by_hand.accept()
        assert client.read_reply().status == 408 and client.ended()
        while peer.more():
            pass
        assert b"\r\n\r\n" in peer.data and not peer.data.endswith(b"0\r\n\r\n")


def test_a_body_that_keeps_its_pace_may_take_as_long_as_it_needs(upstream, relay, limit):
    limit(BODY_GRACE=SHORT, BODY_RATE=1, HEAD_SECONDS=1)
    running = relay()
    with running.client() as client:
        client.request("POST", "/v1/files", b"a" * PATIENCE * 100, [("Content-Length", str(PATIENCE * 100 + 1))])     # enough for 2000 s
        let_time_pass(running)
        client.send(b"b")
        assert client.read_reply().status == 200
    assert upstream.received[0].body.endswith(b"ab")


def test_a_body_is_not_slow_while_it_is_the_upstream_that_does_not_take_it(by_hand, relay, limit):
    limit(BODY_GRACE=SHORT, HEAD_SECONDS=1)
    running = relay(UPSTREAM=by_hand.url)
    with running.client() as client:
        body = bytes(20 << 20)              # more than the buffers on the way hold
        sender = threading.Thread(target=client.request, args=("POST", "/v1/files", body))
        sender.start()
        peer = by_hand.accept()
        peer.read_request_head()
        let_time_pass(running)
        assert peer.read_exactly(len(body)) == body
        peer.send(OK)
        assert client.read_reply().status == 200
        sender.join()


# ---- a client that does not take its answer


def endless(received):
    received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
    while True:
        received.send(bytes(65536))


def test_a_client_that_takes_nothing_is_cut_and_its_upstream_with_it(upstream, relay, limit):
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


def test_the_upstreams_time_does_not_run_while_the_client_holds_it_back(upstream, relay, monkeypatch):
    body, on_tick, held_back = bytes(16 << 20), aiproxy.Stream.on_tick, threading.Semaphore(0)

    def tick_much_later(stream, now):
        on_tick(stream, now + 1000 if stream.pending else now)
        if stream.pending:
            held_back.release()
    monkeypatch.setattr(aiproxy.Stream, "on_tick", tick_much_later)
    monkeypatch.setattr(aiproxy, "STALL_SECONDS", LONG)
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with relay(TIMEOUT=100).client() as client:
        client.request()
        for _ in range(2):
            assert held_back.acquire(timeout=PATIENCE)
        assert client.read_reply().complete


# ---- the upstream


def test_a_TLS_upstream_that_never_shakes_hands_is_a_504(by_hand, relay):
    reply = relay(UPSTREAM=by_hand.url.replace("http:", "https:"), CONNECT_TIMEOUT=SHORT).ask()
    assert reply.status == 504 and reply.code == "upstream_timeout" and "AIPROXY_CONNECT_TIMEOUT" in reply.json["error"]["message"]


def test_an_upstream_that_does_not_take_connections_is_a_504(relay):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(8)]       # its queue is full of these
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        reply = relay(UPSTREAM="http://127.0.0.1:%d" % listener.getsockname()[1], CONNECT_TIMEOUT=SHORT).ask()
        assert reply.status == 504 and reply.code == "upstream_timeout"
        for one in waiting:
            one.close()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["nothing", "half a head", "an interim answer"])
def test_an_upstream_that_is_silent_before_its_head_is_a_504(by_hand, relay, begun):
    with relay(UPSTREAM=by_hand.url, TIMEOUT=SHORT).client() as client:
        client.request("POST", CHAT, b"{}")
        peer = by_hand.accept()
        peer.send(begun)
        reply = client.read_reply()
        assert reply.status == 504 and reply.code == "upstream_timeout" and "AIPROXY_TIMEOUT" in reply.json["error"]["message"]
        peer.read_request_head()
        assert peer.read_exactly(2) == b"{}" and peer.ended()


def test_what_a_client_sends_early_does_not_give_the_upstream_more_time(by_hand, relay):
    with relay(UPSTREAM=by_hand.url, TIMEOUT=SHORT).client() as client:
        client.request("POST", CHAT, b"{}")
        by_hand.accept()
        assert trickle(client) == 504


def test_an_upstream_that_does_not_take_the_body_is_a_504(by_hand, relay):
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


@pytest.mark.parametrize("head,body", [(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"half"), (EVENT_HEAD, chunk(event("1")))], ids=["length", "events"])
def test_an_upstream_that_falls_silent_after_its_head_is_cut(by_hand, relay, head, body):
    running = relay(UPSTREAM=by_hand.url, TIMEOUT=1.5)
    with running.client() as client:
        client.request("POST", CHAT, b"{}")
        peer = by_hand.accept()
        peer.send(head + body)
        reply = client.read_reply()
        assert reply.status == 200 and not reply.complete
        assert (b'"code": "upstream_timeout"' in reply.body) == (head is EVENT_HEAD)
        peer.read_request_head()
        assert peer.read_exactly(2) == b"{}" and peer.ended()
    assert running.wait_for_record()["outcome"] == "upstream_timeout"


def exchange(by_hand, client, peer=None):
    """One request and its answer; the upstream's end of the connection that it took."""
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
        assert peer.ended()                 # though nobody asks
        exchange(by_hand, client)


def test_only_so_many_idle_upstream_connections_are_kept(by_hand, relay, limit):
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
    assert peers[0].ended() and peers[1].ended()
    with running.client() as client:
        for peer in (peers[3], peers[3]):       # the newest is taken first
            exchange(by_hand, client, peer)
    for client in clients:
        client.sock.close()


# ---- many


def test_above_the_cap_there_is_an_instant_503_and_running_ones_go_on(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=2)
    with running.client() as first, running.client() as second:
        for client in (first, second):
            client.request()
        peers = [by_hand.accept(), by_hand.accept()]
        for method, path, body in (("GET", "/health", None), ("OPTIONS", "*", None), ("POST", CHAT, bytes(1 << 20))):
            with running.client() as third:
                third.request(method, path, body)
                reply = third.read_reply()
                assert reply.status == 503 and reply.code == "server_busy" and int(reply.get("retry-after")) > 0 and third.ended()
        for peer in peers:
            peer.read_request_head()
            peer.send(OK)
        for client in (first, second):
            assert client.read_reply().status == 200
    assert by_hand.nobody_came()


def watch(monkeypatch, owner, name):
    """done(): wait until `owner.name` has been called once more than the last time."""
    calls, original = threading.Semaphore(0), getattr(owner, name)

    def call(*args):
        result = original(*args)
        calls.release()
        return result
    monkeypatch.setattr(owner, name, call)
    return lambda: calls.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("kind", ["kept alive", "new"])
def test_idle_clients_make_room_the_longest_idle_first(by_hand, relay, monkeypatch, kind):
    running = relay(UPSTREAM=by_hand.url, MAX_CONNECTIONS=3)
    idle = watch(monkeypatch, running.server, "note_idle")

    def connect(asks):
        client = running.client()
        assert idle()
        if asks:
            client.request("GET", "/health")
            assert client.read_reply().status == 200 and idle()
        return client
    with connect(False) as busy:
        busy.request()
        peer = by_hand.accept()
        with connect(kind == "kept alive") as older, connect(kind == "kept alive") as younger, running.client() as newcomer:
            assert older.ended() and not older.data
            newcomer.request()
            other = by_hand.accept()
            younger.request("GET", "/health")
            assert younger.read_reply().status == 200
            for one, client in ((peer, busy), (other, newcomer)):
                one.read_request_head()
                one.send(OK)
                assert client.read_reply().status == 200


def test_a_client_whose_request_has_just_come_is_not_idle(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS=1)
    come, evicted = threading.Event(), threading.Event()
    note_busy, give_up_idle = running.server.note_busy, running.server.give_up_idle

    def note_busy_late(handler):
        if not come.is_set():
            come.set()
            assert evicted.wait(PATIENCE)
        return note_busy(handler)

    def give_up_and_tell(*args):
        count = give_up_idle(*args)
        evicted.set()
        return count
    monkeypatch.setattr(running.server, "note_busy", note_busy_late)
    monkeypatch.setattr(running.server, "give_up_idle", give_up_and_tell)
    with running.client() as client:
        client.request()
        assert come.wait(PATIENCE)
        with running.client():
            assert client.read_reply().status == 200


def free_places(running):
    """Wait until nobody is connected any more: the relay counts right."""
    with running.server.all_done:
        assert running.server.all_done.wait_for(lambda: not running.server.connections, PATIENCE), running.server.connections


def test_a_reset_just_behind_an_answer_is_no_fault(relay, monkeypatch):
    running, warnings = relay(KEY="sk-hidden"), []
    monkeypatch.setattr(running.server.log, "warn", warnings.append)
    client = running.client()

    def record(line):                       # the answer is out, the connection not closed yet
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        running.record(line)
    monkeypatch.setattr(running.server.log, "write", record)
    client.request("GET", "/nothing", fields=[("Connection", "close")])
    assert running.wait_for_record()["status"] == 404
    free_places(running)
    assert not warnings


@pytest.mark.parametrize("how", ["after an answer", "in mid-answer", "in a head", "when idle", "refused"])
def test_a_client_that_leaves_by_a_reset_frees_its_place(by_hand, relay, how):
    running = relay(UPSTREAM=by_hand.url)
    client, left = running.client(), threading.Event()

    def leave():
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        left.set()
    if how == "in a head":
        client.send(b"GET /")
        leave()
    elif how == "in mid-answer":
        client.request()
        by_hand.accept().send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
        client.read_until(b"half")
        leave()
    elif how == "when idle":
        exchange(by_hand, client)
        leave()
    else:                                   # between the answer and the close, at the one moment when a log line is written
        running.server.log.write = lambda record: leave()
        client.request(fields=[("Connection", "close")] + ([("X-A ", "b")] if how == "refused" else []))
        if how == "after an answer":
            peer = by_hand.accept()
            peer.read_request_head()
            peer.send(OK)
    assert left.wait(PATIENCE)
    free_places(running)


def test_a_thread_that_cannot_start_costs_no_place(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS=1)
    failed, start = threading.Event(), threading.Thread.start

    def fail_once(thread):
        if failed.is_set() or "serve_clients" not in thread.name + repr(thread._target):
            return start(thread)
        failed.set()
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with running.client() as client:
        assert client.read_reply().status == 503 and failed.is_set()
    assert running.ask("GET", "/health").status == 200


@pytest.mark.parametrize("hard,wanted,cap", [(264, 1024, 100), (264, 50, 50), (resource.RLIM_INFINITY, 1024, 1024)])
def test_the_limit_of_open_files_is_raised_and_the_cap_fits_it(relay, monkeypatch, hard, wanted, cap):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    server = relay(MAX_CONNECTIONS=wanted).server
    assert set_to == [(hard, hard)] and server.cap == cap
    assert ("room for %d clients, not %d" % (cap, wanted) in aiproxy.banner(server)) == (cap < wanted)


# ---- refusals while a body is coming

UPLOADS = [pytest.param({"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"}, {}, 401, id="401"), pytest.param({"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", "MAX_BODY": "1MB"}, dict([KEY]), 413, id="413"),
           pytest.param({"PATHS": "/v1/other"}, {}, 404, id="404"), pytest.param({}, {"Expect": "miracles"}, 417, id="417")]


@pytest.mark.parametrize("settings,fields,status", UPLOADS)
def test_a_refused_upload_of_20_MB_still_reads_why(upstream, relay, settings, fields, status):
    running = relay(**settings)
    connection = http.client.HTTPConnection(*running.address, timeout=PATIENCE)
    try:
        connection.request("POST", CHAT, bytes(20 << 20), fields)
    except ConnectionError:
        pass                                # it may be told to stop, but not before it can read
    assert connection.getresponse().status == status
    connection.close()
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("settings,fields,status", UPLOADS)
def test_a_refused_upload_of_3_MB_is_taken_to_its_end_and_nothing_of_it_runs(upstream, relay, limit, settings, fields, status):
    limit(LINGER_SECONDS=PATIENCE)
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    with relay(**settings).client() as client:
        client.request("POST", CHAT, b"", [("Content-Length", "100000000")] + list(fields.items()))
        reply = client.read_reply()
        assert reply.status == status
        client.send(smuggled * (3 * (1 << 20) // len(smuggled)))      # a reset would stop this
        assert client.ended()
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("bound", [{"LINGER_SECONDS": SHORT, "LINGER_BYTES": 1 << 60}, {"LINGER_SECONDS": LONG, "LINGER_BYTES": 100000}], ids=["time", "bytes"])
def test_lingering_is_bounded(relay, limit, bound):
    limit(**bound)
    with relay().client() as client:
        client.request("POST", CHAT, b"", [("Expect", "miracles"), ("Content-Length", "100000000000")])
        assert client.read_reply().status == 417
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < begin + PATIENCE:
                client.send(bytes(65536))


def test_an_early_401_of_the_upstream_becomes_ours_while_the_upload_runs(by_hand, relay):
    with relay(UPSTREAM=by_hand.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").client() as client:
        client.request("POST", CHAT, bytes(70000), [KEY, ("Content-Length", "1000000")])
        peer = by_hand.accept()
        peer.read_request_head()
        peer.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        reply = client.read_reply()
        assert reply.status == 502 and reply.code == "upstream_credentials_rejected" and client.ended()


def test_a_streamed_body_above_the_limit_is_cut_off_where_a_key_is_hidden(by_hand, relay):
    with relay(UPSTREAM=by_hand.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MAX_BODY="100000").client() as client:
        client.request("POST", CHAT, chunk(bytes(70000)), [KEY, CHUNKED])
        peer = by_hand.accept()
        peer.read_until(b"\r\n\r\n")
        client.send(chunk(bytes(70000)))
        assert client.read_reply().status == 413 and client.ended()
        while peer.more():
            pass
        assert not peer.data.endswith(b"0\r\n\r\n")


def test_a_client_that_shuts_down_its_sending_side_has_gone(by_hand, relay):
    running = relay(UPSTREAM=by_hand.url)
    with running.client() as client:
        client.request()
        peer = by_hand.accept()
        peer.read_request_head()
        client.sock.shutdown(socket.SHUT_WR)
        assert peer.ended()
    assert running.wait_for_record()["outcome"] == "client_gone"
