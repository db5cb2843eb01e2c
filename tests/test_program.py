"""The program as a whole: demo, banner, signals, health."""

import re
import signal
import socket
import subprocess
import sys

import pytest

from support import CHAT, PATIENCE, PROGRAM, Client, Program, clean_environ, run_program


def checked_output(program):
    """All that the program has written; no traceback and no key must be in it."""
    text = "".join(program.errors + program.lines)

    assert "Traceback" not in text
    assert "Exception" not in text
    assert "sk-hidden" not in text
    assert "ck-alice" not in text

    return text


def ask(program, method="GET", path="/health", body=None, fields=()):
    with Client(program.address) as client:
        client.request(method, path, body, fields)
        return client.read_reply(method)


def test_the_demo_works_without_any_setting():
    with Program("--demo") as program:
        errors = program.errors
        program.wait_for_line(errors, r"This answer comes from the small provider inside aiproxy")
        first = program.wait_for_line(errors, r"First event after ([0-9]+) ms")
        command = program.wait_for_line(errors, r"curl .*%s%s" % (re.escape(program.url), CHAT))

        assert first
        assert command
        assert "YOUR_KEY" not in "".join(program.errors)

        chats = [
            (b'{"model":"demo","stream":true}', b"[DONE]"),
            (b'{"model":"demo"}', b'"chat.completion"'),
        ]
        for body, words in chats:
            reply = ask(program, "POST", CHAT, body)
            assert reply.status == 200
            assert reply.complete
            assert words in reply.body

        assert ask(program, "GET", "/v1/models").json["data"][0]["id"] == "demo"
        assert program.stop(signal.SIGINT) == 0

        checked_output(program)


def test_the_demo_provider_refuses_any_key_but_its_provider_key():
    with Program("--demo") as program:
        inside = program.wait_for_line(program.errors, r"upstream +http://127.0.0.1:(\d+)")
        with Client(("127.0.0.1", int(inside.group(1)))) as client:
            client.request("POST", CHAT, b'{"model":"demo"}', [("Authorization", "Bearer demo-0")])
            assert client.read_reply().status == 401


# Settings, and what the banner shows.
SHOWN = [
    pytest.param(
        {},
        [
            "transparent",
            "models +all",
            "paths +all",
            "client keys +none",
            "browsers are refused",
            "10s to connect",
            "600s of silence",
            "33554432 bytes",
            "1024 clients|leaves room for",
        ],
        id="no setting",
    ),
    pytest.param(
        {
            "AIPROXY_KEY": "sk-hidden-key",
            "AIPROXY_CLIENT_KEYS": "alice=ck-alice,ck-alice-2",
            "AIPROXY_MODELS": "small,big=other",
        },
        [
            "key hidden",
            "alice, client2",
            "small, big",
            "POST /v1/chat/completions",
            "origins +any",
            "Authorization: Bearer YOUR_KEY",
            '"model": "small"',
        ],
        id="provider key",
    ),
    pytest.param(
        {"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_OPEN": "1", "AIPROXY_MAX_TOKENS": "77"},
        ["warning: AIPROXY_OPEN", "rate 60/min", "tokens 77", "256 from an address"],
        id="open",
    ),
    pytest.param(
        {"VALID_API_KEYS": "sk-hidden-2", "API_KEY": "sk-hidden-3", "MODELS": "small"},
        [
            "warning: VALID_API_KEYS .*AIPROXY_CLIENT_KEYS",
            "warning: API_KEY .*AIPROXY_KEY",
            "warning: MODELS .*AIPROXY_MODELS",
        ],
        id="names of similar programs",
    ),
    pytest.param(
        {"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_ORIGINS": "*"},
        ["warning: AIPROXY_ORIGINS"],
        id="any page",
    ),
    pytest.param({"PORT": "1"}, ["warning: .*AIPROXY_HOST=0.0.0.0"], id="a platform"),
]


@pytest.mark.parametrize("env,shown", SHOWN)
def test_the_banner_shows_the_settings_in_force(upstream, env, shown):
    with Program(env={"AIPROXY_UPSTREAM": upstream.url, **env}) as program:
        # the last line of the banner
        program.wait_for_line(program.errors, r'"stream": true')
        text = checked_output(program)
        assert upstream.url in text
        assert program.url in text
        assert "curl " in text
        assert program.lines == []

        for pattern in shown:
            assert re.search(pattern, text.replace("no key needed", "transparent")), pattern


@pytest.mark.parametrize(
    "how",
    [["-m", "pdb", "-c", "continue"], ["-m", "cProfile"], []],
    ids=["a debugger", "a profiler", "no tool"],
)
def test_it_runs_under_a_debugger_and_a_profiler(how):
    process = subprocess.Popen(
        [sys.executable] + how + [PROGRAM],
        env=clean_environ({"AIPROXY_PORT": "0"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        assert b" on http://" in process.stderr.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0


# ctypes modules of a Python or a system on which the memory cannot be tuned.
CTYPES = {
    "missing": "raise ImportError",
    "forbidden": "raise MemoryError",
    "no library": "def CDLL(name): raise OSError",
    "no such name": "def CDLL(name): raise TypeError",
    "another library": "def CDLL(name): return object()",
}


@pytest.mark.parametrize("code", list(CTYPES.values()), ids=list(CTYPES))
def test_it_starts_where_the_memory_cannot_be_tuned(tmp_path, code):
    (tmp_path / "ctypes.py").write_text(code)
    with Program(env={"PYTHONPATH": str(tmp_path)}) as program:
        assert ask(program).status == 200
        assert program.stop() == 0
        checked_output(program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(upstream, number):
    environ = {"AIPROXY_UPSTREAM": upstream.url, "AIPROXY_KEY": "sk-hidden-key"}
    with Program(env=environ) as program, Client(program.address) as client:
        client.request("POST", CHAT, b"{}")
        assert client.read_reply().status == 200

        # the client is still connected, idle
        assert program.stop(number) == 0
        assert client.ended()

        checked_output(program)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_reported_in_one_line(address):
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = run_program(env={"AIPROXY_HOST": address, "AIPROXY_PORT": str(port)})

    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert str(port) in done.stderr
    assert "in use" in done.stderr


def test_an_address_of_another_machine_is_reported_in_one_line():
    # an address for documentation (RFC 5737)
    done = run_program(env={"AIPROXY_HOST": "192.0.2.1", "AIPROXY_PORT": "0"})

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "192.0.2.1" in done.stderr


@pytest.mark.parametrize("path", ["/health", "/healthz"])
def test_health_is_answered_while_the_upstream_is_down(relay, path):
    with socket.socket() as nobody:
        # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        running = relay(
            UPSTREAM="http://127.0.0.1:%d" % nobody.getsockname()[1],
            KEY="sk-hidden-key",
            CLIENT_KEYS="ck-alice",
            MODELS="small,big=other",
        )
        assert running.chat(b'{"model":"big"}').status == 502
        reply = running.ask("GET", path)

    assert reply.status == 200
    assert reply.json["status"] == "healthy"
    assert reply.json["timestamp"] > 1700000000
    # they are for clients that may list them
    assert "models" not in reply.json

    reply = running.ask("GET", path, None, [("x-api-key", "ck-alice")])

    assert reply.json["models"] == ["small", "big"]
    assert running.ask("HEAD", path).status == 200


@pytest.mark.parametrize("settings,fields,shown", [
    ({}, [], True),
    ({"KEY": "sk-hidden-key"}, [], True),
    ({"KEY": "sk-hidden-key"}, [("Host", "evil.example")], False),
    ({"KEY": "sk-hidden-key"}, [("Origin", "https://evil.example")], False),
    ({"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice"}, [("x-api-key", "wrong")], False),
], ids=["no provider key", "loopback", "another host", "another page", "wrong key"])
def test_health_shows_the_models_to_those_who_may_list_them(
    upstream, relay, settings, fields, shown
):
    reply = relay(MODELS="small", **settings).ask("GET", "/health", None, fields)

    assert reply.status == 200
    assert ("models" in reply.json) == shown
    assert not upstream.received


def test_clients_that_reset_their_connections_cause_no_output(upstream):
    environ = {
        "AIPROXY_UPSTREAM": upstream.url,
        "AIPROXY_KEY": "sk-hidden-key",
        "AIPROXY_LOG": "off",
    }
    with Program(env=environ) as program:
        for number in range(60):
            fields = [("Connection", "close")] if number % 2 else []
            with Client(program.address) as client:
                if number % 3:
                    client.request("POST", CHAT, b"{}", fields)
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        assert ask(program).status == 200
        assert program.stop() == 0
        checked_output(program)


def test_after_many_disconnects_every_place_is_free_again(relay):
    running = relay(MAX_CONNECTIONS=4)
    for _ in range(100):
        with running.client() as client:
            client.request("GET", "/health", None, [("Connection", "close")])
            client.more()
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with running.server.client_ended:
        assert running.server.client_ended.wait_for(lambda: not running.server.clients, 20)

    assert running.ask("GET", "/health").status == 200
