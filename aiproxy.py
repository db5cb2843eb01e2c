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
import collections
import errno
import hmac
import http.client
import http.server
import itertools
import json
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
    ("AIPROXY_MAX_BODY", "32MB", "largest request body that is held in memory or sent up with a hidden key (KB, MB, GB)"),
    ("AIPROXY_MAX_CONNECTIONS", "1024", "clients served at once; above it 503"),
    ("AIPROXY_CONNECT_TIMEOUT", "10", "seconds to connect to the upstream, TLS included"),
    ("AIPROXY_TIMEOUT", "600", "seconds of upstream silence, also between events; there is no limit in total"),
    ("AIPROXY_GRACE", "8", "seconds that running requests get at SIGTERM"),
    ("AIPROXY_LOG", "text", "one line per request on stdout: text, json or off"),
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
POOL_SIZE, POOL_SECONDS = 100, 30   # idle upstream connections; below the 60 s after which providers close theirs
LINGER_SECONDS, LINGER_BYTES = 2, 4 << 20   # how long a refused client may go on sending, so that it can read why
HOLD_BYTES, HOLD_SECONDS = 65536, 0.5   # a body this small is read whole before the upstream hears of it
PEEK_BYTES = 65536          # of an error answer, searched for the provider key before it may pass
PIECE = 65536               # bytes moved at a time
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
}
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
        self.first_request = True
        self.reset_on_close = False

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
                self.server.access_log.write(self.record)
        self.close_connection = self.close_connection or self.server.closing

    def start_record(self):
        self.head = self.body = None
        self.method = self.path = self.query = ""
        self.cors = self.cors_fields(None)
        self.head_sent = False
        self.record = Record(self.client_address[0])

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
        self.check_path()                                   # 400 404 405
        if self.method == "OPTIONS" and self.settings.hidden:
            return self.answer(204, [(b"Allow", ", ".join(allowed_methods(self.path, self.settings.paths)).encode())])
        if self.settings.models and self.is_model_list():   # 404
            return self.answer_models()
        prefix = self.read_body()                           # 408 413 415
        if self.model_rules_apply():
            prefix, self.record.model = resolve_model(prefix, self.settings)    # 400 403
        answer = self.open_upstream(prefix)                 # 502 504
        self.relay(answer)

    # -- the head: is it well formed, and do we speak its version and method?

    def check_head(self):
        method, target, major, minor = self.head.start
        self.method, self.record.method = method.decode(), method.decode()
        self.version = min((int(major), int(minor)), (1, 1))
        target = target.decode()
        self.record.path = target.partition("?")[0]
        if major != b"1":
            raise Refusal(505, "version_not_supported", "This proxy speaks HTTP/1.1.")
        for name in ONCE:
            if len(self.head.all(name)) > 1:
                raise Refusal(400, "bad_request", "The field %s stands there twice." % name.decode())
        self.body = request_body(self.head, self.version, self.client)
        self.cors = self.cors_fields(self.head.get(b"origin"))
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
        absolute = re.match(r"https?://([^/?#]*)(.*)", target, re.I)    # RFC 9112 section 3.2.2
        if absolute:
            if host is None or absolute.group(1).encode().lower() != host.lower():
                raise Refusal(400, "bad_request", "The authority in the request target is not the Host field.")
            target = absolute.group(2) if absolute.group(2).startswith("/") else "/" + absolute.group(2)
        self.path, mark, query = target.partition("?")
        self.query = mark + query
        self.record.path = self.path
        if self.path[:1] != "/" or self.path[:2] == "//" or "#" in query or BAD_ESCAPE.search(self.path) or DOT_SEGMENT.search(self.path):
            raise Refusal(400, "bad_request", "The request target is not a plain path: no //, no dot segments, no fragment.")
        expect = self.head.get(b"expect", b"").lower()
        if expect and self.version >= (1, 1) and expect != b"100-continue":
            raise Refusal(417, "expectation_failed", "The only expectation understood is 100-continue.")

    def is_preflight(self):
        return self.method == "OPTIONS" and self.head.get(b"origin") is not None and self.head.get(b"access-control-request-method") is not None

    def answer_about_us(self):
        """/health and /: no key, no upstream call. Models are shown to those who may list them."""
        about = {"status": "healthy", "timestamp": int(time.time())}
        try:
            self.check_host()
            self.check_origin()
            self.check_client_key()
            about["models"] = self.settings.models_shown
        except Refusal:
            pass
        if self.path == "/":
            about = {"name": "aiproxy", "version": __version__, "api": "/v1", "health": "/health",
                     "client_key_needed": bool(self.settings.client_keys or not self.settings.hidden and self.settings.wants_key)}
        self.answer(200, body=about)

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
        self.record.client = name

    # -- for what

    def check_path(self):
        """404 and 405 unless AIPROXY_PATHS lets the path through: exactly the one that is sent up."""
        settings = self.settings
        if settings.hidden:
            self.path = openai_form(self.path)
        if settings.paths is not None:
            methods = allowed_methods(self.path, settings.paths)
            if not methods:
                raise Refusal(404, "not_found", "There is nothing at this path. What may be called is set by AIPROXY_PATHS.")
            if self.method not in methods and not (self.method == "OPTIONS" and settings.hidden):
                raise Refusal(405, "method_not_allowed", "This path takes %s." % ", ".join(methods), Allow=", ".join(methods))
        if settings.upstream.map_path(self.path) is None:
            raise Refusal(404, "not_found", "The upstream's base URL has a path, so only /v1/... can be called.")

    def is_model_list(self):
        return self.method in ("GET", "HEAD") and (self.path == "/v1/models" or self.path.startswith("/v1/models/"))

    def answer_models(self):
        """The allow-list in OpenAI's form, or one entry of it. SDKs send the slashes of an id as %2F."""
        wanted = urllib.parse.unquote(self.path[len("/v1/models/"):])
        items = [{"id": name, "object": "model", "created": self.server.started, "owned_by": "aiproxy"} for name in self.settings.models_shown]
        if not wanted:
            return self.answer(200, body={"object": "list", "data": items})
        for item in items:
            if item["id"] == wanted:
                return self.answer(200, body=item)
        raise Refusal(404, "model_not_found", "The model %s does not exist or you may not use it." % json.dumps(wanted[:200]), param="model")

    def model_rules_apply(self):
        """With a hidden key every POST must name an allowed model; a transparent relay looks at the inference paths only."""
        settings = self.settings
        return bool(settings.models or settings.default_model) and self.method == "POST" and (settings.hidden or self.path in INFERENCE_PATHS)

    def read_body(self):
        """What must be held of the body: all of it for the model rules or if it is small, else its beginning (self.body.done tells)."""
        hold, body = self.model_rules_apply(), self.body
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
            if piece or body.done:
                continue
            if not hold and (held >= HOLD_BYTES or time.monotonic() >= until):
                break
            body.wait(None if hold else until - time.monotonic())
        return b"".join(pieces)

    # -- to the upstream

    def open_upstream(self, prefix):
        """The upstream's answer, its head read. 502 or 504 if there is none; UpstreamFailed never leaves this method."""
        settings = self.settings
        fields = upstream_fields(self.head, settings, self.model_rules_apply())
        request = UpstreamRequest(settings.upstream.url + settings.upstream.map_path(self.path) + self.query, self.method, fields, prefix, self)
        try:
            answer = self.server.opener.open(request, timeout=settings.timeout)
        except UpstreamFailed as failed:
            code, what = failed.args
            self.record.outcome = code
            raise Refusal(504 if code == "upstream_timeout" else 502, code, what, **({"x_should_retry": "false"} if code == "upstream_tls_error" else {}))
        self.record.upstream_status = answer.status
        try:
            if settings.hidden and answer.status >= 400:
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
        self.server.warn("the upstream answered %d and rejected or repeated the provider key" % answer.status)
        raise Refusal(502, "upstream_credentials_rejected", "The upstream rejected the proxy's own credentials. Its operator must mend AIPROXY_KEY.",
                      x_should_retry="false")

    # -- and back

    def relay(self, answer):
        """Send the head of the answer and what is here of its body; the rest is the relay loop's."""
        if answer.status == 101:
            return self.tunnel(answer)
        keep = self.version >= (1, 1) and b"close" not in self.head.tokens(b"connection") and self.body.done and not self.server.closing
        bodiless = answer.body is None
        chunked = not bodiless and answer.body.length is None and self.version >= (1, 1)
        fields = self.downstream_fields(answer)
        if chunked:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif answer.length is not None and answer.status not in (204, 205):
            fields.append((b"Content-Length", b"%d" % answer.length))
        if not keep and not chunked:        # a chunked answer never says so: Node's fetch would take a cut for the end
            fields.append((b"Connection", b"close"))
        stream = Stream(self, answer, chunked)
        try:
            self.start_answer(answer.status, answer.reason, fields, stream.begin())
            self.record.first_byte()
            if not stream.ending:
                self.server.relay_loop.run(stream)
        finally:
            self.record.outcome, self.record.bytes = stream.ending or "client_gone", stream.bytes
            answer.close(reusable=stream.ending == "ok" and self.body.done)
        if stream.ending == "ok":
            self.close_connection = not keep
        else:
            self.reset_on_close = self.version < (1, 1) and answer.length is None     # a plain end would look like the end

    def downstream_fields(self, answer):
        """End-to-end fields as they came, and the few that we add."""
        hidden = self.settings.hidden
        fields = [(name, value) for name, value in answer.head.fields if passes_down(name.lower(), value, answer.dropped, self.settings)]
        if answer.head.get(b"date") is None:                        # RFC 9110 section 6.6.1
            fields.append((b"Date", self.date_time_string().encode()))
        upstream_id = answer.head.get(b"x-request-id") or answer.head.get(b"request-id")
        if upstream_id:
            self.record.id = upstream_id.decode("latin-1")[:200]
        if answer.head.get(b"x-request-id") is None or hidden and any(key in upstream_id for key in self.settings.keys):
            fields.append((b"x-request-id", self.record.id.encode("latin-1")))
        if answer.events:
            fields.append((b"X-Accel-Buffering", b"no"))            # nginx in front would hold events back
            if answer.head.get(b"cache-control") is None:
                fields.append((b"Cache-Control", b"no-cache"))
        return fields + self.cors + self.expose(name for name, _ in fields)

    def tunnel(self, answer):
        """A WebSocket: after the 101, bytes both ways until either side closes."""
        fields = [(name, value) for name, value in answer.head.fields if passes_down(name.lower(), value, answer.dropped, self.settings)]
        self.start_answer(101, answer.reason, fields + [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")] + self.cors, b"")
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

    def answer(self, status, fields=(), body=None, outcome="ok"):
        """An answer of our own; `body` goes out as JSON. The connection lives on if the request was read to its end."""
        content = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        keep = outcome == "ok" and self.version >= (1, 1) and b"close" not in self.head.tokens(b"connection") and self.body.done
        lines = list(fields) + [(b"Date", self.date_time_string().encode()), (b"x-request-id", self.record.id.encode())]
        lines += self.cors + self.expose(name for name, _ in lines)
        if body is not None:
            lines.append((b"Content-Type", b"application/json"))
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
        self.version = getattr(self, "version", (1, 1))
        kind = "rate_limit_error" if refusal.status == 429 else "invalid_request_error" if refusal.status < 500 else "server_error"
        error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
        outcome = self.record.outcome or refusal.code
        try:
            self.answer(refusal.status, refusal.fields, {"error": error}, outcome)
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

    def hang_up(self):
        """Give up an idle connection from another thread, which wakes our own, unless a request has just arrived."""
        try:
            if not self.client.wait_readable(0):
                self.connection.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):
            pass                            # it has closed by itself meanwhile

    def finish(self):
        """Close as the answer needs it: a reset for a cut HTTP/1.0 answer, a linger where bytes are still coming, else at once."""
        if self.reset_on_close:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self.head_sent and not self.client.ended and (self.client.buffer or self.body is None or not self.body.done or self.client.receive()):
            self.server.relay_loop.linger(socket.socket(fileno=self.connection.detach()))
        self.client.close()
        self.server.forget(self)


# ---- Who is asking: client keys and origins ------------------------------------------------------------------------


def carried_keys(head):
    """The different keys that a request carries, as a set of bytes; `openai-insecure-api-key.KEY` is how browsers' WebSockets do it."""
    keys = {head.get(name) for name in KEY_FIELDS[1:]}
    scheme, _, credential = head.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        keys.add(credential.strip())
    for protocol in head.elements(b"sec-websocket-protocol"):
        if protocol.startswith(b"openai-insecure-api-key."):
            keys.add(protocol.partition(b".")[2])
    return keys - {None, b""}


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


def resolve_model(body, settings):
    """The body to send up and the model that the client named. Only the bytes of the model's value may differ. Refusal 400 or 403."""
    text, members = parse_members(body)
    named = [member for member in members if member[0] == "model"]
    if any(key != "model" and key.casefold() == "model" for key, *_ in members) or len(named) > 1:
        raise Refusal(400, "invalid_model", "The body must hold `model` once, in lower case.", param="model")
    if named:
        _, model, start, end = named[0]
        if not isinstance(model, str) or not model:
            raise Refusal(400, "invalid_model", "`model` must be a string that is not empty.", param="model")
        sent = model
    elif settings.default_model:
        model, sent = settings.default_model, None
        start = end = text.index("{") + 1
    else:
        raise Refusal(400, "missing_model", "Missing required parameter: `model`.", param="model")
    if settings.models and model not in settings.models:
        raise Refusal(403, "model_not_allowed", "Model not allowed. Allowed models are: %s." % ", ".join(settings.models_shown), param="model")
    real = settings.models.get(model, model)
    if real == sent:
        return body, model
    value = json.dumps(real, ensure_ascii=False)
    if sent is None:
        value = '"model": ' + value + (", " if members else "")
    return (text[:start] + value + text[end:]).encode(), model


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
        names = [name for name, *_ in members if name != "model"]
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


def upstream_fields(head, settings, is_json):
    """The header fields of the request to the upstream, Host first, its key last. The client's own key never is among them."""
    dropped = head.tokens(b"connection")        # fields that the client named as meant for this hop
    socket_upgrade = is_websocket(head)
    fields = [(b"Host", settings.upstream.netloc)]
    for name, value in head.fields:
        low = name.lower().replace(b"_", b"-")  # CGI-like servers take Content_Length for Content-Length
        if low in NEVER_UP or low in dropped or low.startswith(NEVER_UP_PREFIXES):
            continue
        if low in KEY_FIELDS and (settings.hidden or settings.client_keys):
            continue
        if low.startswith(b"sec-websocket-") and (socket_upgrade or not settings.hidden):
            if low == b"sec-websocket-protocol" and settings.client_keys:
                value = b", ".join(p for p in head.elements(low) if not p.startswith(b"openai-insecure-api-key."))
        elif settings.hidden and low not in UP_WITH_HIDDEN_KEY:
            continue
        if low == b"accept-encoding" and settings.hidden:   # error answers are searched for the key: only what we can decode
            value = b", ".join(part for part in head.elements(low) if re.match(rb"(?:x-)?gzip|deflate|identity", part)) or b"identity"
        if low == b"content-type" and is_json:
            continue
        fields.append((name, value))
    if is_json:
        fields.append((b"Content-Type", b"application/json"))
    if socket_upgrade:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    if settings.hidden:
        key = next(settings.key_turn)
        fields.append((settings.key_header.encode(), b"Bearer " + key if settings.key_header.lower() == "authorization" else key))
    return fields


def is_websocket(head):
    """RFC 6455 section 4.1. No other upgrade is ever passed on: h2c would be a way around every check."""
    return [token.lower() for token in head.elements(b"upgrade")] == [b"websocket"] and b"upgrade" in head.tokens(b"connection")


def passes_down(name, value, dropped, settings):
    """May this field of the upstream's answer come down?"""
    if name in NEVER_DOWN or name in dropped or name.startswith(b"access-control-"):
        return False
    return not settings.hidden or name not in NEVER_DOWN_WITH_HIDDEN_KEY and not any(key in value for key in settings.keys)


# ---- From where: the upstream, kept alive --------------------------------------------------------------------------


class UpstreamRequest(urllib.request.Request):
    """urllib's request, and what it cannot hold: repeated fields, a body still coming, the client to watch meanwhile."""

    def __init__(self, url, method, fields, prefix, handler):
        super().__init__(url, method=method)
        self.fields, self.prefix = fields, prefix
        self.client, self.body = handler.client, handler.body
        self.bodiless = method == "HEAD"
        self.websocket = is_websocket(handler.head)
        if not self.body.done:
            framing = (b"Transfer-Encoding", b"chunked") if self.body.length is None else (b"Content-Length", b"%d" % self.body.length)
        elif prefix or method in ("POST", "PUT", "PATCH"):
            framing = (b"Content-Length", b"%d" % len(prefix))
        else:
            framing = None
        self.chunked = not self.body.done and self.body.length is None
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
        while self.idle and now - self.idle[0][1] >= POOL_SECONDS:
            try:
                self.idle.popleft()[0].close()
            except IndexError:
                return

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
            raise UpstreamFailed("upstream_tls_error", "The upstream's certificate cannot be trusted: %s." % error.verify_message)
        except ssl.SSLError as error:
            connection.close()
            raise UpstreamFailed("upstream_tls_error", "The upstream does not speak TLS as it should (%s)." % (error.reason or "handshake failed"))
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            raise UpstreamFailed("upstream_unreachable", "The upstream cannot be reached: %s." % (getattr(error, "strerror", None) or type(error).__name__))
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
                    sent = wire.send_some(data)
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
        while wire.buffer.startswith((b"HTTP/1.1 10", b"HTTP/1.0 10")) and b"\r\n\r\n" in wire.buffer:
            wire.buffer = wire.buffer.partition(b"\r\n\r\n")[2]
        return data == b"" or bool(wire.buffer)


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
                if self.status >= 200 or self.status == 101 and request.websocket:
                    break
                if self.status == 101:
                    raise BadHead(502, "it switched protocols unasked")
            else:
                raise BadHead(502, "it sent interim answers only")
            self.body = answer_body(self.head, self.status, request.bodiless)
        except BadHead as bad:
            raise UpstreamFailed("upstream_bad_response", "The upstream's answer cannot be read: %s" % bad.args[0])
        self.length = self.body.length if self.body else content_length(self.head) if request.bodiless or self.status == 304 else None
        self.dropped = self.head.tokens(b"connection")
        self.reusable = minor != b"0" and b"close" not in self.dropped
        kind = self.head.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.events = kind == b"text/event-stream"
        self.coded = self.head.get(b"content-encoding", b"identity").lower() != b"identity"

    def more(self):
        """Wait for more of the head, the client in view."""
        while True:
            ready = wait(self.timeout, (self.wire, READ), (self.client, READ if self.client.watched else 0))
            if not ready:
                raise socket.timeout()
            if self.client in ready:
                self.client.notice()
            if self.wire in ready:
                if not self.wire.fill():
                    raise ConnectionResetError()
                return

    def peek(self, size):
        """Up to `size` decoded bytes of the body, kept in `held` to be relayed; gzip and deflate are undone for the look."""
        body = self.body
        while body is not None and not body.done and not body.broken and len(self.held) < size:
            if not self.wire.buffer:
                try:
                    self.more()
                except OSError:             # the relay will meet the same end, and tell the client
                    break
            data, self.wire.buffer = self.wire.buffer, b""
            self.held += body.feed(data)
        for form in (47, -15) if self.coded else ():    # zlib's own words: gzip or zlib; deflate without its wrapper, as some send it
            try:
                return zlib.decompressobj(form).decompress(self.held, size * 8)
            except zlib.error:
                pass
        return self.held

    def close(self, reusable=False):
        """Give the connection back if the exchange came to its clean end, else close it: the upstream stops working for us."""
        spent = self.body is None or self.body.done and not self.body.surplus
        if reusable and self.reusable and spent and not self.wire.buffer:
            self.pool.keep(self.connection)
        else:
            self.connection.close()


# ---- The relay loop ------------------------------------------------------------------------------------------------


class RelayLoop(threading.Thread):
    """One thread that moves the bodies of all running answers and watches their clients; the handlers sleep meanwhile.

    A thread for each stream would cost three times the CPU for each event. Nothing in here may block: what a client cannot
    take is kept (one piece), and its upstream is not read until it is gone.
    """

    def __init__(self, every_second):
        super().__init__(daemon=True, name="relay-loop")
        self.selector = selectors.DefaultSelector()
        self.jobs, self.inbox, self.every_second, self.stopping = set(), collections.deque(), every_second, False
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
                self.guard(self.every_second, now)

    def guard(self, step, *args):
        """A fault in one job ends that job, not the loop that all share."""
        try:
            step(*args)
        except Exception as error:
            job = getattr(step, "__self__", None)
            print("aiproxy: fault in the relay loop: %s" % fault_place(error), file=sys.stderr, flush=True)
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
        self.pending, self.tail = b"", b"\n\n"

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
        if self.tells and body:
            self.tail = (self.tail + body)[-4:]
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
        self.send_down(self.cut("shutdown"))
        self.finish("shutdown")

    def on_tick(self, now):
        if self.pending:
            if now - self.taken > STALL_SECONDS:
                self.finish("client_stalled")
        elif now - self.heard > self.timeout:
            self.send_down(self.cut("upstream_timeout"))


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
    wires = {wire.fd: wire for wire, mask in wants if mask}
    for wire, mask in wants:
        if mask & READ and wire.pending():
            return [wire]
    if not hasattr(select, "poll"):         # Windows
        readable, writable, _ = select.select([w.sock for w, m in wants if m & READ], [w.sock for w, m in wants if m & WRITE], [], max(0, timeout))
        return [wires[sock.fileno()] for sock in {*readable, *writable}]
    poll = select.poll()
    for wire, mask in wants:
        if mask:
            poll.register(wire.fd, (select.POLLIN if mask & READ else 0) | (select.POLLOUT if mask & WRITE else 0))
    return [wires[fd] for fd, _ in poll.poll(max(0, timeout) * 1000)]


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
            block = self.buffer if end < 0 else self.buffer[:end]
            if end < 0 or end > MAX_LINE:
                check_begun(block, first_line)
            if end >= 0:
                self.buffer = self.buffer[end + 4:]
                return parse_head(block, first_line)
            searched = len(self.buffer)
            more()

    def close(self):
        self.sock.close()


def check_begun(block, first_line):
    """BadHead if the beginning of a head is already beyond saving, so that nobody waits for an end that may never come."""
    line, newline, _ = block.partition(b"\r\n")
    if len(line) > MAX_LINE:
        raise BadHead(414, "The first line is longer than %d bytes." % MAX_LINE)
    if newline and not first_line.fullmatch(line):
        raise BadHead(400, "The first line is malformed.")
    if re.search(rb"(?<!\r)\n", block):
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
    head = Head(start.groups())
    for line in lines[1:]:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise BadHead(400, "A header field is malformed.")
        if len(line) > MAX_LINE:
            raise BadHead(431, "A header field is longer than %d bytes." % MAX_LINE)
        head.add(field.group(1), field.group(2).strip(b" \t"))
    return head


class Head:
    """A start line's parts and the fields, as bytes: in the order and the spelling in which they came, and by lower-case name."""

    __slots__ = ("start", "fields", "by_name")

    def __init__(self, start):
        self.start, self.fields, self.by_name = start, [], {}

    def add(self, name, value):
        self.fields.append((name, value))
        self.by_name.setdefault(name.lower(), []).append(value)

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
    if len(values) > 1 or not re.fullmatch(rb"[0-9]{1,18}", values[0]):
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
                raise SettingError("%s: %s; it takes %s" % (name, got, str(error) if " " in str(error) and secret else takes))

        self.host = read("AIPROXY_HOST", parse_name, "an address or a host name")
        self.port = read(next((name for name in ("AIPROXY_PORT", "PORT", "FC_SERVER_PORT") if environ.get(name, "").strip()), "AIPROXY_PORT"),
                         lambda text: parse_number(text, int, 0, 65535), "a port number, 0 to 65535")
        self.upstream = read("AIPROXY_UPSTREAM", Upstream, "one of %s, or a base URL such as https://host or https://host/v1, without "
                             "user info, query or fragment" % ", ".join(PROVIDERS), secret="@" in environ.get("AIPROXY_UPSTREAM", ""))
        self.keys = read("AIPROXY_KEY", parse_keys, "", secret=True)
        self.hidden, self.key_turn = bool(self.keys), itertools.cycle(self.keys)
        self.key_header = read("AIPROXY_KEY_HEADER", parse_field_name, "a header field's name") or self.upstream.key_header
        self.wants_key = self.upstream.wants_key
        self.client_keys = read("AIPROXY_CLIENT_KEYS", parse_client_keys, "", secret=True)
        self.models = read("AIPROXY_MODELS", parse_models, "names, comma-separated, each model or alias=model")
        self.default_model = read("AIPROXY_DEFAULT_MODEL", parse_name, "one model's name")
        self.paths = read("AIPROXY_PATHS", parse_paths, "PATH, METHOD PATH or * PATH, comma-separated, or * alone")
        self.origins = read("AIPROXY_ORIGINS", parse_origins, "* or origins, comma-separated, exactly as browsers send them: https://app.example, without a path")
        self.open = read("AIPROXY_OPEN", parse_switch, "1, true, yes, on or 0, false, no, off")
        self.max_body = read("AIPROXY_MAX_BODY", parse_size, "a size such as 32MB")
        self.max_connections = read("AIPROXY_MAX_CONNECTIONS", lambda text: parse_number(text, int, 1, 1000000), "a number from 1")
        self.connect_timeout = read("AIPROXY_CONNECT_TIMEOUT", lambda text: parse_number(text, float, 0.001, 86400), "seconds, more than 0")
        self.timeout = read("AIPROXY_TIMEOUT", lambda text: parse_number(text, float, 0.001, 86400), "seconds, more than 0")
        self.grace = read("AIPROXY_GRACE", lambda text: parse_number(text, float, 0, 86400), "seconds")
        self.log = read("AIPROXY_LOG", lambda text: parse_choice(text, ("text", "json", "off")), "text, json or off")
        self.models_shown = list(self.models)
        if self.hidden and self.paths is None:
            self.paths = [("POST", path) for path in self.upstream.paths] + [("GET", "/v1/models"), ("GET", "/v1/models/*")]
        must_present = bool(self.client_keys) or not self.hidden and self.wants_key
        self.any_origin = "*" in self.origins or not self.origins and must_present
        self.guarded_by_loopback = self.hidden and not self.client_keys and not self.open
        self.check_safe()

    def check_safe(self):
        """SettingError for a combination that would be open by accident, or cannot work."""
        if self.guarded_by_loopback and not LOOPBACK.fullmatch(self.host):
            raise SettingError("AIPROXY_KEY is hidden and AIPROXY_HOST=%s lets others reach it, but no client key is asked for. Set one of:\n"
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
        return list(self.keys) + [key for _, key in self.client_keys]


class Upstream:
    """Where requests go: a row of PROVIDERS or a base URL. ValueError if it is neither."""

    def __init__(self, text):
        url, self.key_header, self.paths = PROVIDERS.get(text.lower(), (text, None, None))
        parts = urllib.parse.urlsplit(url)
        clean = re.fullmatch(r"https?://[^/?#@\s\\]+(/[A-Za-z0-9._~/-]*)?", url, re.I)
        if not clean or not parts.hostname or "//" in parts.path or DOT_SEGMENT.search(parts.path):
            raise ValueError()
        host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
        self.scheme, self.host = parts.scheme, host
        self.port = parts.port or {"https": 443, "http": 80}[parts.scheme]
        self.loopback = LOOPBACK.fullmatch(host) is not None
        self.base = parts.path.rstrip("/")
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


PLACEHOLDER = re.compile(r"<.*>|.*(your|my).{0,20}key.*|.*api[-_ ]?key.*|.*你的.*|(sk-)?(x{3,}|\.{3,}|\*{3,}|…)|change[-_ ]?me|replace[-_ ]?me|placeholder|todo|none|null", re.I)


def parse_list(text):
    return [item.strip() for item in text.split(",") if item.strip()]


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
        self.status = self.upstream_status = self.first = None
        self.bytes, self.outcome = 0, ""
        self.begin()

    def begin(self):
        self.began = time.monotonic()

    def first_byte(self):
        self.first = self.first or time.monotonic() - self.began

    def as_dict(self):
        return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "client": self.client, "method": self.method, "path": self.path[:256],
                "model": self.model[:100], "status": self.status, "upstream_status": self.upstream_status,
                "first_byte": self.first and round(self.first, 4), "total": round(time.monotonic() - self.began, 4), "bytes": self.bytes,
                "request_id": self.id, "outcome": self.outcome or "client_gone"}


class AccessLog(threading.Thread):
    """One line per request on stdout, written by a thread of its own: a reader that stalls must not stall requests."""

    def __init__(self, form, secrets):
        super().__init__(daemon=True, name="access-log")
        self.form, self.secrets, self.lines, self.lost = form, [key.decode() for key in secrets], queue.Queue(10000), 0

    def write(self, record):
        if self.form == "off":
            return
        record = record.as_dict()
        if self.form == "json":
            line = json.dumps(record)
        else:
            line = ("{time} {client} {method} {path} {model} {status} upstream={upstream_status} first={first_byte}s total={total}s bytes={bytes} "
                    "id={request_id} {outcome}").format(**{name: printable(value) for name, value in record.items()})
        for secret in self.secrets:         # a client may put its key into a path or a model's name
            line = line.replace(secret, "***")
        try:
            self.lines.put_nowait(line + "\n")
        except queue.Full:
            self.lost += 1

    def run(self):
        while True:
            lines = [self.lines.get()]
            while len(lines) < 1000 and not self.lines.empty():
                lines.append(self.lines.get())
            if self.lost:
                lines.append("(%d lines lost: nobody read them in time)\n" % self.lost)
                self.lost = 0
            try:
                sys.stdout.write("".join(lines))
                sys.stdout.flush()
            except (OSError, ValueError):
                pass                        # nobody listens any more
            for _ in lines:
                if self.lines.unfinished_tasks:
                    self.lines.task_done()


def printable(value):
    """A value as one word of a log line: nothing in it can end the line, start another field or move a terminal's cursor."""
    if value is None or value == "":
        return "-"
    text = str(value)
    return text if re.fullmatch(r"[\x21-\x7e]+", text) else json.dumps(text).replace(" ", "\\u0020").replace("\x7f", "\\u007f")


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
        self.lock, self.idle, self.handlers, self.connections = threading.Lock(), {}, set(), 0
        self.all_done = threading.Condition(self.lock)
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        self.address_family = family
        self.access_log = AccessLog(settings.log, settings.secrets())
        self.upstreams = KeepAliveHandler(settings)
        self.relay_loop = RelayLoop(self.upstreams.close_old)
        self.opener, self.proxy = build_opener(settings, self.upstreams)
        self.cap = cap_connections(settings.max_connections)
        super().__init__(address[:2] if family == socket.AF_INET else address, Handler)
        self.access_log.start()
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
        with self.lock:
            room = self.connections < self.cap
            self.connections += 1
            evicted = None if room or not self.idle else next(iter(self.idle))
            if evicted:
                del self.idle[evicted]
        if evicted:
            evicted.hang_up()
        elif not room:
            return self.refuse_busy(request)
        return super().process_request(request, client_address)

    def refuse_busy(self, request):
        with self.lock:
            self.connections -= 1
        error = {"error": {"message": "Too many clients at once. Try again.", "type": "server_error", "param": None, "code": "server_busy"}}
        body = json.dumps(error).encode()
        cors = b"Access-Control-Allow-Origin: *\r\n" if self.settings.any_origin else b""
        try:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
                         b"x-request-id: req_%b\r\nConnection: close\r\n%b\r\n%b" % (len(body), os.urandom(8).hex().encode(), cors, body))
        except OSError:
            return request.close()
        self.relay_loop.linger(request) if len(self.relay_loop.jobs) < 2 * self.cap else request.close()

    def shutdown_request(self, request):
        """Handler.finish has closed it, or given it to the relay loop."""

    def handle_error(self, request, client_address):
        self.report_fault(sys.exc_info()[1])

    def report_fault(self, error):
        self.warn("fault: " + fault_place(error))

    def warn(self, text):
        print("aiproxy: " + text, file=sys.stderr, flush=True)

    # -- who is connected

    def note_idle(self, handler):
        with self.lock:
            self.idle[handler] = time.monotonic()

    def note_busy(self, handler):
        """False if the connection was given up meanwhile."""
        with self.lock:
            return self.idle.pop(handler, None) is not None

    def forget(self, handler):
        with self.all_done:
            self.idle.pop(handler, None)
            self.connections -= 1
            self.all_done.notify_all()

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
        with self.all_done:
            while self.connections and time.monotonic() < deadline:
                now = time.monotonic()
                for handler in [h for h, since in self.idle.items() if now - since > 0.5]:
                    del self.idle[handler]
                    handler.hang_up()
                self.all_done.wait(min(0.1, max(0, deadline - now)))
        self.relay_loop.stopping = True
        until = time.monotonic() + 1        # for what is cut to be seen cut, and for the last log lines
        while (self.connections or self.access_log.lines.unfinished_tasks) and time.monotonic() < until:
            time.sleep(0.01)

    # -- how to reach us

    def reachable_address(self):
        host, port = self.server_address[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port

    def url(self):
        host, port = self.reachable_address()
        return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)

    def curl(self, model):
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self.settings.client_keys or not self.settings.hidden and self.settings.wants_key else ""
        path = self.settings.upstream.paths[0]
        return ("curl -N %s%s%s -H 'Content-Type: application/json' \\\n  -d '{\"model\": \"%s\", \"stream\": true, \"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'"
                % (self.url(), path, key, model))


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
             "  upstream     %s%s, %s%s" % (upstream.url, upstream.base, mode, ", through the proxy %s" % server.proxy if server.proxy else ""),
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
        if name == "AIPROXY_KEY":
            value = masked(settings.keys)
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
    server.serve_forever(0.5)
    server.stop()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)                        # not waiting for threads whose streams have been cut
