"""Models: the allow-list, its aliases, the default model, and ambiguous bodies."""

import json
import threading

import pytest

from support import CHAT

ALL = {
    "MODELS": "small,big=vendor/big-2,vendor/big-2",
    "KEY": "sk-hidden-key",
    "CLIENT_KEYS": "ck-alice",
}


@pytest.mark.parametrize("body,sent", [
    (b'{"model":"small"}', None),
    (
        b' \r\n{ "messages" : [ 1.0 , 1e2 ], "model"\t:  "small" , "x":"\xe4\xbd\xa0\\u4f60" } \n',
        None,
    ),
    (b'{"mod\\u0065l":"sm\\u0061ll"}', None),
    (
        b'{"model": "big", "n":1.50,"model_":"big"}',
        b'{"model": "vendor/big-2", "n":1.50,"model_":"big"}',
    ),
    (b'{"a":{"model":"x"},"model":"b\\u0069g" }', b'{"a":{"model":"x"},"model":"vendor/big-2" }'),
    (b'{"model":"vendor/big-2"}', None),
], ids=["plain", "odd spelling", "escapes", "alias", "alias in escapes", "more after the alias"])
def test_only_the_bytes_of_an_alias_are_changed(upstream, relay, body, sent):
    assert relay(**ALL).chat(body).status == 200
    assert upstream.received[0].body == (sent or body)


@pytest.mark.parametrize(
    "models", ["", "small,big=vendor/big-2"], ids=["all allowed", "on the list"]
)
@pytest.mark.parametrize("body,sent", [
    (b'{"messages":[]}', b'{"model": "small", "messages":[]}'),
    (b"{}", b'{"model": "small"}'),
    (b' { } ', b' {"model": "small" } '),
    (b'{"model":"other-1"}', b'{"model":"other-1"}'),
], ids=["members", "empty", "spaces", "with a model"])
def test_the_default_model_is_for_requests_that_name_none(upstream, relay, models, body, sent):
    running = relay(DEFAULT_MODEL="small", MODELS=models, KEY="k-1", CLIENT_KEYS="ck-alice")
    reply = running.chat(body)

    if models and b"other" in body:
        assert (reply.status, reply.code) == (403, "model_not_allowed")
        assert not upstream.received
    else:
        assert reply.status == 200
        assert upstream.received[0].body == sent


def test_the_default_model_may_be_an_alias(upstream, relay):
    running = relay(
        DEFAULT_MODEL="big", MODELS="big=vendor/big-2", KEY="k-1", CLIENT_KEYS="ck-alice"
    )

    assert running.chat(b"{}").status == 200
    assert json.loads(upstream.received[0].body) == {"model": "vendor/big-2"}


DEEP = 100000

# 80 kB, longer than what is read at a time
LONG = b"Qk1m" * 20000
# A body, and the code of the error. Its status is 400, or 403 for model_not_allowed.
INVALID_BODIES = [
    pytest.param(b"{}", "missing_model", id="none"),
    pytest.param(b'{"model":""}', "invalid_model", id="empty"),
    pytest.param(b'{"model":["small"]}', "invalid_model", id="list"),
    pytest.param(b'{"model":null}', "invalid_model", id="null"),
    pytest.param(b'{"model":1}', "invalid_model", id="number"),
    pytest.param(b'{"model":"small","model":"secret"}', "invalid_model", id="duplicate"),
    pytest.param(
        b'{"model":"small","mod\\u0065l":"secret"}', "invalid_model", id="duplicate by an escape"
    ),
    pytest.param(
        b'{"model":"small","Model":"secret"}', "invalid_model", id="duplicate in another case"
    ),
    pytest.param(
        b'{"model":"small","a":{"b":1,"b":2}}', "invalid_json", id="another name duplicate"
    ),
    pytest.param(b'\xef\xbb\xbf{"model":"small"}', "invalid_json", id="BOM"),
    pytest.param('{"model":"small"}'.encode("utf-16"), "invalid_json", id="UTF-16"),
    pytest.param('{"model":"small"}'.encode("utf-16-le"), "invalid_json", id="UTF-16 without BOM"),
    pytest.param(b'{"model":"small","a":"\xff"}', "invalid_json", id="not UTF-8"),
    pytest.param(b'{"model":"small","a":NaN}', "invalid_json", id="NaN"),
    pytest.param(b'{"model":"small","a":-Infinity}', "invalid_json", id="infinity"),
    pytest.param(b'{"model":"small","a":1e999}', "invalid_json", id="infinite float"),
    pytest.param(b'{"model":"small","a":' + b"9" * 5000 + b"}", "invalid_json", id="5000 digits"),
    pytest.param(
        b'{"model":"small","a":' + b"[" * DEEP + b"]" * DEEP + b"}", "invalid_json", id="deep lists"
    ),
    pytest.param(
        b'{"model":"small","a":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        "invalid_json",
        id="deep objects",
    ),
    pytest.param(b"[" * DEEP, "invalid_json", id="deep and unfinished"),
    pytest.param(
        b'{"model":"small","a":[' + b"[]," * 1400000 + b"1]}", "invalid_json", id="a million values"
    ),
    pytest.param(
        b'{"a":"%b","model":"secret"}' % LONG, "model_not_allowed", id="after a long string"
    ),
    pytest.param(
        b'{"model":"small","a":"%b","model":"secret"}' % LONG,
        "invalid_model",
        id="duplicate after a long string",
    ),
    pytest.param(
        b'{"model":"small","a":"%b\\","model":"secret"}' % LONG,
        "invalid_json",
        id="a long string with its end escaped",
    ),
    pytest.param(
        b'{"model":"small","a":"%b\\\\","model":"secret"}' % LONG,
        "invalid_model",
        id="a long string with a backslash escaped",
    ),
    pytest.param(
        b'{"model":"small","a":"%b' % LONG, "invalid_json", id="an unfinished long string"
    ),
    pytest.param(b'{"model":"small","a":%b}' % LONG, "invalid_json", id="long and not a string"),
    pytest.param(b'{"model":"small"}%b""' % LONG, "invalid_json", id="long trailing data"),
    pytest.param(
        b'{"model":"small","a":"%b\xff%b"}' % (LONG, LONG), "invalid_json", id="long and not UTF-8"
    ),
    pytest.param(
        b'{"model":"small","a":"%b\0%b"}' % (LONG, LONG), "invalid_json", id="long with a NUL"
    ),
    pytest.param(
        b'{"model":"small","a":"%b\n%b"}' % (LONG, LONG), "invalid_json", id="long with an LF"
    ),
    pytest.param(
        b'{"model":"small","%b":1,"%b":2}' % (LONG, LONG),
        "invalid_json",
        id="a long name duplicate",
    ),
    pytest.param(b'{"model":"small%b"}' % LONG, "model_not_allowed", id="a long model"),
    pytest.param(b'["model","small"]', "invalid_json", id="a list"),
    pytest.param(b'"small"', "invalid_json", id="a string"),
    pytest.param(b"", "invalid_json", id="nothing"),
    pytest.param(b'{"model":"small"', "invalid_json", id="unfinished"),
    pytest.param(b'{"model":"small",}', "invalid_json", id="comma at the end"),
    pytest.param(b'{"model":"small"}{"model":"secret"}', "invalid_json", id="two objects"),
    pytest.param(b'{"model":"small","a":"\n"}', "invalid_json", id="raw control character"),
    pytest.param(b"{'model':'small'}", "invalid_json", id="single quotes"),
    pytest.param(b'{"model":"small"}\0', "invalid_json", id="NUL at the end"),
    pytest.param(b"model=small", "invalid_json", id="a form"),
    pytest.param(b'{"model":"Small"}', "model_not_allowed", id="the name in another case"),
    pytest.param(b'{"model":"small "}', "model_not_allowed", id="a space in the name"),
    pytest.param(b'{"model":"\\ud800"}', "model_not_allowed", id="half a surrogate pair"),
]


@pytest.mark.parametrize("body,code", INVALID_BODIES)
def test_a_body_that_is_not_json_with_one_allowed_model_is_refused(upstream, relay, body, code):
    running = relay(**ALL)
    reply = running.chat(body)

    assert (reply.status, reply.code) == (403 if code == "model_not_allowed" else 400, code)
    assert not upstream.received
    assert running.wait_for_record()["outcome"] == code

    if reply.status == 403:
        assert "small, big, vendor/big-2" in reply.json["error"]["message"]
        assert reply.json["error"]["param"] == "model"


def test_many_brackets_inside_strings_are_not_nesting(upstream, relay):
    body = json.dumps({"model": "small", "messages": ["[{\"" * 5000]}).encode()

    assert relay(**ALL).chat(body).status == 200
    assert upstream.received[0].body == body


def test_a_string_that_looks_like_a_million_values_is_one_value(upstream, relay):
    body = b'{"model":"small","a":"%b"}' % (b"a,b," * 1200000)

    assert relay(**ALL).chat(body).status == 200
    assert upstream.received[0].body == body


LONG_TEXT = LONG.decode()


@pytest.mark.parametrize("settings", [{}, {"MAX_CHARS": "1000000"}], ids=["skipped", "read"])
@pytest.mark.parametrize("before,after", [
    ('{"messages":["%s"],' % LONG_TEXT, "}"),
    ("{", ',"a":"%s","b":"%s"}' % (LONG_TEXT, LONG_TEXT)),
    ("{", ',"a":"%s\\n%s\\""}' % (LONG_TEXT, LONG_TEXT)),
    ("{", ',"a":"%s\u4f60\U0001f600%s"}' % (LONG_TEXT, LONG_TEXT)),
    ('{"%s" : 1,' % LONG_TEXT, ',"b":""}'),
    ("{" + " " * 80000, "\n" * 80000 + "}"),
    ("{", ',"prompt":[%s1]}' % ("17, " * 20000)),
    ("{", ',"a":["%s",%s"%s"]}' % (LONG_TEXT, " " * 80000, LONG_TEXT)),
], ids=["before", "two after", "escapes", "not ASCII", "a name", "white space", "numbers", "both"])
def test_a_long_body_is_read_like_a_short_one(upstream, relay, settings, before, after):
    running = relay(**ALL, **settings)
    body = before + '"model":"big"' + after

    assert running.chat(body.encode()).status == 200
    assert upstream.received[0].body.decode() == before + '"model":"vendor/big-2"' + after


def test_a_control_character_in_a_long_string_is_refused(upstream, relay):
    body = b'{"model":"small","a":"%b\x01%b"}' % (LONG, LONG)

    assert relay(**ALL).chat(body).status == 400
    assert not upstream.received


def test_the_model_behind_an_alias_is_allowed_only_if_listed(upstream, relay):
    running = relay(MODELS="big=vendor/big-2", KEY="k-1", CLIENT_KEYS="ck-alice")

    assert running.chat(b'{"model":"vendor/big-2"}').code == "model_not_allowed"
    assert not upstream.received


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain;charset=UTF-8", None]
)
def test_the_path_decides_whether_a_body_is_read_not_its_content_type(upstream, relay, kind):
    fields = [("Content-Type", kind)] if kind else []

    assert relay(**ALL).chat(b'{"model":"small"}', fields=fields).status == 200
    assert upstream.received[0].field("content-type") == "application/json"


def test_a_compressed_body_is_refused_where_its_model_must_be_read(upstream, relay):
    reply = relay(**ALL).chat(b"\x1f\x8b", fields=[("Content-Encoding", "gzip")])

    assert (reply.status, reply.code) == (415, "unsupported_encoding")
    assert not upstream.received


@pytest.mark.parametrize("settings,path,status", [
    (dict(ALL, PATHS="/v1/images/generations"), "/v1/images/generations", 400),
    ({"MODELS": "small"}, "/v1/images/generations", 200),
    ({"MODELS": "small"}, CHAT, 400),
    ({"MODELS": "small"}, "/v1/messages", 400),
], ids=[
    "provider key: every POST",
    "no provider key: another path",
    "no provider key: inference",
    "no provider key: inference of another provider",
])
def test_with_a_provider_key_every_post_is_checked_else_only_inference(
    relay, settings, path, status
):
    fields = [("Authorization", "Bearer ck-alice")]

    assert relay(**settings).ask("POST", path, b"--form data", fields).status == status


def test_without_model_settings_the_body_is_not_read(upstream, hidden):
    read = threading.Event()
    body = b"\x00\xff" * 100000
    fields = [("Authorization", "Bearer ck-alice"), ("Content-Length", str(len(body)))]

    def answer(received):
        read.set()
        received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    upstream.answer = answer
    with hidden.client() as client:
        client.request("POST", CHAT, b"", fields)
        client.send(body[:100000])
        # before the body is complete
        assert upstream.wait_for().line.startswith("POST")
        assert not read.is_set()

        client.send(body[100000:])
        assert client.read_reply().status == 200

    assert upstream.received[0].body == body


@pytest.mark.parametrize("path,status,ids", [
    ("/v1/models", 200, ["small", "big", "vendor/big-2"]),
    ("/models", 200, ["small", "big", "vendor/big-2"]),
    ("/v1/models/small", 200, ["small"]),
    ("/v1/models/vendor%2Fbig-2", 200, ["vendor/big-2"]),
    ("/v1/models/vendor%2fbig-2", 200, ["vendor/big-2"]),
    ("/v1/models/other", 404, None),
])
def test_the_list_of_models_is_answered_by_the_relay(upstream, relay, path, status, ids):
    reply = relay(**ALL).ask("GET", path, None, [("x-api-key", "ck-alice")])

    assert reply.status == status
    assert not upstream.received

    if ids is None:
        assert reply.code == "model_not_found"
    else:
        items = reply.json["data"] if "data" in reply.json else [reply.json]
        assert [item["id"] for item in items] == ids
        assert all(item["object"] == "model" for item in items)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/vendor%2Fbig-2"])
def test_without_a_list_the_upstream_is_asked_for_its_models(upstream, hidden, path):
    assert hidden.ask("GET", path, None, [("x-api-key", "ck-alice")]).json == {"ok": True}
    assert upstream.received[0].line == "GET %s HTTP/1.1" % path


def test_the_model_is_logged(relay):
    running = relay(**ALL)
    running.chat(b'{"model":"big"}')

    assert running.wait_for_record()["model"] == "big"


START = b'{"model":"small","m":['
MANY = [  # bodies that hold many strings, and their status
    pytest.param(START + b'"",' * 300000 + b'""]}', 200, id="empty strings"),
    pytest.param(START + b'"[",' * 300000 + b'"{"]}', 200, id="brackets in strings"),
    pytest.param(START + b'"\\\\","\\"[",' * 99999 + b"[" * 100, 400, id="too deep"),
    pytest.param(START + b'"",' * 1500000 + b'""]}', 400, id="too many"),
]


@pytest.mark.parametrize("body,status", MANY)
def test_strings_do_not_count_as_nesting_whatever_their_number(upstream, relay, body, status):
    reply = relay(**ALL).chat(body)
    assert reply.status == status
    assert len(upstream.received) == (status == 200)
