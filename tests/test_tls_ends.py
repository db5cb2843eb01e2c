"""A response over TLS that ends with its connection: an end without close_notify is a cut.

Unless the API itself has said that the stream is over: some providers' edges close so.
"""
import socket
import ssl
import threading

import pytest

import aiproxy
from support import CHAT, PATIENCE, Upstream, client_tls, make_certificate, server_tls

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
DELTA = b'data: {"delta":"hello"}\n\n'
LONG = b'"response":{"text":"' + b"x" * 70000 + b'"}}\n\n'

FINAL_EVENTS = {
    "[DONE] with an id": b"id: 7\nevent: end\ndata: [DONE]\n\n",
    "response.incomplete": b'event: response.incomplete\ndata: {"type":"response.incomplete"}\n\n',
    "response.failed": b'data: {"type": "response.failed"}\n\n',
    "[DONE]": b"data: [DONE]\n\n",
    "[DONE] with CRLF": b"data:[DONE]\r\n\r\n",
    "message_stop": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "response.completed": (
        b'event: response.completed\ndata: {"type":"response.completed",' + LONG),
    "response.completed without its name": b'data: {"type": "response.completed",' + LONG,
}
OTHER_EVENTS = {
    "none": b"",
    "half of [DONE]": b"data: [DONE",
    "[DONE] without its empty line": b"data: [DONE]\n",
    "[DONE] inside a delta": b'data: {"delta":"data: [DONE]"}\n\n',
    "an event after [DONE]": b"data: [DONE]\n\n" + DELTA,
    "message_stop inside a delta": b'data: {"delta":"{\\"type\\":\\"message_stop\\"}"}\n\n',
    "half of response.completed": b'data: {"type": "response.completed",' + LONG[:-2],
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(str(tmp_path_factory.mktemp("certificate")))


def stream(certificate, relay, monkeypatch, end, how, head=HEAD):
    """The reply to one request whose response's last bytes are `end`."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with Upstream(tls=server_tls(*certificate)) as upstream:

        def answer(received):
            received.send(head + DELTA)
            received.send(end)
            if how == "close_notify":
                received.connection.settimeout(0.5)
                try:
                    received.connection.unwrap()
                except (OSError, ssl.SSLError):
                    pass
            received.close()

        upstream.answer = answer
        running = relay(UPSTREAM=upstream.url)
        reply = running.chat()
        return reply, running.wait_for_record()["outcome"]


@pytest.mark.parametrize("end", list(FINAL_EVENTS.values()), ids=list(FINAL_EVENTS))
def test_a_stream_that_its_api_has_ended_is_whole(certificate, relay, monkeypatch, end):
    reply, outcome = stream(certificate, relay, monkeypatch, end, "no close_notify")

    assert (reply.complete, outcome) == (True, "ok")
    assert reply.body == DELTA + end


@pytest.mark.parametrize("end", list(OTHER_EVENTS.values()), ids=list(OTHER_EVENTS))
def test_any_other_end_without_close_notify_is_a_cut(certificate, relay, monkeypatch, end):
    reply, outcome = stream(certificate, relay, monkeypatch, end, "no close_notify")

    assert (reply.complete, outcome) == (False, "upstream_died")
    assert reply.body.startswith(DELTA + end)


def test_an_end_with_close_notify_is_an_end(certificate, relay, monkeypatch):
    reply, outcome = stream(certificate, relay, monkeypatch, b"", "close_notify")

    assert (reply.complete, outcome) == (True, "ok")


def test_a_body_that_is_no_stream_is_cut_without_close_notify(certificate, relay, monkeypatch):
    head = HEAD.replace(b"text/event-stream", b"text/plain")
    reply, outcome = stream(
        certificate, relay, monkeypatch, FINAL_EVENTS["[DONE]"], "no close_notify", head)

    assert (reply.complete, outcome) == (False, "upstream_died")


def test_a_heartbeat_behind_the_last_event_changes_nothing(certificate, relay, monkeypatch):
    gate = threading.Event()

    def end(received):
        received.send(HEAD + FINAL_EVENTS["[DONE]"])
        assert gate.wait(PATIENCE)
        received.close()

    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with Upstream(tls=server_tls(*certificate)) as upstream:
        upstream.answer = end
        running = relay(UPSTREAM=upstream.url, HEARTBEAT="0.1")
        with running.client() as client:
            client.request("POST", CHAT, b"{}")
            reply = client.read_head()
            assert client.read_chunk() == FINAL_EVENTS["[DONE]"]
            assert client.read_chunk().startswith(b":")
            gate.set()
            client.read_body(reply)

        assert reply.complete
        assert b"error" not in reply.body
        assert running.wait_for_record()["outcome"] == "ok"


def test_tls_keeps_back_no_bytes_that_no_selector_would_see(certificate):
    near, far = socket.socketpair()
    content = b"x" * 1000000

    def serve():
        with server_tls(*certificate).wrap_socket(far, server_side=True) as server:
            server.sendall(content)

    server = threading.Thread(target=serve)
    server.start()
    received = 0
    with client_tls().wrap_socket(near) as sock:
        connection = aiproxy.BufferedSocket(sock)
        while received < len(content):
            assert aiproxy.wait_ready(connection, aiproxy.READ, PATIENCE)
            received += len(connection.receive() or b"")
            assert sock.pending() == 0
    server.join(PATIENCE)
