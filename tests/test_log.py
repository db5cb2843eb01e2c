"""The log: one line per request, which no client can forge and which never shows a key."""

import json
import os
import threading
import time
import urllib.parse

import pytest

import aiproxy
from support import (
    CHAT, EVENT_HEAD, PATIENCE, PROGRAM, PYTHON, Client, Program, Upstream, chunk, event)

AUTH = [("Authorization", "Bearer ck-alice")]
NAMES = {"time", "client", "method", "path", "model", "status", "upstream_status"}
NAMES |= {"first_byte", "total", "bytes", "request_id", "outcome"}
CLIENT_KEYS = 'alice=ck-alice,bob=ck-"quoted"'


# The program, but lines do not wait for others that might be written with them.
IMPATIENT = "import aiproxy, sys; aiproxy.LOG_SECONDS = 0.001; sys.exit(aiproxy.main())"


@pytest.fixture(scope="module", params=["text", "json"])
def program(request):
    """The program with its log in one form, in front of `upstream`."""
    with Upstream() as fake:
        environ = {
            "AIPROXY_UPSTREAM": fake.url,
            "AIPROXY_KEY": "sk-hidden-key",
            "AIPROXY_CLIENT_KEYS": CLIENT_KEYS,
            "AIPROXY_LOG": request.param,
            "AIPROXY_DEFAULT_MODEL": "m",
            "AIPROXY_PATHS": "*",
            "PYTHONPATH": os.path.dirname(PROGRAM),
        }
        with Program(env=environ, command=[*PYTHON, "-c", IMPATIENT]) as running:
            running.upstream = fake
            running.form = request.param
            yield running


def ask(program, method="POST", path=CHAT, body=b"{}", fields=AUTH):
    with Client(program.address) as client:
        client.request(method, path, body, list(fields))
        return client.read_reply(method)


def lines_of(program, act, count=1):
    """The log lines of the `count` requests that `act` makes.

    Any other lines before that of the next request are included.
    """
    begin = len(program.lines)
    act()
    with program.news:
        arrived = program.news.wait_for(lambda: len(program.lines) >= begin + count, PATIENCE)
        assert arrived, program.lines[begin:]

    ask(program, "GET", "/end-%d-" % begin, None)
    program.wait_for_line(program.lines, "/end-%d-" % begin)
    return program.lines[begin:-1]


def test_one_request_is_one_line(program):
    path = CHAT + "?user=someone"
    (line,) = lines_of(program, lambda: ask(program, path=path, body=b'{"model":"gpt-x"}'))

    if program.form == "json":
        record = json.loads(line)
        assert NAMES <= set(record)
        assert record["time"].endswith("Z")
        assert 0 <= record["first_byte"] <= record["total"]
        assert record["client"] == "alice"
        assert record["method"] == "POST"
        assert record["path"] == CHAT
        assert record["model"] == "gpt-x"
        assert record["status"] == 200
        assert record["upstream_status"] == 200
        assert record["bytes"] == 11
        assert record["outcome"] == "ok"
    else:
        words = line.split()
        assert words[1:6] == ["alice", "POST", CHAT, "gpt-x", "200"]
        assert words[6] == "upstream=200"
        assert words[-1] == "ok"
        assert "bytes=11" in words

    assert "someone" not in line


def test_refusals_are_logged_too(program):
    def act():
        ask(program, fields=[])
        program.wait_for_line(program.lines, "invalid_api_key")
        ask(program, body=b'{"model":1}')

    first, second = lines_of(program, act, 2)

    assert "invalid_api_key" in first
    assert "127.0.0.1" in first
    assert "401" in first
    assert "invalid_model" in second
    assert "alice" in second
    assert "400" in second


def test_a_request_is_logged_when_it_ends_and_with_how_it_ended(program):
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")))
        gate.wait(PATIENCE)
        received.close()

    def act():
        with Client(program.address) as client:
            client.request("POST", CHAT, b"{}", AUTH)
            client.read_until(b"one\n\n")

        program.wait_for_line(program.lines, "client_gone")
        gate.set()
        assert not ask(program).complete

        program.upstream.answer = usual

    usual = program.upstream.answer
    program.upstream.answer = answer

    try:
        disconnected, died = lines_of(program, act, 2)
        assert "client_gone" in disconnected
        assert "upstream_died" in died
    finally:
        program.upstream.answer = usual


FORGED = [
    "x\\r\\n2025-01-01T00:00:00Z alice GET /forged - 200 ok",
    "x\\n{\\\"client\\\":\\\"forged\\\"}",
    "\\u001b[2J\\u001b[31mred",
    "\\u0085\\u2028\\u2029",
    "\\u0000\\u0008\\u007f\\u009b31m",
    "\x7f raw",
    "\\ud800",
    "a b\\tc",
    "\u202eevil",
    "x upstream=200 ok",
]


@pytest.mark.parametrize("model", FORGED, ids=ascii)
def test_a_models_name_cannot_forge_a_line(program, model):
    body = b'{"model":"' + model.encode("utf-8") + b'"}'
    (line,) = lines_of(program, lambda: ask(program, body=body))

    assert all("\x20" <= letter < "\x7f" for letter in line[:-1])
    assert line.endswith("\n")

    if program.form == "json":
        assert json.loads(line)["model"] == json.loads('"%s"' % model.replace("\x7f", "\\u007f"))
    else:
        (usual,) = lines_of(program, lambda: ask(program))
        assert len(line.split()) == len(usual.split())
        assert line.split()[-1] == "ok"


@pytest.mark.parametrize(
    "path", ["/a%0d%0aforged", "/a%1b[2J", "/\"quoted\",'x'", "/a=b&status=200"]
)
def test_a_path_cannot_forge_a_line(program, path):
    (line,) = lines_of(program, lambda: ask(program, "GET", path, None))
    logged = json.loads(line)["path"] if program.form == "json" else line.split()[3]

    assert path in logged


def test_raw_bytes_cannot_forge_a_line(program):
    def act():
        for data in (
            b"GET /a\rforged HTTP/1.1\r\n\r\n",
            b"GET /a\x1b[2J HTTP/1.1\r\n\r\n",
            b"\x1b[31m /x HTTP/1.1\r\n\r\n",
            b"GET /\xc2\x9b31m HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            with Client(program.address) as client:
                client.send(data)
                assert client.read_reply().status == 400

    lines = lines_of(program, act, 4)

    assert len(lines) == 4
    assert all("\x20" <= letter < "\x7f" for line in lines for letter in line[:-1])
    assert "forged" not in "".join(lines)


def test_an_upstreams_request_id_cannot_forge_a_line(program):
    usual = program.upstream.answer
    field = b"x-request-id: id ok\tx\xff\x85"
    program.upstream.answer = usual.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n")

    def act():
        ask(program)
        program.upstream.answer = usual
        ask(program)

    try:
        lines = lines_of(program, act, 2)
    finally:
        program.upstream.answer = usual

    assert len(lines) == 2
    assert all("\x20" <= letter < "\x7f" for line in lines for letter in line[:-1])
    assert program.form == "json" or len(lines[0].split()) == len(lines[1].split())


KEYS = ["sk-hidden-key", "ck-alice", 'ck-"quoted"']
# Where a client puts a key that does not belong there: path, model.
PLACES = {
    "path": lambda key: ("/v1/" + key + "/x", "m"),
    "query": lambda key: ("/v1/x?user=" + key, "m"),
    "model": lambda key: (CHAT, key),
    "words": lambda key: (CHAT, "my key is " + key),
    "long path": lambda key: ("/v1/" + "a" * (252 - len(key) + 1) + key, "m"),
    "long model": lambda key: (CHAT, "m" * (100 - len(key) + 1) + key),
}


# What a text has, besides harmless letters, so that the keys in it are hard to see.
HARD = {
    "many": ("ck-alice " * 40, 256),
    "many encoded": ("%63k%2Dalice " * 40, 256),
    "one of each": ("ck-alice%63k-alice" * 20, 256),
    "cut in two": ("x" * 252 + "ck-alice", 256),
    "cut after many": ("ck-alice" * 99 + "x" * 252 + "ck-alice", 100),
    "at the end": ("x" * 248 + "ck-alice", 256),
}


@pytest.mark.parametrize("text,most", list(HARD.values()), ids=list(HARD))
@pytest.mark.parametrize("rest", ["", "x" * 1000])
def test_a_key_is_masked_before_a_text_is_cut_for_the_log(text, most, rest):
    log = aiproxy.Log("text", [b"ck-alice", b"another-key", b"sk-hidden-key"])
    for shift in range(9):
        shown = log.redact("x" * shift + text + rest, most)
        assert len(shown) <= most
        assert "ck-ali" not in shown
        assert "ck-ali" not in urllib.parse.unquote(shown)


def test_a_key_that_is_encoded_more_than_once_is_masked():
    log = aiproxy.Log("text", [b"ck-alice"])
    text = "ck-alice"
    for _ in range(3):
        text = "".join("%%%02x" % ord(letter) for letter in text[:4]) + text[4:]
        assert log.redact("/v1/" + text, 256) == "/v1/***"


def test_a_key_that_begins_like_another_one_is_masked_whole():
    short, long = b"sk-team", b"sk-team-2secret"
    log = aiproxy.Log("text", [short])
    log.add_secrets([long])
    for keys in ([short, long], [long, short]):
        assert aiproxy.Log("text", keys).redact("key sk-team-2secret!", 99) == "key ***!"
        assert aiproxy.redact_message("sk-team-2secret", [key.decode() for key in keys]) == "***"
        body = aiproxy.MaskedBody(aiproxy.ContentLengthBody(None, 0), keys)
        assert body.mask(b"sk-team-2secret!") == b"*" * 15 + b"!"
        for cut in range(1, 17):
            body = aiproxy.MaskedBody(aiproxy.UntilCloseBody(None), keys)
            shown = body.mask(b" sk-team-2secret!"[:cut]) + body.mask(b" sk-team-2secret!"[cut:])
            assert shown == b" " + b"*" * 15 + b"!"
    assert log.redact("key sk-team-2secret!", 99) == "key ***!"


UNPRINTABLE = ["\r\n", "\x1b[2J", "\x00", "\x7f", "\x85", "\x9b31m", "\u2028", "\u202e", "\ud800"]


@pytest.mark.parametrize("text", UNPRINTABLE + ["%0d%0a", "%1B[2J"], ids=ascii)
def test_a_warning_is_one_line_whatever_it_tells(capsys, text):
    aiproxy.Log("text", [b"sk-team"]).warn("it said sk%2Dteam " + text + "f\u00fcr 1")
    warning = capsys.readouterr().err

    assert warning.startswith("aiproxy: it said *** ")
    assert warning.endswith("f\u00fcr 1\n")
    assert warning[:-1].isprintable()


def test_a_line_of_text_takes_its_fields_by_name():
    values = aiproxy.Record("127.0.0.1").as_dict(lambda text, most: text[:most])
    changed = {"region": "eu", **dict(reversed(list(values.items())))}
    assert aiproxy.text_line(changed) == aiproxy.text_line(values)
    assert aiproxy.text_line(values).startswith(values["time"] + " 127.0.0.1 - - - - upstream=- ")


def test_short_texts_are_logged_as_they_are():
    log = aiproxy.Log("text", [b"ck-alice"])
    assert log.redact("/v1/%41%", 256) == "/v1/%41%"
    assert log.redact("x" * 256, 256) == log.redact("x" * 999, 256) == "x" * 256


def test_to_mask_a_huge_text_costs_nothing():
    """Compared with one pass over it."""
    log = aiproxy.Log("text", [b"client-key-%d" % number for number in range(1000)])
    record = aiproxy.Record("127.0.0.1")
    record.path = "%41" * 5000
    record.model = "%41" * 10 ** 7
    began = time.process_time()
    record.model.count("x")
    one_pass = time.process_time() - began

    began = time.process_time()
    values = record.as_dict(log.redact)
    assert time.process_time() - began < one_pass
    assert len(values["model"]) == 100


# The path and the body of a request, where no rule reads it, and the model that is logged.
OUTBOUND = "/v1/audio/transcriptions"
FORM = (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n%b\r\n--b\r\n'
        b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--\r\n')
UNREAD = {
    "JSON": (CHAT, b'{"messages":[],"model" : "gpt-x"}', "gpt-x"),
    "quoted in a text": (CHAT, b'{"messages":["\\"model\\":\\"y\\""],"model":"gpt-x"}', "gpt-x"),
    "in a schema": (CHAT, b'{"tools":{"model":{"type":1}},"model":"\\u901a"}', "\u901a"),
    "far back": (CHAT, b'{"x":"' + b"y" * 200000 + b'","model":"gpt-x"}', "gpt-x"),
    "at a boundary": (CHAT, b'{"x":"' + b"y" * 65525 + b'","model":"gpt-x"}', "gpt-x"),
    "none": (CHAT, b'{"x":"model"}', ""),
    "too long": (CHAT, b'{"model":"' + b"y" * 3000 + b'"}', ""),
    "form": (OUTBOUND, FORM % b"RIFF", "whisper-1"),
    "form with a file": (OUTBOUND, FORM % (b"\xff\r\n" * 99999), "whisper-1"),
    "Gemini's path": ("/v1beta/models/gemini-x:generateContent", b'{"model":"y"}', "gemini-x"),
    "Gemini's new path": ("/v1/models/gemini-x:countTokens", b"{}", "gemini-x"),
    "Azure's path": ("/openai/deployments/gpt%2Dx/chat/completions", b"{}", "gpt-x"),
    "a model of the list": ("/v1/models/a/b:c", b"", "a/b:c"),
}


@pytest.mark.parametrize("path,body,model", list(UNREAD.values()), ids=list(UNREAD))
def test_the_model_is_logged_where_no_rule_reads_the_body(relay, path, body, model):
    running = relay()
    assert running.ask("POST", path, body).status == 200
    assert running.wait_for_record()["model"] == model


@pytest.mark.parametrize("piece", [
    b'"model":', b'"model" ', b'"model":"' + b"y" * 190 + b'\n', b'name="model"\r\n'])
def test_to_look_for_the_model_takes_linear_time(piece):
    finder = aiproxy.ModelFinder(aiproxy.Record("x"))
    data = piece * (65536 // len(piece))
    spent = []
    for rounds in (2, 2, 8):
        began = time.process_time()
        for _ in range(rounds):
            finder.observe(data)
        spent.append(time.process_time() - began)
    assert spent[-1] < 1


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("place", list(PLACES))
def test_no_key_is_logged_wherever_a_client_puts_it(program, place, key):
    path, model = PLACES[place](key)
    body = json.dumps({"model": model}).encode()
    (line,) = lines_of(program, lambda: ask(program, path=path, body=body))

    # without its last letter it is still almost the key
    assert key[:-1] not in line.replace('\\"', '"')
    assert program.form == "text" or json.loads(line)


def test_the_log_can_be_turned_off(upstream):
    with Program(env={"AIPROXY_UPSTREAM": upstream.url, "AIPROXY_LOG": "off"}) as program:
        assert ask(program).status == 200
        assert program.stop() == 0
        assert program.lines == []


def test_a_line_is_flushed_at_once_even_into_a_pipe(upstream):
    with Program(env={"AIPROXY_UPSTREAM": upstream.url, "PYTHONUNBUFFERED": ""}) as program:
        assert ask(program).status == 200
        program.wait_for_line(program.lines, "POST " + CHAT)


@pytest.mark.parametrize("path,body", [
    (CHAT, b'{"model":"refused"}'),
    ("/openai/deployments/refused/chat/completions", b"{}"),
])
def test_the_log_names_a_model_that_is_refused(upstream, relay, path, body):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MODELS="m", PATHS="*")
    reply = running.ask("POST", path, body, [("Authorization", "Bearer ck-alice")])

    assert reply.status == 403
    assert running.wait_for_record()["model"] == "refused"
