"""Several provider keys: used in turn; a key that the upstream refuses rests, and the next one is tried with the same request."""
import email.utils
import math
import re
import threading
import time

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, OK, PATIENCE, chunk, event

KEYS = ["sk-first-of-ours", "sk-second-of-ours", "sk-third-of-ours"]
SPENT = [401, 402, 403, 429]


@pytest.fixture
def ring(relay):
    """A relay with three provider keys."""
    return relay(KEY=",".join(KEYS), CLIENT_KEYS="alice=ck-alice")


def key_of(received):
    return received.field("authorization")[len("Bearer "):]


def used(upstream):
    return [key_of(received) for received in upstream.received]


def refusing(bad, status=429, fields=b""):
    """An upstream's answer function: `status` for the keys in `bad`, else 200. The body tells the key's place and counts the answers."""
    count = [0]

    def answer(received):
        count[0] += 1
        body = b'{"error":{"message":"key %d, answer %d"}}' % (KEYS.index(key_of(received)) + 1, count[0])
        received.send(b"HTTP/1.1 %d No\r\n%bContent-Length: %d\r\n\r\n" % (status, fields, len(body)) + body if key_of(received) in bad else OK)
    return answer


def test_the_keys_are_used_in_turn(upstream, ring):
    assert [ring.chat().status for _ in range(7)] == [200] * 7
    order = used(upstream)
    assert sorted(order[:3]) == sorted(KEYS) and order[3:6] == order[:3] and order[6] == order[0]


@pytest.mark.parametrize("status", SPENT)
@pytest.mark.parametrize("body", [b'{"model": "m",  "x": [1,\t2]}', b""], ids=["body", "no body"])
def test_the_next_key_is_tried_with_the_same_request(upstream, ring, status, body):
    upstream.answer = refusing([])
    ring.chat()
    first, second, third = [KEYS[(KEYS.index(used(upstream)[0]) + step) % 3] for step in (1, 2, 3)]     # their turns from now on
    upstream.answer = refusing([first, second], status)
    reply = ring.chat(body, fields=[("OpenAI-Beta", "x")])
    assert reply.status == 200 and reply.body == b'{"ok":true}' and used(upstream)[1:] == [first, second, third]
    assert [received.body for received in upstream.received[1:]] == [body] * 3
    assert len({re.sub(b"sk-[a-z-]+", b"", received.head) for received in upstream.received[1:]}) == 1
    assert ring.wait_for_record(2)["upstream_status"] == 200


@pytest.mark.parametrize("status", [400, 404, 408, 409, 500, 503])
def test_an_answer_that_no_other_key_would_mend_is_relayed(upstream, ring, status):
    upstream.answer = refusing(KEYS, status)
    assert ring.chat().status == status and len(upstream.received) == 1


def test_an_upstream_that_hangs_up_is_not_asked_again_with_another_key(upstream, ring):
    upstream.answer = lambda received: received.reset()
    assert ring.chat().status == 502 and len(upstream.received) == 1


@pytest.mark.parametrize("status", [402, 403, 429])
def test_when_all_keys_are_spent_each_was_tried_once_and_the_last_answer_comes_down(upstream, ring, status):
    upstream.answer = refusing(KEYS, status, b"X-Place: y\r\nRetry-After: 77\r\n")
    reply = ring.chat()
    assert sorted(used(upstream)) == sorted(KEYS)
    assert reply.status == status and reply.get("retry-after") == "77" and reply.complete
    assert reply.json == {"error": {"message": "key %d, answer 3" % (KEYS.index(used(upstream)[-1]) + 1)}}


def test_when_all_keys_are_rejected_the_client_does_not_hear_that_its_own_is_wrong(upstream, ring):
    upstream.answer = refusing(KEYS, 401)
    reply = ring.chat()
    assert reply.status == 502 and reply.code == "upstream_credentials_rejected" and sorted(used(upstream)) == sorted(KEYS)
    upstream.answer = OK                    # and if they are all resting, one is asked all the same
    assert ring.chat().status == 200


def test_a_rejected_key_is_set_aside_with_one_warning_that_does_not_hold_it(upstream, ring, capsys):
    upstream.answer = refusing([KEYS[1]], 401)
    assert [ring.chat().status for _ in range(9)] == [200] * 9
    assert used(upstream).count(KEYS[1]) == 1
    said = capsys.readouterr().err
    assert said.count("key 2 of 3") == 1 and said.count("\n") == 1 and "sk-" not in said


def test_requests_that_cross_find_a_rejected_key_and_warn_once(upstream, relay, capsys):
    running = relay(KEY="%s,%s" % (KEYS[0], KEYS[1]), CLIENT_KEYS="alice=ck-alice")
    both = threading.Barrier(2)

    def answer(received):
        if key_of(received) == KEYS[0]:
            both.wait(PATIENCE)
            received.send(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        else:
            received.send(OK)
    upstream.answer, replies = answer, []
    threads = [threading.Thread(target=lambda: replies.append(running.chat().status)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 4 and used(upstream).count(KEYS[0]) == 2
    assert capsys.readouterr().err.count("key 1 of 2") == 1


def test_a_key_with_a_retry_after_is_left_alone(upstream, ring):
    upstream.answer = refusing([KEYS[0]], 429, b"Retry-After: 3600\r\n")
    assert [ring.chat().status for _ in range(9)] == [200] * 9
    assert used(upstream).count(KEYS[0]) == 1


def test_the_others_share_the_turns_of_a_key_that_rests(upstream, ring):
    upstream.answer = refusing([KEYS[0]], 401)
    for _ in range(20):
        ring.chat()
    assert abs(used(upstream).count(KEYS[1]) - used(upstream).count(KEYS[2])) <= 2


def head(status, *fields):
    """An answer as KeyRing.set_aside looks at it."""
    class Answer:
        head = aiproxy.Head((b"1", b"%d" % status, b""), list(fields))
    Answer.status = status
    return Answer


def rests(*answer):
    """For how many seconds the first of two keys rests after `answer`: found by asking whose turn it is."""
    keys = aiproxy.KeyRing(2)
    keys.set_aside(0, head(*answer), 1000.0, lambda text: None)
    ready = [seconds for seconds in (0, 0.4, 1, 2, 20, 60, 61, 120, 3600, 10 ** 9) if any(0 in keys.order(1000.0 + seconds + 0.001) for _ in range(2))]
    return min(ready, default=math.inf)


@pytest.mark.parametrize("answer,expected", [
    ((429,), 60), ((402,), 60), ((403,), 60), ((401,), math.inf), ((401, (b"retry-after", b"2")), math.inf),
    ((429, (b"retry-after", b"2")), 2), ((429, (b"retry-after", b"120")), 120), ((429, (b"retry-after", b"0")), 0), ((403, (b"retry-after", b"20")), 20),
    ((429, (b"retry-after", b"soon")), 60), ((429, (b"retry-after", b"-1")), 60), ((429, (b"retry-after", b"")), 60), ((429, (b"retry-after", b"nan")), 60),
], ids=str)
def test_how_long_a_key_rests(answer, expected):
    assert rests(*answer) == expected


def test_a_retry_after_may_be_a_date():     # RFC 9110 section 10.2.3
    assert rests(429, (b"retry-after", email.utils.formatdate(time.time() + 3000, usegmt=True).encode())) == 3600


def test_if_all_keys_rest_the_one_that_is_ready_first_is_tried():
    keys = aiproxy.KeyRing(3)
    for place, seconds in ((0, b"30"), (1, b"10"), (2, b"20")):
        keys.set_aside(place, head(429, (b"retry-after", seconds)), 1000.0, lambda text: None)
    assert [keys.order(1001.0) for _ in range(3)] == [[1]] * 3
    assert sorted(keys.order(1021.0)) == [1, 2]


def test_one_key_alone_is_tried_whatever_was_said_of_it_and_is_not_warned_of_as_one_of_many(upstream, relay, capsys):
    running = relay(KEY=KEYS[0], CLIENT_KEYS="alice=ck-alice")
    upstream.answer = refusing(KEYS, 429, b"Retry-After: 3600\r\n")
    assert [running.chat().status for _ in range(2)] == [429, 429]
    assert len(upstream.received) == 2 and "of 1" not in capsys.readouterr().err


# ---- what is never sent again


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_was_streamed_is_not_replayed(upstream, ring, framing):
    upstream.answer = refusing(KEYS)
    half = bytes(70000)
    with ring.client() as client:
        client.request("POST", CHAT, chunk(half) if framing == "chunked" else half,
                       [("Authorization", "Bearer ck-alice"), ("Transfer-Encoding", "chunked") if framing == "chunked" else ("Content-Length", "140000")])
        upstream.wait_for()                 # it is on its way up: nobody holds it any more
        client.send(chunk(half) + b"0\r\n\r\n" if framing == "chunked" else half)
        assert client.read_reply().status == 429
    assert len(upstream.received) == 1 and upstream.received[0].body == half * 2


def test_once_the_first_byte_has_gone_down_nothing_is_tried_again(upstream, ring):
    def answer(received):
        received.send(EVENT_HEAD + chunk(event('{"error":{"code":429}}')))
        received.close()
    upstream.answer = answer
    reply = ring.chat()
    assert reply.status == 200 and not reply.complete and len(upstream.received) == 1


def test_a_client_that_leaves_between_two_keys_stops_the_search(upstream, ring):
    asked, left = threading.Event(), threading.Event()

    def answer(received):
        asked.set()
        assert left.wait(PATIENCE)
        received.wait_closed()
    upstream.answer = answer
    with ring.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
        assert asked.wait(PATIENCE)
    left.set()
    assert ring.wait_for_record()["outcome"] == "client_gone" and len(upstream.received) == 1


def test_no_key_of_the_ring_reaches_a_client(upstream, ring):
    def answer(received):
        body = b"You sent " + KEYS[0].encode()
        received.send(b"HTTP/1.1 403 No %b\r\nX-Echo: %b\r\nContent-Length: %d\r\n\r\n" % (KEYS[1].encode(), KEYS[2].encode(), len(body)) + body)
    upstream.answer = answer
    reply = ring.chat()
    assert reply.status == 502 and not any(key.encode() in reply.raw_head + reply.body for key in KEYS)
