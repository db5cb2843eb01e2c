"""AIPROXY_MAX_TOKENS: larger limits are lowered to it, requests without a limit get it."""

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
    (CHAT, b' { "max_tokens" :\t1e2 , "model":"\\u006d" }\n'),
    (CHAT, b'{"max_tokens":1}'),
    (COMPLETIONS, b'{"prompt":["a","b"],"max_tokens":50}'),
    (COMPLETIONS, b'{"prompt":[1,2,3],"max_tokens":100}'),
    (CHAT, b'{"max_tokens":1,"options":{"num_predict":100},"generationConfig":null}'),
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


@pytest.mark.parametrize("path,body,sent", [
    (CHAT, b'{"max_tokens":101}', b'{"max_tokens":100}'),
    (CHAT, b'{"max_tokens":0}', b'{"max_tokens":100}'),
    (CHAT, b'{"max_tokens" : -1 }', b'{"max_tokens" : 100 }'),
    (CHAT, b'{"max_tokens":0.0,"n":null}', b'{"max_tokens":100,"n":null}'),
    (CHAT, b'{"max\\u005ftokens":99999999999999999999}', b'{"max\\u005ftokens":100}'),
    (CHAT, b'{"max_completion_tokens":1e3}', b'{"max_tokens": 100, "max_completion_tokens":100}'),
    (CHAT, b'{"max_completion_tokens":7}', b'{"max_tokens": 7, "max_completion_tokens":7}'),
    (CHAT, b'{"max_completion_tokens":-7}', b'{"max_tokens": 100, "max_completion_tokens":100}'),
    (
        CHAT,
        b'{"max_output_tokens":101,"max_tokens":1}',
        b'{"max_output_tokens":100,"max_tokens":1}',
    ),
    (RESPONSES, b'{"max_output_tokens":100.5e1}', b'{"max_output_tokens":100}'),
    (MESSAGES, b'{"max_tokens":32000}', b'{"max_tokens":100}'),
    (CHAT, b'{"n":2,"max_tokens":51}', b'{"n":2,"max_tokens":50}'),
    (COMPLETIONS, b'{"n":2,"best_of":5,"max_tokens":21}', b'{"n":2,"best_of":5,"max_tokens":20}'),
    (COMPLETIONS, b'{"prompt":["a","b"],"n":5,"max_tokens":11}',
     b'{"prompt":["a","b"],"n":5,"max_tokens":10}'),
    (COMPLETIONS, b'{"prompt":[[1],[2]]}', b'{"max_tokens": 50, "prompt":[[1],[2]]}'),
    (COMPLETIONS, b'{"prompt":[]}', b'{"max_tokens": 100, "prompt":[]}'),
    (CHAT, b'{"max_tokens":1,"n_predict":-1,"num_predict":200,"max_new_tokens":0}',
     b'{"max_tokens":1,"n_predict":100,"num_predict":100,"max_new_tokens":100}'),
    (CHAT, b'{"options" : { "x":[{}], "num_predict" : -1, "y": "}" }, "max_tokens":1}',
     b'{"options" : { "x":[{}], "num_predict" : 100, "y": "}" }, "max_tokens":1}'),
    (CHAT, b'{"generationConfig":{"maxOutputTokens":65536,"candidateCount":4},"max_tokens":9}',
     b'{"generationConfig":{"maxOutputTokens":25,"candidateCount":4},"max_tokens":9}'),
], ids=lambda value: value.decode() if isinstance(value, bytes) else "")
def test_a_larger_limit_is_lowered_and_no_other_byte_changes(upstream, frugal, path, body, sent):
    assert ask(frugal, body, path).status == 200
    assert upstream.received[0].body == sent


@pytest.mark.parametrize("path,body,param", [
    (CHAT, b'{"n":101}', "n"),
    (COMPLETIONS, b'{"best_of":101}', "best_of"),
    (CHAT, b'{"max_tokens":"101"}', "max_tokens"),
    (CHAT, b'{"max_tokens":true}', "max_tokens"),
    (CHAT, b'{"options":{"num_predict":"9"}}', "num_predict"),
    (COMPLETIONS, b'{"prompt":[%s]}' % b",".join([b'"x"'] * 101), "prompt"),
    (CHAT, b'{"max_tokens":1.5}', "max_tokens"),
    (CHAT, b'{"max_tokens":[101]}', "max_tokens"),
    (CHAT, b'{"n":"2","max_tokens":100}', "n"),
    (CHAT, b'{"n":-3,"max_tokens":100}', "n"),
    (COMPLETIONS, b'{"best_of":1.5}', "best_of"),
], ids=lambda value: value.decode() if isinstance(value, bytes) else "")
def test_what_cannot_be_held_to_the_limit_is_refused_and_not_sent_upstream(
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
    b'{"maxoutputtokens":101}',
    b'{"Options":{"num_predict":101}}',
    b'{"options":{"Num_Predict":101}}',
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
    ("github", CHAT, "max_tokens"),
    ("anthropic", MESSAGES, "max_tokens"),
    ("ollama", CHAT, "max_tokens"),
    ("https://x.openai.azure.com", "/openai/deployments/m/chat/completions",
     "max_completion_tokens"),
    ("https://x.openai.azure.com/openai/v1", CHAT, "max_completion_tokens"),
    ("https://openai.azure.com.example", CHAT, "max_tokens"),
    ("https://api.example", "/openai/deployments/m/chat/completions", "max_tokens"),
    ("gemini", "/v1beta/models/m:generateContent", None),
    ("ollama", "/api/chat", None),
    ("openai", "/v1/threads/t/messages", None),
    ("openai", EMBEDDINGS, None),
    ("anthropic", COUNT_TOKENS, None),
])
def test_the_limit_is_added_under_the_name_that_the_provider_takes(provider, path, name):
    settings = aiproxy.Settings({"AIPROXY_UPSTREAM": provider, "AIPROXY_MAX_TOKENS": "100"})
    assert aiproxy.limit_tokens({}, path, "m", settings) == ({name: 100} if name else {})


@pytest.mark.parametrize("given", [None, 50])
@pytest.mark.parametrize("model,is_new", [
    ("gpt-5", True), ("gpt-5.1-mini", True), ("openai/o3-pro", True), ("o1", True),
    ("alias", True), ("gpt-5-x", True), ("o4-mini", True),
    ("gpt-4o", False), ("gpt-50", False), ("foo1", False), ("other", False),
])
def test_behind_a_gateway_a_listed_model_decides_about_the_name_of_the_limit(
        upstream, relay, model, is_new, given):
    names = ("gpt-5,gpt-5.1-mini,openai/o3-pro,o1,alias=gpt-5,gpt-4o,gpt-50,foo1,gpt-5-*,o4*,"
             "othe*")
    members = {"max_completion_tokens": given} if given else {}
    running = relay(MAX_TOKENS="100", MODELS=names)
    body = json.dumps({"model": model, **members}).encode()
    assert running.ask("POST", CHAT, body).status == 200

    sent = json.loads(upstream.received[0].body)
    del sent["model"]
    name = "max_completion_tokens" if is_new else "max_tokens"
    assert sent == {**members, name: given or 100}


def test_a_second_model_decides_for_the_name_that_all_know(upstream, relay):
    body = b'{"model":"gpt-5","models":["m"],"max_completion_tokens":50}'
    relay(MAX_TOKENS="100", MODELS="gpt-5,m").ask("POST", CHAT, body)
    assert json.loads(upstream.received[0].body)["max_tokens"] == 50


def test_a_name_that_no_list_has_is_no_way_around_the_limit(upstream, relay):
    """The upstream may serve another model by it, one that knows max_tokens alone."""
    body = b'{"model":"gpt-5","max_completion_tokens":50}'
    relay(MAX_TOKENS="100").ask("POST", CHAT, body)
    assert json.loads(upstream.received[0].body)["max_tokens"] == 50


def test_two_names_of_the_limit_are_not_sent_to_those_who_refuse_that():
    settings = aiproxy.Settings({"AIPROXY_MAX_TOKENS": "100"})
    assert aiproxy.limit_tokens({"max_tokens": 7}, CHAT, "m", settings) == {}
    assert aiproxy.limit_tokens({"max_tokens": 101}, CHAT, "m", settings) == {"max_tokens": 100}


def test_a_newer_name_alone_is_enough_for_github():
    settings = aiproxy.Settings({"AIPROXY_UPSTREAM": "github", "AIPROXY_MAX_TOKENS": "100"})
    members = {"max_completion_tokens": 101}
    assert aiproxy.limit_tokens(members, CHAT, "m", settings) == {"max_completion_tokens": 100}


@pytest.mark.parametrize("most,budget,sent", [
    (8192, 31999, 4096), (8192, 8192, 4096), (8192, 8191, 8191), (1500, 1024, 1024),
    (1500, 1500, 1024), (100, 500, 500)])
def test_thoughts_get_less_than_the_limit(upstream, relay, most, budget, sent):
    body = b'{"max_tokens":%d,"thinking":{"type":"enabled","budget_tokens":%d}}'
    relay(MAX_TOKENS=most).ask("POST", MESSAGES, body % (32000, budget))
    assert upstream.received[0].body == body % (most, sent)


@pytest.mark.parametrize("members,sent", [
    (b'"thinking_budget":38000,"min_tokens":5000', b'"thinking_budget":2000,"min_tokens":2000'),
    (b'"thinking_budget":-1,"min_tokens":0', b'"thinking_budget":-1,"min_tokens":0'),
    (b'"extra_body":{"max_tokens":99999,"a":1}', b'"extra_body":{"max_tokens":2000,"a":1}'),
    (b'"extra_body":{"options":{"num_predict":99999},"thinking":{"budget_tokens":9999}}',
     b'"extra_body":{"options":{"num_predict":2000},"thinking":{"budget_tokens":1024}}'),
    (b'"reasoning":{"max_tokens":32000}', b'"reasoning":{"max_tokens":1024}'),
    (b'"reasoning":{"max_tokens":1500}', b'"reasoning":{"max_tokens":1500}'),
    (b'"reasoning":{"effort":"high"}', b'"reasoning":{"effort":"high"}'),
], ids=ascii)
def test_other_limits_are_lowered_too_and_never_raised(upstream, relay, members, sent):
    relay(MAX_TOKENS=2000).ask("POST", CHAT, b'{"max_tokens":2000,%b}' % members)
    assert upstream.received[0].body == b'{"max_tokens":2000,%b}' % sent


@pytest.mark.parametrize("path", [
    "/v1/chat/completions/", "/v1/chat/completion%73", "/v1//messages", "/chat/completions"])
def test_a_limit_is_added_however_the_path_is_spelled(upstream, relay, path):
    relay(MAX_TOKENS=100).ask("POST", path, b"{}")
    assert upstream.received[0].body == b'{"max_tokens": 100}'


def test_the_banner_says_which_paths_are_limited_without_a_key(relay):
    warnings = list(aiproxy.warnings(relay(MAX_TOKENS="9").server))
    assert "without AIPROXY_KEY the rules for bodies hold for POST to" in "".join(warnings)


@pytest.mark.parametrize("paths,named", [
    (CHAT + ",/openai/deployments/*/chat/completions,/v1/embeddings,GET /v1/files", None),
    (CHAT + ",/v1beta/models/*", "/v1beta/models/*"),
    ("/api/chat,/api/generate", "/api/chat, /api/generate"),
    ("*", "*"),
])
def test_the_banner_names_allowed_paths_where_no_limit_is_added(relay, paths, named):
    warnings = list(aiproxy.warnings(relay(KEY="k-1", MAX_TOKENS="9", PATHS=paths).server))
    warnings = [warning for warning in warnings if "MAX_TOKENS" in warning]
    if named is None:
        assert not warnings
    else:
        assert "no limit on %s:" % named in warnings[0]


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
    assert upstream.all_bytes == b""
    assert frugal.ask("POST", CHAT, b'{"max_tokens":101}', text).status == 200
    assert upstream.received[0].body == b'{"max_tokens":100}'


def test_without_a_provider_key_only_inference_paths_are_limited(upstream, relay):
    running = relay(MAX_TOKENS="100")

    for path in (CHAT, "/v1/files"):
        assert running.ask("POST", path, b'{"max_tokens":101}').status == 200
    sent = [received.body for received in upstream.received]
    assert sent == [b'{"max_tokens":100}', b'{"max_tokens":101}']


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
