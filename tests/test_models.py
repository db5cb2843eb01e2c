"""Models: the allow-list, its aliases, the default model, and ambiguous bodies."""

import json
import threading
import urllib.parse

import pytest

import aiproxy
from support import CHAT, Relay, Upstream

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
    (b'{"a":1, "model" : null}', b'{"a":1, "model" : "small"}'),
    (b' { } ', b' {"model": "small" } '),
    (b'{"model":"other-1"}', b'{"model":"other-1"}'),
], ids=["members", "empty", "null", "spaces", "with a model"])
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
    pytest.param(b'{"model":null}', "missing_model", id="null"),
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
    ("/v1/models/vendor/big-2", 200, ["vendor/big-2"]),
    ("//v1/models/", 200, ["small", "big", "vendor/big-2"]),
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


# ---- wherever a request names a model

RESPONSES = "/v1/responses"
EVERYWHERE = dict(
    KEY="sk-hidden-key",
    CLIENT_KEYS="ck-alice",
    MODELS="small,big=vendor/big-2,name/*",
    PATHS="/v1/chat/completions,/v1/responses,/openai/deployments/*/chat/completions,"
          "/v1beta/models/*,/v1/audio/transcriptions,POST /v1/responses/*/cancel,"
          "* /v1/files/*,/v1/messages/batches,/v1/audio/speech,"
          "/api/v1/chat/completions",
)
BATCHES = "/v1/messages/batches"
AUTH = [("Authorization", "Bearer ck-alice")]


@pytest.fixture(scope="module")
def everywhere():
    """A relay with three models, for many requests; and its upstream."""
    with Upstream() as fake:
        running = Relay(UPSTREAM=fake.url, **EVERYWHERE)
        yield fake, running
        running.close()


def ask(everywhere, path, body, fields=(), method="POST"):
    """The reply, and the request that went up for it, if any."""
    fake, running = everywhere
    del fake.received[:]
    reply = running.ask(method, path, body, AUTH + list(fields))
    assert len(fake.received) <= 1
    return reply, fake.received[0] if fake.received else None


@pytest.mark.parametrize("members,sent", [
    (b'"models":["small","big"]', b'"models":["small","vendor/big-2"]'),
    (b'"models":[ "big" ,"b\\u0069g"] ', b'"models":[ "vendor/big-2" ,"vendor/big-2"] '),
    (b'"models":["name/x"]', None),
    (b'"models":null,"fallbacks":[]', None),
    (b'"fallbacks":[{"x":1.50,"model" : "big"},"small"]',
     b'"fallbacks":[{"x":1.50,"model" : "vendor/big-2"},"small"]'),
    (b'"tools":[{"type":"t","model":"big","a":[{}]},{"b":[{"model":"small"}]}]',
     b'"tools":[{"type":"t","model":"vendor/big-2","a":[{}]},{"b":[{"model":"small"}]}]'),
    (b'"plugins":[{"engine":{"model":"big"}}]', b'"plugins":[{"engine":{"model":"vendor/big-2"}}]'),
    (b'"tools":[{"parameters":{"properties":{"model":{"type":"string"}}}}]', None),
    (b'"tools":[{"parameters":{"properties":{"Models":{"type":"array"}}}}]', None),
    (b'"messages":[{"model":"x","models":["x"],"tools":[{"model":"x"}]}]', None),
    (b'"input":[{"model":"x"}],"metadata":{"model":"x"}', None),
    (b'"tools":[{"type":"function","function":{"parameters":{"default":{"model":"Golf"}}}}]', None),
    (b'"tools":[{"type":"function","parameters":{"examples":[{"model":"big"}]}}]', None),
    (b'"tools":[{"input_schema":{"required":{"model":["a"]}},"input_examples":[{"model":"x"}]}]',
     None),
    (b'"tools":[{"functionDeclarations":[{"parameters":{"default":{"model":"Golf"}}}]}]', None),
    (b'"session":{"model":"big"}', b'"session":{"model":"vendor/big-2"}'),
    (b'"input_audio_transcription":{"model":"big"}',
     b'"input_audio_transcription":{"model":"vendor/big-2"}'),
    (b'"requests":[{"params":{"model":"small","messages":[{"model":"x"}]}}]', None),
], ids=ascii)
def test_other_models_are_allowed_by_the_same_list(everywhere, members, sent):
    reply, received = ask(everywhere, CHAT, b'{"model":"small",%b}' % members)
    assert reply.status == 200
    assert received.body == b'{"model":"small",%b}' % (sent or members)


@pytest.mark.parametrize("members,status", [
    ('"models":["small","other"]', 403),
    ('"models":"other"', 403),
    ('"models":[["small"]]', 400),
    ('"models":[{"id":"other"}]', 400),
    ('"models":[{"model":"other"}]', 403),
    ('"models":{"model":"other"}', 403),
    ('"models":[1]', 400),
    ('"Models":["small"]', 400),
    ('"fallbacks":["other"]', 403),
    ('"fallbacks":[{"model":"other"}]', 403),
    ('"fallbacks":[{"small":["other"]}]', 400),
    ('"fallbacks":[{"model":"small","fallbacks":["other"]}]', 403),
    ('"tools":[{"model":"other"}]', 403),
    ('"tools":[{"Model":"other"}]', 403),
    ('"tools":[{"a":[{"models":["other"]}]}]', 403),
    ('"tools":{"model":["other"]}', 403),
    ('"tools":[{"m\\u006fdel":"other"}]', 403),
    ('"tools":[{"properties":{"model":{"model":"other"}}}]', 403),
    ('"TOOLS":[{"model":"other"}]', 400),
    ('"plugins":[{"engine":{"model":"other"}}]', 403),
    ('"plugins":[{"allowed_models":["other"]}]', 403),
    ('"session":{"model":"other"}', 403),
    ('"session":{"audio":{"input":{"transcription":{"model":"other"}}}}', 403),
    ('"input_audio_transcription":{"model":"other"}', 403),
    ('"providerOptions":{"gateway":{"models":["other"]}}', 403),
    ('"requests":[{"params":{"model":"other"}}]', 403),
    ('"requests":[{"model":"models/other"}]', 403),
    ('"extra_body":{"model":"other"}', 403),
    ('"compound_custom":{"models":{"reasoning_model":"other"}}', 403),
    ('"models":[{"type":"function","model":"other"}]', 403),
    ('"Session":{"model":"small"}', 400),
    ('"models":[%s]' % ",".join(['"small"'] * 101), 400),
])
def test_no_other_model_gets_around_the_list(everywhere, members, status):
    reply, received = ask(everywhere, RESPONSES, ('{"model":"small",%s}' % members).encode())
    assert reply.status == status
    assert received is None


AZURE = "/openai/deployments/%s/chat/completions"
GEMINI = "/v1beta/models/%s:streamGenerateContent"


@pytest.mark.parametrize("path,body,sent_path,sent_body", [
    (AZURE % "small", b'{"x": 1.50}', AZURE % "small", None),
    (AZURE % "big" + "?api-version=1", b"{}", AZURE % "vendor%2Fbig-2" + "?api-version=1", None),
    (AZURE % "small", b'{"model":null}', AZURE % "small", None),
    (AZURE % "b%69g", b"{}", AZURE % "vendor%2Fbig-2", None),
    (AZURE % "small", b'{"model":"big"}', AZURE % "small", b'{"model":"vendor/big-2"}'),
    (GEMINI % "small", b"{}", GEMINI % "small", None),
    (GEMINI % "small", b'{"model":"models/small"}', GEMINI % "small", None),
    (GEMINI % "big" + "?alt=sse", b"{}", GEMINI % "vendor%2Fbig-2" + "?alt=sse", None),
    (GEMINI % "big", b'{"model":"models/big","requests":[{"model":"models/big"}]}',
     GEMINI % "vendor%2Fbig-2",
     b'{"model":"models/vendor/big-2","requests":[{"model":"models/vendor/big-2"}]}'),
])
def test_a_model_in_the_path_needs_none_in_the_body(everywhere, path, body, sent_path, sent_body):
    reply, received = ask(everywhere, path, body)
    assert reply.status == 200
    assert received.line == "POST %s HTTP/1.1" % sent_path
    assert received.body == (sent_body or body)


@pytest.mark.parametrize("path,body,status", [
    (AZURE % "other", b'{"model":"small"}', 403),
    (AZURE % "o%74her", b"{}", 403),
    (AZURE % "small%2Fother", b"{}", 404),
    (AZURE % "" + "/x", b"{}", 404),
    (AZURE % "small", b'{"model":"other"}', 403),
    (AZURE % "small" + "?model=other", b"{}", 403),
    (AZURE % "other", b"", 403),
    (GEMINI % "other", b'{"model":"small"}', 403),
    (GEMINI % "%6fther", b"{}", 403),
    (GEMINI % "small", b'{"model":"models/other"}', 403),
    ("/v1beta/models/small", b"{}", 400),
])
def test_a_model_in_the_path_must_be_on_the_list(everywhere, path, body, status):
    reply, received = ask(everywhere, path, body)
    assert reply.status == status
    assert received is None


@pytest.mark.parametrize("method,path", [
    ("POST", "/v1/responses/resp_1/cancel"),
    ("DELETE", "/v1/files/file-1"),
    ("GET", "/v1/files/file-1"),
])
def test_a_request_without_a_body_names_no_model(everywhere, method, path):
    for body in (None, b""):
        reply, received = ask(everywhere, path, body, method=method)
        assert reply.status == 200
        assert received.line == "%s %s HTTP/1.1" % (method, path)
        assert received.body == b""


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST"])
def test_every_method_with_a_body_is_looked_into(everywhere, method):
    for body, status in ((b'{"model":"other"}', 403), (b'{"model":"small"}', 200), (b"x", 400)):
        reply, received = ask(everywhere, "/v1/files/f", body, method=method)
        assert reply.status == status
        assert bool(received) == (status == 200)


# ---- in a form

TRANSCRIBE = "/v1/audio/transcriptions"
FORM = [("Content-Type", "multipart/form-data; boundary=b-1")]
FILE = b'Content-Disposition: form-data; name="file"; filename="a%22.wav"\r\n' \
       b"Content-Type: audio/wav\r\n\r\nRIFF\0\xff\r\n--b\r\nmodel=other"
MODEL = b'Content-Disposition: form-data; name="model"\r\n\r\n'


def make_form(*parts, end=b"--\r\n"):
    return b"".join(b"--b-1\r\n%b\r\n" % part for part in parts) + b"--b-1" + end


@pytest.mark.parametrize("body,sent", [
    (make_form(MODEL + b"small", FILE), None),
    (make_form(FILE, MODEL + b"big", end=b"--"),
     make_form(FILE, MODEL + b"vendor/big-2", end=b"--")),
    (make_form(FILE, b"content-disposition: Form-Data;name=model\r\nContent-Type: text/plain; "
                     b"charset=utf-8\r\nContent-Length: 5\r\n\r\nsmall"), None),
    (make_form(MODEL + b"small", FILE.replace(b"%22.wav\"", b".wav\"; filename*=utf-8''%C3%A9")),
     None),
    (make_form(MODEL + b"small", FILE.replace(b"%22", b"; b;")), None),
], ids=["first", "an alias", "bare name", "the file's name twice, as .NET has it", "semicolons"])
def test_a_form_passes_verbatim_but_for_an_alias(everywhere, body, sent):
    reply, received = ask(everywhere, TRANSCRIBE, body, FORM)
    assert reply.status == 200
    assert received.body == (sent or body)
    assert received.field("content-type") == FORM[0][1]


GOOD = make_form(MODEL + b"small", FILE)
BAD_FORMS = {
    "another model": (make_form(MODEL + b"other", FILE), 403),
    "no model": (make_form(FILE), 400),
    "JSON beside it": (
        make_form(MODEL + b"small", MODEL.replace(b"model", b"session") + b"{}"), 400),
    "two models": (make_form(MODEL + b"small", MODEL + b"other"), 400),
    "one model twice": (make_form(MODEL + b"small", MODEL + b"small"), 400),
    "a blank behind": (make_form(MODEL + b"small "), 403),
    "a list": (make_form(MODEL + b"small", MODEL.replace(b"model", b"model[]") + b"other"), 400),
    "capitals": (make_form(MODEL + b"small", MODEL.replace(b"model", b"Model") + b"other"), 400),
    "models": (make_form(MODEL + b"small", MODEL.replace(b"model", b"models") + b"other"), 400),
    "a charset for all": (make_form(MODEL + b"small", MODEL.replace(b"model", b"_charset_")), 400),
    "a file": (make_form(MODEL.replace(b"\r\n\r\n", b'; filename="x"\r\n\r\n') + b"small"), 400),
    "a model with filename*": (
        make_form(MODEL.replace(b"\r\n\r\n", b"; filename*=utf-8''x\r\n\r\n") + b"small"), 400),
    "name*": (make_form(MODEL + b"small", MODEL.replace(b"name=", b"name*=") + b"x"), 400),
    "single quotes": (make_form(MODEL.replace(b'"', b"'") + b"other", MODEL + b"small"), 400),
    "escaped quote": (make_form(MODEL + b"small", FILE.replace(b"%22", b'\\"')), 400),
    "a name behind a semicolon": (
        make_form(MODEL + b"small", FILE.replace(b"%22", b"; name=model")), 400),
    "a second name": (make_form(MODEL.replace(b"\r\n", b'; name="x"\r\n', 1) + b"small"), 400),
    "another coding": (
        make_form(b"Content-Transfer-Encoding: base64\r\n" + MODEL + b"small"), 400),
    "UTF-16": (make_form(b"Content-Type: text/plain; charset=utf-16\r\n" + MODEL + b"small"), 400),
    "not UTF-8": (make_form(MODEL + b"small\xff"), 400),
    "two dispositions": (make_form(MODEL[:-2] + MODEL + b"small"), 400),
    "a preamble": (b"x\r\n" + GOOD, 400),
    "JSON in front": (b'{"model":"other"}\r\n' + GOOD, 400),
    "an epilogue": (GOOD + b"--b-1\r\n" + MODEL + b"other\r\n--b-1--", 400),
    "no end": (GOOD[:-4], 400),
    "bare line ends": (GOOD.replace(b"\r\n", b"\n"), 400),
    "a bare boundary inside": (make_form(MODEL + b"small", FILE + b"\n--b-1\n" + MODEL), 400),
    "a longer boundary": (make_form(MODEL + b"small", FILE + b"\r\n--b-1x\r\n" + MODEL), 400),
    "a blank at the boundary": (GOOD.replace(b"--b-1\r\n", b"--b-1 \r\n"), 400),
    "folded": (make_form(MODEL.replace(b"; ", b";\r\n ") + b"small"), 400),
    "no fields": (make_form(b"\r\n\r\nsmall"), 400),
    "JSON": (b'{"model":"small"}', 400),
    "empty": (b"--b-1--", 400),
    "too many parts": (make_form(*[b"Content-Disposition: form-data; name=x\r\n\r\n"] * 1001), 400),
}


@pytest.mark.parametrize("body,status", list(BAD_FORMS.values()), ids=list(BAD_FORMS))
def test_a_form_that_can_be_read_in_two_ways_is_refused(everywhere, body, status):
    reply, received = ask(everywhere, TRANSCRIBE, body, FORM)
    assert reply.status == status
    assert received is None


@pytest.mark.parametrize("kind", [
    "multipart/form-data",
    "multipart/form-data; boundary=b-1; boundary=c",
    "multipart/form-data; boundary=\"b-1",
    "multipart/form-data; charset=utf-16; boundary=b-1",
    "multipart/form-data; boundary*=utf-8''b-1",
    "multipart/mixed; boundary=b-1",
])
def test_a_form_needs_a_plain_boundary(everywhere, kind):
    reply, received = ask(everywhere, TRANSCRIBE, GOOD, [("Content-Type", kind)])
    assert (reply.status, reply.code) == (400, "invalid_form")
    assert received is None


def test_a_form_is_no_way_to_an_inference_path(everywhere):
    reply, received = ask(everywhere, CHAT, GOOD, FORM)
    assert (reply.status, reply.code) == (400, "invalid_json")
    assert received is None


# ---- names and patterns


@pytest.mark.parametrize("pattern,names,others", [
    ("gpt-4o*", ["gpt-4o", "gpt-4o-mini"], ["gpt-4", "xgpt-4o", "GPT-4o"]),
    ("*/llama-*-8b", ["a/llama-3-8b", "/llama--8b"], ["a/llama-8b", "a/llama-3-8bx"]),
    ("a*a", ["aa", "aba"], ["a", "ab"]),
    ("*", ["x", "通义"], []),
])
def test_a_star_in_a_name_stands_for_anything(pattern, names, others):
    settings = aiproxy.Settings({"AIPROXY_MODELS": pattern})
    assert all(aiproxy.allows_model(name, settings) for name in names)
    assert not any(aiproxy.allows_model(name, settings) for name in others)
    assert settings.models_shown == []


@pytest.mark.parametrize("value", [
    "a=b*", "a*=b", "a=", "=b", "a b", "a,a", "a=b=c", "a;b", "通义，千问", "a；b",
    "a\x07", "a\u200b",
])
def test_a_list_of_models_that_is_unclear_stops_the_start(value):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_MODELS"):
        aiproxy.Settings({"AIPROXY_MODELS": value})


def test_names_of_models_may_be_chinese(upstream, relay):
    running = relay(MODELS="通义千问-max,快=通义千问-max", DEFAULT_MODEL="通义千问-max", KEY="k-1")
    for name in ("通义千问-max", "快"):
        assert running.chat(json.dumps({"model": name}).encode(), key=None).status == 200
    assert running.chat('{"model":"快"}'.encode(), key=None).status == 200
    assert running.chat(b"{}", key=None).status == 200
    sent = [json.loads(received.body)["model"] for received in upstream.received]
    assert sent == ["通义千问-max"] * 4

    path = "/v1/models/" + urllib.parse.quote("通义千问-max")
    assert running.ask("GET", path).json["id"] == "通义千问-max"


@pytest.mark.parametrize("fields", [
    [("Content-Encoding", "identity"), ("Content-Encoding", "identity")],
    [("Content_Encoding", "identity")],
    [("Content-Encoding", "identity, gzip")],
])
def test_a_content_coding_that_is_unclear_is_refused(everywhere, fields):
    reply, received = ask(everywhere, CHAT, b'{"model":"small"}', fields)
    assert (reply.status, reply.code) == (415, "unsupported_encoding")
    assert received is None


def test_the_default_model_is_for_inference_paths(upstream, relay):
    running = relay(DEFAULT_MODEL="small", KEY="k-1", PATHS="/v1/chat/completions,/v1/other")
    for path in ("/v1/other", CHAT):
        assert running.ask("POST", path, b'{"x":1}').status == 200
    sent = [received.body for received in upstream.received]
    assert sent == [b'{"x":1}', b'{"model": "small", "x":1}']


@pytest.mark.parametrize("name", ["\u952e", "\\u952e", "\u00e9", "\U0001f511"])
def test_an_alias_below_a_name_of_another_script_is_replaced(upstream, relay, name):
    running = relay(MODELS="m,fast=m")
    tools = '[{"%s": {"model": "fast"}}]'
    body = ('{"model": "m", "tools": ' + tools % name + "}").encode()

    assert running.ask("POST", CHAT, body).status == 200
    assert upstream.wait_for().body == body.replace(b"fast", b"m")


@pytest.mark.parametrize("path", [
    "/v1/%63hat/completions", "/v1//chat/completions", "/v1/chat/completions/",
    "/v1/Chat/Completions",
])
def test_without_a_provider_key_the_list_holds_however_the_path_is_spelled(upstream, relay, path):
    running = relay(MODELS="small", OPEN=1)
    assert running.ask("POST", path, b'{"model":"other"}').status == 403
    assert not upstream.received
    assert running.ask("POST", path, b'{"model":"small"}').status == 200
    assert upstream.received[0].line == "POST %s HTTP/1.1" % path


def test_a_path_with_an_empty_model_is_refused(upstream, relay):
    running = relay(MODELS="small", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", PATHS="*")
    path = "/openai/deployments/%2Fother/chat/completions"
    assert running.ask("POST", path, b"{}", AUTH).status == 403
    assert not upstream.received


@pytest.mark.parametrize("kind", [
    "multipart/form-data;boundary=b-1;charset=UTF-8",
    "multipart/form-data; charset=ISO-8859-1; boundary=\"b-1\"",
])
def test_a_form_may_name_a_charset_in_which_all_read_the_same(everywhere, kind):
    reply, received = ask(everywhere, TRANSCRIBE, GOOD, [("Content-Type", kind)])
    assert reply.status == 200
    assert received.body == GOOD


@pytest.mark.parametrize("body,status", [
    (b'{"models":["small"]}', 200),
    (b'{"models":["other"]}', 403),
    (b'{"models":[null]}', 400),
    (b'{"session":{"model":"small"}}', 200),
    (b'{"session":{"model":""}}', 400),
    (b'{"session":{"model":[0]}}', 400),
    (b'{"session":{"params":{"model":"small"}}}', 400),
    (b'{"session":[]}', 400),
    (b'{"session":null,"requests":[{"model":"small"}]}', 400),
    (b'{"requests":[{"params":{"model":"small"}},{"model":"small"}]}', 200),
    (b'{"requests":[{"params":{"model":"small"}},{"params":{}}]}', 400),
    (b'{"requests":[{"params":7}]}', 400),
    (b'{"requests":[]}', 400),
    (b'{"requests":"x"}', 400),
    (b"{}", 400),
], ids=ascii)
def test_a_model_is_missing_only_if_nothing_else_names_one(everywhere, body, status):
    reply, received = ask(everywhere, BATCHES, body)
    assert reply.status == status
    assert received is None or received.body == body


@pytest.mark.parametrize("body", [
    b'{"session":{"model":"small"}}', b'{"requests":[{"model":"small"}]}',
    b'{"models":[{"model":null,"x_model":"small"}]}',
    b'{"models":[{"model":null,"params":{"model":"small"}}]}'], ids=ascii)
@pytest.mark.parametrize("path", [CHAT, "/api/v1/chat/completions"])
def test_where_answers_are_asked_for_a_session_names_no_model(everywhere, path, body):
    """An upstream passes over it there, and takes its own default."""
    reply, received = ask(everywhere, path, body)
    assert (reply.status, reply.code) == (400, "missing_model")


@pytest.mark.parametrize("path,query,sent", [
    ("/v1/audio/speech", "?model=big&a=1", "?model=vendor%2Fbig-2&a=1"),
    ("/v1/audio/speech", "?a=1&mo%64el=big", "?a=1&model=vendor%2Fbig-2"),
    ("/v1/audio/speech", "?model=small", "?model=small"),
    ("/v1/audio/speech", "?model=small&deployment=big", "?model=small&deployment=vendor%2Fbig-2"),
    ("/v1/audio/speech", "?model=", "?model="),
    ("/v1/audio/speech", "", ""),
])
def test_an_alias_in_the_query_is_replaced(everywhere, path, query, sent):
    reply, received = ask(everywhere, path + query, b'{"model":"small"}')
    assert reply.status == 200
    assert received.line == "POST %s%s HTTP/1.1" % (path, sent)


def test_the_default_model_is_not_put_in_front_of_a_list(upstream, relay):
    body = b'{"models":["a","b"]}'
    assert relay(DEFAULT_MODEL="z").ask("POST", CHAT, body).status == 200
    assert upstream.received[0].body == body


def test_a_model_that_fits_a_pattern_is_looked_up_at_the_upstream(upstream, relay):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MODELS="small,gpt-4o*")
    assert running.ask("GET", "/v1/models/gpt-4o-mini", fields=AUTH).status == 200
    assert upstream.received[0].line == "GET /v1/models/gpt-4o-mini HTTP/1.1"
    assert running.ask("GET", "/v1/models/small", fields=AUTH).json["id"] == "small"
    assert running.ask("GET", "/v1/models/other", fields=AUTH).status == 404
    assert len(running.ask("GET", "/v1/models", fields=AUTH).json["data"]) == 1
    assert len(upstream.received) == 1


def test_the_example_names_no_pattern(relay):
    command = aiproxy.curl_command(relay(MODELS="gpt-4o*", DEFAULT_MODEL="gpt-4o-mini").server)
    assert '"model": "gpt-4o-mini"' in command
