#!/usr/bin/env python3
"""aiproxy: one file between people's programs and an AI provider. It hides the key and relays answers as they arrive.

    client ---- request ---->  Handler: read the head strictly, walk the ladder of refusals  ---- request ---->  upstream
    client <--- its head ----  Handler: wait for the answer while watching the client        <--- head --------  upstream
    client <--- its body ----  RelayLoop: one thread moves the bodies of all answers         <--- events ------  upstream

Words used below. Client: whoever calls us. Upstream: the provider we call. Client key: a key we gave out. Provider key: the
key we hide. Origin: only the CORS kind. Relay: to copy an answer through unchanged. Event: one block of a text/event-stream.
Chunk: a piece of HTTP's chunked coding. To refuse: to answer with an error of our own.

Start reading at Handler.handle_one_request and scroll down: the file is in the order in which a request travels. A client key is
checked in Handler.check_client_key, a header field dropped in upstream_fields or downstream_fields, an event flushed in Stream.send_down.
RFC 9110 is HTTP's meaning, RFC 9112 its bytes on the wire.
"""
import base64
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import hmac
import http.client
import http.server
import itertools
import json
import math
import os
import queue
import random
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
MAX_VALUES = 1000000        # in a JSON text of more than four times as many characters: parsed, each value takes some 70 bytes
LONG_STRING = 16384         # characters; the rest of a string that may be this long is passed over where nobody asks for it
MAX_INTERIM = 20            # 1xx answers before the real one
CATALOGUE_SECONDS, CATALOGUE_RETRY = 600, 30    # a model list that was read, or could not be, is asked for again after
MAX_ANSWER = 64 << 20       # of an answer that has to be translated as a whole
POOL_SIZE, POOL_SECONDS = 100, 30   # idle upstream connections; below the 60 s after which providers close theirs
LINGER_SECONDS, LINGER_BYTES = 2, 4 << 20   # how long a refused client may go on sending, so that it can read why
HOLD_BYTES, HOLD_SECONDS = 65536, 0.5   # a body this small is read whole before the upstream hears of it
USAGE_BYTES = 4096          # of an answer, kept from where its last `usage` begins
PEEK_BYTES = 65536          # of an error answer, searched for the provider key before it may pass
TLS_RECORD = 16384          # the most that TLS sends as one piece, readable only when whole (RFC 8446 section 5.1)
PIECE, FIRST_PIECE = 65536, 8192    # bytes moved at a time; asked for at first, since memory for 64 KB that holds 200 bytes leaves holes
SPARE_SECONDS = 5           # a thread without a client is kept this long
LOG_SECONDS, MAX_LOG_LINES = 0.05, 10000    # between two writes, for many lines are one write; lines that wait to be read
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
LOOKED_AT = frozenset(("model", "n", "best_of") + TOKEN_LIMITS)
INFERENCE_PATHS = OPENAI_PATHS + ANTHROPIC_PATHS

OTHER_KEY_FIELDS = frozenset((b"x-api-key", b"api-key", b"x-goog-api-key"))
KEY_FIELDS = OTHER_KEY_FIELDS | {b"authorization"}      # where a client may carry its key

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
NEVER_DOWN_WITH_HIDDEN_KEY = NEVER_DOWN | frozenset((b"server", b"openai-organization", b"openai-project"))
EXPOSED = b"x-request-id, request-id, retry-after, retry-after-ms, x-should-retry"      # a browser's script may read these
ONCE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"authorization", b"origin")   # two of these: two readings
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                                        # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x3e\x40-\x7e]+)(\?[\x21-\x7e]*)? HTTP/([0-9])\.([0-9])")     # RFC 9112 section 3
STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")  # section 4
FIELD = rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)"                        # section 5; no folding, no bare CR or LF
FIELD_LINE, FIELD_LINES = re.compile(FIELD), re.compile(rb"\r\n" + FIELD + rb"(?=\r\n|\Z)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")     # section 7.1
CHUNK_LINE_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?)?\r?")
USAGE_OBJECT = re.compile(rb'"usage"[ \t\r\n]*:[ \t\r\n]*\{')
ABSOLUTE_FORM = re.compile(r"https?://([^/#]*)(.*)", re.I)                       # section 3.2.2
READABLE_CODING = re.compile(rb"(?:x-)?gzip|deflate|identity")
BARE_LF = re.compile(rb"(?<!\r)\n")
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")   # RFC 9110 section 7.2
LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[?::1\]?", re.I)
# A segment `.` or `..`, however it is encoded: RFC 3986 section 5.2.4 would make another path of it.
DOT_SEGMENT = re.compile(r"(?:^|[/\\]|%(?:25)*(?:2f|5c))(?:\.|%(?:25)*2e){1,2}(?:[/\\;]|%(?:25)*(?:2f|5c|3b)|$)", re.I)
BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00|\\|#")
SEGMENT = re.compile(r"[A-Za-z0-9@:._~+,=()!$&'*/ -]+")     # what a `*` in AIPROXY_PATHS may stand for, decoded
JSON_MARK = re.compile(rb'[\[{\]}]|"[^"\\]*(?:\\.[^"\\]*)*"?', re.S)         # brackets, and strings to pass over
NAME_END = re.compile(r'"[ \t\n\r]*:')                                            # of a member's name, where a value's end has no colon
MARK = re.compile(r"[ \t\n\r]*[{:,]?[ \t\n\r]*")                                   # between names and values: RFC 8259 section 2

# ---- One request, top to bottom ------------------------------------------------------------------------------------


class Refusal(Exception):
    """An error answer of our own: the one kind of failure that a client gets to read. `fields` are extra header fields."""

    def __init__(self, status, code, message, param=None, model="", **fields):
        super().__init__(code)
        self.status, self.code, self.message, self.param, self.model = status, code, message, param, model      # model: the refused one, for the log
        self.fields = [(name.replace("_", "-").encode(), str(value).encode()) for name, value in fields.items()]


class ClientGone(Exception):
    """The client hung up, or takes nothing: there is nobody left to answer. args[0] is the word for the log."""


class UpstreamFailed(Refusal):
    """The upstream broke off or broke the rules."""

    def __init__(self, code, message):
        fields = {"x_should_retry": "false"} if code == "upstream_tls_error" else {}
        super().__init__(504 if code == "upstream_timeout" else 502, code, message, **fields)


@functools.lru_cache(1)                     # made once a second
def http_date(now):
    """A time as a Date field has it."""
    return email.utils.formatdate(now, usegmt=True).encode()


def error_object(refusal):
    """OpenAI's error form, in a body or as an event."""
    kind = "rate_limit_error" if refusal.status == 429 else "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection, one request after the other. http.server's parser is replaced by read_head, which is strict."""

    def setup(self):
        self.connection = self.request
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client, self.network = Wire(self.connection), network_of(self.client_address[0])
        self.settings = self.server.settings
        self.first_request, self.reset_on_close, self.http10 = True, False, False

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
        self.head_sent = self.is_json = False
        self.record = Record(self.client_address[0])
        self.address = self.network

    def wait_for_request(self):
        """The head of the next request. A silent kept-alive client is let go after IDLE_SECONDS, or when room is needed."""
        client, first = self.client, self.first_request
        self.first_request = False
        self.deadline = self.record.began + HEAD_SECONDS
        if not client.buffer:
            self.server.note_idle(self)
            arrived = client.wait_readable(HEAD_SECONDS if first else IDLE_SECONDS)
            if not self.server.note_busy(self) or not arrived and not first:
                raise ClientGone("idle")
            if arrived and not client.fill():
                raise ClientGone("client_gone")
        self.record.began = time.monotonic()
        if not first:
            self.deadline = self.record.began + HEAD_SECONDS
        client.skip_empty_lines(self.more)
        return client.read_head(REQUEST_LINE, self.more)

    def more(self):
        """Wait for more bytes of a head."""
        if not self.client.wait_readable(self.deadline - time.monotonic()):
            raise Refusal(408, "request_timeout", "The head of the request did not arrive within %d seconds." % HEAD_SECONDS)
        if not self.client.fill():
            raise ClientGone("client_gone")

    def walk_ladder(self):
        """Every step answers, refuses or lets the request go on; the statuses are in the order in which they can happen."""
        self.check_head()                                   # 400 405 501 505
        preflight = self.method == "OPTIONS" and self.head.get(b"origin") is not None and self.head.get(b"access-control-request-method") is not None
        if preflight or self.path == "*":
            return self.answer(204, preflight_fields(self.head, self.settings) if preflight else [])
        if self.path in ("/", "/health", "/healthz") and self.method in ("GET", "HEAD"):
            return self.answer_about_us()
        self.check_host_and_origin()                        # 403
        self.check_client_key()                             # 400 401
        if self.settings.hidden:
            self.path = openai_form(self.path)
        model_list = self.method in ("GET", "HEAD") and (self.path + "/").startswith("/v1/models/")
        if model_list and (self.settings.models or self.settings.workers):
            return self.answer_models()                     # 404 502
        self.check_path()                                   # 404 405
        if self.method == "OPTIONS" and self.settings.hidden:
            return self.answer(204, [(b"Allow", ", ".join(allowed_methods(self.path, self.settings.paths)).encode())])
        if self.websocket:
            self.query, self.record.model = resolve_query_model(self.query, self.settings)     # 400 403
        self.check_rate()                                   # 429
        self.is_json = self.must_look_into_body()
        prefix, call = self.read_body(), None               # 408 413 415
        if self.is_json:
            prefix, self.record.model, call = apply_body_rules(prefix, self.path, self.settings)       # 400 403
        if call:
            return self.relay_translated(call)              # 502 504, and Cloudflare's own
        return self.relay(self.open_upstream(prefix))       # 502 504

    # -- the head: is it well formed, and do we speak its version and method?

    def check_head(self):
        method, target, query, major, minor = self.head.start
        self.method = self.record.method = method.decode()
        self.path = self.record.path = target.decode()
        self.query = query.decode() if query else ""
        self.http10 = minor == b"0"
        if major != b"1":
            raise Refusal(505, "version_not_supported", "This proxy speaks HTTP/1.1.")
        if self.head.repeats:
            for name in ONCE:
                if len(self.head.all(name)) > 1:
                    raise BadHead(400, "The field %s stands there twice." % name.decode())
        chunked = is_chunked(self.head, self.http10)      # RFC 9112 section 6.3: without a length there is no body
        self.body = RequestBody(self.client, ChunkedBody() if chunked else PlainBody(content_length(self.head) or 0))
        forwarded = self.head.elements(b"x-forwarded-for")
        if forwarded and LOOPBACK.fullmatch(self.address):      # a proxy of our own in front, which knows
            self.record.client = forwarded[-1].decode("latin-1")
            self.address = network_of(self.record.client)
        host = self.head.get(b"host")
        if not (self.http10 if host is None else is_host(host)):
            raise BadHead(400, "The request needs one valid Host field.")
        if self.method not in METHODS:
            known = self.method in ("TRACE", "CONNECT")     # TRACE would echo keys, CONNECT would make an open proxy of us
            raise Refusal(405 if known else 501, "method_not_allowed", "The method %s is not served here." % self.method[:20],
                          **({"Allow": ", ".join(METHODS)} if known else {}))
        if self.path == "*" and self.method == "OPTIONS" and not self.query:
            return
        absolute = self.path[:1] != "/" and ABSOLUTE_FORM.fullmatch(self.path)
        if absolute:
            if host is None or absolute.group(1).encode().lower() != host.lower():
                raise BadHead(400, "The authority in the request target is not the Host field.")
            self.path = self.record.path = absolute.group(2) or "/"
        if not is_plain_path(self.path) or "#" in self.query:
            raise BadHead(400, "The request target is not a plain path: no //, no dot segments, no fragment.")
        self.websocket = self.method == "GET" and not self.http10 and self.body.done and is_websocket(self.head)
        expect = self.head.get(b"expect", b"").lower()
        if expect and not self.http10 and expect != b"100-continue":
            raise Refusal(417, "expectation_failed", "The only expectation understood is 100-continue.")

    def answer_about_us(self):
        """/health and /: no key, no upstream call. Models are shown to those who may list them."""
        settings = self.settings
        if self.path == "/" and b"text/html" in self.head.get(b"accept", b""):
            return self.answer(200, *start_page())
        if self.path == "/":
            return self.answer_json(200, {"name": "aiproxy", "version": __version__, "api": "/v1", "health": "/health", "default_path": settings.default_path,
                                          "client_key_needed": settings.key_needed})
        about = {"status": "healthy", "timestamp": int(time.time())}
        with contextlib.suppress(Refusal):
            self.check_host_and_origin()
            self.check_client_key()
            about["models"] = settings.models_shown
        return self.answer_json(200, about)

    # -- who is asking, and from where

    def check_host_and_origin(self):
        """403 where a name that is not ours could reach a key that nothing else guards: DNS rebinding, a forgotten public front.

        And 403 for a browser on a page that is not listed."""
        if self.settings.guarded_by_loopback and not names_loopback(self.head.get(b"host", b"")):
            raise Refusal(403, "host_not_allowed",
                          "This proxy hides a key and asks for no client key, so it answers to loopback names only. To serve others, "
                          "set AIPROXY_CLIENT_KEYS, or AIPROXY_OPEN=1 to serve anyone.")
        if not origin_allowed(self.head, self.settings):
            raise Refusal(403, "origin_not_allowed", "Pages from this origin may not call this proxy. Add it to AIPROXY_ORIGINS to let them.")

    def check_client_key(self):
        """401 unless the request carries a key that we gave out. Its name, never itself, goes to the log."""
        settings = self.settings
        if settings.hidden and self.query and any(name == "key" for name, _ in urllib.parse.parse_qsl(self.query[1:], keep_blank_values=True)):
            raise Refusal(400, "key_in_query", "Keys do not belong in URLs, where logs keep them. Send it as Authorization: Bearer.")
        if not settings.client_keys:
            return
        carried = carried_keys(self.head)
        if len(carried) > 1:
            raise BadHead(400, "The request carries two different keys.")
        key, client = carried.pop() if carried else b"", ""
        for name, known in settings.client_keys:        # as bytes and against all, so that neither letters nor places show in the time
            if hmac.compare_digest(key, known):
                client = client or name
        if not client:
            raise Refusal(401, "invalid_api_key", "Incorrect client key." if self.head.get(b"authorization") else
                          "A client key is needed: send it as Authorization: Bearer.", WWW_Authenticate="Bearer")
        self.record.client = self.address = client

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

    def answer_models(self):
        """The allow-list in OpenAI's form, or one entry of it. SDKs send the slashes of an id as %2F."""
        wanted = urllib.parse.unquote(self.path[len("/v1/models/"):])
        items = [{"id": name, "object": "model", "created": self.server.started, "owned_by": "aiproxy"} for name in self.settings.models_shown]
        if self.settings.workers:
            items = self.server.catalogue.items(self.read_catalogue, items if self.settings.models else None)
        found = [item for item in items if item["id"] == wanted]
        if found or not wanted:
            return self.answer_json(200, found[0] if wanted else {"object": "list", "data": items})
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

    def must_look_into_body(self):
        """With a hidden key into that of every POST, in a transparent relay into those on the inference paths, if a setting asks for it."""
        return self.settings.body_rules and self.method == "POST" and (self.settings.hidden or self.path in INFERENCE_PATHS)

    def read_body(self):
        """What must be held of the body: all of it for the model rules or if it is small, else its beginning (self.body.done tells)."""
        hold, body = self.is_json, self.body
        if hold and self.head.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "unsupported_encoding", "The body must not be compressed here: its model has to be read.", Accept_Encoding="identity")
        body.limit = self.settings.max_body if hold or self.settings.hidden else None
        body.check_limit()
        if self.head.get(b"expect") and not self.http10 and not body.done and not self.client.buffer:
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        first = b"" if body.done else body.read_some()
        if body.done:                           # most are here with their head
            return first
        pieces, held, until = [first], len(first), time.monotonic() + HOLD_SECONDS
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
        target = settings.upstream.base + target if target else settings.upstream.map_path(self.path) + self.query
        fields = upstream_fields(self.head, settings, self.is_json, self.websocket)
        keys = self.server.key_ring.order(time.monotonic()) if settings.keys else [None]
        keys = keys if self.body.done else keys[:1]     # a body that is streamed cannot be sent twice
        for place in keys:
            request = settings.upstream.request(target, method or self.method, fields + ([] if place is None else [settings.key_fields[place]]), prefix, self)
            answer = self.server.open(request)
            self.record.upstream_status = answer.status
            answer.forget(settings.never_down)
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
        if answer.status != 401:
            try:
                answer.hold(PEEK_BYTES)
            except socket.timeout:
                pass                        # the relay waits on
            except OSError:                 # told only once: what is read next would look like a plain end
                answer.body.broken = answer.body.broken or "it was cut off"
            plain = inflate(answer.held, PEEK_BYTES * 8) if answer.coded else b""
            if not any(key in answer.held + plain for key in self.settings.keys):
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
            keep = not self.wants_close()
            chunked = answer.body is not None and answer.body.length is None and not self.http10
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
            self.start_answer(answer.status, answer.reason, fields, first)
            self.record.first_byte()
            if not stream.ending:
                self.server.relay_loop.carry_out(stream)
        finally:
            answer.close(reusable=stream is not None and stream.ending == "ok" and self.body.done)
            self.record.outcome = stream.ending if stream and stream.ending else "client_gone"
        self.record.bytes = stream.bytes
        if stream.usage:
            self.record.tokens = stream.usage.counts
        if stream.ending == "ok":
            self.close_connection = not keep
        else:
            self.reset_on_close = self.http10 and answer.length is None     # a plain end would look like the end

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
            self.record.tokens = usage.counts
            fields = self.downstream_fields(answer, translated=True) + [(b"Content-Type", b"text/event-stream" if translator else b"application/json")]
            return self.answer(200, fields, content)
        finally:
            answer.close(reusable=True)

    def read_whole(self, answer):
        """The body of an answer. Refusal 502 or 504 if it is cut off or too large, for then it cannot be read."""
        try:
            answer.hold(MAX_ANSWER)
            if len(answer.held) >= MAX_ANSWER:
                raise OSError("too large")
            return answer.held
        except socket.timeout:
            raise UpstreamFailed("upstream_timeout", "The upstream fell silent in the middle of its answer.")
        except OSError:
            raise UpstreamFailed("upstream_bad_response", "The upstream broke off in the middle of its answer.")

    def relay_events(self, answer, translator):
        """A stream: this thread reads it, for it has more to do than to move bytes."""
        chunked = not self.http10
        fields = self.downstream_fields(answer, translated=True) + [(b"Content-Type", b"text/event-stream; charset=utf-8")]
        self.start_answer(200, b"OK", fields + [(b"Transfer-Encoding", b"chunked") if chunked else (b"Connection", b"close")], b"")
        while not translator.done:
            try:
                piece = answer.read_piece()
                events = translator.feed(piece) if piece else translator.end()
            except OSError as error:
                code, what = ("upstream_timeout", "fell silent") if isinstance(error, socket.timeout) else ("upstream_died", "broke off")
                events = translator.end(UpstreamFailed(code, "The upstream %s in the middle of this answer." % what))
            if answer.body.done:
                answer.close(reusable=True)
            if events:
                self.record.first_byte()
                self.record.bytes += len(events)
                self.client.send(chunk(events, chunked))
        usage = translator.usage or {}
        self.record.tokens = lambda: (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        self.record.outcome = translator.failed or "ok"
        self.reset_on_close = bool(translator.failed) and not chunked
        if not translator.failed and chunked:
            self.client.send(b"0\r\n\r\n")
            self.close_connection = self.wants_close()
            answer.read_rest()

    def wants_close(self):
        """Must the connection end with this answer?"""
        return self.http10 or b"close" in self.head.connection or not self.body.done or self.server.closing

    def downstream_fields(self, answer, translated=False):
        """End-to-end fields as they came, and the few that we add."""
        fields = downstream_fields(answer.head, self.settings)
        if translated:                          # the body is another one
            fields = [field for field in fields if not field[0].lower().startswith(b"content-") and field[0].lower() not in (b"etag", b"last-modified")]
        if answer.head.get(b"date") is None:                        # RFC 9110 section 6.6.1
            fields.append((b"Date", http_date(int(time.time()))))
        theirs = answer.head.get(b"x-request-id") or answer.head.get(b"request-id")
        dropped, names = answer.head.connection, answer.head.by_name
        names = names.keys() - dropped if dropped else names
        if theirs:
            self.record.id = theirs.decode("latin-1")[:200]
        if b"x-request-id" not in names:
            fields.append((b"x-request-id", self.record.id.encode("latin-1")))
        if answer.events:
            if b"x-accel-buffering" not in names:
                fields.append((b"X-Accel-Buffering", b"no"))        # nginx in front would hold events back
            if b"cache-control" not in names:
                fields.append((b"Cache-Control", b"no-cache"))
        return fields + cors_fields(self.head, self.settings, names)

    def tunnel(self, answer):
        """A WebSocket: after the 101, bytes both ways until either side closes."""
        fields = downstream_fields(answer.head, self.settings)
        self.start_answer(101, answer.reason, fields + [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")] + cors_fields(self.head, self.settings), b"")
        self.record.first_byte()
        job = Tunnel(self.client, answer.wire, self.settings.timeout)
        try:
            self.server.relay_loop.carry_out(job)
        finally:
            answer.close()
        self.record.outcome, self.record.bytes = job.ending, job.bytes

    # -- the one writer of heads, of our own answers and of refusals

    def start_answer(self, status, reason, fields, body):
        """Head and first bytes in one write: two would wait for each other's acknowledgement."""
        self.record.status = status
        self.head_sent = True
        self.client.send(render_head(b"HTTP/1.1 %d %b" % (status, reason), fields) + body)

    def answer_json(self, status, body, fields=(), outcome="ok"):
        """An answer of our own."""
        self.answer(status, list(fields) + [(b"Content-Type", b"application/json")], json.dumps(body).encode(), outcome)

    def answer(self, status, fields=(), content=b"", outcome="ok"):
        """An answer that is here as a whole. The connection lives on if all is well and the request was read to its end."""
        keep, lines = outcome == "ok" and not self.wants_close(), list(fields)
        if not any(name == b"Date" for name, _ in lines):       # else they are the upstream's, and complete
            lines += [(b"Date", http_date(int(time.time()))), (b"x-request-id", self.record.id.encode())]
            lines += cors_fields(self.head, self.settings, {name.lower() for name, _ in lines})
        if status != 204:
            lines.append((b"Content-Length", b"%d" % len(content)))
        if not keep:
            lines.append((b"Connection", b"close"))
        self.record.first_byte()
        self.start_answer(status, http.client.responses.get(status, "").encode(), lines, content if self.method != "HEAD" else b"")
        self.record.outcome, self.record.bytes = outcome, len(content)
        self.close_connection = not keep

    def refuse(self, refusal):
        """Our own error in OpenAI's form; after it the connection closes, so nothing that follows is ever read as a request."""
        self.record.model = self.record.model or refusal.model
        if self.head_sent:
            return
        if self.settings.workers and refusal.code in OPERATOR_ERRORS:
            self.server.log.warn("%s: %s" % (refusal.code, refusal.message))
        try:
            self.answer_json(refusal.status, {"error": error_object(refusal)}, refusal.fields, self.record.outcome or refusal.code)
        except (OSError, ClientGone):
            self.record.outcome = "client_gone"

    def finish(self):
        """Close as the answer needs it: a reset for a cut HTTP/1.0 answer, a linger where bytes are still coming, else at once."""
        if self.reset_on_close:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self.head_sent and not self.client.ended and (self.client.buffer or self.body is None or not self.body.done or self.client.receive()):
            self.server.relay_loop.hand_over(Linger(self.connection))


# ---- Who is asking: client keys, origins, rates --------------------------------------------------------------------


def carried_keys(head):
    """The different keys that a request carries, as a set of bytes; `openai-insecure-api-key.KEY` is how browsers' WebSockets do it."""
    scheme, _, credential = head.get(b"authorization", b"").partition(b" ")
    keys = {credential.strip()} if scheme.lower() == b"bearer" else set()
    if not OTHER_KEY_FIELDS.isdisjoint(head.by_name):
        keys.update(value for name in OTHER_KEY_FIELDS for value in head.all(name))
    if b"sec-websocket-protocol" in head.by_name:
        keys.update(protocol.partition(b".")[2] for protocol in head.elements(b"sec-websocket-protocol") if protocol.startswith(b"openai-insecure-api-key."))
    keys.discard(b"")
    return keys


def origin_allowed(head, settings):
    """May this page call us? No Origin: no page, unless Sec-Fetch-Site says that another site's page is behind it."""
    origin = head.get(b"origin")
    if settings.any_origin:
        return True
    if origin is None:
        return head.get(b"sec-fetch-site", b"none") not in (b"cross-site", b"same-site") or settings.client_keys or not settings.hidden
    host = head.get(b"host", b"")
    return origin.decode("latin-1") in settings.origins or origin == b"http://" + host and names_loopback(host)    # the latter: our start page


@functools.lru_cache(64)                    # clients call few hosts and few paths
def is_host(value):
    return HOST.fullmatch(value) is not None


def names_loopback(host):
    """Is this the value of a Host field that leads to this machine?"""
    return LOOPBACK.fullmatch(re.sub(r":[0-9]*\Z", "", host.decode("latin-1"))) is not None


def cors_fields(head, settings, names=()):
    """The CORS fields of every answer: the origin if it is allowed, reflected only where a list decides, and which of the fields `names` a
    page's script may read. `head` is the request's, None if it could not be read."""
    limits = sorted(name for name in names if b"ratelimit-" in name) if b"ratelimit-" in b" ".join(names) else []
    exposed = (b"Access-Control-Expose-Headers", b", ".join([EXPOSED] + limits) if limits else EXPOSED)
    if settings.any_origin:
        return [(b"Access-Control-Allow-Origin", b"*"), exposed]
    if head and head.get(b"origin") is not None and origin_allowed(head, settings):
        return [(b"Access-Control-Allow-Origin", head.get(b"origin")), (b"Vary", b"Origin"), exposed]
    return [(b"Vary", b"Origin")] if settings.origins else []


def preflight_fields(head, settings):
    """The answer to a browser's question before the request (Fetch standard, section 4.8): everything it asks, for an allowed origin."""
    if not origin_allowed(head, settings):
        return []
    fields = [(b"Access-Control-Allow-Methods", ", ".join(METHODS).encode()), (b"Access-Control-Max-Age", b"86400"),
              (b"Vary", b"Access-Control-Request-Headers")]
    asked = head.get(b"access-control-request-headers")
    if asked:
        fields.append((b"Access-Control-Allow-Headers", asked))
    if head.get(b"access-control-request-private-network") == b"true" and head.get(b"origin").decode("latin-1") in settings.origins:
        fields.append((b"Access-Control-Allow-Private-Network", b"true"))
    return fields


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


# ---- For what: paths, models, aliases ------------------------------------------------------------------------------


@functools.lru_cache(64)
def is_plain_path(path):
    """Is this a path that all servers read in the same way? Nothing empty in front, no dot segments, no odd escapes."""
    return path[:1] == "/" and path[:2] != "//" and not BAD_ESCAPE.search(path) and not DOT_SEGMENT.search(path)


def openai_form(path):
    """The path that a client with a slightly wrong base URL meant: /v1/v1/x and the bare inference paths are /v1/x."""
    if path.startswith("/v1/v1/"):
        return path[3:]
    return "/v1" + path if path in ("/chat/completions", "/completions", "/embeddings", "/responses", "/models") else path


@functools.lru_cache(256)
def allowed_methods(path, rules):
    """The methods that `rules`, a tuple of methods with path patterns, allow on `path`; [] if there is nothing at this path."""
    methods = []
    for method, pattern in rules:
        if pattern == "*" or path_matches(path, pattern):
            methods += METHODS if method == "*" else ("GET", "HEAD") if method == "GET" else (method,)
    return sorted(set(methods), key=METHODS.index)


def path_matches(path, pattern):
    """Does `pattern` fit the raw path? A `*` fits exactly one segment: plain ASCII when decoded once, and never `.` or `..`."""
    segments, wanted = path.split("/"), pattern.split("/")
    return len(segments) == len(wanted) and all(segment == want or want == "*" and is_plain(urllib.parse.unquote(segment, "latin-1"))
                                                for segment, want in zip(segments, wanted))


def is_plain(segment):
    return SEGMENT.fullmatch(segment) is not None and not {"", ".", ".."} & set(segment.split("/"))


def apply_body_rules(body, path, settings):
    """The body to send up, the model that the client named, and for Workers AI the Call. Only what a setting changes differs. Refusal 400 or 403."""
    values = parse_object(body, whole=settings.workers or settings.max_chars)
    for name in values:
        if name not in LOOKED_AT and name.casefold() in LOOKED_AT:      # some parsers would take it for the real one
            raise Refusal(400, "invalid_" + ("model" if name.casefold() == "model" else "parameter"), "`%s` must be written in lower case." % name.casefold())
    model = resolve_model(values, settings)
    real = settings.aliases.get(model, model)
    if settings.max_chars:
        check_characters(values, settings.max_chars)
    changes = limit_tokens(values, path, settings) if settings.max_tokens else {}
    if settings.workers:
        return b"", model, translate_request(path, body, values, real, model, settings.never_shown, changes)
    if real and real != values.get("model"):
        changes["model"] = real
    return edit_members(body, changes), model, None


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
    asked = [(name, values[name]) for name in ("n", "best_of") + TOKEN_LIMITS if values.get(name) is not None]
    for name, value in asked:
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
    real = "model=" + urllib.parse.quote(settings.aliases[named[0]], "")
    parts = [real if urllib.parse.unquote_plus(part.partition("=")[0]).casefold() == "model" and "=" in part else part for part in query[1:].split("&")]
    return "?" + "&".join(parts), named[0]


def check_model(model, settings):
    """403 unless the model is on the list."""
    if settings.models and model not in settings.models:
        raise Refusal(403, "model_not_allowed", "Model not allowed. Allowed models are: %s." % ", ".join(settings.models_shown), "model", model)


def parse_object(body, whole=True):
    """The members of a JSON object. Refusal 400 for what is none, or could be read in two ways.

    Strict where json is not: one encoding, no NaN, no infinite or absurd numbers, no name twice in an object, bounded nesting.
    Where not all is wanted `whole`, the values may hold only a part of long strings.
    """
    try:
        check_depth(body)
        text = body.decode("utf-8").strip(" \t\n\r")
        short = text if whole or len(text) < LONG_STRING else cut_long_strings(text)
        try:
            values = read_value(short)
        except ValueError:
            if short is text:
                raise
            values = read_value(text)       # something else was cut, or it is no JSON: this says which
    except UnicodeDecodeError:
        raise Refusal(400, "invalid_json", "The body is not JSON in UTF-8.")
    except ValueError as error:
        raise Refusal(400, "invalid_json", "The body is not valid JSON: %s." % str(error).partition(":")[0])
    if not isinstance(values, dict):
        raise Refusal(400, "invalid_json", "The body is not a JSON object.")
    return values


def cut_long_strings(text):
    """JSON with the middle of each long string left out. find() is many times as fast as json's look at each character.

    A run without a quote or a backslash is within a string, or else the x that stands for it makes the text unreadable. Names are not cut, nor is
    a string with a NUL, a CR or an LF: json refuses it. Of the other control characters in a long string the upstream is the judge.
    """
    pieces, done = [], 0
    for probe in range(0, len(text), LONG_STRING):
        if probe >= done and text.find('"', probe, probe + LONG_STRING) < 0:
            begin, end = text.rfind('"', done, probe) + 1, text.find('"', probe)
            if end < 0:
                break
            keep = NAME_END.match(text, end) or any(text.find(mark, begin, end) >= 0 for mark in "\\\0\r\n")
            pieces.append(text[done:end] if keep else text[done:begin] + "x" + text[begin:begin + LONG_STRING])
            done = end
    return "".join(pieces) + text[done:] if done else text


def read_value(text):
    """The value that the JSON text is. ValueError, also if it would be far larger when parsed."""
    if len(text) > 4 * MAX_VALUES and sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ValueError("it holds more than %d values" % MAX_VALUES)
    values, end = STRICT_JSON.raw_decode(text)
    if end < len(text):
        raise ValueError("something follows it")
    return values


def edit_members(body, changes, names={}):
    """A JSON object with the values of the members in `changes` replaced, new ones put in front, those in `names` renamed: no other byte differs."""
    if not changes:
        return body
    text, added, pieces = body.decode(), dict(changes), []
    position, done = MARK.match(text).end(), text.index("{") + 1
    pieces.append(text[:done])
    while added and text[position] != "}":     # a name stands there once
        name, name_end = STRICT_JSON.raw_decode(text, position)
        begin = MARK.match(text, name_end).end()
        _, end = STRICT_JSON.raw_decode(text, begin)
        if name in changes:
            pieces += [text[done:position], json.dumps(names.get(name, name)), text[name_end:begin], json.dumps(added.pop(name))]
            done = end
        position = MARK.match(text, end).end()
    front = ["%s: %s" % (json.dumps(name), json.dumps(value)) for name, value in added.items()]
    pieces[1:1] = [", ".join(front), ", " if front and text[MARK.match(text).end()] != "}" else ""]
    return "".join(pieces + [text[done:]]).encode()


def check_depth(body):
    """ValueError above MAX_DEPTH. Counted in the bytes before they are parsed: a parser recurses, and a thread's stack is small."""
    if not holds_many(body):                # most bodies, and no more needs to be looked at
        return
    depth = 0
    for match in JSON_MARK.finditer(body):
        depth += (match.group() in b"[{") - (match.group() in b"]}")
        if depth > MAX_DEPTH:
            raise ValueError("it is nested more than %d levels deep" % MAX_DEPTH)


def holds_many(body):
    """Are there so many brackets that their nesting may be too deep? In a large body find() is many times as fast as count()."""
    if len(body) < PIECE:
        return body.count(b"[") + body.count(b"{") > MAX_DEPTH
    for bracket in (b"[", b"{"):
        position = -1
        for _ in range(MAX_DEPTH // 2 + 1):
            position = body.find(bracket, position + 1)
            if position < 0:
                break
        else:
            return True
    return False


def unique_members(pairs):
    members = dict(pairs)
    if len(members) != len(pairs):
        if [name for name, _ in pairs].count("model") > 1:
            raise Refusal(400, "invalid_model", "The body must hold `model` once.", param="model")
        raise ValueError("a name stands there twice")
    return members


def bounded(kind):
    """A parser of numbers that are neither absurdly long nor infinite."""
    def parse(digits):
        if len(digits) > 400 or kind is float and math.isinf(float(digits)):
            raise ValueError("a number is out of range")
        return kind(digits)
    return parse


def refuse_constant(name):
    raise ValueError("%s is not JSON" % name)


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_members, parse_int=bounded(int), parse_float=bounded(float), parse_constant=refuse_constant)

# ---- What goes up and what comes down ------------------------------------------------------------------------------


def upstream_fields(head, settings, is_json, websocket):
    """The header fields of the request to the upstream, Host first, all but the provider key. The client's own key never is among them."""
    dropped = head.connection                   # fields that the client named as meant for this hop
    fields, hidden, own_keys = [(b"Host", settings.upstream.netloc)], settings.hidden, settings.hidden or settings.client_keys
    for name, value in head.fields:
        low = name.lower().replace(b"_", b"-")  # CGI-like servers take Content_Length for Content-Length
        if hidden and low not in UP_WITH_HIDDEN_KEY and not (websocket and low.startswith(b"sec-websocket-")):
            continue
        if low in NEVER_UP or low in dropped or low.startswith(NEVER_UP_PREFIXES) or low in KEY_FIELDS and own_keys:
            continue
        if low == b"sec-websocket-protocol" and own_keys:
            value = b", ".join(part for part in map(bytes.strip, value.split(b",")) if not part.startswith(b"openai-insecure-api-key."))
            if not value:
                continue
        if low == b"accept-encoding" and hidden:    # error answers are searched for the key: only what we can decode
            value = b", ".join(part for part in head.elements(low) if READABLE_CODING.match(part)) or b"identity"
        if not (low == b"content-type" and is_json or low == b"accept-encoding" and settings.workers):      # these we write ourselves
            fields.append((name, value))
    if is_json:
        fields.append((b"Content-Type", b"application/json"))
    if settings.workers:                        # what is translated must be readable, and no event held back in a compressor
        fields.append((b"Accept-Encoding", b"identity"))
    if websocket:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return fields


def is_websocket(head):
    """RFC 6455 section 4.1. No other upgrade is ever passed on: h2c would be a way around every check."""
    return [token.lower() for token in head.elements(b"upgrade")] == [b"websocket"] and b"upgrade" in head.connection


def downstream_fields(head, settings):
    """The fields of the upstream's answer that come down: as they came, repeated ones repeated, in order."""
    never = NEVER_DOWN_WITH_HIDDEN_KEY if settings.hidden else NEVER_DOWN
    dropped, fields = head.connection, []
    for field in head.fields:
        low = field[0].lower()
        if not (low in never or low in dropped or low.startswith(b"access-control-")):
            fields.append(field)
    return fields


# ---- From where: the upstream, kept alive --------------------------------------------------------------------------


class KeyRing:
    """Several provider keys, used in turn. One that was refused rests; it is named by its place, never by its text."""

    def __init__(self, count):
        self.rests, self.turn, self.lock = [0.0] * count, 0, threading.Lock()       # until when each rests

    def order(self, now):
        """The places of the keys to try, each once: those that do not rest, in turn; if all rest, the one that is ready first."""
        if len(self.rests) == 1:
            return [0]
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
    """urllib's request, and what it cannot hold: repeated fields, a body still coming, the client to watch meanwhile.

    The upstream's URL is parsed once, at the start, and what urllib makes of it stands in a subclass of this (Upstream.request), not in each
    object: so whatever `target` is, it goes to that host.
    """

    def __init__(self, target, method, fields, prefix, handler):
        self._full_url, self.selector, self.method, self.headers = self._full_url + target, target, method, {}
        self.fields, self.prefix, self.websocket = fields, prefix, handler.websocket
        self.client, self.body, self.timeout = handler.client, handler.body, handler.settings.timeout
        self.chunked, self.whole = not self.body.done and self.body.length is None, False      # whole: all of it has been sent
        if self.chunked:
            self.fields.append((b"Transfer-Encoding", b"chunked"))
        elif not self.body.done or prefix or method in ("POST", "PUT", "PATCH"):
            self.fields.append((b"Content-Length", b"%d" % (len(prefix) if self.body.done else self.body.length)))

    def encode_head(self):
        fields = self.fields
        if self.headers and not self._tunnel_host:      # ProxyHandler's
            fields = fields + [(name.encode(), value.encode()) for name, value in self.headers.items()]
        return render_head(b"%b %b HTTP/1.1" % (self.method.encode(), self.selector.encode()), fields)


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
        """Send `request`, wait for the head of the answer, skip 1xx. The client is watched all the while: ClientGone."""
        connection = self.kept() or self.connect(request)
        try:
            if not self.send(request, connection):          # it had just been closed by the upstream
                connection.close()
                connection = self.connect(request)
                self.send(request, connection)
            return Answer(self, connection, request)
        except BaseException as error:
            connection.close()
            if isinstance(error, socket.timeout):
                raise UpstreamFailed("upstream_timeout", "The upstream did not answer within the time set by AIPROXY_TIMEOUT.")
            if isinstance(error, OSError):
                raise UpstreamFailed("upstream_bad_response", "The upstream hung up without an answer.")
            raise

    https_open = http_open

    def kept(self):
        """A kept connection that is still good: younger than POOL_SECONDS and silent. What speaks out of turn is not trusted."""
        try:
            while True:
                connection, since = self.idle.pop()
                if time.monotonic() - since < POOL_SECONDS and connection.wire.is_silent():
                    return connection
                connection.close()
        except IndexError:                  # none left
            return None

    def keep(self, connection):
        self.idle.append((connection, time.monotonic()))
        while len(self.idle) > POOL_SIZE:
            self.idle.popleft()[0].close()

    def close_old(self, now):
        """Close what has been idle too long; called by the relay loop."""
        with contextlib.suppress(IndexError):
            while now - self.idle[0][1] >= POOL_SECONDS:
                self.idle.popleft()[0].close()

    def connect(self, request):
        """A new connection, through a CONNECT tunnel where ProxyHandler asks for one; TLS verified by the default rules."""
        deadline = time.monotonic() + self.connect_timeout
        secure = request.type == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(request.host, timeout=self.connect_timeout, **({"context": self.tls} if secure else {}))
        connection._create_connection = lambda address, *_: connect_within(address, deadline)
        if request._tunnel_host:
            connection.set_tunnel(request._tunnel_host, headers=request.headers)     # which are ProxyHandler's alone
        try:
            connection.connect()
            connection.sock.setblocking(False)
            if secure:
                connection.sock.suppress_ragged_eofs = False       # an end without close_notify must be seen as a cut
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            if isinstance(error, socket.timeout):
                raise UpstreamFailed("upstream_timeout", "The upstream could not be reached within the time set by AIPROXY_CONNECT_TIMEOUT.")
            if isinstance(error, ssl.SSLCertVerificationError):
                raise UpstreamFailed("upstream_tls_error", "The upstream's certificate cannot be trusted (CERTIFICATE_VERIFY_FAILED): %s." % error.verify_message)
            if isinstance(error, ssl.SSLError):
                raise UpstreamFailed("upstream_tls_error", "The upstream does not speak TLS as it should (%s)." % (error.reason or "handshake failed"))
            raise UpstreamFailed("upstream_unreachable", "The upstream cannot be reached: %s." % (getattr(error, "strerror", None) or str(error) or type(error).__name__))
        connection.wire = Wire(connection.sock)
        return connection

    def send(self, request, connection):
        """Send head and body. False: a kept connection that took nothing. An answer before the end of the body ends the sending."""
        wire, client, body = connection.wire, request.client, request.body
        data, untouched = request.encode_head() + chunk(request.prefix, request.chunked), True
        data = memoryview(data) if len(data) > TLS_RECORD else data
        while True:
            while data:
                try:
                    sent = wire.send_some(data[:TLS_RECORD] if untouched else data)     # of more, TLS may send some and then fail
                except OSError:
                    return not untouched    # it may have answered before it hung up: reading tells
                untouched = untouched and not sent
                data = data[sent:]
                if data:
                    wait_for_upstream(request.timeout, wire, READ | WRITE, client)
                    if answered(wire):
                        return True
            if body.done:
                request.whole = True
                return True
            piece = body.read_some()
            if not piece and not body.done:
                if answered(wire):
                    return True
                body.wait(None, wire)
                continue
            data = memoryview(chunk(piece, request.chunked) + (b"0\r\n\r\n" if request.chunked and body.done else b""))


def answered(wire):
    """Has the upstream begun its final answer, or hung up? Interim answers while we send are not it."""
    try:
        alive = wire.fill()
    except OSError:
        return True
    interim = b"HTTP/1.1 1"
    while wire.buffer.startswith(interim) and b"\r\n\r\n" in wire.buffer:
        wire.buffer = wire.buffer.partition(b"\r\n\r\n")[2]
    return not alive or not interim.startswith(wire.buffer[:len(interim)])


def wait_for_upstream(timeout, wire, mask, client):
    """Sleep until the upstream's wire is ready, the client in view: ClientGone. socket.timeout after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        ready = wait(timeout, wire, mask, client if client and client.watched else None)
        if not ready:
            raise socket.timeout()
        if client and client.number in ready:
            client.notice()
        if wire.number in ready:
            return
        timeout = deadline - time.monotonic()


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
            if request.method == "HEAD" or self.status < 200 or self.status in (204, 304):     # no body, whatever the fields say
                self.body, self.length = None, content_length(self.head)
            else:
                self.body = ChunkedBody() if is_chunked(self.head, http10=minor == b"0") else PlainBody(content_length(self.head))
                self.length = self.body.length
        except BadHead as bad:
            raise UpstreamFailed("upstream_bad_response", "The upstream's answer cannot be read: %s" % bad.message)
        self.reusable = minor != b"0" and b"close" not in self.head.connection and request.whole
        self.kind = self.head.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.events = self.kind == b"text/event-stream"
        self.coded = self.head.get(b"content-encoding", b"identity").lower() != b"identity"

    def more(self):
        """Wait for more bytes, the client in view."""
        wait_for_upstream(self.timeout, self.wire, READ, self.client)
        if not self.wire.fill():
            raise ConnectionResetError()

    def forget(self, words):
        """Take out of the head what holds one of `words`: an upstream may repeat our key."""
        for word in words:
            if word in self.head.raw:
                self.reason = b""
                self.head = Head(self.head.start, [(name, value) for name, value in self.head.fields if word not in name and word not in value], self.head.raw)

    def read_piece(self):
        """The next decoded bytes of the body, b"" at its end. OSError if it is cut off or breaks the rules."""
        body = self.body
        while body is not None and not body.done:
            if not self.wire.buffer:
                wait_for_upstream(self.timeout, self.wire, READ, self.client)
                if not self.wire.fill():        # a plain end; a reset is an OSError, and never the end of a body
                    if not body.at_end():
                        raise ConnectionResetError()
                    body.done, self.reusable = True, False
                    break
            data, self.wire.buffer = self.wire.buffer, b""
            piece = body.feed(data)
            if body.broken and not piece:
                raise ConnectionAbortedError(body.broken)
            if piece:
                return piece
        return b""

    def read_rest(self):
        """Read what is left of a body that nobody needs, if it comes at once: then the connection can be used again."""
        self.timeout, self.client = 0.25, None      # the client has all it wants, and may go
        with contextlib.suppress(OSError, ClientGone):
            while self.connection and self.read_piece():
                pass

    def hold(self, size):
        """Read up to `size` decoded bytes of the body into `held`. OSError if it is cut off."""
        piece = b"..."
        while piece and len(self.held) < size:
            piece = self.read_piece()
            self.held += piece

    def close(self, reusable=False):
        """Give the connection back if the exchange came to its clean end, else close it: the upstream stops working for us."""
        connection, self.connection = self.connection, None
        if connection:
            spent = self.body is None or self.body.done and not self.body.surplus
            if reusable and self.reusable and spent and not self.wire.buffer:
                self.pool.keep(connection)
            else:
                connection.close()


def inflate(data, most):
    """What is readable of compressed data, `most` bytes of it: gzip, zlib, or deflate without its wrapper, as some send it. b"" for other codings."""
    for form in (47, -15):                  # zlib's own words for the first two, and for the last
        plain, rest = b"", data
        with contextlib.suppress(zlib.error):
            while rest and len(plain) < most:
                decoder = zlib.decompressobj(form)
                for start in range(0, len(rest), 64):       # in small pieces, so that an error costs little of what came before it
                    plain += decoder.decompress(rest[start:start + 64], most)
                rest = decoder.unused_data  # gzip may have several members
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
        self.now = time.monotonic()
        self.bell, self.button = socket.socketpair()
        self.bell.setblocking(False)
        self.button.setblocking(False)
        self.selector.register(self.bell, READ, lambda mask: self.bell.recv(4096))

    def hand_over(self, job):
        self.inbox.append(job)
        with contextlib.suppress(BlockingIOError):      # the bell has been rung already
            self.button.send(b"!")

    def carry_out(self, job):
        """Hand over and sleep until it is done."""
        job.done = threading.Lock()
        job.done.acquire()
        self.hand_over(job)
        job.done.acquire()

    def run(self):
        tick = 0
        while True:
            ready = self.selector.select(0.5)
            self.now = time.monotonic()         # once for all that is ready
            for key, mask in ready:
                self.guard(key.data, mask)
            while self.inbox:
                job = self.inbox.popleft()
                self.jobs.add(job)
                job.loop = self
                self.guard(job.start)
            if self.now - tick >= 0.5:
                tick = self.now
                for job in list(self.jobs):
                    self.guard(job.stop if self.stopping else job.on_tick, tick)
                self.guard(self.every_tick, tick)

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
    """Something that the relay loop does for its wires. `ending` says how it ended; `done` is the lock of a thread that waits for that."""

    done, ending, finished, bytes = None, "", False, 0

    def __init__(self, client, upstream, timeout):
        self.client, self.upstream, self.timeout = client, upstream, timeout

    def stop(self, now):
        self.finish("shutdown")

    def finish(self, outcome):
        if not self.finished:
            self.finished, self.ending = True, outcome
            self.loop.watch(self.client, 0, None)
            self.loop.watch(self.upstream, 0, None)
            self.loop.jobs.discard(self)
            if self.done:
                self.done.release()


class Stream(Job):
    """The body of one answer on its way down. `ending` is set when no more will come, `bytes` counts what went down."""

    def __init__(self, handler, answer, chunked):
        super().__init__(handler.client, answer.wire, handler.settings.timeout)
        self.body, self.held, self.chunked = answer.body, answer.held, chunked
        self.tells = answer.events and not answer.coded and answer.length is None   # may a cut be told by an event?
        self.pending, self.tail, self.usage = b"", b"\n\n", UsageWatch() if handler.settings.log != "off" else None

    def begin(self):
        """What is already here, framed for the client: often the whole body, and the loop is never needed."""
        if self.body is None:
            self.ending = "ok"
            return b""
        data, self.upstream.buffer = self.upstream.buffer, b""
        begun = self.frame(self.held) if self.held else b""
        return begun + (self.advance(data) if data or self.body.done or self.body.broken else b"")

    def start(self):
        self.heard = self.taken = self.loop.now
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
            self.heard = self.loop.now
            self.send_down(self.advance(data))
            if not self.upstream.pending():     # TLS may hold bytes that no selector sees
                return

    def advance(self, data):
        """The next bytes for the client, given the next from the upstream; b"" is its end. Sets `ending` when the body is over."""
        body = self.body.feed(data) if data else b""
        if self.body.done or not data and not self.body.broken and self.body.at_end():
            self.ending = "ok"
        elif self.body.broken or not data:
            return self.frame(body) + self.cut("upstream_died")
        return self.frame(body) + (b"0\r\n\r\n" if self.ending and self.chunked else b"")

    def frame(self, body):
        self.bytes += len(body)
        self.tail = self.usage.see(self.tail, body) if self.usage else (self.tail + body[-4:])[-4:]
        return chunk(body, self.chunked)

    def cut(self, outcome):
        """The upstream broke off: an event says so if the stream stands between two, and no last chunk is ever sent."""
        self.ending = outcome
        if not self.tells or not self.tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
            return b""
        what = {"upstream_timeout": "The upstream fell silent", "shutdown": "The proxy was stopped"}.get(outcome, "The upstream broke off")
        return self.frame(render_event({"error": error_object(UpstreamFailed(outcome, what + " in the middle of this answer."))}))

    def send_down(self, data):
        """Send at once what the client takes, keep the rest: nothing is collected. Finish when the body is over and all of it taken."""
        try:
            data = self.pending + data if self.pending else data
            sent = self.client.send_some(data) if data else 0
        except OSError:
            return self.finish("client_gone")
        if sent or not self.pending:
            self.taken = self.loop.now
        self.pending = data[sent:]
        if self.ending and not self.pending:
            self.finish(self.ending)
        elif self.pending or not self.upstream.mask:
            self.heard = self.loop.now
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

    def stop(self, now):
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
                check_depth(part)
                usage = json.JSONDecoder().raw_decode(part.decode("utf-8", "replace"))[0]
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
        self.heard, self.closing = self.loop.now, False
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
                        self.heard, self.closing, self.pending[other] = self.loop.now, not data, data
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


class Linger(Job):
    """A refused client may still be sending. Closed at once, its unread bytes would make a reset that eats our answer (RFC 9112 section 9.6)."""

    def __init__(self, sock):
        wire = Wire(socket.socket(fileno=sock.detach()))
        wire.sock.setblocking(False)
        super().__init__(wire, wire, LINGER_SECONDS)

    def start(self):
        self.deadline = self.loop.now + self.timeout
        self.loop.watch(self.client, READ, self.on_client)
        try:
            self.client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.finish("client_gone")

    def on_client(self, mask):
        try:
            data = self.client.receive()
        except OSError:
            data = b""
        self.bytes += len(data or b"")
        if data == b"" or self.bytes > LINGER_BYTES:
            self.finish("ok")

    def on_tick(self, now):
        if now > self.deadline:
            self.finish("timeout")

    def finish(self, outcome):
        super().finish(outcome)
        self.client.sock.close()


# ---- HTTP framing: one strict reader for both sides ----------------------------------------------------------------

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
POLL_EVENTS = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT) if hasattr(select, "poll") else ()     # by READ | WRITE; none on Windows


class BadHead(Refusal):
    """A head that breaks the rules: our answer if a client sent it, a 502 if the upstream did."""

    def __init__(self, status, message):
        super().__init__(status, "bad_request", message)


def wait(timeout, wire, mask, other=None):
    """Sleep until `wire` is ready for READ | WRITE, or there is something to read from `other`: their numbers, none after `timeout` seconds."""
    if mask & READ and wire.pending():
        return (wire.number,)
    if other and other.pending():
        return (other.number,)
    timeout = timeout if timeout > 0 else 0
    if not POLL_EVENTS:
        read = [wire.number] * (mask & READ) + ([other.number] if other else [])
        return sum(select.select(read, [wire.number] if mask & WRITE else [], [], timeout), [])
    poll = select.poll()
    poll.register(wire.number, POLL_EVENTS[mask])
    if other:
        poll.register(other.number, select.POLLIN)
    return dict(poll.poll(timeout * 1000))


class Wire:
    """A non-blocking socket, plain or TLS, with the bytes that were read from it and not used yet."""

    def __init__(self, sock):
        self.sock, self.number, self.buffer, self.mask, self.ended, self.piece = sock, sock.fileno(), b"", 0, False, FIRST_PIECE
        self.poll = POLL_EVENTS and select.poll()
        if self.poll:
            self.poll.register(self.number, select.POLLIN)
        self.pending = getattr(sock, "pending", int)        # TLS: bytes that are decrypted already; int() is 0

    def receive(self):
        """Up to PIECE bytes; b"" at the end, None if there is nothing yet. OSError if the connection broke."""
        try:
            data = self.sock.recv(self.piece)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if len(data) == self.piece:
            self.piece = PIECE
        elif len(data) < FIRST_PIECE:
            self.piece = FIRST_PIECE
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
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def send(self, data):
        """Send all to a client; ClientGone if it takes nothing for STALL_SECONDS."""
        sent = self.send_some(data)
        while sent < len(data):
            if not wait(STALL_SECONDS, self, WRITE):
                raise ClientGone("client_stalled")
            sent += self.send_some(memoryview(data)[sent:])

    def wait_readable(self, timeout):
        """wait() for this wire alone. For the one thread that reads it."""
        if not self.poll:
            return bool(wait(timeout, self, READ))
        return self.pending() > 0 or bool(self.poll.poll(timeout * 1000 if timeout > 0 else 0))

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
        try:
            return not self.wait_readable(0) or self.receive() is None
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
        if not self.buffer:
            more()
        while True:
            end = self.buffer.find(b"\r\n\r\n", searched)
            if end < 0 or end > MAX_LINE:
                check_begun(self.buffer if end < 0 else self.buffer[:end], searched, first_line)
            if end >= 0:
                block, self.buffer = self.buffer[:end], self.buffer[end + 4:]
                return parse_head(block, first_line)
            searched = max(0, len(self.buffer) - 3)     # the end may have begun
            more()


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
    lines, first_end = block.count(b"\r\n"), block.find(b"\r\n")
    start = first_line.fullmatch(block, 0, first_end if lines else len(block))
    if not start:
        raise BadHead(400, "The first line is malformed.")
    if lines > MAX_FIELDS:
        raise BadHead(431, "There are more than %d header fields." % MAX_FIELDS)
    if len(block) > MAX_LINE and max(map(len, block.split(b"\r\n"))) > MAX_LINE:
        raise BadHead(431, "A header field is longer than %d bytes." % MAX_LINE)
    found = FIELD_LINES.findall(block, first_end) if lines else []
    if len(found) != lines:
        raise BadHead(400, "A header field is malformed.")
    return Head(start.groups(), found, block)


class Head:
    """A start line's parts and the fields, as bytes: in the order and the spelling in which they came, and by lower-case name."""

    __slots__ = ("start", "fields", "by_name", "repeats", "raw", "get", "connection")

    def __init__(self, start, found, raw=b""):
        self.start, self.raw = start, raw
        self.fields, self.by_name = fields, by_name = [], {}
        for name, value in found:
            value = value.strip(b" \t")
            fields.append((name, value))
            by_name.setdefault(name.lower(), value)     # of repeated fields the first
        self.get, self.repeats = self.by_name.get, len(self.by_name) < len(fields)
        self.connection = self.tokens(b"connection")        # `close`, and the names of fields that are for this hop alone

    def all(self, name):
        if name not in self.by_name:
            return ()
        if not self.repeats:
            return (self.by_name[name],)
        return [value for other, value in self.fields if other.lower() == name]

    def elements(self, name):
        """The comma-separated elements of all the fields of this name."""
        if name not in self.by_name:
            return ()
        return [part.strip(b" \t") for value in self.all(name) for part in value.split(b",") if part.strip(b" \t")]

    def tokens(self, name):
        return {part.lower() for part in self.elements(name)} if name in self.by_name else frozenset()


def render_head(first_line, fields):
    """The bytes of a head that parse_head would read."""
    return b"\r\n".join([first_line, *map(b": ".join, fields), b"\r\n"])


def content_length(head):
    """The one Content-Length, or None. BadHead unless it is 1 to 18 digits, once: RFC 9112 section 6.3, without the leniency."""
    value = head.get(b"content-length")
    if value is None:
        return None
    if len(value) > 18 or not value.isdigit() or head.repeats and len(head.all(b"content-length")) > 1:
        raise BadHead(400, "Content-Length must be one number.")
    return int(value)


def is_chunked(head, http10):
    """Is the body chunked? BadHead for any other transfer coding, for one beside a Content-Length, and in HTTP/1.0 (RFC 9112 section 6.1)."""
    if b"transfer-encoding" not in head.by_name:
        return False
    codings = head.all(b"transfer-encoding")
    if len(codings) > 1 or codings[0].lower() != b"chunked" or http10:
        raise BadHead(400, "The only transfer coding is chunked, once, in HTTP/1.1.")
    if head.all(b"content-length"):
        raise BadHead(400, "Transfer-Encoding and Content-Length exclude each other.")
    return True


class PlainBody:
    """A body of known length, or (None) one that ends with its connection. feed() gives what belongs to it, `surplus` came behind it."""

    broken = ""

    def __init__(self, length):
        self.length, self.left = length, sys.maxsize if length is None else length
        self.done, self.surplus = not self.left, b""

    def feed(self, data):
        body, self.surplus = data[:self.left], data[self.left:]
        if self.length is not None:
            self.left -= len(body)
            self.done = not self.left
        return body

    def at_end(self):
        """Is the body whole if the connection ends here?"""
        return self.done or self.length is None


class ChunkedBody:
    """RFC 9112 section 7.1, decoded as it comes. Extensions and trailer fields are checked and dropped. `broken` says which rule was."""

    length = None

    def __init__(self):
        self.expected, self.left, self.rest, self.trailer = "size", 0, b"", 0       # of the chunk `left` bytes are to come; `rest` is of a line
        self.done, self.surplus, self.broken = False, b"", ""

    def feed(self, data):
        data, body, position = self.rest + data if self.rest else data, [], 0
        self.rest, size = b"", len(data)
        while position < size and not self.done and not self.broken:
            if self.left:
                piece = data[position:position + self.left]
                body.append(piece)
                position += len(piece)
                self.left -= len(piece)
                continue
            end = data.find(b"\r\n", position)
            if end < 0:
                self.rest = data[position:]
                self.broken = self.begun_wrong(self.rest)
                break
            position, self.broken = end + 2, self.take_line(data[position:end])
        self.surplus = data[position:] if self.done else b""
        return body[0] if len(body) == 1 else b"".join(body)

    def take_line(self, line):
        """Go on to what is expected behind `line`; the rule that it breaks, empty if it breaks none."""
        if self.expected == "chunk end":
            self.expected = "size"
            return "a chunk is longer than its size" if line else ""
        if self.expected == "size":
            size = chunk_size(line) if len(line) <= MAX_CHUNK_LINE else None
            if size is None:
                return "a chunk's size is malformed"
            self.left, self.expected = size, "chunk end" if size else "trailer"
            return ""
        self.done, self.trailer = not line, self.trailer + len(line)
        field = FIELD_LINE.fullmatch(line)
        bad = not field or field.group(1).lower() in (b"content-length", b"transfer-encoding", b"host", b"authorization") or self.trailer > MAX_TRAILER
        return "a trailer field is malformed" if line and bad else ""

    def begun_wrong(self, line):
        """The same for the beginning of a line, so that nobody waits for an end that may never come."""
        good = {"chunk end": line in (b"", b"\r"), "size": len(line) <= MAX_CHUNK_LINE and CHUNK_LINE_BEGUN.fullmatch(line),
                "trailer": self.trailer + len(line) <= MAX_TRAILER and b"\n" not in line}[self.expected]
        return "" if good else "a line is malformed or too long"

    def at_end(self):
        return self.done


@functools.lru_cache(256)                   # the events of a stream are of much the same sizes
def chunk_size(line):
    """The size that the first line of a chunk tells; None if it is malformed."""
    size = CHUNK_LINE.fullmatch(line)
    return int(size.group(1), 16) if size else None


class RequestBody:
    """A request's body as the client sends it: strictly framed, bounded by `limit`, and not slower than BODY_RATE."""

    def __init__(self, client, decoder):
        self.client, self.decoder, self.length = client, decoder, decoder.length
        self.limit, self.received, self.waited, self.done = None, 0, 0.0, decoder.done

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
        self.done = self.decoder.done
        if self.done:
            self.client.buffer = self.decoder.surplus
        self.received += len(piece)
        if self.length is None:             # else it has been checked before the first byte
            self.check_limit()
        return piece

    def wait(self, timeout, upstream=None):
        """Wait for more, for `timeout` seconds or as long as patience lasts, and no longer than until the upstream speaks. Refusal 408."""
        patience = BODY_GRACE + self.received / BODY_RATE - self.waited
        begin = time.monotonic()
        ready = wait(patience if timeout is None else min(timeout, patience), self.client, READ, upstream)
        self.waited += time.monotonic() - begin
        if not ready and self.waited >= BODY_GRACE + self.received / BODY_RATE:
            raise Refusal(408, "request_timeout", "The body came more slowly than %d bytes a second." % BODY_RATE)


def render_event(data, name=""):
    """One event in bytes, ASCII because a delta may hold half a surrogate pair. Never `id:` or `retry:`, which openai-python stumbles over."""
    return ("event: %s\ndata: %s\n\n" % (name, json.dumps(data)) if name else "data: %s\n\n" % json.dumps(data)).encode()


def chunk(data, chunked):
    """`data` as one chunk if the body is chunked. No empty one: that would be the last."""
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked and data else data


# ---- Cloudflare Workers AI, in OpenAI's format ---------------------------------------------------------------------
# Values in, values out, no sockets. Workers AI has four shapes of answers and of events, by model and route: read_answer lists them and
# makes one form of them. To follow a request: translate_request, then translate_answer or StreamTranslator, or translate_error.

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

# What the client calls: the kind of its answer, and the path under /accounts/{id}. Cloudflare's own OpenAI routes are the way in: they take
# messages, tools, images and unknown fields as OpenAI has them, and stream every text model; /ai/run wants other schemas by model and does
# not stream gpt-oss. /ai/v1/completions is documented nowhere, so a prompt goes up as one user message: /ai/run does the same with it.
WORKERS_PATHS = {
    "/v1/chat/completions": ("chat", "/ai/v1/chat/completions"),
    "/v1/completions": ("text", "/ai/v1/chat/completions"),
    "/v1/embeddings": ("embeddings", "/ai/v1/embeddings"),
    "/v1/responses": ("responses", "/ai/v1/responses"),
}

PARAMETERS = {name: row for names, *row in (    # type, least, most: the widest that any current model takes (cloudflare-docs, workers-ai-models/*.json)
    ("stream", "boolean", None, None),
    ("stream_options", "object", None, None),
    ("max_tokens max_completion_tokens", "integer", 1, None),
    ("temperature", "number", 0, 5),
    ("top_p repetition_penalty", "number", 0, 2),
    ("frequency_penalty presence_penalty", "number", -2, 2),
    ("top_k", "integer", 1, 50),
    ("seed", "integer", 1, 9999999999),
) for name in names.split()}
TYPES = {"boolean": bool, "object": dict, "integer": (int, float), "number": (int, float)}     # 1.0 is the integer 1
PROMPT_MEMBERS = ("messages", "prompt", "suffix", "input", "instructions", "system", "tools", "functions", "response_format", "text")
NOT_PROMPT = frozenset((    # strings below those that are no text, or none that a model reads
    "role", "type", "id", "call_id", "tool_call_id", "status", "detail", "format", "url", "image_url", "image", "data", "file_data", "file_id",
    "filename", "encrypted_content"))

CLOUDFLARE_ERRORS = {code: answer for codes, *answer in (   # Cloudflare's codes, and statuses without one: our status (0: theirs, if 5xx), our code
    ((5007, 3042, 410), 404, "model_not_found"),
    ((3003, 3039, 5004, 5005, 5006, 5019, 8001, 8007), 400, "invalid_request"),
    ((3006, 413), 413, "request_too_large"),
    ((3023, 3041, 5016, 5018, 5035, 403), 403, "permission_denied"),
    ((3021, 3040, 429), 429, "rate_limit_exceeded"),
    ((3036, 4006), 429, "insufficient_quota"),                      # 3036 in the docs, 4006 on the wire; mends at midnight UTC
    ((3007, 3008, 408), 504, "upstream_timeout"),
    ((10000, 9106, 401), 502, "upstream_credentials_rejected"),     # our token, so no 401: the client's key is fine
    ((7000, 7001, 7003), 502, "upstream_misconfigured"),            # no such route or account
    ((404,), 404, "not_found"),
    ((8005, 7009), 0, "upstream_error"),
) for code in codes}
OPERATOR_ERRORS = {     # nothing that the client could mend: what it reads in place of Cloudflare's words, and the log with it
    "upstream_credentials_rejected": "Cloudflare rejected the proxy's API token. CLOUDFLARE_API_TOKEN must be valid and allow Workers AI Read and Edit.",
    "upstream_misconfigured": "Cloudflare knows no such account or route. CLOUDFLARE_ACCOUNT_ID or CLOUDFLARE_API_BASE_URL is wrong.",
}
FINISH_REASONS = {"length": "length", "model_length": "length", "max_output_tokens": "length", "content_filter": "content_filter", "tool_calls": "tool_calls"}
MAX_EVENT = 4 << 20     # bytes of one event: far above any answer, so that a stream without line ends does not fill the memory

MODEL_NAME = re.compile(r"(?!.*\.\.)(?=.{1,200}\Z)@?[A-Za-z0-9][\w.:+-]*(?:/[A-Za-z0-9][\w.:+-]*)*", re.A)     # stays in its place in any URL
UUID = re.compile(r"\s*\(?\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b\)?", re.I)

Call = collections.namedtuple("Call", (    # one request: what goes up, and what its answer needs on its way back
    "kind", "path", "body",                 # chat, text, embeddings or responses; the path under /accounts/{id}; bytes
    "model", "id", "created",               # what the answer shows: the name that the client used, an id, seconds
    "stream", "include_usage", "base64",    # what the client asked for
    "secrets"))                             # what no error may show: the account id, the token

# -- what goes up


def translate_request(path, body, values, model, shown, secrets=(), changes={}):
    """The Call for a client's body, with what parse_object makes of it. `model` is the real one, `shown` the client's, `changes` what
    settings want. Bytes stay as they came, but for `model`, a missing max_tokens, and a prompt, which becomes messages. Refusal 400."""
    kind, upstream_path = WORKERS_PATHS[path]
    asked = {name: value for name, value in values.items() if value is not None}      # null counts as absent
    if not MODEL_NAME.fullmatch(model):
        refuse_parameter("model", model, "the name of a model", "invalid_model")
    check_parameters(asked, kind)
    changes = dict(changes) if asked.get("model") == model else dict(changes, model=model)
    if kind in ("chat", "text") and not ("max_tokens" in asked or "max_completion_tokens" in asked):
        changes["max_tokens"] = min(WORKERS_MAX_TOKENS, changes.get("max_tokens", WORKERS_MAX_TOKENS))
    if kind == "text":
        prompt = asked["prompt"] if isinstance(asked["prompt"], str) else asked["prompt"][0]
        changes["prompt"] = [{"role": "user", "content": prompt}]
    body = edit_members(body, changes, {"prompt": "messages"} if kind == "text" else {})
    return Call(kind, upstream_path, body, shown, os.urandom(12).hex(), int(time.time()), asked.get("stream") is True and kind != "embeddings",
                asked.get("stream_options", {}).get("include_usage") is True, asked.get("encoding_format") == "base64", tuple(secrets))


def check_parameters(asked, kind):
    """400 for a parameter that no model takes. Unknown ones pass."""
    for name, (form, least, most) in PARAMETERS.items():
        value = asked.get(name)
        fits = isinstance(value, TYPES[form]) and isinstance(value, bool) == (form == "boolean") and not (form == "integer" and value != int(value))
        if value is not None and not (fits and (least is None or value >= least) and (most is None or value <= most)):
            limits = "" if least is None else " of at least %d" % least if most is None else " from %d to %d" % (least, most)
            refuse_parameter(name, value, "true or false" if form == "boolean" else "%s %s%s" % ("an" if form[0] in "io" else "a", form, limits))
    messages, prompt = asked.get("messages"), asked.get("prompt")
    if kind == "chat" and not (isinstance(messages, list) and messages):
        refuse_parameter("messages", messages, "an array that is not empty")
    if kind == "text" and not (isinstance(prompt, str) or isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)):
        refuse_parameter("prompt", prompt, "a string, or an array of one: Workers AI completes one text at a time, and takes no token numbers")
    if kind == "text" and messages is not None:
        refuse_parameter("messages", messages, "nothing here: it belongs to /v1/chat/completions")


def refuse_parameter(name, value, takes, code="invalid_parameter"):
    """400 that says which parameter, what it got, shortened, and what it takes."""
    got = json.dumps(value)
    got = "is missing" if value is None else "got " + (got if len(got) <= 60 else got[:57] + "...")
    raise Refusal(400, code, "`%s` %s; it takes %s." % (name, got, takes), param=name)


def check_characters(values, most):
    """400 for a prompt of more than `most` characters: all the text of a request together, images and audio not counted."""
    count, rest = 0, [values[name] for name in PROMPT_MEMBERS if name in values]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, dict):
            rest += [inner for name, inner in value.items() if not (isinstance(inner, str) and name in NOT_PROMPT)]
        elif isinstance(value, list):
            rest += value
    if count > most:
        raise Refusal(400, "invalid_parameter", "The request holds %d characters of text; AIPROXY_MAX_CHARS allows %d." % (count, most))


# -- what comes down: every shape into one form, and that into OpenAI's objects


def read_json(data, secrets, needed=""):
    """Cloudflare's answer or event, parsed and out of its envelope. Refusal if it is an error in any form, or lacks the member that is needed."""
    try:
        check_depth(data)
        data = json.loads(data.decode(), parse_constant=refuse_constant)
        while isinstance(data.get("result"), dict) and data.get("success") is not False:
            data = data["result"]
        failed = (data.get("success") is False or data.get("errors") or data.get("error") and data.get("object") != "response"
                  or "error" in (data.get("type"), data.get("object")))
    except (ValueError, AttributeError, RecursionError):
        raise unreadable()
    if failed:
        raise translate_error(200, data, secrets)
    if needed and not data.get(needed) and data.get(needed) != []:
        raise unreadable()
    return data


def unreadable():
    return Refusal(502, "upstream_bad_response", "Cloudflare's answer could not be read.")


def read_answer(body, secrets, whole=True):
    """The choices (see read_choice) and the usage of an answer, whole or one event of it. The shapes (cloudflare/workerd, types/defines/ai.d.ts):

    legacy     {"response": text, number, object or null, "tool_calls": [{"name", "arguments": object}]}, also as events
    OpenAI     {"choices": [{"message" or "delta" or "text"}]}, bare from /ai/v1, in an envelope from /ai/run, as chunk objects
    both       in one event, with the same text: choices go first (cloudflare/ai#615: reading both doubles every word)
    Responses  {"output": [reasoning, message and function_call items]}, from gpt-oss; items need not have `content`
    """
    data = read_json(body, secrets)
    listed, native = dicts(data.get("choices")), data
    if isinstance(data.get("output"), list):
        if data.get("error") or data.get("status") == "failed":
            raise translate_error(200, data, secrets)
        message = {"content": "", "reasoning": "", "refusal": "", "tool_calls": [item for item in dicts(data["output"]) if item.get("type") == "function_call"]}
        for item in dicts(data["output"]):
            for part in dicts(item.get("content")):
                message["reasoning" if item.get("type") == "reasoning" else "content"] += as_text(part.get("text"))
                message["refusal"] += as_text(part.get("refusal"))
        listed, native = [{"message": message, "finish_reason": as_dict(data.get("incomplete_details")).get("reason")}], {}
    elif not listed and ("response" in data or "tool_calls" in data or "finish_reason" in data):
        listed = [{}]
    if whole and not listed:        # an event may say nothing (only padding, only usage); an answer may not
        raise unreadable()
    return [read_choice(choice, number, {} if number else native) for number, choice in enumerate(listed)], openai_usage(data.get("usage"))


def read_choice(choice, number, native):
    """(index, what is said, finish_reason or "", logprobs) of one of `choices`. `native` is what stands beside them: the same, or what they lack."""
    said = as_dict(choice.get("delta") or choice.get("message"))
    finish = as_text(choice.get("finish_reason") or native.get("finish_reason"))
    if finish == "error":
        raise Refusal(502, "upstream_bad_response", "The model broke off with an error.")
    said = {"content": as_text(said.get("content", choice.get("text"))) or as_text(native.get("response")),
            "reasoning_content": as_text(said.get("reasoning_content") or said.get("reasoning")),       # gemma-4 uses the short name
            "refusal": as_text(said.get("refusal")), "tool_calls": dicts(said.get("tool_calls")) or dicts(native.get("tool_calls"))}
    index = choice.get("index")
    return (index if isinstance(index, int) else number, {name: value for name, value in said.items() if value},
            finish and FINISH_REASONS.get(finish, "stop"), choice.get("logprobs"))


def as_text(value):
    """JSON mode puts an object into `response`, llama-4 a number: both are text to the client."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def as_dict(value):
    return value if isinstance(value, dict) else {}


def dicts(value):
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def openai_usage(usage):
    """OpenAI's counts out of either naming, or None: zeros mean that Cloudflare did not count, and a guess would be worse than none."""
    counts = {name.replace("input_", "prompt_").replace("output_", "completion_"): value for name, value in as_dict(usage).items()
              if isinstance(value, dict if name.endswith("_details") else int)}
    if not any(isinstance(value, int) and value for value in counts.values()):
        return None
    counts.setdefault("total_tokens", counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0))
    return counts


def number_calls(calls, begun, call_id, empty=""):
    """Tool calls as OpenAI has them. `begun` lists those of earlier events: a call shows its id and name once, then only arguments."""
    for call in calls:
        function = as_dict(call.get("function")) or call        # llama-3.3 and Responses are flat
        ident, name, arguments = (as_text(text) for text in (call.get("call_id") or call.get("id"), function.get("name"), function.get("arguments")))
        if not (ident or name or arguments):
            continue        # the null sentinel after a call (workers-ai-provider, streaming.ts)
        place = call.get("index")
        same = [number for number, (known, at) in enumerate(begun) if ident and ident == known or place is not None and place == at and not (ident and known)]
        if not (same or ident or name):
            same = list(range(len(begun)))      # arguments alone belong to the last
        if not same:
            begun.append((ident, place))
            yield {"index": len(begun) - 1, "id": ident or "call_%s_%d" % (call_id, len(begun)), "type": "function",
                   "function": {"name": name, "arguments": arguments or empty}}
        elif arguments:
            yield {"index": same[-1], "function": {"arguments": arguments}}


def translate_answer(call, body):
    """A whole answer with status 200 as the object that OpenAI would have sent. Refusal 502 if it cannot be read, or what an error in it says."""
    if call.kind == "responses":
        return relabel_response(read_json(body, call.secrets, "output"), call)
    if call.kind == "embeddings":
        return embeddings_object(read_json(body, call.secrets, "data"), call)
    choices, usage = read_answer(body, call.secrets)
    messages = []
    for index, said, finish, logprobs in choices:
        calls = list(number_calls(said.pop("tool_calls", ()), [], call.id, "{}"))
        for one in calls:
            del one["index"]        # only deltas number them
        message = dict({"role": "assistant", "content": None if calls else "", "refusal": None}, **said, **({"tool_calls": calls} if calls else {}))
        messages.append((index, message, finish_reason(finish, calls), logprobs))
    return completion_object(call, messages, usage)


def completion_object(call, choices, usage, chunk=""):
    """chat.completion, chat.completion.chunk or text_completion, whose whole and chunk are one form. `choices`: (index, what is said, finish_reason, logprobs)."""
    if call.kind == "text":     # no place for reasoning, and chat's logprobs are not its
        listed = [{"index": index, "text": said.get("content") or "", "logprobs": None, "finish_reason": finish} for index, said, finish, _ in choices]
    else:
        listed = [{"index": index, "delta" if chunk else "message": said, "logprobs": logprobs, "finish_reason": finish} for index, said, finish, logprobs in choices]
    prefix, name = ("cmpl-", "text_completion") if call.kind == "text" else ("chatcmpl-", "chat.completion" + chunk)
    answer = {"id": prefix + call.id, "object": name, "created": call.created, "model": call.model, "choices": listed}
    return dict(answer, usage=usage) if usage or chunk and call.include_usage else answer


def finish_reason(finish, calls):
    """Some models end with `stop`, or with nothing, after a tool call; agents look for tool_calls."""
    return "tool_calls" if calls and finish in ("", "stop") else finish or "stop"


def embeddings_object(data, call):
    """OpenAI's list, from that or from the legacy {"shape", "data": [[...]]}. Node's SDK asks for base64 and decodes floats to zeros."""
    try:
        rows = [row.get("embedding") if isinstance(row, dict) else row for row in data["data"]]
        if call.base64:
            rows = [row if isinstance(row, str) else base64.b64encode(struct.pack("<%df" % len(row), *row)).decode() for row in rows]
    except (struct.error, OverflowError, TypeError):
        raise unreadable()
    if not rows or not all(isinstance(row, (list, str)) for row in rows):
        raise unreadable()
    answer = {"object": "list", "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)], "model": call.model}
    usage = {name: count for name, count in (openai_usage(data.get("usage")) or {}).items() if name != "completion_tokens"}
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


class EventReader:
    """Events out of bytes as they come (WHATWG HTML, 9.2.6): LF or CRLF, comments, `data:` without a space and on several lines."""

    rest = b""

    def feed(self, piece):
        """The events that `piece` completes, as (name, data)."""
        events = []
        *blocks, self.rest = re.split(rb"\r?\n\r?\n", self.rest + piece)
        for block in blocks:
            lines = [line.partition(":") for line in re.split("\r?\n", block.decode("utf-8", "replace"))]
            data = [value[value[:1] == " ":] for name, _, value in lines if name == "data"]
            if data:
                events.append(("".join(value.strip() for name, _, value in lines if name == "event"), "\n".join(data)))
        if len(self.rest) > MAX_EVENT:
            raise unreadable()
        return events


class StreamTranslator:
    """Cloudflare's events in, OpenAI's out, each as soon as it is there. `done`: the client has all it will get; `failed`: the error's code."""

    def __init__(self, call):
        self.call, self.events = call, EventReader()
        self.begun = {}             # by a choice's index: its tool calls, and its finish_reason when it has come
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
        out = b"" if reason or self.is_complete() else self.feed(b"\n\n")       # a last event may lack its blank line
        if self.done:
            return out
        broken = reason or Refusal(502, "upstream_bad_response", "The upstream broke off in the middle of this answer.")
        return out + (b"".join(self.finish()) if self.is_complete() else self.fail(broken))

    def whole(self, body):
        """A whole JSON answer as the events of a stream: gpt-oss may answer so. Refusal as in translate_answer, nothing being sent yet."""
        choices, self.usage = read_answer(body, self.call.secrets)
        return b"".join([event for choice in choices for event in self.render(choice, "{}")] + self.finish())

    def translate(self, name, data):
        """The events in bytes that one event is worth."""
        if data.strip() == "[DONE]":
            return self.finish()
        choices, usage = read_answer(data.encode(), self.call.secrets, whole=False)
        self.usage = usage or self.usage        # of two finish chunks the second has zeros
        return [event for choice in choices for event in self.render(choice)]

    def render(self, choice, empty=""):
        """The chunk objects of a choice: the role first, then what is new, then the finish_reason, once."""
        index, said, finish, logprobs = choice
        if index not in self.begun:
            self.begun[index] = {"calls": [], "finish": ""}
            if self.call.kind == "chat":
                yield self.chunk(index, {"role": "assistant", "content": "", "refusal": None})
        known = self.begun[index]
        calls = list(number_calls(said.pop("tool_calls", ()), known["calls"], self.call.id, empty))
        delta = dict(said, tool_calls=calls) if calls else said
        if delta if self.call.kind == "chat" else said.get("content"):
            yield self.chunk(index, delta, None, logprobs)
        if finish and not known["finish"]:
            known["finish"] = finish_reason(finish, known["calls"])
            yield self.chunk(index, {}, known["finish"])

    def chunk(self, index, delta, finish=None, logprobs=None):
        return render_event(completion_object(self.call, [(index, delta, finish, logprobs)], None, ".chunk"))

    def is_complete(self):
        return bool(self.begun) and all(known["finish"] for known in self.begun.values())

    def finish(self):
        """What closes a stream that the upstream ended well: legacy ones give no finish_reason."""
        if not self.begun:
            raise unreadable()
        self.done = True
        out = [self.chunk(index, {}, finish_reason("", known["calls"])) for index, known in self.begun.items() if not known["finish"]]
        if self.call.include_usage and self.usage:
            out.append(render_event(completion_object(self.call, [], self.usage, ".chunk")))
        return out + [b"data: [DONE]\n\n"]

    def fail(self, refusal):
        """One error event, the last one: both official SDKs raise it, while they swallow Cloudflare's own. Never a finish, never [DONE]."""
        self.done, self.failed = True, refusal.code
        return render_event({"error": error_object(refusal)})


class ResponsesTranslator(StreamTranslator):
    """/v1/responses: events pass as they come, with the client's name for the model."""

    LAST = ("response.completed", "response.incomplete", "response.failed")

    def translate(self, name, data):
        if data.strip() == "[DONE]":        # these streams have none; what is done is told by an event
            return []
        event = relabel_response(read_json(data.encode(), self.call.secrets, "type"), self.call)
        self.usage = openai_usage(as_dict(event.get("response")).get("usage")) or self.usage
        self.done = event["type"] in self.LAST
        return [render_event(event, name)]

    def fail(self, refusal):
        super().fail(refusal)
        error = error_object(refusal)       # `error` is what the SDKs raise, the rest is how Responses say it
        return render_event(dict(error, type="error", error=error), "error")

    def whole(self, body):
        """The events without which no client can follow; Workers AI has the Responses API "only non-streaming" (cloudflare-docs#32116)."""
        response = translate_answer(self.call, body)
        events = [("response.created", {"response": dict(response, status="in_progress", output=[], usage=None)})]
        for place, item in enumerate(dicts(response["output"])):
            events.append(("response.output_item.added", {"output_index": place, "item": dict(item, content=[]) if "content" in item else item}))
            for number, part in enumerate(dicts(item.get("content"))):
                where = {"item_id": item.get("id"), "output_index": place, "content_index": number}
                events.append(("response.content_part.added", dict(where, part=dict(part, text="") if "text" in part else part)))
                if part.get("type") == "output_text":
                    events.append(("response.output_text.delta", dict(where, delta=part.get("text"), logprobs=[])))
            events.append(("response.output_item.done", {"output_index": place, "item": item}))
        status = "response.%s" % response.get("status")
        events.append((status if status in self.LAST else self.LAST[0], {"response": response}))
        self.done, self.usage = True, openai_usage(response.get("usage"))
        return b"".join(render_event(dict(event, type=name, sequence_number=number), name) for number, (name, event) in enumerate(events))


# -- errors


def translate_error(status, body, secrets=(), **fields):
    """The Refusal for Cloudflare's error, in bytes or parsed: by its code, else by its status. `fields` go with it (retry_after="5").

    Forms: the envelope {"success": false, "errors": [{"code", "message"}]}, OpenAI's {"error": {...}}, a bare object, HTML, nothing.
    """
    told = error_told(body)
    word, message = as_text(told.get("code")), clean_message(told.get("message"), secrets)
    number = int(word) if re.fullmatch("[0-9]{3,5}", word) else 0
    if status < 400 <= number < 600:
        status = number         # vLLM's {"object": "error", "code": 400} inside a 200
    usual = "upstream_bad_response" if status < 400 else "invalid_request" if status < 500 else "upstream_error"
    other = (status if status >= 400 else 502), usual if not word or word.isdigit() else word
    ours, code = CLOUDFLARE_ERRORS.get(number) or CLOUDFLARE_ERRORS.get(status) or other
    message = OPERATOR_ERRORS.get(code) or message or "Cloudflare answered with status %d and no reason that could be read." % status
    param = told.get("param") if isinstance(told.get("param"), str) else "model" if code == "model_not_found" else None
    if code == "insufficient_quota" or code in OPERATOR_ERRORS:
        fields["x_should_retry"] = "false"      # the SDKs retry 429 and 5xx unless told
    return Refusal(ours or (status if status >= 500 else 502), code, message, param, **fields)


def error_told(error):
    """The object in an error, parsed or not, that has the code and the message; {} if there is none."""
    try:
        error = error.encode() if isinstance(error, str) else error
        if isinstance(error, bytes):
            check_depth(error)
            error = json.loads(error.decode())
    except (ValueError, RecursionError):
        return {}
    told = (dicts(as_dict(error).get("errors")) + [as_dict(error).get("error") or error])[0]
    return {"message": told} if isinstance(told, str) else as_dict(told)


def clean_message(message, secrets):
    """Cloudflare's words without `AiError:`, JSON around them, uuids and what must stay here."""
    message = re.sub(r"^(?:\s*(?:AiError|InferenceUpstreamError)\s*:)+", "", UUID.sub("", as_text(message))).strip()
    if message[:1] == "{":      # AiError: AiError: {"object": "error", "message": ...}
        message = clean_message(error_told(message).get("message"), ()) or message
    for secret in secrets:
        message = re.sub(re.escape(secret), "***", message, flags=re.I)
    return message[:2000]


# -- the model list


def read_catalogue_page(status, body, secrets=()):
    """The items of one page of models/search; an empty list is the end. Refusal if it cannot be read."""
    if status != 200:
        raise translate_error(status, body, secrets)
    items = read_json(body, secrets).get("result")
    if not isinstance(items, list):
        raise unreadable()
    return dicts(items)


def translate_catalogue(items, today, names, only_names):
    """The items of OpenAI's model list out of all pages: `names` (shown name to model) first, aliases before others, then the rest.

    With `only_names`, an allow-list, there is no rest. `today` is YYYY-MM-DD in UTC: a model is gone on its deprecation date.
    """
    models = {}
    for item in items:      # pages may overlap: by name, which is OpenAI's id; Cloudflare's `id` is a uuid
        name, task = item.get("name"), as_text(as_dict(item.get("task")).get("name"))
        told = {as_text(one.get("property_id")): one.get("value") for one in dicts(item.get("properties"))}
        gone = as_text(told.get("planned_deprecation_date"))[:10]
        # The query's task= matches a display label exactly and finds nothing when that drifts, so tasks are told apart here.
        if isinstance(name, str) and re.sub(r"\W", "", task).lower() in ("textgeneration", "textembeddings") and not (gone and gone <= today):
            told.update(description=item.get("description"), task=task)
            metadata = {one: told[one] for one in ("description", "task", "context_window", "planned_deprecation_date") if told.get(one) is not None}
            models.setdefault(name, {"object": "model", "created": seconds(item.get("created_at")), "owned_by": "cloudflare", "permission": [],
                                     "root": name, "parent": None, "metadata": metadata})
    shown = dict(sorted(names.items(), key=lambda pair: pair[0] == pair[1]))
    if not only_names:
        shown.update((name, name) for name in models)
    return [dict(id=name, **models[model]) for name, model in shown.items() if model in models]


def seconds(text):
    """Unix seconds of "2025-08-05 10:49:53.265", which is UTC without saying so; 0 if it is none."""
    try:
        return int(datetime.datetime.fromisoformat(as_text(text)[:19] + "+00:00").timestamp())
    except ValueError:
        return 0


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

        self.host = read("AIPROXY_HOST", fitting(VISIBLE), "an address or a host name")
        self.port = read(next((name for name in ("AIPROXY_PORT", "PORT", "FC_SERVER_PORT") if environ.get(name, "").strip()), "AIPROXY_PORT"),
                         number(int, 0, 65535), "a port number, 0 to 65535")
        self.upstream = read("AIPROXY_UPSTREAM", Upstream, "one of %s, or a base URL such as https://host or https://host/v1, without "
                             "user info, query or fragment" % ", ".join(PROVIDERS), secret=re.search("[@?#]", environ.get("AIPROXY_UPSTREAM", "")))
        self.workers = self.upstream.name == "workers-ai"
        self.keys = read("CLOUDFLARE_API_TOKEN" if self.workers else "AIPROXY_KEY", lambda text: [check_key(key) for key in parse_list(text)], "", secret=True)
        self.account = read("CLOUDFLARE_ACCOUNT_ID", parse_account, "the id of an account: letters and digits") if self.workers else ""
        if self.workers:
            if not self.account or not self.keys:
                raise SettingError("AIPROXY_UPSTREAM=workers-ai needs CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN, a token with Workers AI Read and Edit")
            self.upstream = read("CLOUDFLARE_API_BASE_URL", lambda text: Upstream(text, "/accounts/" + self.account), "a base URL",
                                 secret=re.search("[@?#]", environ.get("CLOUDFLARE_API_BASE_URL", "")))
        self.hidden, self.keys_shown = bool(self.keys), ", ".join("%d characters" % len(key) for key in self.keys) or "none"
        header = read("AIPROXY_KEY_HEADER", fitting("(?:%s)?" % TOKEN.decode()), "a header field's name") or self.upstream.key_header
        self.key_fields = [(header.encode(), b"Bearer " + key if header.lower() == "authorization" else key) for key in self.keys]
        self.client_keys = read("AIPROXY_CLIENT_KEYS", parse_client_keys, "", secret=True)
        self.models = read("AIPROXY_MODELS", parse_models, "names, comma-separated, each model or alias=model")
        self.default_model = read("AIPROXY_DEFAULT_MODEL", fitting(VISIBLE), "one model's name")
        self.paths = read("AIPROXY_PATHS", parse_paths, "PATH, METHOD PATH or * PATH, comma-separated, or * alone")
        self.origins = read("AIPROXY_ORIGINS", lambda text: [fit(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin).group() for origin in parse_list(text)],
                            "* or origins, comma-separated, exactly as browsers send them: https://app.example, without a path")
        self.open = read("AIPROXY_OPEN", lambda text: fit("(1|true|yes|on)|0|false|no|off|", text.lower()).group(1) is not None, "1, true, yes, on or 0, false, no, off")
        self.rate_shown = environ.get("AIPROXY_RATE", "").strip() or ("60/min" if self.open else "")
        self.rate = read("AIPROXY_RATE", lambda text: parse_rate(text or self.rate_shown), "a rate such as 20/s, 60/min, 100/h or 1000/day")
        self.max_tokens = read("AIPROXY_MAX_TOKENS", number(int, 0, 10 ** 9), "a number of tokens")
        self.max_per_client = read("AIPROXY_MAX_PER_CLIENT", number(int, 1, 1000000), "a number from 1")
        self.max_body = read("AIPROXY_MAX_BODY", parse_size, "a size such as 32MB")
        self.max_connections = read("AIPROXY_MAX_CONNECTIONS", number(int, 1, 1000000), "a number from 1")
        self.connect_timeout = read("AIPROXY_CONNECT_TIMEOUT", number(float, 0.001, 86400), "seconds, more than 0")
        self.timeout = read("AIPROXY_TIMEOUT", number(float, 0.001, 86400), "seconds, more than 0")
        self.grace = read("AIPROXY_GRACE", number(float, 0, 86400), "seconds")
        self.log = read("AIPROXY_LOG", fitting("text|json|off"), "text, json or off")
        self.max_chars = read("AIPROXY_MAX_CHARS", lambda text: number(int, 0, 10 ** 12)(text or ("131072" if self.workers else "0")), "a number of characters")
        self.aliases = self.models or (WORKERS_ALIASES if self.workers else {})     # name to model; an allow-list only if it is `models`
        self.models_shown = list(self.aliases)
        self.never_shown = (self.account,) * bool(self.account) + tuple(key.decode() for key in self.keys)
        self.never_down = [word.encode() for word in self.never_shown]
        self.secrets = self.never_down + [key for _, key in self.client_keys]       # nor in any line of the log
        if self.hidden and self.paths is None:
            self.paths = tuple(("POST", path) for path in self.upstream.paths) + (("GET", "/v1/models"), ("GET", "/v1/models/*"))
        self.body_rules = bool(self.models or self.default_model or self.max_tokens or self.max_chars or self.workers)
        self.key_needed = bool(self.client_keys) or not self.hidden and self.upstream.wants_key
        self.any_origin = "*" in self.origins or not self.origins and self.key_needed
        rules = self.paths if self.paths is not None else (("POST", "*"),)
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
        if self.client_keys and not self.hidden and self.upstream.wants_key:
            raise SettingError("AIPROXY_CLIENT_KEYS is set but AIPROXY_KEY is not: clients could present only one key, and it would be ours. "
                               "Set AIPROXY_KEY to the provider key, or leave AIPROXY_CLIENT_KEYS empty")
        if any(hmac.compare_digest(key, known) for key in self.keys for _, known in self.client_keys):
            raise SettingError("AIPROXY_CLIENT_KEYS holds the provider key; make up another key for the client")
        if self.models and self.default_model and self.default_model not in self.models:
            raise SettingError("AIPROXY_DEFAULT_MODEL: got %r; it takes a name on AIPROXY_MODELS" % self.default_model)
        if self.port and self.port == self.upstream.port and self.upstream.loopback and (LOOPBACK.fullmatch(self.host) or self.host in ("0.0.0.0", "::")):
            raise SettingError("AIPROXY_UPSTREAM: got %r; it takes another server than this proxy itself" % self.upstream.url)


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
        self.request = type("UpstreamRequest", (UpstreamRequest,), vars(urllib.request.Request(self.url, origin_req_host="")))     # see there
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
VISIBLE = r"[\x21-\x7e]*"


def fit(pattern, text):
    """The match of all of `text`. ValueError if there is none."""
    match = re.fullmatch(pattern, text)
    if not match:
        raise ValueError()
    return match


def fitting(pattern):
    """A parser that takes text of this form as it is."""
    return lambda text: fit(pattern, text).group()


def number(kind, least, most):
    """A parser for numbers from `least` to `most`; no text is 0."""
    def parse(text):
        value = kind(text or "0")
        if not least <= value <= most:
            raise ValueError()
        return value
    return parse


def parse_account(text):
    if PLACEHOLDER.fullmatch(text):
        raise ValueError()
    return fit("[A-Za-z0-9_-]{0,64}", text).group()


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
        if name in models or not fit(VISIBLE, name).group() or equals and not fit(VISIBLE, model).group():
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
    return tuple(rules)


def parse_rate(text):
    """(requests, seconds), or None for no limit."""
    if not text:
        return None
    count, unit = fit(r"([1-9][0-9]{0,8})\s*/\s*(s|sec|min|m|h|hour|d|day)", text).groups()
    return int(count), {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit[0]]


def parse_size(text):
    count, unit = fit(r"([0-9]{1,12})\s*(?:([KMG])B|B?)", text.upper()).groups()
    return int(count) << {None: 0, "K": 10, "M": 20, "G": 30}[unit]


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
    """Its header fields and the page. Nothing in it runs or is fetched but what stands in it: the nonce is new each time."""
    nonce = os.urandom(16).hex()
    fields = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", PAGE_RULES % (nonce, nonce)), ("Vary", "Accept"),
              ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    return [(name.encode(), value.encode()) for name, value in fields], PAGE.replace("{{NONCE}}", nonce).encode()


# ---- Demo provider -------------------------------------------------------------------------------------------------

DEMO_WORDS = re.findall(r"\S+ ?", "This answer comes from the small provider inside aiproxy: each word is an event, relayed as it arrives.")


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
            choice = {"message": {"role": "assistant", "content": "".join(DEMO_WORDS)}} if chat else {"text": "".join(DEMO_WORDS)}
            return self.reply(dict(answer, choices=[dict(choice, index=0, finish_reason="stop")], usage=usage))
        self.send_head(200, "text/event-stream", "Transfer-Encoding", "chunked")
        answer["object"] += ".chunk" if chat else ""
        for place, word in enumerate(DEMO_WORDS + [""]):
            delta = {"role": "assistant", "content": word} if place == 0 else {"content": word} if word else {}
            part = {"delta": delta} if chat else {"text": word}
            self.event(dict(answer, choices=[dict(part, index=0, finish_reason=None if word else "stop")]))
            time.sleep(0.06)                # a visible pace
        if (request.get("stream_options") or {}).get("include_usage"):
            self.event(dict(answer, choices=[], usage=usage))
        return self.wfile.write(chunk(b"data: [DONE]\n\n", True) + b"0\r\n\r\n")

    def admitted(self):
        if hmac.compare_digest(self.headers.get("Authorization", "").encode("latin-1"), b"Bearer " + self.server.key.encode()):
            return True
        return self.reply({"error": {"message": "Incorrect API key.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}}, 401)

    def event(self, data):
        self.wfile.write(chunk(render_event(data), True))

    def reply(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_head(status, "application/json", "Content-Length", str(len(body)))
        self.wfile.write(body)

    def send_head(self, status, kind, framing, value):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header(framing, value)
        self.end_headers()

    def log_message(self, format, *args):
        pass


def show_demo(server):
    """Send one chat request through the running relay and print its answer as it comes."""
    model = (server.settings.models_shown or ["demo"])[0]
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    fields = {"Content-Type": "application/json", "Host": "localhost"}
    fields.update(("Authorization", "Bearer " + key.decode()) for _, key in server.settings.client_keys[:1])
    print("\nOne chat request through the relay, its answer as it comes:\n\n  ", end="", file=sys.stderr, flush=True)
    begin, first = time.monotonic(), None
    client = http.client.HTTPConnection(server.url().partition("//")[2], timeout=10)
    client.request("POST", "/v1/chat/completions", body, fields)
    for line in client.getresponse():
        if line.startswith(b"data: {"):
            first = first or time.monotonic() - begin
            choices = json.loads(line[6:])["choices"]
            print(choices[0]["delta"].get("content", "") if choices else "", end="", file=sys.stderr, flush=True)
    print("\n\nFirst event after %.0f ms. Now it serves; try:\n\n%s\n" % ((first or 0) * 1000, server.curl(model)), file=sys.stderr, flush=True)


# ---- Server --------------------------------------------------------------------------------------------------------


class Record:
    """What the log says of one request."""

    method = path = model = outcome = ""
    status = upstream_status = first = None
    bytes = 0

    def __init__(self, address):
        self.client, self.began = address, time.monotonic()

    @functools.cached_property
    def id(self):
        """Made up only when nobody has set it: most upstreams name their answers."""
        return "req_%016x" % random.getrandbits(64)

    def tokens(self):
        """Prompt and completion tokens. Set to a function that counts them, which is called only if the log is on."""
        return None, None

    def first_byte(self):
        self.first = self.first or time.monotonic() - self.began

    def as_dict(self, scrub=str):
        prompt_tokens, completion_tokens = self.tokens()
        return {"time": log_time(int(time.time())), "client": scrub(self.client), "method": scrub(self.method) or "-", "path": scrub(self.path)[:256],
                "model": scrub(self.model)[:100], "status": self.status, "upstream_status": self.upstream_status,
                "first_byte": self.first and round(self.first, 4), "total": round(time.monotonic() - self.began, 4), "bytes": self.bytes,
                "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "request_id": scrub(self.id), "outcome": self.outcome or "client_gone"}


@functools.lru_cache(1)
def log_time(now):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


LOG_LINE = "%s %s %s %s %s %s upstream=%s first=%ss total=%ss bytes=%s tokens=%s+%s id=%s %s"     # Record.as_dict, in its order


class Log(threading.Thread):
    """One line per request on stdout, warnings on stderr, written by a thread of its own: a reader that stalls must not stall requests."""

    def __init__(self, form, secrets):
        super().__init__(daemon=True, name="log")
        self.form, self.secrets, self.lines, self.lost = form, [key.decode() for key in secrets], queue.SimpleQueue(), 0

    def write(self, record):
        if self.form != "off":
            values = record.as_dict(self.scrub)
            self.put(sys.stdout, json.dumps(values) if self.form == "json" else LOG_LINE % tuple(map(printable, values.values())))

    def warn(self, text):
        self.put(sys.stderr, "aiproxy: " + self.scrub(text))

    def put(self, stream, line):
        if self.lines.qsize() < MAX_LOG_LINES:
            self.lines.put((stream, line + "\n"))
        else:
            self.lost += 1

    def scrub(self, text):
        """Without our keys: a client may put one into a path or a model's name, encoded or not."""
        for secret in self.secrets:
            if "%" in text and secret not in text and secret in urllib.parse.unquote(text):
                text = urllib.parse.unquote(text)
            text = text.replace(secret, "***")
        return text

    def run(self):
        batch = []
        while None not in batch:
            time.sleep(LOG_SECONDS if batch else 0)
            batch = [self.lines.get()]
            while not self.lines.empty():
                batch.append(self.lines.get())
            if self.lost:
                batch.append((sys.stdout, "(%d lines lost: nobody read them in time)\n" % self.lost))
                self.lost = 0
            for stream in (sys.stderr, sys.stdout):
                with contextlib.suppress(OSError, ValueError):      # nobody listens any more
                    stream.write("".join(item[1] for item in batch if item and item[0] is stream))
                    stream.flush()

    def close(self, seconds):
        """Wait until all lines are written, or for so long."""
        self.lines.put(None)
        self.join(seconds)


def printable(value):
    """A value as one word of a log line: nothing in it can end the line, start another field or move a terminal's cursor."""
    if not value:
        return "-" if value is None or value == "" else value
    if not isinstance(value, str) or value.isascii() and value.isprintable() and " " not in value:
        return value
    return json.dumps(value).replace(" ", "\\u0020")


def fault_place(error):
    """Where a fault of ours is, without the values in it: those may be secret."""
    places, step = [], error.__traceback__      # by hand: the traceback module takes half a megabyte
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
        self.lock, self.idle, self.connections = threading.Lock(), {}, 0
        self.per_client, self.clients, self.spare_threads = collections.Counter(), queue.SimpleQueue(), 0
        self.all_done = threading.Condition(self.lock)
        self.address_family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        self.log = Log(settings.log, settings.secrets)
        self.catalogue = Catalogue(settings)
        self.key_ring, self.buckets = KeyRing(len(settings.keys)), Buckets(*settings.rate) if settings.rate else None
        self.upstreams = KeepAliveHandler(settings)
        self.relay_loop = RelayLoop(self.upstreams.close_old, self.log.warn)
        self.opener, self.proxy = build_opener(settings, self.upstreams)
        # Without a proxy to ask first, straight to where the opener comes to: its search for us is a twentieth of a request's work.
        self.open = functools.partial(self.opener.open, timeout=settings.timeout) if self.proxy else self.upstreams.http_open
        self.cap = cap_connections(settings.max_connections)
        super().__init__(address, Handler)
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
            return self.refuse_busy(request, address)
        with self.lock:
            spare = self.spare_threads > 0
            self.spare_threads -= spare
        try:
            if spare:
                self.clients.put((request, client_address))
            else:
                threading.Thread(target=self.serve_clients, args=(request, client_address), daemon=True).start()
        except RuntimeError:                # the system has no thread left
            self.refuse_busy(request, address)

    def serve_clients(self, request, client_address):
        """A thread's life: one client after the other, until none has come for SPARE_SECONDS. Starting threads costs more than keeping them."""
        while True:
            try:
                self.finish_request(request, client_address)
            except OSError:                 # the client has just reset its connection
                pass
            except Exception as error:      # a fault of ours outside of any request
                self.report_fault(error)
            finally:
                self.shutdown_request(request, network_of(client_address[0]))
            with self.lock:
                self.spare_threads += 1
            try:
                request, client_address = self.clients.get(timeout=SPARE_SECONDS)
            except queue.Empty:
                with self.lock:
                    if self.spare_threads:
                        self.spare_threads -= 1
                        return
                request, client_address = self.clients.get()    # process_request counts on us already

    def refuse_busy(self, request, address):
        """503 at once, from the accepting thread: one write that cannot block, then a linger if there are not too many already."""
        body = json.dumps({"error": error_object(Refusal(503, "server_busy", "Too many clients at once. Try again."))}).encode()
        cors = b"Access-Control-Allow-Origin: *\r\n" if self.settings.any_origin else b""
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
                         b"x-request-id: req_%b\r\nConnection: close\r\n%b\r\n%b" % (len(body), os.urandom(8).hex().encode(), cors, body))
            if len(self.relay_loop.jobs) < 2 * self.cap:
                self.relay_loop.hand_over(Linger(request))
        self.shutdown_request(request, address)

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

    # -- who is connected

    def note_idle(self, handler):
        self.idle[handler] = time.monotonic()

    def note_busy(self, handler):
        """False if the connection was given up meanwhile: one step of a dict's, so without a lock that all would wait for."""
        return self.idle.pop(handler, None) is not None

    def give_up_idle(self, most, age=0):
        """Hang up on up to `most` idle clients, the longest idle first, none whose next request has just come; how many it was."""
        now = time.monotonic()
        silent = (handler for handler, since in self.idle.copy().items() if now - since >= age and not wait(0, handler.client, READ))
        given_up = list(itertools.islice(filter(self.note_busy, silent), most))
        for handler in given_up:
            with contextlib.suppress(OSError):      # it may have just gone by itself
                handler.connection.shutdown(socket.SHUT_RDWR)   # which wakes its thread
        return len(given_up)

    def stop(self):
        """Stop accepting, let running requests end within the grace time, then cut them visibly."""
        self.closing = True
        deadline = time.monotonic() + self.settings.grace
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while True:                     # whoever has been let into the queue counts as accepted
                self.process_request(*self.socket.accept())
        self.socket.close()
        while self.connections and time.monotonic() < deadline:
            self.give_up_idle(self.connections, age=0.5)
            with self.all_done:
                self.all_done.wait(0.1)
        self.relay_loop.stopping = True
        until = time.monotonic() + 1        # for what is cut to be seen cut, and for the last log lines
        while self.connections and time.monotonic() < until:
            time.sleep(0.01)
        self.log.close(max(0.1, until - time.monotonic()))

    # -- how to reach us

    def url(self):
        host, port = self.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
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
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, ValueError, OSError):
        return wanted
    return wanted if hard == resource.RLIM_INFINITY else max(1, min(wanted, (hard - 64) // 2))


def banner(server):
    """What is in force, for the operator, keys masked."""
    settings, upstream = server.settings, server.settings.upstream
    mode = "key hidden (%s)" % settings.keys_shown if settings.hidden else "transparent: callers bring their own key" if upstream.wants_key else "no key needed"
    lines = ["aiproxy %s on %s" % (__version__, server.url()),
             "  upstream     %s, %s%s" % (upstream.shown, mode, ", through the proxy %s" % server.proxy if server.proxy else ""),
             "  client keys  %s" % (", ".join(name for name, _ in settings.client_keys) or "none"),
             "  models       %s" % (", ".join(settings.models_shown) or "all"),
             "  paths        %s" % (", ".join("%s %s" % rule for rule in settings.paths) if settings.paths is not None else "all"),
             "  origins      %s" % ("any" if settings.any_origin else ", ".join(settings.origins) or "none: browsers are refused"),
             "  limits       %d clients, %d bytes a body, %gs to connect, %gs of silence" % (server.cap, settings.max_body, settings.connect_timeout, settings.timeout)]
    warnings = (
        (server.cap < settings.max_connections,
         "the limit of open files leaves room for %d clients, not %d (ulimit -n)" % (server.cap, settings.max_connections)),
        (settings.hidden and settings.open and not settings.client_keys, "AIPROXY_OPEN is set: anyone who can reach this address spends your key"),
        (settings.guarded_by_loopback and settings.any_origin, "AIPROXY_ORIGINS=*: any web page that you open can spend your key"),
        (LOOPBACK.fullmatch(settings.host) and (os.environ.get("PORT") or os.environ.get("FC_SERVER_PORT")),
         "on this platform AIPROXY_HOST=0.0.0.0 is needed to be reached"))
    return "\n".join(lines + ["  warning: " + text for holds, text in warnings if holds])


def check_report(settings):
    """The effective settings for --check, keys masked."""
    values = {name: os.environ.get(name, "").strip() or default for name, default, _ in KNOBS}
    values.update(AIPROXY_KEY="none", CLOUDFLARE_API_TOKEN="none", AIPROXY_PORT=settings.port,
                  AIPROXY_CLIENT_KEYS=", ".join("%s=***" % client for client, _ in settings.client_keys) or "none")
    values["CLOUDFLARE_API_TOKEN" if settings.workers else "AIPROXY_KEY"] = settings.keys_shown
    return "\n".join("%s=%s" % pair for pair in values.items())


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


def stay_on_one_cpu():
    """Where the system lets us. CPython runs one thread at a time; on several CPUs the threads fight over whose turn it is, at every system call.

    Measured on two CPUs with 16 busy clients: 235 microseconds of CPU a request, and 105 on one. For more CPUs, run more copies."""
    if hasattr(os, "sched_setaffinity") and getattr(sys, "_is_gil_enabled", lambda: True)():
        cpus = sorted(os.sched_getaffinity(0))
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {random.choice(cpus)})


def tune_malloc():
    """Where the C library is glibc: give back what starting took, one heap for all threads, and 16 MB of it kept for the next body.

    Measured with held bodies of 1 MB: 2.0 milliseconds of CPU a request where each is given back and cleared anew, 0.8 so. A heap for each of many
    threads would hold many times the memory and hardly be faster, for malloc is called under the interpreter's lock."""
    with contextlib.suppress(ImportError, AttributeError, OSError, TypeError, MemoryError):     # other systems; the last where systemd denies ctypes memory
        import ctypes
        libc = ctypes.CDLL(None)
        for option, value in ((-8, 1), (-3, 4 << 20), (-1, 16 << 20)):      # malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, value)
        libc.malloc_trim(0)


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
            demo = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoProvider)
            demo.key, demo.handle_error = "demo-" + os.urandom(16).hex(), lambda *args: None     # a relay that goes away is nothing to report
            threading.Thread(target=demo.serve_forever, daemon=True).start()
            os.environ.update(AIPROXY_UPSTREAM="http://127.0.0.1:%d" % demo.server_address[1], AIPROXY_KEY=demo.key)
        settings = Settings(os.environ)
    except SettingError as error:
        print("aiproxy: %s" % error, file=sys.stderr)
        return 2
    if "--check" in switches:
        print(check_report(settings))
        return 0
    stay_on_one_cpu()
    tune_malloc()
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


def run(*_):
    """main() as a process: its exit status, without waiting for threads whose streams have been cut."""
    status = main()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys._getframe().f_back:              # a debugger, a profiler or `python -m` has called: an exception would be theirs
        run()
    # CPython keeps the syntax tree of the file that it runs until the file has come to its end: 8 MB, a quarter of all memory.
    # An uncaught exception is such an end, and what happens then is ours to say.
    sys.excepthook = run
    raise RuntimeError("The program goes on in sys.excepthook.")
