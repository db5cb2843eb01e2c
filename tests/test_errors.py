"""Our own error responses have OpenAI's form and say what to do.

Error responses of the upstream are relayed as they are, unless they would reveal the provider key.
"""

import errno
import gzip
import json
import os
import socket
import threading
import time

import pytest

import aiproxy
from support import CHAT, EVENT_HEAD, OK, PATIENCE, Received, chunk, event

KEY = b"Authorization: Bearer ck-alice"
POST = b"POST /v1/chat/completions HTTP/1.1"
LISTED = {"MODELS": "small"}


def raw(line, *fields, body=b""):
    return b"\r\n".join((line, b"Host: 127.0.0.1:8000") + fields + (b"", body))


# What a client sends, the status and code of the response, and settings where needed.
REFUSED = [
    pytest.param(raw(POST, b"Bad Field"), 400, "bad_request", {}, id="malformed field"),
    pytest.param(b"rubbish\r\n\r\n", 400, "bad_request", {}, id="rubbish"),
    pytest.param(
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        400, "bad_request", {}, id="TLS to a plain port",
    ),
    pytest.param(b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "bad_request", {}, id="no Host"),
    pytest.param(raw(b"GET /v1/../x HTTP/1.1", KEY), 400, "bad_request", {}, id="dot segments"),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        400, "bad_request", {}, id="two framings",
    ),
    pytest.param(raw(b"TRACE / HTTP/1.1"), 405, "method_not_allowed", {}, id="TRACE"),
    pytest.param(raw(b"CONNECT x:443 HTTP/1.1"), 405, "method_not_allowed", {}, id="CONNECT"),
    pytest.param(b"GET /" + b"a" * 20000, 414, "bad_request", {}, id="long line"),
    pytest.param(
        raw(POST, KEY, b"Expect: a-miracle"),
        417, "expectation_failed", {}, id="expectation",
    ),
    pytest.param(
        raw(POST, *[b"X-%d: y" % number for number in range(200)]),
        431, "bad_request", {}, id="many fields",
    ),
    pytest.param(raw(POST, b"X: " + b"y" * 20000), 431, "bad_request", {}, id="long field"),
    pytest.param(raw(b"BREW / HTTP/1.1"), 501, "method_not_allowed", {}, id="unknown method"),
    pytest.param(raw(b"GET / HTTP/2.0"), 505, "version_not_supported", {}, id="HTTP/2"),
    pytest.param(
        raw(POST, b"Content-Length: 0").replace(b"127.0.0.1:8000", b"evil.example"),
        403, "host_not_allowed", {"CLIENT_KEYS": ""}, id="host",
    ),
    pytest.param(
        raw(POST, KEY, b"Origin: https://evil.example"),
        403, "origin_not_allowed", {"ORIGINS": "https://app.example"}, id="origin",
    ),
    pytest.param(raw(POST), 401, "invalid_api_key", {}, id="no client key"),
    pytest.param(raw(POST, KEY, b"x-api-key: other"), 400, "bad_request", {}, id="two keys"),
    pytest.param(
        raw(b"GET /v1/models?key=x HTTP/1.1", KEY),
        400, "key_in_query", {}, id="key in query",
    ),
    pytest.param(raw(b"GET /v1/files HTTP/1.1", KEY), 404, "not_found", {}, id="path"),
    pytest.param(
        raw(b"DELETE /v1/models HTTP/1.1", KEY),
        405, "method_not_allowed", {}, id="method",
    ),
    pytest.param(
        raw(b"GET /v1/models/large HTTP/1.1", KEY),
        404, "model_not_found", LISTED, id="unknown model",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 11", body=b"x" * 11),
        413, "request_too_large", {"MAX_BODY": "10"}, id="length above the limit",
    ),
    pytest.param(
        raw(POST, KEY, b"Transfer-Encoding: chunked", body=b"b\r\n" + b"x" * 11),
        413, "request_too_large", {"MAX_BODY": "10"}, id="chunks above the limit",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Encoding: gzip", b"Content-Length: 1", body=b"x"),
        415, "unsupported_encoding", LISTED, id="compressed",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 1", body=b"x"),
        400, "invalid_json", LISTED, id="not JSON",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 2", body=b"{}"),
        400, "missing_model", LISTED, id="no model",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 11", body=b'{"model":1}'),
        400, "invalid_model", LISTED, id="bad model",
    ),
    pytest.param(
        raw(POST, KEY, b"Content-Length: 13", body=b'{"model":"x"}'),
        403, "model_not_allowed", LISTED, id="other model",
    ),
]


def check_form(reply, status, code):
    """The reply is a complete error response of our own in OpenAI's form, without a secret."""
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error"

    assert (reply.status, reply.code) == (status, code)
    assert reply.complete
    assert reply.get("content-type") == "application/json"
    assert set(reply.json) == {"error"}

    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert len(error["message"]) > 10
    assert error["param"] == ("model" if "model" in code else None)

    assert reply.get("x-request-id")
    assert b"sk-hidden" not in reply.raw_head + reply.body
    assert b"ck-alice" not in reply.raw_head + reply.body


@pytest.mark.parametrize("data,status,code,settings", REFUSED)
def test_every_refusal_has_the_form_of_an_openai_error(
    upstream, relay, data, status, code, settings
):
    running = relay(**{"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", **settings})

    with running.client() as client:
        client.send(data)
        reply = client.read_reply()
        check_form(reply, status, code)
        assert client.ended()

    assert not upstream.received
    assert running.wait_for_record()["outcome"] == code
    assert running.records[0]["status"] == status
    if status == 405:
        assert "POST" in reply.get("allow") or "GET" in reply.get("allow")


# -- the forms of other APIs

MESSAGES = "/v1/messages"
GENERATE = "/v1beta/models/gemini-x:streamGenerateContent"
RESPONSES = "/v1/responses"
CLIENT = [("x-api-key", "ck-alice")]
WRONG = [("x-api-key", "ck-mallory")]
HELD = {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", "MODELS": "small"}
PATHS = "%s,%s,/v1/responses,/v1beta/models/*" % (MESSAGES, CHAT)

# The path, the fields and the body of a request, its status, and what Anthropic calls that.
ANTHROPIC = [
    pytest.param(MESSAGES, WRONG, b"{}", 401, "authentication_error", id="wrong key"),
    pytest.param(MESSAGES, CLIENT, b"{", 400, "invalid_request_error", id="no JSON"),
    pytest.param(
        MESSAGES + "?beta=true", CLIENT, b'{"model":"x"}', 403, "permission_error", id="model"),
    pytest.param(MESSAGES + "/batches", CLIENT, b"{}", 404, "not_found_error", id="path"),
    pytest.param("/v1" + MESSAGES, WRONG, b"{}", 401, "authentication_error", id="/v1/v1"),
    pytest.param(MESSAGES, CLIENT, b"x" * 99, 413, "request_too_large", id="size"),
    pytest.param(MESSAGES, CLIENT, b'{"model":"small"}', 502, "api_error", id="unreachable"),
]


@pytest.mark.parametrize("path,fields,body,status,kind", ANTHROPIC)
def test_an_error_on_the_messages_api_has_anthropics_form(
    relay, nobody, path, fields, body, status, kind
):
    running = relay(UPSTREAM=nobody, PATHS=PATHS, MAX_BODY="50", **HELD)
    reply = running.ask("POST", path, body, fields)

    assert reply.status == status
    assert reply.get("content-type") == "application/json"
    assert set(reply.json) == {"type", "error", "request_id"}
    assert reply.json["type"] == "error"
    assert reply.json["request_id"] == reply.get("x-request-id")
    assert set(reply.json["error"]) == {"type", "message"}
    assert reply.json["error"]["type"] == kind


@pytest.mark.parametrize("head,status", [
    (b"X Y: z\r\n\r\n", 400), (b"X: y\r\n" * 101 + b"\r\n", 431), (b"X: " + b"y" * 70000, 431),
    (b"Transfer-Encoding: x\r\n\r\n", 400), (b"Host: y\r\n\r\n", 400),
    (b"Expect: x\r\n\r\n", 417), (b"", 408)])
def test_a_broken_head_of_the_messages_api_has_anthropics_form_too(
    upstream, hidden, monkeypatch, head, status
):
    if status == 408:
        monkeypatch.setattr(aiproxy, "HEAD_SECONDS", 0.3)
    with hidden.client() as client:
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n" + head)
        reply = client.read_reply()
        assert client.ended()

    assert reply.status == status
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert reply.json["request_id"]
    assert hidden.wait_for_record()["path"] == MESSAGES
    assert not upstream.received


GOOGLE = [
    pytest.param(GENERATE, WRONG, b"{}", 401, "UNAUTHENTICATED", id="wrong key"),
    pytest.param(GENERATE + "?key=x", CLIENT, b"{}", 400, "INVALID_ARGUMENT", id="key in query"),
    pytest.param("/v1beta/files", CLIENT, b"{}", 404, "NOT_FOUND", id="path"),
    pytest.param("/v1/models/x:countTokens", CLIENT, b"{}", 404, "NOT_FOUND", id="/v1"),
    pytest.param(GENERATE, CLIENT, b"{}", 502, "UNAVAILABLE", id="unreachable"),
]


@pytest.mark.parametrize("path,fields,body,status,kind", GOOGLE)
def test_an_error_on_geminis_own_api_has_googles_form(
    relay, nobody, path, fields, body, status, kind
):
    settings = dict(HELD, MODELS="")
    reply = relay(UPSTREAM=nobody, PATHS=PATHS, **settings).ask("POST", path, body, fields)

    assert reply.status == status
    assert set(reply.json) == {"error"}
    assert set(reply.json["error"]) == {"code", "message", "status"}
    assert reply.json["error"]["code"] == status
    assert reply.json["error"]["status"] == kind


@pytest.mark.parametrize("path", [
    RESPONSES, "/v1/models", "/v1/models/llama3:8b", "/v1/models/llama3:latest",
    "/v1/threads/t/messages", "/v1/messagesx", "/v1/xmessages", "/x",
])
def test_an_error_anywhere_else_has_openais_form(hidden, path):
    assert hidden.ask("POST", path, b"{}").code == "invalid_api_key"


@pytest.mark.parametrize("field", ["x-api-key", "api-key", "x-goog-api-key", "Authorization"])
def test_a_wrong_client_key_is_called_incorrect_wherever_it_stands(hidden, field):
    value = "Bearer ck-mallory" if field == "Authorization" else "ck-mallory"
    reply = hidden.ask("POST", CHAT, b"{}", [(field, value)])
    assert "Incorrect" in reply.json["error"]["message"]


def last_event_of_a_cut_stream(upstream, running, path):
    """The name and the data of the event that ends a stream whose upstream dies."""
    def answer(received):
        received.send(EVENT_HEAD + chunk(event("one")))
        received.close()

    upstream.answer = answer
    reply = running.ask("POST", path, b"{}")
    assert not reply.complete
    first, last, end = reply.body.split(b"\n\n")
    assert (first, end) == (b"data: one", b"")
    name, _, data = last.rpartition(b"data: ")
    return name, json.loads(data)


def test_a_cut_stream_of_the_messages_api_ends_in_anthropics_event(upstream, relay):
    name, data = last_event_of_a_cut_stream(upstream, relay(), MESSAGES)
    assert name == b"event: error\n"
    assert data["type"] == "error"
    assert data["error"]["type"] == "api_error"
    assert data["error"]["message"]


def test_a_cut_stream_of_geminis_own_api_ends_in_googles_object(upstream, relay):
    name, data = last_event_of_a_cut_stream(upstream, relay(), GENERATE + "?alt=sse")
    assert name == b""
    # google-genai looks at how the JSON begins, and compares the code with numbers
    assert list(data) == ["error"]
    assert data["error"]["code"] == 502
    assert data["error"]["status"] == "UNAVAILABLE"


def test_a_cut_stream_of_the_responses_api_ends_in_an_event_that_its_clients_know(upstream, relay):
    name, data = last_event_of_a_cut_stream(upstream, relay(), RESPONSES)
    assert name == b"event: error\n"
    assert data["type"] == "error"
    assert data["code"] == data["error"]["code"] == "upstream_died"
    assert data["message"] == data["error"]["message"]
    assert isinstance(data["sequence_number"], int)


# -- who is refused for want of room

REFUSED_PAGES = [  # the origins allowed, and what the page of APP is told
    ("https://app.example", "https://app.example"), ("https://other.example", None), ("*", "*")]


@pytest.fixture
def crowded(relay):
    """start(**settings) returns a relay whose one place is taken."""
    clients = []

    def start(**settings):
        running = relay(MAX_CONNECTIONS=1, **settings)
        clients.append(running.client())
        clients[0].send(b"POST ")
        return running

    yield start
    clients[0].sock.close()


@pytest.mark.parametrize("origins,allowed", REFUSED_PAGES)
def test_a_page_can_read_that_there_is_no_room(crowded, origins, allowed):
    running = crowded(ORIGINS=origins, **HELD)
    reply = running.chat(fields=[("Origin", "https://app.example")])

    check_form(reply, 503, "server_busy")
    assert reply.get("access-control-allow-origin") == allowed
    record = running.wait_for_record()
    assert (record["status"], record["outcome"]) == (503, "server_busy")
    assert (record["method"], record["path"]) == ("POST", CHAT)


def test_an_sdk_can_read_that_there_is_no_room(crowded):
    reply = crowded(**HELD).ask("POST", MESSAGES, b"{}", CLIENT)
    assert reply.json["error"]["type"] == "overloaded_error"


NOT_WHOLE = [b"", b"POST /v1/messages HTTP/1.1\r\nHost: x", b"rubbish\r\n\r\n", b"x" * 70000]


@pytest.mark.parametrize("data", NOT_WHOLE, ids=["nothing", "a part", "rubbish", "no end"])
def test_whoever_sends_no_head_is_told_as_well(crowded, monkeypatch, data):
    monkeypatch.setattr(aiproxy, "BUSY_SECONDS", 0.05)
    with crowded(**HELD).client() as client:
        client.send(data)
        check_form(client.read_reply(), 503, "server_busy")


@pytest.mark.parametrize("name", ["AIPROXY_OPEN", "AIPROXY_CLIENT_KEYS"])
def test_the_refusal_of_a_host_says_which_settings_would_help(relay, name):
    running = relay(KEY="sk-hidden-key")
    reply = running.ask("GET", "/v1/models", None, [("Host", "proxy.example")])
    assert name in reply.json["error"]["message"]


INCOMPLETE = {"head": POST, "body": raw(POST, KEY, b"Content-Length: 100", body=b"x")}


@pytest.mark.parametrize("data", list(INCOMPLETE.values()), ids=list(INCOMPLETE))
def test_a_request_that_stays_incomplete_times_out(upstream, relay, monkeypatch, data):
    monkeypatch.setattr(aiproxy, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(aiproxy, "BODY_GRACE", 0.2)
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", **LISTED)

    with running.client() as client:
        client.send(data)
        check_form(client.read_reply(), 408, "request_timeout")
        assert client.ended()
        assert not upstream.received


def test_a_connection_above_the_limit_receives_503(upstream, relay):
    gate = threading.Event()

    def answer(received):
        gate.wait(PATIENCE)
        received.send(OK)

    upstream.answer = answer
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MAX_CONNECTIONS=1)

    with running.client() as first:
        first.request("POST", CHAT, b"{}", [("x-api-key", "ck-alice")])
        upstream.wait_for()

        reply = running.ask("GET", "/health")

        check_form(reply, 503, "server_busy")
        assert int(reply.get("retry-after")) >= 1
        assert reply.get("access-control-allow-origin") == "*"

        gate.set()
        assert first.read_reply().status == 200
    assert running.wait_for_record()["outcome"] == "server_busy"
    assert running.wait_for_record(2)["outcome"] == "ok"


# -- upstreams that are broken or not there


def close_in_the_head(received):
    received.send(b"HTTP/1.1 200 OK\r\nContent-")
    received.close()


def send_nothing(received):
    received.wait_closed()


def send_only_an_interim_response(received):
    received.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    received.wait_closed()


# How the upstream behaves, and the status and code of our response.
BROKEN_UPSTREAMS = [
    pytest.param(Received.close, 502, "upstream_bad_response", id="closes"),
    pytest.param(Received.reset, 502, "upstream_bad_response", id="resets"),
    pytest.param(close_in_the_head, 502, "upstream_bad_response", id="closes in the head"),
    pytest.param(send_nothing, 504, "upstream_timeout", id="silent"),
    pytest.param(
        send_only_an_interim_response,
        504, "upstream_timeout", id="silent after an interim response",
    ),
    pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n\r\n", 502, "upstream_bad_response", id="no HTTP"),
    pytest.param(b"HTTP/2.0 200 OK\r\n\r\n", 502, "upstream_bad_response", id="HTTP/2"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        502, "upstream_bad_response", id="two lengths",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        502, "upstream_bad_response", id="bad length",
    ),
    pytest.param(
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: x\r\n\r\n",
        502, "upstream_bad_response", id="bad length of no body",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        502, "upstream_bad_response", id="two framings",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        502, "upstream_bad_response", id="unknown framing",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        502, "upstream_bad_response", id="folded field",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000,
        502, "upstream_bad_response", id="endless head",
    ),
    pytest.param(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        502, "upstream_bad_response", id="another protocol",
    ),
    pytest.param(
        b"HTTP/1.1 100 Continue\r\n\r\n" * 101,
        502, "upstream_bad_response", id="interim responses only",
    ),
]


@pytest.mark.parametrize("answer,status,code", BROKEN_UPSTREAMS)
def test_an_upstream_without_a_good_response_is_named_as_the_cause(
    upstream, relay, answer, status, code
):
    upstream.answer = answer
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", TIMEOUT="0.5")

    reply = running.chat()

    check_form(reply, status, code)
    assert reply.get("x-should-retry") is None
    assert len(upstream.received) == 1
    assert running.wait_for_record()["outcome"] == code


def test_a_timeout_of_the_kernels_is_not_called_one_of_ours():
    """TCP gives up where nobody acknowledges; Python 3.10 made that a socket.timeout."""
    error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    lost = aiproxy.response_error(error)
    unreachable = aiproxy.connect_error(error)

    assert (lost.status, lost.code) == (502, "upstream_bad_response")
    assert (unreachable.status, unreachable.code) == (502, "upstream_unreachable")
    assert "timed out" in unreachable.message.lower()
    assert "AIPROXY_" not in lost.message + unreachable.message

    for make in (aiproxy.response_error, aiproxy.connect_error):
        assert make(aiproxy.TimedOut()).code == "upstream_timeout"


def test_a_malformed_length_in_a_response_to_HEAD_is_a_502(upstream, hidden):
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"
    reply = hidden.ask("HEAD", "/v1/models", None, [("x-api-key", "ck-alice")])
    assert reply.status == 502


@pytest.fixture
def nobody():
    """A URL at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield "http://127.0.0.1:%d" % bound.getsockname()[1]


def test_an_upstream_that_is_down_is_unreachable(relay, nobody):
    running = relay(UPSTREAM=nobody, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    check_form(running.chat(), 502, "upstream_unreachable")


def test_a_host_name_that_does_not_exist_is_unreachable(relay, monkeypatch):
    original = socket.getaddrinfo

    def getaddrinfo(host, *rest):
        if host == "provider.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return original(host, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    running = relay(UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

    reply = running.chat()

    check_form(reply, 502, "upstream_unreachable")
    assert "Name or service not known" in reply.json["error"]["message"]


def test_a_tls_handshake_that_does_not_end_times_out(relay):
    # The upstream accepts connections and sends nothing.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        running = relay(
            UPSTREAM="https://127.0.0.1:%d" % listener.getsockname()[1],
            KEY="sk-hidden-key",
            CLIENT_KEYS="ck-alice",
            CONNECT_TIMEOUT="0.2",
        )
        reply = running.chat()

    check_form(reply, 504, "upstream_timeout")
    assert "AIPROXY_CONNECT_TIMEOUT" in reply.json["error"]["message"]


def test_a_plain_upstream_behind_an_https_url_should_not_be_retried(relay):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)

        def answer_in_plain_text():
            listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        plain = threading.Thread(target=answer_in_plain_text)
        plain.start()
        running = relay(
            UPSTREAM="https://127.0.0.1:%d" % listener.getsockname()[1],
            KEY="sk-hidden-key",
            CLIENT_KEYS="ck-alice",
        )
        reply = running.chat()
        plain.join()

    check_form(reply, 502, "upstream_tls_error")
    assert reply.get("x-should-retry") == "false"


# -- error responses of the upstream, and the provider key in them

DETAILS = {"message": "Incorrect API key provided: sk-hidden-key.", "code": "invalid_api_key"}
ERROR = json.dumps({"error": DETAILS}).encode()
LONG = b" " * 60000 + ERROR
LEAKS = [  # status, content coding and body of the response
    pytest.param(401, b"", b"{}", id="401 alone"),
    pytest.param(401, b"", ERROR, id="401"),
    pytest.param(400, b"", ERROR, id="400"),
    pytest.param(403, b"", ERROR, id="403"),
    pytest.param(500, b"", ERROR, id="500"),
    pytest.param(400, b"", LONG, id="late"),
]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("status,coding,body", LEAKS)
def test_an_error_about_the_provider_key_is_replaced_by_our_own(
    upstream, hidden, capfd, status, coding, body, framing
):
    head = b"HTTP/1.1 %d Error\r\n" % status
    if coding:
        head += b"Content-Encoding: " + coding + b"\r\n"

    if framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        pieces = [body[:50], body[50:]]
    elif framing == "close":
        head += b"Connection: close\r\n\r\n"
        pieces = [body[:50], body[50:]]
    else:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        pieces = [chunk(body[start:start + 30000]) for start in range(0, len(body), 30000)]
        pieces.append(b"0\r\n\r\n")

    def answer(received):
        received.send(head)
        for piece in pieces:
            received.send(piece)
        if framing == "close":
            received.close()

    upstream.answer = answer

    reply = hidden.chat()

    check_form(reply, 502, "upstream_credentials_rejected")
    assert reply.get("x-should-retry") == "false"
    assert "AIPROXY_KEY" in reply.json["error"]["message"]

    record = hidden.wait_for_record()
    assert record["outcome"] == "upstream_credentials_rejected"
    assert record["upstream_status"] == status
    assert record["status"] == 502

    output = capfd.readouterr()
    assert str(status) in output.err
    assert "sk-hidden" not in output.err + output.out


def test_a_provider_key_in_the_reason_phrase_is_not_relayed(upstream, hidden):
    upstream.answer = b"HTTP/1.1 400 Bad key sk-hidden-key\r\nContent-Length: 2\r\n\r\n{}"
    reply = hidden.chat()
    assert b"sk-hidden" not in reply.raw_head


HARMLESS = [  # content coding and body of the response
    pytest.param(b"identity", b'{"error":{"message":"sk-hidden-ke"}}', id="another key"),
    pytest.param(b"identity", b"x" * 200000, id="large"),
]


@pytest.mark.parametrize("coding,body", HARMLESS)
@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 529])
def test_every_other_error_is_relayed_unchanged(upstream, hidden, status, coding, body):
    head = (
        b"HTTP/1.1 %d Reason\r\n"
        b"Content-Type: application/json\r\n"
        b"Retry-After: 7\r\n"
        b"Content-Encoding: %b\r\n"
        b"Content-Length: %d\r\n"
        b"\r\n"
    )
    upstream.answer = head % (status, coding, len(body)) + body

    reply = hidden.chat()

    assert reply.status_line == "HTTP/1.1 %d Reason" % status
    assert reply.body == body
    assert reply.complete
    assert reply.get("retry-after") == "7"
    assert reply.get("content-encoding") == coding.decode()
    assert hidden.wait_for_record()["outcome"] == "ok"


@pytest.mark.parametrize("status", [401, 403])
def test_a_transparent_relay_relays_errors_about_the_clients_key(upstream, relay, status):
    head = b"HTTP/1.1 %d Error\r\nContent-Length: %d\r\n\r\n" % (status, len(ERROR))
    upstream.answer = head + ERROR

    reply = relay().chat(key="sk-hidden-key")

    assert reply.status == status
    assert reply.body == ERROR


@pytest.mark.parametrize("kind", [ValueError, OSError, BlockingIOError, ConnectionResetError])
def test_an_internal_error_logs_its_place_and_not_its_values(
    upstream, relay, monkeypatch, capfd, kind
):
    def fail(self):
        raise kind("no place for sk-hidden-key")

    monkeypatch.setattr(aiproxy.Handler, "check_path", fail)
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")

    check_form(running.chat(), 500, "internal_error")

    assert running.wait_for_record()["outcome"] == "internal_error"
    output = capfd.readouterr().err
    assert kind.__name__ + ": no place for *** at " in output
    assert "fail:" in output
    assert "sk-hidden" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("step", ["fill", "send_some"])
def test_a_clients_broken_connection_is_no_internal_error(relay, monkeypatch, capfd, step):
    def fail(self, *data):
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    running = relay()
    monkeypatch.setattr(aiproxy.BufferedSocket, step, fail)
    with running.client() as client:
        client.request("GET", "/health")
        assert client.ended()

    if step == "send_some":
        assert running.wait_for_record()["outcome"] == "client_gone"
    assert "fault" not in capfd.readouterr().err


@pytest.mark.parametrize("where", ["before the head", "in the relay loop"])
def test_an_internal_error_while_relaying_is_logged_as_one(
    upstream, relay, monkeypatch, capfd, where
):
    in_the_loop = where == "in the relay loop"
    frame = aiproxy.ResponseJob.frame

    def fail(job, data):
        if data == b"late" or not in_the_loop:
            raise ValueError("sk-hidden-key")
        return frame(job, data)

    monkeypatch.setattr(aiproxy.ResponseJob, "frame", fail)
    head_received = threading.Event()

    def answer(received):
        received.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nearly")
        assert head_received.wait(PATIENCE) or not in_the_loop
        received.send(b"late")

    upstream.answer = answer
    running = relay()

    with running.client() as client:
        client.request("POST", CHAT, b"{}")
        reply = client.read_head()
        head_received.set()
        client.read_body(reply)

    record = running.wait_for_record()
    assert record["outcome"] == "internal_error"
    assert record["status"] == reply.status == (200 if in_the_loop else 500)
    assert not (in_the_loop and reply.complete)
    output = capfd.readouterr().err
    assert "ValueError: *** at " in output
    assert "sk-hidden" not in output


@pytest.mark.parametrize("error,message", [
    (OSError(24, "Too many open files"), "OSError: [Errno 24] Too many open files at "),
    (RuntimeError("can't start new thread"), "RuntimeError: can't start new thread at "),
    (KeyError("sk-proj-0123456789abcdef"), "KeyError: '***' at "),
    (ValueError("Bearer\tAIzaSyA0123 x"), "ValueError: Bearer\t*** x at "),
    (ValueError("\n" + "x" * 10 ** 6), "ValueError: "),
    (ValueError(), "ValueError at "),
])
def test_a_fault_has_a_message_without_what_may_be_a_key(error, message):
    text = aiproxy.format_traceback(error)
    assert text.startswith(message)
    assert len(text) < 300


SPELLINGS = [  # a secret, and how JSON may have it
    ("sk-hidden-key", b"sk-hidden-key"),
    ("sk-hidden-key", b"sk\\u002dhidden\\u002Dkey"),
    ("sk-hidden-key", b"\\u0073k-hidden-ke\\u0079"),
    ("sk/hidden/key", b"sk\\u002Fhidden\\/key"),
    ("sk/hidden+key", b"sk%2Fhidden%2Bkey"),
    ("sk/hidden+key", b"sk%2fhidden%2bkey"),
    ('sk"hidden', b'sk\\"hidden'),
    ("sk\\hidden", b"sk\\\\hidden"),
    ("sk\\hidden", b"sk\\u005chidden"),
    ("sk\\hidden", b"sk\\hidden"),
    ("u123", b"\\u123"),
    ("aab", b"aaab"),
]


@pytest.mark.parametrize("secret,text", SPELLINGS, ids=ascii)
def test_a_secret_is_found_wherever_it_is_cut_in_pieces(secret, text):
    harmless = text[:-1] + b"?" + text[:2]
    for cut in range(len(text)):
        pieces = aiproxy.SecretFilter([b"other", secret.encode()])
        passed = pieces.feed(harmless + text[:cut]) + pieces.feed(text[cut:] + b" ", is_end=True)
        assert pieces.found
        assert passed.startswith(harmless[:-2])
        assert secret.encode() not in passed
        assert secret.encode() not in aiproxy.unescape(passed)

    alone = aiproxy.SecretFilter([b"other", secret.encode()])
    letters = [harmless[place:place + 1] for place in range(len(harmless))]
    assert b"".join(map(alone.feed, letters)) + alone.feed(b"", is_end=True) == harmless
    assert not alone.found


FAR = b"x" * 70000


@pytest.mark.parametrize("status", [300, 302, 307, 400, 500])
@pytest.mark.parametrize("begin", [b"", b"x" * 65530, FAR, FAR * 3], ids=len)
def test_a_provider_key_never_comes_down_in_what_is_no_success(upstream, hidden, status, begin):
    body = begin + b"sk\\u002dhidden-key " + begin + b"sk-hidden-key"
    head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n"
    upstream.answer = head % (status, len(body)) + body

    reply = hidden.chat()

    assert b"hidden-key" not in reply.raw_head + reply.body
    assert reply.status == 502 or not reply.complete
    assert hidden.wait_for_record()["outcome"] == "upstream_credentials_rejected"


@pytest.mark.parametrize("codings", [
    b"Content-Encoding: gzip", b"Content-Encoding: identity\r\nContent-Encoding: br"])
@pytest.mark.parametrize("status", [302, 403, 500])
def test_an_error_that_cannot_be_searched_for_a_provider_key_does_not_come_down(
    upstream, hidden, status, codings
):
    """An upstream may compress although it was asked not to."""
    body = gzip.compress(b"Your key sk-hidden-key is bad")
    head = b"HTTP/1.1 %d X\r\n%b\r\nContent-Length: %d\r\n\r\n"
    upstream.answer = head % (status, codings, len(body)) + body

    reply = hidden.chat()

    assert reply.status == 502
    assert reply.json["error"]["code"] == "upstream_bad_response"
    assert str(status) in reply.json["error"]["message"]


@pytest.mark.parametrize("value", [
    "https://x.test/?key=sk-hidden-key", "https://x.test/?key=sk%2Dhidden%2dkey",
    '{"key": "sk\\u002dhidden-key"}', "%73%6b%2d%68idden-key"])
def test_a_provider_key_never_comes_down_in_a_head(upstream, hidden, value):
    head = "HTTP/1.1 200 %s\r\nX-Echo: %s\r\nX-Kept: 100%%25\r\nContent-Length: 0\r\n\r\n"
    upstream.answer = (head % (value, value)).encode()

    reply = hidden.chat()

    assert reply.status_line.strip() == "HTTP/1.1 200"
    assert reply.get("x-echo") is None
    assert reply.get("x-kept") == "100%25"


def test_looking_for_a_provider_key_takes_linear_time(upstream, hidden):
    body = b"sk-hidden-ke\\" * 80000 + b"\\" * 100000
    head = b"HTTP/1.1 500 X\r\nContent-Length: %d\r\n\r\n"
    upstream.answer = head % len(body) + body
    began = time.process_time()

    assert hidden.chat().body == body

    assert time.process_time() - began < 1


# -- an error response that trickles


def trickle(first, rest, gate):
    """An upstream's error of which the rest is sent once `gate` is set."""
    def answer(received):
        length = len(first) + len(rest)
        received.send(b"HTTP/1.1 500 Error\r\nContent-Length: %d\r\n\r\n" % length + first)
        assert gate.wait(PATIENCE)
        received.send(rest)
    return answer


def test_an_error_whose_chunks_are_malformed_is_cut_at_once(upstream, hidden):
    """Although its beginning, which is searched for our key, has been read by then."""
    def answer(received):
        received.send(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"it is "))
        time.sleep(0.1)
        received.send(b"no chunk\r\n")
        received.wait_closed()

    upstream.answer = answer
    reply = hidden.chat()

    assert (reply.status, reply.body, reply.complete) == (500, b"it is ", False)
    assert hidden.wait_for_record()["outcome"] == "upstream_died"


def test_an_error_response_that_trickles_is_not_withheld(upstream, hidden):
    gate = threading.Event()
    upstream.answer = trickle(b"it is ", b"broken", gate)

    with hidden.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
        reply = client.read_head()
        assert reply.status == 500
        assert client.read_exactly(6) == b"it is "
        gate.set()
        assert client.read_exactly(6) == b"broken"

    assert hidden.wait_for_record()["outcome"] == "ok"


KEYS_IN_PIECES = [  # a provider key, how an error has it, and where that is cut in two
    pytest.param("sk-hidden-key", b"sk-hidden-key", 0, id="whole"),
    pytest.param("sk-hidden-key", b"sk-hidden-key", 5, id="in two pieces"),
    pytest.param("sk/hidden/key", b"sk\\/hidden\\/key", 6, id="escaped as JSON may be"),
    pytest.param('sk"hidden"key', b'sk\\"hidden\\"key', 3, id="escaped as JSON must be"),
]


@pytest.mark.parametrize("key,text,place", KEYS_IN_PIECES)
def test_a_provider_key_late_in_an_error_is_cut_off(
    upstream, relay, monkeypatch, key, text, place
):
    """The head has gone down: what is left is to end the response where the key begins."""
    monkeypatch.setattr(aiproxy, "PREFETCH_SECONDS", 0.05)
    gate = threading.Event()
    running = relay(KEY=key, CLIENT_KEYS="ck-alice")
    upstream.answer = trickle(b"Your key " + text[:place], text[place:] + b" is bad", gate)

    with running.client() as client:
        client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-alice")])
        reply = client.read_head()
        assert client.read_exactly(9) == b"Your key "
        gate.set()
        client.read_body(reply)

    assert reply.status == 500
    assert reply.body == b""
    assert not reply.complete
    assert running.wait_for_record()["outcome"] == "upstream_credentials_rejected"
