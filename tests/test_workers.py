"""Several processes share the listener: clients spread evenly, and a worker that dies is replaced.

The parent serves nobody. It passes signals on and ends when all workers have ended.
"""
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
from byhand import ByHand
from support import (
    CHAT, EVENT_HEAD, PATIENCE, PROGRAM, Client, Program, children, chunk, clean_environ,
    client_tls, event, make_certificate, process_state, sockets_of)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks into /proc")


def wait_until(holds, what):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_running(process):
    return process_state(process) not in (None, "Z")


def workers_of(clients, processes):
    """For each of the clients which of the processes has the other end of its connection."""
    with open("/proc/net/tcp") as file:         # slow where there are many connections
        inodes = {words[2]: words[9] for words in map(str.split, file)}
    owners = {inode: process for process in processes for inode in sockets_of(process)}
    ends = ["0100007F:%04X" % client.sock.getsockname()[1] for client in clients]
    return [owners.get(inodes.get(end)) for end in ends]


@pytest.fixture
def by_hand():
    with ByHand() as upstream:
        yield upstream


class Workers:
    """The program with two workers in front of an upstream."""

    def __init__(self, upstream, **settings):
        environ = {"AIPROXY_" + name: value for name, value in settings.items()}
        self.program = Program(env={
            "AIPROXY_UPSTREAM": upstream.url, "AIPROXY_WORKERS": "2", **environ})
        self.process = self.program.process.pid
        wait_until(lambda: len(children(self.process)) == 2, "there are no two workers")
        self.pids = children(self.process)

    def ask(self, path="/health"):
        """A client that has been answered, and stays."""
        client = Client(self.program.address)
        client.request("GET", path)
        assert client.read_reply().status == 200
        return client

    def one_of(self, process):
        """A client of this worker: new ones go to each in turn, or nearly so."""
        for _ in range(20):
            clients = [self.ask() for _ in range(4)]
            for client, owner in zip(clients, workers_of(clients, self.pids)):
                if owner == process:
                    return client
                client.sock.close()
        raise AssertionError("it gets no client")


@pytest.fixture
def workers():
    started = []

    def start(upstream, **settings):
        started.append(Workers(upstream, **settings))
        return started[-1]

    yield start
    for one in started:
        one.program.__exit__()
        said = "".join(one.program.errors)
        assert "Traceback" not in said
        assert "fault" not in said


def test_clients_spread_over_the_workers(by_hand, workers):
    running = workers(by_hand)
    clients = [running.ask() for _ in range(40)]

    owners = workers_of(clients, running.pids)
    for client in clients:
        client.sock.close()

    assert min(owners.count(process) for process in running.pids) >= 10


def test_a_full_worker_leaves_new_clients_to_one_that_has_become_empty(by_hand, workers):
    crew = workers(by_hand, MAX_CONNECTIONS="4")
    full, empty = crew.pids
    clients = []
    while [owner for _, owner in clients].count(full) < 4:
        client = crew.ask()
        clients.append((client, *workers_of([client], crew.pids)))
    for client, owner in clients:
        if owner == empty:
            client.sock.close()
    time.sleep(0.5)             # in which it tells the others twice or more
    for _ in range(4):
        assert crew.ask()       # 200
    for client, _ in clients:
        client.sock.close()


def test_each_worker_stays_on_a_cpu_of_its_own(by_hand, workers):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU")
    sets = [os.sched_getaffinity(process) for process in workers(by_hand).pids]

    assert [len(cpus) for cpus in sets] == [1, 1]
    assert sets[0] != sets[1]


def test_the_banner_is_printed_once_and_tells_the_sums(by_hand, workers):
    running = workers(by_hand, RATE="50/s", MAX_CONNECTIONS="40")
    for _ in range(10):
        running.ask().sock.close()
    said = "".join(running.program.errors)

    assert said.count("aiproxy 1") == 1
    assert "2, each with these limits: 80 clients and 100/s in all" in said


def begin_stream(running, by_hand, process):
    client = running.one_of(process)
    client.request("POST", CHAT, b"{}")
    peer = by_hand.accept()
    peer.read_request_head()
    peer.send(EVENT_HEAD + chunk(event("1")))
    assert client.read_head().status == 200
    assert client.read_chunk() == event("1")
    return client, peer


def test_a_worker_that_dies_is_started_again_and_takes_no_other_with_it(by_hand, workers):
    running = workers(by_hand)
    dying, living = running.pids
    lost, _ = begin_stream(running, by_hand, dying)
    kept, peer = begin_stream(running, by_hand, living)

    os.kill(dying, signal.SIGKILL)

    assert lost.read_chunk() is None
    running.program.wait_for_line(running.program.errors, r"worker 1 has ended \(signal 9\)")
    wait_until(lambda: len(children(running.process)) == 2, "no worker has come in its place")
    running.pids = children(running.process)
    assert living in running.pids
    peer.send(chunk(event("2")) + b"0\r\n\r\n")
    assert kept.read_chunk() == event("2")
    assert kept.read_chunk() == b""
    replaced = next(process for process in running.pids if process != living)
    running.one_of(replaced).sock.close()


def test_a_worker_is_started_again_where_SIGCHLD_was_ignored(by_hand, workers):
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)      # what we start inherits it
    try:
        running = workers(by_hand)
    finally:
        signal.signal(signal.SIGCHLD, former)
    os.kill(running.pids[0], signal.SIGKILL)
    running.program.wait_for_line(running.program.errors, r"worker 1 has ended \(signal 9\)")
    wait_until(lambda: len(children(running.process)) == 2, "no worker has come in its place")
    assert running.program.stop(signal.SIGTERM) == 0


def test_a_worker_that_is_started_again_has_the_newest_certificate(by_hand, workers, tmp_path):
    paths = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    pairs = [make_certificate(str(tmp_path), key=name) for name in ("old", "new")]

    def put(pair):
        for path, source in zip(paths, pair):
            shutil.copy(source, path)

    def served():
        with client_tls().wrap_socket(socket.create_connection(running.program.address)) as sock:
            return sock.getpeercert(True)

    put(pairs[0])
    running = workers(by_hand, TLS_CERT=paths[0], TLS_KEY=paths[1])
    old = served()
    put(pairs[1])
    os.kill(running.pids[0], signal.SIGKILL)
    os.kill(running.pids[1], signal.SIGSTOP)        # the other one looks at its files in a minute
    try:
        wait_until(lambda: len(children(running.process)) == 2, "no worker has come in its place")
        assert served() != old
    finally:
        os.kill(running.pids[1], signal.SIGCONT)


@pytest.mark.parametrize("to_all", [False, True], ids=["the parent", "everybody"])
def test_SIGTERM_lets_the_streams_of_all_workers_end(by_hand, workers, to_all):
    """A service manager sends it to the parent, or to all processes at once."""
    running = workers(by_hand, GRACE=str(PATIENCE))
    streams = [begin_stream(running, by_hand, process) for process in running.pids]

    for process in [running.process] + running.pids * to_all:
        os.kill(process, signal.SIGTERM)
    wait_until(lambda: not can_connect(running.program.address), "clients are still taken")
    for client, peer in streams:
        peer.send(chunk(event("2")) + b"0\r\n\r\n")
        assert client.read_chunk() == event("2")
        assert client.read_chunk() == b""

    assert running.program.process.wait(PATIENCE) == 0
    assert not any(is_running(process) for process in running.pids)


def can_connect(address):
    try:
        Client(address).sock.close()
    except OSError:
        return False
    return True


def test_a_second_SIGTERM_ends_all_at_once(by_hand, workers):
    running = workers(by_hand, GRACE="3600")
    begin_stream(running, by_hand, running.pids[0])

    os.kill(running.process, signal.SIGTERM)
    wait_until(lambda: not can_connect(running.program.address), "clients are still taken")
    os.kill(running.process, signal.SIGTERM)

    assert running.program.process.wait(PATIENCE) == 0
    wait_until(lambda: not any(map(is_running, running.pids)), "a worker is left")


def test_a_worker_that_is_stuck_does_not_hold_up_the_end(by_hand, workers):
    running = workers(by_hand, GRACE="0")
    os.kill(running.pids[0], signal.SIGSTOP)

    os.kill(running.process, signal.SIGTERM)

    assert running.program.process.wait(PATIENCE) == 0
    assert not any(is_running(process) for process in running.pids)


def test_workers_whose_parent_was_killed_end(by_hand, workers):
    running = workers(by_hand)

    os.kill(running.process, signal.SIGKILL)

    wait_until(lambda: not any(map(is_running, running.pids)), "a worker is left")


def turns_of(process):
    """How often it has gone to sleep, which the parent does once in each turn of its loop."""
    with open("/proc/%d/status" % process) as file:
        return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", file.read(), re.M).group(1))


@pytest.mark.parametrize("last", ["", "sk-hidden-0123"], ids=["once", "then a wrong file"])
def test_SIGHUP_reaches_every_worker_and_those_that_come_later(by_hand, workers, tmp_path, last):
    """Each reads the settings again: the client key that was revoked is refused by all."""
    path = tmp_path / "keys"
    path.write_text("ck-old-0123456789")
    running = workers(by_hand, KEY="sk-hidden-0123", CLIENT_KEYS_FILE=str(path))
    errors = running.program.errors

    path.write_text("ck-new-0123456789")
    os.kill(running.process, signal.SIGHUP)
    wait_until(lambda: "".join(errors).count("are in force") == 2, "not reloaded")
    # The parent reads as well, a moment later, for those that come later; it says nothing.
    begun = turns_of(running.process)
    wait_until(lambda: turns_of(running.process) >= begun + 3, "the parent does nothing")
    if last:
        path.write_text(last)
        os.kill(running.process, signal.SIGHUP)
        wait_until(lambda: "".join(errors).count("nothing has changed") == 2, "not looked at")
    dying = running.pids[0]
    os.kill(dying, signal.SIGKILL)
    wait_until(lambda: dying not in children(running.process), "it lives")
    wait_until(lambda: len(children(running.process)) == 2, "no worker has come in its place")
    running.pids = children(running.process)

    for process in running.pids:
        with running.one_of(process) as client:
            client.request("POST", CHAT, b"{}", [("Authorization", "Bearer ck-old-0123456789")])
            assert client.read_reply().status == 401


def test_a_signal_that_comes_while_a_worker_is_started_reaches_it(monkeypatch):
    settings = aiproxy.Settings({
        "AIPROXY_PORT": "0", "AIPROXY_WORKERS": "2", "AIPROXY_UPSTREAM": "http://127.0.0.1:9"})
    crew = aiproxy.Crew(settings, [])
    told = []

    def fork():
        # To this thread: the parent has no other, these tests do.
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
        time.sleep(0)                   # here a handler would run
        return 12345

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(crew, "pass_on", lambda number: told.extend(crew.running))
    crew.handle(signal.SIGHUP, crew.on_reload)
    try:
        crew.fork(0)
        assert crew.must_read
        crew.reload()
    finally:
        signal.signal(signal.SIGHUP, crew.former_handlers[signal.SIGHUP])
        crew.listener.close()

    assert told == [12345]


FIRST_FORK_FAILS = """
import errno, os, runpy, sys
fork = os.fork
def fail():
    os.fork = fork
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_banner_is_printed_though_the_first_worker_cannot_be_started(by_hand):
    environ = clean_environ({
        "AIPROXY_PORT": "0", "AIPROXY_UPSTREAM": by_hand.url, "AIPROXY_WORKERS": "2"})
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST_FORK_FAILS, PROGRAM], env=environ, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    too_late = threading.Timer(PATIENCE, process.kill)
    too_late.start()
    with process:
        lines = [process.stderr.readline(), process.stderr.readline()]
        too_late.cancel()
        process.terminate()
        process.stderr.read()

    assert process.returncode == 0
    assert "worker 1 has ended" in lines[0]
    assert lines[1].startswith("aiproxy %s on http://" % aiproxy.__version__)


def test_a_reader_of_stderr_that_stalls_does_not_hold_up_the_parent(by_hand):
    environ = clean_environ({
        "AIPROXY_PORT": "0", "AIPROXY_UPSTREAM": by_hand.url, "AIPROXY_WORKERS": "2"})
    process = subprocess.Popen(
        [sys.executable, PROGRAM], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: len(children(process.pid)) == 2, "there are no two workers")
        fill(process.stderr.fileno())
        dying = children(process.pid)[0]
        os.kill(dying, signal.SIGKILL)
        wait_until(lambda: dying not in children(process.pid), "it is a zombie")

        wait_until(lambda: len(children(process.pid)) == 2, "no worker has come in its place")
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def fill(pipe):
    """Fill a pipe, of which we have the reading side."""
    writer = os.open("/proc/self/fd/%d" % pipe, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while os.write(writer, bytes(1 << 12)):
            pass
    except BlockingIOError:
        pass
    finally:
        os.close(writer)


def test_whole_lines_are_written_by_all_workers(by_hand, workers):
    running = workers(by_hand)

    def ask_often():
        with Client(running.program.address) as client:
            for number in range(200):
                client.request("GET", "/health?" + "x" * 700)
                assert client.read_reply().status == 200

    threads = [threading.Thread(target=ask_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(running.program.lines) >= 800, "lines are missing")

    assert all(line.rstrip().endswith(" ok") for line in running.program.lines)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "AUTO "])
def test_a_wrong_number_of_workers_does_not_start(text):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_WORKERS"):
        aiproxy.Settings({"AIPROXY_WORKERS": text})


def test_auto_is_one_for_each_cpu_that_we_may_use():
    count = aiproxy.Settings({"AIPROXY_WORKERS": "auto"}).workers

    assert 1 <= count <= len(os.sched_getaffinity(0))


def test_several_workers_need_fork(monkeypatch):
    monkeypatch.delattr(os, "fork")

    assert aiproxy.Settings({"AIPROXY_WORKERS": "auto"}).workers == 1
    with pytest.raises(aiproxy.SettingError, match="cannot fork"):
        aiproxy.Settings({"AIPROXY_WORKERS": "2"})
