"""Fixtures: a relay in this process on a port of its own, and a fake upstream that does exactly what a test tells it to."""
import os
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import aiproxy  # noqa: E402
from support import Relay, Upstream  # noqa: E402


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """The machine's own environment must not change what a test sees."""
    for name in list(os.environ):
        if name.startswith(("AIPROXY_", "CLOUDFLARE_")) or name.lower() in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "port", "fc_server_port", "ssl_cert_file"):
            monkeypatch.delenv(name)


@pytest.fixture
def upstream():
    """A plain HTTP upstream; answers 200 {"ok":true} until told otherwise."""
    with Upstream() as fake:
        yield fake


@pytest.fixture
def relay(upstream):
    """start(**settings) → a running relay in front of `upstream`; names without their AIPROXY_ prefix."""
    running = []

    def start(**settings):
        settings.setdefault("UPSTREAM", upstream.url)
        running.append(Relay(**settings))
        return running[-1]
    yield start
    for one in running:
        one.close()


@pytest.fixture
def hidden(relay):
    """A relay that hides the key sk-hidden-key and asks for the client key of alice."""
    return relay(KEY="sk-hidden-key", CLIENT_KEYS="alice=ck-alice")


@pytest.fixture
def no_thread_fails(monkeypatch):
    """Fails the test if a thread dies of an exception."""
    failures = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args))
    yield
    assert not failures
