"""Nothing here grows for ever: what is remembered of clients, the connections of one of them, threads, lines, early bytes.

Sizes of heads and bodies are in test_requests.py; all clients together, idle upstream connections and lingering in test_limits.py.
"""
import socket
import threading

import pytest

import aiproxy
from support import CHAT, OK, PATIENCE, Client


# ---- what is remembered


def test_of_too_many_clients_the_longest_unused_are_forgotten(monkeypatch):
    monkeypatch.setattr(aiproxy, "MAX_BUCKETS", 3)
    buckets = aiproxy.Buckets(1, 3600)
    for client in ("alice", "bob", "carol", "alice", "dave"):
        buckets.take(client, 1000.0)
    assert set(buckets.levels) == {"alice", "carol", "dave"}
    assert buckets.take("alice", 1001.0) is not None and buckets.take("bob", 1001.0) is None
    assert len(buckets.levels) == 3


def test_of_one_client_only_so_much_is_remembered(relay):
    running = relay(RATE="5/min")
    assert running.ask(fields=[("X-Forwarded-For", "1" * 15000)]).status == 200
    assert max(map(len, running.server.buckets.levels)) < 100


@pytest.mark.parametrize("address,network", [
    ("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"), ("2001:0DB8:0001:0002::", "2001:db8:1:2::"), ("fe80::1%eth0", "fe80::"),
    ("2001:db8::1", "2001:db8::"), ("unknown", "unknown")])
def test_an_address_counts_by_itself_or_by_its_64(address, network):
    assert aiproxy.network_of(address) == network


# ---- connections of one client


@pytest.fixture
def coming_from(relay, monkeypatch):
    """coming_from(address, ...): a relay with AIPROXY_MAX_PER_CLIENT=2 to which connections seem to come from these addresses, one after the other."""
    def start(*addresses):
        running, left = relay(MAX_PER_CLIENT="2"), list(addresses)
        accept = running.server.get_request
        monkeypatch.setattr(running.server, "get_request", lambda: (accept()[0], (left.pop(0), 1)))
        return running
    return start


def status_of(client):
    """What a client that has just connected is told; an admitted one stays connected."""
    client.request("GET", "/health")
    return client.read_reply().status


@pytest.mark.parametrize("addresses,statuses", [
    (["192.0.2.1"] * 3, [200, 200, 503]),
    (["192.0.2.1", "192.0.2.2"] * 2, [200] * 4),
    (["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"], [200, 200, 503, 200]),
    (["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff::3", "2001:db8:1:3::1"], [200, 200, 503, 200]),
    (["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1"], [200, 200, 503]),
    (["127.0.0.1"] * 4, [200] * 4), (["127.1.2.3"] * 4, [200] * 4), (["::1"] * 4, [200] * 4), (["::ffff:127.0.0.1"] * 4, [200] * 4),
    (["::2"] * 3, [200, 200, 503]),
], ids=lambda value: " ".join(value) if isinstance(value[0], str) else "")
def test_one_address_has_only_so_many_connections_and_this_machine_any_number(coming_from, addresses, statuses):
    running = coming_from(*addresses)
    clients = []
    try:
        for expected in statuses:
            clients.append(running.client())
            assert status_of(clients[-1]) == expected
    finally:
        for client in clients:
            client.sock.close()


def test_the_one_too_many_reads_why_and_the_others_go_on(coming_from):
    running = coming_from(*["192.0.2.1"] * 3)
    with running.client() as first, running.client() as second, running.client() as third:
        assert status_of(first) == status_of(second) == 200
        third.request("POST", CHAT, bytes(1 << 20))
        reply = third.read_reply()
        assert reply.status == 503 and reply.code == "server_busy" and reply.get("retry-after") and third.ended()
        assert status_of(first) == status_of(second) == 200


def test_a_connection_that_has_ended_no_longer_counts(coming_from):
    running = coming_from(*["192.0.2.1"] * 9)
    for _ in range(2):
        with running.client() as first, running.client() as second, running.client() as third:
            assert [status_of(client) for client in (first, second, third)] == [200, 200, 503]
        with running.server.all_done:
            assert running.server.all_done.wait_for(lambda: not running.server.connections, PATIENCE)
            assert not running.server.per_client        # and no name of a client that has gone is kept


# ---- threads, lines, bytes


def test_a_client_above_the_cap_costs_no_thread(relay, monkeypatch):
    running = relay(MAX_CONNECTIONS="1")
    monkeypatch.setattr(running.server, "give_up_idle", lambda *args: 0)
    with running.client() as first:
        assert status_of(first) == 200
        before = threading.active_count()
        refused = [running.client() for _ in range(20)]
        assert [client.read_reply().status for client in refused] == [503] * 20
        assert threading.active_count() <= before
        for client in refused:
            client.sock.close()


def test_threads_without_a_client_end(relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "SPARE_SECONDS", 0.05)
    running = relay()
    before = set(threading.enumerate())
    clients = [running.client() for _ in range(10)]
    assert [status_of(client) for client in clients] == [200] * 10
    threads = set(threading.enumerate()) - before
    assert len(threads) == 10
    for client in clients:
        client.sock.close()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    with running.client() as client:        # and the next client finds one all the same
        assert status_of(client) == 200


def test_a_thread_serves_one_client_after_the_other(relay):
    running = relay()
    running.ask("GET", "/health")
    with running.server.all_done:
        assert running.server.all_done.wait_for(lambda: not running.server.connections, PATIENCE)
    before = set(threading.enumerate())
    for _ in range(20):
        with running.client() as client:
            assert status_of(client) == 200
        with running.server.all_done:
            assert running.server.all_done.wait_for(lambda: not running.server.connections, PATIENCE)
    assert len(set(threading.enumerate()) - before) <= 1


def test_lines_that_nobody_reads_are_counted_and_lost():
    log = aiproxy.Log("text", [])     # its thread does not run: as when stdout takes nothing
    for _ in range(aiproxy.MAX_LOG_LINES + 5):
        log.write(aiproxy.Record("192.0.2.1"))
    assert log.lines.qsize() == aiproxy.MAX_LOG_LINES == 10000 and log.lost == 5


def test_what_a_client_sends_early_is_taken_in_up_to_a_bound(upstream, relay, monkeypatch):
    gate, handlers = threading.Event(), []
    begin = aiproxy.Handler.start_record
    monkeypatch.setattr(aiproxy.Handler, "start_record", lambda handler: (handlers.append(handler), begin(handler))[1])

    def answer(received):
        assert gate.wait(PATIENCE)
        received.send(OK)
    upstream.answer = answer
    with relay().client() as client:
        client.request("POST", CHAT, b"{}")
        upstream.wait_for()
        client.sock.settimeout(0.3)
        with pytest.raises(socket.timeout):
            client.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * (1 << 20))    # more than all buffers on the way hold
        assert len(handlers[0].client.buffer) <= aiproxy.EARLY_BYTES + aiproxy.PIECE
        gate.set()
        client.sock.settimeout(PATIENCE)
        assert client.read_reply().body == b'{"ok":true}'


def test_the_queue_of_new_clients_is_long_enough_for_a_burst(relay):
    running = relay()
    clients = [Client(running.address) for _ in range(300)]     # the accepting thread never had a chance to keep up
    try:
        for client in clients:
            client.request("GET", "/health")
        assert {client.read_reply().status for client in clients} == {200}
    finally:
        for client in clients:
            client.sock.close()
