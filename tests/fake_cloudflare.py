"""Workers AI's shapes, and a fake Cloudflare that serves them.

As a program it puts a relay in front of itself, for the SDKs in real/.

The mark says how far a shape is to be trusted, as in WIRE_FORMATS.md: [O] official, [R] recorded,
[T] third party, [A] assumed. Recorded ones, and those that were written down whole, are here
literally.
"""
import base64
import json
import os
import re
import struct
import sys
import urllib.parse

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from support import Upstream, chunk  # noqa: E402

ACCOUNT, TOKEN = "0123456789abcdef0123456789abcdef", "cf-token-of-ours"
UUID = "bd40edba-1111-2222-3333-444455556666"
BASE = "/client/v4/accounts/" + ACCOUNT


def envelope(result):
    """Around every answer of /ai/run [O]."""
    return {"result": result, "success": True, "errors": [], "messages": []}


def error_envelope(code, message="AiError: AiError: no (%s)" % UUID):
    """Around errors of the platform [T].

    The model's have another order and an empty `result`: see NSFW.
    """
    return {
        "result": None, "success": False, "errors": [{"code": code, "message": message}],
        "messages": []}


def sse(*events):
    return b"".join(
        b"data: %b\n\n" % (event.encode() if isinstance(event, str) else json.dumps(event).encode())
        for event in events)


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields}]}


# -- whole responses: [T] the LLAMA ones, from a test of litellm; [O] QWEN_3, by its types;

USAGE = {"prompt_tokens": 10, "completion_tokens": 15, "total_tokens": 25}
LLAMA_4 = envelope(
    {
        "response": "I am Llama 4 Scout, a large language model developed by Meta.",
        "tool_calls": [], "usage": USAGE})
LLAMA_33_TOOL = envelope(
    {
        "response": None,
        "tool_calls": [{"name": "get_weather", "arguments": {"location": "Paris"}}],
        "usage": {"prompt_tokens": 151, "completion_tokens": 23, "total_tokens": 174}})
LLAMA_4_TOOL = envelope(
    {
        "tool_calls": [
            {
                "id": "chatcmpl-tool-926d0e07eecd4665bfde18c2d0dd213f", "type": "function",
                "function": {"name": "get_weather", "arguments": "{\"location\": \"Tokyo\"}"}}],
        "usage": {"prompt_tokens": 160, "completion_tokens": 17, "total_tokens": 177}})
QWEN_3 = {
    "id": "chatcmpl-…", "object": "chat.completion", "created": 1777486804,
    "model": "@cf/qwen/qwen3-30b-a3b-fp8",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant", "content": "4", "reasoning_content": "2+2…",
                "tool_calls": []}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 24, "total_tokens": 33},
    "prompt_logprobs": None}
# A call that was forced and comes as text [O] (cloudflare/ai#574: the shape, not the words).
LEAK = '{"name": "get_weather", "city": "Paris"}'
# -- streams: [R] LLAMA_31 and TOOLS, [T] LEGACY and the tail of KIMI,
# [O] DUAL but for its extra fields

# Recorded 2026-05-08 on /ai/v1/chat/completions (WIRE_FORMATS section 2); the ids, elided there,
# as in the recording
LLAMA_31 = b'''data: {"id":"id-1778255778230","created":1778255778,\
"model":"@cf/meta/llama-3.1-8b-instruct","object":"chat.completion.chunk",\
"choices":[{"index":0,"delta":{"content":"Hello"}}]}

data: {"id":"id-1778255778230","created":1778255778,"model":"@cf/meta/llama-3.1-8b-instruct",\
"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"!"}}]}

data: {"id":"id-1778255778230","object":"chat.completion.chunk","created":1778255778,\
"model":"@cf/meta/llama-3.1-8b-instruct","choices":[{"index":0,"delta":{},\
"finish_reason":"stop"}],"usage":{"prompt_tokens":45,"completion_tokens":2,"total_tokens":47}}

data: {"id":"id-1778255778230","object":"chat.completion.chunk","created":1778255778,\
"model":"@cf/meta/llama-3.1-8b-instruct","choices":[{"index":0,"delta":{},\
"finish_reason":"stop"}],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0,\
"prompt_tokens_details":{"cached_tokens":0}}}

data: [DONE]

'''
LEGACY = b'''data: {"response":"Hello","tool_calls":[],"p":"abdefghij"}

data: {"response":"!","tool_calls":[],"p":"abdef"}

data: {"response":"","usage":{"prompt_tokens":1386,"completion_tokens":1306,\
"total_tokens":2692,"prompt_tokens_details":{"cached_tokens":0}}}

data: [DONE]

'''
KIMI = b'''data: {"id":"chatcmpl-bd0d","object":"chat.completion.chunk","created":1775107512,\
"model":"@cf/moonshotai/kimi-k2.5","choices":[{"index":0,"delta":{"role":"assistant",\
"content":""}}]}

data: {"id":"chatcmpl-bd0d","object":"chat.completion.chunk","created":1775107512,\
"model":"@cf/moonshotai/kimi-k2.5","choices":[{"index":0,"delta":{"content":"Hello!"},\
"finish_reason":null}]}

data: {"id":"chatcmpl-bd0d","object":"chat.completion.chunk","created":1775107512,\
"model":"@cf/moonshotai/kimi-k2.5","choices":[],"usage":{"prompt_tokens":1386,\
"total_tokens":2692,"completion_tokens":1306},"p":"abdefgh"}

data: {"response":"","usage":{"prompt_tokens":1386,"completion_tokens":1306,\
"total_tokens":2692,"prompt_tokens_details":{"cached_tokens":0}}}

data: [DONE]

'''
DUAL = sse(
    {"response": "Hello", "choices": [{"index": 0, "delta": {"content": "Hello"}}], "p": "ab"},
    {"response": "!", "choices": [{"index": 0, "delta": {"content": "!"}}]}, "[DONE]")

TOOL_ID = "chatcmpl-tool-8f"


def tool_stream():
    """gpt-oss-20b with a forced tool [R].

    The members and the order of its events are as recorded, but it has less reasoning.
    """
    head = {
        "id": "id-1778260814069", "created": 1778260814, "model": "@cf/openai/gpt-oss-20b",
        "object": "chat.completion.chunk"}
    call = {
        "id": TOOL_ID, "type": "function", "index": 0,
        "function": {"name": "get_weather", "arguments": ""}}
    deltas = [{"reasoning_content": text} for text in ("", "Need", " it.")] + [
        {"tool_calls": [call]}]
    deltas += [
        {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        for text in ('{"', "city", '": "', "Paris", '"}')]
    events = [
        {
            "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
            "finish_reason": None}]
    events += [
        {"index": 0, "delta": one, "logprobs": None, "finish_reason": None, "token_ids": None}
        for one in deltas]
    events += [
        {
            "index": 0, "delta": {}, "logprobs": None, "finish_reason": None,
            "stop_reason": 200012, "token_ids": None}]
    usage = {"prompt_tokens": 136, "completion_tokens": 37, "total_tokens": 173}
    end = dict(
        head, choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], usage=usage)
    return sse(
        *[dict(head, choices=[event]) for event in events], end,
        dict(end, usage=dict(usage, prompt_tokens_details={"cached_tokens": 0})), "[DONE]")


TOOLS = tool_stream()


def read_sse(stream):
    """The events in bytes that hold nothing else: pairs of name and data."""
    events = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in fields:
            events.append((fields.get("event", ""), fields["data"]))
    return events


# -- errors, embeddings, the model list

NSFW = {
    "errors": [
        {
            "message": "AiError: AiError: Input prompt contains NSFW content. "
            "(bd40edba-1111-2222-3333-444455556666)", "code": 8007}], "success": False,
    "result": {}, "messages": []}
ROWS = [[0.5, -2.0], [1.0, 0.25]]
PACKED = [base64.b64encode(struct.pack("<2f", *row)).decode() for row in ROWS]
OPENAI_ROWS = {
    "object": "list",
    "data": [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(ROWS)],
    "model": "@cf/x", "usage": {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}}
LEGACY_ROWS = envelope({"shape": [2, 2], "data": ROWS})
ITEM = {
    "id": "188a4e1e-253e-46d0-9616-0bf8c149763f", "source": 1, "name": "@cf/openai/gpt-oss-20b",
    "description": "OpenAI's open-weight models …",
    "task": {
        "id": "c329a1f9-323d-4e91-b2aa-582dd4188d34", "name": "Text Generation",
        "description": "Family of generative text models, …"},
    "created_at": "2025-08-05 10:49:53.265", "tags": [],
    "properties": [
        {"property_id": "context_window", "value": "128000"},
        {
            "property_id": "price",
            "value": [
                {"unit": "per M input tokens", "price": 0.2, "currency": "USD"},
                {"unit": "per M output tokens", "price": 0.3, "currency": "USD"}]},
        {"property_id": "function_calling", "value": "true"},
        {"property_id": "reasoning", "value": "true"}]}


def item(name, task="Text Generation", **properties):
    return {
        "name": name, "task": {"name": task},
        "properties": [
            {"property_id": name, "value": value}
            for name, value in properties.items()]}


# The fake's list: pages that overlap, models that are retired or no text models, and enough of
# them for a second page.
CATALOGUE = [
    ITEM, item("@cf/baai/bge-m3", "Text Embeddings"),
    item("@cf/black-forest-labs/flux", "Text-to-Image"),
    item("@cf/old/gone", planned_deprecation_date="2026-05-30"),
    item("@cf/leaving/later", "text  generation", planned_deprecation_date="2999-01-01")]
CATALOGUE += [item("@cf/filler/m%d" % number, context_window="3500") for number in range(45)]
CATALOGUE += [item("@cf/filler/m44"), item("@cf/zai-org/glm-4.7-flash"), item("@hf/nous/hermes-4")]

# -- the fake

# how a model of this name responds, (whole, stream); without a stream it sends JSON where one was
# requested, as gpt-oss may
CHAT = {
    "@cf/meta/llama-3.1-8b-instruct": (QWEN_3, LLAMA_31),
    "@cf/meta/llama-4-scout-17b-16e-instruct": (LLAMA_4, LEGACY),
    "@cf/shape/kimi": (envelope(QWEN_3), KIMI),
    "@cf/shape/dual": (
        {"response": "Hello", "choices": [{"index": 0, "message": {"content": "Hello"}}]}, DUAL),
    "@cf/openai/gpt-oss-20b": (LLAMA_4_TOOL, TOOLS),
    "@cf/openai/gpt-oss-120b": (
        {"choices": [{"message": {"content": LEAK, "tool_calls": []}, "finish_reason": "stop"}]},
        sse(*[delta(content=LEAK[at:at + 5]) for at in range(0, len(LEAK), 5)], "[DONE]")),
    "@cf/shape/flat-tool": (LLAMA_33_TOOL, None),
    "@cf/shape/bare": (QWEN_3, None), "@cf/shape/wrapped": (envelope(QWEN_3), None),
    "@cf/shape/object": (envelope({"response": {"n": [1]}}), None),
    "@cf/shape/number": (
        envelope({"response": 7}), sse({"response": 7}, {"response": 8}, "[DONE]")),
    "@cf/shape/null": (
        envelope({"response": None}), sse({"response": None}, {"response": "x"}, "[DONE]")),
    "@cf/shape/sentinel": (
        LLAMA_33_TOOL,
        sse(
            delta(
                tool_calls=[
                    {
                        "id": "a", "type": "function", "index": 0,
                        "function": {"name": "get_weather"}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
            delta(tool_calls=[{"id": None, "type": None, "function": {"name": None}}]), "[DONE]"))}
# what any model responds once it has the result of a tool
AFTER_TOOL = (
    envelope({"response": "It is sunny.", "usage": USAGE}),
    sse({"response": "It is "}, {"response": "sunny.", "usage": USAGE}, "[DONE]"))
# answers with status 200 that cannot be read: content type, body
BROKEN = {
    "html": ("text/html", b"<html><body>502 Bad Gateway</body></html>"),
    "empty": ("application/json", b""), "cut-json": ("application/json", b'{"result":{"resp'),
    "no-success": (
        "application/json",
        b'{"result":{"response":"x"},"success":false,"errors":[],"messages":[]}'),
    "null-result": (
        "application/json", b'{"result":null,"success":true,"errors":[],"messages":[]}')}
# what comes after a first delta: an error in each of its forms, or nothing more
MID_STREAM = {
    "envelope": sse(NSFW),
    "object": sse(
        {
            "error": {
                "code": "invalid_prompt",
                "message": "AiError: AiError: %s on %s (%s)" % (TOKEN, ACCOUNT, UUID)}}),
    "vllm": sse(
        {
            "object": "error", "message": "too long", "type": "BadRequest", "param": None,
            "code": 400}), "cut": b"", "half": b'data: {"choices":[{"ind'}


class FakeCloudflare(Upstream):
    """The API of one account.

    A model responds by its name: see CHAT, BROKEN (@cf/broken/...), MID_STREAM (@cf/mid/...), and
    @cf/error/STATUS/CODE.
    """

    def __init__(self):
        super().__init__(answer=self.route)
        self.base = self.url + "/client/v4"

    def route(self, received):
        method, target, _ = received.line.split(" ")
        path, _, query = target.partition("?")
        if received.field("authorization") != "Bearer " + TOKEN:
            return self.reply(received, error_envelope(10000, "Authentication error"), 401)
        account = re.match("/client/v4/accounts/([0-9a-f]{32})/", path)
        if account and account.group(1) != ACCOUNT:     # nobody's, or another's [T]
            return self.reply(received, error_envelope(10000, "Authentication error"), 403)
        if not path.startswith(BASE + "/ai/"):
            return self.reply(
                received,
                error_envelope(
                    7003, "Could not route to %s, perhaps your object identifier is invalid?" %
                    path[len("/client/v4"):]), 404)
        if path == BASE + "/ai/models/search":
            asked = dict(urllib.parse.parse_qsl(query))
            size, page = int(asked["per_page"]), int(asked.get("page", 1))
            assert size in (1, 50), "more than 50 a page and Cloudflare loses models"
            return self.reply(
                received,
                dict(
                    envelope(CATALOGUE[(page - 1) * size:page * size]),
                    result_info={
                        "page": page, "per_page": size, "count": size, "total_count": 308}))
        if method != "POST":
            return self.reply(
                received, error_envelope(7001, "%s not supported for requested URI." % method),
                405)
        answer = {
            "/ai/v1/chat/completions": self.chat, "/ai/v1/embeddings": self.embeddings
        }.get(path[len(BASE):])
        if not answer:
            return self.reply(received, error_envelope(7000, "No route for that URI"), 400)
        request = json.loads(received.body)
        return self.fail(received, request["model"]) or answer(received, request)

    def reply(self, received, body, status=200, kind="application/json", fields=""):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        received.send(
            ("HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\nServer: "
            "cloudflare\r\nSet-Cookie: __cf_bm=%s\r\nCF-RAY: 9a\r\n%s\r\n" % (
                status, kind, len(body), ACCOUNT, fields)).encode() + body)
        return True

    def stream(self, received, events):
        """Each event in a chunk of its own; what is not whole is the end of it all."""
        received.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: "
            b"chunked\r\nCF-RAY: 9a\r\n\r\n")
        whole = re.findall(rb".+?\n\n", events, re.S)
        for event in whole:
            received.send(chunk(event))
        if sum(map(len, whole)) < len(events):
            received.send(chunk(events[sum(map(len, whole)):]))
        if b"[DONE]" in events or b"response.completed" in events:
            return received.send(b"0\r\n\r\n")
        return received.close()

    def fail(self, received, model):
        """True if that is what this model does."""
        _, kind, name = model.split("/", 2) if model.count("/") >= 2 else ("", "", model)
        if kind == "error":
            status, _, code = name.partition("/")
            message = "AiError: AiError: no account %s with %s (%s)" % (ACCOUNT, TOKEN, UUID)
            return self.reply(
                received, error_envelope(int(code), message), int(status),
                fields="Retry-After: 7\r\n" if status == "429" else "")
        return (
            self.reply(received, BROKEN[name][1], kind=BROKEN[name][0])
            if kind == "broken" else False)

    def chat(self, received, request):
        model = request["model"]
        wrong = schema_fault(request)
        if wrong:
            return self.reply(received, error_envelope(
                5006, "AiError: Bad input: Error: oneOf at '/' not met, 0 matches: required "
                "properties at '/' are 'prompt', %s (%s)" % (wrong, UUID)), 400)
        if model.startswith("@cf/mid/"):
            return self.stream(
                received, sse(delta(content="Hel")) + MID_STREAM[model[len("@cf/mid/"):]])
        if model not in CHAT:
            return self.reply(
                received, error_envelope(5007, "No such model %s or task" % model), 400)
        whole, events = CHAT[model]
        if any(message.get("role") == "tool" for message in request["messages"]):
            whole, events = AFTER_TOOL
        return (
            self.stream(received, events)
            if request.get("stream") and events else self.reply(received, whole))

    def embeddings(self, received, request):
        """The shape of OpenAI [A], or the legacy one [O]; a vector tells how long its text is."""
        texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
        rows = [[float(len(text)), -0.5] for text in texts]
        if request["model"] == "@cf/legacy/bge":
            return self.reply(received, envelope({"shape": [len(rows), 2], "data": rows}))
        if request["model"] == "@cf/base64/bge":
            rows = [base64.b64encode(struct.pack("<2f", *row)).decode() for row in rows]
        data = [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)]
        return self.reply(
            received,
            {
                "object": "list", "data": data, "model": request["model"],
                "usage": {"prompt_tokens": 4, "total_tokens": 4}})


TYPES = {   # [O] llama-3.3-70b-instruct-fp8-fast.json: the type of each member, and its range
    "stream": (bool, None, None), "max_tokens": (int, None, None), "temperature": (float, 0, 5),
    "top_p": (float, 0.001, 1), "top_k": (int, 1, 50), "seed": (int, 1, 9999999999),
    "repetition_penalty": (float, 0, 2), "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2)}


def schema_fault(request):
    """What Cloudflare's validator says against a chat, by the older models' schema [O]; or None.

    Parts of a message are only for models that see (llama-4-scout's schema [O]), and those take
    images as data only.
    """
    for number, message in enumerate(request.get("messages") or [{}]):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return "required properties at '/messages/%d' are 'role,content'" % number
        content = message["content"]
        place = "Type mismatch of '/messages/%d/content', " % number
        if content is None:
            return place + "'null' not in 'string'"
        if isinstance(content, list):
            kinds = {part["type"] for part in content}
            if kinds <= {"text"}:
                return place + "'array' not in 'string'"
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            if not all(url.startswith("data:") for url in urls):
                return place + "HTTP URL will not be accepted"
    for tool in request.get("tools", ()):
        if tool["type"] != "function" or not {"name", "parameters"} <= set(tool["function"]):
            return "oneOf at '/tools/0' not met"
    for name, (kind, least, most) in TYPES.items():
        value = request.get(name)
        if name not in request:
            continue
        is_kind = isinstance(value, bool) if kind is bool else (
            isinstance(value, (int, float)) and (kind is float or value == int(value)))
        if not is_kind:
            return "Type mismatch of '/%s'" % name
        if least is not None and not least <= value <= most:
            return "'/%s' must be <= %s" % (name, most)
    return None


def settings(fake, **others):
    """The environment of a relay in front of `fake`."""
    return dict(
        {
            "AIPROXY_UPSTREAM": "workers-ai", "CLOUDFLARE_ACCOUNT_ID": ACCOUNT,
            "CLOUDFLARE_API_TOKEN": TOKEN, "CLOUDFLARE_API_BASE_URL": fake.base,
            "AIPROXY_CLIENT_KEYS": "alice=ck-alice"}, **others)


if __name__ == "__main__":
    from support import Program
    with FakeCloudflare() as cloudflare, Program(env=settings(cloudflare)) as relay:
        print(relay.url, flush=True)
        sys.stdin.read()
