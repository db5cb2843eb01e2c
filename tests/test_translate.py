"""Cloudflare's shapes in, OpenAI's objects out.

The mark after each name says how far its shape is to be trusted, as in WIRE_FORMATS.md:
[O] official, [R] recorded, [T] third party, [A] assumed. The shapes that fake_cloudflare.py has
are the literal ones.
"""
import functools
import json
import types

import pytest

import aiproxy
from aiproxy import (Call, ErrorResponse, EventReader, StreamTranslator, WORKERS_ALIASES,
                     check_prompt_length, edit_members, error_object,
                     find_error_form, parse_object, render_error_event,
                     translate_response, translate_catalogue, translate_error, translate_request)
from fake_cloudflare import (ACCOUNT, DUAL, ITEM, KIMI, LEGACY, LEGACY_ROWS, LLAMA_31,
                             LLAMA_33_TOOL, LLAMA_4, LLAMA_4_TOOL, NSFW, OPENAI_ROWS, PACKED,
                             QWEN_3, ROWS, TOKEN, TOOLS, USAGE, UUID, delta, envelope,
                             error_envelope, item, read_sse, sse)

CREATED = 1778255778


def call(kind="chat", **others):
    others = dict(
        dict(
            model="shown", id="1", created=CREATED, stream=False,
            include_usage=False, base64=False, secrets=(ACCOUNT, TOKEN)), **others)
    return Call(kind=kind, **others)


def request(body, path="/v1/chat/completions", model="@cf/real/model", **others):
    """The Call that a request makes, with the body that goes up."""
    body = (body if isinstance(body, str) else json.dumps(body)).encode()
    made, body = translate_request(path, body, parse_object(body), model, "shown", **others)
    return types.SimpleNamespace(body=body, **made._asdict())


def raised(function, *args, **others):
    with pytest.raises(ErrorResponse) as caught:
        function(*args, **others)
    return caught.value


def body(data):
    return data if isinstance(data, bytes) else json.dumps(data).encode()


def choice(message, finish="stop", **others):
    return dict(
        {
            "index": 0,
            "message": dict({"role": "assistant", "content": None, "refusal": None}, **message),
            "logprobs": None, "finish_reason": finish}, **others)


def called(ident, name, arguments):
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- requests

MESSAGES = '"messages":[{"role":"user","content":"h\\u00e9 \\ud83d"}]'


@pytest.mark.parametrize(
    "sent,goes_up",
    [('{ "model" : "gemma-4",  ' + MESSAGES + ', "temperature": 0.10, "max_tokens": 5}',
      '{ "model" : "@cf/real/model",  ' + MESSAGES + ', "temperature": 0.10, "max_tokens": 5}'),
     ('{"model":"a",' + MESSAGES + ',"x":1e2 }',
      '{"max_tokens": 4096, "model":"@cf/real/model",' + MESSAGES + ',"x":1e2 }'),
     ('{' + MESSAGES + '}', '{"model": "@cf/real/model", "max_tokens": 4096, ' + MESSAGES + '}'),
     ('{"model":"@cf\\/real/model","max_tokens":3,' + MESSAGES + ',"max_completion_tokens":9}',
      '{"model":"@cf\\/real/model","max_tokens":3,' + MESSAGES + ',"max_completion_tokens":9}'),
     ('{"model":"a",' + MESSAGES + ',"max_completion_tokens":9}',
      '{"max_tokens": 9, "model":"@cf/real/model",' + MESSAGES + ',"max_completion_tokens":9}'),
     ('{"max_tokens": null,"model":"@cf/real/model",' + MESSAGES + '}',
      '{"max_tokens": 4096,"model":"@cf/real/model",' + MESSAGES + '}')],
    ids=["the model only", "max_tokens too", "no model", "nothing at all", "the newer name",
         "null is absent"])
def test_a_chat_body_goes_up_as_it_came_but_for_the_model_and_a_missing_max_tokens(sent, goes_up):
    made = request(sent)
    assert made.body.decode("utf-8", "surrogatepass") == goes_up
    assert (made.kind, made.model) == ("chat", "shown")


@pytest.mark.parametrize(
    "prompt", ['"say \\"hi\\" é"', '["say \\"hi\\" é"]'], ids=["a string", "an array of one"])
def test_a_prompt_goes_up_as_one_user_message(prompt):
    made = request(
        '{"model":"a" , "prompt" : %s, "max_tokens":7,"stream":true}' % prompt, "/v1/completions")
    assert json.loads(made.body) == {
        "model": "@cf/real/model", "max_tokens": 7, "stream": True,
        "messages": [{"role": "user", "content": 'say "hi" é'}]}
    assert (made.kind, made.stream) == ("text", True)


def test_embeddings_get_no_max_tokens():
    made = request('{"model":"a","input":["x","y"],"encoding_format":"base64"}', "/v1/embeddings")
    assert made.body == b'{"model":"@cf/real/model","input":["x","y"],"encoding_format":"base64"}'
    assert (made.kind, made.base64, made.stream) == ("embeddings", True, False)


def goes_up(body, path="/v1/chat/completions", **others):
    """What a request goes up as, without its model."""
    made = json.loads(request(dict({"max_tokens": 9}, **body), path, **others).body)
    del made["model"]
    return made


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
REMOTE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
TEXTS = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
SCOUT = "@cf/meta/llama-4-scout-17b-16e-instruct"
GEMMA = "@cf/google/gemma-4-26b-a4b-it"
ASKED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# name: a message as the client sends it, and as it goes up
MESSAGES_MADE_FIT = {
    "a string": ({"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello"}),
    "parts of text (9router#4180) [T]": (
        {"role": "user", "content": TEXTS}, {"role": "user", "content": "Hello\nthere"}),
    "a picture stays [O]": (
        {"role": "user", "content": [TEXTS[0], PICTURE]},
        {"role": "user", "content": [TEXTS[0], PICTURE]}),
    "null beside calls (gateway-core) [O]": (
        {"role": "assistant", "content": None, "tool_calls": [ASKED]},
        {"role": "assistant", "content": "", "tool_calls": [ASKED]}),
    "nothing beside calls [O]": (
        {"role": "assistant", "tool_calls": [ASKED]},
        {"role": "assistant", "content": "", "tool_calls": [ASKED]}),
    "the result of a tool in parts [T]": (
        {"role": "tool", "tool_call_id": "a", "content": TEXTS[:1]},
        {"role": "tool", "tool_call_id": "a", "content": "Hello"}),
    "no message at all [A]": ("Hello", "Hello"),
    "no parts [A]": (
        {"role": "assistant", "content": [], "tool_calls": [ASKED]},
        {"role": "assistant", "content": "", "tool_calls": [ASKED]}),
    "parts that are none [A]": (
        {"role": "user", "content": ["a"]}, {"role": "user", "content": ["a"]})}


@pytest.mark.parametrize(
    "sent,sent_up", list(MESSAGES_MADE_FIT.values()), ids=list(MESSAGES_MADE_FIT))
def test_messages_are_made_fit_for_the_strictest_schema(sent, sent_up):
    assert goes_up({"messages": [sent]})["messages"] == [sent_up]


@pytest.mark.parametrize("model,is_refused", [(SCOUT, True), (GEMMA, False)])
def test_an_image_by_url_is_refused_where_the_model_takes_only_data(model, is_refused):
    messages = [{"role": "user", "content": [TEXTS[0], REMOTE]}]
    if not is_refused:
        assert goes_up({"messages": messages}, model=model)["messages"] == messages
        return
    bad = raised(request, {"messages": messages}, model=model)
    assert (bad.status, bad.code, bad.param) == (400, "invalid_parameter", "messages")
    assert "data:image" in bad.message


@pytest.mark.parametrize("name,value,goes", [
    ("top_k", 0, False), ("top_k", -1, False), ("top_k", 64, True), ("seed", -7, True),
    ("seed", None, True), ("n", 2, True), ("logprobs", True, True), ("user", "u", True),
    ("store", False, True), ("metadata", {"a": "b"}, True), ("service_tier", "auto", True),
    ("parallel_tool_calls", False, True), ("reasoning_effort", None, True)])
def test_members_of_a_request_pass_unless_they_mean_nothing(name, value, goes):
    made = goes_up({"messages": [], name: value})
    assert made == dict({"messages": [], "max_tokens": 9}, **{name: value} if goes else {})


@pytest.mark.parametrize("model,window,limit", [
    (GEMMA, None, 4096), (GEMMA, 256000, 4096), (SCOUT, 8000, 2000),
    ("@cf/google/gemma-7b-it-lora", 3500, 875), ("@cf/google/gemma-7b-it-lora", None, None),
    ("@cf/microsoft/phi-2", None, None), ("@cf/meta/llama-3.2-1b-instruct", None, 4096)], ids=str)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_limit_is_added_that_fits_the_models_window(path, model, window, limit):
    body = {"messages": []} if "chat" in path else {"prompt": "x", "input": "x"}
    if path == "/v1/responses":
        del body["prompt"]
    made = json.loads(request(body, path, model=model, window=window).body)
    assert made.get("max_tokens") == limit


SCHEMA = {"type": "object", "properties": {"capital": {"type": "string"}}}
ENVELOPE = {"name": "country", "strict": True, "schema": SCHEMA}


@pytest.mark.parametrize("model,goes", [
    (SCOUT, SCHEMA), ("@cf/deepseek-ai/deepseek-r1-distill-qwen-32b", SCHEMA), (GEMMA, ENVELOPE),
    ("@cf/openai/gpt-oss-20b", ENVELOPE)],
    ids=["llama [O]", "deepseek [O]", "gemma [O]", "gpt [O]"])
def test_a_json_schema_goes_up_as_the_models_schema_has_it(model, goes):
    sent = {"messages": [], "response_format": {"type": "json_schema", "json_schema": ENVELOPE}}
    assert goes_up(sent, model=model)["response_format"] == {
        "type": "json_schema", "json_schema": goes}


# -- requests of the Responses API

TOOL = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}
CHAT_TOOL = {"type": "function", "function": {
    "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}}
HI = {"role": "user", "content": "hi"}

# name: a Responses request, and the chat request that it becomes; both without a model
RESPONSES = {
    "a string": ({"input": "hi"}, {"messages": [HI]}),
    "instructions and a developer": (
        {"instructions": "Be brief.", "input": [
            {"role": "developer", "content": "Be kind."}, {"type": "message", **HI}]},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "system", "content": "Be kind."}, HI]}),
    "parts": (
        {"input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                         {"type": "input_text", "text": "b"}]},
            {"type": "message", "role": "assistant", "id": "m", "status": "completed",
             "content": [{"type": "output_text", "text": "c", "annotations": []}]}]},
        {"messages": [{"role": "user", "content": "a\nb"},
                      {"role": "assistant", "content": "c"}]}),
    "an image": (
        {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AA"}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]}),
    "two turns with tools": (
        {"tools": [TOOL, {"type": "web_search"}], "tool_choice": "auto", "input": [
            HI, {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"},
            {"type": "function_call", "id": "fc", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "7"},
            {"type": "function_call_output", "call_id": "b",
             "output": [{"type": "input_text", "text": "8"}]}]},
        {"tools": [CHAT_TOOL], "tool_choice": "auto", "messages": [
            HI, {"role": "assistant", "content": "",
                 "tool_calls": [dict(ASKED), dict(ASKED, id="b")]},
            {"role": "tool", "tool_call_id": "a", "content": "7"},
            {"role": "tool", "tool_call_id": "b", "content": "8"}]}),
    "a text behind a call": (
        {"input": [
            HI, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {"type": "function_call_output", "call_id": "a", "output": "7"}]},
        {"messages": [HI, {"role": "assistant", "content": "c", "tool_calls": [dict(ASKED)]},
                      {"role": "tool", "tool_call_id": "a", "content": "7"}]}),
    "a choice of allowed tools": (
        {"input": "hi", "tools": [TOOL], "tool_choice": {
            "type": "allowed_tools", "mode": "required",
            "tools": [{"type": "function", "name": "f"}]}},
        {"messages": [HI], "tools": [CHAT_TOOL], "tool_choice": "required"}),
    "a choice of a tool of OpenAI's own": (
        {"input": "hi", "tools": [TOOL, {"type": "web_search"}],
         "tool_choice": {"type": "web_search"}},
        {"messages": [HI], "tools": [CHAT_TOOL], "tool_choice": "auto"}),
    "a forced function": (
        {"input": "hi", "tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
        {"messages": [HI], "tools": [CHAT_TOOL],
         "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    "no tools but OpenAI's own": (
        {"input": "hi", "tools": [{"type": "web_search"}], "tool_choice": "auto"},
        {"messages": [HI]}),
    "a schema": (
        {"input": "hi", "text": {"format": dict(ENVELOPE, type="json_schema")}},
        {"messages": [HI], "response_format": {"type": "json_schema", "json_schema": ENVELOPE}}),
    "JSON mode": (
        {"input": "hi", "text": {"format": {"type": "json_object"}}},
        {"messages": [HI], "response_format": {"type": "json_object"}}),
    "settings": (
        {"input": "hi", "max_output_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": 0,
         "reasoning": {"effort": "low", "summary": "auto"}, "text": {"format": {"type": "text"}},
         "store": False, "include": ["reasoning.encrypted_content"], "truncation": "auto",
         "prompt_cache_key": "x", "parallel_tool_calls": True, "metadata": None, "stream": True},
        {"messages": [HI], "max_tokens": 7, "temperature": 0, "top_p": 0.5, "stream": True,
         "reasoning_effort": "low", "parallel_tool_calls": True, "metadata": None,
         "stream_options": {"include_usage": True}})}


@pytest.mark.parametrize("sent,sent_up", list(RESPONSES.values()), ids=list(RESPONSES))
def test_a_responses_request_becomes_a_chat_request(sent, sent_up):
    made = request(sent, "/v1/responses")
    assert json.loads(made.body) == dict({"max_tokens": 4096, "model": "@cf/real/model"}, **sent_up)
    assert made.kind == "responses"


def test_a_responses_body_on_the_chat_path_is_understood():
    made = request({"input": "hi", "max_output_tokens": 9})
    assert json.loads(made.body) == {"model": "@cf/real/model", "messages": [HI], "max_tokens": 9}
    assert made.kind == "chat"


@pytest.mark.parametrize("sent,param", [
    ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "hi", "conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"), ({}, "input"), ({"input": 7}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input")],
    ids=str)
def test_what_is_stored_or_not_to_be_had_is_a_clear_400(sent, param):
    bad = raised(request, sent, "/v1/responses")
    assert (bad.status, bad.code, bad.param) == (400, "invalid_parameter", param)


def test_usage_in_the_stream_is_seen_only_where_it_is_requested():
    assert request({"messages": [1], "stream": True,
                    "stream_options": {"include_usage": True}}).include_usage
    assert not request({"messages": [1], "stream": True, "stream_options": None}).include_usage


def test_a_member_can_be_added_to_an_empty_object():
    assert edit_members(b" {}", {"a": 1}) == b' {"a": 1}'


@pytest.mark.parametrize("name,value", [
    ("temperature", 5.1), ("top_k", 64), ("seed", 0), ("max_tokens", 0), ("max_tokens", "9"),
    ("messages", []), ("stream_options", [1]), ("stream", False), ("stream", None),
    ("made_up", {"x": 1})], ids=str)
def test_what_a_model_takes_is_left_to_cloudflare(name, value):
    made = request({"max_tokens": 9, "messages": [HI], name: value})
    assert json.loads(made.body) == {
        "model": "@cf/real/model", "max_tokens": 9, "messages": [HI], name: value}


@pytest.mark.parametrize("value", [1, "true", []], ids=str)
def test_a_stream_that_is_neither_true_nor_false_is_a_400(value):
    bad = raised(request, {"messages": [{}], "stream": value})
    assert (bad.status, bad.code, bad.param) == (400, "invalid_parameter", "stream")


@pytest.mark.parametrize(
    "members,param",
    [
        ({}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"), ({"prompt": [[1]]}, "prompt"),
        ({"prompt": "a", "messages": [{}]}, "prompt")], ids=str)
def test_a_completion_takes_one_prompt(members, param):
    bad = raised(request, members, "/v1/completions")
    assert (bad.status, bad.code, bad.param) == (400, "invalid_parameter", param)


@pytest.mark.parametrize(
    "members,characters",
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "12345"}, {"role": "assistant", "content": None}]},
            5),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "123"},
                            {"type": "image_url", "image_url": {"url": "data:" + "x" * 999}}]}]},
            3),
        (
            {"messages": [{"content": [
                {"type": "file", "file": {"file_data": "data:application/json;base64,eA=="}},
                {"type": "file", "file": {"file_data": "data:application/ld+json;base64,e"}},
                {"type": "file", "file": {"file_data": "data:application/pdf;base64,eA=="}},
                {"type": "file", "file": {"file_data": "data:application/postscript;base64,e"}},
                {"type": "file", "file": {"file_data": "data:application/vnd.openxmlformats-"
                                                       "officedocument;base64,eA=="}}]}]},
            66),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "long-id", "type": "function",
                                "function": {"name": "f", "arguments": "{}"}}]},
                    {"role": "tool", "tool_call_id": "long-id", "content": "12"}]}, 5),
        ({"prompt": "äöü", "model": "long-name", "user": "someone"}, 3),
        ({"input": ["12", "345"]}, 5),
        (
            {
                "instructions": "12",
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "3"},
                            {"type": "input_image", "image_url": "x" * 99}]},
                    {"type": "function_call_output", "call_id": "c", "output": "45"}]}, 5),
        ({"prompt": [1, 22, 333]}, 12),
        ({"input": [[1, 2], [3]], "n": 7}, 12),
        ({"tools": [{"input_schema": {"type": "x", "properties": {"12345": {"id": {}}}}}]}, 5),
        ({"messages": [{"content": [{"type": "document", "source": {
            "type": "text", "media_type": "text/plain", "data": "123"}}]}]}, 3),
        ({"messages": [{"content": [{"source": {
            "type": "base64", "media_type": "image/png", "data": "QUJD" * 99}}]}]}, 0),
        ({"messages": [{"content": [{"source": {
            "type": "base64", "media_type": "text/plain", "data": "QUJD"}}]}]}, 4),
        ({"input": [{"type": "input_file", "file_data": "data:text/plain;base64,QQ=="}]}, 27),
        ({"messages": [{"content": [{"type": "tool_use", "input": {"url": "1", "data": "23"}}]}]},
         10),
        ({"messages": [{"role": "x" * 257}]}, 257),
        ({"contents": [{"role": "user", "parts": [
            {"text": "123"}, {"inlineData": {"mimeType": "image/png", "data": "QUJD"}}]}],
          "systemInstruction": {"parts": [{"text": "45"}]}}, 5),
        ({"documents": ["12"], "template": "3", "model": "m", "metadata": {"a": "b"}}, 3)],
    ids=["strings", "parts", "JSON as a URL", "tools", "prompt", "inputs", "responses", "tokens",
         "lists of tokens", "properties", "a text document", "an image", "an encoded document",
         "a file", "arguments of a tool", "a long role", "Gemini", "other members"])
def test_all_text_counts_together_and_images_do_not(members, characters):
    assert aiproxy.count_characters(members) == characters
    if characters < 2:
        return
    check_prompt_length(members, characters)
    bad = raised(check_prompt_length, members, characters - 1)
    assert (bad.status, bad.code) == (400, "invalid_parameter")
    assert "AIPROXY_MAX_CHARS" in bad.message
    assert str(characters) in bad.message


@pytest.mark.parametrize(
    "name", list(WORKERS_ALIASES.values()) + ["@hf/nous/a.b_c-1", "llama", "a:b"])
def test_names_of_models_are_safe(name):
    assert request({"messages": [{}]}, model=name)


@pytest.mark.parametrize(
    "name",
    [
        "", "..", "@cf/../x", "@cf//x", "/x", "x/", "a?b", "a#b", "a%2fb", "a b", "a\\b", "a\n",
        "@cf/./x", "x" * 201, "@cf/x/..", "é"])
def test_a_model_name_never_leaves_its_place_in_a_url(name):
    bad = raised(request, {"messages": [{}]}, model=name)
    assert (bad.status, bad.code, bad.param) == (400, "invalid_model", "model")


# -- whole responses

TEXT = {"content": "I am Llama 4 Scout, a large language model developed by Meta."}

# name: what Cloudflare sends, the choice, the usage
WHOLE = {
    "legacy text [T]": (LLAMA_4, choice(TEXT), USAGE),
    "legacy text, bare [A]": (LLAMA_4["result"], choice(TEXT), USAGE),
    "no usage [O]": (envelope({"response": "hi"}), choice({"content": "hi"}), None),
    "zero usage [A]": (
        envelope(
            {
                "response": "hi",
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}),
        choice({"content": "hi"}), None),
    "flat tool call, null response [T]": (
        LLAMA_33_TOOL,
        choice(
            {"tool_calls": [called("call_100", "get_weather", '{"location": "Paris"}')]},
            "tool_calls"), {"prompt_tokens": 151, "completion_tokens": 23, "total_tokens": 174}),
    "tool call, no response [T]": (
        LLAMA_4_TOOL, choice(
            {"tool_calls": [called("call_100", "get_weather", '{"location": "Tokyo"}')]},
            "tool_calls"),
        {"prompt_tokens": 160, "completion_tokens": 17, "total_tokens": 177}),
    "an object in response [O]": (
        envelope({"response": {"name": "é", "n": [1]}}),
        choice({"content": '{"name": "é", "n": [1]}'}), None),
    "a number in response [O]": (envelope({"response": 7}), choice({"content": "7"}), None),
    "null in response [O]": (envelope({"response": None}), choice({"content": ""}), None),
    "choices, wrapped [O]": (
        envelope(QWEN_3), choice({"content": "4", "reasoning_content": "2+2…"}), QWEN_3["usage"]),
    "choices, bare [O]": (
        QWEN_3, choice({"content": "4", "reasoning_content": "2+2…"}), QWEN_3["usage"]),
    "reasoning, not reasoning_content [T]": (
        {
            "choices": [
                {"message": {"content": "4", "reasoning": "r"}, "finish_reason": "model_length"}]},
        choice({"content": "4", "reasoning_content": "r"}, "length"), None),
    "text_completion from the chat route [O]": (
        {
            "object": "text_completion",
            "choices": [{"index": 0, "text": "x", "finish_reason": "length"}]},
        choice({"content": "x"}, "length"), None),
    "both at once [A]": (
        {"response": "Hello", "choices": [{"index": 0, "message": {"content": "Hello"}}]},
        choice({"content": "Hello"}), None),
    "stop after a tool call [A]": (
        {
            "choices": [
                {
                    "message": {
                        "content": "",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]},
                    "finish_reason": "stop"}]},
        choice({"tool_calls": [called("call_100", "f", "{}")]}, "tool_calls"), None),
    "cached tokens [O]": (
        envelope(
            {"response": "x", "usage": dict(USAGE, prompt_tokens_details={"cached_tokens": 3})}),
        choice({"content": "x"}), dict(USAGE, prompt_tokens_details={"cached_tokens": 3}))}


@pytest.mark.parametrize("response,expected,usage", list(WHOLE.values()), ids=list(WHOLE))
def test_every_response_becomes_a_chat_completion(response, expected, usage):
    made = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": CREATED, "model": "shown",
        "choices": [expected]}
    if usage:
        made["usage"] = usage
    assert translate_response(call(), body(response)) == made


@pytest.mark.parametrize("response,expected,usage", list(WHOLE.values()), ids=list(WHOLE))
def test_every_response_becomes_a_text_completion(response, expected, usage):
    made = translate_response(call("text"), body(response))
    finish = expected["finish_reason"]
    assert (made["id"], made["object"], made.get("usage")) == ("cmpl-1", "text_completion", usage)
    assert made["choices"] == [
        {
            "index": 0, "text": expected["message"]["content"] or "", "logprobs": None,
            "finish_reason": finish}]


@pytest.mark.parametrize("response,expected,usage", list(WHOLE.values()), ids=list(WHOLE))
def test_every_response_becomes_a_stream_where_one_was_requested(response, expected, usage):
    events = read_events(StreamTranslator(call(include_usage=True)).whole(body(response)))
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    message, finish = joined(events)
    wanted = {
        name: value
        for name, value in expected["message"].items()
        if value and name != "role"
    }
    assert (message, finish) == (wanted, expected["finish_reason"])
    assert [event["usage"] for event in events[:-1] if event["usage"]] == ([usage] if usage else [])


def test_several_choices_stay_apart():
    made = translate_response(
        call(),
        body(
            {
                "choices": [
                    {"index": n, "message": {"content": str(n)}, "finish_reason": "stop"}
                    for n in range(2)]}))
    assert made["choices"] == [choice({"content": "0"}), choice({"content": "1"}, index=1)]


UNREADABLE = [
    b"", b"<html>502</html>", b'{"result":{"resp', b"null", b"[]", b'"text"',
    b'{"result":null,"success":true}', b"{}", b'{"request_id":"x"}', b'{"response":NaN}',
    b'{"choices":[]}', b"\xff", b"[" * 100000,
    b'{"success":false,"errors":[],"result":{"response":"x"}}',
    b'{"choices":[{"message":{"content":"x"},"finish_reason":"error"}]}']


@pytest.mark.parametrize(
    "kind,response",
    # two of them are not responses of that kind
    [(kind, response)
     for kind in ("chat", "text", "embeddings", "responses")
     for response in UNREADABLE
     if not (kind == "responses" and b"choices" in response
             or kind == "embeddings" and b"NaN" in response)],
    ids=lambda data: data if isinstance(data, str) else repr(data[:20]))
def test_what_cannot_be_read_is_a_502(kind, response):
    # The handler makes an ErrorResponse of the others.
    with pytest.raises((ErrorResponse,) + aiproxy.WRONG_SHAPE) as caught:
        translate_response(call(kind), response)
    if isinstance(caught.value, ErrorResponse):
        assert (caught.value.status, caught.value.code) == (502, "upstream_bad_response")


@pytest.mark.parametrize(
    "response,as_base64,rows,usage",
    [
        (OPENAI_ROWS, False, ROWS, {"prompt_tokens": 4, "total_tokens": 4}),
        (OPENAI_ROWS, True, PACKED, {"prompt_tokens": 4, "total_tokens": 4}),
        (
            dict(OPENAI_ROWS, data=[{"embedding": row} for row in PACKED]), True, PACKED,
            {"prompt_tokens": 4, "total_tokens": 4}), (LEGACY_ROWS, False, ROWS, None),
        (LEGACY_ROWS, True, PACKED, None)],
    ids=[
        "floats [A]", "floats to base64 [T]", "base64 already [A]", "legacy [O]",
        "legacy to base64 [O]"])
def test_embeddings_are_in_openais_form_in_base64_where_requested(response, as_base64, rows, usage):
    made = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": n, "embedding": row}
            for n, row in enumerate(rows)], "model": "shown"}
    if usage:
        made["usage"] = usage
    assert translate_response(call("embeddings", base64=as_base64), body(response)) == made


THOUGHT = {"content": "4", "reasoning_content": "2+2"}
R1 = "<think>2+2</think>4"

# name: what a model says that thinks in its text, with its end, and what becomes of it
THOUGHTS = {
    "both tags [T]": (R1, "stop", THOUGHT),
    "no opening tag (workers-ai-provider#16) [T]": ("2+2</think>4", "stop", THOUGHT),
    "white space stays [A]": (
        "2+2\n</think>\n\n4", "stop", {"content": "\n\n4", "reasoning_content": "2+2\n"}),
    "broken off [A]": ("<think>2+2 is </th", "length", {"reasoning_content": "2+2 is </th"}),
    "broken off without a tag [A]": ("2+2 is", "length", {"reasoning_content": "2+2 is"}),
    "other tags [A]": (
        "a < b </b> <thin</think><think>", "stop",
        {"content": "<think>", "reasoning_content": "a < b </b> <thin"})}


@pytest.mark.parametrize("text,finish,wanted", list(THOUGHTS.values()), ids=list(THOUGHTS))
@pytest.mark.parametrize("size", [0, 1, 3, 100], ids=["whole", "split 1", "split 3", "at once"])
def test_thinking_in_the_text_becomes_reasoning(text, finish, wanted, size):
    if not size:
        whole = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        made = translate_response(call(thinks=True), body(whole))["choices"][0]["message"]
        assert {name: value for name, value in made.items() if value and name != "role"} == wanted
        return
    deltas = [delta(content=text[at:at + size]) for at in range(0, len(text), size)]
    deltas.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    assert joined(stream(deltas + ["[DONE]"], StreamTranslator(call(thinks=True)))) == (
        wanted, finish)


@pytest.mark.parametrize("others,message", [
    ({"thinks": True}, {"content": "4", "reasoning_content": "2+2"}),
    ({"thinks": False}, {"content": R1})], ids=["split by Cloudflare", "another model"])
def test_thinking_is_split_once_and_for_models_known_for_it(others, message):
    whole = {"choices": [{"message": message, "finish_reason": "stop"}]}
    made = translate_response(call(**others), body(whole))["choices"][0]["message"]
    assert made == dict({"role": "assistant", "refusal": None}, **message)


def test_an_answer_without_any_thought_is_not_lost():
    whole = {"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}
    made = translate_response(call(thinks=True), body(whole))["choices"][0]
    assert made == choice({"content": "4"})
    made = stream([delta(content="4"), delta(content="2"), "[DONE]"],
                  StreamTranslator(call(thinks=True)))
    assert joined(made)[0]["content"] == "42"       # as thoughts it has gone down before


def test_the_models_that_think_in_their_text_are_known():
    for name, thinks in (("deepseek-r1", True), ("gpt-oss-20b", False), ("gemma-4", False)):
        assert request({"messages": []}, model=WORKERS_ALIASES[name]).thinks == thinks


@pytest.mark.parametrize("arguments,wanted", [
    ('{"a": 1}', '{"a": 1}'), ('"{\\"a\\": 1}"', '{"a": 1}'), ({"a": 1}, '{"a": 1}'),
    ('"text"', '"text"'), ('"{', '"{'), ("", "{}"), (None, "{}"), ("[" * 9999, "[" * 9999),
    (json.dumps("[" * 9999), json.dumps("[" * 9999)), ('"\\ud800{}"', '"\\ud800{}"')],
    ids=lambda value: str(value)[:20])
def test_arguments_that_are_encoded_twice_are_decoded_once(arguments, wanted):
    tool_call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
    whole = {"choices": [{"message": {"tool_calls": [tool_call]}}]}
    made = translate_response(call(), body(whole))["choices"][0]["message"]["tool_calls"]
    assert made == [called("call_100", "f", wanted)]


# -- a forced call that comes as text

WEATHER_TOOL = {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}}}
PARIS = {"city": "Paris"}
PARIS_CALL = {"tool_calls": [called("call_100", "get_weather", '{"city": "Paris"}')]}


def tool(*properties, name="get_weather"):
    """A function that takes these."""
    return {"name": name, "parameters": {"properties": dict.fromkeys(properties, {})}}


# name: what the model says, and the arguments of the call that it is
LEAKED = {
    "arguments beside the name (cloudflare/ai#574) [O]": (
        '{"name":"get_weather","city":"Paris"}', PARIS),
    "arguments [T]": ('{"name": "get_weather", "arguments": {"city": "Paris"}}', PARIS),
    "parameters [T]": ('{"parameters": {"city": "Paris"}, "name": "get_weather"}', PARIS),
    "unknown arguments [A]": ('{"name": "get_weather", "arguments": {"x": [1]}}', {"x": [1]}),
    "no arguments [A]": ('{"name": "get_weather"}', {}),
    "empty arguments [A]": ('{"name": "get_weather", "arguments": {}}', {}),
    "blanks around it [A]": ('\n {\n"name": "get_weather",\n"city": "Paris"}\n\n', PARIS),
    "not ASCII [A]": ('{"name": "get_weather", "city": "\u00c4 \U0001f600"}',
                      {"city": "\u00c4 \U0001f600"})}

# name: what the model says that stays text, and the function if it is another
NO_CALLS = {
    "prose": ("It is sunny.", None), "blanks": (" \n", None), "a list": ("[1]", None),
    "another name": ('{"name": "get_time", "arguments": {"city": "Paris"}}', None),
    "the arguments alone": ('{"city": "Paris"}', None), "an empty object": ("{}", None),
    "text behind it": ('{"name": "get_weather", "city": "Paris"} Right?', None),
    "text before it": ('Sure: {"name": "get_weather", "city": "Paris"}', None),
    "two": ('{"name": "get_weather"}{"name": "get_weather"}', None),
    "in a fence": ('```json\n{"name": "get_weather"}\n```', None),
    "cut": ('{"name": "get_weather", "city": "Par', None),
    "a name twice": ('{"name": "get_weather", "city": "Paris", "city": "Rome"}', None),
    "a hundred blanks": (" " * 100 + '{"name": "get_weather"}', None),
    "no JSON": ('{"name": "get_weather", "city": NaN}', None),
    "half of an emoji": ('{"name": "get_weather", "city": "\ud83d"}', None),
    "arguments as text": ('{"name": "get_weather", "arguments": "Paris"}', None),
    "arguments that are none": ('{"name": "get_weather", "arguments": null}', None),
    "both": ('{"name": "get_weather", "arguments": {}, "parameters": {}}', None),
    "an argument that is unknown": ('{"name": "get_weather", "town": "Paris"}', None),
    "more beside them": ('{"name": "get_weather", "arguments": {}, "city": "Paris"}', None),
    "an argument of that name": ('{"name": "get_weather", "city": "Paris"}', tool("name", "city")),
    "arguments that are an argument": (
        '{"name": "get_weather", "arguments": {}}', tool("arguments")),
    "deep": ('{"name": "get_weather", "city": ' + "[" * 9999, None)}


def said(text, size, forced, kind="chat", finish="stop"):
    """The message and the finish_reason of a response that says this: whole, or in pieces."""
    translator = StreamTranslator(call(kind, forced=forced))
    if not size:
        whole = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        made = translate_response(call(kind, forced=forced), body(whole))["choices"][0]
        assert (made["message"]["content"] is None) == ("tool_calls" in made["message"])
        message = {name: value for name, value in made["message"].items()
                   if value and name != "role"}
        return message, made["finish_reason"]
    deltas = [delta(content=text[at:at + size]) for at in range(0, len(text), size)]
    deltas.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return joined(stream(deltas + ["[DONE]"], translator))


@pytest.mark.parametrize("size", [0, 1, 7, 1000], ids=["whole", "split 1", "split 7", "at once"])
@pytest.mark.parametrize("text,arguments", list(LEAKED.values()), ids=list(LEAKED))
def test_a_forced_call_that_comes_as_text_becomes_a_call(text, arguments, size):
    message, finish = said(text, size, WEATHER_TOOL)
    one, = message.pop("tool_calls")
    assert (message, finish) == ({}, "tool_calls")
    assert json.loads(one["function"].pop("arguments")) == arguments
    assert one == {"id": "call_100", "type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("size", [0, 1, 7, 100000],
                         ids=["whole", "split 1", "split 7", "at once"])
@pytest.mark.parametrize("text,forced", list(NO_CALLS.values()), ids=list(NO_CALLS))
def test_what_is_not_surely_a_forced_call_stays_text(text, forced, size):
    assert said(text, size, forced or WEATHER_TOOL) == ({"content": text}, "stop")


@pytest.mark.parametrize("size", [0, 7], ids=["whole", "split"])
def test_a_call_as_text_stays_text_where_none_was_forced(size):
    text = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert said(text, size, None) == ({"content": text}, "stop")


def test_a_call_beside_text_is_the_call():
    text = '{"name": "get_weather", "city": "Rome"}'
    tool_call = {"id": "a", "index": 0, "function": {"name": "get_weather",
                                                     "arguments": '{"city": "Paris"}'}}
    whole = {"choices": [{"message": {"content": text, "tool_calls": [tool_call]}}]}
    made = translate_response(call(forced=WEATHER_TOOL), body(whole))["choices"][0]["message"]
    wanted = dict(PARIS_CALL, content=text)
    assert made == dict({"role": "assistant", "refusal": None}, **wanted)
    translator = StreamTranslator(call(forced=WEATHER_TOOL))
    made = stream([delta(content=text), delta(tool_calls=[tool_call]), "[DONE]"], translator)
    assert joined(made) == (wanted, "tool_calls")


def test_a_forced_call_comes_after_its_thoughts():
    text = '2+2</think>\n\n{"name": "get_weather", "city": "Paris"}'
    for size in (1, 1000):
        translator = StreamTranslator(call(forced=WEATHER_TOOL, thinks=True))
        deltas = [delta(content=text[at:at + size]) for at in range(0, len(text), size)]
        assert joined(stream(deltas + ["[DONE]"], translator)) == (
            dict(PARIS_CALL, reasoning_content="2+2"), "tool_calls")


def contents(translator, *texts):
    """What goes down of each text when it has come."""
    return ["".join(event["choices"][0]["delta"].get("content", "")
                    for event in read_events(translator.feed(sse(delta(content=text)))))
            for text in texts]


def test_text_is_held_back_only_while_it_may_be_a_forced_call(monkeypatch):
    monkeypatch.setattr(aiproxy, "MAX_CALL_TEXT", 9)
    translator = functools.partial(StreamTranslator, call(forced=WEATHER_TOOL))
    assert contents(translator(), "It ", "is") == ["It ", "is"]
    assert contents(translator(), " \n", "It ", "is {") == ["", " \nIt ", "is {"]
    assert contents(translator(), "{", "1234", "5678", "9", "{") == [
        "", "", "", "{123456789", "{"]


def test_a_forced_call_as_text_is_a_call_of_the_responses_api():
    text = '{"name": "get_weather", "city": "Paris"}'
    events = sse(delta(content=text[:9]), delta(content=text[9:]), "[DONE]")
    translator = StreamTranslator(call("responses", forced=WEATHER_TOOL))
    made = [json.loads(data) for _, data in read_sse(translator.feed(events))]
    item, = made[-1]["response"]["output"]
    assert (item["type"], item["name"], json.loads(item["arguments"])) == (
        "function_call", "get_weather", PARIS)
    assert made[-1]["response"]["status"] == "completed"


CHAT_TOOLS = [{"type": "function", "function": WEATHER_TOOL},
              {"type": "function", "function": tool(name="get_time")}]
BY_NAME = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("tools,choice,name", [
    (CHAT_TOOLS, BY_NAME, "get_weather"), (CHAT_TOOLS[:1], "required", "get_weather"),
    (CHAT_TOOLS, "required", None), (CHAT_TOOLS[:1], "auto", None), (CHAT_TOOLS[:1], None, None),
    (CHAT_TOOLS[1:], BY_NAME, None), ([], "required", None), ([], BY_NAME, None),
    (CHAT_TOOLS[:1], "none", None), ("x", {"type": "function"}, None), ([7], [7], None)], ids=str)
def test_a_forced_function_is_the_only_one_that_can_be_called(tools, choice, name):
    sent = {"messages": [], "tools": tools, "tool_choice": choice}
    assert (request(sent).forced or {}).get("name") == name
    del sent["messages"]        # a completion has no room for calls
    assert request(dict(sent, prompt="x"), "/v1/completions").forced is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "f"}], ids=str)
def test_a_responses_request_forces_a_function_too(choice):
    made = request({"input": "hi", "tools": [TOOL], "tool_choice": choice}, "/v1/responses")
    assert made.forced["name"] == "f" and made.forced["parameters"] == SCHEMA


# -- events

EVENTS = ["one", "two\nlines", "[DONE]"]


@pytest.mark.parametrize(
    "stream",
    [
        b"data: one\n\nevent: named\ndata: two\ndata: lines\n\ndata: [DONE]\n\n",
        b"data: one\r\n\r\nevent: named\r\ndata: two\r\ndata: lines\r\n\r\ndata: [DONE]\r\n\r\n",
        b": comment\n\ndata:one\n:\n\n\nevent:named\nid: 7\ndata:two\nretry: "
        b"9\ndata:lines\n\nevent: empty\n\ndata:[DONE]\n\n"],
    ids=["LF", "CRLF", "comments, no space"])
def test_events_are_read_wherever_the_bytes_are_cut(stream):
    for size in (1, 2, 3, 7, 1000):
        reader, seen = EventReader(), []
        for at in range(0, len(stream), size):
            seen += reader.feed(stream[at:at + size])
        assert seen == EVENTS, size


def test_an_event_is_complete_with_the_byte_that_ends_it():
    reader = EventReader()
    assert reader.feed(b"data: one\r\n\r\n") == ["one"]
    assert reader.feed(b"data: two\n") == []
    assert reader.feed(b"\n") == ["two"]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_byte_order_mark_before_the_first_event_is_skipped(size):
    stream = b"\xef\xbb\xbfdata: one\r\n\r\ndata: two\n\n"
    reader = EventReader()
    seen = []
    for at in range(0, len(stream), size):
        seen += reader.feed(stream[at:at + size])
    assert seen == ["one", "two"]


@pytest.mark.parametrize("blank", [b"\n", b"\r\n"])
def test_a_run_of_blank_lines_is_one_end(monkeypatch, blank):
    parsed = []
    monkeypatch.setattr(aiproxy, "read_event", lambda block: parsed.append(block) or "x")
    assert len(EventReader().feed(b"data: one\n\n" + blank * 100000 + b"data: two\n\n")) == 2
    assert parsed == [b"data: one", b"data: two"]


def test_more_choices_than_anybody_can_ask_for_are_not_translated():
    """A choice of three bytes becomes events of hundreds: the reader would pay for it."""
    event = b'data: {"choices": [%b{}]}\n\n'
    for count, is_read in ((aiproxy.MAX_CHOICES - 1, True), (aiproxy.MAX_CHOICES, False)):
        translator = aiproxy.StreamTranslator(call())
        translator.feed(event % (b"{}," * count))
        assert (translator.failed is None) == is_read


class CountingPattern:
    """A pattern that counts the bytes in which it searches."""

    def __init__(self, pattern):
        self.pattern = pattern
        self.searched = 0

    def finditer(self, data, position):
        self.searched += len(data) - position
        return self.pattern.finditer(data, position)


def test_an_event_in_many_pieces_is_searched_once_and_taken_apart_once(monkeypatch):
    """3 MB in 1,000 pieces. Work is counted: bytes searched, events parsed, buffers made."""
    blank_line = CountingPattern(aiproxy.BLANK_LINE)
    read_event = aiproxy.read_event
    parsed = []

    def counting_read_event(block):
        parsed.append(len(block))
        return read_event(block)
    monkeypatch.setattr(aiproxy, "BLANK_LINE", blank_line)
    monkeypatch.setattr(aiproxy, "read_event", counting_read_event)

    reader = EventReader()
    buffer = reader.buffer
    assert reader.feed(b"data: ") == []
    for _ in range(1000):
        assert reader.feed(b"x" * 3000) == []
        assert reader.buffer is buffer, "it grows in place, and is not copied for each piece"
    assert not parsed
    assert reader.feed(b"\r\n\r\n") == ["x" * 3000000]

    size = len("data: ") + 3000000
    assert blank_line.searched <= size + 4 + 3 * 1002
    assert parsed == [size]
    assert buffer == b""


def test_an_event_without_an_end_is_bounded():
    reader = EventReader()
    assert reader.feed(b"data: " + b"x" * (aiproxy.MAX_EVENT - 6)) == []
    assert raised(reader.feed, b"x").code == "upstream_bad_response"


# -- streams


def read_events(stream):
    assert stream.endswith(b"\n\n") or not stream
    return [
        data if data == "[DONE]" else json.loads(data)
        for _, data in read_sse(stream)]


def joined(events):
    """What an SDK makes of the deltas of the first choice: a message, and its finish_reason."""
    message, calls, finish = {}, {}, None
    for event in events:
        for one in event["choices"] if isinstance(event, dict) else ():
            for name, value in one["delta"].items():
                if name == "tool_calls":
                    for part in value:
                        merged = calls.setdefault(
                            part["index"],
                            {
                                "id": "", "type": "function",
                                "function": {"name": "", "arguments": ""}})
                        merged["id"] += part.get("id", "")
                        for inner, text in part["function"].items():
                            merged["function"][inner] += text
                elif name != "role":
                    message[name] = (message.get(name) or "") + (value or "")
            assert not (finish and one["finish_reason"]), "two finish_reasons"
            finish = finish or one["finish_reason"]
    message = {name: value for name, value in message.items() if value}
    return (dict(message, tool_calls=list(calls.values())) if calls else message), finish


def stream(events, translator=None):
    translator = translator or StreamTranslator(call())
    data = events if isinstance(events, bytes) else sse(*events)
    return read_events(translator.feed(data) + translator.end())


LONG_USAGE = {
    "prompt_tokens": 1386, "completion_tokens": 1306, "total_tokens": 2692,
    "prompt_tokens_details": {"cached_tokens": 0}}
HELLO = {"content": "Hello!"}

WEATHER = {"tool_calls": [called("call_100", "get_weather", '{"city": "Paris"}')]}


# name: events, the message they make, finish_reason, usage
STREAMS = {
    "two finish chunks, no role [R]": (
        LLAMA_31, HELLO, "stop",
        {"prompt_tokens": 45, "completion_tokens": 2, "total_tokens": 47}),
    "legacy, no finish_reason [T]": (LEGACY, HELLO, "stop", LONG_USAGE),
    "native usage tail [T]": (KIMI, HELLO, "stop", LONG_USAGE),
    "the same text twice [O]": (DUAL, HELLO, "stop", None),
    "gpt-oss, forced tool [R]": (
        TOOLS, dict(WEATHER, reasoning_content="Need it."), "tool_calls",
        {
            "prompt_tokens": 136, "completion_tokens": 37, "total_tokens": 173,
            "prompt_tokens_details": {"cached_tokens": 0}}),
    "a number [O]": (
        sse({"response": 7}, {"response": "!"}, "[DONE]"), {"content": "7!"}, "stop", None),
    "null sentinel, no finish_reason [O]": (
        sse(
            delta(
                tool_calls=[
                    {"id": "a", "type": "function", "index": 0, "function": {"name": "f"}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
            delta(tool_calls=[{"id": None, "type": None, "function": {"name": None}}]), "[DONE]"),
        {"tool_calls": [called("call_100", "f", "{}")]}, "tool_calls", None),
    "dual tool calls [O]": (
        sse(
            {
                "tool_calls": [{"function": {"arguments": "{}"}}],
                "choices": [
                    {
                        "index": 0,
                        "delta": {
                            "tool_calls": [
                                {
                                    "id": "a", "type": "function", "index": 0,
                                    "function": {"name": "f", "arguments": "{}"}}]}}]}, "[DONE]"),
        {"tool_calls": [called("call_100", "f", "{}")]}, "tool_calls", None),
    "native text beside an empty delta [A]": (
        sse({"response": "Hello!", "choices": [{"index": 0, "delta": {}}]}, "[DONE]"), HELLO,
        "stop", None),
    "legacy tool call in an event [A]": (
        sse(
            {
                "response": None,
                "tool_calls": [
                    {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]},
            "[DONE]"),
        {"tool_calls": [called("call_100", "f", '{"a": 1}'), called("call_101", "g", "{}")]},
        "tool_calls", None),
    "two tools, one index [A]": (
        sse(
            delta(
                tool_calls=[{"id": "a", "index": 0, "function": {"name": "f", "arguments": "1"}}]),
            delta(
                tool_calls=[{"id": "b", "index": 0, "function": {"name": "g", "arguments": "2"}}]),
            "[DONE]"), {"tool_calls": [called("call_100", "f", "1"), called("call_101", "g", "2")]},
        "tool_calls", None),
    "id and name in every delta [A]": (
        sse(
            *[
                delta(
                    tool_calls=[
                        {"id": "a", "index": 0, "function": {"name": "f", "arguments": part}}])
                for part in "12"] + ["[DONE]"]), {"tool_calls": [called("call_100", "f", "12")]},
        "tool_calls", None),
    "cumulative usage [O]": (
        sse(
            *[
                dict(
                    delta(content=part),
                    usage={"prompt_tokens": 1, "completion_tokens": n, "total_tokens": n + 1})
                for n, part in enumerate(("Hello", "!"), 1)] + ["[DONE]"]), HELLO, "stop",
        {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
    "model_length at the top [O]": (
        sse({"response": "Hello!"}, {"response": "", "finish_reason": "model_length"}, "[DONE]"),
        HELLO, "length", None),
    "a finish_reason and no [DONE] [A]": (
        sse(
            delta(content="Hello!"),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), HELLO, "stop",
        None), "[DONE] without a blank line [A]": (LEGACY[:-2], HELLO, "stop", LONG_USAGE),
    "half an event after the finish [A]": (
        LLAMA_31[:LLAMA_31.rindex(b'"usage"')], HELLO, "stop",
        {"prompt_tokens": 45, "completion_tokens": 2, "total_tokens": 47}),
    "gemma's reasoning [T]": (
        sse(delta(reasoning="Hm."), delta(content="Hello!"), "[DONE]"),
        dict(HELLO, reasoning_content="Hm."), "stop", None)}


@pytest.mark.parametrize("events,message,finish,usage", list(STREAMS.values()), ids=list(STREAMS))
@pytest.mark.parametrize("size", [1, 1000000], ids=["byte by byte", "at once"])
def test_every_stream_becomes_openai_chunks(events, message, finish, usage, size):
    translator = StreamTranslator(call())
    made = read_events(b"".join(
        translator.feed(events[at:at + size])
        for at in range(0, len(events), size)) + translator.end())
    assert joined(made) == (message, finish)
    assert made.pop() == "[DONE]" and translator.done and not translator.failed
    assert made[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    for event in made:
        assert set(event) == {"id", "object", "created", "model", "choices"}
        assert (event["id"], event["object"], event["model"]) == (
            "chatcmpl-1", "chat.completion.chunk", "shown")
        assert [set(one) for one in event["choices"]] == [
            {"index", "delta", "logprobs", "finish_reason"}]
    assert [one["delta"] for event in made for one in event["choices"] if one["finish_reason"]] == [
        {}]


@pytest.mark.parametrize("events,message,finish,usage", list(STREAMS.values()), ids=list(STREAMS))
def test_usage_comes_last_and_only_where_it_is_requested(events, message, finish, usage):
    made = stream(events, StreamTranslator(call(include_usage=True)))[:-1]
    if usage:
        last = made.pop()
        assert last["choices"] == [] and last["usage"] == usage
    assert all(event["usage"] is None and event["choices"] for event in made)


@pytest.mark.parametrize("events,message,finish,usage", list(STREAMS.values()), ids=list(STREAMS))
def test_every_stream_becomes_text_completion_events(events, message, finish, usage):
    made = stream(events, StreamTranslator(call("text")))
    assert made.pop() == "[DONE]"
    assert {event["object"] for event in made} == {"text_completion"}
    choices = [one for event in made for one in event["choices"]]
    assert "".join(one["text"] for one in choices) == message.get("content", "")
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + [finish]


def test_each_event_is_translated_when_it_arrives():
    translator = StreamTranslator(call())
    seen = [
        [
            one["delta"] or one["finish_reason"]
            for event in read_events(translator.feed(event + b"\n\n"))
            if event != "[DONE]"
            for one in event["choices"]]
        for event in LLAMA_31.strip().split(b"\n\n")]
    assert seen == [
        [{"role": "assistant", "content": "", "refusal": None}, {"content": "Hello"}],
        [{"content": "!"}], ["stop"], [], []]


@pytest.mark.parametrize(
    "event,code,message",
    [
        (NSFW, "invalid_request", "Input prompt contains NSFW content."),
        (
            {
                "error": {
                    "message": "AiError: no (bd40edba-1111-2222-3333-444455556666)",
                    "code": "invalid_prompt"}}, "invalid_prompt", "no"),
        ({"error": "just text"}, "upstream_bad_response", "just text"),
        (
            {"object": "error", "message": "too long", "type": "BadRequest", "code": 400},
            "invalid_request", "too long"),
        (
            {"errors": [{"code": 3036, "message": "used up on " + ACCOUNT}]}, "insufficient_quota",
            "used up on ***. The quota is back at 00:00 UTC."),
        ("<html>", "upstream_bad_response", "Cloudflare's answer could not be read."),
        ("[1]", "upstream_bad_response", "Cloudflare's answer could not be read."),
        (
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]},
            "upstream_bad_response", "The model broke off with an error.")],
    ids=[
        "envelope [T]", "OpenAI's [T]", "text [A]", "vLLM's [T]", "no success [T]", "HTML",
        "no object", "finish_reason error [O]"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_an_error_in_mid_stream_becomes_one_error_event(kind, event, code, message):
    translator = StreamTranslator(call(kind))
    made = stream([delta(content="Hel"), event, delta(content="lo"), "[DONE]"], translator)
    assert set(made[-1]) == {"error"}
    assert set(made[-1]["error"]) == {"message", "type", "param", "code"}
    assert (made[-1]["error"]["code"], made[-1]["error"]["message"]) == (code, message)
    assert (translator.done, translator.failed) == (True, code)
    assert len(made) == (3 if kind == "chat" else 2) and "[DONE]" not in made


@pytest.mark.parametrize(
    "events",
    [
        [delta(content="Hel")], [], [{"response": "Hel"}, {"response": "lo"}], LLAMA_31[:100],
        LLAMA_31[:250]],
    ids=["after a delta", "at once", "legacy", "in the first event", "in the second"])
def test_a_stream_that_ends_early_ends_in_an_error_event_and_never_in_stop(events):
    made = stream(events)
    assert made[-1]["error"]["code"] == "upstream_bad_response"
    assert not any(one["finish_reason"] for event in made[:-1] for one in event["choices"])


def test_the_reason_of_a_cut_is_shown():
    translator = StreamTranslator(call())
    translator.feed(sse(delta(content="Hel")))
    event, = read_events(
        translator.end(ErrorResponse(504, "upstream_timeout", "The upstream timed out.")))
    assert event["error"] == {
        "message": "The upstream timed out.", "type": "server_error", "param": None,
        "code": "upstream_timeout"}
    assert translator.end() == b""


def test_a_stream_of_nothing_but_its_end_is_an_error():
    assert stream(["[DONE]"])[-1]["error"]["code"] == "upstream_bad_response"
    assert stream(LEGACY, StreamTranslator(call()))[-1] == "[DONE]"


def test_several_choices_stream_apart():
    made = stream(
        [
            {
                "choices": [
                    {
                        "index": n, "delta": {"content": str(n)},
                        "finish_reason": "stop" if n else None}]}
            for n in (0, 1, 0)] + ["[DONE]"])
    assert [
        (one["index"], one["finish_reason"])
        for event in made[:-1] for one in event["choices"]] == [
        (0, None), (0, None), (1, None), (1, None), (1, "stop"), (0, None), (0, "stop")]


# -- streams of /v1/responses

def responses_stream(events):
    translator = StreamTranslator(call("responses"))
    return read_sse(translator.feed(events) + translator.end())


def rebuilt(events):
    """What an SDK makes of the events before the last: the output of a Responses object."""
    output = []
    for event in events:
        kind = event["type"].replace("response.", "", 1)
        index = event.get("output_index", 99)
        item = output[index] if index < len(output) else None
        if kind == "output_item.added":
            assert len(output) == event["output_index"]
            output.append(event["item"])
        elif kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind.endswith("_text.done"):
            assert item["content"][0]["text"] == event["text"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
        if item:
            assert event["item_id"] == item["id"]
    return output


@pytest.mark.parametrize("events,message,finish,usage", list(STREAMS.values()), ids=list(STREAMS))
def test_every_stream_becomes_the_events_of_a_response(events, message, finish, usage):
    made = responses_stream(events)
    events = [json.loads(data) for _, data in made]
    assert [name for name, _ in made] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert last["output"] == rebuilt(events)
    assert last["status"] == ("incomplete" if finish == "length" else "completed")
    # What a cut has made of the last item is not whole: an agent must not act on half a call.
    statuses = [item["status"] for item in last["output"]]
    assert set(statuses[:-1]) <= {"completed"} and statuses[-1:] in ([], [last["status"]])
    assert (last["object"], last["model"], last["id"]) == ("response", "shown", "resp_1")
    assert events[-1]["type"] == "response." + last["status"]
    reason = {"reason": "max_output_tokens"} if finish == "length" else None
    assert last["incomplete_details"] == reason
    assert bool(last["usage"]) == bool(usage)
    if usage:
        counts = [last["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")]
        assert counts == [usage[name] for name in (
            "prompt_tokens", "completion_tokens", "total_tokens")]
    texts = {"reasoning": "", "message": ""}
    calls = []
    for item in last["output"]:
        if item["type"] == "function_call":
            calls.append(called(item["call_id"], item["name"], item["arguments"]))
        else:
            texts[item["type"]] += item["content"][0]["text"]
    assert texts == {"reasoning": message.get("reasoning_content", ""),
                     "message": message.get("content", "")}
    assert calls == message.get("tool_calls", [])


def chunk_of(delta, finish=None):
    one = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(one).encode() + b"\n\n"


def call_delta(name, arguments, index=0):
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": name, "type": "function", "function": function}]}


def test_a_text_is_done_when_a_call_begins():
    """LangChain takes what is done behind a call for another text behind it."""
    made = responses_stream(chunk_of({"content": "Let me look."}) + chunk_of(call_delta("f", "{}"))
                            + chunk_of(call_delta("g", "{}", 1)) + chunk_of({}, "tool_calls"))
    events = [json.loads(data) for _, data in made]
    assert [(event["type"][9:], event["output_index"]) for event in events
            if event["type"].startswith("response.output_item")] == [
        ("output_item.added", 0), ("output_item.done", 0), ("output_item.added", 1),
        ("output_item.added", 2), ("output_item.done", 1), ("output_item.done", 2)]
    assert events[-1]["response"]["output"] == rebuilt(events)


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_a_streamed_call_without_arguments_gets_an_empty_object(kind):
    translator = StreamTranslator(call(kind))
    made = read_sse(translator.feed(
        chunk_of(call_delta("f", "")) + chunk_of(call_delta("g", "", 1))
        + chunk_of({"tool_calls": [{"index": 1, "function": {"arguments": '{"a":1}'}}]})
        + chunk_of({}, "tool_calls") + b"data: [DONE]\n\n") + translator.end())
    events = [json.loads(data) for _, data in made if data != "[DONE]"]
    if kind == "responses":
        found = [item["arguments"] for item in events[-1]["response"]["output"]]
    else:
        found = ["", ""]
        for event in events:
            for one in event["choices"][0]["delta"].get("tool_calls", ()):
                found[one["index"]] += one["function"]["arguments"]
    assert found == ["{}", '{"a":1}']


@pytest.mark.parametrize("path,name", [
    ("/v1/chat/completions", "messages"), ("/v1/responses", "input")])
def test_the_role_developer_is_system(path, name):
    body = {"model": "a", name: [{"role": "developer", "content": "x", "refusal": None}]}
    messages = json.loads(request(body, path).body)["messages"]
    assert messages == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize("tool,nested", [
    ({"type": "function", "name": "f", "strict": None, "parameters": {}},
     {"type": "function", "function": {"name": "f", "parameters": {}}}),
    ({"type": "function", "function": {"name": "f"}},
     {"type": "function", "function": {"name": "f"}}),
])
def test_a_tool_of_a_response_is_nested_once_and_without_nulls(tool, nested):
    body = {"model": "a", "input": "x", "tools": [tool]}
    assert json.loads(request(body, "/v1/responses").body)["tools"] == [nested]


def test_an_unknown_item_is_named_though_it_has_no_id():
    body = {"model": "a", "input": [{"type": "custom_tool_call"}]}
    error = raised(request, body, "/v1/responses")
    assert error.status == 400 and "custom_tool_call" in error.message


def test_a_response_delta_goes_down_when_it_arrives():
    translator = StreamTranslator(call("responses"))
    seen = [[json.loads(data)["type"].replace("response.", "")
             for _, data in read_sse(translator.feed(event + b"\n\n"))]
            for event in LLAMA_31.strip().split(b"\n\n")]
    assert seen == [
        ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"],
        ["output_text.delta"], [], [],
        ["output_text.done", "content_part.done", "output_item.done", "completed"]]


@pytest.mark.parametrize(
    "event,code",
    [
        (NSFW, "invalid_request"),
        ({"type": "error", "code": "server_error", "message": "no"}, "server_error"),
        ({"error": {"message": "no", "code": 3021}}, "rate_limit_exceeded"),
        (None, "upstream_bad_response")],
    ids=["envelope", "OpenAI's event", "error object", "cut"])
def test_an_error_in_a_response_stream_is_one_that_the_sdks_raise(event, code):
    render_error = functools.partial(render_error_event, form=find_error_form("/v1/responses"))
    translator = StreamTranslator(call("responses"), render_error)
    made = read_sse(
        translator.feed(sse(delta(content="Hi")) + (sse(event) if event else b"")) +
        translator.end())
    assert made[-1][0] == "error" and translator.failed == code
    last = json.loads(made[-1][1])
    assert last["type"] == "error"
    assert last["error"]["code"] == last["code"] == code
    assert last["message"]


def test_the_details_of_usage_are_there_whatever_cloudflare_counts():
    """Codex reads both of them, or fails."""
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"audio": 0},
             "completion_tokens_details": {"reasoning_tokens": 2}}
    made = translate_response(call("responses"), body({"response": "x", "usage": usage}))
    assert made["usage"]["input_tokens_details"] == {"cached_tokens": 0, "audio": 0}
    assert made["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize("response,expected,usage", list(WHOLE.values()), ids=list(WHOLE))
def test_every_response_becomes_a_responses_object(response, expected, usage):
    made = translate_response(call("responses"), body(response))
    assert (made["object"], made["model"], made["created_at"]) == ("response", "shown", CREATED)
    is_cut = expected["finish_reason"] == "length"
    assert made["status"] == ("incomplete" if is_cut else "completed")
    message = expected["message"]
    kinds = [item["type"] for item in made["output"]]
    wanted = [kind for name, kind in (("reasoning_content", "reasoning"), ("content", "message"))
              if message.get(name)]
    assert kinds == wanted + ["function_call"] * len(message.get("tool_calls", ()))
    assert bool(made["usage"]) == bool(usage)
    events = [json.loads(data) for _, data in read_sse(
        StreamTranslator(call("responses")).whole(body(response)))]
    assert events[-1]["response"] == made and rebuilt(events) == made["output"]


# -- errors


BY_CODE = [
    (5007, 400, 404, "model_not_found"), (3042, 404, 404, "model_not_found"),
    (3036, 429, 429, "insufficient_quota"), (4006, 429, 429, "insufficient_quota"),
    (3006, 413, 413, "request_too_large"), (5021, 400, 400, "context_length_exceeded"),
    (5021, 413, 400, "context_length_exceeded"), (3021, 429, 429, "rate_limit_exceeded"),
    (3040, 400, 429, "rate_limit_exceeded"), (3007, 408, 504, "upstream_timeout"),
    (3008, 408, 504, "upstream_timeout"), (10000, 401, 502, "upstream_credentials_rejected"),
    (10000, 403, 502, "upstream_credentials_rejected"),
    (9106, 400, 502, "upstream_credentials_rejected"),
    (6003, 400, 502, "upstream_credentials_rejected"),
    (7403, 403, 502, "upstream_credentials_rejected"),
    (9109, 403, 502, "upstream_credentials_rejected"), (7000, 400, 502, "upstream_misconfigured"),
    (7001, 405, 502, "upstream_misconfigured"), (7003, 404, 502, "upstream_misconfigured"),
    (8005, 500, 502, "upstream_error"), (8005, 400, 502, "upstream_error"),
    (7009, 503, 502, "upstream_error"), (1234, 418, 418, "invalid_request"),
    (1234, 522, 522, "upstream_error"), (1234, 200, 502, "upstream_bad_response"),
    (1234, 410, 404, "model_not_found"), ("3021", 429, 429, "rate_limit_exceeded")]
BY_CODE += [(code, 400, 400, "invalid_request") for code in (3003, 5004, 5006, 8001, 8007)] + [
    (code, 405, 400, "invalid_request")
    for code in (5005, 5019)]
BY_CODE += [(code, 403, 403, "permission_denied") for code in (3023, 3041, 5016, 5018, 5035)]


@pytest.mark.parametrize("number,status,our_status,code", BY_CODE, ids=str)
def test_an_error_is_classified_by_its_code_and_then_by_its_status(number, status, our_status,
                                                                   code):
    made = translate_error(status, body(error_envelope(number)), (ACCOUNT, TOKEN))
    assert (made.status, made.code) == (our_status, code)
    assert ((b"x-should-retry", b"false")
            in made.headers) == (code in ("insufficient_quota", "upstream_credentials_rejected",
                                          "upstream_misconfigured"))


@pytest.mark.parametrize(
    "status,data,our_status,code,message",
    [
        (
            400,
            b'{"errors":[{"message":"AiError: AiError: Input prompt contains NSFW content. '
            b'(bd40edba-1111-2222-3333-444455556666)","code":8007}],"success":false,"result":{},'
            b'"messages":[]}', 400, "invalid_request", "Input prompt contains NSFW content."),
        (
            400, error_envelope(5006, "AiError: Bad input: Error: '/temperature' must be <= 5"),
            400, "invalid_request", "Bad input: Error: '/temperature' must be <= 5"),
        (
            400,
            error_envelope(
                5004,
                'AiError: AiError: {"object":"error","message":"too long","type":"BadRequest",'
                '"param":null,"code":400} (bd40edba-1111-2222-3333-444455556666)'), 400,
            "invalid_request", "too long"),
        (
            400,
            error_envelope(
                5004, 'AiError: {"error":{"message":"AiError: {\\"message\\":\\"deep\\"}"}}'), 400,
            "invalid_request", "deep"),
        (
            400,
            b'{"error":{"code":"invalid_prompt","message":"AiError: AiError: bad '
            b'(bd40edba-1111-2222-3333-444455556666)"}}', 400, "invalid_prompt", "bad"),
        (
            400,
            error_envelope(
                5021, "AiError: AiError: The estimated number of input and maximum output tokens "
                "(4120) exceeded this model context window limit (3500). "
                "(bd40edba-1111-2222-3333-444455556666)"), 400, "context_length_exceeded",
            "The estimated number of input and maximum output tokens (4120) exceeded this model "
            "context window limit (3500)."),
        (404, {"error": {"message": "x", "param": "model"}}, 404, "not_found", "x"),
        (400, {"error": "just text"}, 400, "invalid_request", "just text"),
        (
            500,
            {
                "success": False,
                "errors": [{"code": 8005, "message": "at %s with %s" % (ACCOUNT.upper(), TOKEN)}]},
            502, "upstream_error", "at *** with ***"),
        (
            429, b"", 429, "rate_limit_exceeded",
            "Cloudflare answered with status 429 and no reason that could be read."),
        (
            502, b"<html>Bad gateway</html>", 502, "upstream_error",
            "Cloudflare answered with status 502 and no reason that could be read."),
        (
            410, b'{"errors":["odd"]}', 404, "model_not_found",
            "Cloudflare answered with status 410 and no reason that could be read. "
            "See GET /v1/models."),
        (
            400, error_envelope(8007, "This model's maximum context length is 8192 tokens"), 400,
            "context_length_exceeded", "This model's maximum context length is 8192 tokens"),
        (
            400, {"object": "error", "code": 400, "message": "exceeds the context window"}, 400,
            "context_length_exceeded", "exceeds the context window"),
        (401, b"{}", 502, "upstream_credentials_rejected", None),
        (403, b"no json", 403, "permission_denied", None),
        (408, b"", 504, "upstream_timeout", None), (302, b"", 502, "upstream_bad_response", None),
        (400, error_envelope(8001, None), 400, "invalid_request", None),
        (500, b"[" * 100000, 500, "upstream_error", None)],
    ids=lambda value: str(value)[:30] if isinstance(value, (bytes, dict)) else str(value))
def test_an_error_in_any_form_is_read(status, data, our_status, code, message):
    made = translate_error(status, body(data), (ACCOUNT, TOKEN))
    assert (made.status, made.code) == (our_status, code)
    assert made.message == message or message is None and made.message
    assert set(error_object(made)) == {"message", "type", "param", "code"}


def test_the_operators_errors_name_the_setting_and_show_no_value():
    made = translate_error(
        404,
        body(
            error_envelope(
                7003,
                "Could not route to /accounts/%s/ai/v1/x, perhaps your object identifier is "
                "invalid?" % ACCOUNT)), (ACCOUNT,))
    assert "CLOUDFLARE_ACCOUNT_ID" in made.message and ACCOUNT not in made.message
    for status in (401, 403):
        assert translate_error(status, body(error_envelope(10000))).message == (
            "Cloudflare rejected the API token for this account. CLOUDFLARE_API_TOKEN must be "
            "valid, allow Workers AI Read and Edit, and belong to CLOUDFLARE_ACCOUNT_ID.")


@pytest.mark.parametrize("number", [4006, 3036])
def test_a_daily_quota_that_is_used_up_says_when_it_is_back(number):
    message = "you have used up your daily free allocation of 10,000 neurons, please upgrade."
    made = translate_error(429, body(error_envelope(number, message)))
    assert made.message == message + " The quota is back at 00:00 UTC."


def test_retry_after_is_passed_on():
    assert translate_error(429, b"", (), b"5").headers == [(b"Retry-After", b"5")]


def test_of_a_long_message_only_the_beginning_is_looked_at(monkeypatch):
    lengths = []

    class CountingNoise:
        noise = aiproxy.NOISE

        def sub(self, replacement, text):
            lengths.append(len(text))
            return self.noise.sub(replacement, text)
    monkeypatch.setattr(aiproxy, "NOISE", CountingNoise())
    blanks = " " * 500000
    letters = "x" * 500000
    for message in (blanks, letters, "AiError" + blanks, "(" + blanks, {"a": letters}):
        made = translate_error(400, body(error_envelope(5004, message)))
        assert made.status == 400
        assert len(made.message) <= 2000
    assert max(lengths) <= aiproxy.MAX_MESSAGE_READ


def test_half_of_a_secret_at_the_end_of_what_is_looked_at_is_not_shown():
    filler = (UUID + " ") * (aiproxy.MAX_MESSAGE_READ // (len(UUID) + 1))
    made = translate_error(400, body(error_envelope(5004, filler + TOKEN)), (ACCOUNT, TOKEN))
    assert made.message == "***"


# -- the model list

CATALOGUE = [
    ITEM, item("@cf/baai/bge-m3", "Text Embeddings"),
    item("@cf/black-forest-labs/flux", "Text-to-Image"),
    item("@cf/old", planned_deprecation_date="2026-05-30"),
    item("@cf/leaving", "text  generation", planned_deprecation_date="2027-01-01"), ITEM,
    {"name": None}, {"name": "@cf/odd", "task": None, "properties": None}]


def test_an_item_of_the_catalogue_becomes_a_model():
    assert translate_catalogue([ITEM], "2026-11-21", {}, False) == [
        {
            "id": "@cf/openai/gpt-oss-20b", "object": "model", "created": 1754390993,
            "owned_by": "cloudflare", "permission": [], "root": "@cf/openai/gpt-oss-20b",
            "parent": None,
            "metadata": {
                "description": "OpenAI's open-weight models …", "task": "Text Generation",
                "context_window": "128000"}}]


@pytest.mark.parametrize(
    "names,only,ids",
    [
        (
            WORKERS_ALIASES, False,
            ["gpt-oss-20b", "@cf/openai/gpt-oss-20b", "@cf/baai/bge-m3", "@cf/leaving"]),
        (
            {"@cf/leaving": "@cf/leaving", "small": "@cf/openai/gpt-oss-20b", "gone": "@cf/old",
             "@cf/unlisted": "@cf/unlisted", "flux": "@cf/black-forest-labs/flux"},
            True, ["small", "@cf/leaving", "@cf/unlisted"]),
        ({}, False, ["@cf/openai/gpt-oss-20b", "@cf/baai/bge-m3", "@cf/leaving"])],
    ids=["out of the box", "an allow-list", "no aliases"])
def test_the_list_has_live_text_and_embedding_models_aliases_first(names, only, ids):
    made = translate_catalogue(CATALOGUE, "2026-11-21", names, only)
    assert [model["id"] for model in made] == ids
    leaving = [model for model in made if model["id"] == "@cf/leaving"][0]
    assert leaving["metadata"] == {
        "task": "text  generation", "planned_deprecation_date": "2027-01-01",
        "context_window": None}
    assert leaving["created"] == 0


@pytest.mark.parametrize("value,shown", [("true", {"require_workers_paid": True}), ("false", {})])
def test_a_model_of_the_paid_plan_is_marked(value, shown):
    made, = translate_catalogue([item("@cf/x/y", require_workers_paid=value)], "2026-11-21", {}, 0)
    assert made["metadata"] == dict(
        {"task": "Text Generation", "context_window": None}, **shown)


def test_a_model_is_retired_on_its_date():
    assert len(translate_catalogue(CATALOGUE, "2026-05-29", {}, False)) == 4
    assert len(translate_catalogue(CATALOGUE, "2026-05-30", {}, False)) == 3


def test_no_retired_model_is_a_default():
    retired = (
        "kimi-k2.5", "llama-3-8b", "llama-3.1-8b-instruct", "llama-3.1-70b", "llama-2",
        "mistral-7b", "gemma-7b", "gemma-3", "hermes-2", "phi-2", "sqlcoder")
    assert not [model for model in WORKERS_ALIASES.values() if any(old in model for old in retired)]
