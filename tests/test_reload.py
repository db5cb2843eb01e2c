"""New settings are put in force for the next request, and a running one keeps its own."""
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import aiproxy
from support import (
    CHAT, EVENT_HEAD, OK, PATIENCE, PROGRAM, Client, Program, Relay, Upstream, chunk,
    clean_environ, client_tls, event, make_certificate,
)

OLD = "ck-old-0123456789"
NEW = "ck-new-0123456789"


def auth(key):
    return [("Authorization", "Bearer " + key)]


def chat(address, key):
    with Client(address) as client:
        client.request("POST", CHAT, b'{"model":"m"}', auth(key))
        return client.read_reply()


class Reloadable:
    """A relay in this process, whose env file is `file`."""

    def __init__(self, path, monkeypatch, **settings):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        self.path = path
        self.write(**settings)
        self.options = aiproxy.make_parser().parse_args(["--env-file", str(path)])
        self.reloader = aiproxy.Reloader(self.options, os.environ)
        aiproxy.read_environment(self.options, os.environ)
        environ = {name[len("AIPROXY_"):]: value for name, value in os.environ.items()
                   if name.startswith("AIPROXY_")}
        self.relay = Relay(**environ)
        self.server = self.relay.server
        self.reloader.stamps = aiproxy.file_stamps(self.server.settings.watched_files)

    def write(self, **settings):
        lines = ["AIPROXY_%s=%s\n" % pair for pair in {"PORT": 0, **settings}.items()]
        self.path.write_text("".join(lines))

    def reload(self, **settings):
        self.write(**settings)
        self.reloader.reload(self.server, self.reloader.read)


@pytest.fixture
def reloadable(tmp_path, monkeypatch):
    started = []

    def start(**settings):
        started.append(Reloadable(tmp_path / "env", monkeypatch, **settings))
        return started[-1]

    yield start
    for one in started:
        one.relay.close()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_SIGHUP_revokes_a_client_key_while_a_stream_runs_and_a_wrong_file_changes_nothing(
    tmp_path, upstream
):
    env = tmp_path / "env"
    gate = threading.Event()

    def answer(received):
        if b"stream" not in received.body:
            return received.send(OK)
        received.send(EVENT_HEAD + chunk(event("one")))
        gate.wait(PATIENCE)
        return received.send(chunk(event("two")) + b"0\r\n\r\n")

    def write(text):
        env.write_text("AIPROXY_UPSTREAM=%s\nAIPROXY_KEY=sk-hidden-key\n" % upstream.url + text)

    upstream.answer = answer
    write("AIPROXY_CLIENT_KEYS=one=%s\n" % OLD)
    with Program("--env-file", str(env)) as program:
        streamer, kept = Client(program.address), Client(program.address)
        streamer.request("POST", CHAT, b'{"stream":true}', auth(OLD))
        streamer.read_until(b"one\n\n")
        kept.request("POST", CHAT, b"{}", auth(OLD))
        assert kept.read_reply().status == 200

        write("AIPROXY_CLIENT_KEYS=two=%s\n" % NEW)
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line(program.errors, "are in force")
        kept.request("POST", CHAT, b"{}", auth(OLD))
        assert kept.read_reply().status == 401
        assert chat(program.address, NEW).status == 200

        gate.set()
        streamer.read_until(b"two\n\n")
        assert b"0\r\n\r\n" in streamer.read_until(b"0\r\n\r\n")

        write("AIPROXY_CLIENT_KEYS=three=ck-three-0123456789\nAIPROXY_RATE=often\n")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line(program.errors, "nothing has changed.*AIPROXY_RATE")
        assert chat(program.address, NEW).status == 200
        assert chat(program.address, "ck-three-0123456789").status == 401

        env.unlink()
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line(program.errors, "nothing has changed.*--env-file")
        assert program.stop() == 0
        for key in (OLD, NEW, "sk-hidden-key"):
            assert key not in "".join(program.errors + program.lines)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_SIGHUP_ends_no_program_that_has_no_env_file(upstream):
    with Program(env={"AIPROXY_UPSTREAM": upstream.url}) as program:
        program.process.send_signal(signal.SIGHUP)
        program.wait_for_line(program.errors, "there is no file to read settings from again")
        assert program.stop() == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
@pytest.mark.parametrize("is_on_stdin", [True, False], ids=["by hand", "nohup"])
def test_a_program_run_by_hand_ends_with_its_terminal(upstream, is_on_stdin):
    leader, terminal = os.openpty()
    command = [sys.executable, PROGRAM, "--upstream", upstream.url, "--port", "0"]
    process = subprocess.Popen(
        command, stdin=terminal if is_on_stdin else subprocess.DEVNULL, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, env=clean_environ(), universal_newlines=True)
    with process:
        os.close(terminal)
        while "try " not in process.stderr.readline():
            pass
        os.close(leader)
        process.send_signal(signal.SIGHUP)      # as the shell does when its window is closed
        if is_on_stdin:
            assert process.wait(PATIENCE) == 0
        else:
            said = "".join(process.stderr.readline() for _ in range(2))
            assert "there is no file to read settings from again" in said
            process.kill()


def test_everything_that_a_setting_decides_is_new(reloadable, upstream):
    with Upstream() as other:
        settings = {"CLIENT_KEYS": "ck-alice", "KEY": "sk-old-provider-key"}
        running = reloadable(UPSTREAM=upstream.url, **settings)
        assert running.relay.chat().status == 200
        settings.update(KEY="sk-new-provider-key", RATE="1/day", MODELS="m", ORIGINS="https://a.b",
                        MAX_TOKENS="5", MAX_BODY="1KB")
        running.reload(UPSTREAM=other.url, **settings)

        reply = running.relay.chat(fields=[("Origin", "https://a.b")])
        assert reply.status == 200
        assert reply.get("access-control-allow-origin") == "https://a.b"
        request = other.wait_for()
        assert request.field("authorization") == "Bearer sk-new-provider-key"
        assert b'"max_tokens": 5' in request.body
        assert running.relay.chat().code == "rate_limit_exceeded"
        assert len(upstream.received) == 1


def test_no_old_key_and_no_new_one_is_shown(reloadable, upstream):
    running = reloadable(UPSTREAM=upstream.url, CLIENT_KEYS=OLD, KEY="sk-old-provider-key")
    running.reload(UPSTREAM=upstream.url, CLIENT_KEYS=NEW, KEY="sk-new-provider-key")
    text = running.server.log.redact(
        "%s %s sk-old-provider-key sk-new-provider-key" % (OLD, NEW), 500)
    assert text == "*** *** *** ***"


def test_many_reloads_leave_nothing_behind(reloadable, upstream):
    """Each line of the log is searched for every secret that there has been."""
    one = reloadable(UPSTREAM=upstream.url, KEY="sk-hidden-0123", CLIENT_KEYS=OLD)
    before = list(one.server.log.secrets)

    for _ in range(5):
        one.reload(UPSTREAM=upstream.url, KEY="sk-hidden-0123", CLIENT_KEYS=OLD)

    assert one.server.log.secrets == before


def test_the_old_upstream_keeps_no_connection(reloadable, upstream):
    running = reloadable(UPSTREAM=upstream.url)
    running.relay.chat()
    received = upstream.wait_for()
    running.reload(UPSTREAM=upstream.url)
    assert received.wait_closed() is not None
    assert running.relay.chat().status == 200


def test_the_listener_and_its_guards_stay_until_a_restart(reloadable, upstream, capfd):
    keys = {"UPSTREAM": upstream.url, "KEY": "sk-hidden-key"}
    running = reloadable(HOST="0.0.0.0", CLIENT_KEYS=OLD, **keys)
    # For loopback this would be allowed, but we still listen for everybody.
    running.reload(HOST="127.0.0.1", **keys)
    assert "nothing has changed" in capfd.readouterr().err
    assert running.relay.chat(key=None).status == 401

    running.reload(HOST="127.0.0.1", CLIENT_KEYS=NEW, MAX_CONNECTIONS=7, **keys)
    assert running.relay.chat(key=NEW).status == 200
    assert "AIPROXY_HOST, AIPROXY_MAX_CONNECTIONS needs a restart" in capfd.readouterr().err
    assert running.server.settings.host == "0.0.0.0"


def test_a_failed_reload_leaves_the_environment_as_it_was(reloadable, upstream):
    running = reloadable(UPSTREAM=upstream.url, MAX_TOKENS="5")
    running.reload(UPSTREAM=upstream.url, MAX_TOKENS="6", RATE="often")
    assert os.environ["AIPROXY_MAX_TOKENS"] == "5"
    assert "AIPROXY_RATE" not in os.environ


def test_another_kind_of_upstream_needs_a_restart(reloadable, upstream, capfd, monkeypatch):
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", "0" * 32)
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "cf-token-0123456789")
    running = reloadable(UPSTREAM=upstream.url)
    running.reload(UPSTREAM="workers-ai")
    assert "AIPROXY_UPSTREAM: this change of the provider needs a restart" in (
        capfd.readouterr().err)
    assert running.relay.chat().status == 200


def test_a_reload_names_what_the_environment_overrides(reloadable, upstream, monkeypatch, capsys):
    monkeypatch.setenv("AIPROXY_LOG", "off")
    running = reloadable(UPSTREAM=upstream.url)
    running.reload(UPSTREAM=upstream.url, LOG="json")

    told = "aiproxy: AIPROXY_LOG: the environment overrides --env-file\n"
    assert capsys.readouterr().err.endswith(told)
    running.reload(UPSTREAM=upstream.url, LOG="off")
    assert "overrides" not in capsys.readouterr().err


# -- certificates

def copy(pair, folder):
    paths = folder / "cert.pem", folder / "key.pem"
    for path, text in zip(paths, pair):
        path.write_text(text)
    return {"TLS_CERT": str(paths[0]), "TLS_KEY": str(paths[1])}


def make_pairs(folder):
    """The texts of two certificates, each with its key."""
    pairs = []
    for name in ("one", "two"):
        paths = make_certificate(str(folder), key=name)
        pairs.append([open(path).read() for path in paths])
    return pairs


def served_certificate(address):
    with client_tls().wrap_socket(socket.create_connection(address)) as sock:
        return sock.getpeercert(True)


def test_a_renewed_certificate_is_served_without_a_dropped_connection(
    reloadable, upstream, tmp_path, monkeypatch
):
    pairs = make_pairs(tmp_path)
    running = reloadable(UPSTREAM=upstream.url, **copy(pairs[0], tmp_path))
    relay = running.relay
    first = served_certificate(relay.address)
    watch(running, monkeypatch)

    with relay.client() as client:
        client.request("GET", "/health")
        assert client.read_reply().status == 200
        copy([pairs[1][0], pairs[0][1]], tmp_path)      # half-written
        watch(running, monkeypatch)
        assert served_certificate(relay.address) == first
        copy(pairs[1], tmp_path)
        watch(running, monkeypatch)
        assert served_certificate(relay.address) != first
        client.request("GET", "/health")
        assert client.read_reply().status == 200


def test_a_renewed_certificate_puts_nothing_else_in_force(
    reloadable, upstream, tmp_path, monkeypatch
):
    """Whoever edits a key's file says when it is ready. Until then all workers have the old one."""
    keys = tmp_path / "keys"
    keys.write_text("one=%s\n" % OLD)
    pairs = make_pairs(tmp_path)
    files = copy(pairs[0], tmp_path)
    running = reloadable(
        UPSTREAM=upstream.url, KEY="sk-hidden-0123", CLIENT_KEYS_FILE=keys, **files)
    first = served_certificate(running.relay.address)
    keys.write_text("one=%s\n" % NEW)
    copy(pairs[1], tmp_path)
    watch(running, monkeypatch)
    assert served_certificate(running.relay.address) != first
    assert running.relay.chat(key=OLD).status == 200
    assert running.relay.chat(key=NEW).status == 401

    running.reloader.reload(running.server, running.reloader.read)
    assert running.relay.chat(key=NEW).status == 200


def test_a_certificate_that_could_not_be_read_is_read_at_the_next_look(
    reloadable, upstream, tmp_path, monkeypatch
):
    pairs = make_pairs(tmp_path)
    running = reloadable(UPSTREAM=upstream.url, **copy(pairs[0], tmp_path))
    first = served_certificate(running.relay.address)
    copy(pairs[1], tmp_path)
    read_file = aiproxy.read_file
    monkeypatch.setattr(aiproxy, "read_file", lambda *arguments: b"")       # for a moment
    watch(running, monkeypatch)
    assert served_certificate(running.relay.address) == first
    monkeypatch.setattr(aiproxy, "read_file", read_file)
    watch(running, monkeypatch)
    assert served_certificate(running.relay.address) != first


def watch(running, monkeypatch):
    """Let a minute pass."""
    monkeypatch.setattr(aiproxy, "RELOAD_SECONDS", 0.001)
    running.reloader.wait(running.server)
