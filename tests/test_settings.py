"""Invalid or unsafe settings do not start, with one line that names the variable.

The line never shows a secret.
"""

import os
import socket
import subprocess
import sys
import types

import pytest

import aiproxy
from support import CHAT, PROGRAM, Program, clean_environ, run_program

KEY = {"AIPROXY_KEY": "sk-hidden-key"}
SECRETS = ("s3cret", "sk-hidden", "ck-alice")


# A variable, and values that it does not take.
INVALID = [
    (
        "AIPROXY_UPSTREAM",
        [
            "opanai",
            "ftp://host",
            "file:///etc/passwd",
            "host.example",
            "https://",
            "https://host:99999",
            "https://host:0",
            "https://host/a/../b",
            "https://ho st",
            "data:,x",
        ],
    ),
    ("AIPROXY_MODELS", ["a,b=", "=a", "a,a", "a b"]),
    ("AIPROXY_DEFAULT_MODEL", ["a b"]),
    ("AIPROXY_PATHS", ["v1/chat", "FETCH /v1/chat", "/v1/../x", "/v1//x", "/v1?x", "GET"]),
    (
        "AIPROXY_ORIGINS",
        [
            "app.example",
            "https://app.example/",
            "https://app.example/x",
            "https://me@app.example",
            "https://app.example:65536",
            "https://*",
            "https://a.*.example",
            "https://app*.example",
            "http://127.1",
        ],
    ),
    ("AIPROXY_TRUSTED_PROXIES", ["10.0.0.0/8,everybody", "10.0.0.0/33", "10.0.0.1:80", ","]),
    ("AIPROXY_OPEN", ["2", "maybe", "ja"]),
    ("AIPROXY_HOST", ["a b"]),
    ("AIPROXY_PORT", ["http", "-1", "65536", "80.5"]),
    ("PORT", ["http"]),
    ("FC_SERVER_PORT", ["70000"]),
    ("AIPROXY_MAX_BODY", ["many", "-1", "1.5MB", "10 bananas"]),
    ("AIPROXY_MAX_CONNECTIONS", ["0", "many", "-5"]),
    ("AIPROXY_CONNECT_TIMEOUT", ["0", "-1", "nan", "inf", "soon"]),
    ("AIPROXY_TIMEOUT", ["0", "-1", "nan", "1m"]),
    ("AIPROXY_GRACE", ["-1", "nan", "long"]),
    ("AIPROXY_LOG", ["yes", "xml"]),
]


@pytest.mark.parametrize(
    "name,value", [(name, value) for name, values in INVALID for value in values]
)
def test_an_invalid_value_is_reported_with_what_the_setting_takes(check, name, value):
    status, out, err = check(**{name: value})

    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("aiproxy: %s: got %r; it takes " % (name, value))
    assert len(err.splitlines()) == 1


PLACEHOLDERS = [
    "your-api-key-here",
    "YOUR_API_KEY",
    "<\u4f60\u7684API Key>",
    "sk-your-key",
    "<key>",
    "sk-xxxxxxxx",
    "sk-...",
    "changeme",
    "YOUR_KEY",
    "api-key",
    "\u4f60\u7684\u5bc6\u94a5",
    "sk-proj-xxxxxxxxxxxx",
    "sk-proj-...",
    "my-secret-key",
    "$OPENAI_API_KEY",
    "${OPENAI_API_KEY}",
    "%OPENAI_API_KEY%",
    "{{key}}",
    "[key]",
    "insert-me",
    "paste-it-here",
    "enter_your_api_key",
    "client_secret",
    "password",
    "not-needed-here",
    "a-long-random-string",
    "\u81ea\u5df1\u7f16\u7684\u957f\u968f\u673a\u4e32",
]
# A variable that may hold a secret, an invalid value, and a word of the error message.
SECRET_VALUES = [
    ("AIPROXY_KEY", "s3cret key", "visible ASCII"),
    ("AIPROXY_KEY", "\u201cs3cret\u201d", "visible ASCII"),
    ("AIPROXY_KEY", "s3cret\nX: y", "visible ASCII"),
    ("AIPROXY_KEY_HEADER", "X s3cret", "field's name"),
    ("AIPROXY_KEY_HEADER", "s3cret:", "field's name"),
    ("AIPROXY_KEY_HEADER", "Authorization: Bearer sk-s3cret", "field's name"),
    ("AIPROXY_KEY_HEADER", "sk-s3cret", "field's name"),
    ("AIPROXY_KEY_HEADER", "Schl\xfcssel", "field's name"),
    ("AIPROXY_UPSTREAM", "sk-s3cret", "base URL"),
    ("AIPROXY_PORT", "sk-s3cret", "port"),
    ("AIPROXY_LOG", "0123456789abcdef0123456789abcdef", "text"),
    ("AIPROXY_CLIENT_KEYS", "bad name=s3cret", "names of 1 to 32"),
    ("AIPROXY_CLIENT_KEYS", "a=s3cret,a=s3cret2", "once"),
    ("AIPROXY_CLIENT_KEYS", "a=s3cret,b=s3cret", "once"),
    ("AIPROXY_CLIENT_KEYS", "s3cret-base64==", "="),
    ("AIPROXY_CLIENT_KEYS", "a" * 33 + "=s3cret", "1 to 32"),
    ("AIPROXY_CLIENT_KEYS", "sk-s3cret-abc123def456=def", "no key"),
    ("AIPROXY_CLIENT_KEYS", "alice=abc,team.gsk_s3cret0123456=def", "no key"),
    ("AIPROXY_CLIENT_KEYS", "0123456789abcdef0123456789abcdef=s3cret", "no key"),
    ("AIPROXY_CLIENT_KEYS", "a=s3cr\xe9t-s3cret", "ASCII"),
    ("AIPROXY_UPSTREAM", "https://me:s3cret@host.example/v1", "user info"),
    ("AIPROXY_UPSTREAM", "https://s3cret@host.example", "user info"),
    ("AIPROXY_UPSTREAM", "https://host?key=s3cret", "query"),
    ("AIPROXY_UPSTREAM", "https://host/v1#s3cret", "fragment"),
    ("AIPROXY_UPSTREAM", "https://me:s3cret@host\uff1a8080", "user info"),
    ("AIPROXY_UPSTREAM", "https://me:s3cret@host:s3cret", "user info"),
]
SECRET_VALUES += [("AIPROXY_KEY", value, "placeholder") for value in PLACEHOLDERS]
SECRET_VALUES += [("AIPROXY_CLIENT_KEYS", "a=" + value, "placeholder") for value in PLACEHOLDERS]


@pytest.mark.parametrize("name,value,word", SECRET_VALUES, ids=lambda value: ascii(value)[1:20])
def test_an_invalid_value_that_may_be_secret_is_not_shown(check, name, value, word):
    status, out, err = check(**{**KEY, name: value})

    assert status == 2
    assert out == ""
    assert err.startswith("aiproxy: %s: got something that is not shown" % name)
    assert word in err
    assert len(err.splitlines()) == 1
    assert value not in err
    assert not any(secret in err for secret in SECRETS)


# Lists, with {} between two items.
LISTS = [
    ("AIPROXY_KEY", "sk-one{}sk-two"),
    ("AIPROXY_CLIENT_KEYS", "a=ck-one{}b=ck-two"),
    ("AIPROXY_MODELS", "a{}b"),
    ("AIPROXY_MODELS", "\u901a\u4e49{}\u5343\u95ee"),
    ("AIPROXY_ORIGINS", "https://a.example{}https://b.example"),
    ("AIPROXY_PATHS", "/v1/a{}/v1/b"),
    ("AIPROXY_TRUSTED_PROXIES", "10.0.0.0{}10.0.0.1"),
    ("CLOUDFLARE_ACCOUNT_ID", "0123{}4567"),
]
WORKERS_AI = {"AIPROXY_UPSTREAM": "workers-ai", "CLOUDFLARE_API_TOKEN": "cf-token"}


@pytest.mark.parametrize("comma", "\uff0c\u3001", ids=ascii)
@pytest.mark.parametrize("name,value", LISTS, ids=ascii)
def test_the_commas_of_chinese_separate_nothing(name, value, comma):
    environ = WORKERS_AI if name.startswith("CLOUDFLARE_") else {}
    assert len(aiproxy.find_option(name).parse(value.format(","))) == 2
    with pytest.raises(aiproxy.SettingError) as raised:
        aiproxy.Settings({**environ, name: value.format(comma)})

    message = str(raised.value)
    assert message.startswith(name + ": got ")
    assert message.endswith("it takes a list separated by ',' and not by '\uff0c' or '\u3001'")
    assert "sk-one" not in message and "ck-two" not in message


@pytest.mark.parametrize("mark", "\uff1b\uff0c\u3001", ids=ascii)
def test_fields_for_the_upstream_are_separated_by_a_plain_semicolon(mark):
    with pytest.raises(aiproxy.SettingError, match="separated by ';' and not by '\uff1b'"):
        aiproxy.Settings({"AIPROXY_UPSTREAM_HEADERS": "X-A: s3cret%sX-B: 2" % mark})


@pytest.mark.parametrize("comma", ",\uff0c\u3001", ids=ascii)
def test_no_comma_stands_in_the_name_of_the_default_model(comma):
    with pytest.raises(aiproxy.SettingError, match="printable characters but commas"):
        aiproxy.Settings({"AIPROXY_DEFAULT_MODEL": "a%sb" % comma})


def test_all_placeholders_are_named_at_once(check):
    environ = {"AIPROXY_KEY": "sk-...", "AIPROXY_CLIENT_KEYS": "a=ck-1,b=your-key"}
    status, out, err = check(**environ)
    assert (status, out) == (2, "")
    assert err == ("aiproxy: AIPROXY_KEY, AIPROXY_CLIENT_KEYS: got something that is not shown "
                   "here because it may be secret; it takes a real key: this one looks like a "
                   "placeholder from an example\n")

    environ["AIPROXY_UPSTREAM"] = "workers-ai"      # it does not use AIPROXY_KEY
    err = check(**environ, CLOUDFLARE_ACCOUNT_ID="0123", CLOUDFLARE_API_TOKEN="token")[2]
    assert err.startswith("aiproxy: CLOUDFLARE_API_TOKEN, AIPROXY_CLIENT_KEYS: got something")


def test_every_provider_of_the_table_can_be_used():
    """A mistake in a new row would show only where somebody uses it, and not name the row."""
    options = [option.name for option in aiproxy.OPTIONS]
    for name, row in aiproxy.PROVIDERS.items():
        assert name == name.lower(), "a provider's name is looked up in lower case"
        aiproxy.split_base_url(row.base_url)
        assert row.key_variable in options, name


def test_a_key_variable_that_is_no_setting_is_named(monkeypatch):
    row = aiproxy.Provider("https://provider.example", key_variable="PROVIDER_KEY")
    monkeypatch.setitem(aiproxy.PROVIDERS, "provider", row)
    with pytest.raises(aiproxy.SettingError, match="PROVIDER_KEY is not one of OPTIONS"):
        aiproxy.Settings({"AIPROXY_UPSTREAM": "provider"})


def test_a_short_name_may_begin_like_a_key():
    settings = aiproxy.Settings({**KEY, "AIPROXY_CLIENT_KEYS": "hf-bot=one,sk-team=two"})
    assert settings.client_keys == [("hf-bot", b"one"), ("sk-team", b"two")]


REAL_KEYS = [
    "sk-proj-Abcdxxx123456",
    "gsk_0123456789abcdef",
    "keyring-7f3a",
    "hereby-secret-1",
    "0123456789abcdef0123456789abcdef.AbCdEfGh",
    "none",
    "EMPTY",
    "tokenizer",
]


@pytest.mark.parametrize("key", REAL_KEYS)
def test_a_key_that_only_resembles_a_placeholder_is_taken(key):
    settings = aiproxy.Settings({"AIPROXY_KEY": key})
    assert settings.provider_keys == [key.encode()]


# Values with quotes, and what is meant.
QUOTED = [
    ('"a,b=c"', "a b=c"),
    ("'a,b=c'", "a b=c"),
    (' "a" ', "a"),
    ('"a","b"', "a b"),
    ("'a', b", "a b"),
    ('""', ""),
    ("''", ""),
    ('" "', ""),
    ("", ""),
    (" ", ""),
]


@pytest.mark.parametrize("value,meant", QUOTED, ids=ascii)
def test_quotes_around_a_value_are_dropped_and_an_empty_one_is_not_set(value, meant):
    settings = aiproxy.Settings({"AIPROXY_MODELS": value})
    models = [name if name == model else name + "=" + model
              for name, model in settings.models.items()]
    assert models == meant.split()


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "https_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_quotes_are_dropped_from_what_the_library_reads(name):
    environ = {name: '"value"', "OTHER": '"value"'}
    aiproxy.clean_environment(environ)
    assert environ == {name: "value", "OTHER": '"value"'}

    environ = {name: "''"}
    aiproxy.clean_environment(environ)
    assert environ == {}


MISSPELT = [
    ("AIPROXY_MODEL", "AIPROXY_MODELS"),
    ("AIPROXY_CLIENT_KEY", "AIPROXY_CLIENT_KEYS"),
    ("AIPROXY_APIKEY", "AIPROXY_KEY"),
    ("AIPROXY_MAX_TOKEN", "AIPROXY_MAX_TOKENS"),
    ("AIPROXY_ORIGIN", "AIPROXY_ORIGINS"),
    ("AIPROXY_RATE_LIMIT", "AIPROXY_RATE"),
    ("aiproxy_models", "AIPROXY_MODELS"),
    ("AIPROXY_", "AIPROXY_"),
]


@pytest.mark.parametrize("name,meant", MISSPELT)
def test_a_misspelt_variable_stops_the_start_and_the_nearest_is_named(check, tmp_path, name, meant):
    status, out, err = check(**{name: "s3cret"})

    assert (status, out) == (2, "")
    assert err.startswith("aiproxy: %s is not a setting; did you mean %s" % (name, meant))
    assert "s3cret" not in err

    path = tmp_path / "env"
    path.write_text(name + "=s3cret\n", encoding="utf-8")
    assert check("--env-file", str(path)) == (status, out, err)
    assert check(**{name: ""})[0] == 0


SERVICE_VARIABLES = [
    ("AIPROXY_SERVICE_HOST", "10.0.0.1"),
    ("AIPROXY_SERVICE_PORT", "8000"),
    ("AIPROXY_SERVICE_PORT_HTTP", "8000"),
    ("AIPROXY_PORT", "tcp://10.0.0.1:81"),
    ("AIPROXY_PORT", "udp://10.0.0.1:81"),
    ("AIPROXY_PORT_81_TCP", "tcp://10.0.0.1:81"),
    ("AIPROXY_PORT_81_TCP_ADDR", "10.0.0.1"),
    ("AIPROXY_CANARY_SERVICE_HOST", "10.0.0.1"),
    ("AIPROXY_CANARY_PORT", "tcp://10.0.0.1:81"),
    ("AIPROXY_CANARY_PORT_81_TCP_PORT", "81"),
]


@pytest.mark.parametrize("name,value", SERVICE_VARIABLES)
def test_what_kubernetes_sets_for_a_service_is_passed_over(check, tmp_path, name, value):
    status, out, err = check(**{name: value})
    assert (status, err) == (0, "")
    assert "AIPROXY_PORT=8000\n" in out

    path = tmp_path / "env"
    path.write_text("AIPROXY_PORT=82\n", encoding="utf-8")
    assert "AIPROXY_PORT=82\n" in check("--env-file", str(path), **{name: value})[1]


# Settings that are unsafe together, and what the message must name.
UNSAFE = [
    pytest.param(
        {"AIPROXY_HOST": "0.0.0.0"},
        ["AIPROXY_CLIENT_KEYS=", "AIPROXY_HOST=127.0.0.1", "AIPROXY_OPEN=1"],
        id="provider key, for everyone",
    ),
    pytest.param(
        {"AIPROXY_HOST": "::"},
        ["AIPROXY_CLIENT_KEYS=", "AIPROXY_OPEN=1"],
        id="provider key, for everyone in IPv6",
    ),
    pytest.param(
        {"AIPROXY_HOST": "192.168.1.5"},
        ["AIPROXY_CLIENT_KEYS="],
        id="provider key, for the network",
    ),
    pytest.param(
        {"AIPROXY_HOST": "127.0.0.1.evil.example"},
        ["AIPROXY_CLIENT_KEYS="],
        id="a name that begins like loopback",
    ),
    pytest.param({"AIPROXY_HOST": "0.0.0.0", "AIPROXY_OPEN": "0"}, ["AIPROXY_OPEN=1"], id="open=0"),
    pytest.param(
        {"AIPROXY_KEY": "", "AIPROXY_CLIENT_KEYS": "ck-alice"},
        ["AIPROXY_CLIENT_KEYS", "AIPROXY_KEY"],
        id="client keys without a provider key",
    ),
    pytest.param(
        {"AIPROXY_CLIENT_KEYS": "alice=sk-hidden-key"},
        ["AIPROXY_CLIENT_KEYS"],
        id="the provider key as a client key",
    ),
    pytest.param(
        {"AIPROXY_KEY_HEADER": "s3cret-1", "AIPROXY_KEY": "s3cret-1"},
        ["AIPROXY_KEY_HEADER"],
        id="the provider key as its field",
    ),
    pytest.param(
        {"AIPROXY_MODELS": "a,b=c", "AIPROXY_DEFAULT_MODEL": "c"},
        ["AIPROXY_DEFAULT_MODEL", "AIPROXY_MODELS"],
        id="default model not on the list",
    ),
    pytest.param(
        {"AIPROXY_UPSTREAM": "http://127.0.0.1:8000"},
        ["AIPROXY_UPSTREAM"],
        id="the relay as its own upstream",
    ),
    pytest.param(
        {"AIPROXY_UPSTREAM": "http://localhost:9000/v1", "AIPROXY_PORT": "9000"},
        ["AIPROXY_UPSTREAM"],
        id="the same on another port",
    ),
    pytest.param(
        {
            "AIPROXY_UPSTREAM": "http://[::1]:9000",
            "PORT": "9000",
            "AIPROXY_HOST": "0.0.0.0",
            "AIPROXY_OPEN": "1",
        },
        ["AIPROXY_UPSTREAM"],
        id="the same on every address",
    ),
]


OWN_HOSTS = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST.",
    "0.0.0.0",
    "0",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "127.8.8.8",
]


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_an_upstream_that_is_the_relay_itself_does_not_start(check, host):
    own = "http://%s:8765" % host
    status, out, err = check(AIPROXY_UPSTREAM=own, AIPROXY_PORT="8765")
    assert (status, out) == (2, "")
    assert err.startswith("aiproxy: AIPROXY_UPSTREAM: ")

    assert check(AIPROXY_UPSTREAM=own, AIPROXY_PORT="8766")[0] == 0
    assert aiproxy.Upstream(own).is_loopback


def test_a_byte_order_mark_in_front_of_a_name_is_not_passed_over():
    with pytest.raises(aiproxy.SettingError, match="did you mean AIPROXY_MODELS"):
        aiproxy.Settings({"\ufeffAIPROXY_MODELS": "a"})


def test_every_address_of_this_machine_is_recognized(monkeypatch):
    own = ("192.0.2.1", 0)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", own)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: found)
    assert not aiproxy.is_own_address("host.example")
    monkeypatch.setattr(socket.socket, "bind", lambda sock, address: None)
    assert aiproxy.is_own_address("host.example")


def test_another_machine_may_have_the_same_port(check):
    for host in ("192.0.2.1", "host.invalid"):
        assert check(AIPROXY_UPSTREAM="http://%s:8000" % host)[0] == 0
        assert not aiproxy.Upstream("http://%s:8000" % host).is_loopback


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_cannot_be_read_stop_the_start(check, tmp_path, name):
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    text = tmp_path / "text"
    text.write_text("no certificate\n", encoding="utf-8")
    values = [str(tmp_path / "missing"), str(empty), str(text)]
    if name == "SSL_CERT_DIR":
        values.append(str(tmp_path) + os.pathsep + str(tmp_path / "missing"))
        assert check(**{name: str(tmp_path)})[0] == 0

    for value in values:
        status, out, err = check(**{name: value})
        assert (status, out) == (2, "")
        assert err.startswith("aiproxy: %s: " % name)
        assert check(AIPROXY_UPSTREAM="http://provider.test", **{name: value})[0] == 0
    assert check(**{name: '""'})[0] == 0


@pytest.mark.parametrize("environ,names", UNSAFE)
def test_unsafe_settings_do_not_start(check, environ, names):
    status, out, err = check(**{**KEY, **environ})

    assert status == 2
    assert out == ""
    assert all(name in err for name in names)
    assert not any(secret in err for secret in SECRETS)


SAFE = [
    {"AIPROXY_HOST": "127.0.0.1"},
    {"AIPROXY_HOST": "127.8.8.8"},
    {"AIPROXY_HOST": "::1"},
    {"AIPROXY_HOST": "localhost"},
    {"AIPROXY_HOST": "LOCALHOST"},
    {"AIPROXY_HOST": "0.0.0.0", "AIPROXY_CLIENT_KEYS": "ck-alice"},
    {"AIPROXY_HOST": "0.0.0.0", "AIPROXY_OPEN": "yes"},
    {"AIPROXY_HOST": "0.0.0.0", "AIPROXY_KEY": ""},
    {"AIPROXY_KEY": "", "AIPROXY_UPSTREAM": "ollama", "AIPROXY_CLIENT_KEYS": "ck-alice"},
    {
        "AIPROXY_KEY": "",
        "AIPROXY_UPSTREAM": "http://localhost:1/v1",
        "AIPROXY_CLIENT_KEYS": "ck-alice",
    },
]


@pytest.mark.parametrize("environ", SAFE, ids=str)
def test_safe_settings_start(check, environ):
    status, out, err = check(**{**KEY, **environ})

    assert status == 0
    assert err == ""
    assert not any(secret in out for secret in SECRETS)


HOSTS = [
    ("127.0.0.1", 200),
    ("127.0.0.1:8000", 200),
    ("localhost:1", 200),
    ("LocalHost", 200),
    ("[::1]:8000", 200),
    ("127.1.2.3", 200),
    ("127.0.0.1.evil.example", 403),
    ("evil.example:8000", 403),
    ("localhost.evil.example", 403),
    ("169.254.169.254", 403),
    ("0.0.0.0", 403),
]


@pytest.mark.parametrize("host,status", HOSTS)
def test_without_client_keys_only_a_loopback_host_is_served(upstream, relay, host, status):
    running = relay(KEY="sk-hidden-key")
    reply = running.ask("GET", "/v1/models", None, [("Host", host)])

    assert reply.status == status
    assert len(upstream.received) == (status == 200)


BASE_URLS = ["https://host.example", "https://host.example/v1", "http://10.0.0.1:1/api/paas/v4"]


@pytest.mark.parametrize("base", BASE_URLS)
@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("endpoint", [
    "/chat/completions", "/completions", "/embeddings", "/responses", "/messages", "/rerank",
    "/messages/count_tokens", "/Chat/Completions", "/audio/transcriptions",
])
def test_a_base_url_with_an_endpoint_is_an_error_that_shows_the_right_one(base, endpoint, end):
    assert aiproxy.Upstream(base + end).url
    with pytest.raises(aiproxy.SettingError) as raised:
        aiproxy.Settings({"AIPROXY_UPSTREAM": base + endpoint + end})
    assert "AIPROXY_UPSTREAM: got" in str(raised.value)
    assert str(raised.value).endswith(": " + base)


def test_a_base_url_for_anthropics_sdk_is_an_error_that_shows_the_right_one():
    with pytest.raises(aiproxy.SettingError) as raised:
        aiproxy.Settings({"AIPROXY_UPSTREAM": "https://api.deepseek.com/anthropic/"})
    assert str(raised.value).endswith(": https://api.deepseek.com/anthropic/v1")


@pytest.mark.parametrize("base,header,path", [
    ("https://api.deepseek.com/anthropic/v1", b"Authorization", "/v1/messages"),
    ("https://api.deepseek.com/v1", b"Authorization", CHAT),
    ("https://api.anthropic.com:443", b"x-api-key", "/v1/messages"),
    ("https://API.anthropic.com", b"x-api-key", "/v1/messages"),
    ("https://generativelanguage.googleapis.com", b"x-goog-api-key", CHAT),
    ("https://generativelanguage.googleapis.com/v1beta/openai", b"Authorization", CHAT),
])
def test_a_base_url_gets_the_key_where_its_api_looks_for_it(base, header, path):
    settings = aiproxy.Settings({**KEY, "AIPROXY_UPSTREAM": base})
    assert settings.key_fields[0][0] == header
    assert ("POST", path) in settings.paths
    assert settings.upstream.surely_wants_key


NOT_OURS = ["203.0.113.9", "203.0.113.9:4711", "[2001:db8::1]:4711", "10.0.0.1", "unknown"]
BY_TUNNELS = ["CF-Connecting-IP", "True-Client-IP", "X-Client-IP"]
OURS = ["127.0.0.1", "127.0.0.1:4711", "::1", "[::1]:4711", "::ffff:127.0.0.1", "localhost", ""]


AZURE = ["name.openai.azure.com", "name.openai.azure.com:8443", "name.services.ai.azure.com",
         "name.cognitiveservices.azure.com", "name.openai.azure.us"]


@pytest.mark.parametrize("netloc", AZURE)
def test_a_resource_of_azure_is_known_by_its_host(netloc):
    settings = aiproxy.Settings({**KEY, "AIPROXY_UPSTREAM": "https://%s/openai/v1" % netloc})

    assert settings.key_fields == [(b"api-key", b"sk-hidden-key")]
    assert settings.upstream.surely_wants_key
    assert settings.upstream.map_path(CHAT) == "/openai/v1/chat/completions"


@pytest.mark.parametrize("host", ["openai.azure.com", "openai.azure.com.example", "azure.com"])
def test_no_other_host_is_taken_for_a_resource_of_azure(host):
    assert not aiproxy.Upstream("https://" + host).surely_wants_key


@pytest.mark.parametrize("name", sorted(aiproxy.PROVIDERS))
def test_a_base_url_typed_by_hand_finds_the_row_of_its_provider(name):
    row = aiproxy.PROVIDERS[name]
    found = aiproxy.Upstream(row.base_url.replace("://api", "://API") + "/").provider

    assert (found.key_header, found.paths) == (row.key_header, row.paths)
    by_name = aiproxy.Upstream(name)
    assert by_name.map_path(CHAT) == (by_name.base or "/v1") + "/chat/completions"
    assert by_name.surely_wants_key == (name != "ollama")


@pytest.mark.parametrize("name,value,status", [
    *[("X-Forwarded-For", value, 403) for value in NOT_OURS],
    ("X-Forwarded-For", "203.0.113.9, 127.0.0.1", 403),
    ("X-Forwarded-For", "127.0.0.1, 203.0.113.9", 403),
    *[("X-Real-IP", value, 403) for value in NOT_OURS],
    *[("Forwarded", 'for="%s"' % value, 403) for value in NOT_OURS],
    ("Forwarded", "for=203.0.113.9;proto=https", 403),
    ("Forwarded", "proto=https; For = 203.0.113.9", 403),
    ("Forwarded", "for=127.0.0.1, for=_hidden", 403),
    ("Forwarded", 'for="127.0.0.1, 203.0.113.9"', 403),
    *[(name, "203.0.113.9", 403) for name in BY_TUNNELS],
    *[(name, "127.0.0.1", 200) for name in BY_TUNNELS],
    ("CDN-Loop", "cloudflare; loops=1", 403),
    *[(name, value, 200) for name in ("X-Forwarded-For", "X-Real-IP") for value in OURS],
    *[("Forwarded", 'for="%s";host=localhost' % value, 200) for value in OURS],
    ("Forwarded", "proto=https", 200),
])
def test_a_request_on_behalf_of_somebody_else_cannot_use_the_provider_key(
    upstream, relay, name, value, status
):
    running = relay(KEY="sk-hidden-key")
    reply = running.ask("GET", "/v1/models", None, [(name, value)])

    assert reply.status == status
    assert len(upstream.received) == (status == 200)
    if status == 403:
        assert reply.code == "host_not_allowed"
        assert "AIPROXY_OPEN" in reply.json["error"]["message"]
        assert "AIPROXY_CLIENT_KEYS" in reply.json["error"]["message"]


# Where to listen for this machine only, in forms that only the resolver understands.
LOOPBACK_FORMS = ["127.1", "2130706433", "0x7f.1", "::ffff:7f00:1", "0:0:0:0:0:0:0:1"]
# Settings, and whether a foreign Host and a foreign X-Forwarded-For are served.
KEYLESS = {"UPSTREAM": "http://192.168.1.5:11434"}
GUARDS = [
    pytest.param({"KEY": "sk-1"}, False, False, id="provider key"),
    pytest.param({"KEY": "sk-1", "CLIENT_KEYS": "ck-alice"}, True, True, id="client keys"),
    pytest.param({"KEY": "sk-1", "OPEN": "1"}, True, True, id="open"),
    pytest.param({}, True, True, id="a provider that wants a key"),
    pytest.param({"UPSTREAM": "https://api.deepseek.com/v1"}, True, True, id="the same by its URL"),
    pytest.param({"UPSTREAM": "ollama"}, False, True, id="no key at all"),
    pytest.param(KEYLESS, False, True, id="perhaps no key at all"),
    pytest.param({"OPEN": "1", **KEYLESS}, True, True, id="perhaps no key, open"),
    pytest.param({"HOST": "0.0.0.0", **KEYLESS}, True, True, id="no key, for the network"),
    pytest.param({"UPSTREAM": "ollama", "CLIENT_KEYS": "a"}, True, True, id="guarded ollama"),
    *[
        pytest.param({"UPSTREAM": "ollama", "HOST": host}, False, True, id="no key, on " + host)
        for host in LOOPBACK_FORMS
    ],
    # It may be one of this machine, and is not there to listen on as long as nobody knows it.
    pytest.param({"UPSTREAM": "ollama", "HOST": "host.invalid"}, False, True, id="no such host"),
]


@pytest.mark.parametrize("settings,by_name,by_proxy", GUARDS)
def test_what_no_key_guards_is_served_to_this_machine_only(settings, by_name, by_proxy):
    environ = {"AIPROXY_" + name: value for name, value in settings.items()}
    in_force = aiproxy.Settings(environ)

    def is_served(host, *fields):
        headers = aiproxy.Headers([(b"Host", host), *fields])
        try:
            request = types.SimpleNamespace(headers=headers)
            aiproxy.check_host_allowed(request, in_force, aiproxy.asks_for_others)
        except aiproxy.ErrorResponse as error:
            assert (error.status, error.code) == (403, "host_not_allowed")
            return False
        return True

    assert is_served(b"localhost:8000")
    assert is_served(b"proxy.example") == by_name
    assert is_served(b"localhost", (b"X-Forwarded-For", b"203.0.113.9")) == by_proxy


@pytest.mark.parametrize("host", LOOPBACK_FORMS + ["host.invalid", "0.0.0.0", "0", "::"])
def test_a_provider_key_is_not_served_on_what_is_not_plainly_loopback(host):
    with pytest.raises(aiproxy.SettingError, match="AIPROXY_HOST"):
        aiproxy.Settings({**KEY, "AIPROXY_HOST": host})


def test_a_name_that_leads_to_this_machine_is_guarded_against_rebinding(monkeypatch):
    def find(host, *arguments):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], 0))]

    addresses = {"own.test": "127.0.1.1", "lan.test": "192.168.1.5"}
    monkeypatch.setattr(socket, "getaddrinfo", find)
    environ = {"AIPROXY_UPSTREAM": "http://192.168.1.9:11434"}
    assert aiproxy.Settings({**environ, "AIPROXY_HOST": "own.test"}).wants_loopback_host
    assert not aiproxy.Settings({**environ, "AIPROXY_HOST": "lan.test"}).wants_loopback_host


@pytest.mark.parametrize("settings,is_any", [
    ({}, True),
    ({"UPSTREAM": "https://api.anthropic.com"}, True),
    ({"UPSTREAM": "ollama"}, False),
    (KEYLESS, False),
    ({"UPSTREAM": "https://api.provider.example/v1"}, False),
    ({"UPSTREAM": "ollama", "CLIENT_KEYS": "a"}, True),
    ({"KEY": "sk-1", "CLIENT_KEYS": "a"}, True),
    ({"KEY": "sk-1", "OPEN": "1"}, False),
], ids=str)
def test_any_page_may_call_only_where_callers_must_present_a_key(settings, is_any):
    environ = {"AIPROXY_" + name: value for name, value in settings.items()}
    in_force = aiproxy.Settings(environ)
    fields = [(b"Origin", b"https://app.example")]
    without_origin = aiproxy.Headers([(b"Sec-Fetch-Site", b"cross-site")])

    assert aiproxy.is_origin_allowed(aiproxy.Headers(fields), in_force) == is_any
    assert aiproxy.is_origin_allowed(without_origin, in_force) == is_any


def test_check_prints_every_setting_and_no_key(check):
    status, out, err = check(
        AIPROXY_KEY="sk-hidden-key,sk-hidden-key-2",
        AIPROXY_CLIENT_KEYS="alice=ck-alice, ck-alice-2",
        AIPROXY_MODELS="a,b=c",
        AIPROXY_PORT="81",
    )
    printed = dict(line.split("=", 1) for line in out.splitlines())

    assert status == 0
    assert err == ""
    assert set(printed) == {name for name, *_ in aiproxy.OPTIONS}
    assert printed["AIPROXY_KEY"]
    assert printed["AIPROXY_CLIENT_KEYS"] == "alice=***, client2=***"
    assert printed["AIPROXY_MODELS"] == "a,b=c"
    assert printed["AIPROXY_PORT"] == "81"
    assert not any(secret in out for secret in SECRETS)


INFERENCE = ("POST /v1/chat/completions, POST /v1/completions, POST /v1/embeddings, "
             "POST /v1/responses, GET /v1/models, GET /v1/models/*")
# Settings, and what of them is in force.
IN_FORCE = [
    ({}, {"PATHS": "all", "ORIGINS": "*", "RATE": "none", "KEY_HEADER": "none", "MODELS": "all"}),
    (KEY, {"PATHS": INFERENCE, "ORIGINS": "none", "RATE": "none", "KEY_HEADER": "Authorization"}),
    ({**KEY, "AIPROXY_OPEN": "yes"}, {"ORIGINS": "none", "RATE": "60/min", "OPEN": "1"}),
    ({**KEY, "AIPROXY_CLIENT_KEYS": "a=b"}, {"ORIGINS": "*", "CLIENT_KEYS": "a=***"}),
    (
        {**KEY, "AIPROXY_UPSTREAM": "anthropic"},
        {
            "PATHS": "POST /v1/messages, POST /v1/messages/count_tokens, GET /v1/models, "
            "GET /v1/models/*",
            "KEY_HEADER": "x-api-key",
        },
    ),
    (
        {"AIPROXY_ORIGINS": "https://App.Example:443", "AIPROXY_PATHS": "/v1/x,* /v1/y"},
        {"ORIGINS": "https://app.example", "PATHS": "POST /v1/x, * /v1/y"},
    ),
    (
        {"AIPROXY_MAX_TOKENS": "0", "AIPROXY_MAX_CHARS": "9"},
        {"MAX_TOKENS": "none", "MAX_CHARS": "9", "MAX_PER_CLIENT": "256"},
    ),
    (
        {
            "AIPROXY_UPSTREAM": "workers-ai",
            "CLOUDFLARE_ACCOUNT_ID": "0123",
            "CLOUDFLARE_API_TOKEN": "s3cret-1",
        },
        {"MAX_CHARS": "131072", "PATHS": INFERENCE, "TRUSTED_PROXIES": "loopback"},
    ),
]


@pytest.mark.parametrize("environ,in_force", IN_FORCE, ids=str)
def test_check_prints_what_is_in_force_and_not_what_was_typed(check, environ, in_force):
    status, out, err = check(**environ)
    printed = dict(line.split("=", 1) for line in out.splitlines())

    assert (status, err) == (0, "")
    assert {name: printed["AIPROXY_" + name] for name in in_force} == in_force
    assert not any(secret in out for secret in SECRETS)


@pytest.mark.parametrize("environ,port", [
    ({}, "8000"),
    ({"PORT": "81"}, "81"),
    ({"FC_SERVER_PORT": "82"}, "82"),
    ({"FC_CUSTOM_LISTEN_PORT": "83"}, "83"),
    ({"PORT": "", "FC_SERVER_PORT": "82"}, "82"),
    ({"PORT": "81", "FC_SERVER_PORT": "82"}, "81"),
    ({"PORT": "81", "AIPROXY_PORT": "80"}, "80"),
    ({"AIPROXY_PORT": " "}, "8000"),
], ids=str)
def test_the_port_that_a_platform_sets_is_used(check, environ, port):
    assert "AIPROXY_PORT=%s\n" % port in check(**environ)[1]


def test_options_override_the_environment(check):
    options = ["--port", "81", "--host=localhost", "--upstream", "http://localhost:1/v1"]
    environ = {
        "AIPROXY_PORT": "80",
        "AIPROXY_HOST": "127.0.0.9",
        "AIPROXY_UPSTREAM": "groq",
    }
    out = check(*options, **environ)[1]

    assert "AIPROXY_PORT=81\n" in out
    assert "AIPROXY_HOST=localhost\n" in out
    assert "AIPROXY_UPSTREAM=http://localhost:1/v1\n" in out


@pytest.mark.parametrize(
    "arguments",
    [["--key", "s3cret"], ["--key=s3cret"], ["s3cret"], ["--port"], ["--env-file"], ["-x"]],
    ids=str,
)
def test_an_invalid_option_stops_the_start(check, arguments):
    status, out, err = check(*arguments)

    assert status == 2
    assert out == ""
    assert "usage" in err
    assert "s3cret" not in err


@pytest.mark.parametrize("option", ["--port", "--upstream", "--env-file"])
@pytest.mark.parametrize("value", ["s3cret", "https://me:s3cret@host"])
def test_the_value_of_an_option_may_be_a_key_and_is_not_shown(check, option, value):
    for arguments in ([option, value], [option + "=" + value]):
        status, out, err = check(*arguments)

        assert status == 2
        assert out == ""
        assert option in err
        assert "s3cret" not in err


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["start", "check"])
def test_a_host_may_be_a_key_and_is_not_shown(arguments):
    environ = {"AIPROXY_KEY": "sk-1"} if arguments else {}
    done = run_program("--host", "s3cret@0123", *arguments, env=environ)

    assert done.returncode == (2 if arguments else 1)
    assert "AIPROXY_HOST" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr


# Constants at the top of the file as somebody may write them, and what --check prints.
CONSTANTS = [
    ("AIPROXY_PORT", 81, "81"),
    ("AIPROXY_OPEN", True, "1"),
    ("AIPROXY_MODELS", ["a", "b=c"], "a,b=c"),
    ("AIPROXY_MAX_CHARS", None, None),
    ("AIPROXY_GRACE", 2.5, "2.5"),
]


@pytest.mark.parametrize("name,value,shown", CONSTANTS)
def test_a_constant_may_be_a_number_or_a_list(monkeypatch, check, name, value, shown):
    replace_constants(monkeypatch, **{name: value})
    status, out, err = check()

    assert (status, err) == (0, "")
    assert shown is None or "%s=%s\n" % (name, shown) in out


def replace_constants(monkeypatch, **constants):
    """As if other values stood at the top of the file."""
    options = [option._replace(default=constants.get(option.name, option.default))
               for option in aiproxy.OPTIONS]
    monkeypatch.setattr(aiproxy, "OPTIONS", tuple(options))


def test_help_shows_no_secret_that_is_set_in_the_file(monkeypatch, check):
    replace_constants(
        monkeypatch,
        AIPROXY_KEY="sk-s3cret",
        AIPROXY_CLIENT_KEYS="a=s3cret",
        CLOUDFLARE_API_TOKEN="s3cret",
        AIPROXY_KEY_HEADER="s3cret",
        AIPROXY_UPSTREAM="https://me:s3cret@host.example",
        AIPROXY_DEFAULT_MODEL="sk-s3cret",
    )
    status, out, err = check("--help", AIPROXY_KEY="sk-s3cret-2")

    assert (status, err) == (0, "")
    assert "AIPROXY_KEY" in out
    assert "s3cret" not in out


def test_an_env_file_is_read_and_the_environment_wins(check, tmp_path):
    path = tmp_path / "env"
    path.write_text(
        "# a comment\n"
        "\n"
        "AIPROXY_KEY=sk-hidden-key\n"
        "export AIPROXY_PORT = 81\n"
        "AIPROXY_MODELS='a,b=c'\n"
        'AIPROXY_HOST="localhost"\n'
        "AIPROXY_LOG=json\r\n",
        encoding="utf-8",
    )
    status, out, err = check("--env-file", str(path), AIPROXY_PORT="82", AIPROXY_LOG="'json'")

    assert (status, err) == (0, "aiproxy: AIPROXY_PORT: the environment overrides --env-file\n")
    assert "sk-hidden" not in out
    assert "AIPROXY_PORT=82\n" in out
    assert "AIPROXY_MODELS=a,b=c\n" in out
    assert "AIPROXY_HOST=localhost\n" in out
    assert "AIPROXY_LOG=json\n" in out

    assert "AIPROXY_KEY=none" not in out


def test_what_the_environment_overrides_is_named_and_no_value_is_shown(check, tmp_path):
    path = tmp_path / "env"
    lines = ["AIPROXY_UPSTREAM=deepseek", "AIPROXY_KEY=s3cret-1", "AIPROXY_LOG=json", "EDITOR=vi"]
    path.write_text("\n".join(lines))
    environ = {"AIPROXY_UPSTREAM": "groq", "AIPROXY_KEY": "s3cret-2", "EDITOR": "ed"}
    status, out, err = check("--env-file", str(path), **environ, AIPROXY_PORT="82")

    assert status == 0
    assert "AIPROXY_UPSTREAM=groq\n" in out
    names = ["AIPROXY_UPSTREAM", "AIPROXY_KEY"]
    told = ["aiproxy: %s: the environment overrides --env-file" % name for name in names]
    assert err.splitlines() == told
    assert "s3cret" not in out + err

    with Program("--env-file", str(path), env=environ) as program:
        for name in names:
            program.wait_for_line(
                program.errors, "  warning: %s: the environment overrides --env-file" % name)
        assert not any("s3cret" in line for line in program.errors)


@pytest.mark.parametrize(
    "content,number",
    [
        (None, None),
        (b"AIPROXY_KEY=s3cret\xff\xfe", 1),
        ("AIPROXY_KEY=s3cret\n".encode("utf-16"), 1),
        ("AIPROXY_KEY=s3cret\n".encode("utf-16-le"), 1),
        ("AIPROXY_KEY=s3cret\n".encode("utf-16-be"), 1),
        (b"\n# note\nAIPROXY_KEY: s3cret\n", 3),
        (b"AIPROXY_RATE=1/s\r\n\r\ns3cret\r\n", 3),
        (b"AIPROXY_RATE=1/s\rs3cret\r", 2),
        (b"AIPROXY_KEY", 1),
        (b"export AIPROXY_KEY\n", 1),
        (b"set AIPROXY_KEY=s3cret\n", 1),
        (b"AIPROXY_KEY=s3cret\0\n", 1),
        (b"AIPROXY_MODELS=a\n\xef\xbb\xbfAIPROXY_KEY=s3cret\n", 2),
        (b"AIPROXY_KEY='s3cret\n", 1),
        (b'AIPROXY_KEY="s3cret" # note\n', 1),
        (b"AIPROXY_MODELS=a\\\nb\n", 2),
    ],
)
def test_a_line_that_is_no_assignment_stops_the_start(check, tmp_path, content, number):
    if content:
        (tmp_path / "env").write_bytes(content)

    status, out, err = check("--env-file", str(tmp_path / "env"))

    assert status == 2
    assert out == ""
    assert "--env-file" in err
    assert "s3cret" not in err
    assert number is None or "line %d " % number in err


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_byte_order_mark_is_skipped_and_later_lines_win(check, tmp_path, start):
    first = tmp_path / "first"
    first.write_bytes(start + b"AIPROXY_MODELS=a\nAIPROXY_MODELS=b\nAIPROXY_LOG=json\n")
    second = tmp_path / "second"
    second.write_bytes(start + b"AIPROXY_LOG=off\nAIPROXY_MODELS=\n")
    files = ["--env-file", str(first), "--env-file", str(second)]
    status, out, err = check(*files, AIPROXY_MODELS="")

    assert (status, err) == (0, "")
    assert "AIPROXY_MODELS=b\n" in out
    assert "AIPROXY_LOG=off\n" in out
    assert "AIPROXY_MODELS=c\n" in check(*files, AIPROXY_MODELS="c")[1]


def test_help_and_version(check):
    status, out, err = check("--help")

    assert status == 0
    assert err == ""
    assert all(name in out for name, *_ in aiproxy.OPTIONS)
    assert "--demo" in out
    assert check("--version")[:2] == (0, "aiproxy %s\n" % aiproxy.__version__)


@pytest.mark.parametrize("arguments,env,status,expected", [
    (["--version"], {}, 0, "aiproxy "),
    (["--check"], KEY, 0, "AIPROXY_KEY="),
    ([], {"AIPROXY_LOG": "xml"}, 2, "AIPROXY_LOG"),
    ([], {**KEY, "AIPROXY_HOST": "0.0.0.0"}, 2, "AIPROXY_OPEN=1"),
    (["--nothing"], {}, 2, "usage"),
], ids=["version", "check", "invalid", "unsafe", "option"])
def test_the_program_exits_with_the_right_status(arguments, env, status, expected):
    done = run_program(*arguments, env=env)

    assert done.returncode == status
    assert expected in (done.stderr if status else done.stdout)
    assert "Traceback" not in done.stderr
    assert "sk-hidden" not in done.stdout + done.stderr


@pytest.mark.parametrize("option", ["--help", "--check", "--version"])
def test_what_is_printed_need_not_be_read(option):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, PROGRAM, option]
    done = subprocess.run(command, env=clean_environ(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert (done.returncode, done.stderr) == (0, b"")


def test_the_variables_of_the_openai_sdk_are_ignored():
    environ = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": "http://127.0.0.1:8000"}
    settings = aiproxy.Settings(environ)

    assert not settings.provider_keys
    assert settings.upstream.url == "https://api.openai.com"


def test_a_misspelt_constant_in_the_file_stops_the_start(monkeypatch):
    monkeypatch.setattr(aiproxy, "AIPROXY_MODEL", "only-this", raising=False)

    with pytest.raises(aiproxy.SettingError, match="AIPROXY_MODEL .*did you mean AIPROXY_MODELS"):
        aiproxy.Settings({"AIPROXY_KEY": "sk-1"})


@pytest.mark.parametrize("variable,value,words", [
    ("AIPROXY_PATHS", "/v1/**", "whole segment"),
    ("AIPROXY_PATHS", "/v1/audio/tr*", "whole segment"),
    ("AIPROXY_PATHS", "GET /v1/x,/v1/*y/z", "whole segment"),
    ("AIPROXY_KEY_HEADER", "Content-Length", "x-api-key"),
    ("AIPROXY_KEY_HEADER", "transfer-encoding", "x-api-key"),
    ("AIPROXY_KEY_HEADER", "Host", "x-api-key"),
])
def test_what_could_do_nothing_good_does_not_start(variable, value, words):
    with pytest.raises(aiproxy.SettingError, match=variable + ".*" + words):
        aiproxy.Settings({variable: value, "AIPROXY_KEY": "k-1"})


def test_a_key_in_the_wrong_place_is_not_shown():
    settings = aiproxy.Settings({"AIPROXY_HOST": "sk-proj-s3cret"})
    assert settings.shown["AIPROXY_HOST"] == "***"


def test_a_key_full_of_underscores_is_read_at_once():
    key = "a_" * 2000 + "b"
    assert aiproxy.Settings({"AIPROXY_KEY": key}).provider_keys == [key.encode()]


def test_the_demo_has_an_upstream_of_its_own():
    assert run_program("--demo", "--upstream", "http://127.0.0.1:9").returncode == 2
