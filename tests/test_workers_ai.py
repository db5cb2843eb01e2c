"""Workers AI through a real relay: what goes up, what comes down, and what never does.

fake_cloudflare.py is the other side. Each shape by itself is in test_translate.py; here is what
needs sockets. Responses of /ai/v1 that are not streams, embeddings and events of the Responses API
have not been recorded by anybody: those of the fake are assumed, by the docs and the types.
"""
import base64
import json
import queue
import re
import struct
import threading
import time

import pytest

import aiproxy
from aiproxy import SettingError, Settings
from fake_cloudflare import (ACCOUNT, BASE, BROKEN, CHAT as MODELS, LEAK, LLAMA_31, MID_STREAM,
                             QWEN_3, TOKEN, UUID, FakeCloudflare, delta, envelope, error_envelope,
                             read_sse, settings, sse)
from support import CHAT, EVENT_HEAD, PATIENCE, Client, Program, banner_of, chunk

AUTH = [("Authorization", "Bearer ck-alice")]
LLAMA = "@cf/meta/llama-3.1-8b-instruct"
HELLO = [{"role": "user", "content": "Hello?"}]
SECRETS = (ACCOUNT, TOKEN)


@pytest.fixture
def cloudflare():
    with FakeCloudflare() as fake:
        yield fake
        assert not fake.errors


@pytest.fixture
def workers(cloudflare, relay, capfd):
    """start(**settings) starts a relay that makes OpenAI's API of the fake account.

    No fault may be printed.
    """
    def start(**others):
        names = {
            name.replace("AIPROXY_", "", 1): value
            for name, value in settings(cloudflare).items()
        }
        return relay(**dict(names, **others))
    yield start
    assert "fault" not in capfd.readouterr().err


def post(running, path=CHAT, fields=(), version="HTTP/1.1", **body):
    """The reply to a request with these members, null ones left out.

    A chat has the messages HELLO and the model LLAMA unless others are given.
    """
    if path == CHAT:
        body = dict({"messages": HELLO}, **body)
    body = {
        name: value
        for name, value in dict({"model": LLAMA}, **body).items()
        if value is not None
    }
    return running.ask("POST", path, json.dumps(body).encode(), AUTH + list(fields), version)


def events_of(reply_or_bytes):
    """The JSON of each event, "[DONE]" as it is."""
    data = getattr(reply_or_bytes, "body", reply_or_bytes)
    return [data if data == "[DONE]" else json.loads(data) for _, data in read_sse(data)]


def text_of(events):
    return "".join(
        one.get("delta", one).get("content", one.get("text")) or ""
        for event in events if event != "[DONE]" for one in event["choices"])


# -- requests


@pytest.mark.parametrize(
    "sent,goes_up",
    [(b'{ "model" : "glm-4.7-flash", "messages":[{"role":"user","content":[{"type":"text",'
      b'"text":"h\\u00e9"},{"type":"image_url","image_url":{"url":"data:,x"}}]}],'
      b' "max_tokens":5, "tools":[{"type":"function","function":{"name":"f",'
      b'"parameters":{}}}], "response_format":{"type":"json_object"}, '
      b'"reasoning_effort":"low",'
      b' "chat_template_kwargs":{"enable_thinking":false}, "temperature":0.10, '
      b'"unknown":[1e2,null] }',
      b'{ "model" : "@cf/zai-org/glm-4.7-flash", "messages":[{"role":"user",'
      b'"content":[{"type":"text","text":"h\\u00e9"},{"type":"image_url",'
      b'"image_url":{"url":"data:,x"}}]}],'
      b' "max_tokens":5, "tools":[{"type":"function","function":{"name":"f",'
      b'"parameters":{}}}], "response_format":{"type":"json_object"}, '
      b'"reasoning_effort":"low",'
      b' "chat_template_kwargs":{"enable_thinking":false}, "temperature":0.10, '
      b'"unknown":[1e2,null] }'),
     (b'{"model":"@cf/zai-org/glm-4.7-flash","messages":[{"role":"assistant",'
      b'"content":null,"tool_calls":[{"id":"a"}]},{"role":"tool","tool_call_id":"a",'
      b'"content":"7"}]}', b'{"max_tokens": 4096, "model":"@cf/zai-org/glm-4.7-flash",'
      b'"messages":[{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}, '
      b'{"role": "tool", "tool_call_id": "a", "content": "7"}]}')],
    ids=["an alias", "no max_tokens"])
def test_a_body_goes_up_as_the_client_sent_it_but_for_model_and_a_missing_max_tokens(
        cloudflare, workers, sent, goes_up):
    running = workers()
    running.ask("POST", CHAT, sent, AUTH)
    received = cloudflare.wait_for()
    assert received.line == "POST %s/ai/v1/chat/completions HTTP/1.1" % BASE
    assert received.body == goes_up


def test_the_head_that_goes_up_has_our_token_and_nothing_of_the_clients_key(cloudflare, workers):
    post(
        workers(),
        fields=[
            ("Accept-Encoding", "gzip, br"), ("x-session-affinity", "ses-1"),
            ("User-Agent", "OpenAI/Python"), ("Content-Type", "text/plain"), ("Cookie", "a=b"),
            ("X-Forwarded-For", "203.0.113.7"), ("x-api-key", "ck-alice"),
            ("Origin", "https://page.example")])
    received = cloudflare.wait_for()
    assert received.fields("authorization") == ["Bearer " + TOKEN]
    assert received.fields("accept-encoding") == ["identity"]
    assert received.fields("content-type") == ["application/json"]
    assert received.field("x-session-affinity") == "ses-1"
    assert received.field("host") == "127.0.0.1:%d" % cloudflare.port
    for word in (b"ck-alice", b"203.0.113.7", b"page.example", b"a=b"):
        assert word not in cloudflare.all_bytes


@pytest.mark.parametrize(
    "path,body,up,sent_up",
    [
        (
            "/v1/completions", {"prompt": "Once"}, "/ai/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4096}),
        (
            "/v1/completions", {"prompt": ["Once"], "max_tokens": 3}, "/ai/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 3}),
        (
            CHAT, {"max_completion_tokens": 9}, "/ai/v1/chat/completions",
            {"messages": HELLO, "max_completion_tokens": 9, "max_tokens": 9}),
        ("/v1/embeddings", {"input": "Once"}, "/ai/v1/embeddings", {"input": "Once"}),
        (
            "/v1/responses", {"input": "Once"}, "/ai/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4096}),
        (
            "/v1/v1/responses", {"input": "Once", "max_output_tokens": 3},
            "/ai/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 3}),
        ("/embeddings", {"input": ["a", "b"]}, "/ai/v1/embeddings", {"input": ["a", "b"]})],
    ids=lambda value: value if isinstance(value, str) else "")
def test_each_path_has_its_own_upstream(cloudflare, workers, path, body, up, sent_up):
    assert post(workers(), path, **body).status == 200
    received = cloudflare.wait_for()
    assert received.line == "POST %s%s HTTP/1.1" % (BASE, up)
    assert json.loads(received.body) == dict(sent_up, model=LLAMA)


@pytest.mark.parametrize(
    "requested,sent_up",
    [
        ({}, {"max_tokens": 100}), ({"n": 2}, {"max_tokens": 50, "n": 2}),
        ({"max_tokens": 101}, {"max_tokens": 100}),
        ({"max_completion_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 7}),
        ({"max_output_tokens": 7}, {"max_output_tokens": 7, "max_tokens": 100})], ids=str)
def test_aiproxy_max_tokens_is_the_most_that_goes_up(cloudflare, workers, requested, sent_up):
    running = workers(MAX_TOKENS=100)
    assert post(running, **requested).status == 200
    assert json.loads(cloudflare.wait_for().body) == dict(sent_up, model=LLAMA, messages=HELLO)
    assert len(cloudflare.received) == 1


def test_aiproxy_max_tokens_holds_for_responses(cloudflare, workers):
    post(workers(MAX_TOKENS=100), "/v1/responses", input="Once")
    assert json.loads(cloudflare.wait_for().body) == {
        "max_tokens": 100, "model": LLAMA, "messages": [{"role": "user", "content": "Once"}]}


# -- what agents send: two turns with a tool, in the shapes of their sources [T]

SHELL = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
CHAT_SHELL = {"type": "function", "function": {
    "name": "shell", "description": "Run a command.", "strict": True, "parameters": SHELL}}
RESULT = "README.md"


def roo(call_id):
    """Roo Code: everything in parts, and what the model said beside its call is null."""
    messages = [
        {"role": "system", "content": "You are Roo."},
        {"role": "user", "content": [{"type": "text", "text": "<task>list</task>"},
                                     {"type": "text", "text": "<environment_details/>"}]}]
    if call_id:
        function = {"name": "shell", "arguments": '{"command":"ls"}'}
        messages += [
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": call_id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call_id, "content": RESULT},
            {"role": "user", "content": [{"type": "text", "text": "<environment_details/>"}]}]
    return CHAT, {
        "messages": messages, "temperature": 0, "stream": True, "tools": [CHAT_SHELL],
        "stream_options": {"include_usage": True}, "tool_choice": "auto",
        "parallel_tool_calls": False, "max_tokens": 8192}


def opencode(call_id):
    """opencode: the AI SDK for compatible APIs, whose assistant has no content beside its call."""
    messages = [{"role": "system", "content": "You are opencode."},
                {"role": "user", "content": "list"}]
    if call_id:
        function = {"name": "shell", "arguments": '{"command":"ls"}'}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "id": call_id, "function": function}]},
            {"role": "tool", "tool_call_id": call_id, "content": RESULT}]
    return CHAT, {
        "messages": messages, "max_tokens": 32000, "top_p": 1, "stream": True,
        "stream_options": {"include_usage": True}, "tools": [CHAT_SHELL], "tool_choice": "auto"}


def codex(call_id):
    """Codex: the Responses API with nothing stored, and tools that only OpenAI has."""
    texts = [("developer", "<permissions/>"), ("user", "<environment_context/>"), ("user", "list")]
    items = [{"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}
             for role, text in texts]
    if call_id:
        items += [
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "name": "shell", "arguments": '{"command":"ls"}',
             "call_id": call_id},
            {"type": "function_call_output", "call_id": call_id, "output": RESULT}]
    tool = dict(CHAT_SHELL["function"], type="function")
    return "/v1/responses", {
        "instructions": "You are Codex.", "input": items, "tool_choice": "auto", "store": False,
        "tools": [tool, {"type": "web_search", "external_web_access": False},
                  {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}],
        "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
        "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199",
        "text": {"verbosity": "medium"}, "client_metadata": {"x-codex-installation-id": "0199"}}


@pytest.mark.parametrize("agent", [roo, opencode, codex])
def test_an_agent_gets_through_two_turns_with_a_tool(cloudflare, workers, agent):
    running = workers()
    path, first = agent(None)
    reply = post(running, path, model="gpt-oss-20b", **first)
    assert (reply.status, reply.complete) == (200, True)
    if path == CHAT:
        deltas = [event["choices"][0]["delta"] for event in events_of(reply)[:-2]]
        call, = [one["tool_calls"][0] for one in deltas
                 if "id" in one.get("tool_calls", [{}])[0]]
        call_id = call["id"]
    else:
        output = events_of(reply)[-1]["response"]["output"]
        call_id, = [item["call_id"] for item in output if item["type"] == "function_call"]

    path, second = agent(call_id)
    reply = post(running, path, model="gpt-oss-20b", **second)
    assert reply.status == 200
    sent_up = json.loads(cloudflare.received[-1].body)["messages"]
    assert all(isinstance(message["content"], str) for message in sent_up)
    results = [message for message in sent_up if message["role"] == "tool"]
    assert [message["tool_call_id"] for message in results] == [call_id]
    if path != CHAT:
        assert events_of(reply)[-1]["response"]["output"][0]["content"][0]["text"] == "It is sunny."


WEATHER = {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}
FORCED = {
    CHAT: {"tools": [{"type": "function", "function": WEATHER}],
           "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    "/v1/responses": {"input": "Once", "tools": [dict(WEATHER, type="function")],
                      "tool_choice": {"type": "function", "name": "get_weather"}}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", list(FORCED))
def test_a_forced_call_that_comes_as_text_is_a_call(workers, path, stream):
    running = workers()
    reply = post(running, path, model="gpt-oss-120b", stream=stream, **FORCED[path])
    assert (reply.status, reply.complete) == (200, True)
    if path != CHAT:
        response = events_of(reply)[-1]["response"] if stream else reply.json
        call, = response["output"]
    elif stream:
        events = events_of(reply)
        assert text_of(events) == "" and events[-2]["choices"][0]["finish_reason"] == "tool_calls"
        call = events[1]["choices"][0]["delta"]["tool_calls"][0]["function"]
    else:
        choice, = reply.json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
        call = choice["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})

    # The same text stays text where nothing was forced.
    reply = post(running, path, model="gpt-oss-120b", **dict(FORCED[path], tool_choice="auto"))
    assert json.dumps(LEAK) in reply.body.decode()


# -- whole responses


@pytest.mark.parametrize("model", list(MODELS))
def test_every_shape_is_a_clean_chat_completion(workers, model):
    running = workers(MODELS="mine=" + model)
    reply = post(running, model="mine")
    assert (reply.status, reply.complete, reply.all("content-type"),
            reply.all("content-length")) == (200, True, ["application/json"], [
                str(len(reply.body))
            ])
    result = reply.json
    usage = result.pop("usage", {"total_tokens": 1})
    assert set(result) == {"id", "object", "created", "model", "choices"}
    assert usage["total_tokens"] > 0
    assert result["id"].startswith("chatcmpl-")
    assert result["object"] == "chat.completion"
    assert result["model"] == "mine"
    choice, = result["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    calls = choice["message"].get("tool_calls")
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    assert isinstance(choice["message"]["content"], type(None) if calls else str)
    for one in calls or ():
        assert one["type"] == "function"
        assert one["id"]
        assert isinstance(json.loads(one["function"]["arguments"]), dict)
        assert one["function"]["name"] == "get_weather"


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"], ids=["chat", "text"])
def test_every_shape_is_a_stream_where_one_was_requested(workers, model, path):
    reply = post(
        workers(), path, model=model, stream=True, **{} if path == CHAT else {"prompt": "Once"})
    assert (reply.status, reply.complete, reply.get("content-type").partition(";")[0]) == (
        200, True, "text/event-stream")
    events = events_of(reply)
    assert events.pop() == "[DONE]" and events
    assert {event["object"] for event in events} == {
        "chat.completion.chunk" if path == CHAT else "text_completion"}
    assert {event["model"] for event in events} == {model}
    assert len({event["id"] for event in events}) == 1
    assert not any("usage" in event for event in events)
    assert [bool(event["choices"][0]["finish_reason"]) for event in events] == [False] * (len(
        events) - 1) + [True]
    if path == CHAT:
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    else:
        assert all(
            set(event["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
            for event in events)


def test_a_completion_is_a_text_completion(workers):
    result = post(workers(), "/v1/completions", prompt="Once").json
    assert result.pop("id").startswith("cmpl-") and result.pop("created")
    assert result == {
        "object": "text_completion", "model": LLAMA,
        "choices": [{"index": 0, "text": "4", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 24, "total_tokens": 33}}


@pytest.mark.parametrize("model", ["@cf/baai/bge-m3", "@cf/legacy/bge", "@cf/base64/bge"])
@pytest.mark.parametrize("requested", ["Once", ["Once", "é"]], ids=["a string", "a list"])
def test_embeddings_are_base64_where_that_is_requested(workers, model, requested):
    result = post(workers(), "/v1/embeddings", model=model, input=requested,
                  encoding_format="base64").json
    vectors = [struct.unpack("<2f", base64.b64decode(one["embedding"])) for one in result["data"]]
    assert vectors == [(4.0, -0.5)] + [(1.0, -0.5)] * (len(requested) == 2)
    assert result["model"] == model and result["object"] == "list"
    assert [(one["object"], one["index"]) for one in result["data"]] == [
        ("embedding", index)
        for index in range(len(vectors))]


@pytest.mark.parametrize("form", [None, "float"], ids=str)
def test_embeddings_are_floats_where_base64_is_not_requested(workers, form):
    result = post(
        workers(MODELS="bge=@cf/baai/bge-m3"), "/v1/embeddings", model="bge", input="Once",
        encoding_format=form).json
    assert result == {
        "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [4.0, -0.5]}],
        "model": "bge", "usage": {"prompt_tokens": 4, "total_tokens": 4}}


def test_embeddings_that_cannot_be_read_are_a_502(cloudflare, workers):
    running = workers()
    for rows in ([["x"]], [[1e38, 1e39]], [None], [{"embedding": None}], []):
        cloudflare.answer = lambda received: cloudflare.reply(received, {"data": rows})
        reply = post(running, "/v1/embeddings", input="Once", encoding_format="base64")
        assert (reply.status, reply.code) == (502, "upstream_bad_response"), rows


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_shape_is_a_response_of_the_responses_api(workers, model, stream):
    reply = post(workers(MODELS="mine=" + model), "/v1/responses", model="mine", input="Once",
                 stream=stream)
    assert (reply.status, reply.complete) == (200, True)
    response = reply.json if not stream else events_of(reply)[-1]["response"]
    assert (response["object"], response["model"], response["status"]) == (
        "response", "mine", "completed")
    for item in response["output"]:
        assert item["status"] == "completed"
        if item["type"] == "function_call":
            assert item["call_id"] and isinstance(json.loads(item["arguments"]), dict)
        else:
            assert item["content"][0]["text"]


# -- streams


def gated(cloudflare, blocks, end=b"0\r\n\r\n"):
    """Make the fake send a stream of `blocks`, each only when the gate of the last is set.

    Returns the gates.
    """
    gates = [threading.Event() for _ in blocks]

    def answer(received):
        received.send(EVENT_HEAD)
        for number, (block, gate) in enumerate(zip(blocks, gates)):
            received.send(chunk(block))
            assert gate.wait(PATIENCE), "event %d was not read by the client" % number
        received.send(end)
    cloudflare.answer = answer
    return gates


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_an_event_is_translated_and_relayed_before_the_next_one_is_sent(
        cloudflare, workers, version):
    gates = gated(cloudflare, [block + b"\n\n" for block in LLAMA_31.strip().split(b"\n\n")])
    with workers().client() as client:
        client.request(
            "POST", CHAT, json.dumps({"model": LLAMA, "messages": HELLO, "stream": True}).encode(),
            AUTH, version)
        reply = client.read_head()
        assert reply.get("content-type") == "text/event-stream; charset=utf-8"
        assert reply.get("x-accel-buffering") == "no"
        assert reply.get("cache-control") == "no-cache"
        framing = ("chunked", None) if version == "HTTP/1.1" else (None, "close")
        assert (reply.get("transfer-encoding"), reply.get("connection")) == framing
        for gate, mark in zip(gates, (b'"Hello"', b'"!"', b'"stop"', None, b"[DONE]")):
            data = client.read_until(mark) if mark else b""
            gate.set()
        assert b"finish_reason" not in data
        if version == "HTTP/1.1":
            assert client.read_until(b"0\r\n\r\n")
        else:
            assert client.read_until(b"\n\n") and client.ended()


def test_response_events_are_relayed_before_the_next_one_is_sent(cloudflare, workers):
    gates = gated(cloudflare, [block + b"\n\n" for block in LLAMA_31.strip().split(b"\n\n")])
    with workers().client() as client:
        client.request(
            "POST", "/v1/responses",
            json.dumps({"model": "gpt-oss-20b", "input": "Once", "stream": True}).encode(), AUTH)
        client.read_head()
        marks = (b'"delta": "Hello"', b'"delta": "!"', None, None, b"response.completed")
        for gate, mark in zip(gates, marks):
            if mark:
                client.read_until(mark)
            gate.set()
        assert client.read_until(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "model,usage",
    [
        (LLAMA, (45, 2)), ("@cf/meta/llama-4-scout-17b-16e-instruct", (1386, 1306)),
        ("@cf/openai/gpt-oss-20b", (136, 37)), ("@cf/shape/bare", (9, 24)),
        ("@cf/shape/number", None)])
@pytest.mark.parametrize("requested", [True, False])
def test_usage_comes_last_where_it_is_requested_and_is_honest(workers, model, usage, requested):
    running = workers()
    events = events_of(
        post(
            running, model=model, stream=True,
            stream_options={"include_usage": True} if requested else None))[:-1]
    with_choices = [event for event in events if event["choices"]]
    if requested and usage:
        assert (events[-1]["usage"]["prompt_tokens"],
                events[-1]["usage"]["completion_tokens"]) == usage
        assert events[-1]["choices"] == []
        assert len(with_choices) == len(events) - 1
    else:
        assert with_choices == events
    assert all(event.get("usage", 0) == (None if requested else 0) for event in with_choices)
    record = running.wait_for_record()
    assert (record["prompt_tokens"], record["completion_tokens"]) == (usage or (None, None))


def test_the_log_has_the_usage_of_every_kind(workers):
    running = workers()
    requested = [
        (CHAT, {}, (9, 24)), ("/v1/completions", {"prompt": "Once"}, (9, 24)),
        ("/v1/embeddings", {"model": "@cf/baai/bge-m3", "input": "Once"}, (4, None)),
        ("/v1/responses", {"input": "Once"}, (9, 24)),
        ("/v1/responses", {"input": "Once", "stream": True}, (45, 2)),
        (
            "/v1/responses", {"model": "@cf/shape/bare", "input": "Once", "stream": True},
            (9, 24))]
    for number, (path, body, usage) in enumerate(requested, 1):
        reply = post(running, path, **body)
        record = running.wait_for_record(number)
        assert ((record["prompt_tokens"], record["completion_tokens"]),
                record["bytes"]) == (usage, len(reply.body)), path
        assert (
            record["client"], record["path"], record["model"], record["status"],
            record["upstream_status"], record["outcome"]) == (
            "alice", path, body.get("model", LLAMA), 200, 200, "ok")


@pytest.mark.parametrize("name", [b"date", b"Date", b"DATE"])
def test_no_header_field_of_a_translated_response_appears_twice(cloudflare, workers, name):
    """Browsers refuse a response with two Access-Control-Allow-Origin fields."""
    body = json.dumps(envelope({"response": "Hello."})).encode()
    cloudflare.answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        b"%b: Thu, 26 Nov 2026 00:00:00 GMT\r\nContent-Length: %d\r\n\r\n" % (name, len(body))
        + body)
    reply = post(workers(ORIGINS="*"), fields=[("Origin", "https://app.example")])
    assert reply.status == 200
    for field in ("date", "x-request-id", "access-control-allow-origin", "content-length"):
        assert len(reply.all(field)) == 1, field
    assert reply.get("date") == "Thu, 26 Nov 2026 00:00:00 GMT"


def test_a_whole_response_that_ends_by_a_reset_is_a_502(cloudflare, workers):
    def answer(received):
        received.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + json.dumps(
                envelope({"response": "It may go on"})).encode())
        received.reset()
    cloudflare.answer = answer
    reply = post(workers())
    assert (reply.status, reply.code) == (502, "upstream_bad_response")


@pytest.mark.parametrize(
    "end", ["close", "reset", "broken chunk", "length", "half an event", "last chunk"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_stream_that_ends_early_ends_in_an_error_event_and_never_in_stop(
        cloudflare, workers, end, version):
    def answer(received):
        head, data = (
            (EVENT_HEAD, chunk(sse(delta(content="Hel"))))
            if end != "length" else (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: "
                b"999\r\n\r\n", sse(delta(content="Hel"))))
        received.send(
            head + data + {
                "broken chunk": b"zz\r\n", "half an event": chunk(b'data: {"choices":[{"ind'),
                "last chunk": b"0\r\n\r\n"
            }.get(end, b""))
        received.reset() if end == "reset" else received.close()
    cloudflare.answer = answer
    running = workers()
    reply = post(running, stream=True, version=version)
    # a reset may overtake what came before it
    if not (version == "HTTP/1.0" and not reply.body):
        *events, last = events_of(reply)
        assert end == "reset" or text_of(events) == "Hel"
        assert last["error"]["type"] == "server_error"
        assert set(last["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in reply.body and b'"stop"' not in reply.body and not reply.complete
    assert running.wait_for_record()["outcome"] not in ("ok", "client_gone")


def test_a_stream_that_times_out_ends_in_an_error_event(cloudflare, workers):
    cloudflare.answer = lambda received: (
        received.send(EVENT_HEAD + chunk(sse(delta(content="Hel")))) or received.wait_closed())
    reply = post(workers(TIMEOUT=0.5), stream=True)
    assert events_of(reply)[-1]["error"]["code"] == "upstream_timeout" and not reply.complete


def test_a_silent_stream_gets_comments_between_its_events(cloudflare, workers):
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + b"5\r\ndata")       # the rest of a piece, and of an event
        assert gate.wait(PATIENCE)
        received.send(b":\r\n" + chunk(sse(delta(content="Hel"), "[DONE]")[len(b"data:"):]))
        received.send(b"0\r\n\r\n")

    cloudflare.answer = answer
    running = workers(HEARTBEAT=0.02)
    with running.client() as client:
        body = json.dumps({"model": LLAMA, "messages": HELLO, "stream": True}).encode()
        client.request("POST", CHAT, body, AUTH)
        reply = client.read_head()
        assert [client.read_chunk() for _ in range(3)] == [b": keep-alive\n\n"] * 3
        gate.set()
        client.read_body(reply)
        assert reply.complete
        assert text_of(events_of(reply)) == "Hel"
        assert events_of(reply)[-1] == "[DONE]"
        # The connection is still good.
        client.request("GET", "/health")
        assert client.read_reply().status == 200


def test_heartbeats_do_not_prolong_the_upstreams_silence(cloudflare, workers):
    cloudflare.answer = lambda received: (
        received.send(EVENT_HEAD + chunk(sse(delta(content="Hel")))) or received.wait_closed())
    reply = post(workers(TIMEOUT=0.5, HEARTBEAT=0.05), stream=True)
    assert b": keep-alive" in reply.body
    assert events_of(reply)[-1]["error"]["code"] == "upstream_timeout" and not reply.complete


def test_heartbeats_come_while_the_upstream_sends_what_leads_to_nothing(cloudflare, workers):
    def answer(received):
        received.send(EVENT_HEAD + chunk(sse(delta(content="Hel"))))
        for _ in range(40):
            received.send(chunk(b": a comment\n\n"))
            time.sleep(0.02)
        received.send(chunk(sse(delta(content="lo"))) + b"0\r\n\r\n")

    cloudflare.answer = answer
    body = post(workers(HEARTBEAT=0.2), stream=True).body
    assert body.index(b"Hel") < body.index(b": keep-alive") < body.index(b'"lo"')


@pytest.mark.parametrize("path,members", [
    (CHAT, {}), ("/v1/responses", {"input": "x"})])
@pytest.mark.parametrize("given,sent", [({}, 16000), ({"max_tokens": 20000}, 16000)])
def test_a_limit_of_the_settings_takes_the_place_of_our_own(
        cloudflare, workers, path, members, given, sent):
    if path != CHAT:
        given = {name.replace("max_", "max_output_"): value for name, value in given.items()}
    assert post(workers(MAX_TOKENS=16000), path, **members, **given).status == 200
    assert json.loads(cloudflare.received[-1].body)["max_tokens"] == sent


@pytest.mark.parametrize(
    "form,code",
    [
        ("envelope", "invalid_request"), ("object", "invalid_prompt"), ("vllm", "invalid_request"),
        ("cut", None), ("half", None)])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_error_in_mid_stream_becomes_one_error_event(cloudflare, workers, path, form, code):
    assert form in MID_STREAM
    running = workers()
    reply = post(
        running, path, model="@cf/mid/" + form, stream=True,
        **{CHAT: {}, "/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}[path])
    *before, last = events_of(reply)
    assert reply.status == 200
    assert before
    assert not any("error" in event for event in before)
    assert "[DONE]" not in before
    assert last["error"]["code"] == code or code is None and last["error"]["type"] == "server_error"
    assert last["error"]["message"]
    assert not any(word in reply.body.decode() for word in SECRETS + ("AiError", UUID))
    assert not reply.complete and running.wait_for_record()["outcome"] == last["error"]["code"]


def test_json_where_a_stream_was_requested_becomes_events(workers):
    reply = post(
        workers(), model="@cf/shape/bare", stream=True,
        stream_options={"include_usage": True})
    events = events_of(reply)
    assert text_of(events[:-2]) == "4"
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["total_tokens"] == 33
    assert reply.complete and reply.get("content-type").startswith("text/event-stream")


def test_an_error_where_a_stream_was_requested_is_an_error_response(workers):
    reply = post(workers(), model="@cf/error/400/5007", stream=True)
    assert (reply.status, reply.code, reply.get("content-type")) == (
        404, "model_not_found", "application/json")


# -- cancel, connections, browsers


@pytest.mark.parametrize("phase", ["mid-stream", "before the first byte", "not streaming"])
def test_when_the_client_disconnects_the_upstream_is_closed(cloudflare, workers, phase):
    first, seen = {
        "mid-stream": (EVENT_HEAD + chunk(sse(delta(content="Hel"))), b"Hel"),
        "before the first byte": (b"", b""),
        "not streaming": (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
            b"")}[phase]
    closed = queue.Queue()

    def answer(received):
        received.send(first)
        closed.put(received.wait_closed())
    cloudflare.answer = answer
    running = workers()
    with running.client() as client:
        client.request(
            "POST", CHAT,
            json.dumps({"model": LLAMA, "messages": HELLO,
                        "stream": phase == "mid-stream"}).encode(), AUTH)
        cloudflare.wait_for()
        client.read_until(seen) if seen else None
    took = closed.get(timeout=2 * PATIENCE)
    assert took is not None and took < 20       # seconds: before any time limit
    assert running.wait_for_record()["outcome"] == "client_gone"


@pytest.mark.parametrize(
    "requested",
    [{}, {"stream": True}, {"model": "@cf/error/429/3040"}, {"model": "@cf/broken/html"}],
    ids=["whole", "stream", "error", "unreadable"])
def test_upstream_connections_are_used_again(cloudflare, workers, requested):
    running = workers()
    body = json.dumps({"model": LLAMA, "messages": HELLO, **requested}).encode()
    for number in range(1, 4):
        with running.client() as client:    # one that leaves ends what it has asked for
            client.request("POST", CHAT, body, AUTH)
            client.read_reply()
            running.wait_for_record(number)     # by then the connection has been given back
    assert len(cloudflare.received) == 3 and cloudflare.connections == 1


def test_an_upstream_connection_is_used_again_when_its_stream_ends_a_little_after_done(
        cloudflare, workers):
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(LLAMA_31))
        assert gate.wait(PATIENCE)
        received.send(b"0\r\n\r\n")
    cloudflare.answer = answer
    running = workers()
    for _ in range(2):
        gate.clear()
        with running.client() as client:
            client.request(
                "POST", CHAT,
                json.dumps({"model": LLAMA, "messages": HELLO, "stream": True}).encode(), AUTH)
            assert client.read_reply().complete, "the client's response waits for nothing"
            gate.set()
            # on the same connection: answered when all of the stream is done with
            client.request("GET", "/health")
            assert client.read_reply().status == 200
    assert len(cloudflare.received) == 2 and cloudflare.connections == 1
    assert running.wait_for_record()["outcome"] == "ok"


def test_client_connections_are_used_again(cloudflare, workers):
    with workers().client() as client:
        for stream in (False, True, False):
            client.request(
                "POST", CHAT,
                json.dumps({"model": LLAMA, "messages": HELLO, "stream": stream}).encode(), AUTH)
            assert client.read_reply().complete
    assert len(cloudflare.received) == 3


def test_an_idle_connection_that_cloudflare_closed_is_not_the_clients_trouble(cloudflare, workers):
    running = workers()

    def answer(received):
        cloudflare.route(received)
        received.close()
    cloudflare.answer = answer
    assert [post(running).status for _ in range(3)] == [200] * 3


def test_browsers_get_cors_fields_with_every_response(workers):
    running = workers(ORIGINS="https://app.example")
    origin = [("Origin", "https://app.example")]
    for requested in ({}, {"stream": True}, {"model": "@cf/error/429/3040"}, {"stream": 1}):
        reply = post(running, fields=origin, **requested)
        assert reply.all("access-control-allow-origin") == ["https://app.example"]
        assert "retry-after" in reply.get("access-control-expose-headers")
    assert post(running, fields=[("Origin", "https://other.example")]).code == "origin_not_allowed"


def test_cloudflares_own_fields_do_not_come_down(workers):
    running = workers()
    for reply in (post(running), post(running,
                                      model="@cf/error/400/5006"), post(running, stream=True)):
        assert not [name for name, _ in reply.fields if name in ("server", "set-cookie")]
        assert len(reply.all("x-request-id")) == len(reply.all("date")) == 1


# -- the model list


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass for the model list."""
    class Time:
        now = 1000.0

        def __getattr__(self, name):
            return getattr(aiproxy_time, name)

        def monotonic(self):
            return aiproxy_time.monotonic() + self.now
    aiproxy_time, fake = aiproxy.time, Time()
    monkeypatch.setattr(aiproxy, "time", fake)

    def pass_time(seconds):
        fake.now += seconds
    return pass_time


def models(running, path="/v1/models", fields=AUTH):
    return running.ask("GET", path, fields=fields)


def searches(cloudflare):
    return [
        received.line
        for received in cloudflare.received if "/ai/models/search" in received.line]


def test_the_model_list_is_the_accounts_own_page_by_page(cloudflare, workers):
    reply = models(workers())
    assert searches(cloudflare) == [
        "GET %s/ai/models/search?per_page=50&page=%d HTTP/1.1" % (BASE, page)
        for page in (1, 2, 3)]
    listed = reply.json
    ids = [model["id"] for model in listed["data"]]
    assert listed["object"] == "list" and len(ids) == len(set(ids))
    assert ids[:5] == [
        "gpt-oss-20b", "glm-4.7-flash", "@cf/openai/gpt-oss-20b", "@cf/baai/bge-m3",
        "@cf/leaving/later"]
    assert ids[-2:] == ["@cf/zai-org/glm-4.7-flash", "@hf/nous/hermes-4"]
    assert "@cf/old/gone" not in ids and "@cf/black-forest-labs/flux" not in ids
    assert listed["data"][0] == {
        "id": "gpt-oss-20b", "object": "model", "created": 1754390993, "owned_by": "cloudflare",
        "permission": [], "root": "@cf/openai/gpt-oss-20b", "parent": None,
        "metadata": {
            "description": "OpenAI's open-weight models …", "task": "Text Generation",
            "context_window": "128000"}}
    assert {frozenset(model) for model in listed["data"]} == {
        frozenset(
            ("id", "object", "created", "owned_by", "permission", "root", "parent", "metadata"))}
    assert listed["data"][4]["metadata"]["planned_deprecation_date"] == "2999-01-01"
    assert not any(word in reply.body.decode() for word in SECRETS)
    for received in cloudflare.received:
        assert received.fields("authorization") == ["Bearer " + TOKEN]
        assert received.fields("accept-encoding") == ["identity"]
    assert b"ck-alice" not in cloudflare.all_bytes and cloudflare.connections == 1


def test_an_allow_list_filters_the_models(workers):
    listed = models(
        workers(
            MODELS="@cf/baai/bge-m3,small=@cf/openai/gpt-oss-20b,gone=@cf/old/gone,"
            "gemma-4=@cf/google/gemma-4-26b-a4b-it")).json
    # What Cloudflare does not list it may serve; what it calls retired it does not.
    assert [(model["id"], model["root"]) for model in listed["data"]] == [
        ("small", "@cf/openai/gpt-oss-20b"), ("gemma-4", "@cf/google/gemma-4-26b-a4b-it"),
        ("@cf/baai/bge-m3", "@cf/baai/bge-m3")]
    assert len({frozenset(model) for model in listed["data"]}) == 1


@pytest.mark.parametrize(
    "requested,listed",
    [
        ("@cf%2Fopenai%2Fgpt-oss-20b", "@cf/openai/gpt-oss-20b"),
        ("@cf/openai/gpt-oss-20b", "@cf/openai/gpt-oss-20b"),
        ("%40cf%2fopenai%2fgpt-oss-20b", "@cf/openai/gpt-oss-20b"), ("gpt-oss-20b", "gpt-oss-20b"),
        ("@cf%2Fold%2Fgone", None), ("@cf/black-forest-labs/flux", None), ("gemma-4", None),
        ("nobody", None)])
def test_one_model_is_found_by_its_id(workers, requested, listed):
    reply = models(workers(), "/v1/models/" + requested)
    if listed:
        assert reply.status == 200
        assert reply.json["id"] == listed
        assert reply.json["object"] == "model"
    else:
        assert (reply.status, reply.code) == (404, "model_not_found")
        assert reply.json["error"]["param"] == "model"


def test_the_model_list_is_inside_the_rate(workers):
    running = workers(RATE="1/min")
    for path, status in (("/v1/models", 200), ("/v1/models/gpt-oss-20b", 429)):
        assert running.ask("GET", path, fields=AUTH).status == status


def test_the_model_list_is_cached_for_ten_minutes(cloudflare, workers, clock):
    running = workers()
    for _ in range(3):
        models(running)
    assert len(searches(cloudflare)) == 3 and aiproxy.CATALOGUE_SECONDS == 600
    clock(599)
    models(running, "/v1/models/gpt-oss-20b")
    assert len(searches(cloudflare)) == 3
    clock(2)
    models(running)
    assert len(searches(cloudflare)) == 6


def test_a_limit_fits_the_window_once_the_list_has_told_it(cloudflare, workers):
    running = workers()
    for limit in (4096, 875):           # the fake says 3500
        post(running, model="@cf/filler/m7")
        assert json.loads(cloudflare.received[-1].body)["max_tokens"] == limit
        models(running)


# how the list may fail to come, and what the client reads where there is no other list
FAILURES = {
    "account": (
        lambda fake, received: fake.reply(
            received, error_envelope(7003, "Could not route to /accounts/" + ACCOUNT), 404), 502,
        "upstream_misconfigured"),
    "html": (
        lambda fake, received: fake.reply(received, b"<html>", kind="text/html"), 502,
        "upstream_bad_response"),
    "no list": (
        lambda fake, received: fake.reply(received, envelope({"n": 1})), 502,
        "upstream_bad_response"),
    "null": (
        lambda fake, received: fake.reply(received, envelope(None)), 502, "upstream_bad_response"),
    "no success": (
        lambda fake, received: fake.reply(received, dict(envelope([]), success=False)), 502,
        "upstream_bad_response"),
    "no objects": (
        lambda fake, received: fake.reply(received, envelope(["x"])), 502,
        "upstream_bad_response"),
    "hang-up": (lambda fake, received: received.close(), 502, "upstream_bad_response"),
    "half": (
        lambda fake, received: (
            received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{") or received.close()),
        502, "upstream_bad_response"),
    "second page": (
        lambda fake, received: (
            fake.reply(received, b"", 500) if "page=2" in received.line else fake.route(received)),
        500, "upstream_error"),
    "later": (
        lambda fake, received: fake.reply(received, error_envelope(3040), 429), 429,
        "rate_limit_exceeded")}


@pytest.mark.parametrize("failure", list(FAILURES))
def test_a_list_that_cannot_be_read_is_an_error_for_half_a_minute(cloudflare, workers, clock,
                                                                  capfd, failure):
    fail, status, code = FAILURES[failure]
    cloudflare.answer = lambda received: fail(cloudflare, received)
    running = workers()
    reply = models(running)
    assert (reply.status, reply.code) == (status, code)
    assert not any(word in reply.raw_head.decode() + reply.body.decode() for word in SECRETS)
    printed = capfd.readouterr().err
    assert printed.count("the model list cannot be read") == 1
    assert ("CLOUDFLARE_ACCOUNT_ID" in printed) == (failure == "account")
    requested, cloudflare.answer = len(searches(cloudflare)), cloudflare.route
    clock(29)
    assert models(running, "/v1/models/gpt-oss-20b").code == code
    assert len(searches(cloudflare)) == requested
    clock(2)
    assert models(running).status == 200 and aiproxy.CATALOGUE_RETRY == 30


@pytest.mark.parametrize("failure", list(FAILURES))
def test_the_last_list_is_served_while_a_new_one_cannot_be_read(cloudflare, workers, clock,
                                                                failure):
    running = workers()
    listed = models(running).json
    cloudflare.answer = lambda received: FAILURES[failure][0](cloudflare, received)
    clock(601)
    assert models(running).json == listed
    requested = len(searches(cloudflare))
    assert models(running).json == listed and len(searches(cloudflare)) == requested > 3
    clock(31)
    assert models(running).json == listed and len(searches(cloudflare)) > requested


@pytest.mark.parametrize("status,number", [(401, 10000), (403, 10000), (403, 3041)])
def test_a_token_that_may_not_list_gets_the_short_names(cloudflare, workers, clock, capfd, status,
                                                        number):
    """opencode.school#174; the status of such an answer is assumed [A]."""
    cloudflare.answer = lambda received: cloudflare.reply(
        received, error_envelope(number, "Authentication error for " + ACCOUNT), status)
    running = workers()
    for _ in range(2):
        reply = models(running)
        assert [model["id"] for model in reply.json["data"]] == list(aiproxy.WORKERS_ALIASES)
    assert models(running, "/v1/models/gpt-oss-20b").json["id"] == "gpt-oss-20b"
    assert len(searches(cloudflare)) == 1
    printed = capfd.readouterr().err
    assert printed.count("model list") == 1 and ACCOUNT not in printed
    cloudflare.answer = cloudflare.route
    clock(31)
    assert "@hf/nous/hermes-4" in [model["id"] for model in models(running).json["data"]]


def test_the_configured_list_is_served_where_there_never_was_another(cloudflare, workers):
    cloudflare.answer = lambda received: received.close()
    running = workers(MODELS="small=@cf/openai/gpt-oss-20b,@cf/baai/bge-m3")
    assert [model["id"] for model in models(running).json["data"]] == ["small", "@cf/baai/bge-m3"]
    assert models(running, "/v1/models/@cf%2Fbaai%2Fbge-m3").json["object"] == "model"


def test_the_list_is_read_once_for_all_who_ask_at_the_same_time(cloudflare, workers):
    gate, replies = threading.Event(), queue.Queue()
    cloudflare.answer = lambda received: gate.wait(PATIENCE) and cloudflare.route(received)
    running = workers()
    threads = [
        threading.Thread(target=lambda: replies.put(models(running).status), daemon=True)
        for _ in range(5)]
    for thread in threads:
        thread.start()
    cloudflare.wait_for()
    gate.set()
    assert [replies.get(timeout=PATIENCE) for _ in threads] == [200] * 5
    assert len(searches(cloudflare)) == 3


# how a list may hang: nothing comes, half of a head, or a body in drops that never ends
HANGS = {
    "no answer": lambda received, gate: None,
    "half of a head": lambda received, gate: received.send(b"HTTP/1.1 200 OK\r\nX"),
    "drops": lambda received, gate: drip(received, gate),
}


def drip(received, gate):
    received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
    while not gate.wait(0.05):
        received.send(b" ")


@pytest.mark.parametrize("hang", list(HANGS))
def test_a_list_that_hangs_is_given_up_and_the_last_one_served_meanwhile(
        cloudflare, workers, clock, monkeypatch, hang):
    gate = threading.Event()

    def answer(received):
        if "page=2" not in received.line:
            return cloudflare.route(received)
        HANGS[hang](received, gate)
        return gate.wait(PATIENCE)
    running = workers()
    listed = models(running).json
    cloudflare.answer = answer
    clock(601)
    requested = len(searches(cloudflare))
    monkeypatch.setattr(aiproxy, "CATALOGUE_TIMEOUT", 1)        # what comes "at once" may take it
    try:
        with running.client() as first:
            first.request("GET", "/v1/models", fields=AUTH)
            cloudflare.wait_for(requested + 2)
            assert models(running).json == listed       # at once: nobody else asks, or waits
            assert len(searches(cloudflare)) == requested + 2
            assert first.read_reply().json == listed
    finally:
        gate.set()


def test_a_first_list_that_hangs_is_a_504_for_all_who_wait(cloudflare, workers, monkeypatch):
    gate, replies = threading.Event(), queue.Queue()
    cloudflare.answer = lambda received: gate.wait(PATIENCE)
    assert aiproxy.CATALOGUE_TIMEOUT == 10
    monkeypatch.setattr(aiproxy, "CATALOGUE_TIMEOUT", 0.3)
    running = workers()
    threads = [
        threading.Thread(target=lambda: replies.put(models(running)), daemon=True)
        for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for reply in [replies.get(timeout=PATIENCE) for _ in threads]:
            assert (reply.status, reply.code) == (504, "upstream_timeout")
            assert "model list" in reply.json["error"]["message"]
    finally:
        gate.set()
    assert len(searches(cloudflare)) == 1


def test_a_client_that_disconnects_while_the_list_is_read_leaves_the_others_alone(
        cloudflare, workers):
    closed = queue.Queue()
    cloudflare.answer = lambda received: closed.put(received.wait_closed())
    running = workers()
    with running.client() as client:
        client.request("GET", "/v1/models", fields=AUTH)
        cloudflare.wait_for()
    assert closed.get(timeout=2 * PATIENCE) is not None
    cloudflare.answer = cloudflare.route
    assert models(running).status == 200


def test_the_body_of_a_client_that_asks_for_the_list_is_no_matter_of_the_others(
        cloudflare, workers):
    running = workers()
    with running.client() as slow:
        slow.request("GET", "/v1/models", fields=AUTH + [("Content-Length", "9")])
        slow.send(b"1234")
        assert models(running).status == 200
        slow.send(b"56789")
        assert slow.read_reply().status == 200
    with running.client() as broken:
        broken.request("GET", "/v1/models", b"no chunk\r\n",
                       fields=AUTH + [("Transfer-Encoding", "chunked")])
        assert broken.read_reply().status == 400
    assert models(running).status == 200
    for request in cloudflare.received:
        assert request.body == b"" and not request.fields("content-length")


@pytest.mark.parametrize("fields,shown", [(AUTH, True), ([], False)], ids=["alice", "anybody"])
def test_health_shows_the_models_to_those_who_may_list_them_and_asks_nobody(
        cloudflare, workers, fields, shown):
    result = models(workers(), "/health", fields).json
    assert result["status"] == "healthy"
    assert result.get("models") == ([] if shown else None)     # short names are no list
    assert not cloudflare.received


# -- names


ALIASES = {
    "deepseek-r1": "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b",
    "gpt-oss-120b": "@cf/openai/gpt-oss-120b", "gpt-oss-20b": "@cf/openai/gpt-oss-20b",
    "llama-4-scout": "@cf/meta/llama-4-scout-17b-16e-instruct",
    "qwen2.5-coder": "@cf/qwen/qwen2.5-coder-32b-instruct",
    "gemma-3": "@cf/google/gemma-4-26b-a4b-it", "gemma-4": "@cf/google/gemma-4-26b-a4b-it",
    "glm-4.7-flash": "@cf/zai-org/glm-4.7-flash", "kimi-k2.6": "@cf/moonshotai/kimi-k2.6"}


@pytest.mark.parametrize("alias,model", list(ALIASES.items()))
def test_aliases_are_there_out_of_the_box(cloudflare, workers, monkeypatch, alias, model):
    monkeypatch.setitem(MODELS, model, MODELS["@cf/shape/bare"])
    reply = post(workers(), model=alias)
    assert reply.json["model"] == alias and json.loads(cloudflare.wait_for().body)["model"] == model
    assert set(ALIASES) == set(aiproxy.WORKERS_ALIASES)


def test_a_list_of_models_replaces_the_aliases(cloudflare, workers):
    running = workers(MODELS="small=" + LLAMA + ",@cf/shape/bare")
    assert post(running, model="small").json["model"] == "small"
    assert post(running, model="@cf/shape/bare").status == 200
    for other in ("gpt-oss-20b", LLAMA, "@cf/openai/gpt-oss-20b"):
        assert (post(running, model=other).status, post(running, model=other).code) == (
            403, "model_not_allowed")
    assert len(cloudflare.received) == 2


def test_short_names_can_be_the_list_of_models(cloudflare, workers):
    running = workers(MODELS="short,@cf/shape/bare")
    assert post(running, model="gpt-oss-20b").json["model"] == "gpt-oss-20b"
    assert post(running, model="@cf/shape/bare").status == 200
    for other in (LLAMA, "@cf/openai/gpt-oss-20b", "short"):
        assert post(running, model=other).code == "model_not_allowed"
    allowed = list(aiproxy.WORKERS_ALIASES) + ["@cf/shape/bare"]
    assert sorted(models(running, "/health").json["models"]) == sorted(allowed)
    assert [model["id"] for model in models(running).json["data"]] == allowed
    assert models(running, "/v1/models/gemma-4").json["root"] == ALIASES["gemma-4"]


@pytest.mark.parametrize("given,models", [
    ("gpt-oss-20b", {"gpt-oss-20b": ALIASES["gpt-oss-20b"]}),
    ("mine=gpt-oss-20b", {"mine": ALIASES["gpt-oss-20b"]}),
    ("gpt-oss-20b=@cf/x/y", {"gpt-oss-20b": "@cf/x/y"}),
    ("short=@cf/x/y", {"short": "@cf/x/y"}),
    ("x/llama-3.3-70b,@cf/x/y", {"x/llama-3.3-70b": "x/llama-3.3-70b", "@cf/x/y": "@cf/x/y"}),
    ("llama-4*", {"llama-4*": "llama-4*"}),
    ("gemma-4=@cf/x/y,short", dict(ALIASES, **{"gemma-4": "@cf/x/y"}))])
def test_a_short_name_alone_means_its_model(cloudflare, given, models):
    read = Settings(settings(cloudflare, AIPROXY_MODELS=given))
    assert read.models == read.aliases == models


def test_a_short_name_alone_can_be_asked_for(cloudflare, workers):
    running = workers(MODELS="gpt-oss-20b,llama-4*")
    for name in ("gpt-oss-20b", "llama-4-scout"):       # by itself, and by a pattern
        assert post(running, model=name).json["model"] == name
        assert json.loads(cloudflare.received[-1].body)["model"] == ALIASES[name]
    assert post(running, model="gemma-4").code == "model_not_allowed"
    assert [model["id"] for model in models(running).json["data"]] == ["gpt-oss-20b"]


SHORT = ", ".join("%s=%s" % pair for pair in ALIASES.items())


@pytest.mark.parametrize("given,shown", [
    ("", "all"), ("short", SHORT), ("mine=@cf/x/y", "mine=@cf/x/y"),
    ("short,@cf/x/y", SHORT + ", @cf/x/y"),
    ("gemma-3,llama-4*", "gemma-3=@cf/google/gemma-4-26b-a4b-it, llama-4*"),
    ("mine=gemma-3", "mine=@cf/google/gemma-4-26b-a4b-it")],
    ids=["all", "short", "mine", "short and more", "some", "a name for a name"])
def test_what_is_in_force_shows_what_short_names_stand_for(cloudflare, check, given, shown):
    environ = settings(cloudflare, AIPROXY_MODELS=given)
    _, printed, _ = check(**environ)
    assert "AIPROXY_MODELS=%s\n" % shown in printed
    assert "  models       %s\n" % shown in banner_of(environ)


@pytest.mark.parametrize("given,name", [
    ("llama-3.3-70b", "llama-3.3-70b"), ("gemma-3,short,GPT-OSS-20b", "GPT-OSS-20b"),
    ("mine=gemma-5,@cf/x/y", "gemma-5"), ("@cf", "@cf"), ("llama-4*,llama-4", "llama-4")])
def test_a_name_that_can_be_no_model_of_cloudflares_is_refused_at_the_start(
        cloudflare, given, name):
    with pytest.raises(SettingError) as refused:
        Settings(settings(cloudflare, AIPROXY_MODELS=given))
    for word in ("AIPROXY_MODELS", repr(name), "@cf/", "@hf/", "gpt-oss-20b, llama-4-scout"):
        assert word in str(refused.value)


def test_the_default_model_must_be_one_of_cloudflares_too(cloudflare):
    for good in ("gemma-3", "mine", "@cf/x/y"):
        Settings(settings(cloudflare, AIPROXY_MODELS="gemma-3,mine=@cf/x/z,@cf/x/y",
                          AIPROXY_DEFAULT_MODEL=good))
    with pytest.raises(SettingError) as refused:
        Settings(settings(cloudflare, AIPROXY_DEFAULT_MODEL="gemma-5"))
    for word in ("AIPROXY_DEFAULT_MODEL", "'gemma-5'", "@cf/", "gpt-oss-20b, llama-4-scout"):
        assert word in str(refused.value)


def test_a_key_among_the_models_is_not_shown(cloudflare):
    with pytest.raises(SettingError) as refused:
        Settings(settings(cloudflare, AIPROXY_MODELS="gemma-3," + "0123abcd" * 5))
    assert "AIPROXY_MODELS" in str(refused.value) and "0123abcd" not in str(refused.value)


# -- several accounts

OTHER, OTHER_TOKEN = "feedbeeffeedbeeffeedbeeffeedbeef", "cf-token-of-another-account"


def requests_by_account(cloudflare):
    """Of each request, the account in its path and the token with it."""
    return [(received.line.split("/accounts/")[1].split("/")[0],
             received.field("authorization").split()[1]) for received in cloudflare.received]


def test_every_account_is_called_with_its_own_token(cloudflare, workers):
    cloudflare.answer = lambda received: cloudflare.reply(received, QWEN_3)
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)
    for _ in range(4):
        assert post(running).status == 200
    assert sorted(requests_by_account(cloudflare)) == [
        (ACCOUNT, TOKEN), (ACCOUNT, TOKEN), (OTHER, OTHER_TOKEN), (OTHER, OTHER_TOKEN)]


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_daily_quota_that_is_used_up_is_one_whatever_the_status(cloudflare, workers, status):
    def answer(received):
        if OTHER in received.line:
            return cloudflare.reply(received, QWEN_3)
        return cloudflare.reply(received, error_envelope(4006), status)
    cloudflare.answer = answer
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)
    for _ in range(4):
        assert post(running).status == 200


@pytest.mark.parametrize("number,rests", [(4006, True), (3036, True), (3021, False)])
def test_a_daily_quota_that_is_used_up_rests_until_midnight_utc(cloudflare, workers, clock, number,
                                                                rests):
    def answer(received):
        if OTHER in received.line:
            return cloudflare.reply(received, QWEN_3)
        return cloudflare.reply(received, error_envelope(number), 429)
    cloudflare.answer = answer
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)

    def accounts(count):
        before = len(cloudflare.received)
        for _ in range(count):
            assert post(running).status == 200
        return {account for account, _ in requests_by_account(cloudflare)[before:]}
    assert accounts(2) == {ACCOUNT, OTHER}
    assert accounts(2) == {OTHER}
    clock(61)
    is_near_midnight = aiproxy.time.time() % 86400 > 86400 - 120
    assert accounts(2) == ({OTHER} if rests and not is_near_midnight else {ACCOUNT, OTHER})
    clock(86400)
    assert accounts(2) == {ACCOUNT, OTHER}


@pytest.mark.parametrize("status,number,rests", [
    (400, 6003, True), (403, 7403, True), (403, 9109, True), (403, 10000, True),
    (404, 7003, True), (400, 5006, False)])
def test_an_account_that_cloudflare_refuses_is_set_aside(cloudflare, workers, clock, capfd, status,
                                                         number, rests):
    def answer(received):
        if OTHER in received.line:
            return cloudflare.reply(received, QWEN_3)
        return cloudflare.reply(received, error_envelope(number), status)
    cloudflare.answer = answer
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)
    replies = [post(running).status for _ in range(4)]
    if not rests:
        assert sorted(replies) == [200, 200, 400, 400]
        return
    assert replies == [200] * 4
    accounts = [account for account, _ in requests_by_account(cloudflare)]
    assert accounts.count(ACCOUNT) == 1
    assert "rejected key 1 of 2" in capfd.readouterr().err
    clock(601)
    assert [post(running).status for _ in range(2)] == [200, 200]
    assert [account for account, _ in requests_by_account(cloudflare)].count(ACCOUNT) == 2


@pytest.mark.parametrize("status,number,code", [
    (400, 6003, "upstream_credentials_rejected"), (404, 7003, "upstream_misconfigured")])
def test_if_all_accounts_are_refused_the_reason_is_cloudflares(cloudflare, workers, status, number,
                                                               code):
    cloudflare.answer = lambda received: cloudflare.reply(received, error_envelope(number), status)
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)
    reply = post(running)
    assert (reply.status, reply.code) == (502, code)
    assert running.wait_for_record()["upstream_status"] == status
    assert len(cloudflare.received) == 2


def test_a_quota_that_is_used_up_everywhere_is_said_with_its_end(cloudflare, workers):
    cloudflare.answer = lambda received: cloudflare.reply(received, error_envelope(4006), 429)
    running = workers(CLOUDFLARE_ACCOUNT_ID=ACCOUNT + "," + OTHER,
                      CLOUDFLARE_API_TOKEN=TOKEN + "," + OTHER_TOKEN)
    reply = post(running)
    assert (reply.status, reply.code, reply.get("x-should-retry")) == (
        429, "insufficient_quota", "false")
    assert 0 < int(reply.get("retry-after")) <= 86400
    assert reply.json["error"]["message"] == "no. The quota is back at 00:00 UTC."
    assert [account for account, _ in requests_by_account(cloudflare)] in (
        [ACCOUNT, OTHER], [OTHER, ACCOUNT])


@pytest.mark.parametrize("accounts,tokens,is_right", [
    ("a", "t1", True), ("a", "t1,t2", True), ("a,b", "t1,t2", True), ("a,b", "t1", False),
    ("a,b,c", "t1,t2", False), ("a,b", "t1,t2,t3", False), ("a,../x", "t1,t2", False)])
def test_there_are_as_many_accounts_as_tokens(cloudflare, accounts, tokens, is_right):
    tokens = ",".join("cf-token-number-" + token for token in tokens.split(","))
    given = settings(cloudflare, CLOUDFLARE_ACCOUNT_ID=accounts, CLOUDFLARE_API_TOKEN=tokens)
    if is_right:
        assert len(Settings(given).account_paths) == len(tokens.split(","))
        return
    with pytest.raises(SettingError) as refused:
        Settings(given)
    assert "CLOUDFLARE_ACCOUNT_ID" in str(refused.value) and tokens not in str(refused.value)


def test_there_is_no_default_model_unless_one_is_set(cloudflare, workers):
    reply = post(workers(), model=None)
    assert (reply.status, reply.code) == (400, "missing_model") and not cloudflare.received
    assert post(workers(DEFAULT_MODEL="gpt-oss-20b"), model=None).json["model"] == "gpt-oss-20b"
    assert json.loads(cloudflare.wait_for().body)["model"] == "@cf/openai/gpt-oss-20b"


@pytest.mark.parametrize(
    "name",
    [
        "..", "@cf/../x", "@cf//x", "/x", "a?b", "a#b", "a%2fb", "a b", "x/..", "a\\b",
        "a\r\nX: y", "é"])
def test_a_model_name_never_leaves_its_place(cloudflare, workers, name):
    reply = post(workers(), model=name)
    assert (reply.status, reply.code, reply.json["error"]["param"]) == (
        400, "invalid_model", "model")
    assert not cloudflare.received


@pytest.mark.parametrize("code", [
    "no %s for %s" % (TOKEN, ACCOUNT), TOKEN, "x" * 65, "a\nb"], ids=ascii)
def test_a_code_of_cloudflares_that_is_no_plain_word_stays_here(cloudflare, workers, code):
    error = json.dumps({"success": False, "errors": [{"code": code, "message": "no"}]}).encode()
    cloudflare.answer = lambda received: received.send(
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(error) + error)
    running = workers()
    reply = post(running)
    assert (reply.status, reply.code) == (400, "invalid_request")
    assert running.wait_for_record()["outcome"] == "invalid_request"
    assert TOKEN.encode() not in reply.body


def test_an_unknown_model_is_refused_by_cloudflare(workers):
    reply = post(workers(), model="@cf/no/such")
    assert (reply.status, reply.code, reply.json["error"]["param"]) == (
        404, "model_not_found", "model")
    assert reply.json["error"]["message"] == (
        "No such model @cf/no/such or task. See GET /v1/models.")


# -- validation


@pytest.mark.parametrize(
    "path,body,param",
    [
        (CHAT, {"stream": "true"}, "stream"), ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"prompt": 1}, "prompt"),
        ("/v1/completions", {"prompt": "a", "messages": HELLO}, "prompt")],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value))
def test_what_would_be_misread_is_refused_before_the_call(cloudflare, workers, path, body, param):
    reply = post(workers(), path, **body)
    assert (reply.status, reply.code, reply.json["error"]["param"],
            reply.json["error"]["type"]) == (400, "invalid_parameter", param,
                                             "invalid_request_error")
    assert "`%s`" % param in reply.json["error"]["message"] and not cloudflare.received


def test_1_0_is_an_integer_and_null_goes_up(cloudflare, workers):
    body = (
        b'{"model":"%b","messages":[{"role":"user","content":"x"}],"seed":1.0,"max_tokens":7.0,'
        b'"stop":null,"made_up":{"x":1}}' % LLAMA.encode())
    assert workers().ask("POST", CHAT, body, AUTH).status == 200
    assert cloudflare.wait_for().body == body


@pytest.mark.parametrize(
    "setting,most", [({}, 131072), ({"MAX_CHARS": 10}, 10), ({"MAX_CHARS": 0}, None)],
    ids=["default", "ten", "off"])
def test_a_prompt_has_a_maximum_length(cloudflare, workers, setting, most):
    running = workers(**setting)
    most, over = (most, 1) if most else (200000, 0)
    half = [
        {"role": "user", "content": "x" * (most // 2)},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "é" * (most - most // 2)},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64," + "A" * 5000}}]}]
    assert post(running, messages=half).status == 200
    if over:
        reply = post(running, messages=half + [{"role": "user", "content": "1"}])
        assert (reply.status, reply.code) == (400, "invalid_parameter")
        assert "AIPROXY_MAX_CHARS" in reply.json["error"]["message"]
        assert post(running, "/v1/embeddings", input=["x" * most, "y"]).status == post(
            running, "/v1/responses", instructions="x" * most, input="y").status == 400
        assert post(running, "/v1/completions", prompt="x" * (most + 1)).status == 400
    assert len(cloudflare.received) == 1


# -- errors


@pytest.mark.parametrize(
    "number,sent,status,code,retry",
    [
        (5007, 400, 404, "model_not_found", None), (3042, 404, 404, "model_not_found", None),
        (1, 410, 404, "model_not_found", None),
        *[(number, 400, 400, "invalid_request", None) for number in (3003, 5004, 5006, 8001, 8007)],
        (5005, 405, 400, "invalid_request", None), (5019, 405, 400, "invalid_request", None),
        (3006, 413, 413, "request_too_large", None),
        *[
            (number, 403, 403, "permission_denied", None)
            for number in (3023, 3041, 5016, 5018, 5035)],
        (3021, 429, 429, "rate_limit_exceeded", None),
        (3040, 429, 429, "rate_limit_exceeded", None),
        (3040, 400, 429, "rate_limit_exceeded", None),
        (3036, 429, 429, "insufficient_quota", "false"),
        (4006, 429, 429, "insufficient_quota", "false"),
        (3007, 408, 504, "upstream_timeout", None), (3008, 408, 504, "upstream_timeout", None),
        (10000, 401, 502, "upstream_credentials_rejected", "false"),
        (10000, 403, 502, "upstream_credentials_rejected", "false"),
        (9106, 400, 502, "upstream_credentials_rejected", "false"),
        (6003, 400, 502, "upstream_credentials_rejected", "false"),
        (7403, 403, 502, "upstream_credentials_rejected", "false"),
        (9109, 403, 502, "upstream_credentials_rejected", "false"),
        (7000, 400, 502, "upstream_misconfigured", "false"),
        (7001, 405, 502, "upstream_misconfigured", "false"),
        (7003, 404, 502, "upstream_misconfigured", "false"),
        (8005, 500, 502, "upstream_error", None), (7009, 503, 502, "upstream_error", None),
        (1, 522, 522, "upstream_error", None)])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"], ids=["chat", "responses"])
def test_cloudflares_errors_are_openais(workers, capfd, path, number, sent, status, code, retry):
    running = workers()
    reply = post(
        running, path, model="@cf/error/%d/%d" % (sent, number),
        input=None if path == CHAT else "x")
    error = reply.json["error"]
    assert (reply.status, error["code"], reply.get("x-should-retry"), reply.complete) == (
        status, code, retry, True)
    assert reply.get("retry-after") == ("7" if sent == 429 else None)
    assert reply.get("content-type") == "application/json"
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert error["type"] == ("rate_limit_error" if status == 429 else kind)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == ("model" if code == "model_not_found" else None)
    record, printed = running.wait_for_record(), capfd.readouterr().err
    assert (record["status"], record["upstream_status"], record["outcome"]) == (status, sent, code)
    assert not any(word in reply.raw_head.decode() + reply.body.decode() + printed + str(record)
                   for word in SECRETS + ("AiError", UUID))
    is_operators = code in ("upstream_misconfigured", "upstream_credentials_rejected")
    for setting, names in (("CLOUDFLARE_ACCOUNT_ID", is_operators),
                           ("CLOUDFLARE_API_TOKEN", code == "upstream_credentials_rejected")):
        assert (setting in printed) == names


@pytest.mark.parametrize("account,code", [
    ("0" * 32, "upstream_credentials_rejected"), ("account-1", "upstream_misconfigured")])
def test_a_wrong_account_is_not_blamed_on_the_token_alone(cloudflare, workers, account, code):
    reply = post(workers(CLOUDFLARE_ACCOUNT_ID=account))
    assert (reply.status, reply.code) == (502, code)
    assert "CLOUDFLARE_ACCOUNT_ID" in reply.json["error"]["message"]
    assert account not in reply.body.decode()


@pytest.mark.parametrize("form", list(BROKEN))
@pytest.mark.parametrize(
    "path,body",
    [
        (CHAT, {}), (CHAT, {"stream": True}), ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"})], ids=["chat", "stream", "embeddings", "responses"])
def test_a_response_that_cannot_be_read_is_a_502(workers, path, body, form):
    reply = post(workers(), path, model="@cf/broken/" + form, **body)
    assert (reply.status, reply.code, reply.complete) == (502, "upstream_bad_response", True)


@pytest.mark.parametrize(
    "sent,status,code",
    [(b"", 502, "upstream_bad_response"),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", 502, "upstream_bad_response"),
     (b"HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\n{", 502, "upstream_bad_response"),
     (b"HTTP/1.1 502 X\r\nContent-Type: text/html\r\n\r\n<html>" + ACCOUNT.encode(), 502,
      "upstream_error")],
    ids=["nothing", "half", "half an error", "an HTML error"])
def test_an_upstream_that_closes_early_before_the_response_is_a_502(cloudflare, workers, sent,
                                                                    status, code):
    cloudflare.answer = lambda received: received.send(sent) or received.close()
    reply = post(workers())
    assert (reply.status, reply.code) == (status, code) and ACCOUNT not in reply.body.decode()


def test_a_timeout_is_a_504(cloudflare, workers):
    for head in (
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):
        cloudflare.answer = lambda received: received.send(head) or received.wait_closed()
        reply = post(workers(TIMEOUT=0.2))
        assert (reply.status, reply.code) == (504, "upstream_timeout")


# -- the token is the provider key


def test_the_account_and_the_token_appear_nowhere(cloudflare):
    seen = b""
    with Program(env=settings(cloudflare, AIPROXY_LOG="json", AIPROXY_MODELS="")) as program:
        count = 0
        names = (
            LLAMA, "@cf/error/400/5006", "@cf/error/404/7003", "@cf/error/401/10000",
            "@cf/mid/object", "@cf/broken/html", "@cf/no/such", TOKEN + "/" + ACCOUNT,
            "a b" + TOKEN)
        bodies = [{"model": name} for name in names] + [{"model": LLAMA, "seed": TOKEN}]
        for body in bodies:
            for stream in (False, True):
                with Client(program.address) as client:
                    client.request(
                        "POST", CHAT,
                        json.dumps(dict(body, messages=HELLO, stream=stream)).encode(), AUTH)
                    while client.more():
                        count += (
                            b"\r\n\r\n" in client.data
                            and client.data.endswith((b"0\r\n\r\n", b"}"))
                            and client.sock.shutdown(1) is None)
                    # what a client itself sends, it may read again
                    if TOKEN not in json.dumps(body):
                        seen += client.data
        for path in ("/", "/health", "/v1/models", "/v1/models/x", "/v1/files",
                     "/v1/accounts/" + ACCOUNT):
            with Client(program.address) as client:
                client.request("GET", path, fields=AUTH)
                reply = client.read_reply()
                seen += (reply.raw_head + reply.body) if ACCOUNT not in path else b""
        program.wait_for_line(program.lines, '"path": "/v1/files"')
        program.wait_for_line(program.errors, "CLOUDFLARE_API_TOKEN")
        printed = program.banner + "".join(program.errors + program.lines)
    for word in SECRETS + ("ck-alice",):
        assert word.encode() not in seen and word not in printed
    assert "CLOUDFLARE_ACCOUNT_ID" in printed
    assert "CLOUDFLARE_API_TOKEN" in printed
    assert seen.count(b"HTTP/1.1 200") > 3


def test_check_shows_the_account_and_masks_the_token(cloudflare, check):
    status, printed, errors = check(**settings(cloudflare))
    assert status == 0
    assert "CLOUDFLARE_ACCOUNT_ID=" + ACCOUNT in printed
    assert TOKEN not in printed + errors
    assert "ck-alice" not in printed + errors


@pytest.mark.parametrize(
    "given,names",
    [
        ({"CLOUDFLARE_ACCOUNT_ID": ""}, "CLOUDFLARE_ACCOUNT_ID"),
        ({"CLOUDFLARE_API_TOKEN": ""}, "CLOUDFLARE_API_TOKEN"),
        ({"CLOUDFLARE_API_TOKEN": "YOUR_API_KEY"}, "CLOUDFLARE_API_TOKEN"),
        ({"CLOUDFLARE_ACCOUNT_ID": "../x"}, "CLOUDFLARE_ACCOUNT_ID"),
        ({"CLOUDFLARE_ACCOUNT_ID": "your-account-id"}, "CLOUDFLARE_ACCOUNT_ID"),
        ({"CLOUDFLARE_API_TOKEN": "", "AIPROXY_KEY": "sk-x"}, "CLOUDFLARE_API_TOKEN"),
        ({"AIPROXY_CLIENT_KEYS": "", "AIPROXY_HOST": "0.0.0.0"}, "AIPROXY_CLIENT_KEYS"),
        ({"AIPROXY_CLIENT_KEYS": TOKEN}, "AIPROXY_CLIENT_KEYS"),
        ({"CLOUDFLARE_API_BASE_URL": "https://u:%s@host" % TOKEN}, "CLOUDFLARE_API_BASE_URL")],
    ids=str)
def test_a_start_that_would_not_be_safe_or_cannot_work_is_refused(cloudflare, given, names):
    with pytest.raises(SettingError) as refused:
        Settings(settings(cloudflare, **given))
    assert names in str(refused.value) and TOKEN not in str(refused.value)


@pytest.mark.parametrize("missing", [
    ("CLOUDFLARE_ACCOUNT_ID",), ("CLOUDFLARE_API_TOKEN",),
    ("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_ACCOUNT_ID")], ids=" and ".join)
def test_the_message_names_what_is_missing_and_nothing_else(cloudflare, missing):
    with pytest.raises(SettingError) as refused:
        Settings(settings(cloudflare, **dict.fromkeys(missing, "")))
    named = set(re.findall("CLOUDFLARE_[A-Z_]+", str(refused.value)))
    assert named == set(missing)


def test_a_key_of_another_provider_is_not_used(cloudflare, workers):
    post(workers(KEY="sk-other-provider"))
    assert cloudflare.wait_for().fields("authorization") == ["Bearer " + TOKEN]
    assert b"sk-other-provider" not in cloudflare.all_bytes


@pytest.mark.parametrize("key", [None, "wrong", TOKEN])
def test_without_a_client_key_nothing_is_served(cloudflare, workers, key):
    running = workers()
    fields = [("Authorization", "Bearer " + key)] if key else []
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/x"),
                         ("POST", "/v1/embeddings")):
        reply = running.ask(method, path, b'{"model":"x"}' if method == "POST" else None, fields)
        assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert not cloudflare.received


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/v1/files", 404), ("POST", "/v1/images/generations", 404),
        ("POST", "/ai/run/" + LLAMA, 404), ("GET", "/client/v4/accounts", 404), ("GET", CHAT, 405),
        ("DELETE", "/v1/models/x", 405), ("POST", "/v1/../client/v4/user", 400),
        ("POST", "/v1/%2e%2e/user", 400), ("POST", "//v1/chat/completions", 400),
        ("POST", "/v1/chat/completions/../../x", 400)])
def test_only_the_inference_paths_are_served(cloudflare, workers, method, path, status):
    assert workers().ask(method, path, b"{}" if method == "POST" else None, AUTH).status == status
    assert not cloudflare.received


@pytest.mark.parametrize(
    "method,path",
    [
        ("POST", "/v1/files"), ("POST", "/v1/messages"), ("POST", "/v1/models"),
        ("GET", "/v1/files"), ("GET", CHAT), ("GET", "/v1/tokens/verify"),
        ("DELETE", "/v1/models/x"), ("POST", "/v1/ai/run/" + LLAMA)])
def test_not_even_an_operator_opens_the_rest_of_the_account(cloudflare, workers, method, path):
    running = workers(PATHS="*")
    reply = running.ask(
        method, path,
        json.dumps({"model": LLAMA, "messages": HELLO}).encode() if method == "POST" else None,
        AUTH)
    assert reply.status in (404, 405)
    assert reply.json["error"]["message"]
    assert not cloudflare.received
    assert post(running).status == 200


def test_an_operator_may_serve_less(cloudflare, workers):
    running = workers(PATHS=CHAT)
    assert post(running).status == 200 and post(running, "/v1/embeddings", input="x").status == 404
    assert len(cloudflare.received) == 1


def test_without_client_keys_only_this_machine_is_served(cloudflare, workers):
    running = workers(CLIENT_KEYS="")
    body = json.dumps({"model": LLAMA, "messages": HELLO}).encode()
    assert running.ask("POST", CHAT, body).status == 200
    for fields, code in (([("Host", "evil.example")], "host_not_allowed"),
                         ([("Origin", "https://evil.example")], "origin_not_allowed")):
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            assert running.ask(method, path, body if method == "POST" else None,
                               fields).code == code
    assert len(cloudflare.received) == 1


def test_a_compressed_body_and_one_that_is_no_json_do_not_pass(cloudflare, workers):
    running = workers()
    assert (
        running.ask("POST", CHAT, b"\x1f\x8b", AUTH + [("Content-Encoding", "gzip")]).code
        == "unsupported_encoding")
    for body in (b"", b"[]", b"{", b'{"model":"a","model":"b","messages":[1]}',
                 b'{"model":"a","Model":"b","messages":[1]}'):
        assert running.ask("POST", CHAT, body, AUTH).status == 400
    assert not cloudflare.received
