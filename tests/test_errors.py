"""Errors of our own have OpenAI's form and say what to do; errors of the upstream are its own, unless they would tell the key."""
import gzip
import json
import socket
import threading
import zlib

import pytest

import aiproxy
from support import CHAT, OK, PATIENCE

KEY = b"Authorization: Bearer ck-alice"
POST = b"POST /v1/chat/completions HTTP/1.1"
LISTED = {"MODELS": "small"}


def raw(line, *fields, body=b""):
    return b"\r\n".join((line, b"Host: 127.0.0.1:8000") + fields + (b"", body))


LADDER = [      # what a client sends, the status and the code of the refusal, and settings if it needs any
    pytest.param(raw(POST, b"Bad Field"), 400, "bad_request", {}, id="malformed field"),
    pytest.param(b"rubbish\r\n\r\n", 400, "bad_request", {}, id="rubbish"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "bad_request", {}, id="TLS to a plain port"),
    pytest.param(b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "bad_request", {}, id="no Host"),
    pytest.param(raw(b"GET /v1/../x HTTP/1.1", KEY), 400, "bad_request", {}, id="dot segments"),
    pytest.param(raw(POST, KEY, b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400, "bad_request", {}, id="two framings"),
    pytest.param(raw(b"TRACE / HTTP/1.1"), 405, "method_not_allowed", {}, id="TRACE"),
    pytest.param(raw(b"CONNECT x:443 HTTP/1.1"), 405, "method_not_allowed", {}, id="CONNECT"),
    pytest.param(b"GET /" + b"a" * 20000, 414, "bad_request", {}, id="long line"),
    pytest.param(raw(POST, KEY, b"Expect: a-miracle"), 417, "expectation_failed", {}, id="expectation"),
    pytest.param(raw(POST, *[b"X-%d: y" % number for number in range(200)]), 431, "bad_request", {}, id="many fields"),
    pytest.param(raw(POST, b"X: " + b"y" * 20000), 431, "bad_request", {}, id="long field"),
    pytest.param(raw(b"BREW / HTTP/1.1"), 501, "method_not_allowed", {}, id="unknown method"),
    pytest.param(raw(b"GET / HTTP/2.0"), 505, "version_not_supported", {}, id="HTTP/2"),
    pytest.param(raw(POST, b"Content-Length: 0").replace(b"127.0.0.1:8000", b"evil.example"), 403, "host_not_allowed", {"CLIENT_KEYS": ""}, id="host"),
    pytest.param(raw(POST, KEY, b"Origin: https://evil.example"), 403, "origin_not_allowed", {"ORIGINS": "https://app.example"}, id="origin"),
    pytest.param(raw(POST), 401, "invalid_api_key", {}, id="no client key"),
    pytest.param(raw(POST, KEY, b"x-api-key: other"), 400, "bad_request", {}, id="two keys"),
    pytest.param(raw(b"GET /v1/models?key=x HTTP/1.1", KEY), 400, "key_in_query", {}, id="key in query"),
    pytest.param(raw(b"GET /v1/files HTTP/1.1", KEY), 404, "not_found", {}, id="path"),
    pytest.param(raw(b"DELETE /v1/models HTTP/1.1", KEY), 405, "method_not_allowed", {}, id="method"),
    pytest.param(raw(b"GET /v1/models/large HTTP/1.1", KEY), 404, "model_not_found", LISTED, id="unknown model"),
    pytest.param(raw(POST, KEY, b"Content-Length: 11", body=b"x" * 11), 413, "request_too_large", {"MAX_BODY": "10"}, id="length above the limit"),
    pytest.param(raw(POST, KEY, b"Transfer-Encoding: chunked", body=b"b\r\n" + b"x" * 11), 413, "request_too_large", {"MAX_BODY": "10"}, id="chunks above the limit"),
    pytest.param(raw(POST, KEY, b"Content-Encoding: gzip", b"Content-Length: 1", body=b"x"), 415, "unsupported_encoding", LISTED, id="compressed"),
    pytest.param(raw(POST, KEY, b"Content-Length: 1", body=b"x"), 400, "invalid_json", LISTED, id="not JSON"),
    pytest.param(raw(POST, KEY, b"Content-Length: 2", body=b"{}"), 400, "missing_model", LISTED, id="no model"),
    pytest.param(raw(POST, KEY, b"Content-Length: 11", body=b'{"model":1}'), 400, "invalid_model", LISTED, id="bad model"),
    pytest.param(raw(POST, KEY, b"Content-Length: 13", body=b'{"model":"x"}'), 403, "model_not_allowed", LISTED, id="other model"),
]


def check_form(reply, status, code):
    """The reply is an error of our own, whole, in OpenAI's form, and tells no secret."""
    assert (reply.status, reply.code) == (status, code) and reply.complete and reply.get("content-type") == "application/json"
    assert set(reply.json) == {"error"} and set(reply.json["error"]) == {"message", "type", "param", "code"}
    error = reply.json["error"]
    assert error["type"] == ("server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error")
    assert len(error["message"]) > 10 and error["param"] == ("model" if "model" in code else None)
    assert reply.get("x-request-id") and b"sk-hidden" not in reply.raw_head + reply.body and b"ck-alice" not in reply.raw_head + reply.body


@pytest.mark.parametrize("data,status,code,settings", LADDER)
def test_every_refusal_has_the_form_of_openai(upstream, relay, data, status, code, settings):
    running = relay(**{"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", **settings})
    with running.client() as client:
        client.send(data)
        reply = client.read_reply()
        check_form(reply, status, code)
        assert client.ended()
    assert not upstream.received
    assert running.wait_for_record()["outcome"] == code and running.records[0]["status"] == status
    if status == 405:
        assert "POST" in reply.get("allow") or "GET" in reply.get("allow")


@pytest.mark.parametrize("name", ["AIPROXY_OPEN", "AIPROXY_CLIENT_KEYS"])
def test_a_refused_host_is_told_what_would_help(relay, name):
    assert name in relay(KEY="sk-hidden-key").ask("GET", "/v1/models", None, [("Host", "proxy.example")]).json["error"]["message"]


@pytest.mark.parametrize("data", [POST, raw(POST, KEY, b"Content-Length: 100", body=b"x")], ids=["head", "body"])
def test_a_request_that_never_becomes_whole_is_given_up(upstream, relay, monkeypatch, data):
    for name in ("HEAD_SECONDS", "BODY_GRACE"):
        monkeypatch.setattr(aiproxy, name, 0.2)
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", **LISTED)
    with running.client() as client:
        client.send(data)
        check_form(client.read_reply(), 408, "request_timeout")
        assert client.ended() and not upstream.received


def test_one_client_too_many_is_told_so(upstream, relay):
    gate = threading.Event()
    upstream.answer = lambda received: (gate.wait(PATIENCE), received.send(OK))
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", MAX_CONNECTIONS=1)
    with running.client() as first:
        first.request("POST", CHAT, b"{}", [("x-api-key", "ck-alice")])
        upstream.wait_for()
        reply = running.ask("GET", "/health")
        check_form(reply, 503, "server_busy")
        assert int(reply.get("retry-after")) >= 1 and reply.get("access-control-allow-origin") == "*"
        gate.set()
        assert first.read_reply().status == 200
    assert running.wait_for_record()["outcome"] == "ok"


# -- the upstream is not what it should be


def hang_up(received):
    received.close()


def silent(received):
    received.wait_closed()


UPSTREAMS = [   # how the upstream behaves, the status and the code of the refusal
    pytest.param(hang_up, 502, "upstream_bad_response", id="hangs up"),
    pytest.param(lambda received: received.reset(), 502, "upstream_bad_response", id="resets"),
    pytest.param(lambda received: (received.send(b"HTTP/1.1 200 OK\r\nContent-"), received.close()), 502, "upstream_bad_response", id="hangs up in the head"),
    pytest.param(silent, 504, "upstream_timeout", id="silent"),
    pytest.param(lambda received: (received.send(b"HTTP/1.1 100 Continue\r\n\r\n"), silent(received)), 504, "upstream_timeout", id="silent after an interim answer"),
    pytest.param(b"SSH-2.0-OpenSSH_9.9\r\n\r\n", 502, "upstream_bad_response", id="no HTTP"),
    pytest.param(b"HTTP/2.0 200 OK\r\n\r\n", 502, "upstream_bad_response", id="HTTP/2"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 502, "upstream_bad_response", id="two lengths"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", 502, "upstream_bad_response", id="bad length"),
    pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: x\r\n\r\n", 502, "upstream_bad_response", id="bad length of no body"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 502, "upstream_bad_response", id="two framings"),
    pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 502, "upstream_bad_response", id="unknown framing"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", 502, "upstream_bad_response", id="folded field"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000, 502, "upstream_bad_response", id="endless head"),
    pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", 502, "upstream_bad_response", id="another protocol"),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 502, "upstream_bad_response", id="interim answers only"),
]


@pytest.mark.parametrize("answer,status,code", UPSTREAMS)
def test_an_upstream_that_gives_no_answer_is_named_as_the_cause(upstream, relay, answer, status, code):
    upstream.answer = answer
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", TIMEOUT="0.5")
    reply = running.chat()
    check_form(reply, status, code)
    assert reply.get("x-should-retry") is None and len(upstream.received) == 1
    assert running.wait_for_record()["outcome"] == code


def test_a_head_with_a_bad_length_is_no_answer(upstream, hidden):
    upstream.answer = b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"
    assert hidden.ask("HEAD", "/v1/models", None, [("x-api-key", "ck-alice")]).status == 502


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield "http://127.0.0.1:%d" % bound.getsockname()[1]


def test_an_upstream_that_is_down_is_unreachable(relay, nobody):
    check_form(relay(UPSTREAM=nobody, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat(), 502, "upstream_unreachable")


def test_a_name_that_does_not_exist_is_unreachable(relay, monkeypatch):
    original = socket.getaddrinfo

    def unknown(host, *rest):
        if host == "provider.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return original(host, *rest)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    reply = relay(UPSTREAM="https://provider.test", KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat()
    check_form(reply, 502, "upstream_unreachable")
    assert "Name or service not known" in reply.json["error"]["message"]


def test_a_handshake_that_does_not_end_is_a_timeout(relay):
    with socket.socket() as listener:               # it takes connections, and says nothing
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        reply = relay(UPSTREAM="https://127.0.0.1:%d" % listener.getsockname()[1], KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", CONNECT_TIMEOUT="0.2").chat()
    check_form(reply, 504, "upstream_timeout")
    assert "AIPROXY_CONNECT_TIMEOUT" in reply.json["error"]["message"]


def test_an_upstream_without_tls_needs_no_second_try(relay):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        plain = threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        plain.start()
        reply = relay(UPSTREAM="https://127.0.0.1:%d" % listener.getsockname()[1], KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat()
        plain.join()
    check_form(reply, 502, "upstream_tls_error")
    assert reply.get("x-should-retry") == "false"


# -- errors of the upstream, and the key in them

ERROR = json.dumps({"error": {"message": "Incorrect API key provided: sk-hidden-key.", "code": "invalid_api_key"}}).encode()
RAW_DEFLATE = zlib.compress(ERROR)[2:-4]
LONG = b" " * 60000 + ERROR
LEAKS = [       # an answer's status, its coding, its body
    pytest.param(401, b"", b"{}", id="401 alone"),
    pytest.param(401, b"", ERROR, id="401"),
    pytest.param(400, b"", ERROR, id="400"),
    pytest.param(403, b"", ERROR, id="403"),
    pytest.param(500, b"", ERROR, id="500"),
    pytest.param(400, b"", LONG, id="late"),
    pytest.param(400, b"gzip", gzip.compress(ERROR), id="gzip"),
    pytest.param(400, b"GZIP", gzip.compress(LONG), id="gzip, late"),
    pytest.param(400, b"deflate", zlib.compress(ERROR), id="deflate"),
    pytest.param(400, b"deflate", RAW_DEFLATE, id="deflate without wrapper"),
]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("status,coding,body", LEAKS)
def test_an_error_that_is_about_our_key_is_ours_to_tell(upstream, hidden, capfd, status, coding, body, framing):
    head = b"HTTP/1.1 %d Error\r\n%b" % (status, b"Content-Encoding: " + coding + b"\r\n" if coding else b"")
    pieces = {"length": [b"Content-Length: %d\r\n\r\n" % len(body), body[:50], body[50:]], "close": [b"Connection: close\r\n\r\n", body[:50], body[50:]],
              "chunked": [b"Transfer-Encoding: chunked\r\n\r\n"] + [b"%x\r\n%b\r\n" % (len(body[at:at + 30000]), body[at:at + 30000]) for at in range(0, len(body), 30000)] + [b"0\r\n\r\n"]}[framing]

    def answer(received):
        received.send(head + pieces[0])
        for piece in pieces[1:]:
            received.send(piece)
        if framing == "close":
            received.close()
    upstream.answer = answer
    reply = hidden.chat()
    check_form(reply, 502, "upstream_credentials_rejected")
    assert reply.get("x-should-retry") == "false" and "AIPROXY_KEY" in reply.json["error"]["message"]
    record = hidden.wait_for_record()
    assert (record["outcome"], record["upstream_status"], record["status"]) == ("upstream_credentials_rejected", status, 502)
    warned = capfd.readouterr()
    assert str(status) in warned.err and "sk-hidden" not in warned.err + warned.out


def test_a_key_in_the_reason_phrase_does_not_come_down(upstream, hidden):
    upstream.answer = b"HTTP/1.1 400 Bad key sk-hidden-key\r\nContent-Length: 2\r\n\r\n{}"
    reply = hidden.chat()
    assert b"sk-hidden" not in reply.raw_head


@pytest.mark.parametrize("coding,body", [(b"identity", b'{"error":{"message":"sk-hidden-ke"}}'), (b"gzip", gzip.compress(b"fine")), (b"gzip", b"not gzip"), (b"identity", b"x" * 200000)],
                         ids=["another key", "gzip", "broken gzip", "large"])
@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 529])
def test_every_other_error_is_relayed_untouched(upstream, hidden, status, coding, body):
    upstream.answer = b"HTTP/1.1 %d Theirs\r\nContent-Type: application/json\r\nRetry-After: 7\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (status, coding, len(body)) + body
    reply = hidden.chat()
    assert reply.status_line == "HTTP/1.1 %d Theirs" % status and reply.body == body and reply.complete
    assert reply.get("retry-after") == "7" and reply.get("content-encoding") == coding.decode() and hidden.wait_for_record()["outcome"] == "ok"


@pytest.mark.parametrize("status", [401, 403])
def test_in_a_transparent_relay_the_key_is_the_clients_own(upstream, relay, status):
    upstream.answer = b"HTTP/1.1 %d Error\r\nContent-Length: %d\r\n\r\n" % (status, len(ERROR)) + ERROR
    reply = relay().chat(key="sk-hidden-key")
    assert reply.status == status and reply.body == ERROR


def test_a_fault_of_ours_tells_its_place_and_not_its_values(upstream, relay, monkeypatch, capfd):
    def fail(self):
        raise ValueError("sk-hidden-key")
    monkeypatch.setattr(aiproxy.Handler, "check_path", fail)
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
    check_form(running.chat(), 500, "internal_error")
    assert running.wait_for_record()["outcome"] == "internal_error"
    told = capfd.readouterr().err
    assert "ValueError at " in told and "fail:" in told and "sk-hidden" not in told and "Traceback" not in told
