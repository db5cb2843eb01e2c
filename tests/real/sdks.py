"""Official SDKs through a relay with a provider key configured, used as programs use them.

Old and new versions, synchronous and asynchronous, streams, tools, retries.

    python3 sdks.py [openai] [anthropic] [langchain] [curl]     all four unless said otherwise

The provider is npm's @copilotkit/aimock (see providers.py). An upstream of our own takes its place
where each event has to wait until the one before has been read, or where a response must be 429.
For the oldest SDK: `pip install -r requirements-oldest.txt`, then `sdks.py openai`.
"""

import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request

from stand import Checks, check_calm, start
from support import EVENT_HEAD, PATIENCE, Upstream, chunk, event

HERE = os.path.dirname(os.path.abspath(__file__))
HIDDEN = {
    "KEY": "sk-hidden-key",
    "CLIENT_KEYS": "app=ck-app",
    "MODELS": "gpt-4o,fast=gpt-4o,text-embedding-3-small,claude-any",
}
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = [{"role": "user", "content": "weather in Tokyo?"}]
TEXT = "Hello from the mock: \u4f60\u597d, caf\u00e9, in several pieces."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 0,
    "model": "gpt-4o",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "at last"},
        }
    ],
}
MESSAGE = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "claude-any",
    "content": [{"type": "text", "text": "at last"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 2},
}


def answer(status, body, fields=""):
    body = json.dumps(body).encode()
    head = "HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status
    head += fields + "Content-Length: %d\r\n\r\n" % len(body)
    return head.encode() + body


def busy_once(then):
    """An upstream's behaviour: 429 and Retry-After at first, from then on `then`."""
    seen = []

    def behave(received):
        seen.append(time.monotonic())
        if len(seen) > 1:
            received.send(answer(200, then))
            return
        error = {"message": "Slow down.", "type": "requests", "param": None}
        error["code"] = "rate_limit_exceeded"
        fields = "Retry-After: 1\r\nx-request-id: req_busy\r\n"
        received.send(answer(429, {"error": error}, fields))

    behave.seen = seen
    return behave


def gated(gate, texts):
    """An upstream's behaviour: each event waits until the one before it has been read."""

    def behave(received):
        received.send(EVENT_HEAD)
        for text in texts:
            choice = {"index": 0, "finish_reason": None, "delta": {"content": text}}
            part = dict(CHAT, object="chat.completion.chunk", choices=[choice])
            received.send(chunk(event(json.dumps(part))))
            assert gate.acquire(timeout=PATIENCE), "the event before was not read"
        received.send(chunk(event("[DONE]")) + chunk(b""))

    return behave


def check_retry(checks, name, call, then, **settings):
    behave = busy_once(then)
    settings = {**HIDDEN, **settings}
    with Upstream(answer=behave) as upstream, start(upstream.url, **settings) as relay:
        with checks(name + ": 429 with Retry-After is retried, and not too early"):
            assert call(relay.url) == "at last"
            assert len(behave.seen) == 2 and behave.seen[1] - behave.seen[0] >= 0.9, behave.seen
        check_calm(relay)


def raised(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("nothing was raised")


def code_of(error):
    """The code of an openai exception; 1.0.0 did not yet look for it inside `error`."""
    code = error.response.json()["error"]["code"]
    assert error.code in (code, None)
    return code


def openai_checks(checks, mock_url):
    import openai

    def client(relay, key="ck-app", **options):
        options = {"max_retries": 0, **options}
        return openai.OpenAI(base_url=relay.url + "/v1", api_key=key, **options)

    def chat(client, model="gpt-4o", messages=HELLO, **options):
        return client.chat.completions.create(model=model, messages=messages, **options)

    def text(completion):
        return completion.choices[0].message.content

    with start(mock_url, **HIDDEN) as relay:
        sync = client(relay)
        with checks("chat, an alias"):
            assert text(chat(sync, "fast")) == TEXT
        with checks("stream"):
            parts = [part for part in chat(sync, stream=True) if part.choices]
            pieces = [part.choices[0].delta.content or "" for part in parts]
            assert "".join(pieces) == TEXT and len(pieces) > 5
        with checks("tools"):
            completion = chat(sync, messages=WEATHER, extra_body={"tools": [TOOL]})
            # By name, as version 1.0.0 has no tools yet.
            message = completion.choices[0].message.model_dump()
            called = message["tool_calls"][0]["function"]
            assert called["name"] == "get_weather"
            assert json.loads(called["arguments"]) == {"city": "Tokyo"}
        with checks("embeddings"):
            response = sync.embeddings.create(model="text-embedding-3-small", input="hello")
            assert response.data[0].embedding == [0.25, -0.5, 1]
        with checks("models"):
            names = HIDDEN["MODELS"].replace("=gpt-4o", "").split(",")
            assert [model.id for model in sync.models.list()] == names
            assert sync.models.retrieve("fast").id == "fast"
        with checks("raw response: request id, no trace of the upstream"):
            raw = sync.chat.completions.with_raw_response.create(model="gpt-4o", messages=HELLO)
            assert raw.headers["x-request-id"] and text(raw.parse()) == TEXT
            assert "sk-hidden-key" not in str(raw.headers)
        for name, kind, code, call in (
            (
                "a wrong key",
                openai.AuthenticationError,
                "invalid_api_key",
                lambda: client(relay, "ck-wrong").models.list(),
            ),
            (
                "another model",
                openai.PermissionDeniedError,
                "model_not_allowed",
                lambda: chat(sync, "o1"),
            ),
            (
                "an unknown model",
                openai.NotFoundError,
                "model_not_found",
                lambda: sync.models.retrieve("o1"),
            ),
            ("another path", openai.NotFoundError, "not_found", lambda: sync.files.list()),
        ):
            with checks("%s: %s" % (name, kind.__name__)):
                error = raised(kind, call)
                assert code_of(error) == code and error.response.headers["x-request-id"], error

        async def everything():
            options = {"base_url": relay.url + "/v1", "api_key": "ck-app", "max_retries": 0}
            async with openai.AsyncOpenAI(**options) as each:
                completions = await asyncio.gather(*[chat(each) for _ in range(20)])
                parts = [part async for part in await chat(each, stream=True) if part.choices]
                pieces = [part.choices[0].delta.content or "" for part in parts]
                return {text(completion) for completion in completions} | {"".join(pieces)}

        with checks("async: 20 at once, and a stream"):
            assert asyncio.run(everything()) == {TEXT}
        check_calm(relay)

    gate = threading.Semaphore(0)
    with Upstream(answer=gated(gate, "abc")) as upstream, start(upstream.url, **HIDDEN) as relay:
        with checks("each event is there before the next one is sent"):
            read = []
            for part in chat(client(relay), stream=True):
                read.append(part.choices[0].delta.content)
                gate.release()
            assert read == ["a", "b", "c"] and not upstream.errors, (read, upstream.errors)
        with checks("a stream that is closed early is closed upstream"):
            stream = chat(client(relay), stream=True)
            assert next(iter(stream)).choices[0].delta.content == "a"
            stream.response.close()
            assert upstream.received[-1].wait_closed() < 2
        with checks("only the hidden key went up"):
            assert upstream.received[0].fields("authorization") == ["Bearer sk-hidden-key"]
            assert b"ck-app" not in upstream.all_bytes

    def with_default_retries(url):
        return text(chat(openai.OpenAI(base_url=url + "/v1", api_key="ck-app")))

    check_retry(checks, "openai", with_default_retries, CHAT)
    with start(mock_url, **HIDDEN, RATE="1/s") as relay:
        with checks("AIPROXY_RATE's own 429: RateLimitError with its fields, or a retry in time"):
            chat(client(relay))
            error = raised(openai.RateLimitError, lambda: chat(client(relay)))
            assert code_of(error) == "rate_limit_exceeded"
            assert error.response.headers["retry-after"] == "1"
            assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
            assert text(chat(client(relay, max_retries=3))) == TEXT


def anthropic_checks(checks, mock_url):
    import anthropic

    asked = {"model": "claude-any", "max_tokens": 100}
    ours = {"KEY_HEADER": "x-api-key", "PATHS": "/v1/messages,/v1/messages/count_tokens"}

    def client(url, **options):
        return anthropic.Anthropic(base_url=url, api_key="ck-app", **options)

    with start(mock_url, **{**HIDDEN, **ours}) as relay:
        sync = client(relay.url, max_retries=0)
        with checks("message"):
            assert sync.messages.create(messages=HELLO, **asked).content[0].text == TEXT
        with checks("stream"):
            with sync.messages.stream(messages=HELLO, **asked) as events:
                assert "".join(events.text_stream) == TEXT
        with checks("tool use"):
            block = sync.messages.create(
                messages=WEATHER,
                tools=[{"name": "get_weather", "input_schema": {"type": "object"}}],
                **asked,
            ).content[0]
            assert (block.name, block.input) == ("get_weather", {"city": "Tokyo"})

        async def several():
            options = {"base_url": relay.url, "api_key": "ck-app", "max_retries": 0}
            async with anthropic.AsyncAnthropic(**options) as each:
                calls = [each.messages.create(messages=HELLO, **asked) for _ in range(20)]
                return {message.content[0].text for message in await asyncio.gather(*calls)}

        with checks("async: 20 at once"):
            assert asyncio.run(several()) == {TEXT}
        with checks("raw response: a request id"):
            raw = sync.messages.with_raw_response.create(messages=HELLO, **asked)
            assert raw.headers["x-request-id"]
        with checks("another model: PermissionDeniedError"):
            error = raised(
                anthropic.PermissionDeniedError,
                lambda: sync.messages.create(model="o1", max_tokens=1, messages=HELLO),
            )
            assert "model" in str(error)
        check_calm(relay)
    check_retry(
        checks,
        "anthropic",
        lambda url: client(url).messages.create(messages=HELLO, **asked).content[0].text,
        MESSAGE,
        **ours,
    )


def langchain_checks(checks, mock_url):
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    def model(url, **options):
        return ChatOpenAI(base_url=url + "/v1", api_key="ck-app", model="fast", **options)

    with start(mock_url, **HIDDEN) as relay:
        with checks("invoke"):
            assert model(relay.url).invoke("hello").content == TEXT
        with checks("stream"):
            assert "".join(part.content for part in model(relay.url).stream("hello")) == TEXT
        with checks("async stream"):

            async def stream():
                return "".join([part.content async for part in model(relay.url).astream("hello")])

            assert asyncio.run(stream()) == TEXT
        with checks("bind_tools"):
            called = model(relay.url).bind_tools([TOOL]).invoke("weather in Tokyo?").tool_calls[0]
            assert (called["name"], called["args"]) == ("get_weather", {"city": "Tokyo"})
        with checks("embeddings"):
            embeddings = OpenAIEmbeddings(
                base_url=relay.url + "/v1",
                api_key="ck-app",
                model="text-embedding-3-small",
                check_embedding_ctx_length=False,
            )
            assert embeddings.embed_query("hello") == [0.25, -0.5, 1]
        check_calm(relay)
    check_retry(checks, "langchain", lambda url: model(url).invoke("hello").content, CHAT)


def curl_checks(checks, mock_url):
    def curl(*arguments):
        return subprocess.run(
            ("curl", "-sS", "-m", "20") + arguments,
            stdout=subprocess.PIPE,
            universal_newlines=True,
            encoding="utf-8",
            timeout=60,
            check=True,
        ).stdout

    body = json.dumps({"model": "gpt-4o", "stream": True, "messages": HELLO})
    with start(mock_url, **HIDDEN) as relay:
        url, key = relay.url + "/v1/chat/completions", ("-H", "Authorization: Bearer ck-app")
        with checks("the README's curl: a stream to its end"):
            said = curl("-N", url, *key, "-H", "Content-Type: application/json", "-d", body)
            lines = said.split("\n\n")
            parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            choices = [part["choices"][0] for part in parts if part["choices"]]
            assert "".join(choice["delta"].get("content") or "" for choice in choices) == TEXT
            assert lines[-2:] == ["data: [DONE]", ""]
        with checks("no content type said, a body with Expect, --http1.0, --compressed"):
            for options in ([], ["-H", "Expect: 100-continue"], ["--http1.0"], ["--compressed"]):
                assert curl(url, *key, "-d", body, *options).endswith("data: [DONE]\n\n"), options
        with checks("no key: 401 and what to do"):
            said, _, status = curl("-w", "\n%{http_code}", url, "-d", body).rpartition("\n")
            assert status == "401" and json.loads(said)["error"]["code"] == "invalid_api_key"
        check_calm(relay)


def version(name):
    try:
        return "%s %s" % (name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return "no " + name


if __name__ == "__main__":
    parts = {
        "openai": openai_checks,
        "anthropic": anthropic_checks,
        "langchain": langchain_checks,
        "curl": curl_checks,
    }
    names = ("openai", "httpx", "anthropic", "langchain-openai")
    said = subprocess.check_output(["curl", "--version"], universal_newlines=True)
    versions = [version(name) for name in names] + [said.split(" (")[0]]
    print("CPython %d.%d.%d" % sys.version_info[:3] + ", " + ", ".join(versions))
    counted = Checks()
    mock = subprocess.Popen(
        ["node", os.path.join(HERE, "mock.mjs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    url = mock.stdout.readline().strip()
    for part in sys.argv[1:] or parts:
        print(part)
        parts[part](counted, url)
    with counted("no client key reached the provider"):
        journal = urllib.request.urlopen(url + "/__aimock/journal").read().decode()
        assert "/v1/" in journal and "ck-app" not in journal
    mock.kill()
    counted.end()
