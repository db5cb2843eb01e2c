"""Key rotation: several provider keys are used in turn.

A key that the upstream refuses is in cooldown, and the next one is tried with the same request.
"""

import email.utils
import math
import re
import threading
import time

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, OK, PATIENCE, chunk, event

KEYS = ["sk-first-provider-key", "sk-second-provider-key", "sk-third-provider-key"]
FAILOVER_STATUSES = [401, 402, 403, 429]


@pytest.fixture
def rotating(relay):
    """A relay with three provider keys."""
    return relay(KEY=",".join(KEYS), CLIENT_KEYS="alice=ck-alice")


def key_of(received):
    return received.field("authorization")[len("Bearer ") :]


def used(upstream):
    return [key_of(received) for received in upstream.received]


def refusing(bad, status=429, fields=b""):
    """A function that responds with `status` to the keys in `bad`, and with 200 to the others.

    The body of a refusal has the number of the key and the number of the response.
    """
    count = [0]

    def answer(received):
        count[0] += 1
        key = key_of(received)

        if key not in bad:
            received.send(OK)
            return

        numbers = (KEYS.index(key) + 1, count[0])
        body = b'{"error":{"message":"key %d, response %d"}}' % numbers
        head = b"HTTP/1.1 %d No\r\n%bContent-Length: %d\r\n\r\n" % (status, fields, len(body))
        received.send(head + body)

    return answer


def test_the_provider_keys_are_used_in_turn(upstream, rotating):
    assert [rotating.chat().status for _ in range(7)] == [200] * 7

    order = used(upstream)

    assert sorted(order[:3]) == sorted(KEYS)
    assert order[3:6] == order[:3]
    assert order[6] == order[0]


@pytest.mark.parametrize("status", FAILOVER_STATUSES)
@pytest.mark.parametrize("body", [b'{"model": "m",  "x": [1,\t2]}', b""], ids=["body", "no body"])
def test_the_next_provider_key_is_tried_with_the_same_request(upstream, rotating, status, body):
    upstream.answer = refusing([])
    rotating.chat()
    begin = KEYS.index(used(upstream)[0])
    # the order from now on
    first, second, third = [KEYS[(begin + step) % 3] for step in (1, 2, 3)]
    upstream.answer = refusing([first, second], status)
    reply = rotating.chat(body, fields=[("OpenAI-Beta", "x")])
    attempts = upstream.received[1:]

    assert reply.status == 200
    assert reply.body == b'{"ok":true}'
    assert used(upstream)[1:] == [first, second, third]
    assert [received.body for received in attempts] == [body] * 3
    assert len({re.sub(b"sk-[a-z-]+", b"", received.head) for received in attempts}) == 1
    assert rotating.wait_for_record(2)["upstream_status"] == 200


@pytest.mark.parametrize("status", [400, 404, 408, 409, 500, 503])
def test_an_error_that_another_key_would_not_fix_is_relayed(upstream, rotating, status):
    upstream.answer = refusing(KEYS, status)

    assert rotating.chat().status == status
    assert len(upstream.received) == 1


def test_no_other_key_is_tried_if_the_upstream_resets_the_connection(upstream, rotating):
    upstream.answer = lambda received: received.reset()

    assert rotating.chat().status == 502
    assert len(upstream.received) == 1


@pytest.mark.parametrize("status", [402, 403, 429])
def test_if_every_key_is_refused_each_is_tried_once_and_the_last_response_relayed(
    upstream, rotating, status
):
    upstream.answer = refusing(KEYS, status, b"X-Place: y\r\nRetry-After: 77\r\n")
    reply = rotating.chat()
    last = KEYS.index(used(upstream)[-1]) + 1

    assert sorted(used(upstream)) == sorted(KEYS)
    assert reply.status == status
    assert reply.get("retry-after") == "77"
    assert reply.complete
    assert reply.json == {"error": {"message": "key %d, response 3" % last}}


def test_if_every_key_is_rejected_the_client_gets_a_502_and_not_a_401(upstream, rotating):
    upstream.answer = refusing(KEYS, 401)
    reply = rotating.chat()

    assert reply.status == 502
    assert reply.code == "upstream_credentials_rejected"
    assert sorted(used(upstream)) == sorted(KEYS)

    # none has a cooldown now
    upstream.answer = OK

    assert [rotating.chat().status for _ in range(3)] == [200] * 3
    assert sorted(used(upstream)[3:]) == sorted(KEYS)


@pytest.mark.parametrize("status", FAILOVER_STATUSES)
@pytest.mark.parametrize("spent", KEYS)
def test_a_request_that_every_key_refuses_takes_no_key_from_the_others(
    upstream, rotating, status, spent
):
    upstream.answer = refusing(KEYS, status, b"Retry-After: 3600\r\n")
    rotating.chat()
    upstream.answer = refusing([spent])

    assert [rotating.chat().status for _ in range(4)] == [200] * 4
    assert used(upstream)[3:].count(spent) <= 1


def test_a_5xx_of_the_next_key_says_nothing_about_the_first(upstream, rotating):
    upstream.answer = refusing(KEYS[:2])
    rotating.server.service.use_key.__self__.turn = 2
    upstream.answer = lambda received: received.send(
        b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n"
        % (429 if key_of(received) == KEYS[0] else 503))

    assert rotating.chat().status == 503
    assert used(upstream) == KEYS[:2]
    assert rotating.server.service.use_key.__self__.cooldowns == [0.0] * 3


def test_the_connection_of_a_response_that_is_given_up_is_closed(upstream, rotating):
    upstream.answer = refusing(KEYS[:2])
    rotating.server.service.use_key.__self__.turn = 2

    assert rotating.chat().status == 200
    assert used(upstream) == KEYS
    for received in upstream.received[:2]:
        assert received.wait_closed() is not None


def test_a_rejected_key_is_not_used_again_and_one_warning_does_not_show_it(
    upstream, rotating, capsys
):
    upstream.answer = refusing([KEYS[1]], 401)

    assert [rotating.chat().status for _ in range(9)] == [200] * 9
    assert used(upstream).count(KEYS[1]) == 1

    warnings = capsys.readouterr().err

    assert warnings.count("key 2 of 3 (401); it is set aside for 10 minutes") == 1
    assert warnings.count("\n") == 1
    assert "sk-" not in warnings


def test_concurrent_requests_with_a_rejected_key_warn_once(upstream, relay, capsys):
    running = relay(KEY="%s,%s" % (KEYS[0], KEYS[1]), CLIENT_KEYS="alice=ck-alice")
    both = threading.Barrier(2)

    def answer(received):
        if key_of(received) == KEYS[0]:
            both.wait(PATIENCE)
            received.send(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        else:
            received.send(OK)

    def chat():
        replies.append(running.chat().status)

    upstream.answer = answer
    replies = []
    threads = [threading.Thread(target=chat) for _ in range(4)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert replies == [200] * 4
    assert used(upstream).count(KEYS[0]) == 2
    assert capsys.readouterr().err.count("key 1 of 2") == 1


def test_a_key_with_a_retry_after_is_not_used_before_then(upstream, rotating):
    upstream.answer = refusing([KEYS[0]], 429, b"Retry-After: 3600\r\n")

    assert [rotating.chat().status for _ in range(9)] == [200] * 9
    assert used(upstream).count(KEYS[0]) == 1


def test_the_other_keys_share_the_turns_of_a_key_in_cooldown(upstream, rotating):
    upstream.answer = refusing([KEYS[0]], 401)
    for _ in range(20):
        rotating.chat()

    assert abs(used(upstream).count(KEYS[1]) - used(upstream).count(KEYS[2])) <= 2


def set_aside(keys, index, status, *fields):
    keys.set_aside(index, status, aiproxy.Headers(list(fields)), 1000.0)


def cooldown_after(*response):
    """The cooldown in seconds of the first of two keys after `response`, seen by its turns."""
    keys = aiproxy.KeyRotation(2, warn=print)
    set_aside(keys, 0, *response)

    for seconds in (0, 0.4, 1, 2, 20, 60, 61, 120, 600, 3600, 10**9):
        turns = [keys.order(1000.0 + seconds + 0.001) for _ in range(2)]
        if any(0 in turn for turn in turns):
            return seconds

    return math.inf


@pytest.mark.parametrize("response,expected", [
    ((429,), 60),
    ((402,), 60),
    ((403,), 60),
    ((401,), 600),
    ((401, (b"retry-after", b"2")), 600),
    ((429, (b"retry-after", b"2")), 2),
    ((429, (b"retry-after", b"120")), 120),
    ((429, (b"retry-after", b"0")), 0),
    ((403, (b"retry-after", b"20")), 20),
    ((429, (b"retry-after", b"soon")), 60),
    ((429, (b"retry-after", b"-1")), 60),
    ((429, (b"retry-after", b"")), 60),
    ((429, (b"retry-after", b"nan")), 60),
], ids=str)
def test_the_cooldown_depends_on_the_status_and_on_retry_after(response, expected):
    assert cooldown_after(*response) == expected


def test_a_retry_after_may_be_a_date():
    # RFC 9110 section 10.2.3
    date = email.utils.formatdate(time.time() + 3000, usegmt=True)
    assert cooldown_after(429, (b"retry-after", date.encode())) == 3600


def test_if_all_keys_are_in_cooldown_the_first_to_be_ready_is_tried():
    keys = aiproxy.KeyRotation(3, warn=print)
    for index, seconds in ((0, b"30"), (1, b"10"), (2, b"20")):
        set_aside(keys, index, 429, (b"retry-after", seconds))

    assert [keys.order(1001.0) for _ in range(3)] == [[1]] * 3
    assert sorted(keys.order(1021.0)) == [1, 2]


def test_a_single_key_is_always_tried_and_causes_no_warning(upstream, relay, capsys):
    running = relay(KEY=KEYS[0], CLIENT_KEYS="alice=ck-alice")
    upstream.answer = refusing(KEYS, 429, b"Retry-After: 3600\r\n")

    assert [running.chat().status for _ in range(2)] == [429, 429]
    assert len(upstream.received) == 2
    assert "of 1" not in capsys.readouterr().err


# ---- requests that are sent again, and those that are not


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("settings", [{}, {"MODELS": "m"}], ids=["verbatim", "inspected"])
def test_a_large_body_is_sent_with_the_next_key_too_however_slowly_it_came(
    upstream, relay, monkeypatch, framing, settings
):
    # an upload that is not held as a whole would go up at once
    monkeypatch.setattr(aiproxy, "PREFETCH_SECONDS", 0)
    running = relay(KEY=",".join(KEYS), CLIENT_KEYS="alice=ck-alice", **settings)
    upstream.answer = refusing(KEYS[:2])
    running.server.service.use_key.__self__.turn = 2
    body = b'{"model": "m", "messages": "%b"}' % (b"x" * 200000)
    first, second = body[:70000], body[70000:]
    field = ("Content-Length", str(len(body)))

    if framing == "chunked":
        field = ("Transfer-Encoding", "chunked")
        first = chunk(first)
        second = chunk(second) + b"0\r\n\r\n"

    with running.client() as client:
        client.request("POST", CHAT, first, [("Authorization", "Bearer ck-alice"), field])
        client.send(second)
        assert client.read_reply().status == 200

    assert used(upstream) == KEYS
    assert [received.body for received in upstream.received] == [body] * 3


def test_no_other_key_is_tried_after_the_first_byte_of_the_response(upstream, rotating):
    def answer(received):
        received.send(EVENT_HEAD + chunk(event('{"error":{"code":429}}')))
        received.close()

    upstream.answer = answer
    reply = rotating.chat()

    assert reply.status == 200
    assert not reply.complete
    assert len(upstream.received) == 1


def test_no_other_key_is_tried_after_the_client_disconnects(upstream, rotating):
    arrived = threading.Event()
    disconnected = threading.Event()

    def answer(received):
        arrived.set()
        assert disconnected.wait(PATIENCE)
        received.wait_closed()

    upstream.answer = answer
    with rotating.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
        assert arrived.wait(PATIENCE)

    disconnected.set()

    assert rotating.wait_for_record()["outcome"] == "client_gone"
    assert len(upstream.received) == 1


def test_no_provider_key_reaches_a_client(upstream, rotating):
    def answer(received):
        body = b"You sent " + KEYS[0].encode()
        head = b"HTTP/1.1 403 No %b\r\n" % KEYS[1].encode()
        head += b"X-Echo: %b\r\nContent-Length: %d\r\n\r\n" % (KEYS[2].encode(), len(body))
        received.send(head + body)

    upstream.answer = answer
    reply = rotating.chat()

    assert reply.status == 502
    assert not any(key.encode() in reply.raw_head + reply.body for key in KEYS)


GOOGLE_REFUSAL = (b'{"error":{"code":400,'
                  b'"message":"API key not valid. Please pass a valid API key.",'
                  b'"status":"INVALID_ARGUMENT","details":[{"reason":"API_KEY_INVALID"}]}}')


@pytest.mark.parametrize("keys,status,code", [
    ("key-1,key-2", 200, None), ("key-1", 502, "upstream_credentials_rejected")])
def test_a_key_that_google_does_not_know_is_a_rejected_one(
        upstream, relay, monkeypatch, keys, status, code):
    """It says so with a 400, which the client would take for its own fault."""
    monkeypatch.setattr(aiproxy, "GOOGLE_HOST", "127.0.0.1")

    def answer(received):
        body = b"{}"
        status_line = b"HTTP/1.1 200 OK"
        if key_of(received) == "key-1":
            body, status_line = GOOGLE_REFUSAL, b"HTTP/1.1 400 No"
        received.send(status_line + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    upstream.answer = answer
    running = relay(KEY=keys, CLIENT_KEYS="ck-alice", UPSTREAM=upstream.url + "/openai")
    for _ in range(4):
        reply = running.chat()
        assert reply.status == status
        assert code is None or reply.code == code


def test_what_google_says_of_a_callers_own_key_comes_down_as_it_is(upstream, relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "GOOGLE_HOST", "127.0.0.1")
    upstream.answer = (b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(GOOGLE_REFUSAL)
                       + GOOGLE_REFUSAL)
    reply = relay(UPSTREAM=upstream.url + "/openai").chat()
    assert (reply.status, reply.body) == (400, GOOGLE_REFUSAL)


def test_another_400_of_google_comes_down_whole(upstream, relay, monkeypatch):
    monkeypatch.setattr(aiproxy, "GOOGLE_HOST", "127.0.0.1")
    body = b'{"error":"\\"reason\\":\\"API_KEY_INVALID\\"%b"}' % (b"x" * 200000)
    upstream.answer = b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    running = relay(KEY="key-1", CLIENT_KEYS="ck-alice", UPSTREAM=upstream.url + "/openai")
    reply = running.chat()
    assert (reply.status, reply.body) == (400, body)
