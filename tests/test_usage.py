"""Prompt and completion tokens are logged, read from responses as they pass.

No byte of a response is delayed or changed for it.
"""

import gzip
import json
import threading
import tracemalloc

import pytest

from support import CHAT, EVENT_HEAD, PATIENCE, Client, Program, chunk, event

AUTH = [("Authorization", "Bearer ck-alice")]


def answer(body, fields=b""):
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (fields, len(body)) + body


def tokens(record):
    return record["prompt_tokens"], record["completion_tokens"]


def used(upstream, relay, response, body):
    """The tokens logged for a request to which the upstream sends `response`.

    The client must have received `body`.
    """
    upstream.answer = response
    reply = relay.chat()

    assert reply.complete
    assert reply.body == body

    return tokens(relay.wait_for_record())


def encode(value, **options):
    return json.dumps(value, **options).encode()


def events(*objects):
    return b"".join(event(json.dumps(one)) for one in objects) + event("[DONE]")


USAGE = {
    "prompt_tokens": 22,
    "completion_tokens": 7,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
}
DELTA = {
    "id": "x",
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": {"content": "Hi"}}],
}
MESSAGE = {"message": {"content": "Hi"}}
FORGED_USAGE = '{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'

# A body that an upstream sends, and the prompt and completion tokens in it.
BODIES = {
    "JSON": (encode({"id": "x", "choices": [MESSAGE], "usage": USAGE}), (22, 7)),
    "JSON without spaces": (encode({"usage": USAGE, "choices": []}, separators=",:"), (22, 7)),
    "JSON in lines": (encode({"choices": [], "usage": USAGE}, indent=2), (22, 7)),
    "JSON with tabs": (
        b'{"usage"\t:\r\n\t{"completion_tokens"\t:\t7 ,\n"prompt_tokens" : 22}\r\n}',
        (22, 7),
    ),
    "embeddings": (
        b'{"object":"list","data":[{"embedding":[0.5]}],'
        b'"usage":{"prompt_tokens":8,"total_tokens":8}}',
        (8, None),
    ),
    "no usage": (b'{"choices":[]}', (None, None)),
    "null": (b'{"usage":null}', (None, None)),
    "empty": (b'{"usage":{}}', (None, None)),
    "not numbers": (b'{"usage":{"prompt_tokens":"many","completion_tokens":null}}', (None, None)),
    "another type": (b'{"usage":[{"prompt_tokens":1}]}', (None, None)),
    "incomplete": (b'{"usage":{"prompt_tokens":22,"completion_to', (None, None)),
    "not UTF-8": (
        b'{"usage":{"note":"\xff\xfe","prompt_tokens":22,"completion_tokens":7}}',
        (22, 7),
    ),
    "in the text of the model": (
        encode({"choices": [{"message": {"content": FORGED_USAGE}}]}),
        (None, None),
    ),
    "in the text of the model, then the real one": (
        encode({"choices": [{"text": '"usage":{"prompt_tokens":1}'}], "usage": USAGE}),
        (22, 7),
    ),
    "Anthropic": (
        b'{"type":"message","content":[{"type":"text","text":"Hi"}],'
        b'"usage":{"input_tokens":22,"cache_read_input_tokens":0,"output_tokens":7}}',
        (22, 7),
    ),
    "Responses": (
        b'{"object":"response","output":[],'
        b'"usage":{"input_tokens":22,"input_tokens_details":{"cached_tokens":0},'
        b'"output_tokens":7,"output_tokens_details":{"reasoning_tokens":5},'
        b'"total_tokens":29},"user":null,"metadata":{}}',
        (22, 7),
    ),
    "events, usage in the last": (
        events(DELTA, DELTA, dict(DELTA, choices=[], usage=USAGE)),
        (22, 7),
    ),
    "events, usage null but in the last": (
        events(
            dict(DELTA, usage=None), dict(DELTA, usage=None), dict(DELTA, choices=[], usage=USAGE)
        ),
        (22, 7),
    ),
    "events, usage growing in each": (
        events(*(dict(DELTA, usage=dict(USAGE, completion_tokens=n)) for n in range(8))),
        (22, 7),
    ),
    "events, usage before others": (
        events(
            dict(DELTA, usage=USAGE),
            DELTA,
            dict(DELTA, usage=None),
            dict(DELTA, choices=[{"delta": {"content": "x" * 9000}}]),
        ),
        (22, 7),
    ),
    "events without usage": (events(DELTA, DELTA), (None, None)),
    "Anthropic events": (
        b'event: message_start\n'
        b'data: {"type":"message_start","message":{"id":"x","content":[],'
        b'"usage":{"input_tokens":22,"output_tokens":1}}}\n\n'
        b'event: content_block_delta\n'
        b'data: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"Hi"}}\n\n'
        b'event: message_delta\n'
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"output_tokens":7}}\n\n'
        b'event: message_stop\n'
        b'data: {"type":"message_stop"}\n\n',
        (22, 7),
    ),
    "Responses events": (
        b'event: response.created\n'
        b'data: {"type":"response.created","response":{"id":"x","usage":null}}\n\n'
        b'event: response.completed\n'
        b'data: {"type":"response.completed","response":{"id":"x","output":[],'
        b'"usage":{"input_tokens":22,"output_tokens":7,"total_tokens":29},"user":null}}\n\n',
        (22, 7),
    ),
}


@pytest.mark.parametrize("framing", ["length", "chunked", "until close"])
@pytest.mark.parametrize("name", list(BODIES))
def test_tokens_are_read_from_every_shape_of_response(upstream, hidden, name, framing):
    body, expected = BODIES[name]

    def until_close(received):
        received.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        received.close()

    response = {
        "length": answer(body),
        "chunked": EVENT_HEAD + chunk(body) + b"0\r\n\r\n",
        "until close": until_close,
    }[framing]

    assert used(upstream, hidden, response, body) == expected


@pytest.mark.parametrize("name", [
    "JSON",
    "events, usage null but in the last",
    "events, usage growing in each",
    "Anthropic events",
    "Responses events",
])
def test_tokens_are_read_from_pieces_of_one_byte(upstream, hidden, name):
    body, expected = BODIES[name]
    chunks = b"".join(chunk(body[at : at + 1]) for at in range(len(body)))
    response = EVENT_HEAD + chunks + b"0\r\n\r\n"

    assert used(upstream, hidden, response, body) == expected


PADDING = json.dumps({"choices": [{"message": {"content": "x" * 9000}}]})[:-1].encode()


@pytest.mark.parametrize("front,body", [
    (b"", b'{"choices":[],"usage" : {"prompt_tokens":22,"completion_tokens":7,"total_tokens":29}}'),
    (PADDING, b', "usage": {"prompt_tokens": 22, "completion_tokens": 7}}'),
    (
        event(json.dumps(dict(DELTA, usage={"prompt_tokens": 22, "completion_tokens": 6}))),
        event('{"choices":[],"usage":{"prompt_tokens":22,"completion_tokens":7}}')
        + event("[DONE]"),
    ),
], ids=["JSON", "after a long text", "events"])
def test_tokens_are_read_wherever_the_response_is_split(upstream, hidden, front, body):
    gate = threading.Semaphore(0)
    at = [0]

    def in_two(received):
        received.send(answer(front + body)[: -len(body) + at[0] or None])
        assert gate.acquire(timeout=PATIENCE)

        received.send(body[at[0] :])

    upstream.answer = in_two
    wrong = []

    with hidden.client() as client:
        for at[0] in range(len(body)):
            client.request("POST", CHAT, b"{}", AUTH)
            client.read_head()
            # the relay has read the first piece alone
            assert client.read_exactly(len(front) + at[0]) == front + body[: at[0]]

            gate.release()
            assert client.read_exactly(len(body) - at[0]) == body[at[0] :]

            if tokens(hidden.wait_for_record(at[0] + 1)) != (22, 7):
                wrong.append(at[0])

    assert not upstream.errors
    assert not wrong


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_compressed_response_is_unchanged_and_its_tokens_are_not_guessed(
    upstream, hidden, framing
):
    body = gzip.compress(BODIES["JSON"][0] * 50)
    coding = b"Content-Encoding: gzip\r\n"

    if framing == "length":
        response = answer(body, coding)
    else:
        head = EVENT_HEAD.replace(b"\r\n\r\n", b"\r\n" + coding + b"\r\n")
        response = head + chunk(body[:9]) + chunk(body[9:]) + b"0\r\n\r\n"

    assert used(upstream, hidden, response, body) == (None, None)


def test_an_event_with_usage_is_not_delayed(upstream, hidden):
    first = event('{"usage":{"prompt_tokens":22,"comp')
    gate = threading.Event()

    def response(received):
        received.send(EVENT_HEAD + chunk(first[:-2]))
        assert gate.wait(PATIENCE)
        received.send(chunk(b'letion_tokens":7}}\n\n') + b"0\r\n\r\n")

    upstream.answer = response
    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", AUTH)
        client.read_head()
        assert client.read_chunk() == first[:-2]

        gate.set()
        assert client.read_chunk() == b'letion_tokens":7}}\n\n'
        assert client.read_chunk() == b""

    assert tokens(hidden.wait_for_record()) == (22, 7)


def test_tokens_reported_before_the_upstream_died_are_logged(upstream, hidden):
    def response(received):
        received.send(EVENT_HEAD + chunk(event(json.dumps(dict(DELTA, usage=USAGE)))))
        received.close()

    upstream.answer = response

    assert not hidden.chat().complete
    assert tokens(hidden.wait_for_record()) == (22, 7)
    assert hidden.records[0]["outcome"] == "upstream_died"


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_line_shows_who_used_how_much(upstream, form):
    upstream.answer = answer(BODIES["JSON"][0])
    environ = {
        "AIPROXY_UPSTREAM": upstream.url,
        "AIPROXY_KEY": "sk-hidden-key",
        "AIPROXY_CLIENT_KEYS": "alice=ck-alice",
        "AIPROXY_LOG": form,
    }
    requests = [
        ("POST", CHAT, b"{}", ("22", "7")),
        ("GET", "/health", None, ("-", "-")),
    ]

    with Program(env=environ) as program:
        for method, path, body, shown in requests:
            with Client(program.address) as client:
                client.request(method, path, body, AUTH)
                assert client.read_reply().status == 200

            line = program.wait_for_line(program.lines, ".* ?\"?" + path + ".*").group()
            if form == "text":
                assert "tokens=%s+%s" % shown in line.split()
                assert " alice " in line or path == "/health"
            else:
                record = json.loads(line)
                assert tokens(record) == ((22, 7) if path == CHAT else (None, None))
                assert record["client"] == "alice" or path == "/health"


BOMBS = [
    b'{"usage":{"a":' + b"[" * 60000,
    b'{"usage":{"a":' + b'{"a":' * 13000,
    b'{"usage":{"prompt_tokens":' + b"9" * 4000 + b',"completion_tokens":1}}',
    b'{"usage":{' * 9000,
]


def test_a_malicious_usage_object_does_no_harm(upstream):
    with Program(env={"AIPROXY_UPSTREAM": upstream.url}) as program:
        with Client(program.address) as client:
            for bomb in BOMBS:
                upstream.answer = EVENT_HEAD + chunk(bomb) + b"0\r\n\r\n"
                for _ in range(2):
                    client.request("POST", CHAT, b"{}")
                    reply = client.read_reply()
                    assert reply.body == bomb
                    assert reply.complete

            program.wait_for_line(program.lines, CHAT)
            assert program.stop() == 0

    assert "fault" not in "".join(program.errors)


def test_a_response_full_of_usage_objects_is_not_copied_for_each(upstream, hidden):
    body = b'{"usage":{' * 6000
    upstream.answer = answer(body)
    tracemalloc.start()

    try:
        assert hidden.chat().body == body
        hidden.wait_for_record()
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_what_anthropics_cache_had_or_took_is_input_as_well(upstream, hidden):
    usage = {"input_tokens": 4, "cache_creation_input_tokens": 1200,
             "cache_read_input_tokens": 51000, "output_tokens": 7}
    body = encode({"type": "message", "usage": usage})
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert used(upstream, hidden, lambda received: received.send(head + body), body) == (52204, 7)


@pytest.mark.parametrize("usages,counted", [
    # The last event says the cache again, without the rest of the input.
    ([{"input_tokens": 4, "cache_read_input_tokens": 50, "output_tokens": 1},
      {"cache_read_input_tokens": 50, "output_tokens": 7}], (54, 7)),
    ([{"input_tokens": 4, "cache_read_input_tokens": 50, "output_tokens": 1},
      {"input_tokens": 4, "cache_read_input_tokens": 50, "output_tokens": 7}], (54, 7)),
    # Gateways that speak OpenAI's format have it in prompt_tokens.
    ([{"prompt_tokens": 54, "cache_read_input_tokens": 50, "completion_tokens": 7}], (54, 7)),
])
def test_what_a_cache_had_is_counted_once(upstream, hidden, usages, counted):
    body = events(*[{"usage": usage} for usage in usages])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
    response = head % len(body) + body
    assert used(upstream, hidden, lambda received: received.send(response), body) == counted
