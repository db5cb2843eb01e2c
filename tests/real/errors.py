"""What the official SDKs make of our own errors: openai, anthropic and google-genai.

    python3 errors.py       needs no provider; pip install -r requirements.txt
"""

import json

import anthropic
import google.genai
import openai
from google.genai import errors as google_errors

from stand import Checks, check_calm, start
from support import EVENT_HEAD, Upstream, chunk, event

HELLO = [{"role": "user", "content": "hello"}]
SETTINGS = {
    "KEY": "sk-hidden-key",
    "CLIENT_KEYS": "app=ck-app",
    "PATHS": "*",
}
# How a stream of each API begins.
BEGINNINGS = {
    "/v1/chat/completions": ("", {
        "id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m",
        "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}),
    "/v1/responses": ("response.output_text.delta", {
        "type": "response.output_text.delta", "delta": "x", "item_id": "i", "output_index": 0,
        "content_index": 0, "sequence_number": 1, "logprobs": []}),
    "/v1/messages": ("content_block_delta", {
        "type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}}),
    "/v1beta/models/": ("", {
        "candidates": [{"content": {"parts": [{"text": "x"}], "role": "model"}}]}),
}


def break_off(received):
    """Send the head of a stream and one event, then die."""
    path = received.line.split()[1].replace("/v1/models/", "/v1beta/models/")
    name, data = next(value for key, value in BEGINNINGS.items() if path.startswith(key))
    first = event(json.dumps(data))
    if name:
        first = b"event: %b\n" % name.encode() + first
    received.send(EVENT_HEAD + chunk(first))
    received.close()


def raised(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("nothing was raised")


def openai_calls(url, key):
    client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
    yield "chat", lambda: list(
        client.chat.completions.create(model="m", messages=HELLO, stream=True))
    yield "responses", lambda: list(client.responses.create(model="m", input="x", stream=True))


def anthropic_call(url, key):
    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    return lambda: list(
        client.messages.create(model="m", max_tokens=9, messages=HELLO, stream=True))


def google_call(url, key):
    options = google.genai.types.HttpOptions(base_url=url)
    client = google.genai.Client(api_key=key, http_options=options)
    return lambda: list(client.models.generate_content_stream(model="gemini-x", contents="x"))


def check_refusals(checks, url):
    for name, call in openai_calls(url, "ck-wrong"):
        with checks("openai, %s: a wrong key" % name):
            error = raised(openai.AuthenticationError, call)
            assert (error.code, error.body["message"]) == (
                "invalid_api_key", "Incorrect client key.")
    with checks("anthropic: a wrong key"):
        error = raised(anthropic.AuthenticationError, anthropic_call(url, "ck-wrong"))
        assert error.type == "authentication_error", error.type
        assert "Incorrect client key." in str(error)
    with checks("google-genai: a wrong key"):
        error = raised(google_errors.ClientError, google_call(url, "ck-wrong"))
        assert (error.code, error.status, error.message) == (
            401, "UNAUTHENTICATED", "Incorrect client key.")


def check_cut_streams(checks, url):
    for name, call in openai_calls(url, "ck-app"):
        with checks("openai, %s: a cut stream" % name):
            error = raised(openai.APIError, call)
            assert error.code == "upstream_died"
            assert "closed the connection" in error.message
    with checks("anthropic: a cut stream"):
        error = raised(anthropic.APIStatusError, anthropic_call(url, "ck-app"))
        assert error.type == "api_error", error.type
        assert "closed the connection" in str(error)
    with checks("google-genai: a cut stream"):
        error = raised(google_errors.ServerError, google_call(url, "ck-app"))
        assert (error.code, error.status) == (502, "UNAVAILABLE")
        assert "closed the connection" in error.message


def main():
    checks = Checks()
    with Upstream(answer=break_off) as upstream, start(upstream.url, **SETTINGS) as relay:
        check_refusals(checks, relay.url)
        check_cut_streams(checks, relay.url)
        check_calm(relay)
    checks.end()


if __name__ == "__main__":
    main()
