"""Browsers: the preflight, the CORS fields of every answer, and who is refused. As the OpenAI SDK in a real browser needs it."""
import pytest

from support import CHAT, OK

AUTH = [("Authorization", "Bearer ck-alice")]
APP = "https://app.example"
SDK = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
KEY = {"KEY": "sk-hidden-key"}
CLIENTS = {"CLIENT_KEYS": "ck-alice"}


def preflight(running, origin, *fields, path=CHAT):
    return running.ask("OPTIONS", path, None, [("Origin", origin), ("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", SDK)] + list(fields))


ORIGINS = [     # settings, the page's origin, and what Access-Control-Allow-Origin says: "" for nothing, and the request is refused
    pytest.param(dict(KEY, **CLIENTS), APP, "*", id="client keys: any page"),
    pytest.param(KEY, APP, "", id="hidden on loopback: no page"),
    pytest.param(KEY, "null", "", id="hidden on loopback: no file"),
    pytest.param(KEY, "http://127.0.0.1:1234", "", id="hidden on loopback: no other port"),
    pytest.param(KEY, "http://127.0.0.1:8000", "http://127.0.0.1:8000", id="our own start page"),
    pytest.param({}, APP, "", id="an upstream here that wants no key: no page"),
    pytest.param({"ORIGINS": "*"}, APP, "*", id="any page, knowingly"),
    pytest.param(dict(KEY, ORIGINS=APP), APP, APP, id="listed"),
    pytest.param(dict(KEY, ORIGINS="https://b.example," + APP, **CLIENTS), APP, APP, id="listed second"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "https://b.example", "", id="not listed"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "http://app.example", "", id="another scheme"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), APP + ":443", "", id="with its port"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "https://APP.example", "", id="in other letters"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), APP + ".evil.example", "", id="a longer name"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "https://xapp.example", "", id="a name that ends alike"),
    pytest.param(dict(KEY, ORIGINS=APP, **CLIENTS), "null", "", id="null is not listed"),
    pytest.param(dict(KEY, ORIGINS="null", **CLIENTS), "null", "null", id="null listed"),
]


@pytest.mark.parametrize("settings,origin,allowed", ORIGINS)
def test_origins_are_compared_exactly(upstream, relay, settings, origin, allowed):
    running = relay(**settings)
    first, second = preflight(running, origin), running.ask("POST", CHAT, b"{}", AUTH + [("Origin", origin)])
    assert first.status == 204 and first.body == b"" and first.all("access-control-allow-origin") == second.all("access-control-allow-origin") == ([allowed] if allowed else [])
    assert (second.status, len(upstream.received)) == ((200, 1) if allowed else (403, 0))
    assert first.get("access-control-allow-headers") == (SDK if allowed else None)
    if allowed:
        assert first.get("access-control-max-age") == "86400" and "POST" in first.get("access-control-allow-methods")
        assert ("Origin" in second.all("vary")) == (allowed != "*")
    else:
        assert second.code == "origin_not_allowed"
        assert "Origin" in second.all("vary") or "ORIGINS" not in settings


@pytest.mark.parametrize("fields,status", [([], 200), ([("Sec-Fetch-Site", "same-origin")], 200), ([("Sec-Fetch-Site", "none")], 200), ([("Sec-Fetch-Site", "cross-site")], 403),
                                           ([("Sec-Fetch-Site", "same-site")], 403)], ids=["no browser", "same-origin", "typed", "cross-site", "same-site"])
def test_a_page_that_hides_its_origin_spends_no_key(upstream, relay, fields, status):
    assert relay(**KEY).ask("GET", "/v1/models", None, fields).status == status
    assert len(upstream.received) == (status == 200)


ANSWERS = [     # what is asked, the status, and whether the upstream answered
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
@pytest.mark.parametrize("method,path,fields,status", ANSWERS)
def test_every_answer_carries_the_cors_fields(relay, method, path, fields, status, origins, allowed):
    reply = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS=origins).ask(method, path, b"" if method == "POST" else None, fields + [("Origin", APP)])
    assert reply.status == status and reply.all("access-control-allow-origin") == [allowed]
    assert {"x-request-id", "request-id", "retry-after", "retry-after-ms", "x-should-retry"} <= set(reply.get("access-control-expose-headers").split(", "))
    assert ("Origin" in reply.all("vary")) == (allowed != "*")


def test_the_upstreams_rate_limits_are_exposed_and_its_own_cors_is_not(upstream, hidden):
    upstream.answer = OK.replace(b"\r\n\r\n", b"\r\nx-ratelimit-remaining-requests: 5\r\nAnthropic-RateLimit-Tokens-Limit: 7\r\nAccess-Control-Allow-Origin: https://other.example\r\n"
                                              b"Access-Control-Expose-Headers: x-secret\r\nVary: Accept\r\n\r\n")
    reply = hidden.ask("POST", CHAT, b"{}", AUTH + [("Origin", APP)])
    exposed = reply.get("access-control-expose-headers")
    assert "x-ratelimit-remaining-requests" in exposed and "anthropic-ratelimit-tokens-limit" in exposed and "x-secret" not in exposed
    assert reply.all("access-control-allow-origin") == ["*"] and "Accept" in reply.all("vary")


def test_without_origins_no_answer_speaks_of_cors(relay):
    reply = relay(**KEY).ask("POST", CHAT, b"{}")
    assert reply.status == 200 and not [name for name, _ in reply.fields if name.startswith("access-control-") or name == "vary"]


@pytest.mark.parametrize("origins,allowed", [("", None), (APP, "true")], ids=["any", "listed"])
def test_a_private_network_is_opened_to_listed_origins_only(relay, origins, allowed):
    running = relay(KEY="sk-hidden-key", CLIENT_KEYS="ck-alice", ORIGINS=origins)
    assert preflight(running, APP, ("Access-Control-Request-Private-Network", "true")).get("access-control-allow-private-network") == allowed
    assert preflight(running, APP).get("access-control-allow-private-network") is None


@pytest.mark.parametrize("path", [CHAT, "/v1/anything", "/health", "/"])
def test_a_preflight_needs_no_key_and_never_goes_up(upstream, hidden, path):
    assert preflight(hidden, APP, path=path).status == 204 and not upstream.received


def test_an_options_for_the_server_is_answered_here(upstream, relay):
    running = relay(ORIGINS="*")
    assert [running.ask("OPTIONS", target).status for target in ("*", "*?a=1")] == [204, 400] and not upstream.received


def test_a_plain_options_tells_the_methods_where_a_key_is_hidden(upstream, hidden):
    reply = hidden.ask("OPTIONS", CHAT, None, AUTH)
    assert reply.status == 204 and reply.get("allow").startswith("POST") and not upstream.received
