"""--check --live tries each provider key at the upstream, and says how it fared.

It names a key by its place. Neither a key nor a word of the upstream's is shown.
"""

import os
import socket

import pytest

import aiproxy
from fake_cloudflare import TOKEN, FakeCloudflare, error_envelope, settings
from support import Upstream, make_certificate, server_tls

KEYS = ["sk-hidden-one", "sk-hidden-two", "sk-hidden-three"]


@pytest.fixture
def check_live(monkeypatch, capsys):
    """check_live(**environment) → exit status, the lines about keys, stderr; in this process."""

    def run(**environ):
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            patch.setattr("sys.argv", ["aiproxy.py", "--check", "--live"])
            status = aiproxy.main()
        out, err = capsys.readouterr()
        assert "sk-hidden" not in out + err
        settings = {"%s=" % option.name for option in aiproxy.OPTIONS}
        lines = out.splitlines()
        shown = [line for line in lines if line[:line.find("=") + 1] in settings]
        assert len(shown) == len(settings)
        return status, [line for line in lines if line not in shown], err

    return run


def answer_by_key(**statuses):
    """An upstream's answer: the status for each key, by its last word; "none" for no key."""

    def respond(received):
        key = received.field("authorization") or received.field("x-api-key") or "none"
        status = statuses[key.rpartition("-")[2]]
        # What an upstream may do with a key that it refuses.
        body = b"no such key: " + key.encode()
        received.send(b"HTTP/1.1 %d %b\r\nX-Key: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            status, key.encode(), key.encode(), len(body), body))

    return respond


# By key what the upstream says, the exit status, and what is printed.
RESULTS = {
    "all accepted": (
        dict(one=200, two=200, three=200, none=401), 0,
        ["key 1 of 3: accepted (200)", "key 2 of 3: accepted (200)", "key 3 of 3: accepted (200)"]),
    "one refused": (
        dict(one=200, two=401, three=403, none=401), 2,
        ["key 1 of 3: accepted (200)", "key 2 of 3: refused (401)", "key 3 of 3: refused (403)"]),
    "one not tried": (
        dict(one=200, two=503, three=302, none=401), 1,
        ["key 1 of 3: accepted (200)", "key 2 of 3: could not be tried (503)",
         "key 3 of 3: could not be tried (302)"]),
    "refused is worse than not tried": (
        dict(one=401, two=500, three=429), 2,
        ["key 1 of 3: refused (401)", "key 2 of 3: could not be tried (500)",
         "key 3 of 3: could not be tried (429)"]),
    "no list": (
        dict(one=404, two=405, three=404), 0,
        ["key %d of 3: there is no model list, so it could not be tried (%d)" % pair
         for pair in ((1, 404), (2, 405), (3, 404))]),
    "a list for anybody": (
        dict(one=200, two=200, three=200, none=200), 0,
        ["key 1 of 3: accepted (200)", "key 2 of 3: accepted (200)", "key 3 of 3: accepted (200)",
         "The upstream gives its model list to anybody: that proves no key."]),
}


@pytest.mark.parametrize("statuses,status,lines", RESULTS.values(), ids=list(RESULTS))
def test_each_key_is_tried_in_order(upstream, check_live, statuses, status, lines):
    upstream.answer = answer_by_key(**statuses)

    result = check_live(AIPROXY_KEY=",".join(KEYS), AIPROXY_UPSTREAM=upstream.url + "/some/v4")

    assert result == (status, lines, "")
    assert {received.line for received in upstream.received} == {"GET /some/v4/models HTTP/1.1"}
    sent = [received.field("authorization") for received in upstream.received[:3]]
    assert sent == ["Bearer " + key for key in KEYS]


@pytest.mark.parametrize("said,status", [(200, 0), (401, 0), (404, 0), (500, 1)])
def test_without_a_key_it_says_what_came(upstream, check_live, said, status):
    upstream.answer = answer_by_key(none=said)

    result = check_live(AIPROXY_UPSTREAM=upstream.url)

    assert result[0] == status
    assert len(result[1]) == 1
    assert result[1][0].startswith("no key is configured; without one: ")
    assert result[1][0].endswith(" (%d)" % said)


def test_an_upstream_that_cannot_be_reached_is_status_1(check_live):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d" % unused.getsockname()[1]
        status, lines, err = check_live(AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM=url)

    assert (status, err) == (1, "")
    assert lines == ["key 1 of 1: could not be tried. The upstream cannot be reached: "
                     "Connection refused."]


def test_a_silent_upstream_is_given_up_after_the_time_limit(upstream, check_live):
    upstream.answer = lambda received: None
    status, lines, _ = check_live(
        AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM=upstream.url, AIPROXY_TIMEOUT="0.05")

    assert status == 1
    assert lines[0].startswith("key 1 of 1: could not be tried. The upstream did not answer within")


def test_anthropic_is_asked_as_it_wants_to_be(upstream, check_live, monkeypatch):
    row = aiproxy.PROVIDERS["anthropic"]._replace(base_url=upstream.url)
    monkeypatch.setitem(aiproxy.PROVIDERS, "anthropic", row)
    upstream.answer = answer_by_key(one=200, none=401)

    result = check_live(AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM="anthropic")

    received = upstream.received[0]
    assert result[:2] == (0, ["key 1 of 1: accepted (200)"])
    assert received.line == "GET /v1/models HTTP/1.1"
    assert received.field("x-api-key") == "sk-hidden-one"
    assert received.field("anthropic-version") == "2023-06-01"
    assert received.field("authorization") is None


def test_workers_ai_is_asked_for_its_own_list(upstream, check_live):
    upstream.answer = answer_by_key(one=200, none=401)

    result = check_live(
        AIPROXY_UPSTREAM="workers-ai", CLOUDFLARE_ACCOUNT_ID="account-1",
        CLOUDFLARE_API_TOKEN="sk-hidden-one", CLOUDFLARE_API_BASE_URL=upstream.url + "/client/v4")

    assert result[:2] == (0, ["key 1 of 1: accepted (200)"])
    path = "/client/v4/accounts/account-1/ai/models/search?per_page=1"
    assert upstream.received[0].line == "GET %s HTTP/1.1" % path


# By what Cloudflare is asked with, the exit status, and what is printed behind "key 1 of 1: ".
REJECTED = ("Cloudflare rejected the API token for this account. CLOUDFLARE_API_TOKEN must be "
            "valid, allow Workers AI Read and Edit, and belong to CLOUDFLARE_ACCOUNT_ID.")
NO_ACCOUNT = ("Cloudflare knows no such account or route. CLOUDFLARE_ACCOUNT_ID or "
              "CLOUDFLARE_API_BASE_URL is wrong.")
ACCOUNTS = {
    "right": ({}, 0, "accepted (200)"),
    "another account": (
        {"CLOUDFLARE_ACCOUNT_ID": "0" * 32}, 2, "refused (403). " + REJECTED),
    "another token": (
        {"CLOUDFLARE_API_TOKEN": "cf-token-that-is-wrong"}, 2, "refused (401). " + REJECTED),
    "no account": ({"CLOUDFLARE_ACCOUNT_ID": "account-1"}, 2, "refused (404). " + NO_ACCOUNT),
}


@pytest.mark.parametrize("given,status,line", ACCOUNTS.values(), ids=list(ACCOUNTS))
def test_workers_ai_says_what_is_wrong(check_live, given, status, line):
    with FakeCloudflare() as cloudflare:
        result = check_live(**settings(cloudflare, **given))

    assert result == (status, ["key 1 of 1: " + line], "")


@pytest.mark.parametrize("said,number,line", [
    (400, 6003, "refused (400). " + REJECTED),
    (403, 7403, "refused (403). " + REJECTED),
    (403, 9109, "refused (403). " + REJECTED),
    (403, 3041, "refused (403)"),
    (404, None, "refused: there is no such account (404)")],
    ids=lambda value: str(value)[:13])
def test_workers_ai_is_told_apart_by_cloudflares_code(check_live, said, number, line):
    with FakeCloudflare() as cloudflare:
        error = error_envelope(number, "no " + TOKEN) if number else b"no such page"
        cloudflare.answer = lambda received: cloudflare.reply(received, error, said)
        result = check_live(**settings(cloudflare))

    assert result == (2, ["key 1 of 1: " + line], "")


def test_the_operators_fields_go_up(upstream, check_live):
    upstream.answer = answer_by_key(one=200, none=401)
    check_live(AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM=upstream.url,
               AIPROXY_UPSTREAM_HEADERS="OpenAI-Organization: org-1; User-Agent: relay/1")

    received = upstream.received[0]
    assert received.field("openai-organization") == "org-1"
    assert received.field("user-agent") == "relay/1"


def test_it_asks_through_the_proxy(upstream, check_live):
    upstream.answer = answer_by_key(one=200, none=401)
    result = check_live(AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM="http://provider.example/v4",
                        http_proxy=upstream.url)

    assert result[:2] == (0, ["http_proxy=127.0.0.1:%d" % upstream.port,
                            "key 1 of 1: accepted (200)"])
    assert upstream.received[0].line == "GET http://provider.example/v4/models HTTP/1.1"


def test_certificates_are_verified(tmp_path, check_live):
    certificate, private = make_certificate(str(tmp_path))
    with Upstream(tls=server_tls(certificate, private)) as upstream:
        upstream.answer = answer_by_key(one=200, none=401)
        environ = {"AIPROXY_KEY": "sk-hidden-one", "AIPROXY_UPSTREAM": upstream.url}

        status, lines, _ = check_live(**environ)
        assert status == 1
        assert "CERTIFICATE_VERIFY_FAILED" in lines[0]
        assert upstream.all_bytes == b""

        status, lines, _ = check_live(SSL_CERT_FILE=certificate, **environ)
        assert (status, lines) == (0, ["key 1 of 1: accepted (200)"])


def test_it_needs_no_port_of_its_own(upstream, check_live):
    upstream.answer = answer_by_key(one=200, none=401)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        assert check_live(AIPROXY_KEY="sk-hidden-one", AIPROXY_UPSTREAM=upstream.url,
                          AIPROXY_PORT=port)[0] == 0


@pytest.mark.parametrize("arguments", [["--live"], ["--live", "--port", "0"]])
def test_live_alone_is_an_error(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["aiproxy.py"] + arguments)

    assert aiproxy.main() == 2
    assert capsys.readouterr().err == "aiproxy: --live belongs to --check\n"


def test_without_live_nothing_is_asked(upstream, monkeypatch, capsys):
    monkeypatch.setenv("AIPROXY_UPSTREAM", upstream.url)
    monkeypatch.setattr("sys.argv", ["aiproxy.py", "--check"])

    assert aiproxy.main() == 0
    assert upstream.connections == 0
    assert os.environ["AIPROXY_UPSTREAM"] == upstream.url
