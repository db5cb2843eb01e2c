"""Browsers: the preflight, the CORS fields of every response, and which pages are refused.

The OpenAI SDK in a real browser needs these.
"""

import pytest

import aiproxy
from support import CHAT, OK

AUTH = [("Authorization", "Bearer ck-alice")]
APP = "https://app.example"
SDK = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
KEY = {"KEY": "sk-hidden-key"}
CLIENTS = {"CLIENT_KEYS": "ck-alice"}


def preflight(running, origin, *fields, path=CHAT):
    own = [
        ("Origin", origin),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", SDK),
    ]
    return running.ask("OPTIONS", path, None, own + list(fields))


# Settings, the origin of the page, and the value of Access-Control-Allow-Origin.
# "" means that there is none and that the request is refused.
ORIGINS = [
    pytest.param(dict(KEY, **CLIENTS), APP, "*", id="client keys: any page"),
    pytest.param(KEY, APP, "", id="provider key on loopback: no page"),
    pytest.param(KEY, "null", "", id="provider key on loopback: no file"),
    pytest.param(KEY, "http://127.0.0.1:1234", "", id="provider key on loopback: no other port"),
    pytest.param(
        KEY, "http://127.0.0.1:8000", "http://127.0.0.1:8000", id="the relay's own start page"
    ),
    pytest.param({}, APP, "", id="a loopback upstream without a key: no page"),
    pytest.param({"ORIGINS": "*"}, APP, "*", id="any page, knowingly"),
    pytest.param(dict(KEY, ORIGINS=APP), APP, APP, id="listed"),
    pytest.param(
        dict(KEY, ORIGINS="https://b.example," + APP, **CLIENTS), APP, APP, id="listed second"
    ),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "https://b.example", "", id="not listed"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "http://app.example", "", id="another scheme"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), APP + ":444", "", id="another port"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), APP + ".evil.example", "", id="a longer name"),
    pytest.param(
        dict(KEY, ORIGINS=APP, **CLIENTS), "https://xapp.example", "", id="a name with the same end"
    ),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "null", "", id="null is not listed"),
    pytest.param(dict(KEY, ORIGINS="null", **CLIENTS), "null", "null", id="null listed"),
]


@pytest.mark.parametrize("settings,origin,allowed", ORIGINS)
def test_only_an_allowed_origin_is_served(upstream, relay, settings, origin, allowed):
    running = relay(**settings)
    first = preflight(running, origin)
    second = running.ask("POST", CHAT, b"{}", AUTH + [("Origin", origin)])
    values = [allowed] if allowed else []

    assert first.status == 204
    assert first.body == b""
    assert first.all("access-control-allow-origin") == values
    assert second.all("access-control-allow-origin") == values
    assert (second.status, len(upstream.received)) == ((200, 1) if allowed else (403, 0))
    assert first.get("access-control-allow-headers") == (SDK if allowed else None)

    for reply in (first, second):
        credentials = reply.get("access-control-allow-credentials")
        assert credentials == ("true" if allowed not in ("", "*") else None)

    if allowed:
        assert first.get("access-control-max-age") == "86400"
        assert "POST" in first.get("access-control-allow-methods")
        assert ("Origin" in second.all("vary")) == (allowed != "*")
    else:
        assert second.code == "origin_not_allowed"
        assert "Origin" in second.all("vary") or "ORIGINS" not in settings


# What AIPROXY_ORIGINS lists, origins that fit it, and origins that do not.
PATTERNS = [
    (APP, [APP, APP + ":443", "https://APP.example"], ["http://app.example", APP + ":80"]),
    ("https://App.Example:443", [APP], [APP + ":8443"]),
    ("HTTP://app.example:80", ["http://app.example"], [APP]),
    ("https://app.example:08443", [APP + ":8443"], [APP]),
    (
        "https://*.app.example",
        ["https://www.app.example", "https://a.b.app.example", "https://x_y.app.example:443"],
        [APP, "https://.app.example", "https://xapp.example", "https://a.app.example.evil",
         "https://a.app.example:8443", "http://a.app.example", "https://evil.test/.app.example"],
    ),
    (
        "http://localhost:*",
        ["http://localhost", "http://localhost:5173", "http://localhost:80"],
        ["https://localhost:1", "http://localhost.evil.test:1", "http://localhost:", "http://x:1"],
    ),
    ("https://*.app.example:*", ["https://a.app.example:1", "https://a.app.example"], [APP]),
    (
        "chrome-extension://*,moz-extension://*",
        ["chrome-extension://bpoadfk", "moz-extension://0a1b2c3d-1111"],
        ["chrome-extension://", "safari-web-extension://1", "xchrome-extension://a"],
    ),
    ("safari-web-extension://0A1B", ["safari-web-extension://0A1B"], []),
    ("https://例子.example", ["https://xn--fsqu00a.example"], []),
    ("http://[0:0::1]:3000", ["http://[::1]:3000"], ["http://[::1]"]),
    ("app://obsidian.md,null", ["app://obsidian.md", "null"], ["app://obsidian-md"]),
    ("", [], ["", "null", APP]),
]


@pytest.mark.parametrize("listed,fit,others", PATTERNS, ids=[row[0] for row in PATTERNS])
def test_what_is_listed_fits_the_origins_that_browsers_send(listed, fit, others):
    settings = aiproxy.Settings({"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_ORIGINS": listed})

    def is_listed(origin):
        return aiproxy.is_listed_origin(origin.encode(), settings)

    assert all(map(is_listed, fit))
    assert not any(map(is_listed, others))


@pytest.mark.parametrize("fields,status", [
    ([], 200),
    ([("Sec-Fetch-Site", "same-origin")], 200),
    ([("Sec-Fetch-Site", "none")], 200),
    ([("Sec-Fetch-Site", "cross-site")], 403),
    ([("Sec-Fetch-Site", "same-site")], 403),
], ids=["no browser", "same-origin", "typed", "cross-site", "same-site"])
def test_a_page_that_hides_its_origin_cannot_use_the_provider_key(upstream, relay, fields, status):
    assert relay(**KEY).ask("GET", "/v1/models", None, fields).status == status
    assert len(upstream.received) == (status == 200)


# A request, and the status of its response.
REQUESTS = [
    pytest.param("POST", CHAT, AUTH, 200, id="ok"),
    pytest.param("POST", CHAT, [], 401, id="no key"),
    pytest.param("GET", CHAT, AUTH, 405, id="method"),
    pytest.param("GET", "/nothing", AUTH, 404, id="path"),
    pytest.param("POST", CHAT + "?key=1", AUTH, 400, id="key in query"),
    pytest.param("POST", "//x", AUTH, 400, id="bad target"),
    pytest.param("POST", CHAT, AUTH + [("Content-Length", "999999999")], 413, id="too large"),
    pytest.param("POST", CHAT, AUTH + [("Expect", "a miracle")], 417, id="expect"),
    pytest.param("BREW", CHAT, AUTH, 501, id="unknown method"),
    pytest.param("GET", "/health", [], 200, id="health"),
    pytest.param("OPTIONS", CHAT, AUTH, 204, id="plain OPTIONS"),
]


@pytest.mark.parametrize("origins,allowed", [("", "*"), (APP, APP)], ids=["any", "listed"])
@pytest.mark.parametrize("method,path,fields,status", REQUESTS)
def test_every_response_has_the_cors_fields(relay, method, path, fields, status, origins, allowed):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS=origins)
    body = b"" if method == "POST" else None
    reply = running.ask(method, path, body, fields + [("Origin", APP)])
    exposed = set(reply.get("access-control-expose-headers").split(", "))

    assert reply.status == status
    assert reply.all("access-control-allow-origin") == [allowed]
    assert {"x-request-id", "request-id"} <= exposed
    assert {"retry-after", "retry-after-ms", "x-should-retry"} <= exposed
    assert ("Origin" in reply.all("vary")) == (allowed != "*")


def test_the_rate_limits_of_the_upstream_are_exposed_and_its_cors_fields_dropped(upstream, hidden):
    fields = (
        b"x-ratelimit-remaining-requests: 5\r\n"
        b"Anthropic-RateLimit-Tokens-Limit: 7\r\n"
        b"Access-Control-Allow-Origin: https://other.example\r\n"
        b"Access-Control-Expose-Headers: x-secret\r\n"
        b"Vary: Accept"
    )
    upstream.answer = OK.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n\r\n")
    reply = hidden.ask("POST", CHAT, b"{}", AUTH + [("Origin", APP)])
    exposed = reply.get("access-control-expose-headers")

    assert "x-ratelimit-remaining-requests" in exposed
    assert "anthropic-ratelimit-tokens-limit" in exposed
    assert "x-secret" not in exposed
    assert reply.all("access-control-allow-origin") == ["*"]
    assert "Accept" in reply.all("vary")


def test_with_listed_origins_a_response_to_no_page_varies_with_the_origin_too(relay):
    reply = relay(ORIGINS=APP, **KEY).ask("POST", CHAT, b"{}")

    assert reply.status == 200
    assert reply.all("vary") == ["Origin"]
    assert reply.get("access-control-allow-origin") is None


def test_without_origins_no_response_has_cors_fields(relay):
    reply = relay(**KEY).ask("POST", CHAT, b"{}")

    assert reply.status == 200
    assert not [name for name, _ in reply.fields if name.startswith("access-control-")]
    assert reply.get("vary") is None


@pytest.mark.parametrize("origins,allowed", [("", None), (APP, "true")], ids=["any", "listed"])
def test_a_private_network_is_opened_to_listed_origins_only(relay, origins, allowed):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS=origins)
    private = preflight(running, APP, ("Access-Control-Request-Private-Network", "true"))
    public = preflight(running, APP)

    assert private.get("access-control-allow-private-network") == allowed
    assert public.get("access-control-allow-private-network") is None


@pytest.mark.parametrize("path", [CHAT, "/v1/anything", "/health", "/"])
def test_a_preflight_needs_no_key_and_is_never_sent_upstream(upstream, hidden, path):
    assert preflight(hidden, APP, path=path).status == 204
    assert not upstream.received


PROBES = [("OPTIONS", "*", 204), ("OPTIONS", "*?a=1", 400), ("OPTIONS", "/", 204),
          ("GET", "/favicon.ico", 204), ("HEAD", "/favicon.ico", 204)]


@pytest.mark.parametrize("settings", [KEY, dict(KEY, **CLIENTS), {}], ids=["key", "client", "none"])
def test_what_balancers_and_browsers_ask_is_answered_by_the_relay(upstream, relay, settings):
    running = relay(**settings)
    for method, target, status in PROBES:
        reply = running.ask(method, target, None, [("Host", "10.0.0.7")])
        assert (reply.status, reply.body) == (status, reply.body if status == 400 else b"")
    with running.client() as client:
        client.send(b"OPTIONS / HTTP/1.0\r\n\r\n")
        assert client.read_reply().status == 204
    assert not upstream.received


def test_with_a_provider_key_a_plain_options_lists_the_methods(upstream, hidden):
    reply = hidden.ask("OPTIONS", CHAT, None, AUTH)

    assert reply.status == 204
    assert reply.get("allow").startswith("POST")
    assert not upstream.received


def test_the_log_tells_of_a_page_that_may_not_call_us(upstream, relay):
    """A browser only says that CORS failed: the preflight's line in the log has the reason."""
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS="https://app.example")
    fields = [("Origin", "https://other.example"), ("Access-Control-Request-Method", "POST")]

    assert running.ask("OPTIONS", CHAT, fields=fields).status == 204
    assert running.wait_for_record()["outcome"] == "origin_not_allowed"

    reply = running.ask("POST", CHAT, b"{}", [("Origin", "https://other.example")])
    assert (reply.status, reply.code) == (403, "origin_not_allowed")
    assert "https://other.example" in reply.json["error"]["message"]


def test_each_origin_that_is_refused_is_named_once(relay, capsys):
    """A page cannot see which origin was refused, and the lines of the log have no field for it."""
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS=APP)
    for origin in ("https://a.example", "https://b.example", "https://a.example", APP, "null"):
        preflight(running, origin)
        running.ask("POST", CHAT, b"{}", [("Origin", origin)])
    running.ask("POST", CHAT, b"{}", [("Sec-Fetch-Site", "cross-site")])

    told = "aiproxy: pages from %s are refused: AIPROXY_ORIGINS does not name that origin"
    refused = ["https://a.example", "https://b.example", "null"]
    assert capsys.readouterr().err.splitlines() == [told % origin for origin in refused]


def test_what_is_said_of_refused_origins_is_bounded_printable_and_without_keys():
    settings = aiproxy.Settings({"AIPROXY_KEY": "sk-hidden-key", "AIPROXY_PORT": "0"})
    log = aiproxy.Log("text", settings.log_secrets)
    lines = []
    log.put = lambda stream, line: lines.append(line)
    report = aiproxy.origin_report(log)

    report(b"https://sk-hidden-key\x1b[2J" + b"x" * 100000)
    assert lines[0].startswith("aiproxy: pages from https://***\\x1b[2Jxxx")
    assert len(lines[0]) < 400
    for number in range(1000):
        report(b"https://%d.example" % number)
        report(b"https://%d.example" % number)
    assert len(lines) == aiproxy.MAX_REPORTED_ORIGINS
    assert len(set(lines)) == len(lines)
