"""Invalid or unsafe settings do not start, with one line that names the variable.

The line never shows a secret.
"""

import os
import types

import pytest

import aiproxy
from support import run_program

KEY = {"AIPROXY_KEY": "sk-hidden-key"}
SECRETS = ("s3cret", "sk-hidden", "ck-alice")


@pytest.fixture
def check(monkeypatch, capsys):
    """check(*arguments, **environment) → exit status, stdout, stderr of `aiproxy.py --check`.

    It runs in this process.
    """

    def run(*arguments, **environ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(environ))
            patch.setattr("sys.argv", ["aiproxy.py", "--check"] + list(arguments))
            status = aiproxy.main()
        return (status,) + tuple(capsys.readouterr())

    return run


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
            "https://host/a/../b",
            "https://ho st",
            "data:,x",
        ],
    ),
    ("AIPROXY_KEY_HEADER", ["X Key", "Key:", "Schl\xfcssel"]),
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
]
# A variable that may hold a secret, an invalid value, and a word of the error message.
SECRET_VALUES = [
    ("AIPROXY_KEY", "s3cret key", "visible ASCII"),
    ("AIPROXY_KEY", "\u201cs3cret\u201d", "visible ASCII"),
    ("AIPROXY_KEY", "s3cret\nX: y", "visible ASCII"),
    ("AIPROXY_CLIENT_KEYS", "bad name=s3cret", "names of 1 to 32"),
    ("AIPROXY_CLIENT_KEYS", "a=s3cret,a=s3cret2", "once"),
    ("AIPROXY_CLIENT_KEYS", "a=s3cret,b=s3cret", "once"),
    ("AIPROXY_CLIENT_KEYS", "s3cret-base64==", "="),
    ("AIPROXY_CLIENT_KEYS", "a" * 33 + "=s3cret", "1 to 32"),
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


NOT_OURS = ["203.0.113.9", "203.0.113.9:4711", "[2001:db8::1]:4711", "10.0.0.1", "unknown"]
OURS = ["127.0.0.1", "127.0.0.1:4711", "::1", "[::1]:4711", "::ffff:127.0.0.1", "localhost", ""]


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
]


@pytest.mark.parametrize("settings,by_name,by_proxy", GUARDS)
def test_what_no_key_guards_is_served_to_this_machine_only(settings, by_name, by_proxy):
    environ = {"AIPROXY_" + name: value for name, value in settings.items()}
    in_force = aiproxy.Settings(environ)

    def is_served(host, *fields):
        headers = aiproxy.Headers([(b"Host", host), *fields])
        try:
            aiproxy.check_host_allowed(types.SimpleNamespace(headers=headers), in_force)
        except aiproxy.ErrorResponse as error:
            assert (error.status, error.code) == (403, "host_not_allowed")
            return False
        return True

    assert is_served(b"localhost:8000")
    assert is_served(b"proxy.example") == by_name
    assert is_served(b"localhost", (b"X-Forwarded-For", b"203.0.113.9")) == by_proxy


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


@pytest.mark.parametrize("environ,port", [
    ({}, "8000"),
    ({"PORT": "81"}, "81"),
    ({"FC_SERVER_PORT": "82"}, "82"),
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
    assert "s3cret" not in err or arguments == ["s3cret"]


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
    status, out, err = check("--env-file", str(path), AIPROXY_PORT="82")

    assert (status, err) == (0, "")
    assert "sk-hidden" not in out
    assert "AIPROXY_PORT=82\n" in out
    assert "AIPROXY_MODELS=a,b=c\n" in out
    assert "AIPROXY_HOST=localhost\n" in out
    assert "AIPROXY_LOG=json\n" in out

    assert "AIPROXY_KEY=none" not in out


@pytest.mark.parametrize(
    "content", [None, b"AIPROXY_KEY=s3cret\xff\xfe"], ids=["missing", "not text"]
)
def test_an_env_file_that_cannot_be_read_stops_the_start(check, tmp_path, content):
    if content:
        (tmp_path / "env").write_bytes(content)

    status, out, err = check("--env-file", str(tmp_path / "env"))

    assert status == 2
    assert out == ""
    assert "--env-file" in err
    assert "s3cret" not in err


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


def test_the_variables_of_the_openai_sdk_are_ignored():
    environ = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": "http://127.0.0.1:8000"}
    settings = aiproxy.Settings(environ)

    assert not settings.provider_keys
    assert settings.upstream.url == "https://api.openai.com"
