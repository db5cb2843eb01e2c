"""The recipes for those who come from another system, as the README has them.

Each is started as it stands there, sample keys apart. An HTTPS proxy leads every provider's name to
a recording upstream here, so that not even AIPROXY_UPSTREAM is changed; Cloudflare is the fake one.
"""

import collections
import json
import os
import re
import shlex
import shutil
import ssl
import sys

import pytest

import aiproxy
import fake_cloudflare
from fake_cloudflare import ACCOUNT, BASE, LLAMA_31, QWEN_3, TOKEN, FakeCloudflare
from support import (
    CHAT,
    EVENT_HEAD,
    OK,
    PATIENCE,
    PROGRAM,
    Client,
    Program,
    Received,
    Relay,
    Upstream,
    chunk,
    event,
    make_certificate,
    server_tls,
)

README = os.path.join(os.path.dirname(PROGRAM), "README.md")
HEADINGS = {"English": "You come from", "Chinese": "你从哪里来"}
# In the order of their blocks.
NAMES = ["edge function", "Workers AI worker", "cf-ai-endpoint", "ten-line Worker", "nginx"]

HOSTS = ["api.siliconflow.cn", "api.openai.com"]
PROVIDER_KEY = "sk-hidden-0123456789"
REAL_KEYS = {
    "AIPROXY_KEY": PROVIDER_KEY,
    "CLOUDFLARE_ACCOUNT_ID": ACCOUNT,
    "CLOUDFLARE_API_TOKEN": TOKEN,
}
# The port is a free one here.
NOT_TAKEN = {"AIPROXY_PORT"}
# HTTPS to clients, where this aiproxy.py has it.
TLS_FILES = ("AIPROXY_TLS_CERT", "AIPROXY_TLS_KEY")
HAS_TLS = any(option.name in TLS_FILES for option in aiproxy.OPTIONS)
if not HAS_TLS:
    NOT_TAKEN |= set(TLS_FILES)

PAGE = ("Origin", "https://any.page.example")
# What browsers and platforms add, and no provider is to see.
ABOUT_THE_CALLER = [
    PAGE,
    ("Referer", "https://any.page.example/chat"),
    ("Cookie", "session=of-the-caller"),
    ("X-Forwarded-For", "198.51.100.7"),
    ("CF-IPCountry", "CN"),
    ("CF-Connecting-IP", "198.51.100.7"),
    ("X-Fc-Access-Key-Secret", "of-the-function"),
    ("X-Fc-Security-Token", "of-the-function"),
]
TELLTALES = [
    b"any.page.example", b"of-the-caller", b"198.51.100", b"cf-ip", b"cf-conn", b"of-the-function"]


def read_section(heading):
    """The README's text from the heading with these words to the next one of its level."""
    text = open(README, encoding="utf-8").read()
    start = re.search(r"^(#+) .*%s.*$" % heading, text, re.M)
    assert start, "no heading has %r" % heading
    end = re.compile(r"^#{1,%d} " % len(start.group(1)), re.M).search(without_code(text),
                                                                      start.end())
    return text[start.end():end.start() if end else None]


def without_code(text):
    """The text with its code blanked out: a comment in a shell block begins like a heading."""
    return re.sub(r"^```.*?^```", lambda code: " " * len(code.group()), text, flags=re.M | re.S)


def read_recipes(language):
    """The shell blocks of a language's section that set something, by their recipe's name."""
    blocks = re.findall(r"```sh\n(.*?)```", read_section(HEADINGS[language]), re.S)
    blocks = [block for block in blocks if "AIPROXY_" in block]
    assert len(blocks) == len(NAMES)
    return dict(zip(NAMES, blocks))


def read_settings(block):
    """The settings that a shell command makes."""
    command = block.replace("\\\n", "")
    words = [word.partition("=") for word in shlex.split(command, comments=True)]
    return {name: value for name, equals, value in words
            if equals and name.startswith(("AIPROXY_", "CLOUDFLARE_"))}


def with_real_keys(settings):
    """The settings with keys in the place of samples, which are refused."""
    real = {name: REAL_KEYS.get(name, value) for name, value in settings.items()}
    if "AIPROXY_CLIENT_KEYS" in real:
        names = [entry.partition("=")[0] for entry in real["AIPROXY_CLIENT_KEYS"].split(",")]
        real["AIPROXY_CLIENT_KEYS"] = ",".join("%s=ck-%s-0123" % (name, name) for name in names)
    return real


class Provider(Upstream):
    """Every provider, over TLS, and the HTTPS proxy that leads to it.

    `requests` has what the provider received, `hosts` the names that were asked for.
    """

    def __init__(self, context):
        super().__init__(answer=self.connect)
        self.context = context
        self.hosts = []
        self.script = OK

    def connect(self, received):
        """Serve the requests inside the tunnel."""
        self.hosts.append(received.line.split(" ")[1])
        received.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        connection = self.context.wrap_socket(received.connection, server_side=True)
        rest = b""
        while True:
            request = Received(connection, received.number)
            rest = self.read_request(request, rest)
            if rest is None:
                return
            if callable(self.script):
                self.script(request)
            else:
                request.send(self.script)

    @property
    def requests(self):
        return [one for one in self.received if not one.line.startswith("CONNECT ")]

    def last(self):
        return self.requests[-1]


Certificates = collections.namedtuple("Certificates", "provider own")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The certificate and key of all providers, and the relay's own."""
    names = ",DNS:".join(HOSTS)
    pair = make_certificate(str(tmp_path_factory.mktemp("provider")), names)
    own = make_certificate(str(tmp_path_factory.mktemp("relay"))) if HAS_TLS else ()
    return Certificates(pair, own)


@pytest.fixture(scope="module")
def provider(certificates):
    with Provider(server_tls(*certificates.provider)) as fake:
        yield fake
        assert not fake.errors


@pytest.fixture(autouse=True)
def forget(provider):
    """Each test begins with a provider that nobody has asked yet."""
    del provider.received[:], provider.hosts[:]
    provider.all_bytes = b""
    provider.script = OK


class Started:
    """A recipe that runs at `address`."""

    def __init__(self, address, certificate=None):
        self.address = address
        # Its own one, if it speaks TLS.
        self.certificate = certificate

    def client(self):
        client = Client(self.address)
        if self.certificate:
            context = ssl.create_default_context(cafile=self.certificate)
            client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        return client

    def ask(self, method, path, body=None, fields=()):
        with self.client() as client:
            client.request(method, path, body, [("Host", "relay.example"), *fields])
            return client.read_reply(method)

    def chat(self, key=None, fields=(), **members):
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **members}).encode()
        fields = [("Content-Type", "application/json"), *fields]
        if key:
            fields.append(("Authorization", "Bearer " + key))
        return self.ask("POST", CHAT, body, fields)


def settings_of(name, **others):
    """The settings of a recipe, ready to start with, and these beside them."""
    settings = with_real_keys({**read_settings(read_recipes("English")[name]), **others})
    return {name: value for name, value in settings.items() if name not in NOT_TAKEN}


@pytest.fixture(scope="module")
def start(provider, certificates):
    """start(name, **others) runs a recipe of the README with these settings beside its own."""
    running = {}

    def start_recipe(name, **others):
        key = (name, *others)
        if key not in running:
            settings = settings_of(name, **others)
            if TLS_FILES[0] in settings:
                settings.update(zip(TLS_FILES, certificates.own))
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in way_up(provider, certificates).items():
                    patch.setenv(variable, value)
                running[key] = Relay(**{
                    name.replace("AIPROXY_", "", 1): value for name, value in settings.items()})
        relay = running[key]
        assert relay.address[0] == "0.0.0.0"
        own = certificates.own[0] if relay.settings.shown.get(TLS_FILES[0]) else None
        return Started(("127.0.0.1", relay.address[1]), own)

    yield start_recipe

    for relay in running.values():
        relay.close()


def way_up(provider, certificates):
    return {
        "HTTPS_PROXY": "http://127.0.0.1:%d" % provider.port,
        "SSL_CERT_FILE": certificates.provider[0],
    }


def refuses_nothing_of_a_page(reply):
    return reply.get("access-control-allow-origin") == "*"


def preflight(recipe, path=CHAT):
    fields = [
        PAGE,
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type,x-stainless-os"),
    ]
    reply = recipe.ask("OPTIONS", path, fields=fields)
    assert reply.status == 204
    assert refuses_nothing_of_a_page(reply)
    assert "POST" in reply.get("access-control-allow-methods")
    assert reply.get("access-control-allow-headers") == fields[2][1]
    assert reply.get("access-control-max-age") == "86400"


def streams(recipe, provider, body, fields=()):
    """Is an event with its client before the provider sends the next one?"""
    def script(request):
        request.send(EVENT_HEAD + chunk(event("first")))
        assert client_has_first.wait(PATIENCE)
        request.send(chunk(event("[DONE]")) + b"0\r\n\r\n")

    client_has_first = aiproxy.threading.Event()
    provider.script = script
    with recipe.client() as client:
        client.request("POST", CHAT, body, [("Host", "relay.example"), PAGE, *fields])
        head = client.read_head()
        assert head.get("content-type") == "text/event-stream"
        assert refuses_nothing_of_a_page(head)
        client.read_until(event("first"))
        client_has_first.set()
        client.read_until(event("[DONE]"))


# -- the text


def test_both_languages_have_the_same_settings():
    english, chinese = map(read_recipes, HEADINGS)
    assert {name: read_settings(block) for name, block in english.items()} == {
        name: read_settings(block) for name, block in chinese.items()}
    assert english["nginx"] == chinese["nginx"]


@pytest.mark.parametrize("language", HEADINGS)
def test_every_setting_that_the_text_proposes_is_accepted_with_its_recipe(language):
    pieces = re.split(r"```sh\n(.*?)```", read_section(HEADINGS[language]), flags=re.S)
    proposed = 0
    # Text and block take turns; what a text proposes is for the block below it.
    for text, block in zip(pieces[0::2], pieces[1::2]):
        for name, value in re.findall(r"`(AIPROXY_[A-Z_]+)=([^`]+)`", text):
            settings = {**read_settings(block), name: value}
            environ = {name: value for name, value in with_real_keys(settings).items()
                       if name not in TLS_FILES}
            aiproxy.Settings(environ)
            proposed += 1
    assert proposed >= 3


@pytest.mark.parametrize("language", HEADINGS)
def test_every_error_code_that_the_tables_promise_is_one_of_ours(language):
    section = read_section(HEADINGS[language])
    # Ours is the last column.
    cells = re.findall(r"\|([^|]*)\|$", section, re.M)
    source = open(PROGRAM, encoding="utf-8").read()
    ours = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", "".join(cells))
    assert len(ours) >= 10
    assert [code for code in ours if '"%s"' % code not in source] == []


# -- an edge function with a list of models, in front of SiliconFlow

ALLOWED = "Qwen/Qwen3-8B"
ASK = ('{"model": "%s",  "stream": false, "messages": []}' % ALLOWED).encode()


@pytest.fixture
def edge(start):
    return start("edge function")


def test_any_page_may_ask_for_an_allowed_model_and_the_provider_sees_the_hidden_key(edge, provider):
    fields = ABOUT_THE_CALLER + [
        ("Authorization", "Bearer whatever-the-page-sends"),
        ("Content-Type", "application/json"),
        ("X-Stainless-OS", "MacOS"),
    ]
    reply = edge.ask("POST", CHAT, ASK, fields)

    assert (reply.status, reply.body) == (200, b'{"ok":true}')
    assert refuses_nothing_of_a_page(reply)
    assert provider.hosts == ["api.siliconflow.cn:443"]
    request = provider.last()
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.body == ASK
    assert request.field("host") == "api.siliconflow.cn"
    assert request.field("authorization") == "Bearer " + PROVIDER_KEY
    names = {line.partition(b":")[0].lower() for line in request.head.split(b"\r\n")[1:]}
    assert names == {
        b"host", b"authorization", b"content-type", b"content-length", b"accept-encoding"}
    assert b"whatever-the-page-sends" not in provider.all_bytes


EDGE_REFUSALS = {
    "a model not on the list": ("POST", CHAT, b'{"model":"other"}', 403, "model_not_allowed"),
    "no model": ("POST", CHAT, b'{"messages":[]}', 400, "missing_model"),
    "two models": ("POST", CHAT, b'{"model":"%s","model":"o"}' % ALLOWED.encode(), 400,
                   "invalid_model"),
    "no JSON": ("POST", CHAT, b"model=x", 400, "invalid_json"),
    "another method": ("GET", CHAT, None, 405, "method_not_allowed"),
    "another path": ("POST", "/v1/embeddings", ASK, 404, "not_found"),
}


@pytest.mark.parametrize("asked", EDGE_REFUSALS.values(), ids=list(EDGE_REFUSALS))
def test_the_edge_function_refuses(asked, edge, provider):
    method, path, body, status, code = asked
    reply = edge.ask(method, path, body, [PAGE])

    assert (reply.status, reply.code) == (status, code)
    assert refuses_nothing_of_a_page(reply)
    assert provider.received == []
    if code == "model_not_allowed":
        assert ALLOWED in reply.json["error"]["message"]


def test_any_page_gets_its_preflight_answered_by_the_edge_function(edge, provider):
    preflight(edge)
    assert provider.received == []


def test_the_edge_function_lists_its_models(edge):
    listed = [model["id"] for model in edge.ask("GET", "/v1/models", fields=[PAGE]).json["data"]]
    assert listed[0] == ALLOWED and len(listed) == 2


def test_the_edge_function_streams(edge, provider):
    streams(edge, provider, b'{"model":"%s","stream":true}' % ALLOWED.encode())


def test_the_edge_function_hides_that_its_key_was_rejected(edge, provider):
    provider.script = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}"
    reply = edge.ask("POST", CHAT, ASK, [PAGE])
    assert (reply.status, reply.code) == (502, "upstream_credentials_rejected")


def test_the_edge_function_lets_an_address_ask_60_times_a_minute():
    environ = {name: value for name, value in settings_of("edge function").items()
               if name not in TLS_FILES}
    assert aiproxy.Settings(environ).rate == (60, 60)


def test_one_line_makes_the_edge_function_ask_for_a_key(start, provider):
    recipe = start("edge function", AIPROXY_CLIENT_KEYS="page=a-long-random-string")

    refused = recipe.ask("POST", CHAT, ASK, [PAGE])
    assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert provider.received == []

    fields = [PAGE, ("Authorization", "Bearer ck-page-0123")]
    assert recipe.ask("POST", CHAT, ASK, fields).status == 200
    assert b"ck-page" not in provider.all_bytes


# -- Cloudflare Workers AI


@pytest.fixture(scope="module")
def account():
    """The fake Cloudflare, which also has the model that the recipe names first."""
    model = "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b"
    with FakeCloudflare() as fake, pytest.MonkeyPatch.context() as patch:
        patch.setitem(fake_cloudflare.CHAT, model, (QWEN_3, LLAMA_31))
        yield fake
        assert not fake.errors


@pytest.fixture
def cloudflare(account):
    """The same, with nothing received yet."""
    del account.received[:]
    account.all_bytes = b""
    return account


@pytest.fixture
def workers(start, cloudflare):
    return start("Workers AI worker", CLOUDFLARE_API_BASE_URL=cloudflare.base)


@pytest.fixture
def endpoint(start, cloudflare):
    return start("cf-ai-endpoint", CLOUDFLARE_API_BASE_URL=cloudflare.base)


def asked_of(cloudflare):
    """The body of the request that Cloudflare received."""
    received = cloudflare.received[-1]
    assert received.line == "POST %s/ai/v1/chat/completions HTTP/1.1" % BASE
    assert received.field("authorization") == "Bearer " + TOKEN
    assert not any(word in received.head.lower() for word in TELLTALES)
    return json.loads(received.body)


def test_a_short_name_leads_to_its_model_with_the_token(workers, cloudflare):
    reply = workers.chat("ck-alice-0123", ABOUT_THE_CALLER, model="deepseek-r1")

    assert (reply.status, reply.json["object"]) == (200, "chat.completion")
    assert reply.json["model"] == "deepseek-r1"
    assert refuses_nothing_of_a_page(reply)
    body = asked_of(cloudflare)
    assert body["model"] == "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b"
    assert body["max_tokens"] == 4096
    assert b"ck-alice" not in cloudflare.all_bytes


def test_the_default_model_is_the_one_of_the_worker(workers, cloudflare):
    assert workers.chat("ck-alice-0123").json["model"] == "deepseek-r1"
    assert asked_of(cloudflare)["model"] == "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b"


@pytest.mark.parametrize("model", [
    "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b", "@cf/meta/llama-4-scout-17b-16e-instruct",
    "gpt-4o"])
def test_the_workers_short_names_are_an_allow_list(workers, cloudflare, model):
    reply = workers.chat("ck-alice-0123", [PAGE], model=model)
    assert (reply.status, reply.code) == (403, "model_not_allowed")
    assert cloudflare.received == []


@pytest.mark.parametrize("key", [None, "ck-wrong"])
def test_the_worker_asks_for_a_client_key(workers, cloudflare, key):
    reply = workers.chat(key, [PAGE], model="deepseek-r1")
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert refuses_nothing_of_a_page(reply)
    assert cloudflare.received == []


def test_the_worker_streams_and_answers_preflights(workers):
    reply = workers.chat("ck-alice-0123", [PAGE], model="deepseek-r1", stream=True)
    assert reply.get("content-type").startswith("text/event-stream")
    assert b"chat.completion.chunk" in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n")
    preflight(workers)


def test_the_worker_tells_its_health_and_its_models(workers):
    key = ("Authorization", "Bearer ck-alice-0123")
    assert workers.ask("GET", "/health").json["status"] == "healthy"
    assert "models" not in workers.ask("GET", "/health").json
    assert "deepseek-r1" in workers.ask("GET", "/health", fields=[key]).json["models"]

    listed = workers.ask("GET", "/v1/models", fields=[key]).json["data"]
    # Of the recipe's list, as far as Cloudflare still has them: the fake has few.
    assert "gpt-oss-20b" in [model["id"] for model in listed]
    assert not any(model["id"].startswith("@") for model in listed)


def test_each_key_of_cf_ai_endpoint_may_ask_for_a_listed_model(endpoint, cloudflare):
    model = "@cf/meta/llama-4-scout-17b-16e-instruct"
    for key in ("ck-alice-0123", "ck-bob-0123"):
        reply = endpoint.chat(key, ABOUT_THE_CALLER, model=model, top_k=50)
        assert (reply.status, reply.json["model"]) == (200, model)
        assert refuses_nothing_of_a_page(reply)
        assert asked_of(cloudflare)["top_k"] == 50

    # Out of range is what Cloudflare says is so.
    reply = endpoint.chat(key, model=model, top_k=77)
    assert (reply.status, reply.code) == (400, "invalid_request")

    assert endpoint.chat("ck-carol-0123", model=model).status == 401


@pytest.mark.parametrize("members,status,code", [
    ({"model": "@cf/meta/llama-3.1-8b-instruct"}, 403, "model_not_allowed"),
    ({}, 400, "missing_model"),
    ({"model": "@cf/openai/gpt-oss-20b", "user": "x", "system": "y" * 131073}, 400,
     "invalid_parameter"),
], ids=["a model not on the list", "no model", "too much text"])
def test_cf_ai_endpoint_refuses(endpoint, cloudflare, members, status, code):
    reply = endpoint.chat("ck-bob-0123", **members)
    assert (reply.status, reply.code) == (status, code)
    assert cloudflare.received == []


def test_cf_ai_endpoint_has_completions_and_a_list_with_the_known_members(endpoint):
    key = ("Authorization", "Bearer ck-bob-0123")
    body = b'{"model":"@cf/meta/llama-4-scout-17b-16e-instruct","prompt":"Hi","stream":true}'
    reply = endpoint.ask("POST", "/v1/completions", body, [key])
    assert reply.body.endswith(b"data: [DONE]\n\n")

    model = endpoint.ask("GET", "/v1/models", fields=[key]).json["data"][0]
    assert model["id"] == "@cf/openai/gpt-oss-20b"
    assert {"id", "object", "created", "owned_by", "permission", "root", "parent"} < set(model)
    assert {"description", "task", "context_window"} <= set(model["metadata"])


# -- transparent relays in front of OpenAI


@pytest.fixture
def ten_lines(start):
    return start("ten-line Worker")


@pytest.fixture(scope="module")
def function(provider, certificates, tmp_path_factory):
    """The bootstrap as Function Compute starts it; `python3` is the Python of the tests."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("there is no bash")
    code = tmp_path_factory.mktemp("code")
    shutil.copy(PROGRAM, str(code))
    (code / "bootstrap").write_text(read_recipes("Chinese")["nginx"])
    programs = tmp_path_factory.mktemp("bin")
    python3 = programs / "python3"
    python3.write_text('#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)
    python3.chmod(0o755)

    env = {
        **way_up(provider, certificates),
        # Empty is as not set: the platform's own name must count.
        "AIPROXY_PORT": "",
        "FC_SERVER_PORT": "0",
        "PATH": "%s%s%s" % (programs, os.pathsep, os.environ["PATH"]),
    }
    command = [bash, "-c", 'cd "$0" && exec bash ./bootstrap', str(code)]
    with Program(command=command, env=env) as program:
        yield Started(program.address)


@pytest.fixture(params=["ten-line Worker", "nginx"])
def transparent(request):
    names = {"ten-line Worker": "ten_lines", "nginx": "function"}
    return request.getfixturevalue(names[request.param])


@pytest.mark.parametrize("method,path,body", [
    ("POST", CHAT, b'{"model": "any",  "messages": []}'),
    ("PATCH", "/any/where?x=1&y=%2F", b"\x00any bytes"),
    ("DELETE", "/v1/files/file-1", None),
    ("GET", "/v1/models", None),
])
def test_any_request_goes_up_as_it_is_with_the_callers_own_key(transparent, provider, method, path,
                                                               body):
    own = [
        ("Authorization", "Bearer sk-of-the-caller-0"),
        ("OpenAI-Organization", "org-1"),
        ("X-Anything", "else"),
    ]
    provider.script = (b"HTTP/1.1 418 I'm a teapot\r\nX-Request-Id: req_1\r\nX-Any: answer\r\n"
                       b"Content-Length: 3\r\n\r\n\x00{}")
    reply = transparent.ask(method, path, body, own + ABOUT_THE_CALLER)

    assert (reply.status, reply.body) == (418, b"\x00{}")
    assert (reply.get("x-any"), reply.get("x-request-id")) == ("answer", "req_1")
    assert refuses_nothing_of_a_page(reply)
    assert provider.hosts in ([], ["api.openai.com:443"])       # [] on a kept connection
    request = provider.last()
    assert request.line == "%s %s HTTP/1.1" % (method, path)
    assert request.body == (body or b"")
    assert request.field("host") == "api.openai.com"
    for name, value in own:
        assert request.field(name) == value
    head = request.head.lower().replace(b"bearer sk-of-the-caller-0", b"")
    assert [word for word in TELLTALES if word in head] == []


def test_a_transparent_relay_answers_preflights_and_streams(transparent, provider):
    preflight(transparent, "/v1/anything")
    assert provider.received == []
    streams(transparent, provider, b'{"stream":true}', [("Authorization", "Bearer sk-callers")])


def test_the_ten_line_worker_relays_websockets(ten_lines, provider):
    def script(request):
        request.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                     b"Connection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\nhello")

    provider.script = script
    fields = [
        ("Host", "relay.example"),
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ("Sec-WebSocket-Version", "13"),
    ]
    with ten_lines.client() as client:
        client.request("GET", "/v1/realtime?model=any", None, fields)
        assert client.read_head().status == 101
        assert client.read_until(b"hello") == b"hello"


def test_the_function_listens_where_the_platform_says(function):
    # Not on the usual port: FC_SERVER_PORT is 0, any free one.
    assert function.address[1] != 8000


@pytest.mark.parametrize("name", ["FC_SERVER_PORT", "FC_CUSTOM_LISTEN_PORT"])
def test_port_9000_is_taken_from_the_platforms_name(name):
    environ = {**read_settings(read_recipes("English")["nginx"]), name: "9000"}
    settings = aiproxy.Settings(environ)
    assert (settings.host, settings.port) == ("0.0.0.0", 9000)
    # As long as the nginx waited, and longer than the platform keeps a connection idle.
    assert settings.timeout >= 8 * 60
    assert aiproxy.IDLE_SECONDS > 15 * 60
