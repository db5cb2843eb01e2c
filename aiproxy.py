#!/usr/bin/env python3
"""aiproxy: one file between people's programs and an AI provider. It hides the key and relays answers as they arrive.

    client ---- request ---->  Handler: read the head strictly, walk the ladder of refusals  ---- request ---->  upstream
    client <--- its head ----  Handler: wait for the answer while watching the client        <--- head --------  upstream
    client <--- its body ----  RelayLoop: one thread moves the bodies of all answers         <--- events ------  upstream

Words used below. Client: whoever calls us. Upstream: the provider we call. Client key: a key we gave out. Provider key: the
key we hide. Origin: only the CORS kind. Relay: to copy an answer through unchanged. Event: one block of a text/event-stream.
Chunk: a piece of HTTP's chunked coding. To refuse: to answer with an error of our own.

Start reading at Handler.handle_one_request and scroll down: the file is in the order in which a request travels.
RFC 9110 is HTTP's meaning, RFC 9112 its bytes on the wire.
"""
import base64
import collections
import datetime
import email.utils
import errno
import hmac
import http.client
import http.server
import itertools
import json
import math
import os
import queue
import re
import select
import selectors
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib

__version__ = "1.0"

# ---- Settings ------------------------------------------------------------------------------------------------------
# What an operator may change: the defaults stand here, the environment overrides them, --help prints this table.

KNOBS = (  # variable, default, what it means and in which unit; an empty value is the same as none
    ("AIPROXY_UPSTREAM", "openai", "a provider's name (see PROVIDERS) or a base URL; a path in it takes the place of /v1"),
    ("AIPROXY_KEY", "", "the provider key, or several, comma-separated; empty: nothing is hidden, callers bring their own"),
    ("AIPROXY_KEY_HEADER", "", "field that carries the provider key: Authorization, x-api-key, ...; empty: by provider"),
    ("AIPROXY_CLIENT_KEYS", "", "keys that clients must present, comma-separated, each name=key or key"),
    ("AIPROXY_MODELS", "", "models allowed, comma-separated; alias=model adds a short name; empty: all"),
    ("AIPROXY_DEFAULT_MODEL", "", "the model of a request that names none; empty: such a request is refused"),
    ("AIPROXY_PATHS", "", "what may be called: PATH (POST), METHOD PATH or * PATH; * is one segment or, alone, everything;"
                          " empty: the inference paths with a hidden key, else everything"),
    ("AIPROXY_ORIGINS", "", "browser origins allowed, comma-separated, exact; * for any; empty: any where callers must"
                            " present a key, else none"),
    ("AIPROXY_OPEN", "", "1: serve a hidden key without client keys to more than this machine, knowingly"),
    ("AIPROXY_HOST", "127.0.0.1", "address to listen on"),
    ("AIPROXY_PORT", "8000", "port to listen on; where it is not set, PORT and FC_SERVER_PORT are understood"),
    ("AIPROXY_RATE", "", "requests per client key, else per client address: 20/s, 60/min, 100/h, 1000/day; empty: no limit, or"
                         " 60/min with AIPROXY_OPEN"),
    ("AIPROXY_MAX_TOKENS", "", "most output tokens a request may ask for, and what one that names none gets; empty: no limit"),
    ("AIPROXY_MAX_CHARS", "", "most characters of prompt text in a request; 0: no limit; empty: 131072 for workers-ai, else none"),
    ("AIPROXY_MAX_BODY", "32MB", "largest request body that is held in memory or sent up with a hidden key (KB, MB, GB)"),
    ("AIPROXY_MAX_CONNECTIONS", "1024", "clients served at once; above it 503"),
    ("AIPROXY_MAX_PER_CLIENT", "64", "connections from one client address, this machine's own excepted; above it 503"),
    ("AIPROXY_CONNECT_TIMEOUT", "10", "seconds to connect to the upstream, TLS included"),
    ("AIPROXY_TIMEOUT", "600", "seconds of upstream silence, also between events; there is no limit in total"),
    ("AIPROXY_GRACE", "8", "seconds that running requests get at SIGTERM"),
    ("AIPROXY_LOG", "text", "one line per request on stdout: text, json or off"),
    ("CLOUDFLARE_ACCOUNT_ID", "", "for workers-ai: the account"),
    ("CLOUDFLARE_API_TOKEN", "", "for workers-ai: the provider key, a token with Workers AI Read and Edit"),
    ("CLOUDFLARE_API_BASE_URL", "https://api.cloudflare.com/client/v4", "for workers-ai: where Cloudflare's API is"),
)
DEFAULTS = {name: default for name, default, _ in KNOBS}

# Limits that nobody needs to change. Seconds, bytes and numbers, each with its reason.
HEAD_SECONDS = 30           # for a whole head from its first byte, so that a byte at a time gets nowhere
BODY_GRACE, BODY_RATE = 30, 1024    # a request body may dawdle this long, then this many bytes a second are asked for
IDLE_SECONDS = 75           # a kept-alive client without a request: nginx's default
STALL_SECONDS = 60          # a client that takes no byte of its answer: nginx's send_timeout
MAX_FIELDS, MAX_LINE, MAX_HEAD = 100, 16384, 65536      # fields, bytes a line, bytes in all: what nginx and Apache allow
MAX_CHUNK_LINE, MAX_TRAILER = 4096, 8192    # a chunk's size line with its extensions; all trailer fields
MAX_DEPTH = 100             # nesting of a JSON body: far above any schema, far below any parser's stack
MAX_INTERIM = 20            # 1xx answers before the real one
CATALOGUE_SECONDS, CATALOGUE_RETRY = 600, 30    # a model list that was read, or could not be, is asked for again after
MAX_ANSWER = 64 << 20       # of an answer that has to be translated as a whole
POOL_SIZE, POOL_SECONDS = 100, 30   # idle upstream connections; below the 60 s after which providers close theirs
LINGER_SECONDS, LINGER_BYTES = 2, 4 << 20   # how long a refused client may go on sending, so that it can read why
HOLD_BYTES, HOLD_SECONDS = 65536, 0.5   # a body this small is read whole before the upstream hears of it
USAGE_BYTES = 4096          # of an answer, kept from where its last `usage` begins
PEEK_BYTES = 65536          # of an error answer, searched for the provider key before it may pass
TLS_RECORD = 16384          # the most that TLS sends as one piece, readable only when whole (RFC 8446 section 5.1)
PIECE = 65536               # bytes moved at a time
SPARE_SECONDS = 5           # a thread without a client is kept this long
MAX_BUCKETS = 10000         # clients whose rate is remembered; about 3 MB
KEY_COOLDOWN = 60           # seconds a provider key rests after a 402, 403 or 429 that names no time
KEY_SPENT = (401, 402, 403, 429)    # what an upstream says when another key may fare better
EARLY_BYTES = 65536         # of a next request that are taken in while an answer is still running

# ---- Tables: what the protocols fix --------------------------------------------------------------------------------

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
PROVIDERS = {  # To add a provider, add a row: base URL as its SDK has it, the field for its key, its inference paths.
    "openai": ("https://api.openai.com", "Authorization", OPENAI_PATHS),
    "siliconflow": ("https://api.siliconflow.cn/v1", "Authorization", OPENAI_PATHS),
    "deepseek": ("https://api.deepseek.com", "Authorization", OPENAI_PATHS),
    "anthropic": ("https://api.anthropic.com", "x-api-key", ANTHROPIC_PATHS),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "Authorization", OPENAI_PATHS),
    "openrouter": ("https://openrouter.ai/api/v1", "Authorization", OPENAI_PATHS),
    "dashscope": ("https://dashscope.aliyuncs.com/compatible-mode/v1", "Authorization", OPENAI_PATHS),
    "moonshot": ("https://api.moonshot.cn/v1", "Authorization", OPENAI_PATHS),
    "zhipu": ("https://open.bigmodel.cn/api/paas/v4", "Authorization", OPENAI_PATHS),
    "groq": ("https://api.groq.com/openai/v1", "Authorization", OPENAI_PATHS),
    "mistral": ("https://api.mistral.ai/v1", "Authorization", OPENAI_PATHS),
    "ollama": ("http://127.0.0.1:11434", "", OPENAI_PATHS),     # no field: it wants no key
    "workers-ai": (DEFAULTS["CLOUDFLARE_API_BASE_URL"], "Authorization", OPENAI_PATHS),    # and the account: see Settings
}
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")     # how requests name the most output tokens
LIMITS_BY_PATH = {      # the names that count on a path, the one that all providers take first; elsewhere nothing is added
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"), "/v1/completions": ("max_tokens",), "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",)}
LOOKED_AT = ("model", "n", "best_of") + TOKEN_LIMITS
INFERENCE_PATHS = OPENAI_PATHS + ANTHROPIC_PATHS

KEY_FIELDS = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")     # where a client may carry its key

# Meant for the next hop alone (RFC 9110 section 7.6.1); `Trailer` announces what we drop; the last is the h2c upgrade's.
HOP_BY_HOP = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade",
                        b"proxy-authenticate", b"proxy-authorization", b"http2-settings"))
# Never go up as they came: Host, framing and Expect are ours to write; the rest tells who and where the caller is.
NEVER_UP = HOP_BY_HOP | frozenset((
    b"host", b"content-length", b"expect", b"forwarded", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"via", b"cdn-loop",
    b"cf-connecting-ip", b"cf-ipcountry", b"cf-ray", b"cf-visitor", b"cf-worker", b"cf-ew-via", b"x-amzn-trace-id", b"cookie",
    b"origin", b"referer"))
NEVER_UP_PREFIXES = (b"x-forwarded-", b"x-fc-", b"x-vercel-", b"fly-", b"sec-fetch-", b"sec-ch-")
# With a hidden key only these go up: what the call needs, and nothing of the caller.
UP_WITH_HIDDEN_KEY = frozenset((
    b"content-type", b"content-encoding", b"accept", b"accept-encoding", b"user-agent", b"idempotency-key", b"openai-beta",
    b"anthropic-version", b"anthropic-beta", b"x-session-affinity"))
# Never come down: about the upstream's own connection, host or browser session, or ours to write.
NEVER_DOWN = HOP_BY_HOP | frozenset((b"content-length", b"set-cookie", b"alt-svc", b"strict-transport-security", b"nel", b"report-to"))
NEVER_DOWN_WITH_HIDDEN_KEY = frozenset((b"server", b"openai-organization", b"openai-project"))
EXPOSED = (b"x-request-id", b"request-id", b"retry-after", b"retry-after-ms", b"x-should-retry")   # a browser's script may read these
ONCE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"authorization", b"origin")   # two of these: two readings
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                                        # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")   # RFC 9112 section 3
STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")  # section 4
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")        # section 5; no folding, no bare CR or LF
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")     # section 7.1
CHUNK_LINE_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?)?\r?")
USAGE_OBJECT = re.compile(rb'"usage"[ \t\r\n]*:[ \t\r\n]*\{')
ABSOLUTE_FORM = re.compile(r"https?://([^/?#]*)(.*)", re.I)                       # section 3.2.2
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")   # RFC 9110 section 7.2
LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[?::1\]?", re.I)
# A segment `.` or `..`, however it is encoded: RFC 3986 section 5.2.4 would make another path of it.
DOT_SEGMENT = re.compile(r"(?:^|[/\\]|%(?:25)*(?:2f|5c))(?:\.|%(?:25)*2e){1,2}(?:[/\\;]|%(?:25)*(?:2f|5c|3b)|$)", re.I)
BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00|\\|#")
SEGMENT = re.compile(r"[A-Za-z0-9@:._~+,=()!$&'*/ -]+")     # what a `*` in AIPROXY_PATHS may stand for, decoded

# ---- One request, top to bottom ------------------------------------------------------------------------------------


class Refusal(Exception):
    """An error answer of our own: the one kind of failure that a client gets to read. `fields` are extra header fields."""

    def __init__(self, status, code, message, param=None, **fields):
        super().__init__(code)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.fields = [(name.replace("_", "-").encode(), str(value).encode()) for name, value in fields.items()]


class ClientGone(Exception):
    """The client hung up, or takes nothing: there is nobody left to answer. args[0] is the word for the log."""


class UpstreamFailed(Exception):
    """The upstream broke off or broke the rules. args[0] is an error code of ours, args[1] says what happened."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection, one request after the other. http.server's parser is replaced by read_head, which is strict."""

    def setup(self):
        self.connection = self.request
        self.connection.setblocking(False)
        if self.connection.family != getattr(socket, "AF_UNIX", None):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = Wire(self.connection)
        self.settings = self.server.settings
        self.first_request, self.reset_on_close, self.version = True, False, (1, 1)

    def handle_one_request(self):
        """Read one request, answer it, log it. Whatever goes wrong ends here."""
        self.start_record()
        self.close_connection = True        # until an answer has gone out whole
        try:
            self.head = self.wait_for_request()
            self.walk_ladder()
        except Refusal as refusal:
            self.refuse(refusal)
        except ClientGone as gone:
            self.record.outcome = gone.args[0]
        except OSError:                     # only the client's own socket is unguarded
            self.record.outcome = "client_gone"
        except Exception as error:          # a fault of ours: the client gets a 500, the log the place, nobody the values
            self.server.report_fault(error)
            self.refuse(Refusal(500, "internal_error", "The proxy failed on this request. Its log says where."))
        finally:
            if self.record.method or self.record.status:
                self.server.log.write(self.record)
        self.close_connection = self.close_connection or self.server.closing

    def start_record(self):
        self.head = self.body = None
        self.method = self.path = self.query = ""
        self.cors = self.cors_fields(None)
        self.head_sent = False
        self.record = Record(self.client_address[0])
        self.address = network_of(self.client_address[0])

    def wait_for_request(self):
        """The head of the next request. A silent kept-alive client is let go after IDLE_SECONDS, or when room is needed."""
        client, first = self.client, self.first_request
        self.first_request = False
        deadline = time.monotonic() + (HEAD_SECONDS if first else IDLE_SECONDS)
        if not client.buffer:
            self.server.note_idle(self)
            arrived = client.wait_readable(deadline - time.monotonic())
            if not self.server.note_busy(self) or not arrived and not first:
                raise ClientGone("idle")
        self.record.begin()
        if not first:
            deadline = time.monotonic() + HEAD_SECONDS

        def more():
            if not client.wait_readable(deadline - time.monotonic()):
                self.record.method = self.record.method or "-"
                raise Refusal(408, "request_timeout", "The head of the request did not arrive within %d seconds." % HEAD_SECONDS)
            if not client.fill():
                raise ClientGone("client_gone")
        try:
            client.skip_empty_lines(more)
            return client.read_head(REQUEST_LINE, more)
        except BadHead as bad:
            self.record.method = self.record.method or "-"
            raise Refusal(bad.status, "bad_request", bad.args[0])

    def walk_ladder(self):
        """Every step answers, refuses or lets the request go on; the statuses are in the order in which they can happen."""
        self.check_head()                                   # 400 405 501 505
        if self.is_preflight() or self.path == "*":
            return self.answer(204, preflight_fields(self.head, self.settings) if self.is_preflight() else [])
        if self.path in ("/", "/health", "/healthz") and self.method in ("GET", "HEAD"):
            return self.answer_about_us()
        self.check_host()                                   # 403
        self.check_origin()                                 # 403
        self.check_client_key()                             # 400 401
        if self.settings.hidden:
            self.path = openai_form(self.path)
        if self.is_model_list() and (self.settings.models or self.settings.workers):    # 404 502
            return self.answer_models()
        self.check_path()                                   # 404 405
        if self.method == "OPTIONS" and self.settings.hidden:
            return self.answer(204, [(b"Allow", ", ".join(allowed_methods(self.path, self.settings.paths)).encode())])
        if self.websocket:
            self.query, self.record.model = resolve_query_model(self.query, self.settings)     # 400 403
        self.check_rate()                                   # 429
        prefix, call = self.read_body(), None               # 408 413 415
        if self.body_rules_apply():
            prefix, self.record.model, call = apply_body_rules(prefix, self.path, self.settings)       # 400 403
        if call:
            return self.relay_translated(call)              # 502 504, and Cloudflare's own
        answer = self.open_upstream(prefix)                 # 502 504
        return self.relay(answer)

    # -- the head: is it well formed, and do we speak its version and method?

    def check_head(self):
        method, target, major, minor = self.head.start
        self.method, self.record.method = method.decode(), method.decode()
        self.version = min((int(major), int(minor)), (1, 1))
        target = target.decode()
        self.record.path = target.partition("?")[0]
        if major != b"1":
            raise Refusal(505, "version_not_supported", "This proxy speaks HTTP/1.1.")
        twice = [name.decode() for name in ONCE if len(self.head.all(name)) > 1]
        if twice:
            raise Refusal(400, "bad_request", "The field %s stands there twice." % twice[0])
        self.body = request_body(self.head, self.version, self.client)
        self.cors = self.cors_fields(self.head.get(b"origin"))
        forwarded = self.head.elements(b"x-forwarded-for")
        if forwarded and LOOPBACK.fullmatch(self.address):      # a proxy of our own in front, which knows
            self.record.client = forwarded[-1].decode("latin-1")
            self.address = network_of(self.record.client)
        host = self.head.get(b"host")
        if host is None and self.version >= (1, 1) or host is not None and not HOST.fullmatch(host):
            raise Refusal(400, "bad_request", "The request needs one valid Host field.")
        if self.method not in METHODS:
            known = self.method in ("TRACE", "CONNECT")     # TRACE would echo keys, CONNECT would make an open proxy of us
            raise Refusal(405 if known else 501, "method_not_allowed", "The method %s is not served here." % self.method[:20],
                          **({"Allow": ", ".join(METHODS)} if known else {}))
        if target == "*" and self.method == "OPTIONS":
            self.path = target
            return
        absolute = ABSOLUTE_FORM.fullmatch(target)
        if absolute:
            if host is None or absolute.group(1).encode().lower() != host.lower():
                raise Refusal(400, "bad_request", "The authority in the request target is not the Host field.")
            target = absolute.group(2) if absolute.group(2).startswith("/") else "/" + absolute.group(2)
        self.path, mark, query = target.partition("?")
        self.query = mark + query
        self.record.path = self.path
        if self.path[:1] != "/" or self.path[:2] == "//" or "#" in query or BAD_ESCAPE.search(self.path) or DOT_SEGMENT.search(self.path):
            raise Refusal(400, "bad_request", "The request target is not a plain path: no //, no dot segments, no fragment.")
        self.websocket = self.method == "GET" and self.version >= (1, 1) and self.body.done and is_websocket(self.head)
        expect = self.head.get(b"expect", b"").lower()
        if expect and self.version >= (1, 1) and expect != b"100-continue":
            raise Refusal(417, "expectation_failed", "The only expectation understood is 100-continue.")

    def is_preflight(self):
        return self.method == "OPTIONS" and self.head.get(b"origin") is not None and self.head.get(b"access-control-request-method") is not None

    def answer_about_us(self):
        """/health and /: no key, no upstream call. Models are shown to those who may list them."""
        settings = self.settings
        if self.path == "/" and b"text/html" in self.head.get(b"accept", b""):
            content, fields = start_page()
            return self.answer(200, fields, content)
        if self.path == "/":
            return self.answer_json(200, {"name": "aiproxy", "version": __version__, "api": "/v1", "health": "/health", "default_path": settings.default_path,
                                          "client_key_needed": settings.key_needed})
        about = {"status": "healthy", "timestamp": int(time.time())}
        try:
            self.check_host()
            self.check_origin()
            self.check_client_key()
            about["models"] = settings.models_shown
        except Refusal:
            pass
        return self.answer_json(200, about)

    # -- who is asking, and from where

    def check_host(self):
        """403 where a name that is not ours could reach a key that nothing else guards: DNS rebinding, a forgotten public front."""
        if not self.settings.guarded_by_loopback:
            return
        host = self.head.get(b"host", b"").decode("latin-1")
        if not LOOPBACK.fullmatch(re.sub(r":[0-9]*\Z", "", host)):
            raise Refusal(403, "host_not_allowed",
                          "This proxy hides a key and asks for no client key, so it answers to loopback names only. To serve others, "
                          "set AIPROXY_CLIENT_KEYS, or AIPROXY_OPEN=1 to serve anyone.")

    def check_origin(self):
        """403 for a browser on a page that is not listed."""
        origin = self.head.get(b"origin")
        if not origin_allowed(origin, self.head, self.settings):
            raise Refusal(403, "origin_not_allowed", "Pages from this origin may not call this proxy. Add it to AIPROXY_ORIGINS to let them.")

    def check_client_key(self):
        """401 unless the request carries a key that we gave out. Its name, never itself, goes to the log."""
        settings = self.settings
        if settings.hidden and any(name == "key" for name, _ in urllib.parse.parse_qsl(self.query[1:], keep_blank_values=True)):
            raise Refusal(400, "key_in_query", "Keys do not belong in URLs, where logs keep them. Send it as Authorization: Bearer.")
        if not settings.client_keys:
            return
        carried = carried_keys(self.head)
        if len(carried) > 1:
            raise Refusal(400, "bad_request", "The request carries two different keys.")
        name = find_client(carried.pop(), settings.client_keys) if carried else None
        if name is None:
            raise Refusal(401, "invalid_api_key", "Incorrect client key." if self.head.get(b"authorization") else
                          "A client key is needed: send it as Authorization: Bearer.", WWW_Authenticate="Bearer")
        self.record.client = self.address = name

    def check_rate(self):
        """429 once the client has used up its AIPROXY_RATE; the fields are OpenAI's."""
        bucket = self.server.buckets and self.server.buckets.take(self.address, time.monotonic())
        if bucket:
            wait_seconds, full_seconds, count = bucket
            raise Refusal(429, "rate_limit_exceeded", "Too many requests: AIPROXY_RATE allows %s. Try again in %.1f seconds." % (self.settings.rate_shown, wait_seconds),
                          Retry_After=math.ceil(wait_seconds), x_ratelimit_limit_requests=count, x_ratelimit_remaining_requests=0,
                          x_ratelimit_reset_requests=duration(full_seconds))

    # -- for what

    def check_path(self):
        """404 and 405 unless AIPROXY_PATHS lets the path through: exactly the one that is sent up."""
        settings = self.settings
        if settings.paths is not None:
            methods = allowed_methods(self.path, settings.paths)
            if not methods:
                raise Refusal(404, "not_found", "There is nothing at this path. What may be called is set by AIPROXY_PATHS.")
            if self.method not in methods and not (self.method == "OPTIONS" and settings.hidden):
                raise Refusal(405, "method_not_allowed", "This path takes %s." % ", ".join(methods), Allow=", ".join(methods))
        if settings.workers and (self.method, self.path) not in [("POST", path) for path in WORKERS_PATHS] and self.method != "OPTIONS":
            raise Refusal(404, "not_found", "Workers AI serves POST %s and GET /v1/models here." % ", ".join(WORKERS_PATHS))
        if settings.upstream.map_path(self.path) is None:
            raise Refusal(404, "not_found", "The upstream's base URL has a path, so only /v1/... can be called.")

    def is_model_list(self):
        return self.method in ("GET", "HEAD") and (self.path == "/v1/models" or self.path.startswith("/v1/models/"))

    def answer_models(self):
        """The allow-list in OpenAI's form, or one entry of it. SDKs send the slashes of an id as %2F."""
        wanted = urllib.parse.unquote(self.path[len("/v1/models/"):])
        items = [{"id": name, "object": "model", "created": self.server.started, "owned_by": "aiproxy"} for name in self.settings.models_shown]
        if self.settings.workers:
            items = self.server.catalogue.items(self.read_catalogue, items if self.settings.models else None)
        if not wanted:
            return self.answer_json(200, {"object": "list", "data": items})
        for item in items:
            if item["id"] == wanted:
                return self.answer_json(200, item)
        raise Refusal(404, "model_not_found", "The model %s does not exist or you may not use it." % json.dumps(wanted[:200]), param="model")

    def read_catalogue(self):
        """All pages of Cloudflare's own list. Refusal 502 or 504."""
        pages = []
        while not pages or pages[-1] and len(pages) < 50:
            answer = self.open_upstream(b"", "/ai/models/search?per_page=50&page=%d" % (len(pages) + 1), "GET")
            try:
                pages.append(read_catalogue_page(answer.status, self.read_whole(answer), self.settings.never_shown))
            finally:
                answer.close(reusable=True)
        return list(itertools.chain(*pages))

    def body_rules_apply(self):
        """Must the body be read? With a hidden key that of every POST, in a transparent relay those on the inference paths."""
        settings = self.settings
        rules = settings.models or settings.default_model or settings.max_tokens or settings.max_chars or settings.workers
        return bool(rules) and self.method == "POST" and (settings.hidden or self.path in INFERENCE_PATHS)

    def read_body(self):
        """What must be held of the body: all of it for the model rules or if it is small, else its beginning (self.body.done tells)."""
        hold, body = self.body_rules_apply(), self.body
        if hold and self.head.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "unsupported_encoding", "The body must not be compressed here: its model has to be read.", Accept_Encoding="identity")
        body.limit = self.settings.max_body if hold or self.settings.hidden else None
        body.check_limit()
        if self.head.get(b"expect") and self.version >= (1, 1) and not body.done and not self.client.buffer:
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces, held, until = [], 0, time.monotonic() + HOLD_SECONDS
        while not body.done:
            piece = body.read_some()
            pieces.append(piece)
            held += len(piece)
            if body.done or not hold and (held >= HOLD_BYTES or time.monotonic() >= until):
                break
            if not piece:
                body.wait(None if hold else until - time.monotonic())
        return b"".join(pieces)

    # -- to the upstream

    def open_upstream(self, prefix, target="", method=""):
        """The upstream's answer, its head read. 502 or 504 if there is none. With several keys the next is tried if one is refused."""
        settings = self.settings
        url = settings.upstream.url + (settings.upstream.base + target if target else settings.upstream.map_path(self.path) + self.query)
        fields = upstream_fields(self.head, settings, self.body_rules_apply(), self.websocket)
        keys = self.server.key_ring.order(time.monotonic()) if settings.keys else [None]
        keys = keys if self.body.done else keys[:1]     # a body that is streamed cannot be sent twice
        for place in keys:
            key = [] if place is None else [key_field(settings.keys[place], settings.key_header)]
            request = UpstreamRequest(url, method or self.method, fields + key, prefix, self)
            try:
                answer = self.server.opener.open(request, timeout=settings.timeout)
            except UpstreamFailed as failed:
                code, what = failed.args
                raise Refusal(504 if code == "upstream_timeout" else 502, code, what, **({"x_should_retry": "false"} if code == "upstream_tls_error" else {}))
            self.record.upstream_status = answer.status
            if place is None or answer.status not in KEY_SPENT:
                break
            self.server.key_ring.set_aside(place, answer, time.monotonic(), self.server.log.warn)
            if place != keys[-1]:
                answer.close()
        try:
            if settings.hidden and answer.status >= 400 and not settings.workers:
                self.check_for_key(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def check_for_key(self, answer):
        """502 for an answer that says that our key is bad, or repeats it: the client has no part in either."""
        if answer.status != 401 and not any(key in answer.peek(PEEK_BYTES) for key in self.settings.keys):
            return
        self.record.outcome = "upstream_credentials_rejected"
        self.server.log.warn("the upstream answered %d and rejected or repeated the provider key" % answer.status)
        raise Refusal(502, "upstream_credentials_rejected", "The upstream rejected the proxy's own credentials. Its operator must mend AIPROXY_KEY.",
                      x_should_retry="false")

    # -- and back

    def relay(self, answer):
        """Send the head of the answer and what is here of its body; the rest is the relay loop's."""
        if answer.status == 101:
            return self.tunnel(answer)
        stream = None
        try:
            keep, bodiless = not self.wants_close(), answer.body is None
            chunked = not bodiless and answer.body.length is None and self.version >= (1, 1)
            fields = self.downstream_fields(answer)
            if chunked:
                fields.append((b"Transfer-Encoding", b"chunked"))
            elif answer.length is not None and answer.status != 204:
                fields.append((b"Content-Length", b"%d" % answer.length))
            if not keep and not chunked:    # a chunked answer never says so: Node's fetch would take a cut for the end
                fields.append((b"Connection", b"close"))
            stream = Stream(self, answer, chunked)
            first = stream.begin()
            if stream.ending == "ok":       # all of it is here: the connection is free for others before the client has read a byte
                answer.close(reusable=self.body.done)
            self.start_answer(answer.status, self.reason(answer), fields, first)
            self.record.first_byte()
            if not stream.ending:
                self.server.relay_loop.run(stream)
        finally:
            answer.close(reusable=stream is not None and stream.ending == "ok" and self.body.done)
            self.record.outcome = stream.ending if stream and stream.ending else "client_gone"
        self.record.bytes = stream.bytes
        self.record.prompt_tokens, self.record.completion_tokens = stream.usage.counts()
        if stream.ending == "ok":
            self.close_connection = not keep
        else:
            self.reset_on_close = self.version < (1, 1) and answer.length is None     # a plain end would look like the end

    def relay_translated(self, call):
        """An answer of Workers AI in OpenAI's format, each event as it arrives. Errors before the first byte are Refusals."""
        answer = self.open_upstream(call.body, call.path)
        try:
            if answer.status != 200:
                after = answer.head.get(b"retry-after")
                raise translate_error(answer.status, self.read_whole(answer), call.secrets, **({"retry_after": after.decode("latin-1")} if after else {}))
            translator = (ResponsesTranslator if call.kind == "responses" else StreamTranslator)(call) if call.stream else None
            if translator and answer.kind not in (b"application/json", b"text/html"):      # gpt-oss may answer whole, an edge with a page
                return self.relay_events(answer, translator)
            body = self.read_whole(answer)
            content = translator.whole(body) if translator else json.dumps(translate_answer(call, body)).encode()
            usage = UsageWatch()
            usage.see(b"", body)
            self.record.prompt_tokens, self.record.completion_tokens = usage.counts()
            fields = self.downstream_fields(answer, translated=True) + [(b"Content-Type", b"text/event-stream" if translator else b"application/json")]
            return self.answer(200, fields, content)
        finally:
            answer.close(reusable=True)

    def read_whole(self, answer):
        """The body of an answer. Refusal 502 or 504 if it is cut off or too large, for then it cannot be read."""
        try:
            return answer.peek(MAX_ANSWER, whole=True)
        except socket.timeout:
            raise Refusal(504, "upstream_timeout", "The upstream fell silent in the middle of its answer.")
        except OSError:
            raise Refusal(502, "upstream_bad_response", "The upstream broke off in the middle of its answer.")

    def relay_events(self, answer, translator):
        """A stream: this thread reads it, for it has more to do than to move bytes."""
        chunked = self.version >= (1, 1)
        fields = self.downstream_fields(answer, translated=True) + [(b"Content-Type", b"text/event-stream; charset=utf-8")]
        self.start_answer(200, b"OK", fields + [(b"Transfer-Encoding", b"chunked") if chunked else (b"Connection", b"close")], b"")
        while not translator.done:
            try:
                piece = answer.read_piece()
                events = translator.feed(piece) if piece else translator.end()
            except OSError as error:
                code, what = ("upstream_timeout", "fell silent") if isinstance(error, socket.timeout) else ("upstream_died", "broke off")
                events = translator.end(Refusal(502, code, "The upstream %s in the middle of this answer." % what))
            if answer.body.done:
                answer.close(reusable=True)
            if events:
                self.record.first_byte()
                self.record.bytes += len(events)
                self.client.send(chunk(events, chunked))
        usage = translator.usage or {}
        self.record.prompt_tokens, self.record.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.record.outcome = translator.failed or "ok"
        self.reset_on_close = bool(translator.failed) and not chunked
        if not translator.failed and chunked:
            self.client.send(b"0\r\n\r\n")
            self.close_connection = self.wants_close()
            answer.read_rest()

    def wants_close(self):
        return self.version < (1, 1) or b"close" in self.head.tokens(b"connection") or not self.body.done or self.server.closing

    def downstream_fields(self, answer, translated=False):
        """End-to-end fields as they came, and the few that we add."""
        fields = downstream_fields(answer.head, self.settings)
        if translated:                          # the body is another one
            fields = [field for field in fields if not field[0].lower().startswith(b"content-") and field[0].lower() not in (b"etag", b"last-modified")]
        if answer.head.get(b"date") is None:                        # RFC 9110 section 6.6.1
            fields.append((b"Date", self.server.date()))
        ids = {name.lower(): value for name, value in fields if name.lower() in (b"x-request-id", b"request-id")}
        if ids:
            self.record.id = (ids.get(b"x-request-id") or ids[b"request-id"]).decode("latin-1")[:200]
        if b"x-request-id" not in ids:
            fields.append((b"x-request-id", self.record.id.encode("latin-1")))
        if answer.events:
            if answer.head.get(b"x-accel-buffering") is None:
                fields.append((b"X-Accel-Buffering", b"no"))        # nginx in front would hold events back
            if answer.head.get(b"cache-control") is None:
                fields.append((b"Cache-Control", b"no-cache"))
        return fields + self.cors + self.expose(name for name, _ in fields)

    def reason(self, answer):
        """The reason phrase as it came, unless the provider key stands in it."""
        return answer.reason if not any(word in answer.reason for word in self.settings.never_down) else b""

    def tunnel(self, answer):
        """A WebSocket: after the 101, bytes both ways until either side closes."""
        fields = downstream_fields(answer.head, self.settings)
        self.start_answer(101, self.reason(answer), fields + [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")] + self.cors, b"")
        self.record.first_byte()
        job = Tunnel(self.client, answer.wire, self.settings.timeout)
        try:
            self.server.relay_loop.run(job)
        finally:
            answer.close()
        self.record.outcome, self.record.bytes = job.ending, job.bytes

    # -- the one writer of heads, of our own answers and of refusals

    def start_answer(self, status, reason, fields, body):
        """Head and first bytes in one write: two would wait for each other's acknowledgement."""
        self.record.status = status
        self.head_sent = True
        head = b"".join([b"HTTP/1.1 %d %b\r\n" % (status, reason)] + [b"%b: %b\r\n" % field for field in fields])
        self.client.send(head + b"\r\n" + body)

    def answer_json(self, status, body, fields=(), outcome="ok"):
        """An answer of our own."""
        self.answer(status, list(fields) + [(b"Content-Type", b"application/json")], json.dumps(body).encode(), outcome)

    def answer(self, status, fields=(), content=b"", outcome="ok"):
        """An answer that is here as a whole. The connection lives on if all is well and the request was read to its end."""
        keep = outcome == "ok" and not self.wants_close()
        lines = list(fields)
        if not any(name == b"Date" for name, _ in lines):       # else they are the upstream's, and complete
            lines += [(b"Date", self.server.date()), (b"x-request-id", self.record.id.encode())]
            lines += self.cors + self.expose(name for name, _ in lines)
        if status != 204:
            lines.append((b"Content-Length", b"%d" % len(content)))
        if not keep:
            lines.append((b"Connection", b"close"))
        reason = http.client.responses.get(status, "").encode()
        self.record.first_byte()
        self.start_answer(status, reason, lines, content if self.method != "HEAD" else b"")
        self.record.outcome, self.record.bytes = outcome, len(content)
        self.close_connection = not keep

    def refuse(self, refusal):
        """Our own error in OpenAI's form; after it the connection closes, so nothing that follows is ever read as a request."""
        if self.head_sent:
            return
        if self.settings.workers and refusal.code in OPERATOR_ERRORS:
            self.server.log.warn("%s: %s" % (refusal.code, refusal.message))
        outcome = self.record.outcome or refusal.code
        try:
            self.answer_json(refusal.status, {"error": error_object(refusal)}, refusal.fields, outcome)
        except (OSError, ClientGone):
            self.record.outcome = "client_gone"

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals leave in the same form as ours."""
        self.refuse(Refusal(code, "bad_request" if code < 500 else "server_error", message or http.client.responses.get(code, "")))

    def cors_fields(self, origin):
        """The CORS fields of every answer: the origin if it is allowed, reflected only where a list decides."""
        settings = self.settings
        if settings.any_origin:
            return [(b"Access-Control-Allow-Origin", b"*")]
        if origin is not None and origin_allowed(origin, self.head, settings):
            return [(b"Access-Control-Allow-Origin", origin), (b"Vary", b"Origin")]
        return [(b"Vary", b"Origin")] if settings.origins else []

    def expose(self, names):
        """Which fields of an answer a browser's script may read."""
        if not self.cors or self.cors[0][0] == b"Vary":
            return []
        limits = {name.lower() for name in names if b"ratelimit-" in name.lower()}
        return [(b"Access-Control-Expose-Headers", b", ".join(EXPOSED + tuple(sorted(limits))))]

    def finish(self):
        """Close as the answer needs it: a reset for a cut HTTP/1.0 answer, a linger where bytes are still coming, else at once."""
        if self.reset_on_close:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self.head_sent and not self.client.ended and (self.client.buffer or self.body is None or not self.body.done or self.client.receive()):
            self.server.relay_loop.linger(socket.socket(fileno=self.connection.detach()))


# ---- Who is asking: client keys and origins ------------------------------------------------------------------------


def carried_keys(head):
    """The different keys that a request carries, as a set of bytes; `openai-insecure-api-key.KEY` is how browsers' WebSockets do it."""
    keys = {value for name in KEY_FIELDS[1:] for value in head.all(name)}
    scheme, _, credential = head.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        keys.add(credential.strip())
    for protocol in head.elements(b"sec-websocket-protocol"):
        if protocol.startswith(b"openai-insecure-api-key."):
            keys.add(protocol.partition(b".")[2])
    return keys - {b""}


def find_client(key, client_keys):
    """The name that `key` was given to, or None. As bytes and against all, so that neither letters nor places show in the time."""
    found = None
    for name, known in client_keys:
        if hmac.compare_digest(key, known):
            found = name
    return found


def origin_allowed(origin, head, settings):
    """May this page call us? No Origin: no page, unless Sec-Fetch-Site says that another site's page is behind it."""
    if settings.any_origin:
        return True
    if origin is None:
        return head is None or head.get(b"sec-fetch-site", b"none") not in (b"cross-site", b"same-site") or settings.client_keys or not settings.hidden
    if origin.decode("latin-1") in settings.origins:
        return True
    host = head.get(b"host", b"") if head is not None else b""     # our own start page, on a loopback address
    return origin == b"http://" + host and LOOPBACK.fullmatch(re.sub(r":[0-9]*\Z", "", host.decode("latin-1"))) is not None


def network_of(address):
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 one, which a single household has whole."""
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return address[:64]
    if packed[:12] == b"\0" * 10 + b"\xff\xff":                 # an IPv4 address as an IPv6 socket has it
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return address if LOOPBACK.fullmatch(address) else socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))


class Buckets:
    """Token buckets, one a client: `count` requests at once, refilled evenly over `period` seconds. The longest unused are forgotten."""

    def __init__(self, count, period):
        self.count, self.speed = count, count / period
        self.levels, self.lock = collections.OrderedDict(), threading.Lock()       # client: (tokens, when)

    def take(self, client, now):
        """None if a token was there, else seconds until the next one, seconds until all are back, and how many there are."""
        with self.lock:
            tokens, since = self.levels.pop(client, (self.count, now))
            tokens = min(self.count, tokens + (now - since) * self.speed)
            allowed = tokens >= 1
            self.levels[client] = (tokens - 1 if allowed else tokens, now)
            if len(self.levels) > MAX_BUCKETS:
                self.levels.popitem(last=False)
            return None if allowed else ((1 - tokens) / self.speed, (self.count - tokens) / self.speed, self.count)


def duration(seconds):
    """As OpenAI writes it in x-ratelimit-reset-*: 20ms, 1s, 6m0s, 1h0m0s."""
    if seconds <= 0.999:
        return "%dms" % math.ceil(seconds * 1000)
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return ("%dh" % hours if hours else "") + ("%dm" % minutes if hours or minutes else "") + "%ds" % seconds


def preflight_fields(head, settings):
    """The answer to a browser's question before the request (Fetch standard, section 4.8): everything it asks, for an allowed origin."""
    origin = head.get(b"origin")
    if not origin_allowed(origin, head, settings):
        return []
    fields = [(b"Access-Control-Allow-Methods", ", ".join(METHODS).encode()), (b"Access-Control-Max-Age", b"86400"),
              (b"Vary", b"Access-Control-Request-Headers")]
    asked = head.get(b"access-control-request-headers")
    if asked:
        fields.append((b"Access-Control-Allow-Headers", asked))
    if head.get(b"access-control-request-private-network") == b"true" and origin.decode("latin-1") in settings.origins:
        fields.append((b"Access-Control-Allow-Private-Network", b"true"))
    return fields


# ---- For what: paths, models, aliases ------------------------------------------------------------------------------


def openai_form(path):
    """The path that a client with a slightly wrong base URL meant: /v1/v1/x and the bare inference paths are /v1/x."""
    if path.startswith("/v1/v1/"):
        return path[3:]
    return "/v1" + path if path in ("/chat/completions", "/completions", "/embeddings", "/responses", "/models") else path


def allowed_methods(path, rules):
    """The methods that `rules`, pairs of method and path pattern, allow on `path`; [] if there is nothing at this path."""
    methods = []
    for method, pattern in rules:
        if pattern == "*" or path_matches(path, pattern):
            methods += METHODS if method == "*" else ("GET", "HEAD") if method == "GET" else (method,)
    return sorted(set(methods), key=METHODS.index)


def path_matches(path, pattern):
    """Does `pattern` fit the raw path? A `*` fits exactly one segment: plain ASCII when decoded once, and never `.` or `..`."""
    segments, wanted = path.split("/"), pattern.split("/")
    if len(segments) != len(wanted):
        return False
    return all(segment == want or want == "*" and segment_is_plain(segment) for segment, want in zip(segments, wanted))


def segment_is_plain(segment):
    decoded = urllib.parse.unquote(segment, "latin-1")
    return SEGMENT.fullmatch(decoded) is not None and not any(part in ("", ".", "..") for part in decoded.split("/"))


def apply_body_rules(body, path, settings):
    """The body to send up, the model that the client named, and for Workers AI the Call. Only what a setting changes differs. Refusal 400 or 403."""
    text, members = parse_members(body)
    values = {name: value for name, value, _, _ in members}
    for name in values:
        if name not in LOOKED_AT and name.casefold() in LOOKED_AT:      # some parsers would take it for the real one
            raise Refusal(400, "invalid_" + ("model" if name.casefold() == "model" else "parameter"), "`%s` must be written in lower case." % name.casefold())
    model = resolve_model(values, settings)
    real = settings.aliases.get(model, model)
    if settings.max_chars:
        check_characters(values, settings.max_chars)
    changes = limit_tokens(values, path, settings) if settings.max_tokens else {}
    if settings.workers:
        return b"", model, translate_request(path, body, text, members, real, model, settings.never_shown, changes)
    if real and real != values.get("model"):
        changes["model"] = real
    return edit_members(body, text, members, changes), model, None


def resolve_model(values, settings):
    """The model that a request names, or the default one. Refusal 400 or 403."""
    model = values.get("model", settings.default_model or None)
    if model is None and "model" not in values:
        if not settings.models and not settings.workers:
            return ""
        raise Refusal(400, "missing_model", "Missing required parameter: `model`.", param="model")
    if not isinstance(model, str) or not model:
        raise Refusal(400, "invalid_model", "`model` must be a string that is not empty.", param="model")
    check_model(model, settings)
    return model


def limit_tokens(values, path, settings):
    """What AIPROXY_MAX_TOKENS adds to a request that names no limit; 400 for one that asks for more, all its answers together."""
    answers, many = 1, "n"
    for name in ("n", "best_of") + TOKEN_LIMITS:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
            raise Refusal(400, "invalid_parameter", "`%s` must be a whole number." % name, param=name)
        if name in TOKEN_LIMITS and value * answers > settings.max_tokens:
            raise Refusal(400, "invalid_parameter", "`%s` asks for %d output tokens%s; AIPROXY_MAX_TOKENS allows %d." % (
                name, value, " in each of %d answers" % answers if answers > 1 else "", settings.max_tokens), param=name)
        if name not in TOKEN_LIMITS and value > answers:
            answers, many = int(value), name
    if answers > settings.max_tokens:
        raise Refusal(400, "invalid_parameter", "`%s` asks for more answers than AIPROXY_MAX_TOKENS allows tokens." % many, param=many)
    names = LIMITS_BY_PATH.get(path, ())
    if not names or any(values.get(name) is not None for name in names):
        return {}
    newest = settings.upstream.host == "api.openai.com"         # whose newer models refuse max_tokens
    return {names[-1 if newest else 0]: settings.max_tokens // answers}


def resolve_query_model(query, settings):
    """The same for a WebSocket, whose model stands in the query: the query to send up and the model named."""
    named = [value for name, value in urllib.parse.parse_qsl(query[1:]) if name.casefold() == "model"]
    if not settings.models:
        return query, ",".join(named)
    if len(named) != 1:
        raise Refusal(400, "missing_model" if not named else "invalid_model", "The query must hold `model` once.", param="model")
    check_model(named[0], settings)
    return re.sub(r"(?i)([?&])[^&=]*=[^&]*", lambda part: part.group(0) if urllib.parse.unquote_plus(part.group(0)[1:].partition("=")[0]).casefold() != "model" else
                  part.group(1) + "model=" + urllib.parse.quote(settings.aliases[named[0]], ""), query), named[0]


def check_model(model, settings):
    """403 unless the model is on the list."""
    if settings.models and model not in settings.models:
        raise Refusal(403, "model_not_allowed", "Model not allowed. Allowed models are: %s." % ", ".join(settings.models_shown), param="model")


WHITESPACE = re.compile(r"[ \t\n\r]*")


def parse_members(body):
    """The text of a JSON object and its top-level members as (name, value, start, end of the value). Refusal 400 for what could be read in two ways.

    Strict where json is not: one encoding, no NaN, no infinite or absurd numbers, no name twice in an object, bounded nesting.
    """
    try:
        text = body.decode("utf-8")
        check_depth(text)
        position = WHITESPACE.match(text).end()
        if text[position:position + 1] != "{":
            raise ValueError("it is not an object")
        members, closing = [], WHITESPACE.match(text, position + 1).end()
        if text[closing:closing + 1] != "}":
            while True:
                position = WHITESPACE.match(text, position + 1).end()
                name, position = STRICT_JSON.raw_decode(text, position)
                position = WHITESPACE.match(text, position).end()
                if not isinstance(name, str) or text[position:position + 1] != ":":
                    raise ValueError("a name is not followed by a colon")
                start = WHITESPACE.match(text, position + 1).end()
                value, end = STRICT_JSON.raw_decode(text, start)
                members.append((name, value, start, end))
                closing = position = WHITESPACE.match(text, end).end()
                if text[position:position + 1] != ",":
                    break
        if text[closing:closing + 1] != "}" or WHITESPACE.match(text, closing + 1).end() != len(text):
            raise ValueError("it does not end where it should")
        names = [name for name, *_ in members]
        if names.count("model") > 1:
            raise Refusal(400, "invalid_model", "The body must hold `model` once.", param="model")
        if len(set(names)) != len(names):
            raise ValueError("a name stands there twice")
        return text, members
    except UnicodeDecodeError:
        raise Refusal(400, "invalid_json", "The body is not JSON in UTF-8.")
    except RecursionError:
        raise Refusal(400, "invalid_json", "The body is not valid JSON here: it is nested too deeply.")
    except ValueError as error:
        raise Refusal(400, "invalid_json", "The body is not valid JSON: %s." % str(error).partition(":")[0])


def check_depth(text):
    """ValueError above MAX_DEPTH. Counted before parsing: a parser recurses, and a thread's stack is small."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for mark in re.findall(r'[\[{\]}]|"(?:[^"\\]|\\.)*"?', text, re.S):
        depth += (mark in "[{") - (mark in "]}")
        if depth > MAX_DEPTH:
            raise ValueError("it is nested more than %d levels deep" % MAX_DEPTH)


def unique_members(pairs):
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands there twice")
    return members


def bounded_int(digits):
    if len(digits) > 400:
        raise ValueError("a number is absurdly long")
    return int(digits)


def finite_float(digits):
    number = float(digits) if len(digits) <= 400 else float("inf")
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return number


def refuse_constant(name):
    raise ValueError("%s is not JSON" % name)


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_members, parse_int=bounded_int, parse_float=finite_float, parse_constant=refuse_constant)

# ---- What goes up and what comes down ------------------------------------------------------------------------------


def upstream_fields(head, settings, is_json, websocket):
    """The header fields of the request to the upstream, Host first, all but the provider key. The client's own key never is among them."""
    dropped = head.tokens(b"connection")        # fields that the client named as meant for this hop
    fields = [(b"Host", settings.upstream.netloc)]
    for name, value in head.fields:
        low = name.lower().replace(b"_", b"-")  # CGI-like servers take Content_Length for Content-Length
        if low in NEVER_UP or low in dropped or low.startswith(NEVER_UP_PREFIXES):
            continue
        if low in KEY_FIELDS and (settings.hidden or settings.client_keys):
            continue
        if low.startswith(b"sec-websocket-") and (websocket or not settings.hidden):
            if low == b"sec-websocket-protocol" and (settings.hidden or settings.client_keys):
                value = b", ".join(part for part in map(bytes.strip, value.split(b",")) if not part.startswith(b"openai-insecure-api-key."))
            if not value:
                continue
        elif settings.hidden and low not in UP_WITH_HIDDEN_KEY:
            continue
        if low == b"accept-encoding" and settings.workers:
            continue
        if low == b"accept-encoding" and settings.hidden:   # error answers are searched for the key: only what we can decode
            value = b", ".join(part for part in head.elements(low) if re.match(rb"(?:x-)?gzip|deflate|identity", part)) or b"identity"
        if low == b"content-type" and is_json:
            continue
        fields.append((name, value))
    if is_json:
        fields.append((b"Content-Type", b"application/json"))
    if settings.workers:                        # what is translated must be readable, and no event held back in a compressor
        fields.append((b"Accept-Encoding", b"identity"))
    if websocket:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return fields


def key_field(key, name):
    return name.encode(), b"Bearer " + key if name.lower() == "authorization" else key


def is_websocket(head):
    """RFC 6455 section 4.1. No other upgrade is ever passed on: h2c would be a way around every check."""
    return [token.lower() for token in head.elements(b"upgrade")] == [b"websocket"] and b"upgrade" in head.tokens(b"connection")


def downstream_fields(head, settings):
    """The fields of the upstream's answer that come down: as they came, repeated ones repeated, in order."""
    dropped = head.tokens(b"connection")
    fields = []
    for field in head.fields:
        low = field[0].lower()
        if low in NEVER_DOWN or low in dropped or low.startswith(b"access-control-"):
            continue
        if settings.hidden and (low in NEVER_DOWN_WITH_HIDDEN_KEY or any(word in field[1] for word in settings.never_down)):
            continue
        fields.append(field)
    return fields


# ---- From where: the upstream, kept alive --------------------------------------------------------------------------


class KeyRing:
    """Several provider keys, used in turn. One that was refused rests; it is named by its place, never by its text."""

    def __init__(self, count):
        self.rests, self.turn, self.lock = [0.0] * count, 0, threading.Lock()       # until when each rests

    def order(self, now):
        """The places of the keys to try, each once: those that do not rest, in turn; if all rest, the one that is ready first."""
        with self.lock:
            ready = [place for place, until in enumerate(self.rests) if until <= now]
            self.turn += 1
            start = self.turn % len(ready) if ready else 0
            return ready[start:] + ready[:start] or [self.rests.index(min(self.rests))]

    def set_aside(self, place, answer, now, warn):
        """Let a key rest: for the Retry-After of the answer, for ever after a 401."""
        with self.lock:
            known_bad = self.rests[place] == math.inf
            self.rests[place] = math.inf if answer.status == 401 else now + retry_after(answer.head.get(b"retry-after", b""))
        if answer.status == 401 and not known_bad and len(self.rests) > 1:
            warn("the upstream rejected key %d of %d (401); it is set aside" % (place + 1, len(self.rests)))


def retry_after(value):
    """Seconds out of a Retry-After, a number or a date (RFC 9110 section 10.2.3); KEY_COOLDOWN for anything else, a day at most."""
    try:
        text = value.decode("latin-1")
        seconds = int(text) if re.fullmatch("[0-9]{1,9}", text) else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        seconds = KEY_COOLDOWN
    return min(max(seconds, 0), 86400)


class Catalogue:
    """Workers AI's model list, kept for CATALOGUE_SECONDS. When it cannot be read: the last one, else the configured one, else the error."""

    def __init__(self, settings):
        self.names, self.only = settings.aliases, bool(settings.models)
        self.last, self.until, self.failure, self.lock = None, 0, None, threading.Lock()

    def items(self, read, configured):
        """The items of OpenAI's list; `read` asks Cloudflare."""
        with self.lock:
            if time.monotonic() >= self.until:
                try:
                    self.last = translate_catalogue(read(), time.strftime("%Y-%m-%d", time.gmtime()), self.names, self.only)
                    self.until, self.failure = time.monotonic() + CATALOGUE_SECONDS, None
                except Refusal as refusal:
                    self.until, self.failure = time.monotonic() + CATALOGUE_RETRY, refusal
        found = self.last if self.last is not None else configured
        if found is None:
            raise self.failure
        return found


class UpstreamRequest(urllib.request.Request):
    """urllib's request, and what it cannot hold: repeated fields, a body still coming, the client to watch meanwhile."""

    def __init__(self, url, method, fields, prefix, handler):
        super().__init__(url, method=method)
        self.fields, self.prefix = fields, prefix
        self.client, self.body = handler.client, handler.body
        self.bodiless = method == "HEAD"
        self.websocket = handler.websocket
        if not self.body.done:
            framing = (b"Transfer-Encoding", b"chunked") if self.body.length is None else (b"Content-Length", b"%d" % self.body.length)
        elif prefix or method in ("POST", "PUT", "PATCH"):
            framing = (b"Content-Length", b"%d" % len(prefix))
        else:
            framing = None
        self.chunked, self.whole = not self.body.done and self.body.length is None, False      # whole: all of it has been sent
        self.framing = [framing] if framing else []

    def encode_head(self):
        proxy = [(name.encode(), value.encode()) for name, value in self.unredirected_hdrs.items()]    # ProxyHandler's, on a plain proxy
        proxy += [(name.encode(), value.encode()) for name, value in self.headers.items() if not self._tunnel_host]
        lines = [b"%b %b HTTP/1.1\r\n" % (self.method.encode(), self.selector.encode())]
        lines += [b"%b: %b\r\n" % field for field in self.fields + proxy + self.framing]
        return b"".join(lines) + b"\r\n"


class KeepAliveHandler(urllib.request.BaseHandler):
    """urllib.request's way to HTTP and HTTPS upstreams, over http.client connections that are kept for the next request.

    It answers whatever the status: no redirect is followed, nothing is raised for 4xx. Its only exception is UpstreamFailed.
    A request is sent again only when the kept connection took no byte of it: otherwise the upstream may have acted on it.
    """

    def __init__(self, settings):
        self.connect_timeout = settings.connect_timeout
        self.idle = collections.deque()        # of (connection, since); the newest at the right
        self.tls = None
        if settings.upstream.scheme == "https":
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)     # not create_default_context: that would honour SSLKEYLOGFILE
            self.tls.load_default_certs()
            self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self.tls.set_alpn_protocols(["http/1.1"])

    def http_open(self, request):
        return self.exchange(request)

    https_open = http_open

    def exchange(self, request):
        """Send `request`, wait for the head of the answer, skip 1xx. The client is watched all the while: ClientGone."""
        connection = self.kept() or self.connect(request)
        try:
            if not self.send(request, connection):          # it had just been closed by the upstream
                connection.close()
                connection = self.connect(request)
                self.send(request, connection)
            return Answer(self, connection, request)
        except OSError as error:
            connection.close()
            if isinstance(error, socket.timeout):
                raise UpstreamFailed("upstream_timeout", "The upstream did not answer within the time set by AIPROXY_TIMEOUT.")
            raise UpstreamFailed("upstream_bad_response", "The upstream hung up without an answer.")
        except BaseException:
            connection.close()
            raise

    def kept(self):
        """A kept connection that is still good: younger than POOL_SECONDS and silent. What speaks out of turn is not trusted."""
        while True:
            try:
                connection, since = self.idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < POOL_SECONDS and connection.wire.is_silent():
                return connection
            connection.close()

    def keep(self, connection):
        self.idle.append((connection, time.monotonic()))
        while len(self.idle) > POOL_SIZE:
            self.idle.popleft()[0].close()

    def close_old(self, now):
        """Close what has been idle too long; called by the relay loop."""
        try:
            while now - self.idle[0][1] >= POOL_SECONDS:
                self.idle.popleft()[0].close()
        except IndexError:
            pass                            # none left

    def connect(self, request):
        """A new connection, through a CONNECT tunnel where ProxyHandler asks for one; TLS verified by the default rules."""
        deadline = time.monotonic() + self.connect_timeout
        secure = request.type == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(request.host, timeout=self.connect_timeout, **({"context": self.tls} if secure else {}))
        connection._create_connection = lambda address, *_: connect_within(address, deadline)
        if request._tunnel_host:
            proxy_fields = {name: value for name, value in request.headers.items() if name == "Proxy-authorization"}
            connection.set_tunnel(request._tunnel_host, headers=proxy_fields)
        try:
            connection.connect()
            connection.sock.setblocking(False)
            if secure:
                connection.sock.suppress_ragged_eofs = False       # an end without close_notify must be seen as a cut
        except socket.timeout:
            connection.close()
            raise UpstreamFailed("upstream_timeout", "The upstream could not be reached within the time set by AIPROXY_CONNECT_TIMEOUT.")
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise UpstreamFailed("upstream_tls_error", "The upstream's certificate cannot be trusted (CERTIFICATE_VERIFY_FAILED): %s." % error.verify_message)
        except ssl.SSLError as error:
            connection.close()
            raise UpstreamFailed("upstream_tls_error", "The upstream does not speak TLS as it should (%s)." % (error.reason or "handshake failed"))
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            raise UpstreamFailed("upstream_unreachable", "The upstream cannot be reached: %s." % (getattr(error, "strerror", None) or str(error) or type(error).__name__))
        connection.wire = Wire(connection.sock)
        return connection

    def send(self, request, connection):
        """Send head and body. False: a kept connection that took nothing. An answer before the end of the body ends the sending."""
        wire, client, body = connection.wire, request.client, request.body
        data = memoryview(request.encode_head() + chunk(request.prefix, request.chunked))
        untouched = True
        while True:
            while data:
                try:
                    sent = wire.send_some(data[:TLS_RECORD] if untouched else data)     # of more, TLS may send some and then fail
                except OSError:
                    if untouched:
                        return False
                    return True             # it may have answered before it hung up: reading tells
                untouched = untouched and not sent
                data = data[sent:]
                if data:
                    ready = wait(request.timeout, (wire, READ | WRITE), (client, READ if client.watched else 0))
                    if not ready:
                        raise socket.timeout()
                    if client in ready:
                        client.notice()
                    if wire in ready and self.answered(wire):
                        return True
            if body.done:
                request.whole = True
                return True
            piece = body.read_some()
            if not piece and not body.done:
                if self.answered(wire):
                    return True
                body.wait(None, wire)
                continue
            data = memoryview(chunk(piece, request.chunked) + (b"0\r\n\r\n" if request.chunked and body.done else b""))

    @staticmethod
    def answered(wire):
        """Has the upstream begun its final answer, or hung up? Interim answers while we send are not it."""
        try:
            data = wire.receive()
        except OSError:
            return True
        if data:
            wire.buffer += data
        interim = b"HTTP/1.1 1"
        while wire.buffer.startswith(interim) and b"\r\n\r\n" in wire.buffer:
            wire.buffer = wire.buffer.partition(b"\r\n\r\n")[2]
        return data == b"" or bool(wire.buffer) and not wire.buffer.startswith(interim[:len(wire.buffer)])


def connect_within(address, deadline):
    """socket.create_connection with one deadline for all of a name's addresses; what is left of it stays as the socket's time-out."""
    found, failure = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM), OSError("no address")
    for place, (family, kind, protocol, _, target) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.01, (deadline - time.monotonic()) / (len(found) - place)))     # each address its share
            sock.connect(target)
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


class Answer:
    """The upstream's answer: its head, read strictly, and the body to come. What urllib's opener hands back."""

    def __init__(self, pool, connection, request):
        self.pool, self.connection, self.wire, self.client = pool, connection, connection.wire, request.client
        self.timeout, self.held = request.timeout, b""
        try:
            for _ in range(MAX_INTERIM):
                self.head = self.wire.read_head(STATUS_LINE, self.more)
                minor, status, reason = self.head.start
                self.status, self.reason = int(status), reason or b""
                if self.status >= 200 or self.status == 101 and request.websocket and is_websocket(self.head):
                    break
                if self.status == 101:
                    raise BadHead(502, "it switched protocols unasked")
            else:
                raise BadHead(502, "it sent interim answers only")
            self.body = answer_body(self.head, self.status, request.bodiless)
            self.length = self.body.length if self.body else content_length(self.head)
        except BadHead as bad:
            raise UpstreamFailed("upstream_bad_response", "The upstream's answer cannot be read: %s" % bad.args[0])
        self.reusable = minor != b"0" and b"close" not in self.head.tokens(b"connection") and request.whole
        self.kind = self.head.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.events = self.kind == b"text/event-stream"
        self.coded = self.head.get(b"content-encoding", b"identity").lower() != b"identity"

    def more(self):
        """Wait for more of the head, the client in view."""
        deadline = time.monotonic() + self.timeout
        while True:
            ready = wait(deadline - time.monotonic(), (self.wire, READ), (self.client, READ if self.client.watched else 0))
            if not ready:
                raise socket.timeout()
            if self.client in ready:
                self.client.notice()
            if self.wire in ready:
                if not self.wire.fill():
                    raise ConnectionResetError()
                return

    def read_piece(self):
        """The next decoded bytes of the body, b"" at its end. OSError if it is cut off or breaks the rules."""
        body = self.body
        while body is not None and not body.done:
            if not self.wire.buffer:
                try:
                    self.more()
                except ConnectionResetError:
                    if body.at_end():
                        body.done, self.reusable = True, False
                        break
                    raise
            data, self.wire.buffer = self.wire.buffer, b""
            piece = body.feed(data)
            if body.broken and not piece:
                raise ConnectionAbortedError(body.broken)
            if piece:
                return piece
        return b""

    def read_rest(self):
        """Read what is left of a body that nobody needs, if it comes at once: then the connection can be used again."""
        self.timeout = 0.25
        try:
            while self.connection and self.read_piece():
                pass
        except (OSError, ClientGone):
            pass

    def peek(self, size, whole=False):
        """Up to `size` decoded bytes of the body, kept in `held` to be relayed; gzip and deflate are undone for the look.

        With `whole` it is the entire body: OSError if it is cut off or larger. Without, the relay will meet the same end and tell the client."""
        try:
            while len(self.held) < size:
                piece = self.read_piece()
                if not piece:
                    break
                self.held += piece
        except OSError:
            if whole:
                raise
        if whole and len(self.held) >= size:
            raise OSError("too large")
        return self.held + inflate(self.held, size * 8) if self.coded and not whole else self.held

    def close(self, reusable=False):
        """Give the connection back if the exchange came to its clean end, else close it: the upstream stops working for us."""
        connection, self.connection = self.connection, None
        spent = self.body is None or self.body.done and not self.body.surplus
        if connection and reusable and self.reusable and spent and not self.wire.buffer:
            self.pool.keep(connection)
        elif connection:
            connection.close()


def inflate(data, most):
    """What is readable of compressed data, `most` bytes of it: gzip, zlib, or deflate without its wrapper, as some send it. b"" for other codings."""
    for form in (47, -15):                  # zlib's own words for the first two, and for the last
        plain, rest = b"", data
        try:
            while rest and len(plain) < most:
                decoder = zlib.decompressobj(form)
                for start in range(0, len(rest), 64):       # in small pieces, so that an error costs little of what came before it
                    plain += decoder.decompress(rest[start:start + 64], most)
                rest = decoder.unused_data  # gzip may have several members
        except zlib.error:
            pass
        if plain:
            return plain
    return b""


# ---- The relay loop ------------------------------------------------------------------------------------------------


class RelayLoop(threading.Thread):
    """One thread that moves the bodies of all running answers and watches their clients; the handlers sleep meanwhile.

    A thread for each stream would cost three times the CPU for each event. Nothing in here may block: what a client cannot
    take is kept (one piece), and its upstream is not read until it is gone.
    """

    def __init__(self, every_tick, warn):
        super().__init__(daemon=True, name="relay-loop")
        self.selector = selectors.DefaultSelector()
        self.jobs, self.inbox, self.every_tick, self.warn, self.stopping = set(), collections.deque(), every_tick, warn, False
        self.bell, self.button = socket.socketpair()
        self.bell.setblocking(False)
        self.button.setblocking(False)
        self.selector.register(self.bell, READ, self.on_bell)

    def run(self, job=None):
        """As a thread: the loop itself. With a job: hand it over and sleep until it is done."""
        if job is None:
            return self.loop()
        job.done.acquire()
        self.hand_over(job)
        job.done.acquire()
        return None

    def hand_over(self, job):
        self.inbox.append(job)
        try:
            self.button.send(b"!")
        except BlockingIOError:
            pass                            # it has been rung already

    def linger(self, sock):
        """Let a refused client read its answer: see Linger."""
        self.hand_over(Linger(sock))

    def on_bell(self, mask):
        self.bell.recv(4096)

    def loop(self):
        tick = 0
        while True:
            for key, mask in self.selector.select(0.5):
                self.guard(key.data, mask)
            while self.inbox:
                job = self.inbox.popleft()
                self.jobs.add(job)
                job.loop = self
                self.guard(job.start)
            now = time.monotonic()
            if now - tick >= 0.5:
                tick = now
                for job in list(self.jobs):
                    self.guard(*((job.stop,) if self.stopping else (job.on_tick, now)))
                self.guard(self.every_tick, now)

    def guard(self, step, *args):
        """A fault in one job ends that job, not the loop that all share."""
        try:
            step(*args)
        except Exception as error:
            job = getattr(step, "__self__", None)
            self.warn("fault in the relay loop: " + fault_place(error))
            if job in self.jobs:
                job.finish("internal_error")

    def watch(self, wire, mask, callback):
        """From now on call `callback` when `wire` is ready for `mask`; 0: no more."""
        if mask == wire.mask:
            return
        if not wire.mask:
            self.selector.register(wire.sock, mask, callback)
        elif mask:
            self.selector.modify(wire.sock, mask, callback)
        else:
            self.selector.unregister(wire.sock)
        wire.mask = mask


class Job:
    """Something that the relay loop does for two wires. `ending` says how it ended; whoever handed it over sleeps on `done`."""

    def __init__(self, client, upstream, timeout):
        self.client, self.upstream, self.timeout = client, upstream, timeout
        self.done, self.ending, self.finished, self.bytes = threading.Lock(), "", False, 0

    def stop(self):
        self.finish("shutdown")

    def finish(self, outcome):
        if not self.finished:
            self.finished, self.ending = True, outcome
            self.loop.watch(self.client, 0, None)
            self.loop.watch(self.upstream, 0, None)
            self.loop.jobs.discard(self)
            self.done.release()


class Stream(Job):
    """The body of one answer on its way down. `ending` is set when no more will come, `bytes` counts what went down."""

    def __init__(self, handler, answer, chunked):
        super().__init__(handler.client, answer.wire, handler.settings.timeout)
        self.body, self.held, self.chunked = answer.body, answer.held, chunked
        self.tells = answer.events and not answer.coded and answer.length is None   # may a cut be told by an event?
        self.pending, self.tail, self.usage = b"", b"\n\n", UsageWatch()

    def begin(self):
        """What is already here, framed for the client: often the whole body, and the loop is never needed."""
        if self.body is None:
            self.ending = "ok"
            return b""
        data, self.upstream.buffer = self.upstream.buffer, b""
        begun = self.frame(self.held) if self.held else b""
        return begun + (self.advance(data) if data or self.body.done or self.body.broken else b"")

    def start(self):
        self.heard = self.taken = time.monotonic()
        self.arm()
        if self.upstream.pending():
            self.on_upstream(READ)

    def arm(self):
        """Watch the client always; read the upstream only while the client has taken all: back-pressure reaches it."""
        self.loop.watch(self.upstream, 0 if self.pending or self.ending else READ, self.on_upstream)
        self.loop.watch(self.client, (READ if self.client.watched else 0) | (WRITE if self.pending else 0), self.on_client)

    def on_upstream(self, mask):
        """Some of the body is here, or its end."""
        while not (self.finished or self.pending or self.ending):
            try:
                data = self.upstream.receive()
            except OSError:
                return self.send_down(self.cut("upstream_died"))
            if data is None:
                return
            self.heard = time.monotonic()
            self.send_down(self.advance(data))
            if not self.upstream.pending():     # TLS may hold bytes that no selector sees
                return

    def advance(self, data):
        """The next bytes for the client, given the next from the upstream; b"" is its end. Sets `ending` when the body is over."""
        body = self.body.feed(data) if data else b""
        if self.body.done or not data and self.body.at_end():
            self.ending = "ok"
        elif self.body.broken or not data:
            return self.frame(body) + self.cut("upstream_died")
        return self.frame(body) + (b"0\r\n\r\n" if self.ending and self.chunked else b"")

    def frame(self, body):
        self.bytes += len(body)
        self.tail = self.usage.see(self.tail, body)
        return chunk(body, self.chunked)

    def cut(self, outcome):
        """The upstream broke off: an event says so if the stream stands between two, and no last chunk is ever sent."""
        self.ending = outcome
        if not self.tells or not self.tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
            return b""
        what = {"upstream_timeout": "The upstream fell silent", "shutdown": "The proxy was stopped"}.get(outcome, "The upstream broke off")
        error = {"message": what + " in the middle of this answer.", "type": "server_error", "param": None, "code": outcome}
        return self.frame(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")

    def send_down(self, data):
        """Send what the client takes now, keep the rest; finish when the body is over and all of it taken."""
        try:
            data = self.pending + data if self.pending else data
            sent = self.client.send_some(data) if data else 0
        except OSError:
            return self.finish("client_gone")
        if sent or not self.pending:
            self.taken = time.monotonic()
        self.pending = data[sent:]
        if self.ending and not self.pending:
            self.finish(self.ending)
        elif self.pending or not self.upstream.mask:
            self.heard = time.monotonic()
            self.arm()

    def on_client(self, mask):
        """The client can take more, sent something early, or has gone."""
        try:
            if mask & READ and not self.finished:
                self.client.notice()
        except ClientGone as gone:
            self.finish(gone.args[0])
        if self.pending and not self.finished:
            self.send_down(b"")
        if not self.finished:
            self.arm()
            if self.upstream.pending():
                self.on_upstream(READ)

    def stop(self):
        if not self.ending:
            self.send_down(self.cut("shutdown"))
        self.finish("shutdown")

    def on_tick(self, now):
        if self.pending:
            if now - self.taken > STALL_SECONDS:
                self.finish("client_stalled")
        elif now - self.heard > self.timeout:
            self.send_down(self.cut("upstream_timeout"))


class UsageWatch:
    """The token counts in an answer, read as it passes: from its first and its last `usage`, for Anthropic's events share them out."""

    def __init__(self):
        self.found = []                     # the beginnings of up to two such objects

    def see(self, tail, body):
        """Take note of `body`, which follows on `tail`; the tail to give with the next."""
        self.found = [part + body if len(part) < USAGE_BYTES else part for part in self.found]
        window = tail + body
        if b'"usage"' in window:
            begins = [match.end() - 1 for match in USAGE_OBJECT.finditer(window) if match.end() > len(tail)]
            found = self.found + [window[begin:begin + USAGE_BYTES] for begin in begins[:1] + begins[1:][-1:]]
            self.found = found[:1] + found[1:][-1:]
        return window[-32:]

    def counts(self):
        """(prompt tokens, completion tokens), None for what was not told."""
        counts = {}
        for part in self.found:
            try:
                text = part.decode("utf-8", "replace")
                check_depth(text)           # a parser recurses, and a thread's stack is small
                usage = json.JSONDecoder().raw_decode(text)[0]
            except ValueError:
                continue
            for name, other in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
                count = usage.get(name, usage.get(other))
                if isinstance(count, int) and not isinstance(count, bool):
                    counts[name] = count
        return counts.get("prompt_tokens"), counts.get("completion_tokens")


class Tunnel(Job):
    """Bytes both ways, whatever they are, until either side closes or both are silent for `timeout` seconds."""

    def start(self):
        self.heard, self.closing = time.monotonic(), False
        self.pending = {self.client: self.upstream.buffer, self.upstream: self.client.buffer}       # what each still has to take
        self.client.buffer = self.upstream.buffer = b""
        self.on_ready(WRITE, self.client, self.upstream)
        self.on_ready(READ | WRITE, self.upstream, self.client)

    def on_client(self, mask):
        self.on_ready(mask, self.client, self.upstream)

    def on_upstream(self, mask):
        self.on_ready(mask, self.upstream, self.client)

    def on_ready(self, mask, wire, other):
        while not self.finished:
            try:
                if mask & READ and not self.pending[other] and not self.closing:
                    data = wire.receive()
                    if data is not None:
                        self.heard, self.closing, self.pending[other] = time.monotonic(), not data, data
                        self.bytes += len(data) if other is self.client else 0
                for side in (self.client, self.upstream):
                    if self.pending[side]:
                        self.pending[side] = self.pending[side][side.send_some(self.pending[side]):]
            except OSError:
                return self.finish("ok")
            if self.closing and not any(self.pending.values()):
                return self.finish("ok")
            if self.pending[other] or self.closing or not wire.pending():
                break
        self.arm()

    def arm(self):
        """Read each side only while the other has taken all; wait to write to it only while it has not."""
        for wire, other, callback in ((self.client, self.upstream, self.on_client), (self.upstream, self.client, self.on_upstream)):
            if not self.finished:
                self.loop.watch(wire, (0 if self.pending[other] or self.closing else READ) | (WRITE if self.pending[wire] else 0), callback)

    def on_tick(self, now):
        if now - self.heard > (LINGER_SECONDS if self.closing else self.timeout):
            self.finish("idle")


class Linger:
    """A refused client may still be sending. Closed at once, its unread bytes would make a reset that eats our answer (RFC 9112 section 9.6)."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.wire, self.bytes = Wire(sock), 0

    def start(self):
        self.deadline = time.monotonic() + LINGER_SECONDS
        try:
            self.wire.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.finish("gone")
        self.loop.watch(self.wire, READ, self.on_client)

    def on_client(self, mask):
        try:
            data = self.wire.receive()
        except OSError:
            data = b""
        if data is not None:
            self.bytes += len(data)
            if not data or self.bytes > LINGER_BYTES:
                self.finish("ok")

    def on_tick(self, now):
        if now > self.deadline:
            self.finish("timeout")

    def stop(self):
        self.finish("shutdown")

    def finish(self, outcome):
        self.loop.watch(self.wire, 0, None)
        self.loop.jobs.discard(self)
        self.wire.close()


# ---- HTTP framing: one strict reader for both sides ----------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class BadHead(Exception):
    """A head that breaks the rules: args[1] says which; args[0] is the status for a client that sent it."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def wait(timeout, *wants):
    """Sleep until one of `wants`, pairs of wire and READ | WRITE, is ready; a list of those wires, empty after `timeout` seconds."""
    for wire, mask in wants:
        if mask & READ and wire.pending():
            return [wire]
    if hasattr(select, "poll"):
        poll = select.poll()
        for wire, mask in wants:
            if mask:
                poll.register(wire.fd, (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT)[mask])
        ready = [fd for fd, _ in poll.poll(max(0, timeout) * 1000)]
    else:                                   # Windows
        readable, writable, _ = select.select([w.fd for w, m in wants if m & READ], [w.fd for w, m in wants if m & WRITE], [], max(0, timeout))
        ready = readable + writable
    return [wire for wire, _ in wants if wire.fd in ready]


class Wire:
    """A non-blocking socket, plain or TLS, with the bytes that were read from it and not used yet."""

    def __init__(self, sock):
        self.sock, self.fd, self.buffer, self.mask, self.ended = sock, sock.fileno(), b"", 0, False
        self.pending = getattr(sock, "pending", int)        # TLS: bytes that are decrypted already; int() is 0

    def receive(self):
        """Up to PIECE bytes; b"" at the end, None if there is nothing yet. OSError if the connection broke."""
        try:
            data = self.sock.recv(PIECE)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        self.ended = not data
        return data

    def fill(self):
        """Add what has arrived to the buffer; False at the end."""
        data = self.receive()
        self.buffer += data or b""
        return data != b""

    def send_some(self, data):
        """How many bytes of data were taken: 0 if none can be now."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def send(self, data):
        """Send all to a client; ClientGone if it takes nothing for STALL_SECONDS."""
        data = memoryview(data)
        while True:
            data = data[self.send_some(data):]
            if not data:
                return
            if not wait(STALL_SECONDS, (self, WRITE)):
                raise ClientGone("client_stalled")

    def wait_readable(self, timeout):
        return bool(wait(timeout, (self, READ)))

    @property
    def watched(self):
        """Worth watching for a hang-up? Not behind a long queue of early requests: it would be seen only when they are read."""
        return len(self.buffer) < EARLY_BYTES

    def notice(self):
        """The client is readable in mid-answer: it sent its next request early (kept for later), or it has gone (ClientGone)."""
        try:
            if self.fill():
                return
        except OSError:
            self.ended = True
        raise ClientGone("client_gone")

    def is_silent(self):
        """Nothing came on an idle connection: no hang-up, no stray bytes. A TLS ticket is no byte of the stream."""
        if not wait(0, (self, READ)):
            return True
        try:
            return isinstance(self.sock, ssl.SSLSocket) and self.receive() is None
        except OSError:
            return False

    def skip_empty_lines(self, more):
        """Up to four empty lines before a request line are forgiven (RFC 9112 section 2.2)."""
        for _ in range(4):
            while self.buffer in (b"", b"\r"):
                more()
            if self.buffer[:2] != b"\r\n":
                return
            self.buffer = self.buffer[2:]

    def read_head(self, first_line, more):
        """The Head at the front of the buffer; calls more() until it is whole. BadHead as soon as it can no longer be good."""
        searched = 0
        while True:
            end = self.buffer.find(b"\r\n\r\n", max(0, searched - 3))
            if end < 0 or end > MAX_LINE:
                check_begun(self.buffer if end < 0 else self.buffer[:end], searched, first_line)
            if end >= 0:
                block, self.buffer = self.buffer[:end], self.buffer[end + 4:]
                return parse_head(block, first_line)
            searched = len(self.buffer)
            more()

    def close(self):
        self.sock.close()


BARE_LF = re.compile(rb"(?<!\r)\n")


def check_begun(block, searched, first_line):
    """BadHead if the beginning of a head is already beyond saving, so that nobody waits for an end that may never come.

    Only what is new since `searched` is looked at: a head that comes byte by byte must not cost its square."""
    line_end = block.find(b"\r\n")
    if line_end > MAX_LINE or line_end < 0 and len(block) > MAX_LINE:
        raise BadHead(414, "The first line is longer than %d bytes." % MAX_LINE)
    if line_end + 2 > searched and line_end >= 0 and not first_line.fullmatch(block, 0, line_end):
        raise BadHead(400, "The first line is malformed.")
    if BARE_LF.search(block, max(0, searched - 1)):
        raise BadHead(400, "A line ends in a bare LF.")
    if len(block) > MAX_HEAD:
        raise BadHead(431, "The head is larger than %d bytes." % MAX_HEAD)


def parse_head(block, first_line):
    """The Head in `block`, a head without its last empty line."""
    lines = block.split(b"\r\n")
    start = first_line.fullmatch(lines[0])
    if not start:
        raise BadHead(400, "The first line is malformed.")
    if len(lines) > MAX_FIELDS + 1:
        raise BadHead(431, "There are more than %d header fields." % MAX_FIELDS)
    if len(block) > MAX_LINE and max(map(len, lines)) > MAX_LINE:
        raise BadHead(431, "A header field is longer than %d bytes." % MAX_LINE)
    head = Head(start.groups())
    for line in lines[1:]:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise BadHead(400, "A header field is malformed.")
        name, value = field.group(1), field.group(2).strip(b" \t")
        head.fields.append((name, value))
        head.by_name.setdefault(name.lower(), []).append(value)
    return head


class Head:
    """A start line's parts and the fields, as bytes: in the order and the spelling in which they came, and by lower-case name."""

    __slots__ = ("start", "fields", "by_name")

    def __init__(self, start):
        self.start, self.fields, self.by_name = start, [], {}

    def get(self, name, default=None):
        values = self.by_name.get(name)
        return values[0] if values else default

    def all(self, name):
        return self.by_name.get(name, ())

    def elements(self, name):
        """The comma-separated elements of all the fields of this name."""
        return [part.strip(b" \t") for value in self.all(name) for part in value.split(b",") if part.strip(b" \t")]

    def tokens(self, name):
        return {part.lower() for part in self.elements(name)} if name in self.by_name else frozenset()


def content_length(head):
    """The one Content-Length, or None. BadHead unless it is 1 to 18 digits, once: RFC 9112 section 6.3, without the leniency."""
    values = head.all(b"content-length")
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > 18 or not values[0].isdigit():
        raise BadHead(400, "Content-Length must be one number.")
    return int(values[0])


def is_chunked(head, http10):
    """Is the body chunked? BadHead for any other transfer coding, for one beside a Content-Length, and in HTTP/1.0 (RFC 9112 section 6.1)."""
    codings = head.all(b"transfer-encoding")
    if not codings:
        return False
    if len(codings) > 1 or codings[0].lower() != b"chunked" or http10:
        raise BadHead(400, "The only transfer coding is chunked, once, in HTTP/1.1.")
    if head.all(b"content-length"):
        raise BadHead(400, "Transfer-Encoding and Content-Length exclude each other.")
    return True


def request_body(head, version, client):
    """The body of a request: RFC 9112 section 6.3. Without a length there is none."""
    try:
        chunked = is_chunked(head, version < (1, 1))
        return RequestBody(client, ChunkedBody() if chunked else LengthBody(content_length(head) or 0))
    except BadHead as bad:
        raise Refusal(bad.status, "bad_request", bad.args[0])


def answer_body(head, status, bodiless):
    """The body of an answer: None for HEAD, 1xx, 204 and 304 whatever the fields say, else chunked, by length, or until the end."""
    if bodiless or status < 200 or status in (204, 304):
        return None
    if is_chunked(head, http10=head.start[0] == b"0"):
        return ChunkedBody()
    length = content_length(head)
    return LengthBody(length) if length is not None else UntilCloseBody()


class LengthBody:
    """A body of known length. feed() gives what belongs to it; `surplus` is what came behind it."""

    broken = ""

    def __init__(self, length):
        self.length = self.left = length
        self.done, self.surplus = not length, b""

    def feed(self, data):
        body, self.surplus = data[:self.left], data[self.left:]
        self.left -= len(body)
        self.done = not self.left
        return body

    def at_end(self):
        """Is the body whole if the connection ends here?"""
        return self.done


class UntilCloseBody:
    """A body that ends with its connection."""

    length, done, surplus, broken = None, False, b"", ""

    def feed(self, data):
        return data

    def at_end(self):
        return True


class ChunkedBody:
    """RFC 9112 section 7.1, decoded as it comes. Extensions and trailer fields are checked and dropped. `broken` says which rule was."""

    length = None

    def __init__(self):
        self.left, self.rest, self.state = 0, b"", self.size_line
        self.done, self.surplus, self.broken, self.trailer = False, b"", "", 0

    def feed(self, data):
        data, body = self.rest + data if self.rest else data, []
        self.position = 0
        while not self.done and not self.broken and self.state(data, body):
            pass
        self.rest, self.surplus = (b"", data[self.position:]) if self.done else (data[self.position:], b"")
        return body[0] if len(body) == 1 else b"".join(body)

    def at_end(self):
        return self.done

    # Each state takes what it can of data[self.position:] and tells whether the next one can go on.

    def size_line(self, data, body):
        line = self.line(data, CHUNK_LINE_BEGUN, MAX_CHUNK_LINE)
        size = CHUNK_LINE.fullmatch(line) if line is not None else None
        if size:
            self.left = int(size.group(1), 16)
            self.state = self.chunk_data if self.left else self.trailer_line
        elif line is not None:
            self.broken = "a chunk's size is malformed"
        return size

    def chunk_data(self, data, body):
        piece = data[self.position:self.position + self.left]
        body.append(piece)
        self.position += len(piece)
        self.left -= len(piece)
        self.state = self.chunk_data if self.left else self.chunk_end
        return not self.left

    def chunk_end(self, data, body):
        end = data[self.position:self.position + 2]
        if end == b"\r\n":
            self.position += 2
            self.state = self.size_line
        elif not b"\r\n".startswith(end):
            self.broken = "a chunk is longer than its size"
        return len(end) == 2

    def trailer_line(self, data, body):
        line = self.line(data, None, MAX_TRAILER - self.trailer)
        if line:
            self.trailer += len(line)
            field = FIELD_LINE.fullmatch(line)
            if not field or field.group(1).lower() in (b"content-length", b"transfer-encoding", b"host", b"authorization"):
                self.broken = "a trailer field is malformed"
        self.done = line == b""
        return line

    def line(self, data, begun, limit):
        """The next line without its CRLF, None if it is not whole yet."""
        end = data.find(b"\r\n", self.position)
        line = data[self.position:] if end < 0 else data[self.position:end]
        if len(line) > limit or end < 0 and (b"\n" in line or begun and not begun.fullmatch(line)):
            self.broken = "a line is malformed or too long"
        if end < 0 or self.broken:
            return None
        self.position = end + 2
        return line


class RequestBody:
    """A request's body as the client sends it: strictly framed, bounded by `limit`, and not slower than BODY_RATE."""

    def __init__(self, client, decoder):
        self.client, self.decoder, self.length = client, decoder, decoder.length
        self.limit, self.received, self.waited = None, 0, 0.0

    @property
    def done(self):
        return self.decoder.done

    def check_limit(self):
        if self.limit is not None and max(self.received, self.length or 0) > self.limit:
            raise Refusal(413, "request_too_large", "The body is larger than the %d bytes allowed by AIPROXY_MAX_BODY." % self.limit)

    def read_some(self):
        """What is here of the body, decoded; b"" if nothing is yet. Refusal if the client broke off or breaks the rules."""
        if not self.client.buffer:
            try:
                alive = self.client.fill()
            except OSError:
                raise ClientGone("client_gone")
            if not alive:
                raise Refusal(400, "incomplete_body", "The connection ended in the middle of the body.")
        data, self.client.buffer = self.client.buffer, b""
        piece = self.decoder.feed(data) if data else b""
        if self.decoder.broken:
            raise Refusal(400, "bad_request", "The chunked body is malformed: %s." % self.decoder.broken)
        if self.done:
            self.client.buffer = self.decoder.surplus
        self.received += len(piece)
        self.check_limit()
        return piece

    def wait(self, timeout, *upstream):
        """Wait for more, for `timeout` seconds or as long as patience lasts, and no longer than until the upstream speaks. Refusal 408."""
        patience = BODY_GRACE + self.received / BODY_RATE - self.waited
        begin = time.monotonic()
        ready = wait(patience if timeout is None else min(timeout, patience), (self.client, READ), *((wire, READ) for wire in upstream))
        self.waited += time.monotonic() - begin
        if not ready and self.waited >= BODY_GRACE + self.received / BODY_RATE:
            raise Refusal(408, "request_timeout", "The body came more slowly than %d bytes a second." % BODY_RATE)


def chunk(data, chunked):
    """`data` as one chunk if the body is chunked. No empty one: that would be the last."""
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data


# ---- Cloudflare Workers AI, in OpenAI's format ---------------------------------------------------------------------
# Values in, values out, no sockets. Workers AI has four shapes of answers and as many of events, by model and by route. All of
# them are read into one normal form, Choice (the shapes stand at read_answer), and all that a client gets is written from it.
# To follow a request: translate_request, then translate_answer or StreamTranslator, or translate_error.

WORKERS_ALIASES = {     # to add a short name, add a row; AIPROXY_MODELS replaces them all
    "deepseek-r1": "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b",
    "gpt-oss-120b": "@cf/openai/gpt-oss-120b",
    "gpt-oss-20b": "@cf/openai/gpt-oss-20b",
    "llama-4-scout": "@cf/meta/llama-4-scout-17b-16e-instruct",
    "qwen2.5-coder": "@cf/qwen/qwen2.5-coder-32b-instruct",
    "gemma-3": "@cf/google/gemma-4-26b-a4b-it",     # gemma-3-12b-it was retired on 2026-05-30; Cloudflare names this one instead
    "gemma-4": "@cf/google/gemma-4-26b-a4b-it",
    "glm-4.7-flash": "@cf/zai-org/glm-4.7-flash",
    "kimi-k2.6": "@cf/moonshotai/kimi-k2.6",
}
WORKERS_MAX_TOKENS = 4096       # where a request sets none: Cloudflare's own 256 cuts answers off in mid-sentence

# What the client calls: the kind of its answer, and the path under /accounts/{id} that is asked. Cloudflare's own OpenAI routes are
# the way in: they take messages, tools, images and unknown fields as OpenAI has them, name the model in the body, and stream every text
# model; /ai/run wants other schemas by model and does not stream gpt-oss. /ai/v1/completions is documented nowhere, so a prompt goes up
# as one user message: /ai/run with `prompt` would put it into the same chat template, and gpt-oss takes no `prompt` there at all.
WORKERS_PATHS = {
    "/v1/chat/completions": ("chat", "/ai/v1/chat/completions"),
    "/v1/completions": ("text", "/ai/v1/chat/completions"),
    "/v1/embeddings": ("embeddings", "/ai/v1/embeddings"),
    "/v1/responses": ("responses", "/ai/v1/responses"),
}

PARAMETERS = {  # type, least, most: the widest that any current model takes (cloudflare-docs, src/content/workers-ai-models/*.json)
    "stream": ("boolean", None, None),
    "stream_options": ("object", None, None),
    "max_tokens": ("integer", 1, None),
    "max_completion_tokens": ("integer", 1, None),
    "temperature": ("number", 0, 5),
    "top_p": ("number", 0, 2),
    "top_k": ("integer", 1, 50),
    "frequency_penalty": ("number", -2, 2),
    "presence_penalty": ("number", -2, 2),
    "repetition_penalty": ("number", 0, 2),
    "seed": ("integer", 1, 9999999999),
}
PROMPT_MEMBERS = ("messages", "prompt", "suffix", "input", "instructions", "system", "tools", "functions", "response_format", "text")
NOT_PROMPT = frozenset((    # strings below those that are no text, or none that a model reads
    "role", "type", "id", "call_id", "tool_call_id", "status", "detail", "format", "url", "image_url", "image", "data", "file_data", "file_id",
    "filename", "encrypted_content"))

CLOUDFLARE_ERRORS = {code: answer for codes, *answer in (   # Cloudflare's codes: our status (0: theirs, if it is a 5xx), our code
    ((5007, 3042), 404, "model_not_found"),
    ((3003, 3039, 5004, 5005, 5006, 5019, 8001, 8007), 400, "invalid_request"),
    ((3006,), 413, "request_too_large"),
    ((3023, 3041, 5016, 5018, 5035), 403, "permission_denied"),
    ((3021, 3040), 429, "rate_limit_exceeded"),
    ((3036, 4006), 429, "insufficient_quota"),              # 3036 in the docs, 4006 on the wire; mends at midnight UTC
    ((3007, 3008), 504, "upstream_timeout"),
    ((10000, 9106), 502, "upstream_credentials_rejected"),  # our token, so no 401: the client's key is fine
    ((7000, 7001, 7003), 502, "upstream_misconfigured"),    # no such route or account
    ((8005, 7009), 0, "upstream_error"),
) for code in codes}
STATUS_ERRORS = {   # the same by status, for what carries no code of that table
    401: (502, "upstream_credentials_rejected"), 403: (403, "permission_denied"), 404: (404, "not_found"), 408: (504, "upstream_timeout"),
    410: (404, "model_not_found"), 413: (413, "request_too_large"), 429: (429, "rate_limit_exceeded")}
OPERATOR_ERRORS = {     # nothing that the client could mend: what it reads in place of Cloudflare's words, and the log with it
    "upstream_credentials_rejected": "Cloudflare rejected the proxy's API token. CLOUDFLARE_API_TOKEN must be valid and allow Workers AI Read and Edit.",
    "upstream_misconfigured": "Cloudflare knows no such account or route. CLOUDFLARE_ACCOUNT_ID or CLOUDFLARE_API_BASE_URL is wrong.",
}
NO_RETRY = frozenset(("insufficient_quota",)) | frozenset(OPERATOR_ERRORS)      # the SDKs retry 429 and 5xx unless told
FINISH_REASONS = {"length": "length", "model_length": "length", "max_output_tokens": "length", "content_filter": "content_filter",
                  "tool_calls": "tool_calls", "function_call": "tool_calls"}     # all others are a stop
MAX_EVENT = 16 << 20        # bytes of one event: far above any answer, so that a stream without line ends does not fill the memory

MODEL_NAME = re.compile(r"(?!.*\.\.)@?[A-Za-z0-9][A-Za-z0-9._:+-]*(?:/[A-Za-z0-9][A-Za-z0-9._:+-]*)*")
UUID = re.compile(r"\s*\(?\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b\)?", re.I)
LINE_END = re.compile(rb"\r\n|\n|\r")

Call = collections.namedtuple("Call", (    # one request: what goes up, and what its answer needs on its way back
    "kind", "path", "body",                 # chat, text, embeddings or responses; the path under /accounts/{id}; bytes
    "model", "id", "created",               # what the answer shows: the name that the client used, an id, seconds
    "stream", "include_usage", "base64",    # what the client asked for
    "secrets"))                             # what no error may show: the account id, the token
Choice = collections.namedtuple("Choice", "index text reasoning refusal tool_calls finish logprobs")    # the normal form

# -- what goes up


def translate_request(path, body, text, members, model, shown, secrets=(), changes=()):
    """The Call for a client's body, with what parse_members makes of it. `model` is the real one, `shown` the client's, `changes` what settings want. Refusal 400.

    Bytes stay as the client sent them, but for `model`, a max_tokens that is missing, and a prompt, which becomes messages.
    """
    kind, upstream_path = WORKERS_PATHS[path]
    asked = {name: value for name, value, *_ in members if value is not None}      # null counts as absent
    if not safe_model(model):
        raise Refusal(400, "invalid_model", "`model` is not a model's name: %s." % shorten(model), param="model")
    check_parameters(asked, kind)
    changes = dict(changes) if asked.get("model") == model else dict(changes, model=model)
    if kind in ("chat", "text") and not ("max_tokens" in asked or "max_completion_tokens" in asked):
        changes["max_tokens"] = min(WORKERS_MAX_TOKENS, changes.get("max_tokens", WORKERS_MAX_TOKENS))
    if kind == "text":
        prompt = asked["prompt"] if isinstance(asked["prompt"], str) else asked["prompt"][0]
        changes["prompt"] = [{"role": "user", "content": prompt}]
    body = edit_members(body, text, members, changes, {"prompt": "messages"} if kind == "text" else {})
    return Call(kind, upstream_path, body, shown, os.urandom(12).hex(), int(time.time()), asked.get("stream") is True and kind != "embeddings",
                asked.get("stream_options", {}).get("include_usage") is True, asked.get("encoding_format") == "base64", tuple(secrets))


def edit_members(body, text, members, changes, names={}):
    """`body` with the values of the members in `changes` replaced, new ones put in front, those in `names` renamed: no other byte differs."""
    if not changes:
        return body
    pieces, done = [], 0
    for name, _, start, end in members:     # between two values stand a comma, the name and a colon
        between = text[done:start]
        pieces.append(re.sub('"[^"]*"', json.dumps(names[name]), between) if name in names else between)
        pieces.append(json.dumps(changes[name]) if name in changes else text[start:end])
        done = end
    text = "".join(pieces) + text[done:]
    held = {name for name, *_ in members}
    front = ", ".join("%s: %s" % (json.dumps(name), json.dumps(value)) for name, value in changes.items() if name not in held)
    at = text.index("{") + 1
    return (text[:at] + front + (", " if front and members else "") + text[at:]).encode()


def check_parameters(asked, kind):
    """400 for a parameter that no model takes. The message says which, what it got, and what it takes. Unknown ones pass."""
    for name, (form, least, most) in PARAMETERS.items():
        value = asked.get(name)
        if value is not None and not fits(value, form, least, most):
            limits = "" if least is None else " of at least %d" % least if most is None else " from %d to %d" % (least, most)
            article = "an" if form[0] in "aio" else "a"
            refuse_parameter(name, value, "true or false" if form == "boolean" else "%s %s%s" % (article, form, limits))
    messages, prompt = asked.get("messages"), asked.get("prompt")
    if kind == "chat" and not (isinstance(messages, list) and messages):
        refuse_parameter("messages", messages, "an array that is not empty")
    if kind == "text" and not (isinstance(prompt, str) or isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)):
        refuse_parameter("prompt", prompt, "a string, or an array of one: Workers AI completes one text at a time, and takes no token numbers")
    if kind == "text" and messages is not None:
        refuse_parameter("messages", messages, "nothing here: it belongs to /v1/chat/completions")


def fits(value, form, least, most):
    if form in ("boolean", "object"):
        return isinstance(value, bool if form == "boolean" else dict)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or form == "integer" and value != int(value):    # 1.0 is the integer 1
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def refuse_parameter(name, value, takes):
    got = "is missing" if value is None else "got %s" % shorten(value)
    raise Refusal(400, "invalid_parameter", "`%s` %s; it takes %s." % (name, got, takes), param=name)


def shorten(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_characters(values, most):
    """400 for a prompt of more than `most` characters, all the text of a request together."""
    count = prompt_characters({name: values[name] for name in PROMPT_MEMBERS if name in values})
    if count > most:
        raise Refusal(400, "invalid_parameter", "The request holds %d characters of text; AIPROXY_MAX_CHARS allows %d." % (count, most))


def prompt_characters(value):
    """Characters of all text in a JSON value, images and audio not counted."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(prompt_characters(inner) for name, inner in value.items() if not (isinstance(inner, str) and name in NOT_PROMPT))
    return sum(map(prompt_characters, value)) if isinstance(value, list) else 0


def safe_model(name):
    """True for a name that stays in its place in any URL: no empty or dot segment, no `?`, `#`, `%` or space."""
    return len(name) <= 200 and MODEL_NAME.fullmatch(name) is not None


# -- what comes down: every shape into the normal form


def read_json(data):
    """What Cloudflare sent, parsed. Refusal 502 if that cannot be done."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        check_depth(text)
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise unreadable()


def unreadable():
    return Refusal(502, "upstream_bad_response", "Cloudflare's answer could not be read.")


def unwrap(data, secrets, needed=None):
    """The answer or event without Cloudflare's envelope. Refusal if it is an error in any form, or lacks the member that is needed."""
    if not isinstance(data, dict):
        raise unreadable()
    if (data.get("success") is False or data.get("errors") and data.get("success") is not True or data.get("error") and data.get("object") != "response"
            or data.get("type") == "error" or data.get("object") == "error"):
        raise translate_error(200, data, secrets)
    if "result" in data:
        return unwrap(data["result"], secrets, needed)
    if needed and not data.get(needed) and data.get(needed) != []:
        raise unreadable()
    return data


def read_answer(data, secrets=()):
    """The choices and the usage of an answer, whole or one event of it. The shapes (cloudflare/workerd, types/defines/ai.d.ts):

    legacy     {"response": text, number, object or null, "tool_calls": [{"name", "arguments": object}]}, also as events
    OpenAI     {"choices": [{"message" or "delta" or "text"}]}, bare from /ai/v1, in an envelope from /ai/run, as chunk objects
    both       in one event, with the same text: choices go first (cloudflare/ai#615: reading both doubles every word)
    Responses  {"output": [reasoning, message and function_call items]}, from gpt-oss
    """
    data = unwrap(data, secrets)
    usage = openai_usage(data.get("usage"))
    if isinstance(data.get("output"), list):
        return [read_output(data, secrets)], usage
    listed = dicts(data.get("choices"))
    if not listed and ("response" in data or "tool_calls" in data or "finish_reason" in data):
        listed = [{}]
    native = Choice(0, as_text(data.get("response")), "", "", as_list(data.get("tool_calls")), read_finish(data.get("finish_reason")), None)
    choices = [read_choice(choice, number) for number, choice in enumerate(listed)]
    return [Choice(*(one or other for one, other in zip(choice, native))) for choice in choices[:1]] + choices[1:], usage


def read_whole(body, secrets):
    """The same of a whole answer in bytes. An event may say nothing (only padding, only usage); an answer may not."""
    choices, usage = read_answer(read_json(body), secrets)
    if not choices:
        raise unreadable()
    return choices, usage


def read_choice(choice, number):
    said = as_dict(choice.get("delta") or choice.get("message"))
    content = said.get("content", choice.get("text"))       # `text` where the model was given a prompt
    if isinstance(content, list):
        content = "".join(as_text(part.get("text")) for part in dicts(content))
    reasoning = said.get("reasoning_content") or said.get("reasoning")     # gemma-4 uses the short name
    index = choice.get("index")
    return Choice(index if isinstance(index, int) else number, as_text(content), reasoning if isinstance(reasoning, str) else "", as_text(said.get("refusal")),
                  as_list(said.get("tool_calls")), read_finish(choice.get("finish_reason")), choice.get("logprobs"))


def read_output(data, secrets):
    """A Responses object as one choice. Items need not have `content`: a function_call has none."""
    if data.get("error") or data.get("status") == "failed":
        raise translate_error(200, data, secrets)
    items = dicts(data["output"])
    parts = [(item.get("type"), part) for item in items for part in dicts(item.get("content")) + dicts(item.get("summary"))]
    return Choice(0, "".join(as_text(part.get("text")) for kind, part in parts if kind == "message"),
                  "".join(as_text(part.get("text")) for kind, part in parts if kind == "reasoning"),
                  "".join(as_text(part.get("refusal")) for kind, part in parts),
                  [item for item in items if item.get("type") == "function_call"], read_finish(as_dict(data.get("incomplete_details")).get("reason")), None)


def as_text(value):
    """JSON mode puts an object into `response`, llama-4 a number: both are text to the client."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def as_list(value):
    return value if isinstance(value, list) else []


def as_dict(value):
    return value if isinstance(value, dict) else {}


def dicts(value):
    return [item for item in as_list(value) if isinstance(item, dict)]


def read_finish(reason):
    if reason == "error":
        raise Refusal(502, "upstream_bad_response", "The model broke off with an error.")
    return FINISH_REASONS.get(reason, "stop") if isinstance(reason, str) and reason else None


def openai_usage(usage):
    """OpenAI's counts out of either naming, or None: zeros mean that Cloudflare did not count, and a guess would be worse than none."""
    counts = {}
    for name, value in as_dict(usage).items():
        name = name.replace("input_", "prompt_").replace("output_", "completion_")
        if isinstance(value, dict if name.endswith("_details") else int) and name.startswith(("prompt_tokens", "completion_tokens", "total_tokens")):
            counts[name] = value
    if not any(value for value in counts.values() if isinstance(value, int)):
        return None
    counts.setdefault("total_tokens", counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0))
    return counts


def number_calls(calls, begun, call_id, empty=""):
    """Tool calls as OpenAI has them. `begun` lists those of earlier events: a call shows its id and name once, then only arguments."""
    for call in dicts(calls):
        function = as_dict(call.get("function")) or call        # llama-3.3 and Responses are flat
        ident, name, arguments = (as_text(text) for text in (call.get("call_id") or call.get("id"), function.get("name"), function.get("arguments")))
        place = call.get("index")
        if not (ident or name or arguments):
            continue        # the null sentinel after a call (workers-ai-provider, streaming.ts)
        same = [number for number, (known, at) in enumerate(begun) if
                (ident == known if ident else not name) or place is not None and place == at and not (ident and known)]
        if not same:
            begun.append((ident, place))
            yield {"index": len(begun) - 1, "id": ident or "call_%s_%d" % (call_id, len(begun)), "type": "function",
                   "function": {"name": name, "arguments": arguments or empty}}
        elif arguments:
            yield {"index": same[-1], "function": {"arguments": arguments}}


# -- the normal form written as OpenAI's objects


def translate_answer(call, body):
    """A whole answer with status 200 as the object that OpenAI would have sent. Refusal 502 if it cannot be read, or what an error in it says."""
    if call.kind == "responses":
        return relabel_response(unwrap(read_json(body), call.secrets, "output"), call)
    if call.kind == "embeddings":
        return embeddings_object(unwrap(read_json(body), call.secrets, "data"), call)
    choices, usage = read_whole(body, call.secrets)
    return completion_object(call, [whole_choice(call, choice) for choice in choices], usage)


def completion_object(call, choices, usage, chunk=""):
    """chat.completion, chat.completion.chunk or text_completion, whose whole and chunk are one form."""
    prefix, name = ("cmpl-", "text_completion") if call.kind == "text" else ("chatcmpl-", "chat.completion" + chunk)
    answer = {"id": prefix + call.id, "object": name, "created": call.created, "model": call.model, "choices": choices}
    return dict(answer, usage=usage) if usage or chunk and call.include_usage else answer


def whole_choice(call, choice):
    calls = list(number_calls(choice.tool_calls, [], call.id, "{}"))
    message = dict({"role": "assistant", "content": None if calls else "", "refusal": None}, **said(choice, calls))
    for one in calls:
        del one["index"]        # only deltas number them
    return choice_object(call, choice.index, "message", message, finish_reason(choice.finish, calls), choice.logprobs)


def said(choice, calls):
    """What a message or a delta holds of a choice."""
    fields = {"content": choice.text, "reasoning_content": choice.reasoning, "refusal": choice.refusal, "tool_calls": calls}
    return {name: value for name, value in fields.items() if value}


def choice_object(call, index, form, message, finish, logprobs=None):
    if call.kind == "text":     # no place for reasoning, and chat's logprobs are not its
        return {"index": index, "text": message.get("content") or "", "logprobs": None, "finish_reason": finish}
    return {"index": index, form: message, "logprobs": logprobs, "finish_reason": finish}


def finish_reason(finish, calls):
    """Some models end with `stop`, or with nothing, after a tool call; agents look for tool_calls."""
    return "tool_calls" if calls and finish in (None, "stop") else finish or "stop"


def embeddings_object(data, call):
    """OpenAI's list, from that or from the legacy {"shape", "data": [[...]]}. Node's SDK asks for base64 and decodes floats to zeros."""
    rows = [row.get("embedding") if isinstance(row, dict) else row for row in as_list(data.get("data"))]
    try:
        if call.base64:
            rows = [row if isinstance(row, str) else base64.b64encode(struct.pack("<%df" % len(row), *row)).decode() for row in rows]
    except (struct.error, OverflowError, TypeError):
        raise unreadable()
    if not rows or not all(isinstance(row, (list, str)) for row in rows):
        raise unreadable()
    answer = {"object": "list", "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)], "model": call.model}
    usage = openai_usage(data.get("usage")) or {}
    usage.pop("completion_tokens", None)
    return dict(answer, usage=usage) if usage else answer


def relabel_response(data, call):
    """A Responses object or event with the client's name for the model, and no secret in its error."""
    data = dict(data, **({"model": call.model} if "model" in data else {}))
    if isinstance(data.get("error"), dict):
        data["error"] = dict(data["error"], message=clean_message(data["error"].get("message"), call.secrets))
    if isinstance(data.get("response"), dict):
        data["response"] = relabel_response(data["response"], call)
    return data


# -- streams


def render_event(data, name=""):
    """One event in bytes, ASCII because a delta may hold half a surrogate pair. Never `id:` or `retry:`, which openai-python stumbles over."""
    return ("event: %s\ndata: %s\n\n" % (name, json.dumps(data)) if name else "data: %s\n\n" % json.dumps(data)).encode()


def error_object(refusal):
    """OpenAI's error form, in a body or as an event."""
    kind = "rate_limit_error" if refusal.status == 429 else "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}


class EventReader:
    """Events out of bytes as they come (WHATWG HTML, 9.2.6): any line end, comments, `data:` without a space and on several lines."""

    def __init__(self):
        self.line, self.after_cr, self.name, self.data, self.size = b"", False, "", [], 0

    def feed(self, piece):
        """The events that `piece` completes, as (name, data)."""
        events = []
        lines = LINE_END.split(piece[1:] if self.after_cr and piece[:1] == b"\n" else piece)
        self.after_cr = piece[-1:] == b"\r"
        lines[0] = self.line + lines[0]
        self.line = lines.pop()
        for line in lines:
            field, _, value = line.decode("utf-8", "replace").partition(":")
            value = value[1:] if value[:1] == " " else value
            if field == "data":
                self.data.append(value)
                self.size += len(value)
            elif field == "event":
                self.name = value
            elif not line:
                if self.data:
                    events.append((self.name, "\n".join(self.data)))
                self.name, self.data, self.size = "", [], 0
        if self.size + len(self.line) > MAX_EVENT:
            raise unreadable()
        return events


class StreamTranslator:
    """Cloudflare's events in, OpenAI's out, each as soon as it is there. `done`: the client has all it will get; `failed`: the error's code."""

    def __init__(self, call):
        self.call, self.events = call, EventReader()
        self.begun = {}             # by a choice's index: its tool calls, and whether it has its finish_reason
        self.usage = self.failed = None
        self.done = False

    def feed(self, piece):
        """The bytes for the client that `piece` brings about. What cannot be read, and any error in it, ends the stream with an error event."""
        out = []
        try:
            for name, data in self.events.feed(piece):
                if data and not self.done:
                    out += self.translate(name, data)
        except Refusal as refusal:
            out.append(self.fail(refusal))
        return b"".join(out)

    def end(self, reason=None):
        """The last bytes, at the end of the upstream's body. `reason` is the Refusal to show when the connection broke."""
        out = b""
        if not reason:      # a last event may lack its blank line; half an event, which cannot be read, is none
            try:
                out = b"".join(part for name, data in self.events.feed(b"\n\n") if data and not self.done for part in self.translate(name, data))
            except Refusal as refusal:
                reason = refusal
        if self.done:
            return out
        if self.is_complete():
            return out + b"".join(self.finish())
        return out + self.fail(reason or Refusal(502, "upstream_bad_response", "The upstream broke off in the middle of this answer."))

    def whole(self, body):
        """A whole JSON answer as the events of a stream: gpt-oss may answer so. Refusal as in translate_answer, nothing being sent yet."""
        choices, self.usage = read_whole(body, self.call.secrets)
        return b"".join([self.chunk(part) for choice in choices for part in self.parts(choice, "{}")] + self.finish())

    def translate(self, name, data):
        """The events in bytes that one event is worth."""
        if data.strip() == "[DONE]":
            return self.finish()
        choices, usage = read_answer(read_json(data), self.call.secrets)
        self.usage = usage or self.usage        # of two finish chunks the second has zeros
        return [self.chunk(part) for choice in choices for part in self.parts(choice)]

    def parts(self, choice, empty=""):
        """The choices of its chunk objects: the role first, then what is new, then the finish_reason, once."""
        known = self.begun.get(choice.index)
        if known is None:
            known = self.begun[choice.index] = {"calls": [], "finish": None}
            if self.call.kind == "chat":
                yield self.part(choice.index, {"role": "assistant", "content": "", "refusal": None})
        delta = said(choice, list(number_calls(choice.tool_calls, known["calls"], self.call.id, empty)))
        if delta if self.call.kind == "chat" else choice.text:
            yield self.part(choice.index, delta, logprobs=choice.logprobs)
        if choice.finish and not known["finish"]:
            known["finish"] = finish_reason(choice.finish, known["calls"])
            yield self.part(choice.index, {}, known["finish"])

    def part(self, index, delta, finish=None, logprobs=None):
        return choice_object(self.call, index, "delta", delta, finish, logprobs)

    def chunk(self, *parts, usage=None):
        return render_event(completion_object(self.call, list(parts), usage, ".chunk"))

    def is_complete(self):
        return bool(self.begun) and all(known["finish"] for known in self.begun.values())

    def finish(self):
        """What closes a stream that the upstream ended well: legacy ones give no finish_reason."""
        if not self.begun:
            raise unreadable()
        self.done = True
        out = [self.chunk(self.part(index, {}, finish_reason(None, known["calls"]))) for index, known in self.begun.items() if not known["finish"]]
        if self.call.include_usage and self.usage:
            out.append(self.chunk(usage=self.usage))
        return out + [b"data: [DONE]\n\n"]

    def fail(self, refusal):
        """One error event, the last one: both official SDKs raise it, while they swallow Cloudflare's own. Never a finish, never [DONE]."""
        self.done, self.failed = True, refusal.code
        return render_event({"error": error_object(refusal)})


class ResponsesTranslator(StreamTranslator):
    """/v1/responses: events pass as they come, with the client's name for the model."""

    LAST = ("response.completed", "response.incomplete", "response.failed")
    complete = False

    def translate(self, name, data):
        if data.strip() == "[DONE]":
            return self.finish()
        event = relabel_response(unwrap(read_json(data), self.call.secrets, "type"), self.call)
        self.complete = self.complete or event["type"] in self.LAST
        self.usage = openai_usage(as_dict(event.get("response")).get("usage")) or self.usage
        return [render_event(event, name)]

    def is_complete(self):
        return self.complete

    def finish(self):
        if not self.complete:
            raise unreadable()
        self.done = True        # Responses streams have no [DONE]
        return []

    def fail(self, refusal):
        super().fail(refusal)
        error = error_object(refusal)       # `error` is what the SDKs raise, the rest is how Responses say it
        return render_event(dict(error, type="error", error=error), "error")

    def whole(self, body):
        """The events that OpenAI would have sent: Workers AI has the Responses API "only non-streaming" (cloudflare-docs#32116)."""
        response = translate_answer(self.call, body)
        events = [("response.created", {"response": dict(response, status="in_progress", output=[], usage=None)})]
        for number, item in enumerate(dicts(response["output"])):
            events += item_events({"output_index": number, "item_id": item.get("id")}, item)
        status = "response.%s" % response.get("status")
        events.append((status if status in self.LAST else self.LAST[0], {"response": response}))
        self.done = True
        return b"".join(render_event(dict(event, type=name, sequence_number=number), name) for number, (name, event) in enumerate(events))


def item_events(place, item):
    """The events of one item of a Responses object."""
    empty = {"content": [], "arguments": ""}
    begun = dict(item, status="in_progress", **{name: value for name, value in empty.items() if item.get(name)})
    yield "response.output_item.added", {"output_index": place["output_index"], "item": begun}
    for number, part in enumerate(dicts(item.get("content"))):
        kind = part.get("type") if part.get("type") in ("reasoning_text", "refusal") else "output_text"
        text, where = "refusal" if kind == "refusal" else "text", dict(place, content_index=number)
        yield "response.content_part.added", dict(where, part=dict(part, **{text: ""}))
        yield "response.%s.delta" % kind, dict(where, delta=part.get(text), logprobs=[])
        yield "response.%s.done" % kind, dict(where, logprobs=[], **{text: part.get(text)})
        yield "response.content_part.done", dict(where, part=part)
    if item.get("type") == "function_call":
        yield "response.function_call_arguments.delta", dict(place, delta=item.get("arguments"))
        yield "response.function_call_arguments.done", dict(place, arguments=item.get("arguments"))
    yield "response.output_item.done", {"output_index": place["output_index"], "item": item}


# -- errors


def translate_error(status, body, secrets=(), **fields):
    """The Refusal for Cloudflare's error, in bytes or parsed: by its code, else by its status. `fields` go with it (retry_after="5").

    Forms: the envelope {"success": false, "errors": [{"code", "message"}]}, OpenAI's {"error": {...}}, a bare object, HTML, nothing.
    """
    if isinstance(body, bytes):
        try:
            body = read_json(body)
        except Refusal:
            body = None
    said = error_said(body)
    number, message = said.get("code"), clean_message(said.get("message"), secrets)
    number = int(number) if re.fullmatch(r"[0-9]{3,5}", str(number)) else 0
    if number not in CLOUDFLARE_ERRORS:
        inside = [int(code) for code in re.findall(r"\b([0-9]{4,5}):", message) if int(code) in CLOUDFLARE_ERRORS]    # "3040: Capacity ..."
        number = inside[0] if inside else number
    if status < 400 <= number < 600:
        status = number         # vLLM's {"object": "error", "code": 400} inside a 200
    name = said.get("code") if isinstance(said.get("code"), str) and not said["code"].isdigit() else None
    ours, code = CLOUDFLARE_ERRORS.get(number) or STATUS_ERRORS.get(status) or (
        (502, name or "upstream_bad_response") if status < 400 else (status, name or ("invalid_request" if status < 500 else "upstream_error")))
    message = OPERATOR_ERRORS.get(code) or message or "Cloudflare answered with status %d and no reason that could be read." % status
    param = said.get("param") if isinstance(said.get("param"), str) else "model" if code == "model_not_found" else None
    if code in NO_RETRY:
        fields["x_should_retry"] = "false"
    return Refusal(ours or (status if status >= 500 else 502), code, message, param, **fields)


def error_said(body):
    """The object in an error body that has the code and the message, {} if there is none."""
    said = body
    if isinstance(body, dict):
        errors = dicts(body.get("errors"))
        known = [error for error in errors if str(error.get("code")) in map(str, CLOUDFLARE_ERRORS)]
        said = (known + errors + [body.get("error") or body])[0]
    return {"message": said} if isinstance(said, str) else as_dict(said)


def clean_message(message, secrets):
    """Cloudflare's words without `AiError:`, JSON around them, uuids and what must stay here."""
    message = as_text(message)
    for _ in range(4):      # prefixes and JSON may be nested: AiError: AiError: {"object": "error", "message": ...}
        message = re.sub(r"^(?:\s*(?:AiError|InferenceUpstreamError)\s*:)+\s*", "", UUID.sub("", message))
        if message[:1] != "{":
            break
        try:
            inner = error_said(json.loads(message[:message.rindex("}") + 1]))
        except (ValueError, RecursionError):
            break
        message = as_text(inner.get("message")) or message
    for secret in filter(None, secrets):
        message = re.sub(re.escape(secret), "***", message, flags=re.I)
    return message.strip()[:2000]


# -- the model list


def read_catalogue_page(status, body, secrets=()):
    """The items of one page of models/search; an empty list is the end. Refusal if it cannot be read."""
    if status != 200:
        raise translate_error(status, body, secrets)
    data = read_json(body)
    if not isinstance(data, dict) or data.get("success") is False or not isinstance(data.get("result"), list):
        raise translate_error(200, body, secrets)
    return dicts(data["result"])


def translate_catalogue(items, today, names, only_names):
    """The items of OpenAI's model list out of all pages: `names` (shown name to model) first, aliases before others, then the rest.

    With `only_names`, an allow-list, there is no rest. `today` is YYYY-MM-DD in UTC: a model is gone on its deprecation date.
    """
    models = {}
    for item in items:      # pages may overlap: by name, which is OpenAI's id; Cloudflare's `id` is a uuid
        task = as_text(as_dict(item.get("task")).get("name"))
        told = {as_text(one.get("property_id")): one.get("value") for one in dicts(item.get("properties"))}
        gone = as_text(told.get("planned_deprecation_date"))[:10]
        # The query's task= matches a display label exactly and finds nothing when that drifts, so tasks are told apart here.
        if isinstance(item.get("name"), str) and re.sub(r"\W", "", task).lower() in ("textgeneration", "textembeddings") and not (gone and gone <= today):
            metadata = {"description": item.get("description"), "task": task, "context_window": told.get("context_window"),
                        "planned_deprecation_date": told.get("planned_deprecation_date")}
            models.setdefault(item["name"], {"object": "model", "created": seconds(item.get("created_at")), "owned_by": "cloudflare", "permission": [],
                                             "root": item["name"], "parent": None,
                                             "metadata": {name: value for name, value in metadata.items() if value is not None}})
    shown = dict(sorted(names.items(), key=lambda pair: pair[0] == pair[1]))
    if not only_names:
        shown.update((name, name) for name in models)
    return [dict(id=name, **models[model]) for name, model in shown.items() if model in models]


def seconds(text):
    """Unix seconds of "2025-08-05 10:49:53.265", which is UTC without saying so; 0 if it is none."""
    try:
        when = datetime.datetime.strptime(as_text(text)[:19].replace("T", " "), "%Y-%m-%d %H:%M:%S")
    except ValueError:
        return 0
    return int(when.replace(tzinfo=datetime.timezone.utc).timestamp())


# ---- Reading the settings ------------------------------------------------------------------------------------------


class SettingError(Exception):
    """A setting that cannot be used: the message names it, what it got unless that may be secret, and what it takes."""


class Settings:
    """The settings in force, read from `environ` here and nowhere else. SettingError for a wrong or an unsafe one."""

    def __init__(self, environ):
        def read(name, parse, takes, secret=False):
            text = environ.get(name, "").strip() or DEFAULTS.get(name, "")
            try:
                return parse(text)
            except ValueError as error:
                got = "got something that is not shown here because it may be secret" if secret else "got %r" % text
                raise SettingError("%s: %s; it takes %s" % (name, got, takes or error))

        self.host = read("AIPROXY_HOST", parse_name, "an address or a host name")
        self.port = read(next((name for name in ("AIPROXY_PORT", "PORT", "FC_SERVER_PORT") if environ.get(name, "").strip()), "AIPROXY_PORT"),
                         lambda text: parse_number(text, int, 0, 65535), "a port number, 0 to 65535")
        self.upstream = read("AIPROXY_UPSTREAM", Upstream, "one of %s, or a base URL such as https://host or https://host/v1, without "
                             "user info, query or fragment" % ", ".join(PROVIDERS), secret=re.search("[@?#]", environ.get("AIPROXY_UPSTREAM", "")))
        self.workers = self.upstream.name == "workers-ai"
        self.keys = read("CLOUDFLARE_API_TOKEN" if self.workers else "AIPROXY_KEY", parse_keys, "", secret=True)
        self.account = read("CLOUDFLARE_ACCOUNT_ID", parse_account, "the id of an account: letters and digits") if self.workers else ""
        if self.workers:
            if not self.account or not self.keys:
                raise SettingError("AIPROXY_UPSTREAM=workers-ai needs CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN, a token with Workers AI Read and Edit")
            self.upstream = read("CLOUDFLARE_API_BASE_URL", lambda text: Upstream(text, "/accounts/" + self.account), "a base URL",
                                 secret=re.search("[@?#]", environ.get("CLOUDFLARE_API_BASE_URL", "")))
        self.hidden = bool(self.keys)
        self.key_header = read("AIPROXY_KEY_HEADER", parse_field_name, "a header field's name") or self.upstream.key_header
        self.wants_key = self.upstream.wants_key
        self.client_keys = read("AIPROXY_CLIENT_KEYS", parse_client_keys, "", secret=True)
        self.models = read("AIPROXY_MODELS", parse_models, "names, comma-separated, each model or alias=model")
        self.default_model = read("AIPROXY_DEFAULT_MODEL", parse_name, "one model's name")
        self.paths = read("AIPROXY_PATHS", parse_paths, "PATH, METHOD PATH or * PATH, comma-separated, or * alone")
        self.origins = read("AIPROXY_ORIGINS", parse_origins, "* or origins, comma-separated, exactly as browsers send them: https://app.example, without a path")
        self.open = read("AIPROXY_OPEN", parse_switch, "1, true, yes, on or 0, false, no, off")
        self.rate_shown = environ.get("AIPROXY_RATE", "").strip() or ("60/min" if self.open else "")
        self.rate = read("AIPROXY_RATE", lambda text: parse_rate(text or self.rate_shown), "a rate such as 20/s, 60/min, 100/h or 1000/day")
        self.max_tokens = read("AIPROXY_MAX_TOKENS", lambda text: parse_number(text or "0", int, 0, 10 ** 9), "a number of tokens")
        self.max_per_client = read("AIPROXY_MAX_PER_CLIENT", lambda text: parse_number(text, int, 1, 1000000), "a number from 1")
        self.max_body = read("AIPROXY_MAX_BODY", parse_size, "a size such as 32MB")
        self.max_connections = read("AIPROXY_MAX_CONNECTIONS", lambda text: parse_number(text, int, 1, 1000000), "a number from 1")
        self.connect_timeout = read("AIPROXY_CONNECT_TIMEOUT", lambda text: parse_number(text, float, 0.001, 86400), "seconds, more than 0")
        self.timeout = read("AIPROXY_TIMEOUT", lambda text: parse_number(text, float, 0.001, 86400), "seconds, more than 0")
        self.grace = read("AIPROXY_GRACE", lambda text: parse_number(text, float, 0, 86400), "seconds")
        self.log = read("AIPROXY_LOG", lambda text: parse_choice(text, ("text", "json", "off")), "text, json or off")
        self.max_chars = read("AIPROXY_MAX_CHARS", lambda text: parse_number(text or ("131072" if self.workers else "0"), int, 0, 10 ** 12), "a number of characters")
        self.aliases = self.models or (WORKERS_ALIASES if self.workers else {})     # name to model; an allow-list only if it is `models`
        self.models_shown = list(self.aliases)
        self.never_shown = (self.account,) * bool(self.account) + tuple(key.decode() for key in self.keys)
        self.never_down = [word.encode() for word in self.never_shown]
        if self.hidden and self.paths is None:
            self.paths = [("POST", path) for path in self.upstream.paths] + [("GET", "/v1/models"), ("GET", "/v1/models/*")]
        self.key_needed = bool(self.client_keys) or not self.hidden and self.wants_key
        self.any_origin = "*" in self.origins or not self.origins and self.key_needed
        rules = self.paths if self.paths is not None else [("POST", "*")]
        self.default_path = next((path for path in self.upstream.paths + INFERENCE_PATHS if "POST" in allowed_methods(path, rules)), self.upstream.paths[0])
        self.guarded_by_loopback = self.hidden and not self.client_keys and not self.open
        self.check_safe()

    def check_safe(self):
        """SettingError for a combination that would be open by accident, or cannot work."""
        if self.guarded_by_loopback and not LOOPBACK.fullmatch(self.host):
            raise SettingError("A provider key is hidden and AIPROXY_HOST=%s lets others reach it, but no client key is asked for. Set one of:\n"
                               "  AIPROXY_CLIENT_KEYS=name=%s   (what clients must send)\n"
                               "  AIPROXY_HOST=127.0.0.1   (this machine only)\n"
                               "  AIPROXY_OPEN=1   (anyone may spend the key)" % (self.host, os.urandom(18).hex()))
        if self.client_keys and not self.hidden and self.wants_key:
            raise SettingError("AIPROXY_CLIENT_KEYS is set but AIPROXY_KEY is not: clients could present only one key, and it would be ours. "
                               "Set AIPROXY_KEY to the provider key, or leave AIPROXY_CLIENT_KEYS empty")
        if any(hmac.compare_digest(key, known) for key in self.keys for _, known in self.client_keys):
            raise SettingError("AIPROXY_CLIENT_KEYS holds the provider key; make up another key for the client")
        if self.models and self.default_model and self.default_model not in self.models:
            raise SettingError("AIPROXY_DEFAULT_MODEL: got %r; it takes a name on AIPROXY_MODELS" % self.default_model)
        if self.port and self.port == self.upstream.port and self.upstream.loopback and (LOOPBACK.fullmatch(self.host) or self.host in ("0.0.0.0", "::")):
            raise SettingError("AIPROXY_UPSTREAM: got %r; it takes another server than this proxy itself" % self.upstream.url)

    def secrets(self):
        """All keys that must never be seen, as bytes."""
        return self.never_down + [key for _, key in self.client_keys]


class Upstream:
    """Where requests go: a row of PROVIDERS or a base URL. ValueError if it is neither."""

    def __init__(self, text, below=""):
        """`below` is added to the path and not shown to anybody."""
        self.name = text.lower()
        url, self.key_header, self.paths = PROVIDERS.get(self.name, (text, None, None))
        parts = urllib.parse.urlsplit(url)
        clean = re.fullmatch(r"https?://[^/?#@\s\\]+(/[A-Za-z0-9._~/-]*)?", url, re.I)
        if not clean or not parts.hostname or "//" in parts.path or DOT_SEGMENT.search(parts.path):
            raise ValueError()
        host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
        self.scheme, self.host = parts.scheme, host
        self.port = parts.port or {"https": 443, "http": 80}[parts.scheme]
        self.loopback = LOOPBACK.fullmatch(host) is not None
        self.base, self.shown = parts.path.rstrip("/") + below, url.rstrip("/")
        netloc = ("[%s]" % host if ":" in host else host) + (":%d" % parts.port if parts.port else "")
        self.netloc, self.url = netloc.encode(), "%s://%s" % (parts.scheme, netloc)
        if self.key_header is None:         # a base URL of a provider that we know wants its key as that row says
            known = [row for row in PROVIDERS.values() if urllib.parse.urlsplit(row[0]).netloc == netloc]
            _, self.key_header, self.paths = known[0] if known else ("", "Authorization", OPENAI_PATHS)
        self.wants_key = bool(self.key_header) and not self.loopback
        self.key_header = self.key_header or "Authorization"

    def map_path(self, path):
        """The path to ask the upstream for: a path in the base URL takes the place of /v1. None for what it does not serve."""
        if not self.base:
            return path
        return self.base + path[3:] if path == "/v1" or path.startswith("/v1/") else None


PLACEHOLDER = re.compile(r"<.*>|(sk-)?your[-_ ].*|(sk-)?your(api)?key.*|.*你的.*|(sk-)?(x{3,}|\.{3,}|\*{3,}|…)|api[-_ ]?key|change[-_ ]?me|replace[-_ ]?me|placeholder|todo", re.I)


def parse_account(text):
    if text and (PLACEHOLDER.fullmatch(text) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text)):
        raise ValueError()
    return text


def parse_list(text):
    """The items of a comma-separated list. ValueError if there is text but no item: a list that is meant must not count as none."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if text and not items:
        raise ValueError("a list with something between its commas")
    return items


def check_key(key):
    """The key as bytes. ValueError, which never holds it, for a placeholder or what cannot stand in a header field."""
    if PLACEHOLDER.fullmatch(key):
        raise ValueError("a real key: this one looks like a placeholder from an example")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError("keys of visible ASCII characters: look for spaces, line ends and typographic quotes")
    return key.encode()


def parse_keys(text):
    return [check_key(key) for key in parse_list(text)]


def parse_client_keys(text):
    keys = []
    for place, entry in enumerate(parse_list(text), 1):
        name, equals, key = entry.partition("=")
        if not equals:
            name, key = "client%d" % place, entry
        if not key.strip("="):
            raise ValueError("name=key where a key itself holds '='")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", name):
            raise ValueError("name=key with names of 1 to 32 characters of A-Za-z0-9_.- (a key that itself holds '=' needs a name)")
        keys.append((name, check_key(key)))
    if len({key for _, key in keys}) != len(keys) or len({name for name, _ in keys}) != len(keys):
        raise ValueError("each name and each key once")
    return keys


def parse_models(text):
    """Names and aliases, each with the model behind it, in the order in which they stand there."""
    models = {}
    for entry in parse_list(text):
        name, equals, model = (part.strip() for part in entry.partition("="))
        if not parse_name(name) or equals and not parse_name(model) or name in models:
            raise ValueError()
        models[name] = model or name
    return models


def parse_paths(text):
    if not text:
        return None
    rules = []
    for entry in parse_list(text):
        method, _, path = entry.rpartition(" ")
        method = method.strip().upper() or ("*" if path == "*" else "POST")
        if method not in METHODS + ("*",) or path != "*" and (path[:1] != "/" or "//" in path or "?" in path or BAD_ESCAPE.search(path) or DOT_SEGMENT.search(path)):
            raise ValueError()
        rules.append((method, path))
    return rules


def parse_origins(text):
    origins = parse_list(text)
    if not all(re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin) for origin in origins):
        raise ValueError()
    return origins


def parse_switch(text):
    return {"": False, "0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}[parse_choice(
        text.lower(), ("", "0", "false", "no", "off", "1", "true", "yes", "on"))]


def parse_choice(text, choices):
    if text not in choices:
        raise ValueError()
    return text


def parse_number(text, kind, least, most):
    number = kind(text)
    if not least <= number <= most:
        raise ValueError()
    return number


def parse_rate(text):
    """(requests, seconds), or None for no limit."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})\s*/\s*(s|sec|min|m|h|hour|d|day)", text)
    if not match and text:
        raise ValueError()
    return (int(match.group(1)), {"s": 1, "m": 60, "h": 3600, "d": 86400}[match.group(2)[0]]) if match else None


def parse_size(text):
    number, unit = re.fullmatch(r"([0-9]{1,12})\s*(B|KB|MB|GB|)", text.upper()).groups() if re.fullmatch(r"([0-9]{1,12})\s*(B|KB|MB|GB|)", text.upper()) else (0, None)
    if unit is None:
        raise ValueError()
    return int(number) * {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}[unit]


def parse_name(text):
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise ValueError()
    return text


def parse_field_name(text):
    if text and not re.fullmatch(TOKEN, text.encode()):
        raise ValueError()
    return text


# ---- Start page ----------------------------------------------------------------------------------------------------

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>aiproxy</title>
<style nonce="{{NONCE}}">
  :root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --page: #f4f6f8; --card: #fff; --line: #d5dbe1; --accent: #0b5fc4; --bad: #b3261e }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9da7b1; --page: #101317; --card: #191d23; --line: #343c46; --accent: #75b5ff; --bad: #ff9c94 } }
  * { box-sizing: border-box; margin: 0 } body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; padding: clamp(16px, 4vw, 40px) }
  main { max-width: 1160px; margin: auto; display: grid; gap: 20px; grid-template-columns: minmax(0, 1fr) }
  @media (min-width: 900px) { main { grid-template-columns: repeat(2, minmax(0, 1fr)); align-items: start } header { grid-column: 1 / -1 } }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px }
  h1 { font-size: 26px } h2 { font-size: 18px } h3, label { font-size: 14px } small, dt { color: var(--dim); font-size: 14px; font-weight: 400 }
  dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 6px 16px; align-items: baseline; margin-top: 12px }
  label, h3, .bar { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: 8px; margin-top: 14px } .bar { justify-content: start }
  input, textarea, pre { font: inherit; width: 100%; background: var(--page); color: inherit; border: 1px solid var(--line); border-radius: 6px; padding: 9px 11px; margin-top: 5px }
  pre, code { font: 12.5px/1.6 ui-monospace, Menlo, Consolas, monospace } pre { overflow: auto } textarea { resize: vertical }
  button { font: 14px/1.5 system-ui, sans-serif; padding: 3px 11px; border: 1px solid var(--line); border-radius: 6px; background: var(--card); color: inherit }
  dd { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; max-height: 112px; overflow: auto; overflow-wrap: anywhere }
  .bar button { font-size: 16px; padding: 7px 18px } #send { background: var(--accent); color: var(--card); font-weight: 600 } button:disabled { opacity: .4 }
  [hidden], p:empty { display: none } #thought { color: var(--dim); font-size: 14px }
  .bar ~ p { margin-top: 14px; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 60vh; overflow: auto } #error { color: var(--bad); border-left: 3px solid; padding-left: 12px }
</style>
<main><header>
    <h1>aiproxy <small id="version"></small></h1>
    <p id="what">Asking this address what it is ...</p>
    <dl><dt>Base URL</dt><dd><code id="base"></code><button data-of="base">Copy</button></dd>
      <dt>Key</dt><dd id="rule"></dd>
      <dt>Models</dt><dd id="models"></dd></dl>
  </header><section><h2>Try it</h2>
    <div id="keys" hidden><label for="key">Your key</label><input id="key" type="password" autocomplete="off"><small>Stays in this page: sent to this address only, kept nowhere.</small></div>
    <label for="model">Model</label><input id="model" autocomplete="off" autocapitalize="off" spellcheck="false">
    <label for="prompt">Prompt</label><textarea id="prompt" rows="3">Say hello in one short sentence.</textarea>
    <div class="bar"><button id="send">Send</button><button id="stop" disabled>Stop</button><small id="figures" role="status"></small></div>
    <p id="error" role="alert"></p><p id="thought"></p><p id="answer"></p>
  </section><section><h2>Use it</h2>
    <h3>curl <button data-of="curl">Copy</button></h3><pre id="curl" tabindex="0"></pre>
    <h3>Python <button data-of="python">Copy</button></h3><pre id="python" tabindex="0"></pre>
    <h3>JavaScript, in a browser <button data-of="script">Copy</button></h3><pre id="script" tabindex="0"></pre>
</section></main>
<script type="module" nonce="{{NONCE}}">
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map(element => [element.id, element]))   // text goes in as textContent, never as HTML
const about = await (await fetch("/", { headers: { Accept: "application/json" } })).json()
const path = about.default_path ?? "/v1/chat/completions", claude = path === "/v1/messages", url = location.origin + path
page.version.textContent = about.version
page.what.textContent = (claude ? "Anthropic's Messages API" : "An OpenAI-style API") + ", relayed to an AI provider. Answers stream in as the provider sends them."
page.base.textContent = location.origin + (claude ? "" : about.api)
page.rule.textContent = (page.keys.hidden = !about.client_key_needed) ? "none needed" : "needed with every request"
let running, listed
const key = () => page.key.value.trim()
const fields = key => ({ "Content-Type": "application/json", ...(key && (claude ? { "x-api-key": key } : { Authorization: "Bearer " + key })), ...(claude && { "anthropic-version": "2023-06-01" }) })
const question = content => ({ model: page.model.value.trim() || undefined, stream: true, ...(claude && { max_tokens: 1024 }), messages: [{ role: "user", content }] })
async function checked(reply) {     // an error is shown as it came: status, code and message, or else the whole body
  if (reply.ok) return reply
  let body = await reply.text(), error
  try { error = JSON.parse(body).error } catch { /* not JSON */ }
  throw new Error(`HTTP ${reply.status} ${error?.code ?? error?.type ?? reply.statusText}\n${error?.message ?? body}`)
}
async function showModels() {       // from /health, or else from the provider's own list
  page.models.textContent = "shown once your key is typed in"
  try {
    const get = async url => (await checked(await fetch(url, { headers: fields(key()) }))).json(), ours = (await get("/health")).models ?? []
    const names = ours.length || about.client_key_needed && !key() ? ours : (await get("/v1/models")).data.map(model => model.id)
    if (names.length) page.models.replaceChildren(...names.map(name => Object.assign(document.createElement("button"), { textContent: name, onclick() { page.model.value = name; showSnippets() } })))
    page.model.value ||= names[0] ?? ""
  } catch (error) { page.models.textContent = error.message }
  showSnippets()
}
async function* events(reply) {     // the JSON of each `data:` line as it arrives; an answer that is no stream is one event
  if (!/event-stream/.test(reply.headers.get("Content-Type"))) return yield await reply.json()
  const reader = reply.body.getReader(), text = new TextDecoder()      // a TextDecoderStream would lose what came just before a cut
  for (let rest = "", piece = {}; !piece.done;) {
    piece = await reader.read()
    const lines = (rest + (piece.done ? "\n" : text.decode(piece.value, { stream: true }))).split(/\r?\n/)
    rest = lines.pop()
    for (const line of lines) if (/^data: *{/.test(line)) yield JSON.parse(line.slice(5))
  }
}
page.send.onclick = async () => {
  let begin = performance.now(), first, from, seconds = 0, texts = 0, tokens = 0
  running = new AbortController(), page.send.disabled = true, page.stop.disabled = false
  page.error.textContent = page.thought.textContent = page.answer.textContent = "", page.figures.textContent = "waiting ..."
  try {
    await listed
    const options = { method: "POST", headers: fields(key()), body: JSON.stringify(question(page.prompt.value)), signal: running.signal }
    for await (const event of events(await checked(await fetch(path, options)))) {
      if (event.error) throw new Error(`${event.error.code ?? event.error.type}\n${event.error.message}`)
      const now = performance.now(), part = event.delta ?? event.content?.[0] ?? event.choices?.[0]?.delta ?? event.choices?.[0]?.message ?? {}
      const text = part.content ?? part.text ?? "", thought = part.reasoning_content ?? part.reasoning ?? part.thinking ?? ""
      page.answer.append(text), page.thought.append(thought)
      if (text || thought) seconds = (now - (from ??= now)) / 1000, texts++
      tokens = event.usage?.completion_tokens ?? event.usage?.output_tokens ?? tokens
      page.figures.textContent = `first event after ${Math.round((first ??= now) - begin)} ms`
        + (seconds > 0.1 ? `, ${((Math.max(tokens, texts) - 1) / seconds).toFixed(1)} tokens/s` + (tokens ? "" : ", counting events") : "")
    }
  } catch (error) {
    if (!first) page.figures.textContent = ""
    error.name === "AbortError" ? page.figures.append(" (stopped)") : page.error.textContent = error.message
  }
  page.send.disabled = false, page.stop.disabled = true
}
function showSnippets() {           // the same call three times, for this very address
  const model = page.model.value.trim() || "MODEL", headers = fields(about.client_key_needed && "YOUR_KEY")
  const body = JSON.stringify({ ...question("Hello!"), model }).replace('"messages"', '\n    "messages"')
  const [sdk, create, text] = claude ? ["Anthropic", "messages.create(max_tokens=1024,", 'event.delta.text if event.type == "content_block_delta" else ""']
    : ["OpenAI", "chat.completions.create(", 'event.choices[0].delta.content or ""']
  page.curl.textContent = [`curl -N ${url}`, ...Object.keys(headers).map(name => `-H '${name}: ${headers[name]}'`), `-d '${body.replaceAll("'", "'\\''")}'`].join(" \\\n  ")
  page.python.textContent = `from ${sdk.toLowerCase()} import ${sdk}
client = ${sdk}(base_url="${page.base.textContent}",
    api_key="${about.client_key_needed ? "YOUR_KEY" : "none"}")
stream = client.${create}
    model=${JSON.stringify(model)}, stream=True,
    messages=[{"role": "user", "content": "Hello!"}])
for event in stream:
    print(${text}, end="", flush=True)`
  page.script.textContent = `const answer = await fetch("${url}", {
  method: "POST",
  headers: ${JSON.stringify(headers, null, 4).replace("\n}", " }")},
  body: JSON.stringify(${body})
})
const reader = answer.body.getReader(), text = new TextDecoder()
for (let piece; !(piece = await reader.read()).done;)
  console.log(text.decode(piece.value, { stream: true }))`
}
for (const button of document.querySelectorAll("[data-of]")) button.onclick = () => {
  getSelection().selectAllChildren(page[button.dataset.of])
  document.execCommand("copy")      // also works over plain http, where navigator.clipboard does not exist
  button.textContent = "Copied"
}
page.stop.onclick = () => running.abort(), page.model.oninput = showSnippets
page.prompt.onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) page.send.click() }
;(page.key.onchange = () => { listed = showModels() })()
</script>
"""
PAGE_RULES = "default-src 'none'; style-src 'nonce-%s'; script-src 'nonce-%s'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def start_page():
    """The page and its header fields. Nothing in it runs or is fetched but what stands in it: the nonce is new each time."""
    nonce = os.urandom(16).hex()
    fields = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", PAGE_RULES % (nonce, nonce)), ("Vary", "Accept"),
              ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    return PAGE.replace("{{NONCE}}", nonce).encode(), [(name.encode(), value.encode()) for name, value in fields]


# ---- Demo provider -------------------------------------------------------------------------------------------------

DEMO_WORDS = "This answer comes from the small provider inside aiproxy: each word is an event, relayed as it arrives.".split(" ")


class DemoProvider(http.server.BaseHTTPRequestHandler):
    """A small OpenAI-like provider: chat, completions, embeddings, models. It refuses any key but the hidden one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.admitted():
            self.reply({"object": "list", "data": [{"id": "demo", "object": "model", "created": 0, "owned_by": "aiproxy"}]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            model, stream = request["model"], request.get("stream")
        except (ValueError, KeyError, TypeError, AttributeError):
            return self.reply({"error": {"message": "A JSON object with a model is needed.", "type": "invalid_request_error", "param": "model", "code": None}}, 400)
        if not self.admitted():
            return None
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(DEMO_WORDS), "total_tokens": len(body) // 4 + len(DEMO_WORDS)}
        if self.path == "/v1/embeddings":
            texts = request.get("input")
            vectors = [{"object": "embedding", "index": i, "embedding": [0.6, 0.8]} for i in range(len(texts) if isinstance(texts, list) else 1)]
            return self.reply({"object": "list", "model": model, "data": vectors, "usage": {"prompt_tokens": 1, "total_tokens": 1}})
        chat = self.path == "/v1/chat/completions"
        answer = {"id": "demo-1", "object": "chat.completion" if chat else "text_completion", "created": int(time.time()), "model": model}
        if not stream:
            text = " ".join(DEMO_WORDS)
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            return self.reply(dict(answer, choices=[dict(choice, index=0, finish_reason="stop")], usage=usage))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        answer["object"] += ".chunk" if chat else ""
        words = [word + " " for word in DEMO_WORDS[:-1]] + DEMO_WORDS[-1:]
        for place, word in enumerate(words):
            delta = {"delta": {"content": word, **({"role": "assistant"} if not place else {})}} if chat else {"text": word}
            self.event(dict(answer, choices=[dict(delta, index=0, finish_reason=None)]))
            time.sleep(0.06)                # a visible pace
        self.event(dict(answer, choices=[dict({"delta": {}} if chat else {"text": ""}, index=0, finish_reason="stop")]))
        if (request.get("stream_options") or {}).get("include_usage"):
            self.event(dict(answer, choices=[], usage=usage))
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return None

    def admitted(self):
        if hmac.compare_digest(self.headers.get("Authorization", "").encode("latin-1"), b"Bearer " + self.server.key.encode()):
            return True
        self.reply({"error": {"message": "Incorrect API key.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}}, 401)
        return False

    def event(self, data):
        event = b"data: " + json.dumps(data).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))

    def reply(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


class DemoServer(http.server.ThreadingHTTPServer):
    """The demo provider on a loopback port of its own, with a hidden key made for this run."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), DemoProvider)
        self.key = "demo-" + os.urandom(16).hex()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A relay that goes away in mid-answer is nothing to report."""


def show_demo(server):
    """Send one chat request through the running relay and print its answer as it comes."""
    key = "".join("Authorization: Bearer %s\r\n" % key.decode() for _, key in server.settings.client_keys[:1])
    model = (server.settings.models_shown or ["demo"])[0]
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    print("\nOne chat request through the relay, its answer as it comes:\n\n  ", end="", file=sys.stderr, flush=True)
    begin, first = time.monotonic(), None
    with socket.create_connection(server.reachable_address(), 10) as sock:
        sock.sendall(("POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                      % (key, len(body), body)).encode())
        for line in sock.makefile("r", encoding="utf-8"):
            if line.startswith("data: {"):
                first = first or time.monotonic() - begin
                choices = json.loads(line[6:])["choices"]
                print(choices[0]["delta"].get("content", "") if choices else "", end="", file=sys.stderr, flush=True)
    print("\n\nFirst event after %.0f ms. Now it serves; try:\n\n%s\n" % ((first or 0) * 1000, server.curl(model)), file=sys.stderr, flush=True)


# ---- Server --------------------------------------------------------------------------------------------------------


class Record:
    """What the log says of one request."""

    def __init__(self, address):
        self.client, self.method, self.path, self.model, self.id = address, "", "", "", "req_" + os.urandom(8).hex()
        self.status = self.upstream_status = self.first = self.prompt_tokens = self.completion_tokens = None
        self.bytes, self.outcome = 0, ""
        self.begin()

    def begin(self):
        self.began = time.monotonic()

    def first_byte(self):
        self.first = self.first or time.monotonic() - self.began

    def as_dict(self, scrub=str):
        return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "client": scrub(self.client), "method": scrub(self.method), "path": scrub(self.path)[:256],
                "model": scrub(self.model)[:100], "status": self.status, "upstream_status": self.upstream_status,
                "first_byte": self.first and round(self.first, 4), "total": round(time.monotonic() - self.began, 4), "bytes": self.bytes,
                "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "request_id": scrub(self.id), "outcome": self.outcome or "client_gone"}


class Log(threading.Thread):
    """One line per request on stdout, warnings on stderr, written by a thread of its own: a reader that stalls must not stall requests."""

    def __init__(self, form, secrets):
        super().__init__(daemon=True, name="log")
        self.form, self.secrets, self.lines, self.lost = form, [key.decode() for key in secrets], queue.Queue(10000), 0

    def write(self, record):
        if self.form != "off":
            record = record.as_dict(self.scrub)
            self.put(sys.stdout, json.dumps(record) if self.form == "json" else
                     ("{time} {client} {method} {path} {model} {status} upstream={upstream_status} first={first_byte}s total={total}s bytes={bytes} "
                      "tokens={prompt_tokens}+{completion_tokens} id={request_id} {outcome}").format(**{name: printable(value) for name, value in record.items()}))

    def warn(self, text):
        self.put(sys.stderr, "aiproxy: " + self.scrub(text))

    def put(self, stream, line):
        try:
            self.lines.put_nowait((stream, line + "\n"))
        except queue.Full:
            self.lost += 1

    def scrub(self, text):
        """Without our keys: a client may put one into a path or a model's name, encoded or not."""
        for secret in self.secrets:
            if secret not in text and secret in urllib.parse.unquote(text):
                text = urllib.parse.unquote(text)
            text = text.replace(secret, "***")
        return text

    def run(self):
        while True:
            stream, line = self.lines.get()
            if self.lost:
                line, self.lost = line + "(%d lines lost: nobody read them in time)\n" % self.lost, 0
            try:
                stream.write(line)
                if stream is sys.stderr:
                    stream.flush()
                if self.lines.empty():
                    sys.stdout.flush()
            except (OSError, ValueError):
                pass                        # nobody listens any more
            self.lines.task_done()


def printable(value):
    """A value as one word of a log line: nothing in it can end the line, start another field or move a terminal's cursor."""
    if value is None or value == "":
        return "-"
    text = str(value)
    return text if re.fullmatch(r"[\x21-\x7e]+", text) else json.dumps(text).replace(" ", "\\u0020")


def fault_place(error):
    """Where a fault of ours is, without the values in it: those may be secret."""
    places, step = [], error.__traceback__
    while step:
        places.append("%s:%d" % (step.tb_frame.f_code.co_name, step.tb_lineno))
        step = step.tb_next
    return "%s at %s" % (type(error).__name__, " > ".join(places))


class Server(http.server.ThreadingHTTPServer):
    """The listener and all state: the settings, the upstream connections, the relay loop, who is connected."""

    request_queue_size = 1024               # a burst of connects must not be lost; the kernel caps it
    allow_reuse_address = os.name == "posix"    # elsewhere it would let two servers share the port
    allow_reuse_port = False
    daemon_threads = True

    def __init__(self, settings):
        self.settings, self.started, self.closing = settings, int(time.time()), False
        self.date_made = 0, b""
        self.lock, self.idle, self.connections = threading.Lock(), {}, 0
        self.per_client, self.clients, self.spare_threads = collections.Counter(), queue.SimpleQueue(), 0
        self.all_done = threading.Condition(self.lock)
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        self.address_family = family
        self.log = Log(settings.log, settings.secrets())
        self.catalogue = Catalogue(settings)
        self.key_ring, self.buckets = KeyRing(len(settings.keys)), Buckets(*settings.rate) if settings.rate else None
        self.upstreams = KeepAliveHandler(settings)
        self.relay_loop = RelayLoop(self.upstreams.close_old, self.log.warn)
        self.opener, self.proxy = build_opener(settings, self.upstreams)
        self.cap = cap_connections(settings.max_connections)
        super().__init__(address[:2] if family == socket.AF_INET else address, Handler)
        self.log.start()
        self.relay_loop.start()

    def server_bind(self):
        """Without HTTPServer's look-up of our own name in the DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)             # wait for descriptors instead of spinning
            raise

    def process_request(self, request, client_address):
        """A thread for the new client; above the cap the longest idle one makes room, else 503."""
        address = network_of(client_address[0])
        with self.lock:
            room = self.connections < self.cap
            self.connections += 1
            self.per_client[address] += 1
            greedy = self.per_client[address] > self.settings.max_per_client and not LOOPBACK.fullmatch(address)
        if greedy or not room and not self.give_up_idle(1):
            self.refuse_busy(request)
            self.shutdown_request(request, address)
            return
        with self.lock:
            self.spare_threads -= 1
            spare = self.spare_threads >= 0
            self.spare_threads += not spare
        try:
            if spare:
                self.clients.put((request, client_address))
            else:
                threading.Thread(target=self.serve_clients, args=(request, client_address), daemon=True).start()
        except RuntimeError:                # the system has no thread left
            self.refuse_busy(request)
            self.shutdown_request(request, address)

    def serve_clients(self, request, client_address):
        """A thread's life: one client after the other, until none has come for SPARE_SECONDS. Starting threads costs more than keeping them."""
        while request is not None:
            try:
                self.finish_request(request, client_address)
            except Exception as error:      # a fault of ours outside of any request
                self.report_fault(error)
            finally:
                self.shutdown_request(request, network_of(client_address[0]))
            with self.lock:
                self.spare_threads += 1
            request, client_address = self.next_client()

    def next_client(self):
        while True:
            try:
                return self.clients.get(timeout=SPARE_SECONDS)
            except queue.Empty:
                with self.lock:
                    if self.spare_threads:  # else process_request counts on us already
                        self.spare_threads -= 1
                        return None, None

    def refuse_busy(self, request):
        """503 at once, from the accepting thread: one write that cannot block, then a linger if there are not too many already."""
        error = {"error": {"message": "Too many clients at once. Try again.", "type": "server_error", "param": None, "code": "server_busy"}}
        body = json.dumps(error).encode()
        cors = b"Access-Control-Allow-Origin: *\r\n" if self.settings.any_origin else b""
        try:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
                         b"x-request-id: req_%b\r\nConnection: close\r\n%b\r\n%b" % (len(body), os.urandom(8).hex().encode(), cors, body))
            if len(self.relay_loop.jobs) < 2 * self.cap:
                self.relay_loop.linger(socket.socket(fileno=request.detach()))
        except OSError:
            pass

    def shutdown_request(self, request, address=None):
        """The end of every connection that process_request let in; one that lingers has been detached."""
        request.close()
        with self.all_done:
            self.connections -= 1
            self.per_client[address] -= 1
            if self.per_client[address] <= 0:
                del self.per_client[address]
            self.all_done.notify_all()

    def handle_error(self, request, client_address):
        self.report_fault(sys.exc_info()[1])

    def report_fault(self, error):
        self.log.warn("fault: " + fault_place(error))

    def date(self):
        """The time as a Date field has it, made once a second."""
        now = int(time.time())
        if self.date_made[0] != now:
            self.date_made = now, email.utils.formatdate(now, usegmt=True).encode()
        return self.date_made[1]

    # -- who is connected

    def note_idle(self, handler):
        with self.lock:
            self.idle[handler] = time.monotonic()

    def note_busy(self, handler):
        """False if the connection was given up meanwhile."""
        with self.lock:
            return self.idle.pop(handler, None) is not None

    def give_up_idle(self, most, age=0):
        """Hang up on up to `most` idle clients, the longest idle first, none whose next request has just come; how many it was."""
        with self.lock:
            now = time.monotonic()
            old = [handler for handler, since in self.idle.items() if now - since >= age]
            silent = list(itertools.islice((handler for handler in old if not handler.client.wait_readable(0)), most))
            for handler in silent:
                del self.idle[handler]
                try:
                    handler.connection.shutdown(socket.SHUT_RDWR)   # which wakes its thread
                except OSError:
                    pass                    # it has just gone by itself
        return len(silent)

    def stop(self):
        """Stop accepting, let running requests end within the grace time, then cut them visibly."""
        self.closing = True
        deadline = time.monotonic() + self.settings.grace
        self.socket.setblocking(False)
        try:
            while True:                     # whoever has been let into the queue counts as accepted
                self.process_request(*self.socket.accept())
        except OSError:
            self.socket.close()
        while self.connections and time.monotonic() < deadline:
            self.give_up_idle(self.connections, age=0.5)
            with self.all_done:
                self.all_done.wait(0.1)
        self.relay_loop.stopping = True
        until = time.monotonic() + 1        # for what is cut to be seen cut, and for the last log lines
        while (self.connections or self.log.lines.unfinished_tasks) and time.monotonic() < until:
            time.sleep(0.01)

    # -- how to reach us

    def reachable_address(self):
        host, port = self.server_address[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port

    def url(self):
        host, port = self.reachable_address()
        return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)

    def curl(self, model):
        """A command to paste that asks this server for something."""
        anthropic = self.settings.default_path in ANTHROPIC_PATHS
        fields = ["Content-Type: application/json"] + ["anthropic-version: 2023-06-01"] * anthropic
        fields += ["x-api-key: YOUR_KEY" if anthropic else "Authorization: Bearer YOUR_KEY"] * self.settings.key_needed
        body = dict({"max_tokens": 256} if anthropic else {}, model=model, stream=True, messages=[{"role": "user", "content": "Hello!"}])
        return "curl -N %s%s %s \\\n  -d '%s'" % (self.url(), self.settings.default_path, " ".join("-H '%s'" % field for field in fields), json.dumps(body))


def build_opener(settings, keep_alive):
    """urllib's opener with our handlers and the environment's proxy, read once; no file:, ftp: or redirects. Also the proxy's host, for the banner."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(keep_alive)
    proxies = urllib.request.getproxies()
    host = settings.upstream.netloc.decode()
    proxy = proxies.get(settings.upstream.scheme)
    if not proxy or settings.upstream.loopback or urllib.request.proxy_bypass(host):
        return opener, None
    opener.add_handler(urllib.request.ProxyHandler({settings.upstream.scheme: proxy}))
    return opener, urllib.parse.urlsplit(proxy if "//" in proxy else "//" + proxy).netloc.rpartition("@")[2]


def cap_connections(wanted):
    """Raise the limit of open files as far as it goes; two are needed for each client. The number of clients that fit."""
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (ImportError, ValueError, OSError):
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - 64) // 2))


def banner(server):
    """What is in force, for the operator, keys masked."""
    settings, upstream = server.settings, server.settings.upstream
    mode = "key hidden (%s)" % masked(settings.keys) if settings.hidden else "transparent: callers bring their own key" if settings.wants_key else "no key needed"
    lines = ["aiproxy %s on %s" % (__version__, server.url()),
             "  upstream     %s, %s%s" % (upstream.shown, mode, ", through the proxy %s" % server.proxy if server.proxy else ""),
             "  client keys  %s" % (", ".join(name for name, _ in settings.client_keys) or "none"),
             "  models       %s" % (", ".join(settings.models_shown) or "all"),
             "  paths        %s" % (", ".join("%s %s" % rule for rule in settings.paths) if settings.paths is not None else "all"),
             "  origins      %s" % ("any" if settings.any_origin else ", ".join(settings.origins) or "none: browsers are refused"),
             "  limits       %d clients, %d bytes a body, %gs to connect, %gs of silence" % (server.cap, settings.max_body, settings.connect_timeout, settings.timeout)]
    if server.cap < settings.max_connections:
        lines.append("  warning: the limit of open files leaves room for %d clients, not %d (ulimit -n)" % (server.cap, settings.max_connections))
    if settings.hidden and settings.open and not settings.client_keys:
        lines.append("  warning: AIPROXY_OPEN is set: anyone who can reach this address spends your key")
    if settings.guarded_by_loopback and settings.any_origin:
        lines.append("  warning: AIPROXY_ORIGINS=*: any web page that you open can spend your key")
    if LOOPBACK.fullmatch(settings.host) and (os.environ.get("PORT") or os.environ.get("FC_SERVER_PORT")):
        lines.append("  warning: on this platform AIPROXY_HOST=0.0.0.0 is needed to be reached")
    return "\n".join(lines)


def masked(keys):
    return ", ".join("%d characters" % len(key) for key in keys) or "none"


def check_report(settings):
    """The effective settings for --check, keys masked."""
    lines = []
    for name, default, _ in KNOBS:
        value = os.environ.get(name, "").strip() or default
        if name in ("AIPROXY_KEY", "CLOUDFLARE_API_TOKEN"):
            value = masked(settings.keys if settings.workers == name.startswith("CLOUDFLARE") else [])
        elif name == "AIPROXY_CLIENT_KEYS":
            value = ", ".join("%s=***" % client for client, _ in settings.client_keys) or "none"
        elif name == "AIPROXY_PORT":
            value = settings.port
        lines.append("%s=%s" % (name, value))
    return "\n".join(lines)


def read_env_file(path):
    """KEY=value lines of a file; the real environment wins."""
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", line.strip())
                if match:
                    value = match.group(2)
                    os.environ.setdefault(match.group(1), value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("--env-file %s: %s" % (path, getattr(error, "strerror", None) or "not text in UTF-8"))


USAGE = """usage: aiproxy.py [--demo] [--check] [--env-file FILE] [--host HOST] [--port PORT] [--upstream NAME_OR_URL] [--version] [--help]

Relays an AI provider's API and hides its key. Settings come from the environment; keys never from the command line, where `ps` shows them.
--demo runs against a small provider inside. --check prints the settings in force and exits."""


def read_arguments(arguments):
    """The switches among the arguments; those with a value are set in the environment. SettingError for what is not understood."""
    switches, values = set(), {"--host": "AIPROXY_HOST", "--port": "AIPROXY_PORT", "--upstream": "AIPROXY_UPSTREAM", "--env-file": None}
    arguments = [part for argument in arguments for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    while arguments:
        option = arguments.pop(0)
        if option in ("--demo", "--check", "--version", "--help", "-h"):
            switches.add(option)
        elif option in values and arguments:
            value = arguments.pop(0)
            read_env_file(value) if option == "--env-file" else os.environ.__setitem__(values[option], value)
        else:
            raise SettingError("%s is not understood or lacks its value. %s" % (option.partition("=")[0][:40], USAGE.partition("\n")[0]))
    return switches


def main():
    """Run as a program. Exit status: 0 after a signal, 1 when it cannot run, 2 for a wrong setting or option."""
    try:
        switches = read_arguments(sys.argv[1:])
        if switches & {"--help", "-h"}:
            print(USAGE + "\n")
            for name, default, meaning in KNOBS:
                print("%-24s %s%s" % (name, meaning, " (default %s)" % default if default else ""))
            return 0
        if "--version" in switches:
            print("aiproxy " + __version__)
            return 0
        if "--demo" in switches:
            demo = DemoServer()
            os.environ.update(AIPROXY_UPSTREAM="http://127.0.0.1:%d" % demo.server_address[1], AIPROXY_KEY=demo.key)
        settings = Settings(os.environ)
    except SettingError as error:
        print("aiproxy: %s" % error, file=sys.stderr)
        return 2
    if "--check" in switches:
        print(check_report(settings))
        return 0
    threading.stack_size(1 << 20)           # musl's 128 KiB is too little for JSON; more is never used
    try:
        server = Server(settings)
    except OSError as error:
        print("aiproxy: cannot listen on %s port %d: %s" % (settings.host, settings.port, error.strerror or error), file=sys.stderr)
        return 1

    def on_signal(number, frame):
        if server.closing:
            os._exit(0)                     # the second one: at once
        server.closing = True
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    print(banner(server), file=sys.stderr, flush=True)
    if "--demo" in switches:
        threading.Thread(target=show_demo, args=(server,), daemon=True).start()
    else:
        print("  try          " + server.curl((settings.models_shown or ["MODEL"])[0]), file=sys.stderr, flush=True)
    server.serve_forever(0.1)
    server.stop()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)                        # not waiting for threads whose streams have been cut
