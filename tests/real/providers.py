"""Official SDKs through a transparent relay, in front of a provider that we did not write.

The SDKs are given another base URL and nothing else. The provider is npm's @copilotkit/aimock:
MIT, no dependencies, maintained, and it serves OpenAI's, Anthropic's, Gemini's and Ollama's APIs
from one port, with streaming, byte-exact files and the Realtime WebSocket. (Of the others on npm,
`aimock` and `llm-mock`, one does OpenAI's API only, the other scenarios and faults.)
`npm install` in this folder gets it.

Each call is made twice, once straight to the mock: the SDK must see the same through the relay.
"""

import asyncio
import os
import subprocess

import anthropic
import ollama
import openai
from google import genai

from stand import Checks, check_calm, start

HERE = os.path.dirname(os.path.abspath(__file__))
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = [{"role": "user", "content": "weather in Tokyo?"}]
FILE = b'{"custom_id":"1"}\n' + bytes(range(256)) * 4096


def anthropic_calls(url):
    client = anthropic.Anthropic(base_url=url, api_key="sk-ant-caller", max_retries=0)
    asked = {"model": "claude-sonnet-4-5", "max_tokens": 100}
    yield "message", lambda: client.messages.create(messages=HELLO, **asked).content[0].text

    def tool_use():
        tools = [{"name": "get_weather", "input_schema": {"type": "object"}}]
        message = client.messages.create(messages=WEATHER, tools=tools, **asked)
        return [
            (block.name, block.input) for block in message.content if block.type == "tool_use"
        ]

    yield "tool use", tool_use

    def stream():
        with client.messages.stream(messages=HELLO, **asked) as events:
            return list(events.text_stream)

    yield "stream", stream


def gemini_calls(url):
    # The mock has no /v1 for Gemini.
    options = {"base_url": url, "api_version": "v1beta"}
    client = genai.Client(api_key="caller", http_options=options)
    model = "gemini-2.5-flash"

    def stream():
        parts = client.models.generate_content_stream(model=model, contents="hello")
        return [part.text for part in parts]

    def function_call():
        response = client.models.generate_content(model=model, contents="weather?")
        return [(call.name, call.args) for call in response.function_calls]

    yield "generate", lambda: client.models.generate_content(model=model, contents="hello").text
    yield "stream", stream
    yield "function call", function_call

    def chat():
        talk = client.chats.create(model="gemini-2.5-flash")
        return [talk.send_message(text).text for text in ("hello", "and again")]

    yield "chat of two turns", chat


def ollama_calls(url):
    client = ollama.Client(host=url)
    yield "chat", lambda: client.chat(model="llama3", messages=HELLO).message.content
    yield "stream", lambda: [
        part.message.content for part in client.chat(model="llama3", messages=HELLO, stream=True)
    ]
    yield "generate", lambda: client.generate(model="llama3", prompt="hello").response


def openai_calls(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="sk-caller", max_retries=0)

    def chat():
        completion = client.chat.completions.create(model="gpt-4o", messages=HELLO)
        return completion.choices[0].message.content

    def stream():
        parts = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True)
        return [part.choices[0].delta.content for part in parts if part.choices]

    def responses_stream():
        events = client.responses.create(model="gpt-4o", input="hello", stream=True)
        return [event.delta for event in events if event.type == "response.output_text.delta"]

    def embeddings():
        response = client.embeddings.create(model="text-embedding-3-small", input="hello")
        return response.data[0].embedding

    yield "chat", chat
    yield "stream", stream
    yield "responses, stream", responses_stream
    yield "embeddings", embeddings

    def file():
        uploaded = client.files.create(file=("a.jsonl", FILE), purpose="batch")
        content = client.files.content(uploaded.id).read()
        return content == FILE, client.files.delete(uploaded.id).deleted

    yield "file up, down and deleted", file

    async def realtime():
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="sk-caller")
        async with client.realtime.connect(model="gpt-realtime") as connection:
            content = [{"type": "input_text", "text": "hello"}]
            item = {"type": "message", "role": "user", "content": content}
            await connection.conversation.item.create(item=item)
            await connection.response.create()
            kinds = []
            async for event in connection:
                kinds.append(event.type)
                if event.type in ("response.done", "error"):
                    return kinds

    yield "realtime WebSocket", lambda: asyncio.run(realtime())


if __name__ == "__main__":
    checks = Checks()
    mock = subprocess.Popen(
        ["node", os.path.join(HERE, "mock.mjs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    mock_url = mock.stdout.readline().strip()
    with start(mock_url) as relay:
        for sdk, calls in (
            ("anthropic", anthropic_calls),
            ("google-genai", gemini_calls),
            ("ollama", ollama_calls),
            ("openai", openai_calls),
        ):
            for (name, straight), (_, relayed) in zip(calls(mock_url), calls(relay.url)):
                with checks("%s: %s" % (sdk, name)):
                    seen = relayed()
                    assert seen and seen == straight(), seen
        with checks("no fault was printed"):
            check_calm(relay)
    mock.kill()
    checks.end()
