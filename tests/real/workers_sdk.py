"""The official openai SDK for Python with the relay in front of a fake Cloudflare.

The SDK is given a base URL and a client key and nothing else. `workers_sdk.py oldest` asks only
for what openai 1.0.0 knows (requirements-oldest.txt).
"""

import asyncio
import json
import os
import sys

import openai

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from fake_cloudflare import FakeCloudflare, settings  # noqa: E402
from stand import Checks, check_calm  # noqa: E402
from support import Program  # noqa: E402

HELLO = [{"role": "user", "content": "Hello?"}]
LLAMA, GPT = "@cf/meta/llama-3.1-8b-instruct", "@cf/openai/gpt-oss-20b"
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def raised(kind, call, code, status=None):
    """The error that `call` raises must be of this kind, with this code."""
    try:
        made = call()
        if hasattr(made, "__iter__") and not hasattr(made, "model_dump"):
            list(made)
    except kind as error:
        assert (
            type(error) is kind
            and error.code == code
            and getattr(error, "status_code", None) == status
        ), (type(error), error.code, error)
        assert error.message and "AiError" not in str(error), error
        return
    raise AssertionError("no %s was raised" % kind.__name__)


def text_of(stream):
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def check_all(checks, client):
    chat, completions = client.chat.completions, client.completions
    with checks("chat"):
        answer = chat.create(model="llama-4-scout", messages=HELLO)
        assert answer.choices[0].message.content.startswith("I am Llama 4 Scout")
        assert answer.model == "llama-4-scout"
        assert answer.usage.total_tokens == 25
        assert answer.choices[0].finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer._request_id
    for model, text in (
        (LLAMA, "Hello!"),
        ("llama-4-scout", "Hello!"),
        ("@cf/shape/kimi", "Hello!"),
        ("@cf/shape/dual", "Hello!"),
        ("@cf/shape/number", "78"),
        ("@cf/shape/bare", "4"),
    ):
        with checks("stream: " + model):
            events = list(chat.create(model=model, messages=HELLO, stream=True))
            assert text_of(events) == text
            assert events[0].choices[0].delta.role == "assistant"
            assert not any(event.usage for event in events)
            reasons = [event.choices[0].finish_reason for event in events]
            assert reasons == [None] * (len(events) - 1) + ["stop"]
    with checks("usage at the end of a stream"):
        *_, last = chat.create(
            model=LLAMA, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        usage = last.usage
        assert last.choices == []
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (45, 2, 47)
    for model in ("@cf/shape/flat-tool", GPT):
        with checks("tools: " + model):
            choice = chat.create(model=model, messages=HELLO, tools=WEATHER).choices[0]
            [call] = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            assert call.id
            assert call.type == "function"
            assert call.function.name == "get_weather"
            assert json.loads(call.function.arguments)
    for model in (GPT, "@cf/shape/sentinel", "@cf/shape/flat-tool"):
        with checks("tools in a stream: " + model):
            with chat.stream(model=model, messages=HELLO, tools=WEATHER) as stream:
                choice = stream.get_final_completion().choices[0]
            [call] = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls"
            assert call.function.name == "get_weather"
            assert isinstance(json.loads(call.function.arguments), dict)
    with checks("a forced call that comes as text"):
        forced = {"type": "function", "function": {"name": "get_weather"}}
        given = {"model": "gpt-oss-120b", "messages": HELLO, "tools": WEATHER}
        whole = chat.create(tool_choice=forced, **given)
        with chat.stream(tool_choice="required", **given) as stream:
            streamed = stream.get_final_completion()
        for answer in (whole, streamed):
            choice = answer.choices[0]
            [call] = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls" and not choice.message.content
            assert call.function.name == "get_weather"
            assert json.loads(call.function.arguments) == {"city": "Paris"}
    with checks("a tool's result goes back up"):
        function = {"name": "get_weather", "arguments": "{}"}
        call = {"id": "a", "type": "function", "function": function}
        done = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        ]
        answer = chat.create(model=LLAMA, messages=HELLO + done, tools=WEATHER)
        assert answer.choices[0].message.content == "It is sunny."
    with checks("completion"):
        answer = completions.create(model=LLAMA, prompt="Once")
        assert answer.object == "text_completion"
        assert answer.choices[0].text == "4"
        assert answer.usage.total_tokens == 33
    with checks("completion, stream"):
        parts = completions.create(model=LLAMA, prompt="Once", stream=True)
        assert "".join(part.choices[0].text for part in parts) == "Hello!"
    for model in ("@cf/baai/bge-m3", "@cf/legacy/bge", "@cf/base64/bge"):
        with checks("embeddings: " + model):
            answer = client.embeddings.create(model=model, input=["Once", "é"])
            assert [one.embedding for one in answer.data] == [[4.0, -0.5], [1.0, -0.5]]
    with checks("embeddings, as floats"):
        answer = client.embeddings.create(
            model="@cf/baai/bge-m3", input="Once", encoding_format="float"
        )
        assert answer.data[0].embedding == [4.0, -0.5]
    check_responses(checks, client)
    with checks("models"):
        ids = [model.id for model in client.models.list()]
        assert ids[0] == "gpt-oss-20b" and "@cf/baai/bge-m3" in ids and "@cf/old/gone" not in ids
    with checks("a model with slashes"):
        model = client.models.retrieve(GPT)
        assert model.id == GPT and model.created == 1754390993 and model.owned_by == "cloudflare"
    with checks("errors before the answer"):
        for model, kind, code, status in (
            ("@cf/error/400/5007", openai.NotFoundError, "model_not_found", 404),
            ("@cf/error/400/5006", openai.BadRequestError, "invalid_request", 400),
            ("@cf/error/403/5035", openai.PermissionDeniedError, "permission_denied", 403),
            ("@cf/error/429/3040", openai.RateLimitError, "rate_limit_exceeded", 429),
            ("@cf/error/429/4006", openai.RateLimitError, "insufficient_quota", 429),
            (
                "@cf/error/401/10000",
                openai.InternalServerError,
                "upstream_credentials_rejected",
                502,
            ),
            ("@cf/error/500/8005", openai.InternalServerError, "upstream_error", 502),
            ("@cf/broken/html", openai.InternalServerError, "upstream_bad_response", 502),
        ):
            for stream in (False, True):
                raised(
                    kind,
                    lambda: chat.create(model=model, messages=HELLO, stream=stream),
                    code,
                    status,
                )
    with checks("errors of our own"):
        raised(
            openai.BadRequestError,
            lambda: chat.create(model="", messages=HELLO),
            "invalid_model",
            400,
        )
        raised(
            openai.NotFoundError,
            lambda: client.models.retrieve("@cf/no/such"),
            "model_not_found",
            404,
        )
        raised(
            openai.AuthenticationError,
            lambda: client.with_options(api_key="wrong").models.list(),
            "invalid_api_key",
            401,
        )
    for form, code in (
        ("envelope", "invalid_request"),
        ("object", "invalid_prompt"),
        ("vllm", "invalid_request"),
    ):
        with checks("an error in mid-stream: " + form):
            raised(
                openai.APIError,
                lambda: chat.create(model="@cf/mid/" + form, messages=HELLO, stream=True),
                code,
            )
            raised(
                openai.APIError,
                lambda: completions.create(model="@cf/mid/" + form, prompt="Once", stream=True),
                code,
            )
            raised(
                openai.APIError,
                lambda: client.responses.create(model="@cf/mid/" + form, input="Once", stream=True),
                code,
            )
    with checks("a cut stream is an error"):
        try:
            list(chat.create(model="@cf/mid/cut", messages=HELLO, stream=True))
        except openai.APIError as error:
            assert error.code in ("upstream_died", "upstream_bad_response"), error.code
        else:
            raise AssertionError("it passed for a whole one")


def check_responses(checks, client):
    """The Responses API, which Cloudflare has for one family of models, and never as a stream."""
    for model, text in ((LLAMA, "4"), ("llama-4-scout", "I am Llama 4 Scout"), (GPT, "")):
        with checks("response: " + model):
            answer = client.responses.create(model=model, input="Once")
            assert answer.output_text.startswith(text)
            assert (answer.model, answer.status) == (model, "completed")
            usage = answer.usage
            assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    with checks("response, stream"):
        events = list(client.responses.create(model=LLAMA, input="Once", stream=True))
        types = [event.type.replace("response.", "") for event in events]
        assert types == [
            "created", "in_progress", "output_item.added", "content_part.added",
            "output_text.delta", "output_text.delta", "output_text.done", "content_part.done",
            "output_item.done", "completed",
        ]
        assert events[-1].response.model == LLAMA
        assert events[-1].response.output_text == "Hello!"
    tool = {"type": "function", **WEATHER[0]["function"], "strict": False}
    for model in (GPT, "@cf/shape/flat-tool", "@cf/shape/sentinel"):
        with checks("response, two turns with a tool: " + model):
            given = {"model": model, "tools": [tool]}
            with client.responses.stream(input="Once", **given) as stream:
                events = list(stream)
                first = stream.get_final_response()
            (call,) = [item for item in first.output if item.type == "function_call"]
            assert call.name == "get_weather" and isinstance(json.loads(call.arguments), dict)
            deltas = [event.delta for event in events
                      if event.type == "response.function_call_arguments.delta"]
            assert "".join(deltas) == call.arguments
            history = [{"role": "user", "content": "Once"}]
            history += [item.model_dump(exclude_none=True) for item in first.output]
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
            for stream in (False, True):
                second = client.responses.create(input=history + [result], stream=stream, **given)
                if stream:
                    second = list(second)[-1].response
                assert second.output_text == "It is sunny."
    with checks("response, stored: a 400"):
        raised(
            openai.BadRequestError,
            lambda: client.responses.create(
                model=LLAMA, input="Once", previous_response_id="resp_1"
            ),
            "invalid_parameter",
            400,
        )


def check_oldest(checks, client):
    """What the first SDK of this form knows: no tools, no Responses."""
    chat = client.chat.completions
    with checks("chat"):
        answer = chat.create(model="llama-4-scout", messages=HELLO)
        assert answer.choices[0].message.content.startswith("I am Llama 4 Scout")
        assert answer.usage.total_tokens == 25
    for model in (LLAMA, "llama-4-scout", "@cf/shape/kimi", "@cf/shape/dual"):
        with checks("stream: " + model):
            assert text_of(chat.create(model=model, messages=HELLO, stream=True)) == "Hello!"
    with checks("completion"):
        assert client.completions.create(model=LLAMA, prompt="Once").choices[0].text == "4"
    with checks("embeddings"):
        answer = client.embeddings.create(model="@cf/baai/bge-m3", input=["Once", "é"])
        assert [one.embedding for one in answer.data] == [[4.0, -0.5], [1.0, -0.5]]
    with checks("models"):
        assert "@cf/baai/bge-m3" in [model.id for model in client.models.list()]
        assert client.models.retrieve(GPT).id == GPT
    for model, kind in (
        ("@cf/error/400/5007", openai.NotFoundError),
        ("@cf/error/400/5021", openai.BadRequestError),
        ("@cf/error/429/4006", openai.RateLimitError),
        ("@cf/mid/object", openai.APIError),
    ):
        with checks("error: " + model):
            try:
                list(chat.create(model=model, messages=HELLO, stream=True))
            except kind as error:
                assert type(error) is kind
            else:
                raise AssertionError("no error")


def check_two_turns(checks, client):
    for model in (GPT, "@cf/shape/flat-tool", "@cf/shape/sentinel"):
        with checks("chat, two turns with a tool: " + model):
            messages = [{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}]
            given = {"model": model, "tools": WEATHER, "messages": messages}
            message = client.chat.completions.create(**given).choices[0].message
            (call,) = message.tool_calls
            messages.append(message.model_dump(exclude_unset=True))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
            answer = client.chat.completions.create(**given)
            assert answer.choices[0].message.content == "It is sunny."


def check_langchain(checks, told):
    """An agent's two turns, by both APIs."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    for is_responses in (False, True):
        with checks("LangChain, two turns with a tool, Responses: %s" % is_responses):
            llm = ChatOpenAI(model=GPT, use_responses_api=is_responses, **told)
            bound = llm.bind_tools(WEATHER)
            history = [HumanMessage([{"type": "text", "text": "Weather?"}])]
            first = bound.invoke(history)
            (call,) = first.tool_calls
            assert call["name"] == "get_weather"
            history += [first, ToolMessage("sunny", tool_call_id=call["id"])]
            assert bound.invoke(history).text == "It is sunny."
            parts = list(bound.stream(history))
            assert "".join(part.text for part in parts) == "It is sunny."


def check_retries(checks, client, cloudflare):
    """How often the SDK asks: again where that may help, not where it cannot."""
    for model, times in (
        ("@cf/error/429/4006", 1),
        ("@cf/error/401/10000", 1),
        ("@cf/error/404/7003", 1),
        ("@cf/error/400/5007", 1),
        ("@cf/error/500/8005", 2),
    ):
        with checks("asked %d times: %s" % (times, model)):
            before = len(cloudflare.received)
            try:
                client.with_options(max_retries=1).chat.completions.create(
                    model=model, messages=HELLO
                )
            except openai.APIStatusError:
                assert len(cloudflare.received) - before == times
            else:
                raise AssertionError("no error")


async def check_async(client):
    async with client:
        stream = await client.chat.completions.create(model=LLAMA, messages=HELLO, stream=True)
        parts = [part async for part in stream if part.choices]
        return "".join(part.choices[0].delta.content or "" for part in parts)


if __name__ == "__main__":
    checks = Checks()
    with FakeCloudflare() as cloudflare, Program(env=settings(cloudflare)) as relay:
        told = {"base_url": relay.url + "/v1", "api_key": "ck-alice", "max_retries": 0}
        client = openai.OpenAI(**told)
        if sys.argv[1:] == ["oldest"]:
            check_oldest(checks, client)
        else:
            check_all(checks, client)
            check_two_turns(checks, client)
            check_langchain(checks, told)
            check_retries(checks, client, cloudflare)
        with checks("the asynchronous client"):
            assert asyncio.run(check_async(openai.AsyncOpenAI(**told))) == "Hello!"
        with checks("neither a fault nor the client key"):
            check_calm(relay)
            assert not cloudflare.errors and b"ck-alice" not in cloudflare.all_bytes
    checks.end()
