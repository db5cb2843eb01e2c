"""AIPROXY_RATE: a number of requests per client key, or else per client address.

Above it there is a 429 that says exactly how long to wait.
"""

import types

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD

AUTH = [("Authorization", "Bearer ck-alice")]


@pytest.fixture
def limited(relay):
    """limited(**settings): a relay whose rates use `clock.now`, seconds set by the test only."""

    def start(**settings):
        running = relay(**settings)
        running.clock = types.SimpleNamespace(now=1000.0)
        limiter = running.server.service.rate_limiter
        take = limiter.take
        limiter.take = lambda client, now: take(client, running.clock.now)
        return running

    return start


def statuses(running, count, *request, **more):
    return [running.ask(*request, **more).status for _ in range(count)]


# ---- the arithmetic


@pytest.mark.parametrize("count,period,times,expected", [
    (2, 1, [0, 0, 0], [None, None, (0.5, 1.0, 2)]),
    (2, 1, [0, 0, 0.25], [None, None, (0.25, 0.75, 2)]),
    (2, 1, [0, 0, 0.5, 0.5], [None, None, None, (0.5, 1.0, 2)]),
    (60, 60, [0] * 60 + [0, 1, 1], [None] * 60 + [(1.0, 60.0, 60), None, (1.0, 60.0, 60)]),
    (1000, 86400, [0] * 1000 + [0], [None] * 1000 + [(86.4, 86400.0, 1000)]),
    (1, 3600, [0, 1800, 3600, 3600], [None, (1800.0, 1800.0, 1), None, (3600.0, 3600.0, 1)]),
    (2, 1, [0, 0, 1000, 1000, 1000], [None, None, None, None, (0.5, 1.0, 2)]),
    (2, 1, [0, 0] + [0.125] * 50 + [0.5], [None, None] + [(0.375, 0.875, 2)] * 50 + [None]),
], ids=[
    "all at once",
    "the wait grows shorter",
    "one comes back after half the time",
    "per minute",
    "per day",
    "one per hour",
    "never more than the count",
    "asking too early costs nothing",
])
def test_a_bucket_allows_its_count_at_once_and_refills_evenly(count, period, times, expected):
    bucket = aiproxy.RateLimiter(count, period)
    results = [bucket.take("alice", now) for now in times]
    rounded = [result and tuple(round(number, 6) for number in result) for result in results]

    assert rounded == expected


@pytest.mark.parametrize("text,expected", [
    ("", None),
    ("20/s", (20, 1)),
    ("60/min", (60, 60)),
    ("60/m", (60, 60)),
    ("100/h", (100, 3600)),
    ("1000/day", (1000, 86400)),
    ("5 / min", (5, 60)),
])
def test_a_rate_is_a_count_per_period(text, expected):
    assert aiproxy.Settings({"AIPROXY_RATE": text}).rate == expected


@pytest.mark.parametrize(
    "text", ["60", "60/", "0/min", "-1/s", "1.5/s", "60/week", "many/min", "60/min/day"]
)
def test_an_invalid_rate_stops_the_start(text):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_RATE"):
        aiproxy.Settings({"AIPROXY_RATE": text})


@pytest.mark.parametrize("environ,expected", [
    ({}, None),
    ({"AIPROXY_OPEN": "1"}, (60, 60)),
    ({"AIPROXY_OPEN": "1", "AIPROXY_RATE": "5/s"}, (5, 1)),
    ({"AIPROXY_OPEN": "0"}, None),
], ids=str)
def test_an_open_relay_has_a_rate_by_default(environ, expected):
    assert aiproxy.Settings(dict(environ, AIPROXY_KEY="sk-hidden-key")).rate == expected


@pytest.mark.parametrize("seconds,text", [
    (0.0201, "21ms"),
    (0.5, "500ms"),
    (0.9999, "1s"),
    (1, "1s"),
    (1.2, "2s"),
    (59.5, "1m0s"),
    (360, "6m0s"),
    (3599.5, "1h0m0s"),
    (3600, "1h0m0s"),
    (86400, "24h0m0s"),
])
def test_a_reset_time_is_written_as_openai_writes_it(seconds, text):
    assert aiproxy.format_duration(seconds) == text


# ---- the response


def test_a_request_above_the_rate_gets_a_429_with_the_exact_wait(upstream, limited):
    running = limited(
        RATE="2/min",
        KEY="sk-hidden-key",
        CLIENT_KEYS="alice=ck-alice",
        ORIGINS="https://app.example",
    )

    assert running.chat().status == running.chat().status == 200

    running.clock.now += 12.5
    reply = running.chat(fields=[("Origin", "https://app.example")])

    assert reply.status == 429
    assert len(upstream.received) == 2
    assert reply.get("retry-after") == "18"
    assert reply.get("x-ratelimit-limit-requests") == "2"
    assert reply.get("x-ratelimit-remaining-requests") == "0"
    assert reply.get("x-ratelimit-reset-requests") == "48s"
    assert reply.json["error"]["type"] == "rate_limit_error"
    assert reply.code == "rate_limit_exceeded"
    assert "2/min" in reply.json["error"]["message"]
    assert "x-ratelimit-reset-requests" in reply.get("access-control-expose-headers")
    assert running.wait_for_record(3)
    assert [record["outcome"] for record in running.records].count("rate_limit_exceeded") == 1


@pytest.mark.parametrize("rate", ["2/min", "7/day", "3/s"])
def test_a_client_that_waits_for_retry_after_is_served(limited, rate):
    running = limited(RATE=rate)
    replies = [running.ask() for _ in range(int(rate.partition("/")[0]) + 1)]

    assert [reply.status for reply in replies] == [200] * (len(replies) - 1) + [429]

    running.clock.now += int(replies[-1].get("retry-after"))

    assert running.ask().status == 200


def test_within_the_rate_only_the_rate_limit_fields_of_the_upstream_are_sent(upstream, limited):
    upstream.answer = (
        b"HTTP/1.1 429 Too Many Requests\r\n"
        b"Retry-After: 7\r\n"
        b"x-ratelimit-limit-requests: 9\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    running = limited(RATE="2/min")
    reply = running.ask()

    assert reply.status == 429
    assert reply.all("retry-after") == ["7"]
    assert reply.all("x-ratelimit-limit-requests") == ["9"]

    upstream.answer = EVENT_HEAD + b"0\r\n\r\n"

    assert not [name for name, _ in running.ask().fields if "ratelimit" in name]


# ---- what a client is, and what counts


def test_each_client_key_has_a_rate_of_its_own(limited):
    running = limited(RATE="1/min", KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice,bob=ck-bob")
    keys = ["ck-alice", "ck-alice", "ck-bob", "ck-bob"]

    assert [running.chat(key=key).status for key in keys] == [200, 429, 200, 429]


def test_a_keep_alive_connection_does_not_bypass_the_rate(limited):
    running = limited(RATE="2/min")
    with running.client() as client:
        for expected in (200, 200, 429):
            client.request()
            assert client.read_reply().status == expected
        assert client.ended()


def test_requests_that_are_not_sent_upstream_do_not_count(upstream, limited):
    running = limited(RATE="1/min", KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice", MODELS="m")
    wrong = [("Authorization", "Bearer wrong")]
    preflight = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "POST")]

    assert statuses(running, 3, "GET", "/health") == [200] * 3
    assert statuses(running, 3, "GET", "/v1/models", fields=AUTH) == [200] * 3
    assert statuses(running, 3, "POST", CHAT, b"{}", fields=wrong) == [401] * 3
    assert statuses(running, 3, "POST", "/v1/files", b"{}", fields=AUTH) == [404] * 3
    assert statuses(running, 3, "OPTIONS", CHAT, fields=preflight) == [204] * 3
    assert running.chat().status == 200
    assert running.chat().status == 429


def forwarded(*addresses):
    return [("X-Forwarded-For", address) for address in addresses]


@pytest.mark.parametrize("one,other,same", [
    ([], [], True),
    (forwarded("192.0.2.1"), forwarded("192.0.2.1"), True),
    (forwarded("192.0.2.1"), forwarded("192.0.2.2"), False),
    (forwarded("192.0.2.1"), [], False),
    (forwarded("192.0.2.1, 192.0.2.9"), forwarded("192.0.2.2, 192.0.2.9"), True),
    (forwarded("192.0.2.9, 192.0.2.1"), forwarded("192.0.2.9, 192.0.2.2"), False),
    (forwarded("192.0.2.1", "192.0.2.9"), forwarded("192.0.2.2", "192.0.2.9"), True),
    (forwarded("", "192.0.2.1"), forwarded("", "192.0.2.2"), False),
    (forwarded("2001:db8:1:2::1"), forwarded("2001:db8:1:2:ffff:ffff:ffff:ffff"), True),
    (forwarded("2001:db8:1:2::1"), forwarded("2001:0DB8:1:2::2"), True),
    (forwarded("2001:db8:1:2::1"), forwarded("2001:db8:1:3::1"), False),
    (forwarded("::ffff:192.0.2.1"), forwarded("192.0.2.1"), True),
    (forwarded("::ffff:192.0.2.1"), forwarded("::ffff:192.0.2.2"), False),
], ids=[
    "the address of the connection",
    "one entry",
    "another entry",
    "with and without",
    "the last entry counts, not the first",
    "another last entry",
    "the last field counts",
    "an empty field before it",
    "one /64",
    "one /64 in another spelling",
    "another /64",
    "IPv4 in IPv6",
    "another IPv4 in IPv6",
])
def test_behind_a_proxy_on_loopback_the_last_forwarded_address_is_counted(
    limited, one, other, same
):
    running = limited(RATE="1/min")

    assert running.ask(fields=one).status == 200
    assert running.ask(fields=other).status == (429 if same else 200)


@pytest.mark.parametrize(
    "value",
    [",", " , ,", "unknown", "\xe9", "1" * 5000],
    ids=["a comma", "commas", "a word", "latin-1", "long"],
)
def test_an_invalid_forwarded_address_fails_no_request(limited, value, capsys):
    running = limited(RATE="2/min")

    assert statuses(running, 3, fields=forwarded(value)) == [200, 200, 429]
    assert "fault" not in capsys.readouterr().err


# What is trusted, who connects, what X-Forwarded-For says, and who asks.
CLIENTS = [
    ("loopback", "127.0.0.1", "192.0.2.1", "192.0.2.1"),
    ("", "127.0.0.1", "192.0.2.1", "192.0.2.1"),
    ("loopback", "127.0.0.1", "192.0.2.1:4711", "192.0.2.1"),
    ("loopback", "::1", "[2001:db8::1]:4711", "2001:db8::1"),
    ("loopback", "::ffff:127.0.0.1", "[2001:DB8::1]", "2001:db8::1"),
    ("loopback", "127.0.0.1", "2001:db8:0::1", "2001:db8::1"),
    ("loopback", "127.0.0.1", "192.0.2.1, 127.0.0.2", "192.0.2.1"),
    ("loopback", "127.0.0.1", "192.0.2.1, unknown", "127.0.0.1"),
    ("loopback", "127.0.0.1", "127.0.0.3, 127.0.0.2", "127.0.0.3"),
    ("loopback", "10.0.0.1", "192.0.2.1", "10.0.0.1"),
    ("private", "172.17.0.1", "198.51.100.9, 192.0.2.1, 10.0.0.9:80, 100.64.0.1", "192.0.2.1"),
    ("private", "fe80::1%eth0", "192.0.2.1, fd00::1", "192.0.2.1"),
    ("private", "127.0.0.1", "192.0.2.1", "127.0.0.1"),
    ("private,loopback", "127.0.0.1", "192.0.2.1, 192.168.1.1", "192.0.2.1"),
    ("*", "203.0.113.1", "192.0.2.1, 198.51.100.9", "192.0.2.1"),
    ("203.0.113.0/24, 2001:db8::/32", "203.0.113.1", "192.0.2.1, 2001:db8::9", "192.0.2.1"),
    ("203.0.113.1", "::ffff:203.0.113.1", "192.0.2.1", "192.0.2.1"),
    ("203.0.113.1", "203.0.113.2", "192.0.2.1", "203.0.113.2"),
]


@pytest.mark.parametrize("trusted,address,forwarded_for,client", CLIENTS)
def test_the_client_is_the_last_address_that_is_not_a_trusted_proxy(
    trusted, address, forwarded_for, client
):
    settings = aiproxy.Settings({"AIPROXY_TRUSTED_PROXIES": trusted})
    service = types.SimpleNamespace(settings=settings)
    aiproxy.install_trusted_proxies(service)
    headers = aiproxy.Headers([(b"X-Forwarded-For", forwarded_for.encode())])

    assert service.find_client(address, headers) == client


def test_a_trusted_proxy_decides_whom_the_rate_counts(relay, monkeypatch):
    running = relay(RATE="1/min", OPEN="1", KEY="sk-1", TRUSTED_PROXIES="192.0.2.0/24")
    accept = running.server.get_request
    monkeypatch.setattr(running.server, "get_request", lambda: (accept()[0], ("192.0.2.7", 1)))
    others = ["198.51.100.1", "198.51.100.2", "198.51.100.1"]

    assert [running.ask(fields=forwarded(other)).status for other in others] == [200, 200, 429]
    assert running.wait_for_record()["client"] == "198.51.100.1"


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_a_client_that_connects_directly_cannot_choose_its_address(limited, monkeypatch, address):
    running = limited(RATE="1/min", HOST="127.0.0.1")
    accept = running.server.get_request
    monkeypatch.setattr(running.server, "get_request", lambda: (accept()[0], (address, 1)))
    others = ["198.51.100.1", "198.51.100.2", "127.0.0.1"]

    assert [running.ask(fields=forwarded(other)).status for other in others] == [200, 429, 429]
    assert running.wait_for_record()["client"] == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_recognized_in_every_form_that_a_socket_gives(limited, monkeypatch, address):
    running = limited(RATE="1/min")
    accept = running.server.get_request
    monkeypatch.setattr(running.server, "get_request", lambda: (accept()[0], (address, 1)))
    others = ["198.51.100.1", "198.51.100.2"]

    assert [running.ask(fields=forwarded(other)).status for other in others] == [200, 200]
    assert running.wait_for_record(2)
    # in either order
    assert {record["client"] for record in running.records} == set(others)
