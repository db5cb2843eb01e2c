"""AIPROXY_MAX_TOKENS: requests above it are refused, requests without a limit get it."""

import json

import pytest

import aiproxy
from support import CHAT

COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
EMBEDDINGS = "/v1/embeddings"
PATHS = ",".join((CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT_TOKENS, EMBEDDINGS))


@pytest.fixture
def frugal(relay):
    """A relay that allows 100 output tokens."""
    return relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice", MAX_TOKENS="100", PATHS=PATHS)


def ask(running, body, path=CHAT):
    return running.ask("POST", path, body, [("Authorization", "Bearer ck-alice")])


@pytest.mark.parametrize("path,body", [
    (CHAT, b'{"model":"m","max_tokens":100}'),
    (CHAT, b' { "max_completion_tokens" :\t1e2 , "model":"\\u006d" }\n'),
    (CHAT, b'{"max_tokens":1}'),
    (CHAT, b'{"max_tokens":0}'),
    (CHAT, b'{"max_tokens":50,"max_completion_tokens":100}'),
    (RESPONSES, b'{"max_output_tokens":100.0}'),
    (MESSAGES, b'{"max_tokens":100}'),
    (CHAT, b'{"n":4,"max_tokens":25}'),
    (COMPLETIONS, b'{"best_of":4,"n":2,"max_tokens":25}'),
    (CHAT, b'{"n":1,"max_tokens":100}'),
    (CHAT, b'{"n":null,"max_tokens":100}'),
    (EMBEDDINGS, b'{"input":"x"}'),
    (COUNT_TOKENS, b'{"messages":[]}'),
    (CHAT, b'{"max_tokens":100,"messages":[{"max_tokens":1000,"n":7}]}'),
], ids=lambda value: value.decode() if isinstance(value, bytes) else "")
def test_a_request_within_the_limit_is_sent_upstream_byte_for_byte(upstream, frugal, path, body):
    assert ask(frugal, body, path).status == 200
    assert upstream.received[0].body == body


@pytest.mark.parametrize("path,body,param", [
    (CHAT, b'{"max_tokens":101}', "max_tokens"),
    (CHAT, b'{"max_completion_tokens":1e3}', "max_completion_tokens"),
    (RESPONSES, b'{"max_output_tokens":100.5e1}', "max_output_tokens"),
    (MESSAGES, b'{"max_tokens":99999999999999999999}', "max_tokens"),
    (CHAT, b'{"max_tokens":1,"max_completion_tokens":101}', "max_completion_tokens"),
    (CHAT, b'{"max_output_tokens":101,"max_tokens":1}', "max_output_tokens"),
    (CHAT, b'{"max\\u005ftokens":101}', "max_tokens"),
    (CHAT, b'{"n":2,"max_tokens":51}', "max_tokens"),
    (COMPLETIONS, b'{"best_of":5,"max_tokens":21}', "max_tokens"),
    (COMPLETIONS, b'{"n":2,"best_of":5,"max_tokens":21}', "max_tokens"),
    (COMPLETIONS, b'{"n":5,"best_of":1,"max_tokens":21}', "max_tokens"),
    (CHAT, b'{"n":101}', "n"),
    (COMPLETIONS, b'{"best_of":101}', "best_of"),
    (CHAT, b'{"max_tokens":"101"}', "max_tokens"),
    (CHAT, b'{"max_tokens":true}', "max_tokens"),
    (CHAT, b'{"max_tokens":-1}', "max_tokens"),
    (CHAT, b'{"max_tokens":1.5}', "max_tokens"),
    (CHAT, b'{"max_tokens":[101]}', "max_tokens"),
    (CHAT, b'{"n":"2","max_tokens":100}', "n"),
    (CHAT, b'{"n":-3,"max_tokens":100}', "n"),
    (COMPLETIONS, b'{"best_of":1.5}', "best_of"),
], ids=lambda value: value.decode() if isinstance(value, bytes) else "")
def test_a_request_above_the_limit_is_refused_and_not_sent_upstream(
    upstream, frugal, path, body, param
):
    reply = ask(frugal, body, path)

    assert reply.status == 400
    if path != MESSAGES:        # Anthropic's form has no place for it
        assert reply.json["error"]["param"] == param
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("body", [
    b'{"Max_Tokens":101}',
    b'{"MAX_TOKENS":1,"max_tokens":1}',
    b'{"N":9}',
    b'{"Best_of":9}',
    b'{"max_token\xc5\xbf":101}',
    b'{"max_to\xe2\x84\xaaens":101}',
], ids=ascii)
def test_a_name_that_some_parsers_take_for_a_limit_is_refused(upstream, frugal, body):
    assert ask(frugal, body).status == 400
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("body", [
    b'{"max_tokens":1,"max_tokens":101}',
    b'{"max_tokens":NaN}',
    b'{"max_tokens":1e999}',
    b"max_tokens=1",
    b"[]",
    b"",
], ids=ascii)
def test_a_body_that_can_be_read_in_two_ways_is_refused(upstream, frugal, body):
    reply = ask(frugal, body)

    assert reply.status == 400
    assert reply.code == "invalid_json"
    assert upstream.all_bytes == b""


@pytest.mark.parametrize("path,body,expected", [
    (CHAT, b'{"model":"m",  "messages":[] }', b'{"max_tokens": 100, "model":"m",  "messages":[] }'),
    (COMPLETIONS, b'{"prompt":"\\u00e9"}', b'{"max_tokens": 100, "prompt":"\\u00e9"}'),
    (RESPONSES, b'{"input":"x"}', b'{"max_output_tokens": 100, "input":"x"}'),
    (MESSAGES, b'{"messages":[]}', b'{"max_tokens": 100, "messages":[]}'),
    (CHAT, b"{}", b'{"max_tokens": 100}'),
    (CHAT, b' {\n "model": "m"\n}', b' {"max_tokens": 100, \n "model": "m"\n}'),
    (CHAT, b'{"model":"m","max_tokens":null,"x":1}', b'{"model":"m","max_tokens":100,"x":1}'),
    (CHAT, b'{"n":3}', b'{"max_tokens": 33, "n":3}'),
    (COMPLETIONS, b'{"best_of":50,"n":3}', b'{"max_tokens": 2, "best_of":50,"n":3}'),
], ids=lambda value: value.decode() if isinstance(value, bytes) else "")
def test_a_request_without_a_limit_gets_one_and_no_other_byte_changes(
    upstream, frugal, path, body, expected
):
    assert ask(frugal, body, path).status == 200
    assert upstream.received[0].body == expected
    assert upstream.received[0].field("content-length") == str(len(expected))


@pytest.mark.parametrize("provider,path,name", [
    ("openai", CHAT, "max_completion_tokens"),
    ("openai", COMPLETIONS, "max_tokens"),
    ("openai", RESPONSES, "max_output_tokens"),
    ("https://api.openai.com/v1", CHAT, "max_completion_tokens"),
    ("deepseek", CHAT, "max_tokens"),
    ("anthropic", MESSAGES, "max_tokens"),
    ("ollama", CHAT, "max_tokens"),
    ("openai", EMBEDDINGS, None),
    ("anthropic", COUNT_TOKENS, None),
])
def test_the_limit_is_added_under_the_name_that_the_provider_takes(provider, path, name):
    settings = aiproxy.Settings({"AIPROXY_UPSTREAM": provider, "AIPROXY_MAX_TOKENS": "100"})
    assert aiproxy.limit_tokens({}, path, settings) == ({name: 100} if name else {})


def test_without_the_setting_bodies_are_not_changed(upstream, hidden):
    bodies = [
        b'{"max_tokens":99999999,"n":9}',
        b'{"model":"m"}',
        b'{"max_tokens":"x"}',
        b"not JSON",
    ]

    for body in bodies:
        assert hidden.chat(body).status == 200

    assert [received.body for received in upstream.received] == bodies


def test_with_a_provider_key_no_post_bypasses_the_limit(upstream, frugal):
    key = ("Authorization", "Bearer ck-alice")
    compressed = [key, ("Content-Encoding", "gzip")]
    text = [key, ("Content-Type", "text/plain")]

    assert frugal.ask("POST", CHAT, b"\x1f\x8b", compressed).status == 415
    assert frugal.ask("POST", CHAT, b'{"max_tokens":101}', text).status == 400
    assert upstream.all_bytes == b""


def test_without_a_provider_key_only_inference_paths_are_limited(upstream, relay):
    running = relay(MAX_TOKENS="100")

    assert running.ask("POST", CHAT, b'{"max_tokens":101}').status == 400
    assert running.ask("POST", "/v1/files", b'{"max_tokens":101}').status == 200
    assert upstream.received[0].body == b'{"max_tokens":101}'


def test_the_limit_works_together_with_an_alias(upstream, relay):
    running = relay(
        KEY="sk-hidden-key",
        CLIENT_KEYS="ck-alice",
        MAX_TOKENS="100",
        MODELS="fast=vendor/model",
        DEFAULT_MODEL="fast",
    )

    assert running.chat(b'{"model":"fast","max_tokens":null}').status == 200
    assert running.chat(b"{}").status == 200
    assert upstream.received[0].body == b'{"model":"vendor/model","max_tokens":100}'
    assert json.loads(upstream.received[1].body) == {"model": "vendor/model", "max_tokens": 100}


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "99999999999"])
def test_an_invalid_limit_stops_the_start(value):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_MAX_TOKENS"):
        aiproxy.Settings({"AIPROXY_MAX_TOKENS": value})
