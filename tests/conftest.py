"""Fixtures: a relay in this process on a free port, and a fake upstream that a test scripts."""

import functools
import gc
import os
import py_compile
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import aiproxy  # noqa: E402
import support  # noqa: E402
from support import (  # noqa: E402
    OTHER_PYTHON,
    PATIENCE,
    PROGRAM,
    Upstream,
    close_server,
    make_certificate,
    start_relay,
)


@functools.lru_cache(None)
def quick_command():
    """The program, compiled once: that is half of its start. (Some tests start it as users do.)"""
    try:
        return [sys.executable, py_compile.compile(PROGRAM, doraise=True)]
    except OSError:
        return [sys.executable, PROGRAM]        # its folder is not ours


if not OTHER_PYTHON:
    support.program_command = quick_command

# Limits of time are looked at twice a second: tests that wait for one need not wait so long.
aiproxy.TICK_SECONDS = 0.05

PROXY_AND_PLATFORM_VARIABLES = {
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "port",
    "fc_server_port",
    "ssl_cert_file",
}


@pytest.fixture(autouse=True)
def no_settings_from_outside():
    """The machine's own environment must not change what a test sees."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            is_setting = name.startswith(("AIPROXY_", "CLOUDFLARE_"))
            if is_setting or name.lower() in PROXY_AND_PLATFORM_VARIABLES:
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def client_certificate(tmp_path_factory):
    """Settings with which a relay serves HTTPS."""
    certificate, key = make_certificate(str(tmp_path_factory.mktemp("https")), key="front")
    return {"TLS_CERT": certificate, "TLS_KEY": key}


@pytest.fixture
def upstream():
    """A plain HTTP upstream; it answers 200 {"ok":true} until a test sets another answer."""
    with Upstream() as fake:
        yield fake


@pytest.fixture
def relay(upstream, request):
    """start(**settings) returns a running relay in front of `upstream`.

    The names of the settings go without their AIPROXY_ prefix.
    """
    running = []
    if OTHER_PYTHON and {"monkeypatch", "capsys"} & set(request.fixturenames):
        pytest.skip("changes or reads this process")

    def start(**settings):
        settings.setdefault("UPSTREAM", upstream.url)
        running.append(start_relay(**settings))
        return running[-1]

    yield start

    for one in running:
        one.close()


@pytest.fixture
def hidden(relay):
    """A relay with the provider key sk-hidden-key, which asks for the client key of alice."""
    return relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice")


@pytest.fixture
def check(monkeypatch, capsys):
    """check(*arguments, **environment) → exit status, stdout, stderr of `aiproxy.py --check`.

    It runs in this process.
    """

    def run(*arguments, **environ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(environ))
            patch.setattr("sys.argv", ["aiproxy.py", "--check"] + list(arguments))
            try:
                status = aiproxy.main()
            except SystemExit as end:       # of --help and --version
                status = end.code
        return (status,) + tuple(capsys.readouterr())

    return run


@pytest.fixture
def no_thread_fails(monkeypatch):
    """Fail the test if an exception ends a thread."""
    failures = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args))
    yield
    assert not failures


def pytest_collection_modifyitems(items):
    """Let the runs of test_sections.py begin at once, and ask for their results at the end.

    They are processes: the second CPU runs them while the first one runs all other tests.
    """
    waiting = [item for item in items if "core_runs" in item.fixturenames]
    others = [item for item in items if item not in waiting]
    items[:] = waiting[:1] + others + waiting[1:]


def pytest_sessionfinish():
    """Close what a test has left open: Python waits for its threads, and they for idle clients."""
    for thing in gc.get_objects():
        if isinstance(thing, aiproxy.Server):
            close_server(thing)
            end_late_jobs(thing.relay_loop)


def end_late_jobs(loop):
    """Nobody runs what a handler gives to the loop after its end: the handler would never end."""
    if loop.is_alive():
        loop.join(PATIENCE)
    while loop.submitted:
        job = loop.submitted.popleft()
        if job.end_event:
            job.end_event.set()
