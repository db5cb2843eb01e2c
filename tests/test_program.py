"""The program as a whole: demo, banner, signals, health."""

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import aiproxy
from support import (CHAT, EVENT_HEAD, PATIENCE, PROGRAM, Client, Program, banner_of, chunk,
                     clean_environ, event, run_program)


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


def test_the_demo_works_whatever_is_set_for_another_provider():
    settings = {"AIPROXY_KEY_HEADER": "x-api-key", "AIPROXY_PATHS": "/v1/responses"}
    with Program("--demo", env=clean_environ(settings)) as program:
        program.wait_for_line(program.errors, "This answer comes from the small provider inside")


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
    pytest.param(
        {"AIPROXY_HOST": "0.0.0.0"},
        [r"listening on 0\.0\.0\.0, every address of this machine: others can reach it"],
        id="every address",
    ),
    pytest.param(
        {
            "AIPROXY_KEY": "sk-hidden-key",
            "AIPROXY_CLIENT_KEYS": "alice=ck-alice-012345,bob=ck-alice-0123456,ck-alice-2",
        },
        ["warning: client keys shorter than 16 characters can be guessed: alice, client3\n"],
        id="short client keys",
    ),
]


@pytest.mark.parametrize("env,shown", SHOWN)
def test_the_banner_shows_the_settings_in_force(env, shown):
    text = banner_of({"AIPROXY_UPSTREAM": "http://127.0.0.1:9", **env})
    assert "http://127.0.0.1:9" in text
    assert "curl " in text
    assert "sk-hidden" not in text
    assert "ck-alice" not in text
    for pattern in shown:
        assert re.search(pattern, text.replace("no key needed", "transparent")), pattern


def test_the_banner_does_not_speak_of_others_or_of_short_keys_without_need():
    text = banner_of({"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_CLIENT_KEYS": "a=ck-alice-0123456"})
    assert "listening" not in text
    assert "shorter" not in text


def test_the_banner_goes_to_stderr(upstream):
    environ = {"AIPROXY_UPSTREAM": upstream.url, "AIPROXY_KEY": "sk-hidden-key"}
    with Program(env=environ) as program:
        # the last line of the banner
        program.wait_for_line(program.errors, r'"stream": true')
        text = checked_output(program)
        assert upstream.url in text
        assert "curl -N %s/" % program.url in text
        assert program.lines == []


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
def test_memory_that_cannot_be_tuned_is_no_error(tmp_path, monkeypatch, code):
    (tmp_path / "ctypes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ctypes", raising=False)
    aiproxy.tune_malloc()


def test_it_starts_where_the_memory_cannot_be_tuned(tmp_path):
    (tmp_path / "ctypes.py").write_text(CTYPES["forbidden"])
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


# ---- stdout and stderr in any state


def run_shell(command, *arguments, env=None):
    """Run a line of sh in which "$@" is aiproxy.py with these arguments."""
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, PROGRAM, *arguments],
        env=clean_environ(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("option,command", [
    ("--help", '{ "$@"; echo $? >&2; } | head -c 0'),
    ("--check", '"$@" >&-; echo $? >&2'),
    ("--version", '"$@" <&- >&- ; echo $? >&2'),
    ("--help", '"$@" >/dev/full; echo $? >&2'),
])
def test_what_nobody_reads_is_no_error(option, command):
    assert run_shell(command, option).stderr == b"0\n"


def test_a_wrong_setting_is_status_2_though_nobody_reads_why():
    done = run_shell('"$@" 2>&-; echo $?', env={"AIPROXY_PORT": "x"})
    assert done.stdout == b"2\n"


class Streams:
    """What a program gets as its stdout or stderr, by name; and its port."""

    def reserve_port(self):
        """A port that nobody else gets until the program listens.

        On Linux two sockets may be bound to a port with SO_REUSEADDR while neither listens, as
        this one never does. Elsewhere it is only likely that the port stays free.
        """
        self.bound = socket.socket()
        self.bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bound.bind(("127.0.0.1", 0))
        port = self.bound.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self.bound.close()
        return port

    def closed(self):
        return None

    def nobody_listens(self):
        reader, writer = os.pipe()
        os.close(reader)
        return writer

    def disk_full(self):
        return os.open("/dev/full", os.O_WRONLY)

    def never_read(self):
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            pass
        os.set_blocking(writer, True)
        return writer

    def never_read_non_blocking(self):
        writer = self.never_read()
        os.set_blocking(writer, False)
        return writer

    def read_late_non_blocking(self):
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        return writer


STATES = [(1, "closed"), (1, "nobody_listens"), (1, "disk_full"), (1, "never_read"),
          (1, "never_read_non_blocking"), (2, "closed"), (2, "nobody_listens"), (2, "never_read")]


def start_with(upstream, number, state):
    """The program with its stdout or stderr, 1 or 2, in this state, the other one into a pipe.

    Returns the process, its address, and the Streams.
    """
    streams = Streams()
    port = streams.reserve_port()
    given = getattr(streams, state)()
    pipes = {1: subprocess.PIPE, 2: subprocess.PIPE}
    redirection = ""
    if given is None:
        redirection = " %d>&-" % number
    else:
        pipes[number] = given

    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@"' + redirection, "sh", sys.executable, PROGRAM],
        env=clean_environ({
            "AIPROXY_UPSTREAM": upstream.url, "AIPROXY_PORT": str(port), "AIPROXY_GRACE": "0"}),
        stdin=subprocess.DEVNULL, stdout=pipes[1], stderr=pipes[2])
    if given is not None:
        os.close(given)
    return process, ("127.0.0.1", port), streams


def connect_when_it_listens(address):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return Client(address)
        except ConnectionError:
            time.sleep(0.02)
    return pytest.fail("it does not listen")


@pytest.mark.parametrize("number,state", STATES)
def test_it_serves_and_ends_whatever_its_streams_are(upstream, number, state):
    process, address, _ = start_with(upstream, number, state)
    with process:
        try:
            with connect_when_it_listens(address) as client:
                for _ in range(20):
                    client.request("POST", CHAT, b"{}")
                    assert client.read_reply().status == 200
            begin = time.monotonic()
            process.terminate()
            output, errors = process.communicate(timeout=PATIENCE)
            assert time.monotonic() - begin < 20
        finally:
            process.kill()

    assert process.returncode == 0
    # whoever reads one of them misses nothing because of the other
    if number == 1:
        assert b" on http://" in errors
        assert b"Traceback" not in errors
        assert b"Exception" not in errors
    else:
        assert output.count(b"POST " + CHAT.encode()) == 20


def test_no_line_is_lost_in_a_non_blocking_pipe_that_is_read_late(upstream):
    process, address, streams = start_with(upstream, 1, "read_late_non_blocking")
    path = "/" + "a" * 240
    with process:
        try:
            with connect_when_it_listens(address) as client:
                for _ in range(400):
                    client.request("GET", path)
                    assert client.read_reply().status == 200

            seen = b""
            while seen.count(b"\n") < 400:
                seen += os.read(streams.reader, 65536)
            assert len(seen) > 65536
            assert {line.split()[3] for line in seen.splitlines()} == {path.encode()}
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


# ---- the process cannot start, or cannot end, as it should


def run_patched(code, env=None):
    """Run the program after `code` has changed Python's library or the program."""
    code = "import os, signal, socket, sys, threading, aiproxy\n%s\nsys.exit(aiproxy.main())" % code
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environ({
            "AIPROXY_PORT": "0", "PYTHONPATH": os.path.dirname(PROGRAM), **(env or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        universal_newlines=True,
    )


FAULTS_AT_START = {
    "no descriptor": (
        "def fail(*a): raise OSError(24, os.strerror(24))\nsocket.socketpair = fail",
        "Too many open files"),
    "no thread": (
        "def fail(self): raise RuntimeError(\"can't start new thread\")\n"
        "threading.Thread.start = fail",
        "can't start new thread"),
}


@pytest.mark.parametrize("code,reason", FAULTS_AT_START.values(), ids=list(FAULTS_AT_START))
def test_what_it_lacks_at_the_start_is_told_in_one_line(code, reason):
    done = run_patched(code)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr
    assert "listen" not in done.stderr


def test_a_host_that_is_no_name_is_reported_as_one():
    settings = aiproxy.Settings({"AIPROXY_HOST": "a..b"})
    with pytest.raises(OSError) as raised:
        aiproxy.Server(settings)
    assert str(raised.value).startswith("cannot listen on AIPROXY_HOST port 8000: ")


def test_a_port_that_is_taken_is_reported_with_its_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = aiproxy.Settings({"AIPROXY_HOST": "127.0.0.1", "AIPROXY_PORT": str(port)})
        with pytest.raises(OSError) as raised:
            aiproxy.open_listener(settings)
    assert str(raised.value).startswith("cannot listen on 127.0.0.1 port %d: " % port)


def test_a_fault_after_a_signal_is_reported_and_the_status_is_1():
    fail = "def stop(server): raise MemoryError('as told')\naiproxy.Server.stop = stop\n"
    kill = "def banner(server): os.kill(os.getpid(), signal.SIGTERM)\naiproxy.print_banner = banner"
    done = run_patched(fail + kill)

    assert done.returncode == 1
    assert "aiproxy: fault: MemoryError: as told at serve:" in done.stderr
    assert "stop:2\n" in done.stderr


def test_it_is_written_so_that_an_older_python_can_say_that_it_is_too_old():
    with open(PROGRAM, encoding="utf-8") as file:
        tree = ast.parse(file.read(), feature_version=(3, 5))

    # the docstring, `import sys`, the check
    _, first, check = tree.body[:3]
    assert [alias.name for alias in first.names] == ["sys"]
    assert "version_info" in ast.dump(check)


def test_an_older_python_says_in_one_line_that_it_is_too_old():
    found = [shutil.which("python" + version) for version in ("3.5", "3.6", "3.7")]
    for python in filter(None, found):
        done = subprocess.run([python, PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if b"pyenv" not in done.stderr:     # which only stands in for it
            break
    else:
        pytest.skip("no older Python here")

    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1
    assert b"needs Python 3.8" in done.stderr


# ---- the relay loop


def test_a_relay_whose_loop_has_died_is_not_healthy(relay, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    running = relay()
    loop = running.server.relay_loop
    assert running.ask("GET", "/health").status == 200

    loop.run_step = None       # the next thing that it does ends it
    loop.join(PATIENCE)
    reply = running.ask("GET", "/health")

    assert reply.status == 503
    assert reply.json["status"] == "unhealthy"


def test_a_relay_whose_selector_no_longer_works_is_not_healthy(relay, monkeypatch):
    running = relay()
    loop = running.server.relay_loop
    calls = []

    def select(seconds):
        calls.append(seconds)
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(loop.selector, "select", select)
    monkeypatch.setattr(aiproxy, "LOOP_SECONDS", 0.1)
    deadline = time.monotonic() + PATIENCE
    while running.ask("GET", "/health").status == 200 and time.monotonic() < deadline:
        time.sleep(0.05)

    assert running.ask("GET", "/health").status == 503
    # it does not spin
    assert len(calls) < 20


def test_a_relay_whose_loop_waits_for_its_turn_is_healthy(relay, monkeypatch):
    """A burst of thousands of requests can keep the loop's thread waiting for seconds."""
    running = relay()
    monkeypatch.setattr(aiproxy, "LOOP_SECONDS", 0.001)
    time.sleep(0.01)

    assert running.ask("GET", "/health").status == 200


@pytest.fixture
def two_streams(upstream, relay):
    """Two clients in the middle of their streams; what ends them; the relay's loop."""
    gate = threading.Event()

    def answer(received):
        received.send(EVENT_HEAD + chunk(event("1")))
        assert gate.wait(PATIENCE)
        received.send(chunk(event("2")) + b"0\r\n\r\n")

    upstream.answer = answer
    running = relay()
    clients = [running.client(), running.client()]
    for client in clients:
        client.request("POST", CHAT, b"{}")
        assert client.read_head().status == 200
        assert client.read_chunk() == event("1")
    yield running, clients, gate
    gate.set()
    for client in clients:
        client.sock.close()


def jobs_of(running, clients):
    """The two jobs, in the order of the clients."""
    loop = running.server.relay_loop
    deadline = time.monotonic() + PATIENCE
    while len(loop.masks) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    by_client = {job.client.sock.getpeername(): job for job in loop.jobs}
    return loop, [by_client[client.sock.getsockname()] for client in clients]


def fail_for(connection, function):
    """`function`, with an OSError for this connection."""

    def call(other, *args):
        if other is connection:
            raise OSError(28, "No space left on device")
        return function(other, *args)

    return call


@pytest.mark.parametrize("name", ["modify", "unregister"])
def test_an_error_of_the_selector_ends_one_job_and_not_the_loop(two_streams, monkeypatch, name):
    running, (first, second), gate = two_streams
    loop, (bad, _) = jobs_of(running, (first, second))
    monkeypatch.setattr(loop.selector, name, fail_for(bad.client, getattr(loop.selector, name)))
    bad.unsent = b"x"       # so that the client is to be watched for more
    loop.submit(Caller(lambda: loop.run_step(bad.set_state, bad.BLOCKED)))
    gate.set()

    assert second.read_chunk() == event("2")
    assert second.read_chunk() == b""
    assert loop.is_alive()
    assert running.ask("POST", CHAT, b"{}").complete


def test_a_selector_that_takes_no_more_ends_only_what_is_new(two_streams, upstream, monkeypatch):
    running, clients, gate = two_streams
    loop, _ = jobs_of(running, clients)

    def register(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop.selector, "register", register)
        with running.client() as third:
            third.request("POST", CHAT, b"{}")
            reply = third.read_reply()
        assert reply.status == 200
        assert not reply.complete
        assert running.wait_for_record()["outcome"] == "internal_error"

    gate.set()
    for client in clients:
        assert client.read_chunk() == event("2")
        assert client.read_chunk() == b""


def test_a_selector_that_fails_because_of_one_descriptor_goes_on_without_it(
    two_streams, monkeypatch
):
    running, (first, second), gate = two_streams
    loop, (bad, _) = jobs_of(running, (first, second))
    select = loop.selector.select

    def fail_while_bad(seconds):
        if bad.state != bad.ENDED:
            raise OSError(9, "Bad file descriptor")
        return select(seconds)

    def receive():
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(bad.client, "receive", receive)
    monkeypatch.setattr(loop.selector, "select", fail_while_bad)
    gate.set()

    assert second.read_chunk() == event("2")
    assert second.read_chunk() == b""
    # What the loop was waiting for already may come first.
    assert bad.end_event.wait(PATIENCE)
    assert bad.state == bad.ENDED


class Caller(aiproxy.Job):
    """A job that calls something in the loop's thread."""

    def __init__(self, call):
        super().__init__()
        self.start = call

    def on_tick(self):
        pass
