#!/usr/bin/env python3
# coding: utf-8
"""aiproxy: one file between people's programs and an AI provider. It hides the provider key.

    client --- request ---------> Handler: read it strictly, check it   --- request --> upstream
    client <-- response head ---- Handler: wait, watching the client    <-- head ------ upstream
    client <-- response body ---- RelayLoop: move what has arrived      <-- events ---- upstream

Begin with `Handler.answer_request`, the steps of every request. Then start at `Server` and scroll
down: part one stands in the order in which a request meets it. Only the lowest layer, HTTP on the
wire, comes late, because everything uses it. Part two holds what can be taken out, each section
entered at one place, most of them through the hooks of `Service`.

    Part one   Settings and limits . Tables . Server . Handler . The checks .
               The request's body . Header fields up and down . The upstream . The relay loop .
               HTTP on the wire . The log . Reading the settings . Main
    Part two   Command line . Quotes and empty values . Env files . Placeholders .
               Values from files . Review of the settings . Reload . HTTPS . Health .
               Another key header . Keys in URLs . Patterns of paths . Forgiving paths . CORS .
               Room for clients . Lingering close . Refusals in the right form .
               Keys in long errors . Redirects . Rates . Trusted proxies . Body rules .
               Model rules . Model list . Token and prompt limits . Several provider keys .
               Kept connections . TLS errors in words . Proxies on the way up .
               Fields for the upstream . Early responses . Event streams .
               Errors in the form of other APIs . Heartbeats . Log lines as text . Raw output .
               Queued log . Model names for the log . Token counts . Early hints . WebSocket .
               More providers . Banner . A live check . Several processes .
               Tuning of the process . Open files . Responses made of chat . Workers AI .
               Start page . Demo

Words. Client: whoever calls us. Upstream: the provider we call. Client key: one that we gave out.
Provider key: the one that we hide. Origin: only in CORS's sense. Event: one block of a
text/event-stream. Chunk: a piece of HTTP's chunked coding.

Threads, and who owns which buffer when:

    main           accepts clients, hangs up on idle ones for room, ends all after a signal
    client thread  one for each connection: reads and checks the request, sends it up, reads the
                   head of the response; owns both sockets and their buffers meanwhile
    relay loop     moves the bodies of all responses and watches their clients; owns both sockets
                   from `submit` until the job's `end_event`, and a lingering close to its end
    log            one each for stdout and stderr, if the log is queued: writes what the others
                   put into its queue

Ten rules, each with its reason. A learner should be able to give the reasons back.

 1. Read what is there, not `read(n)`. `read(4096)` waits for 4096 bytes or the end, and so holds
    back every event of a stream until it is over. (`BufferedSocket.receive`)
 2. Never follow a redirect: it would carry the provider key to whatever host the upstream names.
    (`Service.opener` has no handler for them)
 3. Compare keys with `compare_digest`, as bytes, and with all of them. A comparison that stops at
    the first difference tells by its time how much of a guess was right (timing attack); as text,
    a key that is not ASCII would raise. (`check_client_key`)
 4. Drop hop-by-hop fields, both ways: they speak of one connection, and we have two. (`HOP_BY_HOP`)
 5. Never end a cut response cleanly. Without the last chunk, or with too few bytes, the client
    sees that something is missing; half an answer must not look like a whole one.
    (`ResponseJob.next_bytes`, `Handler.finish`)
 6. Parse strictly, JSON and HTTP alike, and refuse what can be read in two ways. If the upstream
    reads `{"model": "a", "model": "b"}` otherwise than we do, our check was for nothing; with two
    lengths it is request smuggling. (`parse_head`, `declares_chunks`; in part two: `parse_object`)
 7. Watch the client while the upstream is silent. A socket that is readable and yields no byte has
    been closed, at least for sending: we take that for a disconnect, also before the first byte,
    and stop paying for the answer. (`wait_for_upstream`, `read_from_client`)
 8. Send a request again only if (a) a kept connection was closed under it, and it took no byte of
    it or the request is one that may be repeated; or (b) it refused our key, and there is another.
    Anything else might be done, and paid, twice. (In part two: `try_kept`, `KeyRotation`)
 9. Give every wait a limit: 30 s for a head (slowloris), a minimum data rate for a body, 60 s for a
    client that moves nothing. Hold one piece at most for a slow client: not reading its upstream
    meanwhile is back-pressure. (`read_more_head`, `Pace`, `ResponseJob`)
10. Search all heads and the bodies of errors that come down for the provider key: an upstream may
    repeat the one that it rejects. (`Exchange.drop_fields_with`, `check_for_key`)

RFC 9110 is what HTTP means, RFC 9112 how HTTP/1.1 looks on the wire.
"""
import sys

# Python 3.5 must be able to compile the whole file, or its users get a SyntaxError instead.
if sys.version_info < (3, 8):
    sys.exit("aiproxy needs Python 3.8 or newer, and this is %d.%d" % sys.version_info[:2])

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import difflib
import email.utils
import errno
import functools
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import mmap
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import ssl
import struct
import threading
import time
import traceback
import urllib.parse
import urllib.request

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

__version__ = "1.0"

# ==== Part one: the relay =========================================================================
# Whoever takes out a section of part two takes out the lines that name it, `part two: NAME`. Where
# such a line changes a name, the line before it shows what holds without the section.

# ---- Settings and limits -------------------------------------------------------------------------
# What an operator may change. An environment variable of the same name overrides the constant, and
# `--help` says more about each. Everything is text here, as it would be in the environment; empty
# is the same as not set.

# The four that everybody sets first.
AIPROXY_UPSTREAM = "openai"     # a provider's name (see PROVIDERS) or a base URL
AIPROXY_KEY = ""                # the provider key; empty: callers bring their own
AIPROXY_MODELS = ""             # the models allowed, comma-separated; empty: all
AIPROXY_CLIENT_KEYS = ""        # the keys that clients must present, comma-separated

# Who may call, and for what.
AIPROXY_KEY_HEADER = ""         # the field that carries the provider key; empty: by provider
AIPROXY_UPSTREAM_HEADERS = ""   # more header fields for the upstream: Name: value; Name: value
AIPROXY_DEFAULT_MODEL = ""      # the model of a request that names none
AIPROXY_PATHS = ""              # what may be called; empty: by mode
AIPROXY_ORIGINS = ""            # the browser origins allowed; empty: by mode
AIPROXY_OPEN = ""               # 1: serve a hidden key to anybody, knowingly

# Where to listen.
AIPROXY_HOST = "127.0.0.1"      # an address or a host name
AIPROXY_PORT = "8000"           # a port number
AIPROXY_TLS_CERT = ""           # a PEM file with the certificate chain; empty: plain HTTP
AIPROXY_TLS_KEY = ""            # a PEM file with its key; empty: it stands in that of the chain
AIPROXY_TRUSTED_PROXIES = "loopback"    # whose X-Forwarded-For is believed

# How much, and for how long.
AIPROXY_RATE = ""               # requests of one client: 20/s, 60/min, 100/h, 1000/day
AIPROXY_MAX_TOKENS = ""         # output tokens of a request
AIPROXY_MAX_CHARS = ""          # characters of prompt text in a request
AIPROXY_MAX_BODY = "32MB"       # bytes of a request's body
AIPROXY_MAX_CONNECTIONS = "1024"  # clients served at once
AIPROXY_MAX_PER_CLIENT = "256"  # connections from one client address
AIPROXY_WORKERS = "1"           # processes, each on a CPU of its own; auto: one for each CPU
AIPROXY_CONNECT_TIMEOUT = "10"  # seconds to connect to the upstream
AIPROXY_TIMEOUT = "600"         # seconds of upstream silence
AIPROXY_HEARTBEAT = "0"         # seconds between comments in a silent event stream; 0: none
AIPROXY_GRACE = "8"             # seconds that running requests get at SIGTERM
AIPROXY_LOG = "text"            # text, json or off

# For Cloudflare Workers AI.
CLOUDFLARE_ACCOUNT_ID = ""
CLOUDFLARE_API_TOKEN = ""
CLOUDFLARE_API_BASE_URL = "https://api.cloudflare.com/client/v4"

# Limits that nobody needs to change: seconds, bytes and numbers, each with its reason.
HEAD_SECONDS = 30       # for a whole head, from its first byte or from connecting (slowloris)
BODY_GRACE = 30         # seconds in which a request's body may be as slow as it likes
BODY_RATE = 1024        # bytes a second that it must reach after that: the minimum data rate,
                        # also of a client that is behind with its response
IDLE_SECONDS = 910      # for the next request: load balancers keep connections for 15 minutes
STALL_SECONDS = 60      # for a client that moves no byte of a body: nginx's limit, both ways
CUT_SECONDS = 0.1       # a browser may drop the last bytes if the connection's end is with them
SHUTDOWN_SECONDS = 1    # for cut responses to be seen cut, once the grace time is over

MAX_FIELDS = 100        # header fields: what Apache allows
MAX_LINE = 16384        # bytes of a first line or a header field
MAX_HEAD = 65536        # bytes of a head
MAX_CHUNK_LINE = 4096   # bytes of a chunk's size line with its extensions
MAX_TRAILER = 8192      # bytes of all trailer lines
MAX_INTERIM = 100       # 1xx interim responses before the real one

READ_SIZE = 65536       # bytes that are read at a time
FIRST_SEND = 16384      # bytes of the first write: one TLS record, which goes whole or not at all
PREFETCH_BYTES = 65536  # of a request's body before we connect; of an error's, searched for our key
PREFETCH_SECONDS = 0.5  # that either is waited for
MAX_PIPELINED_BYTES = 65536     # of a next request that are read while a response is running

TICK_SECONDS = 0.5      # between two looks at the time limits of all responses
LISTEN_QUEUE = 1024     # clients that wait to be accepted: a burst must not be lost
SPARE_FILES = 64        # open files that are not for clients: modules, certificates, the log

# ---- Tables: what the protocols and the providers fix --------------------------------------------

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
INFERENCE_PATHS = OPENAI_PATHS + ANTHROPIC_PATHS

Provider = collections.namedtuple("Provider", (
    "base_url",         # as the provider's SDK has it: a path in it takes the place of /v1
    "key_header",       # the field that carries its key; empty: it wants none
    "paths",            # its inference paths
    "key_variable",     # the setting that holds its key, one of OPTIONS
    "max_chars",        # the default of AIPROXY_MAX_CHARS
    "prepare",          # called with the settings, for one that needs more than the usual ones
    "handler",          # a Handler of its own, for an API that must be translated
), defaults=("Authorization", OPENAI_PATHS, "AIPROXY_KEY", 0, None, None))

PROVIDERS = {   # To add a provider, add a row with a lower-case name. Part two adds many.
    "openai": Provider("https://api.openai.com"),
    "deepseek": Provider("https://api.deepseek.com"),
    "anthropic": Provider("https://api.anthropic.com", "x-api-key", ANTHROPIC_PATHS),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai"),
    "ollama": Provider("http://127.0.0.1:11434", key_header=""),
}

# Where a client may carry its key, besides Authorization.
API_KEY_FIELDS = (b"x-api-key", b"api-key", b"x-goog-api-key")

# Meant for one connection alone (RFC 9110 section 7.6.1). `Trailer` announces what we drop; the
# last one belongs to the upgrade to HTTP/2, which would be a way around every check.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade "
    b"proxy-authenticate proxy-authorization http2-settings".split())

# Host, framing and Expect are ours to write or to answer; the rest tells who the caller is.
DROPPED_REQUEST_FIELDS = HOP_BY_HOP | frozenset(
    b"host content-length expect forwarded x-real-ip x-client-ip true-client-ip via cdn-loop proxy "
    b"cf-connecting-ip cf-ipcountry cf-ray cf-visitor cf-worker cf-ew-via x-amzn-trace-id "
    b"cookie origin referer".split())
DROPPED_REQUEST_PREFIXES = (
    b"x-forwarded-", b"x-fc-", b"x-vercel-", b"fly-", b"sec-fetch-", b"sec-ch-")

# Where a key of ours is at stake only these go up: what the call needs, nothing of the caller.
ALLOWED_REQUEST_FIELDS = frozenset(
    b"content-type content-encoding accept user-agent idempotency-key openai-beta "
    b"anthropic-version anthropic-beta x-session-affinity".split())

# About the upstream's own connection, host or browser session; the length is ours to write.
DROPPED_RESPONSE_FIELDS = HOP_BY_HOP | frozenset(
    b"content-length set-cookie alt-svc strict-transport-security nel report-to".split())
# With a provider key these go, too: they name the account.
DROPPED_ACCOUNT_FIELDS = DROPPED_RESPONSE_FIELDS | {
    b"server", b"openai-organization", b"openai-project", b"anthropic-organization-id"}

# A repeated one would be ambiguous.
SINGLETON_FIELDS = (b"host", b"content-length", b"transfer-encoding", b"content-type",
                    b"authorization", b"origin")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
READ_METHODS = ("GET", "HEAD")
NEVER_METHODS = ("TRACE", "CONNECT")

# RFC 9110 section 5.6.2, RFC 9112 sections 3, 4, 5 and 7.1. No folding, no bare CR or LF.
TOKEN = br"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
TEXT = br"[\t\x20-\x7e\x80-\xff]*"
REQUEST_LINE = re.compile(
    br"(" + TOKEN + br") ([\x21-\x3e\x40-\x7e]+)(\?[\x21-\x7e]*)? HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(br"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: (" + TEXT + br"))?")
FIELD_LINE = re.compile(br"(" + TOKEN + br"):(" + TEXT + br")")
FIELD_LINES = re.compile(br"\r\n" + FIELD_LINE.pattern + br"(?=\r\n|\Z)")
CHUNK_LINE = re.compile(br"([0-9A-Fa-f]{1,16})(?:[ \t]*;" + TEXT + br")?")
CHUNK_LINE_START = re.compile(
    br"(?:[0-9A-Fa-f]{1,16}(?:[ \t]*(?:;" + TEXT + br")?)?)?\r?")
BARE_LF = re.compile(br"(?<!\r)\n")
LAST_CHUNK = b"0\r\n\r\n"

# RFC 9112 section 3.2.2, RFC 9110 section 7.2.
ABSOLUTE_FORM = re.compile(r"https?://([^/#]*)(.*)", re.I)
HOST = re.compile(br"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK = re.compile(
    r"localhost|127(?:\.[0-9]{1,3}){3}|\[?::(?:1|ffff:127(?:\.[0-9]{1,3}){3})\]?", re.I)
LOOPBACK_HOST = re.compile(br"(?:%b)(?::[0-9]*)?" % LOOPBACK.pattern.encode(), re.I)

# Where a proxy in front tells for whom it asks; in CDN-Loop a CDN names itself.
FORWARDED_FIELDS = frozenset(
    b"forwarded x-forwarded-for x-real-ip x-client-ip true-client-ip cf-connecting-ip "
    b"cdn-loop".split())

# A segment `.` or `..`, however it is encoded: RFC 3986 section 5.2.4 makes another path of it.
SEPARATOR = r"(?:[/\\]|%(?:25)*(?:2f|5c))"
DOT_SEGMENT = re.compile(
    r"(?:^|" + SEPARATOR + r")(?:\.|%(?:25)*2e){1,2}(?:" + SEPARATOR + r"|;|%(?:25)*3b|$)", re.I)
BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00|\\|#")

NO_RETRY = (b"x-should-retry", b"false")        # the SDKs retry 5xx unless a header forbids it
JSON_TYPE = (b"Content-Type", b"application/json")
OP_IGNORE_UNEXPECTED_EOF = 0x80     # OpenSSL's number; the ssl module names it since 3.10
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
# POLLIN, POLLOUT, where there is poll; 0: the peer has hung up (Linux' number of POLLRDHUP).
POLL_EVENTS = {0: 0x2000 * (sys.platform == "linux"), READ: 1, WRITE: 4, READ | WRITE: 5}


class ErrorResponse(Exception):
    """An error of our own: the one kind of failure that a client gets to read."""

    def __init__(self, status, code, message, param=None, headers=()):
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = list(headers)        # more fields for it: pairs of bytes


class ProtocolError(Exception):
    """A peer broke the rules of HTTP. The caller makes a 400, a 502 or a cut response of it."""

    def __init__(self, message, status=400):
        super().__init__(message)
        self.message = message
        self.status = status                # that a client would get for it


class ClosedEarly(ConnectionError):
    """A peer closed the connection in the middle of a message."""

    def __init__(self):
        super().__init__("it closed the connection early")


class TimedOut(OSError):
    """A limit of ours has passed. (Since 3.10 socket.timeout is the kernel's ETIMEDOUT, too.)"""


class ClientGone(Exception):
    """The client has left, or takes nothing: nobody is left to answer. `outcome` is for the log."""

    def __init__(self, outcome="client_gone"):
        super().__init__(outcome)
        self.outcome = outcome

# ---- Server: accepting clients -------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    """The listener, and what all clients share: the service, the relay loop, the log."""

    timeout = 0.1                   # seconds between two looks whether a signal has come
    processes = 1                   # that share the listener
    announces = True                # does it print the banner?

    def __init__(self, settings, listener=None):
        self.closing = False        # after a signal: no more clients, and none is kept alive
        self.clients = set()        # the client connections; changed under the condition
        self.client_ended = threading.Condition()
        # By connection the handlers whose clients are idle, and since when. No lock: adding,
        # removing and copying are single steps of a dict, and the removal decides (mark_busy).
        self.idle = {}

        self.capacity = settings.max_connections
        self.capacity = raise_file_limit(self.capacity)     # part two: Open files
        self.threads = self.make_executor()
        self.log = Log(settings.log, settings.log_secrets)
        self.log = QueuedLog(settings.log, settings.log_secrets)    # part two: Queued log
        self.relay_loop = RelayLoop(lambda now: self.service.on_tick(now), self.log.warn)
        self.shared = {}            # what sections of part two keep whatever the service
        self.service = Service(settings, self)      # the one in force
        listener = listener or open_listener(settings)
        handler = settings.upstream.provider.handler or Handler
        super().__init__(listener.getsockname(), handler, bind_and_activate=False)
        self.socket.close()         # the one that TCPServer has made
        self.socket = listener
        self.log.start()
        self.relay_loop.start()

    @property
    def settings(self):
        return self.service.settings

    def get_request(self):
        try:
            sock, address = super().get_request()
            return self.service.wrap_client(sock), address
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)     # wait for descriptors instead of spinning
            raise

    def process_request(self, sock, client_address):
        """Give the new client a thread, or 503 if there is no room for it."""
        with self.client_ended:
            self.clients.add(sock)
        if not self.service.make_room(sock, client_address[0]):
            self.refuse_busy(sock, client_address)
            return
        taken = threading.Lock()            # by whoever answers this client
        try:
            self.threads.submit(self.serve_client, taken, sock, client_address)
        except RuntimeError:
            # No thread can be started. The executor keeps the call, so that another thread may
            # take it, and its count of idle threads is wrong from now on.
            self.threads.shutdown(wait=False)
            self.threads = self.make_executor()
            if taken.acquire(blocking=False):
                self.refuse_busy(sock, client_address)

    def serve_client(self, taken, sock, client_address):
        if taken.acquire(blocking=False):
            self.process_request_thread(sock, client_address)

    def has_room(self, sock, address):
        return len(self.clients) <= self.capacity

    def make_executor(self):
        """An executor keeps idle threads: to start one for each connection costs twice the CPU."""
        # More than clients: a thread is free a moment after its client's place.
        return concurrent.futures.ThreadPoolExecutor(2 * self.capacity, "client")

    def refuse_busy(self, sock, client_address):
        """503 for a client without a place. None of this may block the accepting thread."""
        self.service.refuse(sock, Record(client_address[0]))
        self.shutdown_request(sock)

    def send_busy(self, sock, record, request=None):
        """503 in one write, then a lingering close, if there is room for one."""
        error = ErrorResponse(503, "server_busy", "Too many clients. Try again.",
                              headers=[(b"Retry-After", b"1")])
        record.status = error.status
        record.outcome = error.code
        self.log.write(record)
        content = self.service.render_error(error, record)
        headers = error.headers + [JSON_TYPE]
        headers = self.service.complete_headers(headers, request, record.id)
        headers += framing_headers(503, len(content), is_chunked=False, must_close=True)
        head = render_head(b"HTTP/1.1 503 Service Unavailable", headers)
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.send(head if record.method == "HEAD" else head + content)
            if self.service.may_linger():
                self.service.linger(sock, record.client)

    def shutdown_request(self, sock):
        """The end of every connection that process_request let in. One that lingers is detached."""
        with self.client_ended:
            sock.close()
            self.idle.pop(sock, None)
            self.clients.discard(sock)
            self.service.forget_client(sock)
            self.client_ended.notify_all()

    def handle_error(self, sock, client_address):
        """A fault outside of any request. An OSError is a client that has reset its connection."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.report_fault(error)

    def report_fault(self, error):
        self.log.warn("fault: " + format_traceback(error))

    def mark_idle(self, handler):
        self.idle[handler.connection] = (handler, time.monotonic())

    def mark_busy(self, handler):
        """The client sends again. False if it has been evicted meanwhile."""
        return self.idle.pop(handler.connection, None) is not None

    def evict(self, handler):
        """Hang up on an idle client. False if it is not idle after all: it has just sent more."""
        # It may leave by itself at any moment; but nobody else gets its descriptor meanwhile.
        with self.client_ended, contextlib.suppress(OSError):
            if not self.service.may_evict(handler) or not self.mark_busy(handler):
                return False
            hang_up(handler.client.sock)        # this wakes its thread
        return True

    def stop(self):
        """Stop accepting, let running requests end within the grace time, then cut them visibly."""
        deadline = time.monotonic() + self.settings.grace
        self.socket.setblocking(False)
        # Whoever is in the listener's queue counts as accepted, not whoever still comes.
        for _ in range(LISTEN_QUEUE):
            try:
                self.process_request(*self.get_request())
            except OSError as error:        # this one has left, or no descriptor is free
                if isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                    break
        self.socket.close()
        while self.clients and time.monotonic() < deadline:
            for handler, since in self.idle.copy().values():
                if time.monotonic() - since >= 0.5:
                    self.evict(handler)
            with self.client_ended:
                self.client_ended.wait(0.1)

        deadline = time.monotonic() + SHUTDOWN_SECONDS
        self.relay_loop.stopping = True
        self.relay_loop.wake()
        for _ in range(2):
            with self.client_ended:
                self.client_ended.wait_for(lambda: not self.clients, SHUTDOWN_SECONDS / 2)
            for sock in list(self.clients):         # they still wait for a head or a body
                with contextlib.suppress(OSError):
                    hang_up(sock)
        self.relay_loop.closed = True
        self.log.close(max(0.1, deadline - time.monotonic()))

    def url(self):
        """Where this machine reaches us."""
        host, port = self.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        host = "[%s]" % host if ":" in host else host
        return "%s://%s:%d" % (self.settings.scheme, host, port)


def open_listener(settings):
    """The listening socket, on the first address of a name. OSError says why there is none."""
    host = "AIPROXY_HOST"           # what it holds, unless it is an address, may be a key
    try:
        found = socket.getaddrinfo(settings.host, settings.port, 0, socket.SOCK_STREAM)[0]
        host = found[4][0]
        listener = socket.socket(*found[:3])
        if os.name == "posix":      # elsewhere it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            os.set_blocking(listener.fileno(), False)       # accept() must not wait
        listener.bind(found[4])
        listener.listen(LISTEN_QUEUE)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason += " (AIPROXY_PORT sets another)"
        raise OSError("cannot listen on %s port %d: %s" % (host, settings.port, reason))

def hang_up(sock):
    """End the connection of a socket that another thread is using."""
    # SSLSocket's own method would drop the TLS under that thread, which would go on in plain text.
    socket.socket.shutdown(sock, socket.SHUT_RDWR)

def is_loopback(address):
    """Is this plainly an address or a name of this machine? In doubt it is not."""
    return LOOPBACK.fullmatch(address) is not None

def may_be_loopback(host):
    """Might a listener on this host be for this machine only? In doubt it might, as by `127.1`."""
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(host, 0, 0, socket.SOCK_STREAM)
        return is_loopback(host) or any(is_loopback(address[0]) for *_, address in found)
    return True


class Service:
    """What follows from the settings. New ones make a new one; a request keeps that of its head."""

    def __init__(self, settings, server):
        self.settings = settings
        self.server = server
        self.log = server.log
        self.upstream_handler = UpstreamHandler(settings)
        self.opener = urllib.request.OpenerDirector()       # without a handler for redirects
        self.opener.add_handler(self.upstream_handler)
        self.warnings = []                  # for the banner
        self.proxy = ""                     # in front of the upstream
        self.set_hooks()
        install_features(self)              # where part two enters

    def set_hooks(self):
        """What part two may replace or add to, in the order in which a request meets it.

        A list is appended to. All else holds one function: to add to it, keep it and call it.
        (The way up has hooks of its own, in UpstreamHandler and Connector.)
        """
        # Of a client's connection.
        self.wrap_client = lambda sock: sock    # what to serve an accepted client through
        self.make_room = self.server.has_room   # (socket, address): is there a place for it?
        self.refuse = self.server.send_busy     # (socket, record), where there is none
        self.begin_client = do_nothing          # (handler), before the first head is read
        self.end_client = do_nothing            # (handler), when nothing is missing at its end
        self.must_linger = lambda handler: False    # must its client be read on from?
        self.may_linger = lambda: True          # may one that was refused linger?
        self.linger = do_nothing                # (socket, address): it has an answer, and may send
        self.forget_client = do_nothing         # (socket): it has gone
        self.may_evict = lambda handler: not has_sent(handler.client)   # is it only waiting?
        # Of a request. Of free_answers and own_answers, who has answered it returns True.
        self.find_client = lambda address, headers: address     # whose request is it?
        self.normalize_path = lambda path, rules: path          # the path that the client meant
        self.free_answers = []                  # (handler): answer whoever asks
        self.prepare_request = do_nothing       # (handler), before its client key is looked for
        self.asks_for_others = is_forwarded     # (headers): for others than this machine?
        self.check_origin = refuse_pages        # (request, settings): 403 for a page not let in
        self.own_answers = []                   # (handler): answer a client that may ask
        self.suggest_path = lambda path, rules: ""      # what to add to a 404
        self.checks = []                        # (handler), before the body is read; may raise
        # Of its body.
        self.read_whole_body = lambda handler: None     # all of it, if it must be here first
        self.observe_request = lambda record: None      # what to call with each piece of others
        self.on_body_gone = do_nothing          # (upload), once it has gone up, and at the end
        # On the way up.
        self.edit_upstream_headers = lambda fields, settings: fields    # those that go up
        self.use_key = lambda send: send(0)     # calls it with the index of a provider key
        self.add_heartbeats = lambda wait, send: wait   # what to wait with for an event
        self.on_interim = do_nothing            # (handler, status, headers): a 1xx response
        # Of its response.
        self.switch_protocols = None            # (handler, exchange): what to do after a 101
        self.check_for_key = check_for_key      # (exchange, settings): a filter for its body, None
        self.response_checks = []               # (handler, exchange), before its head goes down
        self.make_job = ResponseJob             # (handler, exchange, is_chunked, filter): its job
        self.observe_response = lambda record: None     # what to call with each piece of it
        self.follow_events = lambda job, handler: None  # its EventStream, if it is one
        self.on_silence = do_nothing            # (job): called while the upstream is silent
        # Header fields to add to any response: pairs of bytes. `present`: by lower-case name.
        self.stream_headers = lambda present, is_open_ended: []
        self.cors_headers = lambda request, settings, present: []
        # (path, error, request_id): what the body of an error in the API there is the JSON of
        self.error_body = lambda path, error, request_id: {"error": error_object(error)}
        # Of the service itself.
        self.on_tick = do_nothing               # (now), twice a second
        self.retire = do_nothing                # another one has taken its place

    def render_error(self, error, record):
        """The body of an error response, in the form of the API that was called."""
        return json.dumps(self.error_body(record.path, error, record.id)).encode()

    def complete_headers(self, headers, request, request_id, is_open_ended=False):
        """`headers` with what every response gets. `request` is None if it could not be read."""
        present = {name.lower(): value for name, value in headers}
        date = http_date(int(time.time()))
        more = [(b"Date", date), (b"x-request-id", request_id.encode("latin-1"))]
        more += self.stream_headers(present, is_open_ended)
        more = [field for field in more if field[0].lower() not in present]
        return headers + more + self.cors_headers(request, self.settings, present)


def do_nothing(*arguments):
    """What is called where nothing needs to be done."""

@functools.lru_cache(1)         # a second's requests share it
def http_date(seconds):
    """A time in seconds since 1970, as HTTP has it (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(seconds, usegmt=True).encode()

# ---- Handler: one request, top to bottom ---------------------------------------------------------

class Request:
    """The values of one request: the checks are functions of this and the settings. No sockets."""

    def __init__(self, first_line, headers):
        method, path, query, self.major, minor = first_line
        self.method = method.decode()
        self.path = path.decode()           # it becomes the one that is sent up
        self.query = (query or b"").decode()        # with its question mark
        self.headers = headers
        self.is_http10 = minor == b"0"
        self.client_name = ""               # of the client key, once it has been checked
        self.model = ""                     # as the client named it, in the path or in the body
        self.own_fields = {}                # ours for the upstream in place of the client's


class Handler(http.server.BaseHTTPRequestHandler):
    """One client connection and its requests, one after the other.

    The library calls `setup`, then `handle_one_request` until `close_connection`, then `finish`.
    Its own parser is replaced by `read_head`, which is strict and works on bytes.
    """

    def setup(self):
        # socketserver calls the socket `request`; from here on that is the HTTP request.
        self.connection = self.request
        self.client = BufferedSocket(self.request)
        self.client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_first_request = True

    def use_current_settings(self):
        self.service = self.server.service
        self.settings = self.service.settings

    def start_request(self):
        self.use_current_settings()
        self.request = None                 # a Request, once its head has been read
        self.upload = None                  # its body, an Upload
        self.head_sent = False
        self.is_whole = True                # is nothing missing of the response?
        self.ends_by_close = False          # does only the connection's end end the response?
        self.record = Record(self.client_address[0])
        self.close_connection = True        # until a response has gone out whole

    def handle_one_request(self):
        """Read one request, answer it, log it. Whatever goes wrong ends here."""
        self.start_request()
        try:
            self.read_request()                             # 400 408 414 431
            self.answer_request()
        except ErrorResponse as error:
            self.send_error_response(error)
        except ProtocolError as error:
            self.send_error_response(ErrorResponse(error.status, "bad_request", error.message))
        except ClientGone as gone:
            self.record.outcome = gone.outcome
        except Exception as error:          # a fault of ours: the log gets its place, no values
            self.server.report_fault(error)
            self.send_error_response(ErrorResponse(
                500, "internal_error", "The proxy failed on this request. Its log says where."))
        finally:
            if self.upload:
                self.service.on_body_gone(self.upload)
            if self.record.outcome == "client_gone" and self.server.relay_loop.stopping:
                self.record.outcome = "shutdown"            # we have hung up
            if self.record.method or self.record.status:
                self.server.log.write(self.record)

    def read_request(self):
        """Wait for the next request and read its head. A silent kept-alive client is let go."""
        is_first = self.is_first_request
        if is_first:                        # from connecting on
            self.head_deadline = self.record.began + HEAD_SECONDS
            self.service.begin_client(self)                 # 400
        while not self.client.buffer.strip(b"\r\n") and len(self.client.buffer) < 8:
            limit = self.head_deadline - time.monotonic() if is_first else IDLE_SECONDS
            self.wait_idle(limit, is_first)     # some send an empty line or two behind a body
            self.read_more_head()               # 408 for a silent new client
        self.is_first_request = False
        self.record.began = time.monotonic()
        if not is_first:
            self.head_deadline = self.record.began + HEAD_SECONDS
        skip_empty_lines(self.client, self.read_more_head)
        first_line, headers = read_head(self.client, REQUEST_LINE, self.read_more_head)
        self.use_current_settings()         # they may be others than before it was idle
        self.request = Request(first_line, headers)
        self.record.method = self.request.method
        self.record.path = self.request.path

    def wait_idle(self, seconds, may_be_silent=False):
        """Wait for the next bytes of a client. Meanwhile its place can be had."""
        self.server.mark_idle(self)
        arrived = wait_ready(self.client, READ, seconds)
        if arrived and not has_sent(self.client):   # idle to the end
            raise ClientGone("idle")
        is_evicted = not self.server.mark_busy(self)
        if is_evicted or not (arrived or may_be_silent):
            raise ClientGone("idle")

    def read_more_head(self):
        """Wait for more bytes of a head. A deadline for all of it stops a slowloris."""
        if not wait_ready(self.client, READ, self.head_deadline - time.monotonic()):
            raise ErrorResponse(408, "request_timeout", "The head of the request did not arrive "
                                "within %d seconds." % HEAD_SECONDS)
        if not read_from_client(self.client):
            raise ClientGone()

    def answer_request(self):
        """Every step returns, answers or raises. Beside each: the statuses that it may answer."""
        request = self.request
        self.check_head()                                   # 505 400 405 501 417
        if request.path == "*":                             # RFC 9110 section 9.3.7
            self.send_response(204)
            return
        if any(answer(self) for answer in self.service.free_answers):
            return
        self.service.prepare_request(self)
        self.check_caller()                                 # 403 400 401
        if self.answer_ourselves():                         # 404 400 403 429 502 504
            return
        self.check_path()                                   # 404 405
        for check in self.service.checks:
            check(self)                                     # 400 403 429
        body = self.read_body()                             # 408 413 415 503 400 403
        exchange = self.ask_upstream(body)                  # 400 408 413 502 504
        del body                # it has gone up: nothing of it stays while the response streams
        self.relay(exchange)                                # 502

    def check_head(self):
        """Is it well formed, and do we speak its version and its method?"""
        request = self.request
        if request.major != b"1":
            raise ErrorResponse(505, "version_not_supported", "This proxy speaks HTTP/1.1.")
        check_duplicates(request.headers)                   # 400
        body = make_body(self.client, request.headers, request.is_http10)       # 400
        self.upload = Upload(self.client, body)
        self.record.client = self.service.find_client(self.record.client, request.headers)
        check_host_field(request)                           # 400
        check_method(request, self.settings)                # 405 501
        check_target(request, self.settings, self.service.normalize_path)    # 400
        self.record.path = request.path
        check_expectation(request)                          # 417

    def check_caller(self):
        """Its way to us, its page and its client key, whose name is for the log and the rates."""
        check_host_allowed(self.request, self.settings, self.service.asks_for_others)    # 403
        self.service.check_origin(self.request, self.settings)       # 403
        check_query(self.request, self.settings)            # part two: Keys in URLs
        check_client_key(self.request, self.settings)       # 400 401
        if self.request.client_name:
            self.record.client = self.request.client_name

    def answer_ourselves(self):
        """Is this answered without the upstream? See "Model list" and "Forgiving paths"."""
        return any(answer(self) for answer in self.service.own_answers)

    def check_path(self):
        """A method, so that the handler of a translated API can serve other paths."""
        check_path_allowed(self.request, self.settings, self.service.suggest_path)

    # -- the request's body

    def read_body(self):
        """What may go up of the body now: all of it if it is small or rules apply, else a part."""
        body = self.service.read_whole_body(self)            # 415 413 408 503 400 403
        if body is not None:
            return body
        self.upload.observe = self.service.observe_request(self.record)
        self.start_body(self.settings.max_body if self.settings.is_restricted else None)     # 413
        return self.upload.read_beginning(PREFETCH_BYTES, PREFETCH_SECONDS)     # 400 408 413

    def start_body(self, limit):
        """The body may come, up to `limit` bytes: tell so a client that waits to hear it."""
        upload = self.upload
        upload.limit = limit
        upload.check_limit()                                # 413
        expects = b"expect" in self.request.headers and not self.request.is_http10
        if expects and not upload.done and not self.client.buffer:
            self.send_to_client(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- to the upstream

    def ask_upstream(self, body):
        """The exchange with the head of its response, or ErrorResponse 400 408 413 502 504."""
        target = self.settings.upstream.map_path(self.request.path) + self.request.query
        return self.open_exchange(self.request.method, target, body)

    def open_exchange(self, method, target, body, wait=None):
        """Send a request up with a provider key, if there is one, and read the response's head."""
        wait = wait or functools.partial(wait_for_upstream, self.client)

        def send(key_index):
            return self.send_up(key_index, method, target, body, wait)

        exchange = self.service.use_key(send)
        if exchange.request_sent:
            self.service.on_body_gone(self.upload)
        return exchange

    def send_up(self, key_index, method, target, body, wait):
        """One request with one of the keys. A method, so that an API may need more than a key."""
        settings = self.settings
        fields = self.service.edit_upstream_headers(
            upstream_headers(self.request, settings), settings)
        if settings.key_fields:
            fields = fields + [settings.key_fields[key_index]]
        url = settings.upstream.url + target
        outgoing = UpstreamRequest(url, method, fields, body, self.upload)
        outgoing.wait = wait
        outgoing.on_interim = functools.partial(self.service.on_interim, self)
        exchange = self.service.opener.open(outgoing, timeout=settings.timeout)
        exchange.drop_fields_with(settings.field_secrets)
        self.record.upstream_status = exchange.status
        upstream_id = exchange.headers.get(b"x-request-id") or exchange.headers.get(b"request-id")
        if upstream_id:
            self.record.id = upstream_id.decode("latin-1")[:200]
        return exchange

    def relay(self, exchange):
        """Send the head and what is here of the body; the rest is the relay loop's."""
        if exchange.status == 101:
            self.service.switch_protocols(self, exchange)
            return
        try:
            secret_filter = self.service.check_for_key(exchange, self.settings)      # 502
            for check in self.service.response_checks:
                check(self, exchange)                                   # 502
            # What answers a HEAD has a body of no bytes, whatever length it declares.
            is_chunked = exchange.body.length is None and not self.request.is_http10
            job = self.service.make_job(self, exchange, is_chunked, secret_filter)
            first_bytes = job.first_bytes()
            if job.outcome:         # the body is over: the upstream's connection is free for others
                exchange.close()
            headers = downstream_headers(exchange.headers, self.settings)
            self.start_response(exchange.status, exchange.reason, headers, first_bytes,
                                exchange.declared_length, is_chunked)
            if not job.outcome:
                self.server.relay_loop.run_and_wait(job)
        finally:
            exchange.close()
        self.record.bytes = job.bytes
        self.record.outcome = job.outcome
        self.is_whole = job.outcome == "ok"
        self.close_connection = self.will_close or self.must_close()

    def must_close(self):
        """Must the client connection end with this response? After an error of ours, always."""
        request = self.request
        return (self.record.outcome not in ("", "ok") or request.is_http10
                or b"close" in request.headers.connection_options
                or not self.upload.done or self.server.closing)

    # -- the writer of all heads

    def start_response(self, status, reason, headers, first_bytes=b"", length=None,
                       is_chunked=False):
        """Head and first bytes in one write: two would wait for each other's acknowledgement."""
        self.record.status = status
        self.record.first_byte = time.monotonic() - self.record.began
        self.is_whole = False               # until whoever sends the body knows better
        self.ends_by_close = length is None and self.request.is_http10
        if self.ends_by_close:
            self.set_reset(True)            # a cut has no other sign here
        headers = self.service.complete_headers(headers, self.request, self.record.id,
                                               is_chunked or self.ends_by_close)
        self.will_close = self.must_close()        # asked again at the end: it may change
        headers += framing_headers(status, length, is_chunked, self.will_close)
        first_line = b"HTTP/1.1 %d %b" % (status, reason)
        self.head_sent = True
        self.send_to_client(render_head(first_line, headers) + first_bytes)

    def set_reset(self, is_on):
        """From now on the end of the connection, even by a crash, is a reset, or is none."""
        linger = struct.pack("ii", is_on, 0)
        with contextlib.suppress(OSError):      # macOS, where the client has left already
            self.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def send_to_client(self, data):
        """Send all of it. ClientGone if the client has left, or takes nothing, or too slowly."""
        pace = None
        unsent = memoryview(data)
        while True:
            try:
                count = self.client.send_some(unsent)
            except OSError:
                raise ClientGone()
            unsent = unsent[count:]
            if not unsent:
                return
            pace = pace or Pace(time.monotonic(), STALL_SECONDS)
            pace.add(count, time.monotonic())
            if not wait_ready(self.client, WRITE, pace.patience(time.monotonic())):
                raise ClientGone("client_stalled")

    def send_response(self, status, headers=(), content=b""):
        """Send a response that we have as a whole. The connection lives on if all is well."""
        body = b"" if self.record.method == "HEAD" else content
        reason = http.client.responses.get(status, "").encode()
        self.record.bytes = len(body)
        self.start_response(status, reason, list(headers), body, len(content))
        self.is_whole = True
        self.record.outcome = self.record.outcome or "ok"
        self.close_connection = self.will_close or self.must_close()

    def send_error_response(self, error):
        """Our own error. The connection closes: what follows is never read as a request."""
        self.record.outcome = error.code
        if NO_RETRY in error.headers:       # only the operator can fix it
            self.server.log.warn("%s: %s (upstream status: %s)" % (
                error.code, error.message, self.record.upstream_status))
        if self.head_sent:
            return
        if self.request is None:
            self.name_broken_request()
        try:
            self.send_response(error.status, error.headers + [JSON_TYPE],
                               self.service.render_error(error, self.record))
        except ClientGone:
            self.record.outcome = "client_gone"

    def name_broken_request(self):
        """What the log and the error's form need of a head that could not be read as a whole."""
        first_line = REQUEST_LINE.fullmatch(self.client.buffer.partition(b"\r\n")[0])
        if first_line:
            self.record.method = first_line[1].decode()
            self.record.path = first_line[2].decode()

    def finish(self):
        """Close as the response needs it: by a reset, with a lingering close, or at once."""
        if not self.is_whole:
            wait_ready(self.client, READ, CUT_SECONDS)
        if self.ends_by_close and not self.is_whole:
            return
        if self.ends_by_close:
            self.set_reset(False)
        must_linger = self.service.must_linger(self)
        if self.is_whole:
            self.service.end_client(self)
        if must_linger:
            self.service.linger(self.client.sock, self.client_address[0])


def wait_for_upstream(client, connection, mask, seconds):
    """Sleep until the upstream is ready. ClientGone if the client leaves; TimedOut in the end."""
    deadline = time.monotonic() + seconds
    while True:
        ready = wait_ready(connection, mask, seconds, client)
        if not ready:
            raise TimedOut()
        if client in ready and not read_from_client(client):
            raise ClientGone()
        if connection in ready:
            return
        seconds = deadline - time.monotonic()

def check_for_key(exchange, settings):
    """502 for an error that says that our key is bad, or repeats it: not the client's business.

    Also for one that cannot be searched as a whole. What takes this one's place in "Keys in long
    errors" returns a filter for those.
    """
    if not settings.provider_keys or exchange.status < 300:
        return None
    if exchange.status == 401:
        raise rejected_key()
    exchange.prefetch(PREFETCH_BYTES, PREFETCH_SECONDS)
    if holds_secret(exchange.prefetched, settings.upstream_secrets):
        raise rejected_key()
    if not exchange.body.done or (exchange.is_coded() and exchange.prefetched):
        raise upstream_error("upstream_bad_response", "The upstream answered with status %d and a "
                             "body that could not be searched for the proxy's key."
                             % exchange.status)
    return None

def rejected_key():
    return upstream_error("upstream_credentials_rejected", "The upstream rejected the proxy's own "
                          "credentials. Its operator must fix AIPROXY_KEY.", [NO_RETRY])

# ---- The checks ----------------------------------------------------------------------------------
# Functions of a request and the settings, in their order. Each raises what the client gets.

def check_duplicates(headers):
    """400 for a second field of a name that may appear once: two servers could read two things."""
    if headers.has_duplicates:
        for name in SINGLETON_FIELDS:
            if len(headers.get_all(name)) > 1:
                raise ProtocolError("The header field %s appears twice." % name.decode())

def check_host_field(request):
    """RFC 9112 section 3.2: exactly one. Only HTTP/1.0 may lack it."""
    may_lack = request.is_http10 and b"host" not in request.headers
    if not may_lack and not HOST.fullmatch(request.headers.get(b"host", b"")):
        raise ProtocolError("The request needs one valid Host field.")

def check_method(request, settings):
    """405 for TRACE, which would echo keys, and CONNECT, which would make an open proxy of us."""
    message = "The method %s is not served here." % request.method[:20]
    if request.method in NEVER_METHODS:
        raise ErrorResponse(405, "method_not_allowed", message, headers=[allow_header(METHODS)])
    if settings.is_restricted and request.method not in METHODS:
        raise ErrorResponse(501, "method_not_allowed", message)

def check_target(request, settings, normalize_path):
    """400 unless the target is a plain path, or a whole URL of our own (RFC 9112 section 3.2.2)."""
    if request.path == "*" and request.method == "OPTIONS" and not request.query:
        return                              # asks about the server as a whole
    absolute = ABSOLUTE_FORM.fullmatch(request.path)
    if absolute:
        authority, path = absolute.groups()
        if authority.encode().lower() != request.headers.get(b"host", b"").lower():
            raise ProtocolError("The authority in the request target is not the Host field.")
        request.path = path or "/"
    if settings.is_restricted:
        request.path = normalize_path(request.path, settings.paths)
    if not is_plain_path(request.path) or "#" in request.query:
        raise ProtocolError("The request target is not a plain path: "
                            "no // in front, no dot segments, no fragment.")

def is_plain_path(path):
    """Do all servers read this path in the same way? No empty start, dot segments, odd escapes."""
    if not path.startswith("/") or path.startswith("//"):
        return False
    may_have_dots = "." in path or "%" in path
    return not BAD_ESCAPE.search(path) and not (may_have_dots and DOT_SEGMENT.search(path))

def check_expectation(request):
    expectation = request.headers.get(b"expect", b"").lower()
    if expectation not in (b"", b"100-continue") and not request.is_http10:
        raise ErrorResponse(417, "expectation_failed",
                            "The only expectation understood is 100-continue.")

# -- who is calling, and from where

def check_host_allowed(request, settings, asks_for_others):
    """403 where others than this machine could reach what no key guards.

    That is DNS rebinding, where a web page has its own name lead to this machine; or a public
    front that somebody forgot: it may ask by a loopback name, but tells for whom.
    """
    host = request.headers.get(b"host", b"")
    is_foreign = settings.wants_loopback_host and not is_loopback_host(host)
    if settings.is_guarded_by_loopback and not is_foreign:
        is_foreign = asks_for_others(request.headers)
    if is_foreign:
        raise ErrorResponse(
            403, "host_not_allowed",
            "This proxy asks for no client key, so it serves this machine only, by its loopback "
            "names. To serve others, set AIPROXY_CLIENT_KEYS, or AIPROXY_OPEN=1 to serve anyone.")

def is_forwarded(headers):
    """Does a proxy in front say for whom it asks? See "Trusted proxies"."""
    return not FORWARDED_FIELDS.isdisjoint(headers.first)

def is_loopback_host(host):
    """Is this the value of a Host field that leads to this machine?"""
    return LOOPBACK_HOST.fullmatch(host) is not None

def refuse_pages(request, settings):
    """403 for what a web page sends. See "CORS" to let some pages in.

    No Origin means no page, unless Sec-Fetch-Site says that another site's page is behind it.
    """
    is_foreign = request.headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
    if is_foreign or b"origin" in request.headers:
        raise ErrorResponse(403, "origin_not_allowed", "Web pages may not call this proxy.")

def check_client_key(request, settings):
    """401 unless the request carries a client key. Sets `client_name`; the key is not kept."""
    if not settings.client_keys:
        return
    keys = carried_keys(request.headers)
    if len(keys) > 1:
        raise ProtocolError("The request carries two different keys.")
    carried = keys.pop() if keys else b""

    for name, client_key in settings.client_keys:
        if hmac.compare_digest(carried, client_key):
            request.client_name = name
    if not request.client_name:
        message = ("A client key is needed: send it as Authorization: Bearer, or in x-api-key, "
                   "api-key or x-goog-api-key.")
        if carried:
            message = "Incorrect client key."
        raise ErrorResponse(401, "invalid_api_key", message,
                            headers=[(b"WWW-Authenticate", b"Bearer")])

def carried_keys(headers):
    """The different keys that a request carries, as a set of bytes."""
    keys = set()
    scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        keys.add(credential.strip())
    for name in headers.first.keys() & API_KEY_FIELDS:
        keys.update(headers.get_all(name))
    keys.discard(b"")
    return keys

# -- for what

def check_path_allowed(request, settings, suggest_path):
    """404 and 405 unless AIPROXY_PATHS allows the path, exactly as it is sent up."""
    if settings.paths is not None and (request.method, request.path) not in settings.paths:
        methods = allowed_methods(request.path, settings.paths)
        if not methods:
            raise ErrorResponse(404, "not_found", "There is nothing at this path.%s What may be "
                                "called is set by AIPROXY_PATHS."
                                % suggest_path(request.path, settings.paths))
        takes_any = methods == list(METHODS)        # without keys of ours also PROPFIND and others
        if request.method not in methods and not takes_any:
            raise ErrorResponse(405, "method_not_allowed",
                                "This path takes %s." % ", ".join(methods),
                                headers=[allow_header(methods)])
    if settings.upstream.map_path(request.path) is None:
        raise ErrorResponse(404, "not_found",
                            "The upstream's base URL has a path, so only /v1/... can be called.")

def allow_header(methods):
    return (b"Allow", ", ".join(methods).encode())

def allowed_methods(path, rules):
    """The methods that `rules`, pairs of a method and a path's pattern, allow on `path`."""
    allowed = set()
    for method, pattern in rules:
        fits = pattern in ("*", path)
        fits = fits or fits_pattern(path, pattern)          # part two: Patterns of paths
        if fits:
            allowed.update({"*": METHODS, "GET": ("GET", "HEAD")}.get(method, (method,)))
    return sorted(allowed, key=METHODS.index)

# -- the form of our own errors

def error_object(error):
    """An error in OpenAI's API. See "Errors in the form of other APIs" for more."""
    kind = "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    elif error.status >= 500:
        kind = "server_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}

# ---- The request's body --------------------------------------------------------------------------

class Upload:
    """A request's body as the client sends it: bounded by `limit`, and not too slow."""

    def __init__(self, client, reader):
        self.client = client
        self.reader = reader
        self.length = reader.length         # None: chunked
        self.limit = None                   # bytes, None: none
        self.done = reader.done             # has all of it been read?
        self.received = 0                   # bytes
        self.waited = 0.0                   # seconds spent waiting for the client
        self.pace = Pace(0.0, BODY_GRACE)   # by those seconds alone
        self.observe = None                 # called with each piece

    def check_limit(self):
        """413 as soon as its length, or that of the chunk that is coming, is over the limit."""
        if self.limit is not None and self.received + self.reader.remaining > self.limit:
            raise ErrorResponse(413, "request_too_large", "The body is larger than the %d bytes "
                                "allowed by AIPROXY_MAX_BODY." % self.limit)

    def read(self):
        """The bytes of the body that are here, decoded; b"" for none, or at its end (`done`)."""
        try:
            piece = self.reader.read()
        except ProtocolError as error:
            raise ErrorResponse(400, "bad_request",
                                "The chunked body is malformed: %s." % error.message)
        except ClosedEarly:
            raise ErrorResponse(400, "incomplete_body",
                                "The connection ended in the middle of the body.")
        except OSError:
            raise ClientGone()
        self.done = self.reader.done
        self.received += len(piece)
        self.pace.add(len(piece), self.waited)
        if self.observe:
            self.observe(piece)
        self.check_limit()
        return piece

    def read_beginning(self, enough, seconds=math.inf):
        """All of the body if it is small and comes soon enough, else its beginning."""
        beginning = self.read()             # mostly all of it
        more = read_pieces(self, self.wait_for_client, enough - len(beginning), seconds)
        return beginning if self.done else beginning + join_pieces(more)

    def wait_for_client(self, seconds=math.inf, other=None):
        """Wait for more, or until `other` can be read. 408 for a client that is too slow."""
        began = time.monotonic()
        patience = min(self.pace.patience(self.waited), seconds)
        ready = wait_ready(self.client, READ, patience, other)
        self.add_wait(time.monotonic() - began, bool(ready))

    def add_wait(self, seconds, has_more=False):
        self.waited += seconds
        if not has_more and self.pace.patience(self.waited) <= 0:
            raise ErrorResponse(408, "request_timeout", "The body came too slowly: after %d "
                                "seconds it needs %d bytes a second." % (BODY_GRACE, BODY_RATE))


# ---- Header fields up and down -------------------------------------------------------------------

def upstream_headers(request, settings):
    """The header fields of the request to the upstream, but for the provider key. No client key."""
    fields = [(b"Host", settings.upstream.netloc)]
    for name, value in request.headers.fields:
        low = name.lower()
        may_go = low in ALLOWED_REQUEST_FIELDS or not settings.is_restricted
        if may_go and goes_up(low, request):
            fields.append((name, value))
    fields += request.own_fields.values()
    if settings.is_restricted:
        # What comes down can then be searched for the key, and no event waits in a compressor.
        fields.append((b"Accept-Encoding", b"identity"))
    return fields

def goes_up(low, request):
    """May a field of this name, in lower case, go up as it came?"""
    name = low.replace(b"_", b"-")      # CGI-like servers take `_` for `-`
    if low in request.headers.connection_options or name in DROPPED_REQUEST_FIELDS:
        return False
    return name not in request.own_fields and not name.startswith(DROPPED_REQUEST_PREFIXES)

def downstream_headers(headers, settings):
    """The fields of the upstream's response that come down: as they came, repeated, in order."""
    dropped = DROPPED_ACCOUNT_FIELDS if settings.provider_keys else DROPPED_RESPONSE_FIELDS
    fields = []
    for name, value in headers.fields:
        low = name.lower()
        is_dropped = low in dropped or low in headers.connection_options
        if not is_dropped and not low.startswith(b"access-control-"):
            fields.append((name, value))
    return fields

def framing_headers(status, length, is_chunked, must_close):
    """How the client sees where a response ends, and whether its connection does."""
    if is_chunked:
        # Never with `Connection: close`: Node's fetch would take a cut for the end (Node 20).
        return [(b"Transfer-Encoding", b"chunked")]
    fields = []
    if length is not None and status != 204:
        fields.append((b"Content-Length", b"%d" % length))
    if must_close and status != 101:
        fields.append((b"Connection", b"close"))
    return fields

# ---- The upstream --------------------------------------------------------------------------------
# urllib.request is the way up: a Request, and an opener with one handler, ours.

class UpstreamRequest(urllib.request.Request):
    """urllib's request, with what it has no place for: repeated fields, a body still coming.

    `upload` gives the rest of a body that begins with `prefix`. `wait(connection, mask, seconds)`
    sleeps until the connection is ready, and may raise what ends the exchange.
    `on_interim(status, headers)` is called for each 1xx response before the real one.
    """

    def __init__(self, url, method, fields, prefix, upload):
        # The host of the page that asks is for cookies only; to work it out would cost a parse.
        super().__init__(url, method=method, origin_req_host="")
        self.fields = fields
        self.prefix = prefix
        self.upload = upload
        length = len(prefix) if upload.done else upload.length
        self.is_chunked = length is None
        if self.is_chunked:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif length or method in ("POST", "PUT", "PATCH"):
            fields.append((b"Content-Length", b"%d" % length))

    def asks_to_switch(self):
        """May the upstream answer 101?"""
        return any(name == b"Upgrade" for name, _ in self.fields)


class UpstreamHandler(urllib.request.BaseHandler):
    """urllib's way to HTTP and HTTPS upstreams. It returns an Exchange, whatever the status.

    What goes wrong is an ErrorResponse, 502 or 504, or raised by the request's `wait` or `upload`.
    """

    def __init__(self, settings):
        self.connector = Connector(settings)
        self.try_kept = do_nothing          # (request): an exchange over a kept one, or None
        self.keep = lambda connection, headers: connection.close()      # it can be used again

    def http_open(self, request):
        """Called by the opener: send the request and wait for the head of its response."""
        exchange = self.try_kept(request)
        if exchange:
            return exchange
        try:
            connection = self.connector.connect(request.wait)
        except (OSError, ProtocolError, UnicodeError) as error:
            raise connect_error(error)
        try:
            return self.run_exchange(Exchange(connection, request, self.keep))
        except (OSError, ProtocolError) as error:
            raise response_error(error)

    https_open = http_open

    def run_exchange(self, exchange):
        try:
            exchange.send_request()
            exchange.read_response_head()
            exchange.request.prefix = b""       # not to be kept while the response streams
            return exchange
        except BaseException:               # also whatever `wait` raises: the client has left, say
            exchange.close()
            raise


def upstream_error(code, message, headers=()):
    """504 for a time-out, else 502."""
    return ErrorResponse(504 if code == "upstream_timeout" else 502, code, message, None, headers)

def response_error(error):
    """What a client gets to read when the upstream gave no response."""
    if isinstance(error, TimedOut):
        return upstream_error("upstream_timeout",
                              "The upstream did not answer within the time set by AIPROXY_TIMEOUT.")
    message = "The upstream hung up without a response."
    if isinstance(error, ProtocolError):
        message = "The upstream's response cannot be read: %s" % error.message
    return upstream_error("upstream_bad_response", message)

def connect_error(error):
    """What a client gets to read when there is no way to the upstream."""
    if isinstance(error, TimedOut):
        return upstream_error("upstream_timeout", "The upstream could not be reached within the "
                              "time set by AIPROXY_CONNECT_TIMEOUT.")
    check_tls_error(error)                  # part two: TLS errors in words
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return upstream_error("upstream_unreachable", "The upstream cannot be reached: %s." % reason)


class Connector:
    """How a new connection to the upstream is made."""

    def __init__(self, settings):
        upstream = settings.upstream
        self.address = (upstream.host, upstream.port)       # where to connect
        self.open_tunnel = None     # (connection, wait): see "Proxies on the way up"
        self.tls = None
        if upstream.scheme == "https":
            self.tls = make_tls_context(ssl.PROTOCOL_TLS_CLIENT)
            self.tls.load_default_certs()
        self.server_name = upstream.server_name             # whose certificate it must be
        self.last_address = None            # the one that took the last connection
        self.connect_timeout = settings.connect_timeout

    def connect(self, wait):
        """A new connection. One deadline holds for all of it. Raises OSError, ProtocolError."""
        deadline = time.monotonic() + self.connect_timeout

        def wait_until_deadline(connection, mask):
            wait(connection, mask, deadline - time.monotonic())

        connection = self.connect_tcp(wait, deadline)
        try:
            if self.open_tunnel:
                self.open_tunnel(connection, wait_until_deadline)
            if self.tls:
                connection.start_tls(self.tls, self.server_name, wait_until_deadline)
            return connection
        except BaseException:               # also when the client has left meanwhile
            connection.close()
            raise

    def connect_tcp(self, wait, deadline):
        """A connection to the first of the name's addresses that accepts, in a share of the time.

        The one that accepted last comes first, so that a dead one costs its share only once. The
        look-up of the name cannot be interrupted, but its time counts.
        """
        host, port = self.address
        addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        if time.monotonic() > deadline:
            raise TimedOut()
        addresses.sort(key=lambda found: found[4] != self.last_address)
        failure = None
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            try:
                sock = socket.socket(family, kind, protocol)
                connection = connect_socket(sock, address, wait, share)
                self.last_address = address
                return connection
            except OSError as error:        # also of a family that this machine lacks
                failure = error
        raise failure


def make_tls_context(protocol):
    """A client verifies certificates. create_default_context would honour SSLKEYLOGFILE."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ssl.OPENSSL_VERSION_INFO >= (3,):    # CPython 3.8 and 3.9 set it: a cut looked complete
        context.options &= ~OP_IGNORE_UNEXPECTED_EOF
    return context

def connect_socket(sock, address, wait, seconds):
    connection = BufferedSocket(sock)
    try:
        with contextlib.suppress(BlockingIOError):      # it is under way
            sock.connect(address)
        wait(connection, WRITE, seconds)
        status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            raise OSError(status, os.strerror(status))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    except BaseException:                   # also when the client has left meanwhile
        connection.close()
        raise


class Exchange:
    """One request up and its response down. It alone decides whether its connection is used again.

    `status`, `reason`, `headers` are the response's. `declared_length` is the one in its head, also
    to HEAD; `body` reads it; `prefetched` is what has been read of it before anybody asked.
    """

    def __init__(self, connection, request, keep):
        self.connection = connection
        self.request = request
        self.keep = keep                    # what to do with a connection that can be used again
        self.unsent = None                  # what comes next of the request, a memoryview,
        self.rest = b""                     # and what of its prefix comes behind that
        self.bytes_sent = 0
        self.request_sent = False           # all of it
        self.first_line = None              # of the response, once its head has been read
        self.failure = None                 # of the connection: there may be a response before it
        self.interim = 0                    # 1xx responses before it
        self.keep_alive = False             # does the upstream want to go on?
        self.body = None
        self.prefetched = b""

    def wait(self, mask=READ, seconds=math.inf):
        self.request.wait(self.connection, mask, min(seconds, self.request.timeout))

    # -- up

    def send_request(self):
        """Send head and body, until a response comes, or a hang-up that may follow one."""
        request = self.request
        first_line = "%s %s HTTP/1.1" % (request.method, request.selector)
        head = render_head(first_line.encode(), request.fields)
        begin = encode_chunk(request.prefix[:READ_SIZE], request.is_chunked)
        self.unsent = memoryview(head + begin)
        self.rest = memoryview(request.prefix)[READ_SIZE:] or b""       # large: never copied
        while True:
            waits_for = self.send_more()
            if waits_for is None:
                return
            if waits_for is self.connection:
                self.wait(READ | WRITE)
            else:
                request.upload.wait_for_client(other=self.connection)
            if self.has_responded():
                return

    def send_more(self):
        """Send what is here of the request and what the upstream takes of it now.

        Returns the side that it then waits for; None when all is sent, or nothing more can be.
        """
        while not (self.request_sent or self.failure):
            self.unsent = self.unsent or self.next_piece()
            if not self.unsent:
                return self.request.upload.client
            # At first no more than TLS sends as one record: of more, some may go out and the rest
            # fail, and it would look as if nothing had.
            part = self.unsent if self.bytes_sent else self.unsent[:FIRST_SEND]
            try:
                sent = self.connection.send_some(part)
            except OSError as error:
                self.failure = error
                self.connection.was_reset = isinstance(error, ConnectionResetError)
                return None
            self.bytes_sent += sent
            self.unsent = self.unsent[sent:]
            self.request_sent = self.request.upload.done and not (self.unsent or self.rest)
            if sent < len(part):
                return self.connection
        self.unsent = None                  # an empty view of the body would keep all of it
        return None

    def next_piece(self):
        """More of the body, framed; empty if nothing of it is here."""
        rest = self.rest
        if rest:
            self.rest = b""
            return memoryview(encode_chunk(rest, self.request.is_chunked))
        upload = self.request.upload
        piece = encode_chunk(upload.read(), self.request.is_chunked)
        if upload.done and self.request.is_chunked:
            piece += LAST_CHUNK
        return memoryview(piece)

    def has_responded(self):
        """Is the head of the final response here, or has the upstream hung up?"""
        connection = self.connection
        try:
            is_open = connection.fill()
        except OSError as error:
            self.failure = error
            return True
        while b"\r\n\r\n" in connection.buffer and not self.first_line:
            self.read_one_head()
        return bool(self.first_line) or not is_open or len(connection.buffer) > MAX_HEAD

    # -- down

    def read_more(self):
        if not self.failure:
            self.wait()
        data = self.connection.receive()
        if self.failure and not data:       # what came before it is here by now
            raise self.failure
        if data == b"":
            raise ClosedEarly()
        self.connection.buffer += data or b""

    def read_one_head(self):
        """Read a head. Interim responses are counted, and dropped."""
        first_line, self.headers = read_head(self.connection, STATUS_LINE, self.read_more)
        self.status = int(first_line[1])
        if self.status >= 200 or self.status == 101:
            self.first_line = first_line
            return
        self.interim += 1
        if self.interim > MAX_INTERIM:
            raise ProtocolError("it sent interim responses only")
        self.request.on_interim(self.status, self.headers)

    def read_response_head(self):
        """The head of the final response, and what it says of the body."""
        while not self.first_line:
            self.read_one_head()
        if self.status == 101 and not self.request.asks_to_switch():
            raise ProtocolError("it switched protocols unasked")

        is_http10 = self.first_line[0] == b"0"
        self.reason = self.first_line[2] or b""
        if self.request.method == "HEAD" or self.status < 200 or self.status in (204, 304):
            self.declared_length = content_length(self.headers)
            self.body = ContentLengthBody(self.connection, 0)       # whatever the fields say
        else:
            self.body = make_body(self.connection, self.headers, is_http10, is_response=True)
            self.declared_length = self.body.length
        closes = is_http10 or b"close" in self.headers.connection_options
        self.keep_alive = self.status != 101 and not closes

    def media_type(self):
        """Without its parameters, in lower case."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    def is_coded(self):
        """Is the body compressed, say, so that it cannot be read as it is?"""
        codings = {coding.lower() for coding in self.headers.elements(b"content-encoding")}
        return not codings <= {b"identity"}

    def drop_fields_with(self, secrets):
        """Take out of the head what holds a secret: an upstream may repeat our key."""
        if holds_secret(self.headers.raw, secrets):
            self.reason = b""
            fields = [field for field in self.headers.fields
                      if not holds_secret(b"\n".join(field), secrets)]
            self.headers = Headers(fields)

    def prefetch(self, enough, seconds):
        """Read the body into `prefetched` until that is `enough` bytes, for `seconds` at most.

        A body that breaks off is left as it is: the next to read it will see that.
        """
        pieces = []
        with contextlib.suppress(OSError, ProtocolError):       # TimedOut is one, too
            for piece in read_pieces(self.body, self.wait, enough, seconds):
                pieces.append(piece)
        self.prefetched += b"".join(pieces)

    def close(self):
        """Give the connection back after a clean end, else close it: the upstream stops working.

        Trailing data, bytes after the response, would be taken for the start of the next one.
        """
        connection = self.connection
        self.connection = None
        if connection is None:
            return
        is_clean = self.request_sent and self.keep_alive and self.body.done
        if is_clean and not connection.ended and not connection.buffer:
            self.keep(connection, self.headers)
        else:
            connection.close()

# How JSON may have a letter (RFC 8259 section 7). A key is visible ASCII.
JSON_ESCAPE = re.compile(br'\\(?:u00([2-7][0-9A-Fa-f])|(["\\/]))')

def unescape(data):
    return JSON_ESCAPE.sub(lambda match: match[2] or bytes.fromhex(match[1].decode()), data)

def holds_secret(data, secrets):
    """Does a head or a field hold a secret, as it is or as URLs or JSON may have it?"""
    texts = [data]
    if b"%" in data:
        texts.append(urllib.parse.unquote_to_bytes(data))
    if b"\\" in data:
        texts.append(unescape(data))
    return any(secret in text for secret in secrets for text in texts)

# ---- The relay loop ------------------------------------------------------------------------------

class RelayLoop(threading.Thread):
    """One thread that moves the bodies of all responses and watches their clients.

    A thread for each stream would cost three times the CPU for each event. Nothing in here may
    block, and a fault in one job ends that job alone.
    """

    def __init__(self, every_tick, warn):
        super().__init__(daemon=True, name="relay-loop")
        self.every_tick = every_tick        # called twice a second with the time
        self.warn = warn
        self.stopping = False               # the grace time is over: cut what is left
        self.closed = False                 # nothing more will come: end
        self.selector = selectors.DefaultSelector()
        self.masks = {}                     # what each registered connection is watched for
        self.jobs = set()
        self.submitted = collections.deque()
        self.now = time.monotonic()         # once for all that is ready
        self.failing_since = None           # when the selector began to fail, None if it works
        # A byte into the one socket wakes the loop, which waits for the other (self-pipe).
        self.wakeup_reader, self.wakeup_writer = socket.socketpair()
        self.wakeup_reader.setblocking(False)
        self.wakeup_writer.setblocking(False)
        self.selector.register(self.wakeup_reader, READ, self.read_wakeup)

    def read_wakeup(self, mask):
        with contextlib.suppress(BlockingIOError):
            self.wakeup_reader.recv(4096)

    def submit(self, job):
        """Hand a job to the loop: from now on its sockets and buffers are the loop's."""
        self.submitted.append(job)
        self.wake()

    def wake(self):
        with contextlib.suppress(OSError):      # it has been woken already
            self.wakeup_writer.send(b"!")

    def run_and_wait(self, job):
        job.end_event = threading.Event()
        self.submit(job)
        job.end_event.wait()

    def run(self):
        last_tick = 0
        while self.jobs or not self.closed:
            for key, mask in self.select():
                self.run_step(key.data, mask)
            self.start_submitted()
            if self.stopping or self.now - last_tick >= TICK_SECONDS:
                last_tick = self.now
                for job in list(self.jobs):
                    self.run_step(job.stop if self.stopping else job.on_tick)
                self.run_step(self.every_tick, self.now)

    def start_submitted(self):
        while self.submitted:
            job = self.submitted.popleft()
            self.jobs.add(job)
            job.loop = self
            self.run_step(job.start)

    def select(self):
        """What is ready within half a second. If that fails, the jobs with a bad socket end."""
        try:
            ready = self.selector.select(TICK_SECONDS)
            self.now = time.monotonic()
            self.failing_since = None
            return ready
        except Exception as error:
            self.failing_since = self.failing_since or self.now
            self.warn("fault in the relay loop: " + format_traceback(error))
        for key in list(self.selector.get_map().values()):
            self.run_step(key.data, READ)       # none minds being called for nothing
        time.sleep(0.5)                     # it may fail again: never spin
        self.now = time.monotonic()
        return []

    def run_step(self, step, *arguments):
        """Call a method of a job. A fault of ours ends that job, not the loop that all share."""
        try:
            step(*arguments)
        except Exception as error:
            self.warn("fault in the relay loop: " + format_traceback(error))
            job = getattr(step, "__self__", None)
            if job in self.jobs:
                self.jobs.discard(job)
                self.run_step(job.finish, "internal_error")

    def watch(self, connection, mask, callback=None):
        """From now on call `callback(mask)` when `connection` is ready for `mask`; 0: never."""
        current = self.masks.get(connection, 0)
        if mask == current:
            return
        if not mask:
            del self.masks[connection]
            with contextlib.suppress(KeyError, ValueError, OSError):    # it may be bad by now
                self.selector.unregister(connection)
            return
        # OSError for a bad descriptor, or a selector that is full.
        change = self.selector.modify if current else self.selector.register
        change(connection, mask, callback)
        self.masks[connection] = mask


class Job:
    """Something that the relay loop does, in one named state; ENDED is the last of all.

    The loop calls `start`, `on_tick` (twice a second), `stop`. `outcome` is the log's, or None yet.
    """

    ENDED = "ended"

    def __init__(self, *connections):
        self.connections = connections
        self.state = "new"
        self.outcome = None
        self.bytes = 0                      # of the body, framed for the client
        self.end_event = None               # an Event, if a client thread waits for it
        self.on_end = None                  # called at the end, if anybody counts
        self.loop = None                    # set when the loop takes the job over

    def stop(self):
        self.finish("shutdown")

    def finish(self, outcome):
        """The end: give the sockets back to whoever submitted the job."""
        if self.state == self.ENDED:
            return
        self.state = self.ENDED
        self.outcome = outcome
        for connection in self.connections:
            self.loop.watch(connection, 0)
        self.loop.jobs.discard(self)
        if self.end_event:
            self.end_event.set()
        if self.on_end:
            self.on_end()


class Pace:
    """How fast a client moves a body since the moment `now`, while it is the one waited for.

    After `grace` seconds BODY_RATE on average, and whatever it has moved, something within
    STALL_SECONDS: neither a byte a minute nor a fast beginning keeps a place.
    """

    def __init__(self, now, grace):
        self.deadline = now + grace

    def add(self, count, now):
        if count:
            self.deadline = min(self.deadline + count / BODY_RATE, now + STALL_SECONDS)

    def patience(self, now):
        """For how many seconds the client may be waited for."""
        return self.deadline - now


class ResponseJob(Job):
    """The body of one response on its way down.

    RELAYING   the client has taken all there was: the upstream is read
    BLOCKED    the client is behind: the upstream is not read until `unsent` is gone. So the
               back-pressure reaches it, and one piece at most is held for a slow client
    FLUSHING   the body is over: what is left is `unsent`
    """

    RELAYING = "relaying"
    BLOCKED = "blocked"
    FLUSHING = "flushing"

    def __init__(self, handler, exchange, is_chunked, secret_filter):
        super().__init__(handler.client, exchange.connection)
        self.client = handler.client
        self.upstream = exchange.connection
        self.exchange = exchange
        self.body = exchange.body
        self.timeout = handler.settings.timeout
        self.is_chunked = is_chunked
        self.secret_filter = secret_filter  # None where there is nothing to look for
        self.observe = handler.service.observe_response(handler.record)
        self.on_silence = handler.service.on_silence
        self.unsent = b""
        self.last_taken = 0.0               # when the client last took something
        self.pace = None                    # of the client, while it is behind
        self.heard = 0.0                    # when the upstream last sent or took something
        self.events = handler.service.follow_events(self, handler)

    # -- in the client thread, before the job is submitted

    def first_bytes(self):
        """What is already here, framed: often the whole body, and the loop is never needed."""
        data = self.frame(self.exchange.prefetched) if self.exchange.prefetched else b""
        if not self.outcome:
            data += self.next_bytes()
        return data

    # -- in the loop's thread

    def start(self):
        self.heard = self.loop.now
        self.set_state(self.RELAYING)
        if self.upstream.buffer:
            self.on_upstream(READ)

    def set_state(self, state):
        """Watch what the state waits for. The client is watched in all of them."""
        self.state = state
        client_mask = reading_mask(self.client)
        if self.unsent:
            client_mask |= WRITE
        self.loop.watch(self.client, client_mask, self.on_client)
        self.loop.watch(self.upstream, self.upstream_mask(), self.on_upstream)

    def upstream_mask(self):
        return READ if self.state == self.RELAYING else 0

    def on_upstream(self, mask):
        """Some of the body is here, or its end: relay it before more is read."""
        if not mask & READ:
            return
        while self.state == self.RELAYING:
            self.heard = self.loop.now
            self.send(self.next_bytes())
            if not self.upstream.buffer:
                return

    def on_client(self, mask):
        """The client can take more, has sent more, or has left."""
        if self.state == self.ENDED:        # by an event of the same batch: nothing here is ours
            return None
        if mask & READ and not read_from_client(self.client):
            return self.finish("client_gone")
        if self.unsent:
            self.send(b"")
        if self.state == self.RELAYING and self.upstream.buffer:
            self.on_upstream(READ)
        if self.state != self.ENDED:
            self.set_state(self.state)

    def next_bytes(self):
        """The next bytes for the client, framed. Sets `outcome` when the body is over."""
        try:
            data = self.body.read()
        except (OSError, ProtocolError) as error:
            is_end = isinstance(error, ClosedEarly) and self.events and self.events.is_final()
            if not is_end:
                return self.cut("upstream_died")
            self.body.done = True
            data = b""
        framed = self.frame(data)
        if self.body.done and not self.outcome:
            if self.events and self.events.is_broken_off():
                return framed + self.cut("upstream_died")
            self.outcome = "ok"
            if self.is_chunked:
                framed += LAST_CHUNK
        return framed

    def frame(self, data):
        """The bytes that carry a piece of the body. It is cut where a provider key begins."""
        if self.secret_filter:
            data = self.secret_filter.feed(data, is_end=self.body.done)
            if self.secret_filter.found:
                self.outcome = "upstream_credentials_rejected"
        if data and self.observe:
            self.observe(data)
        self.bytes += len(data)
        if self.events:
            self.events.feed(data)
        return encode_chunk(data, self.is_chunked)

    def cut(self, outcome):
        """The body ends before its end. An event says so, if it can; never a last chunk."""
        self.outcome = outcome
        return self.frame(self.events.tell_cut(outcome)) if self.events else b""

    def send(self, data):
        """Send at once what the client takes, and keep the rest: nothing is collected."""
        data = self.unsent + data
        try:
            sent = self.client.send_some(data) if data else 0
        except OSError:
            return self.finish("client_gone")
        if sent:
            self.last_taken = self.loop.now
        self.unsent = data[sent:]
        if self.unsent:
            self.pace = self.pace or Pace(self.loop.now, STALL_SECONDS)
            self.pace.add(sent, self.loop.now)
        else:
            self.pace = None
        if self.outcome and not self.unsent:
            self.finish(self.outcome)
        elif self.outcome:
            self.set_state(self.FLUSHING)
        elif self.unsent:
            self.set_state(self.BLOCKED)
        elif self.state != self.RELAYING:
            self.heard = self.loop.now      # the silence was of our own making
            self.set_state(self.RELAYING)

    def end_early(self, outcome):
        if not self.outcome:
            self.send(self.cut(outcome))

    def stop(self):
        self.end_early("shutdown")
        self.finish("shutdown")

    def is_stalled(self):
        """Does the client take too little?"""
        return self.pace is not None and self.pace.patience(self.loop.now) < 0

    def on_tick(self):
        if not reading_mask(self.client) and wait_ready(self.client, 0, 0):
            self.finish("client_gone")
        elif self.is_stalled():
            self.finish("client_stalled")
        elif self.state == self.RELAYING and self.loop.now - self.heard > self.timeout:
            self.end_early("upstream_timeout")
        elif self.state == self.RELAYING:
            self.on_silence(self)

# ---- HTTP on the wire ----------------------------------------------------------------------------
# One reader of heads and one of bodies, strict, for both sides. What breaks the rules is a
# ProtocolError; whoever asked knows whose message it was.

class BufferedSocket:
    """A non-blocking socket, plain or TLS, with the bytes read from it and not used yet.

    A read takes more than a TLS record (16 KB): TLS keeps back no bytes that no selector sees.
    """

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock = sock
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.buffer = b""
        self.ended = False                  # the peer has ended its sending side
        self.was_reset = False              # a send was told of it: then no read is

    def fileno(self):
        return self.sock.fileno()

    def close(self):
        self.sock.close()

    def start_tls(self, context, server_name, wait):
        """Change to TLS as a client. An end without close_notify then is an error: a cut."""
        self.sock = context.wrap_socket(self.sock, server_hostname=server_name,
                                        do_handshake_on_connect=False, suppress_ragged_eofs=False)
        self.is_tls = True
        self.complete(self.sock.do_handshake, wait)

    def complete(self, step, wait):
        """Take a step of TLS, such as the handshake. `wait(self, mask)` waits for the socket."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                wait(self, READ)
            except ssl.SSLWantWriteError:
                wait(self, WRITE)

    # -- reading and writing what is possible now

    def receive(self):
        """Up to READ_SIZE new bytes; b"" at the end, None if there are none yet.

        Raises OSError; ClosedEarly for TLS that ends without close_notify, and so perhaps too soon.
        """
        try:
            data = self.sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError) or "UNEXPECTED_EOF" in (error.reason or ""):
                self.ended = True
                raise ClosedEarly()
            raise
        self.ended = not data
        return data

    def fill(self):
        """Add what has arrived to the buffer; False at the end. Raises OSError."""
        data = self.receive()
        self.buffer += data or b""
        return data != b""

    def send_some(self, data):
        """How many bytes were taken: 0 if none can be now. Raises OSError."""
        sent = 0
        try:
            sent = self.sock.send(data)
            while self.is_tls and sent < len(data):         # it takes one record at a time
                sent += self.sock.send(memoryview(data)[sent:])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        return sent

def wait_ready(connection, mask, seconds, other=None):
    """Sleep until `connection` is ready for its READ | WRITE, or `other` can be read, or hangs up.

    Returns those that are; none after `seconds`, or after a day, where poll might not take more.
    """
    seconds = min(max(0, seconds), 86400)
    if not hasattr(select, "poll"):         # Windows
        selector = selectors.SelectSelector()
        for one, wanted in ((connection, mask), (other, reading_mask(other) if other else 0)):
            if wanted:
                selector.register(one, wanted)
        return [key.fileobj for key, _ in selector.select(seconds)] if selector.get_map() else []
    poll = select.poll()                    # in less than half of the time of a PollSelector
    number = connection.fileno()
    poll.register(number, POLL_EVENTS[mask])
    if other:
        poll.register(other.fileno(), POLL_EVENTS[reading_mask(other)])
    ready = poll.poll(seconds * 1000)
    return [connection if found == number else other for found, _ in ready]

# -- watching a client while its response is under way, or nothing is

def reading_mask(client):
    """READ, or 0 while so much of it is here unread that we stop: it may hang up all the same."""
    return READ if len(client.buffer) < MAX_PIPELINED_BYTES else 0

def has_sent(client):
    """Is something of an idle client here? Else it is silent, or has left. Nothing is read."""
    try:
        return bool(peek(client))
    except OSError:                 # BlockingIOError is one, too
        return False

def peek(client):
    """The first byte that has come and is not read yet, b"" at the end. Of TLS, as it travels."""
    # Not the method of the class for TLS, which takes no flags.
    return socket.socket.recv(client.sock, 1, socket.MSG_PEEK)

def read_from_client(client):
    """Read what a client has sent into its buffer, a next request too. False: it has left."""
    try:
        return client.fill()
    except OSError:
        client.ended = True
        return False

# -- heads

class Headers:
    """The fields of a head, as bytes: in the order and the spelling in which they came."""

    def __init__(self, pairs, raw=b""):
        self.raw = raw                      # the whole head
        self.fields = [(name, value.strip(b" \t")) for name, value in pairs]
        # By lower-case name; of a repeated field the first.
        self.first = {name.lower(): value for name, value in reversed(self.fields)}
        self.get = self.first.get
        self.has_duplicates = len(self.first) < len(self.fields)
        # `close`, and the names of fields that are for this hop alone.
        self.connection_options = [one.lower() for one in self.elements(b"connection")]

    def __contains__(self, name):
        return name in self.first

    def get_all(self, name):
        """The values of all fields of this name, which is in lower case."""
        if name not in self.first:
            return []
        if not self.has_duplicates:
            return [self.first[name]]
        return [value for other, value in self.fields if other.lower() == name]

    def elements(self, name):
        """The comma-separated elements of all fields of this name."""
        values = self.get_all(name)
        if not values:
            return values
        elements = [one.strip(b" \t") for one in b",".join(values).split(b",")]
        return [one for one in elements if one]


def skip_empty_lines(connection, read_more):
    """Up to four empty lines before a request line are forgiven (RFC 9112 section 2.2)."""
    for _ in range(4):
        while connection.buffer in (b"", b"\r"):
            read_more()
        if not connection.buffer.startswith(b"\r\n"):
            return
        connection.buffer = connection.buffer[2:]

def read_head(connection, pattern, read_more):
    """The groups of the first line, by `pattern`, and the Headers at the front of the buffer.

    `read_more()` fills the buffer. ProtocolError as soon as a head is ruled out, so that nobody
    waits for an end that may never come.
    """
    searched = 0
    if not connection.buffer:
        read_more()
    while True:
        end = connection.buffer.find(b"\r\n\r\n", searched)
        head = connection.buffer[:end] if end >= 0 else connection.buffer
        if end < 0 or end > MAX_LINE:       # not all here, or large
            check_beginning(head, searched, pattern)
        if end >= 0:
            parsed = parse_head(head, pattern)
            connection.buffer = connection.buffer[end + 4:]
            return parsed
        searched = max(0, len(connection.buffer) - 3)       # the end may have begun
        read_more()

def check_beginning(head, searched, pattern):
    """Only what is new since `searched` is looked at: a slow head must not cost quadratic time."""
    line_end = head.find(b"\r\n")
    if line_end > MAX_LINE or (line_end < 0 and len(head) > MAX_LINE):
        raise ProtocolError("The first line is longer than %d bytes." % MAX_LINE, status=414)
    if line_end >= searched and not pattern.fullmatch(head, 0, line_end):
        raise ProtocolError("The first line is malformed.")
    if len(head) > MAX_HEAD:
        raise ProtocolError("The head is larger than %d bytes." % MAX_HEAD, status=431)
    if BARE_LF.search(head, max(0, searched - 1)):
        raise ProtocolError("A line ends in a bare LF.")

def parse_head(head, pattern):
    """The groups of the first line and the Headers of a head, without its last empty line."""
    lines = head.count(b"\r\n")
    line_end = head.find(b"\r\n") if lines else len(head)
    start = pattern.fullmatch(head, 0, line_end)
    if not start:
        raise ProtocolError("The first line is malformed.")
    if lines > MAX_FIELDS:
        raise ProtocolError("There are more than %d header fields." % MAX_FIELDS, status=431)
    if len(head) > MAX_LINE and max(map(len, head.split(b"\r\n"))) > MAX_LINE:
        raise ProtocolError("A header field is longer than %d bytes." % MAX_LINE, status=431)
    fields = FIELD_LINES.findall(head, line_end)
    if len(fields) != lines:
        raise ProtocolError("A header field is malformed.")
    return start.groups(), Headers(fields, head)

def render_head(first_line, fields):
    """The bytes of a head that parse_head would read."""
    return b"\r\n".join([first_line, *map(b": ".join, fields), b"\r\n"])

def content_length(headers):
    """The one Content-Length, None without one. RFC 9112 section 6.3, without the leniency."""
    value = headers.get(b"content-length")
    if value is None:
        return None
    is_repeated = headers.has_duplicates and len(headers.get_all(b"content-length")) > 1
    if is_repeated or len(value) > 18 or not value.isdigit():
        raise ProtocolError("Content-Length must be one number.")
    return int(value)

def declares_chunks(headers, is_http10):
    """Is the body chunked? No other transfer coding, and no length beside it (section 6.1).

    A second reading of where a body ends is what request smuggling is made of.
    """
    if b"transfer-encoding" not in headers.first:
        return False
    codings = headers.get_all(b"transfer-encoding")
    if len(codings) > 1 or codings[0].lower() != b"chunked" or is_http10:
        raise ProtocolError("The only transfer coding is chunked, once, in HTTP/1.1.")
    if b"content-length" in headers:
        raise ProtocolError("Transfer-Encoding and Content-Length exclude each other.")
    return True

def make_body(connection, headers, is_http10, is_response=False):
    """What reads a body. Without a length a request has none; a response's ends by close (6.3)."""
    if declares_chunks(headers, is_http10):
        return ChunkedBody(connection)
    length = content_length(headers)
    if length is None and is_response:
        return UntilCloseBody(connection)
    return ContentLengthBody(connection, length or 0)

# -- bodies

class BodyReader:
    """One body on its way in. What comes behind it stays in the connection's buffer."""

    length = None                   # bytes, where the head declares them
    remaining = 0                   # bytes that are sure to come: of the body, or of a chunk

    def __init__(self, connection):
        self.connection = connection
        self.done = False
        self.failure = None

    def read(self):
        """The bytes of the body that are here, decoded; b"" for none, or at its end (see `done`).

        It never waits. ProtocolError for broken framing, ClosedEarly for a body that is cut off,
        OSError for a broken connection; once broken it stays so.
        """
        if self.failure:
            raise self.failure
        if self.done:
            return b""
        try:
            data = self.connection.buffer or self.connection.receive()
            self.connection.buffer = b""
            if data == b"":
                self.end_of_connection()
            return self.decode(data) if data else b""
        except (OSError, ProtocolError) as error:
            self.failure = error
            raise

    def end_of_connection(self):
        raise ClosedEarly()


def read_pieces(body, wait_for_more, enough, seconds=math.inf):
    """Yield what comes of a body within `seconds`, until it is `enough` bytes or more."""
    deadline = time.monotonic() + seconds
    while not body.done and enough > 0:
        piece = body.read()
        yield piece
        enough -= len(piece)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        if not piece and not body.done:
            wait_for_more(seconds=remaining)


def join_pieces(pieces):
    """One body. Not a list, in which a piece of two bytes would take sixty."""
    body = bytearray()
    try:
        for piece in pieces:
            body += piece
        return bytes(body)
    finally:
        body.clear()        # the traceback of an error may keep this frame for a while


class ContentLengthBody(BodyReader):

    def __init__(self, connection, length):
        super().__init__(connection)
        self.length = length
        self.remaining = length
        self.done = length == 0

    def decode(self, data):
        body = data[:self.remaining]
        self.connection.buffer = data[self.remaining:]
        self.remaining -= len(body)
        self.done = self.remaining == 0
        return body


class UntilCloseBody(BodyReader):
    """A response's body that ends with its connection. A reset is never that end."""

    def decode(self, data):
        return data

    def end_of_connection(self):
        if self.connection.was_reset:
            raise ClosedEarly()
        self.done = True


class ChunkedBody(BodyReader):
    """RFC 9112 section 7.1. Extensions and trailer fields are checked and dropped.

    SIZE       a chunk's size line comes next
    DATA       `remaining` bytes of a chunk are to come
    DATA_END   the line end behind a chunk comes next
    TRAILER    trailer fields come next, and an empty line
    """

    SIZE = "size"
    DATA = "data"
    DATA_END = "data end"
    TRAILER = "trailer"

    def __init__(self, connection):
        super().__init__(connection)
        self.state = self.SIZE
        self.remaining = 0          # bytes of the chunk
        self.partial = b""          # of a line that is not whole yet
        self.trailer_size = 0       # bytes, line ends included
        self.trailer_lines = 0

    def decode(self, data):
        """What was decoded before a broken rule is handed out first; the next read() raises."""
        data = self.partial + data
        self.partial = b""
        pieces = []
        position = 0
        try:
            while position < len(data) and not self.done:
                if self.state == self.DATA:
                    piece = data[position:position + self.remaining]
                    pieces.append(piece)
                    position += len(piece)
                    self.take_data(piece)
                else:
                    position = self.take_line(data, position)
        except ProtocolError as error:
            if not pieces:
                raise
            self.failure = error
        self.connection.buffer = data[position:]
        return b"".join(pieces)

    def take_data(self, piece):
        self.remaining -= len(piece)
        if not self.remaining:
            self.state = self.DATA_END

    def take_line(self, data, start):
        """Act on the line that begins at `start`. Returns where it ends."""
        end = data.find(b"\r\n", start)
        if end < 0:
            self.keep_partial(data[start:])
            return len(data)

        line = data[start:end]
        if self.state == self.SIZE:
            self.take_size(line)
        elif self.state == self.DATA_END:
            if line:
                raise ProtocolError("a chunk is longer than its size")
            self.state = self.SIZE
        elif line:
            self.check_trailer(line)
        else:
            self.done = True
        return end + 2

    def take_size(self, line):
        size = CHUNK_LINE.fullmatch(line)
        if not size or len(line) > MAX_CHUNK_LINE:
            raise ProtocolError("a chunk's size is malformed")
        self.remaining = int(size.group(1), 16)
        self.state = self.DATA if self.remaining else self.TRAILER

    def check_trailer(self, line):
        """A trailer must not change what the head said (RFC 9110 section 6.5.1)."""
        self.trailer_size += len(line) + 2
        self.trailer_lines += 1
        if self.trailer_size > MAX_TRAILER or self.trailer_lines > MAX_FIELDS:
            raise ProtocolError("there are too many trailer fields")
        field = FIELD_LINE.fullmatch(line)
        if not field or field.group(1).lower() in (
                b"content-length", b"transfer-encoding", b"host", b"authorization"):
            raise ProtocolError("a trailer field is malformed")

    def keep_partial(self, line):
        """Keep the beginning of a line if it can become a good one, else nobody waits for it."""
        if self.state == self.TRAILER:
            is_good = b"\n" not in line and len(line) + self.trailer_size <= MAX_TRAILER
        elif self.state == self.SIZE:
            is_good = len(line) <= MAX_CHUNK_LINE and CHUNK_LINE_START.fullmatch(line)
        else:
            is_good = line == b"\r"
        if not is_good:
            raise ProtocolError("a line is malformed or too long")
        self.partial = line


def encode_chunk(data, is_chunked=True):
    """`data` as one chunk, if the body is chunked. No empty one: that would be the last."""
    if not is_chunked or not data:
        return data
    return b"%x\r\n%b\r\n" % (len(data), data)

# ---- The log -------------------------------------------------------------------------------------

class Record:
    """What the log says of one request."""

    def __init__(self, address):
        self.began = time.monotonic()
        self.client = address               # or the client key's name
        self.method = ""
        self.path = ""
        self.model = ""
        self.status = None
        self.upstream_status = None
        self.first_byte = None              # seconds
        self.bytes = 0
        self.count_tokens = None            # gives prompt and completion tokens, where they count
        self.outcome = ""                   # "ok", an error's code, or how it was cut
        self.id = "req_%016x" % random.getrandbits(64)      # or the upstream's, if it sends one

    def as_dict(self, redact):
        """The fields of a line, in their order: seconds, bytes, None for what is unknown.

        Clients choose most of the texts: `redact(text, most)` cuts each to its length.
        """
        prompt_tokens, completion_tokens = None, None
        if self.count_tokens:
            prompt_tokens, completion_tokens = self.count_tokens()
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": redact(self.client, 100),
            "method": redact(self.method, 32) or "-", "path": redact(self.path, 256),
            "model": redact(self.model, 100), "status": self.status,
            "upstream_status": self.upstream_status,
            "first_byte": self.first_byte and round(self.first_byte, 4),
            "total": round(time.monotonic() - self.began, 4), "bytes": self.bytes,
            "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "request_id": redact(self.id, 200), "outcome": self.outcome or "client_gone"}


LOG_FORMATS = {"json": json.dumps}      # by AIPROXY_LOG: what makes a line of the values


class Log:
    """One line per request on stdout, a JSON object; warnings on stderr."""

    def __init__(self, format, secrets):
        self.format = format                   # text, json or off
        self.secrets = []               # longest first: behind a shorter one its end would stay
        self.longest = 7                # characters that one may take, percent-encoded thrice
        self.add_secrets(secrets)

    def add_secrets(self, secrets):
        self.longest = max([self.longest] + [7 * len(secret) for secret in secrets])
        words = {secret.decode() for secret in secrets}
        self.secrets = sorted(words.union(self.secrets), key=len, reverse=True)

    def start(self):
        """See "Queued log"."""

    def close(self, seconds):
        """All lines are to be written within `seconds`."""

    def write(self, record):
        if self.format == "off":
            return
        values = record.as_dict(self.redact)
        make_line = LOG_FORMATS.get(self.format, json.dumps)
        self.put(sys.stdout, make_line(values))

    def warn(self, text):
        """On one line, with escapes for what could end it or move a terminal's cursor."""
        letters = self.redact(text, 2000)
        line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in letters)
        self.put(sys.stderr, "aiproxy: " + line)

    def put(self, stream, line, end="\n"):
        write_all(stream, line + end)

    def redact(self, text, most):
        """At most so many characters of a text, without our keys, encoded or not.

        It is cut before anything else is done with it: it may have millions of characters.
        """
        readable = text[:most + self.longest]
        masked = self.mask(readable)
        decoded = masked
        for _ in range(3):              # as often as anybody may have encoded it
            decoded = urllib.parse.unquote(decoded)
        if decoded != masked and any(secret in decoded for secret in self.secrets):
            masked = self.mask(decoded)
        if len(readable) < len(text):
            masked = masked[:-self.longest]     # it may end in a part of a key
        return masked[:most]

    def mask(self, text):
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

def write_all(stream, text):
    """Write text to stdout or stderr, in whatever state it is. See also "Raw output"."""
    with contextlib.suppress(OSError, ValueError):      # nobody listens any more
        is_written = False
        is_written = write_bytes(stream, text)          # part two: Raw output
        if not is_written:
            stream.write(text)
            stream.flush()

# A word that may be a key which we do not know: a caller's own.
KEY_LIKE_WORD = re.compile(r"(?!bytes-like)(?=[^\s'\"]*[0-9-])[^\s'\"]{8,}")

def format_traceback(error):
    """What a fault of ours is, and where, without what may be secret in its message."""
    places = ["%s:%d" % (frame.f_code.co_name, line)
              for frame, line in traceback.walk_tb(error.__traceback__)]
    message = traceback.format_exception_only(type(error), error)[0].strip()
    message = KEY_LIKE_WORD.sub("***", message[:1000])
    return "%s at %s" % (message[:200], " > ".join(places))

# ---- Reading the settings ------------------------------------------------------------------------

class SettingError(Exception):
    """A setting that cannot be used. The message names it, what it takes, and no secret."""


class Upstream:
    """Where requests go: a provider's name or a base URL. ValueError if it is neither."""

    def __init__(self, text):
        provider = PROVIDERS.get(text.lower())
        self.shown = (provider.base_url if provider else text).rstrip("/")
        parts, explicit_port, self.host = split_base_url(self.shown)
        self.scheme = parts.scheme
        self.port = explicit_port or DEFAULT_PORTS[parts.scheme]
        # A zone, and the dot at the end of a full name, are for the resolver alone.
        self.server_name = self.host.partition("%")[0].rstrip(".")
        self.is_loopback = is_loopback(numeric_host(self.server_name))
        self.base = parts.path                  # takes the place of /v1
        netloc = "[%s]" % self.server_name if ":" in self.server_name else self.server_name
        if explicit_port:
            netloc += ":%d" % explicit_port
        self.netloc = netloc.encode()
        self.url = "%s://%s" % (self.scheme, netloc)
        known = provider
        known = provider or find_provider(self)         # part two: More providers
        self.provider = known or Provider(self.shown)
        self.wants_key = bool(self.provider.key_header) and not self.is_loopback
        self.surely_wants_key = self.wants_key and known is not None

    def map_path(self, path):
        """The path to ask the upstream for; None for what its base URL does not serve."""
        if not self.base:
            return path
        if path == "/v1" or path.startswith("/v1/"):
            return self.base + path[len("/v1"):]
        return None


def split_base_url(url):
    """Its parts as urllib has them, its port if it names one, its host as it travels."""
    takes = ("one of %s, or a base URL such as https://host or https://host/v1, "
             "without user info, query or fragment" % ", ".join(PROVIDERS))
    match_all(r"(?i)https?://[^/?#@\s\\]+(/[A-Za-z0-9._~/-]*)?", url, takes)
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError:              # its message would hold the URL
        raise ValueError(takes)
    if not host or port == 0 or "//" in parts.path or DOT_SEGMENT.search(parts.path):
        raise ValueError(takes)
    return parts, port, host.replace("%25", "%")        # in front of an IPv6 zone: RFC 6874

def numeric_host(host):
    """The address that a host is in whatever form (127.1 is one), or its name."""
    host = host.rstrip(".")
    with contextlib.suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))
    with contextlib.suppress(OSError):
        host = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
    # To connect to "any address" is to connect to this machine.
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "::ffff:0.0.0.0": "127.0.0.1"}.get(host, host)

# -- parsers: text to value. Their ValueError says what a setting takes, and never what it got

# What keys look like: shown in no message, wherever one was put by mistake.
LIKE_KEY = re.compile(r"(?i)\b(?:sk|pk|rk|gsk|xai|hf|nvapi|pplx|ghp|r8)[-_]\w|AIza|[a-z0-9]{32}|"
                      r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}")
VISIBLE = r"[\x21-\x7e]*"

def clean(text):
    """Without the quotes around all of it: Docker's env files keep them."""
    text = text.strip()
    if text[:1] in ("'", '"') and text.find(text[0], 1) == len(text) - 1:
        return text[1:-1].strip()
    return text

def match_all(pattern, text, takes):
    """The match of all of `text`. ValueError if there is none."""
    match = re.fullmatch(pattern, text)
    if not match:
        raise ValueError(takes)
    return match

def matching(pattern, takes):
    """A parser that takes text of this form as it is."""
    def parse(text):
        return match_all(pattern, text, takes).group()
    return parse

def number_parser(kind, least, most, takes):
    """A parser for numbers from `least` to `most`; no text is 0."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text or "0")
            if least <= value <= most:
                return value
        raise ValueError(takes)
    return parse

def parse_list(text):
    """The items of a comma-separated list. A list that is meant must not count as none."""
    match_all("[^，、]*", text, "a list separated by ',' and not by '，' or '、'")
    items = [clean(item) for item in text.split(",") if clean(item)]
    if text and not items:
        raise ValueError("a list with something between its commas")
    return items

def parse_key(text):
    takes = "keys of visible ASCII characters: look for spaces, line ends, typographic quotes"
    return match_all(r"[\x21-\x7e]+", text, takes).group().encode()

def parse_keys(text):
    return [parse_key(item) for item in parse_list(text)]

def parse_client_keys(text):
    """Pairs of a name and a key."""
    keys = {}
    for index, entry in enumerate(parse_list(text), 1):
        name, equals, key = entry.partition("=")
        if not equals and ":" in entry:
            raise ValueError("name=key, with '=' and not ':', also for a key that itself holds ':'")
        if not equals:
            name, key = "client%d" % index, entry
        if not key.strip("="):
            raise ValueError("name=key where a key itself holds '='")
        match_all(r"[A-Za-z0-9_.-]{1,32}", name, "name=key with names of 1 to 32 characters of "
                  "A-Za-z0-9_.- (a key that itself holds '=' needs a name)")
        if len(name) > 15 and LIKE_KEY.search(name):    # with '=' in it: most would be logged
            raise ValueError("name=key where the name looks like no key")
        if name in keys or parse_key(key) in keys.values():
            raise ValueError("each name and each key once (client2 is the second, if it has none)")
        keys[name] = parse_key(key)
    return list(keys.items())

def parse_paths(text):
    """Pairs of a method, or *, and a path's pattern; None for no list."""
    rules = []
    for entry in parse_list(text):
        method, _, path = entry.rpartition(" ")
        method = method.strip().upper() or ("*" if path == "*" else "POST")
        is_pattern = path == "*" or (is_plain_path(path) and "?" not in path and "//" not in path)
        if method not in METHODS + ("*",) or not is_pattern:
            raise ValueError("PATH, METHOD PATH or * PATH, comma-separated, or * alone")
        rules.append((method, path))
    return tuple(rules) if rules else None

def parse_switch(text):
    takes = "1, true, yes, on or 0, false, no, off"
    return bool(match_all("(1|true|yes|on)|0|false|no|off|", text.lower(), takes).group(1))

def parse_size(text):
    """Bytes. KB, MB and GB are powers of 1024."""
    match = match_all(r"([0-9]{1,12})\s*(?:([KMG])B|B?)", text.upper(), "a size such as 32MB")
    return int(match.group(1)) << {None: 0, "K": 10, "M": 20, "G": 30}[match.group(2)]

# -- the table of settings. Each becomes an attribute of Settings: AIPROXY_MAX_BODY is `max_body`

Option = collections.namedtuple("Option", (
    "name",         # the environment variable
    "default",      # the constant at the top of the file
    "parse",        # text to value
    "help",         # for --help and the README
))
SECRET_PARSERS = [parse_keys, parse_client_keys]        # what they get is never shown
COUNT = number_parser(int, 1, 1000000, "a number from 1")
SECONDS = number_parser(float, 0.001, 86400, "seconds, more than 0")

OPTIONS = (         # those of part one; each section of part two adds its own
    Option("AIPROXY_UPSTREAM", AIPROXY_UPSTREAM, Upstream,
           "a provider's name (see PROVIDERS) or a base URL; a path in it takes the place of /v1"),
    Option("AIPROXY_KEY", AIPROXY_KEY, parse_keys,
           "the provider key, or several, comma-separated; empty: callers bring their own"),
    Option("AIPROXY_CLIENT_KEYS", AIPROXY_CLIENT_KEYS, parse_client_keys,
           "keys that clients must present, comma-separated, each name=key or key"),
    Option("AIPROXY_PATHS", AIPROXY_PATHS, parse_paths,
           "what may be called: PATH (POST), METHOD PATH or * PATH; * is one segment or, alone, "
           "everything; empty: the inference paths with a hidden key, else everything"),
    Option("AIPROXY_OPEN", AIPROXY_OPEN, parse_switch,
           "1: serve a hidden key without client keys to more than this machine, knowingly"),
    Option("AIPROXY_HOST", AIPROXY_HOST, matching(VISIBLE, "an address or a host name"),
           "address to listen on"),
    Option("AIPROXY_PORT", AIPROXY_PORT, number_parser(int, 0, 65535, "a port number, 0 to 65535"),
           "port to listen on; where it is not set, PORT, FC_SERVER_PORT and FC_CUSTOM_LISTEN_PORT "
           "are understood"),
    Option("AIPROXY_MAX_BODY", AIPROXY_MAX_BODY, parse_size,
           "largest request body that is held in memory or sent up with a hidden key (KB, MB, GB)"),
    Option("AIPROXY_MAX_CONNECTIONS", AIPROXY_MAX_CONNECTIONS, COUNT,
           "clients served at once; above it 503"),
    Option("AIPROXY_CONNECT_TIMEOUT", AIPROXY_CONNECT_TIMEOUT, SECONDS,
           "seconds to connect to the upstream, TLS included"),
    Option("AIPROXY_TIMEOUT", AIPROXY_TIMEOUT, SECONDS,
           "seconds of upstream silence, also between events; there is no limit in total"),
    Option("AIPROXY_GRACE", AIPROXY_GRACE, number_parser(float, 0, 86400, "seconds"),
           "seconds that running requests get at SIGTERM"),
    Option("AIPROXY_LOG", AIPROXY_LOG, matching("text|json|off", "text, json or off"),
           "one line per request on stdout: text, json or off"),
)
OTHER_VARIABLES = {     # by option: the other variables that set it; here those of platforms
    "AIPROXY_PORT": ("PORT", "FC_SERVER_PORT", "FC_CUSTOM_LISTEN_PORT")}
SEPARATORS = {}     # by option: what stands between the items of its list, if not a comma
# Steps by which sections of part two read more: (settings), may raise SettingError.
MORE_SETTINGS = []

def constant_text(option):
    """The value of a constant at the top, where somebody may have written a number or a list."""
    value = option.default
    if isinstance(value, (list, tuple)):
        return SEPARATORS.get(option.name, ",").join(map(str, value))
    return "" if value is None else str(value).strip()

def find_option(variable):
    for option in OPTIONS:
        if option.name == variable:
            return option
    raise SettingError("%s is not one of OPTIONS" % variable)

def may_be_secret(option, text):
    """Must this text for an option not be shown?"""
    has_user_info = option.parse is Upstream and re.search("[@?#]", text)
    return bool(option.parse in SECRET_PARSERS or has_user_info or LIKE_KEY.search(text))


class Settings:
    """The settings in force, read from `environ` here and nowhere else. Raises SettingError."""

    def __init__(self, environ):
        self.environ = dict(environ)
        clean_environment(self.environ)     # part two: Quotes and empty values
        self.shown = collections.defaultdict(str)       # by variable: what --check prints
        self.file_values = {}           # by variable: what the file holds that it names
        read_value_files(self)          # part two: Values from files
        check_placeholders(self)        # part two: Placeholders
        for option in OPTIONS:
            # The provider key, and what only one provider needs, are read in set_defaults.
            if option.name.startswith("AIPROXY_") and option.name != "AIPROXY_KEY":
                setattr(self, option.name[len("AIPROXY_"):].lower(), self.read(option.name))
        self.scheme = "http"            # of our own URLs
        self.watched_files = {}         # by path: what reads it again if it changes. See "Reload"
        self.hidden_words = []          # what no client may see, besides the provider keys
        self.aliases = {}               # the names of models that clients may use, to models
        self.models_shown = []          # those that clients get to see
        self.set_defaults()
        self.derive_keys()
        self.derive_guards()
        for read_more in MORE_SETTINGS:
            read_more(self)
        review_settings(self)           # part two: Review of the settings
        self.check_safe()

    def find_text(self, option):
        """Where a setting is set, and to what: in the environment, or in this file."""
        for name in (option.name,) + OTHER_VARIABLES.get(option.name, ()):
            if self.environ.get(name):
                return name, self.file_values.get(name, self.environ[name])
        return option.name, constant_text(option)

    def read(self, variable):
        """The value of the setting with this name. Raises SettingError."""
        option = find_option(variable)
        name, text = self.find_text(option)
        try:
            return option.parse(text)
        except ValueError as error:
            got = "got %r" % text
            if may_be_secret(option, text):
                got = "got something that is not shown here because it may be secret"
            raise SettingError("%s: %s; it takes %s" % (name, got, error))

    def set_defaults(self):
        """What depends on the provider, and defaults that depend on other settings."""
        provider = self.upstream.provider
        self.provider_keys = self.read(provider.key_variable)
        if provider.prepare:
            provider.prepare(self)
        # Is a key of ours at stake, one that is hidden or ones that were given out? Then only what
        # is named goes up, paths and header fields. (Client keys without a provider key guard an
        # upstream that wants none.)
        self.is_restricted = bool(self.provider_keys or self.client_keys)
        if self.is_restricted and self.paths is None:
            rules = [("POST", path) for path in provider.paths]
            self.paths = tuple(rules + [("GET", "/v1/models"), ("GET", "/v1/models/*")])

    def derive_keys(self):
        """The provider keys as they go up, and the words that nobody may see."""
        provider = self.upstream.provider
        header = provider.key_header or "Authorization"
        header = self.key_header or header              # part two: Another key header
        scheme = b"Bearer " if header.lower() == "authorization" else b""
        self.key_fields = [(header.encode(), scheme + key) for key in self.provider_keys]
        self.upstream_secrets = self.hidden_words + self.provider_keys
        self.field_secrets = self.upstream_secrets      # a field that holds one never comes down
        self.log_secrets = self.upstream_secrets + [key for _, key in self.client_keys]

    def derive_guards(self):
        """Who is kept out, and how.

        Where client keys, or an upstream that surely wants one, make callers bring keys, those do
        it. Else, without AIPROXY_OPEN, only this machine gets in: a hidden key is served on a
        loopback address alone (`check_safe`), and under its names (`check_host_allowed`).
        """
        is_transparent = not self.provider_keys
        # Does nobody get through without a key, ours or one that the provider surely wants?
        self.is_guarded_by_keys = bool(self.client_keys) or (
            is_transparent and self.upstream.surely_wants_key)
        is_keyless = not (self.is_guarded_by_keys or self.open)
        self.is_guarded_by_loopback = is_keyless and not is_transparent
        self.wants_loopback_host = is_keyless and may_be_loopback(self.host)

    def check_safe(self):
        """SettingError for a combination that would be open by accident."""
        if self.is_guarded_by_loopback and not is_loopback(self.host):
            raise SettingError(
                "A provider key is hidden and AIPROXY_HOST lets others reach it, but no client "
                "key is asked for. Set one of:\n"
                "  AIPROXY_CLIENT_KEYS=name=%s   (what clients must send)\n"
                "  AIPROXY_HOST=127.0.0.1   (this machine only)\n"
                "  AIPROXY_OPEN=1   (anyone may spend the key)" % os.urandom(18).hex())

# ---- Main ----------------------------------------------------------------------------------------

def main():
    """Run as a program. Returns its exit status: 1 if it cannot run, 2 for a wrong setting."""
    run = serve
    try:
        run = read_command_line(os.environ)     # part two: Command line
        settings = Settings(os.environ)
    except SettingError as error:
        write_all(sys.stderr, "aiproxy: %s\n" % error)
        return 2
    return run(settings)

def serve(settings, on_start=()):
    """Serve until a signal comes. `on_start`: called with the server once it serves."""
    make_server = Server
    server = None

    def on_signal(number, frame):
        if server is None or server.closing:
            os._exit(0)                 # before there is anything to end; or the second one
        server.closing = True

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        make_server = start_workers(settings, on_start)     # part two: Several processes
        tune_process()                                  # part two: Tuning of the process
        # musl's 128 KiB is too little for JSON; more is never used.
        threading.stack_size(1 << 20)
        server = make_server(settings)
    except (OSError, RuntimeError) as error:      # no descriptors, or no threads
        reason = getattr(error, "strerror", None) or error
        write_all(sys.stderr, "aiproxy: %s\n" % reason)
        return 1
    if server.announces:
        server.log.put(sys.stderr, "aiproxy %s on %s" % (__version__, server.url()))
        print_banner(server)                            # part two: Banner
    for function in on_start:
        threading.Thread(target=function, args=(server,), daemon=True).start()
    while not server.closing:
        server.handle_request()
    # An ordinary exit would wait for client threads, busy with streams that have just been cut.
    try:
        server.stop()
        os._exit(0)
    except Exception as error:              # a fault of ours
        server.report_fault(error)
        server.log.close(SHUTDOWN_SECONDS)
    finally:
        os._exit(1)

# ==== Part two: Parts that can be taken out =======================================================
# Each section begins with what it does, what it touches, and the one place where it is entered.
# Delete it, its line `# part two: NAME` and its constants at the top, and the relay still works.
# Some need others: delete those that name it at `# Needs:` as well.

def install_features(service):
    """Where most sections enter. Without a section and its line the relay still works."""
    install_health(service)                 # part two: Health
    install_forgiving_paths(service)        # part two: Forgiving paths
    install_cors(service)                   # part two: CORS
    install_lingering_close(service)        # part two: Lingering close
    install_busy_refusals(service)          # part two: Refusals in the right form
    install_https(service)                  # part two: HTTPS
    install_room(service)                   # part two: Room for clients
    install_secret_filter(service)          # part two: Keys in long errors
    install_redirects(service)              # part two: Redirects
    install_upstream_fields(service)        # part two: Fields for the upstream
    install_rates(service)                  # part two: Rates
    install_trusted_proxies(service)        # part two: Trusted proxies
    install_body_rules(service)             # part two: Body rules
    install_model_rules(service)            # part two: Model rules
    install_model_list(service)             # part two: Model list
    install_limits(service)                 # part two: Token and prompt limits
    install_key_rotation(service)           # part two: Several provider keys
    install_kept_connections(service)       # part two: Kept connections
    install_upstream_proxy(service)         # part two: Proxies on the way up
    install_early_responses(service)        # part two: Early responses
    install_event_streams(service)          # part two: Event streams
    install_error_forms(service)            # part two: Errors in the form of other APIs
    install_heartbeats(service)             # part two: Heartbeats
    install_google_refusals(service)        # part two: Keys that Google does not know
    install_model_names(service)            # part two: Model names for the log
    install_token_counts(service)           # part two: Token counts
    install_early_hints(service)            # part two: Early hints
    install_websocket(service)              # part two: WebSocket
    install_start_page(service)             # part two: Start page

def read_file(name, path, most=-1):
    """The bytes of the file that a setting names. SettingError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such name"
        # A path that may be a key, put there by mistake, is not shown.
        is_path = re.fullmatch(r"(?=[^./\\]*[./\\])[\w./\\:~ -]+", path)
        shown = " %s " % path if is_path and not LIKE_KEY.search(path) else " "
        raise SettingError("%s: the file%scannot be read: %s" % (name, shown, reason))

def invalid_parameter(name, rule):
    return ErrorResponse(400, "invalid_parameter", "`%s` %s." % (name, rule), name)

# ---- Command line --------------------------------------------------------------------------------
# Does: reads the options; --check, --version and --help, which serve nobody. (Part one ignores all
# options, and needs stdout and stderr.)
# Touches: the environment, before the settings are read from it.
# Entered: `read_command_line` in main().
# Needs: Quotes and empty values.

class ArgumentParser(argparse.ArgumentParser):
    """Does not echo what it does not understand: it may be a key."""

    def error(self, message):
        raise SettingError("an option is not understood, or lacks its value.\n"
                           + self.format_usage().rstrip())


MORE_HELP = []      # lines that other sections add
# By option of another section what argparse is to do with it. It goes with the section: one that
# was accepted and did nothing would relay without the settings that are meant.
MORE_ARGUMENTS = {}

def make_parser():
    lines = ["settings, from the environment:"]
    for option in OPTIONS:
        line = "  %-24s %s" % (option.name, option.help)
        default = constant_text(option)
        if default and not may_be_secret(option, default):
            line += " (default %s)" % default
        lines.append(line)
    lines += MORE_HELP
    parser = ArgumentParser(
        "aiproxy.py", description="Relays an AI provider's API and hides its key.",
        epilog="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False, allow_abbrev=False)
    add = parser.add_argument
    parser.set_defaults(demo=False, live=False, env_file=[])
    add("--check", action="store_true", help="print the settings in force and exit")
    for name, details in MORE_ARGUMENTS.items():
        add(name, **details)
    add("--version", action="store_true")
    add("--help", "-h", action="store_true")
    # No keys: `ps` shows the command line.
    for name in ("host", "port", "upstream"):
        add("--" + name, help="AIPROXY_" + name.upper())
    return parser

def open_standard_streams():
    """The null device for each that is closed: else a socket would get its number, and its text."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))

def read_command_line(environ):
    """What to do with the settings, which it puts into the environment. Raises SettingError."""
    open_standard_streams()
    parser = make_parser()
    options = parser.parse_args()
    if options.help or options.version:
        text = parser.format_help() if options.help else "aiproxy %s\n" % __version__
        write_all(sys.stdout, text)
        sys.exit(0)
    on_start = []
    on_start += prepare_reload(options, environ)        # part two: Reload
    read_environment(options, environ)
    on_start += start_demo(options, environ)        # part two: Demo
    if options.check:
        return functools.partial(check, options)
    return functools.partial(serve_with, options, on_start)

def serve_with(options, on_start, settings):
    settings.notes = options.notes              # for the banner
    return serve(settings, on_start)

def read_environment(options, environ):
    """Put what the command line and the env files say into the environment. Raises SettingError."""
    if options.live and not options.check:
        raise SettingError("--live belongs to --check")
    clean_environment(environ)
    options.notes = []                          # what the operator may want to know
    options.notes = read_env_files(options.env_file, environ)   # part two: Env files
    for name in ("host", "port", "upstream"):
        text = getattr(options, name)
        if text is None:
            continue
        variable = "AIPROXY_" + name.upper()
        try:
            find_option(variable).parse(text)
        except ValueError as error:             # what it got is not shown: it may be a key
            raise SettingError("--%s: it takes %s" % (name, error))
        environ[variable] = text

def check(options, settings):
    """Print the settings in force. Returns the exit status."""
    lines = ["%s=%s\n" % pair for pair in settings.shown.items()]
    write_all(sys.stdout, "".join(lines))
    notes = ["aiproxy: %s\n" % note for note in options.notes]
    write_all(sys.stderr, "".join(notes))
    status = 0
    status = check_live(options, settings)          # part two: A live check
    return status

# ---- Quotes and empty values ---------------------------------------------------------------------
# Does: takes the quotes off values, as Docker's env files keep them; forgets what Kubernetes sets.
# Touches: the environment, before anything is read from it.
# Entered: `clean_environment` in Settings.

# What is read of the environment, by us, by urllib and by OpenSSL.
OWN_VARIABLE = re.compile(r"AIPROXY_.*|CLOUDFLARE_.*|PORT|FC_(?:SERVER|CUSTOM_LISTEN)_PORT"
                          r"|(?:HTTPS?|ALL|NO)_PROXY|SSL_CERT_(?:FILE|DIR)", re.I | re.S)
# What Kubernetes sets for a service called aiproxy, or aiproxy-more: NAME=value.
KUBERNETES_VARIABLE = re.compile(
    r"AIPROXY_(?:\w+_)?(?:(?:SERVICE|PORT)_\w+=.*|PORT=(?:tcp|udp|sctp)://.*)", re.S)

def clean_environment(environ):
    """Take the quotes off values; what is empty, or Kubernetes' own, counts as not set."""
    for name, value in list(environ.items()):
        if not OWN_VARIABLE.fullmatch(name):
            continue
        value = clean(value)
        if value and not KUBERNETES_VARIABLE.fullmatch("%s=%s" % (name, value)):
            environ[name] = value
        else:
            del environ[name]

# ---- Env files -----------------------------------------------------------------------------------
# Does: reads settings from the files that --env-file names.
# Touches: the environment, before anything is read from it.
# Entered: `read_env_files` in read_environment.
# Needs: Command line, Quotes and empty values.

MORE_ARGUMENTS["--env-file"] = {
    "action": "append", "default": [], "metavar": "FILE", "help": "read settings from FILE"}

ENV_LINE = re.compile(
    r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*("[^"\0]*"|'[^'\0]*'|[^"'\0][^\0]*|)""", re.A)

def read_env_file(path):
    """The variables in a file of NAME=value lines. Any other line is a SettingError."""
    lines = re.split(b"\r\n|\r|\n", read_file("--env-file", path))
    values = {}
    for number, line in enumerate(lines, 1):
        try:
            # Windows' editors begin with a byte order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text or text.startswith("#"):
                continue
            name, value = match_all(ENV_LINE, text, "NAME=value").groups()
        except ValueError:                      # also for what is not UTF-8
            raise SettingError("--env-file %s: line %d is no NAME=value in UTF-8" % (path, number))
        if clean(value):
            values[name] = clean(value)
    return values

def read_env_files(paths, environ):
    """Put the variables in these files into the environment. Of several values the last counts.

    Returns a line for each that the environment overrides: a variable that a shell still has, such
    as AIPROXY_UPSTREAM, would else send the file's key to another provider without a word.
    """
    values = {}
    for path in paths:
        values.update(read_env_file(path))
    clean_environment(values)
    notes = []
    for name, value in values.items():
        in_force = environ.setdefault(name, value)      # the real environment wins
        if in_force != value and OWN_VARIABLE.fullmatch(name):
            notes.append("%s: the environment overrides --env-file" % name)
    return notes

# ---- Placeholders --------------------------------------------------------------------------------
# Does: takes no key that somebody has copied from an example.
# Touches: nothing.
# Entered: `check_placeholders` in Settings.

# Sample values, of our README and of others', and variables that nobody has filled in.
PLACEHOLDER = re.compile(
    r"<.*>|\[.*\]|\{.*\}|\$\w+|\$\{.*\}|%\w+%|.*(你的|自己编).*|.*(\.{3}|…)"
    r"|([^\W_]+[-_]+)*(x{3,}|\*{3,})|.*long[-_ ]random.*|(.*[-_ ])?your[-_ ].*"
    r"|(sk-)?your(api)?key.*"
    r"|.*[-_ ]here|(insert|enter|paste|put|change|replace|fill)[-_ ]?(in[-_ ])?(me|this|it)"
    r"|((my|the|some)[-_ ]?)?((api|secret|client|provider|access|openai)[-_ ]?)?(key|token|secret)"
    r"|placeholder|todo|password", re.I)

def check_placeholders(settings):
    """SettingError that names all settings with a key that is none: one run shows them all."""
    key_variable = settings.read("AIPROXY_UPSTREAM").provider.key_variable
    found = []
    for variable in (key_variable, "AIPROXY_CLIENT_KEYS"):
        name, text = settings.find_text(find_option(variable))
        keys = [clean(entry) for entry in text.split(",")]
        if variable == "AIPROXY_CLIENT_KEYS":
            keys = [key.partition("=")[2] or key for key in keys]
        if any(map(PLACEHOLDER.fullmatch, keys)):
            found.append(name)
    if found:
        raise SettingError(
            "%s: got something that is not shown here because it may be secret; it takes a real "
            "key: this one looks like a placeholder from an example" % ", ".join(found))

# ---- Values from files ---------------------------------------------------------------------------
# Does: reads a secret from the file that NAME_FILE names, as Docker and Kubernetes mount them.
# Touches: where settings are set. Whoever reads the settings again, reads the files again.
# Entered: `read_value_files` in Settings.
# Needs: Command line.

FILE_OPTIONS = ("AIPROXY_KEY", "AIPROXY_CLIENT_KEYS", "AIPROXY_UPSTREAM_HEADERS",
                "CLOUDFLARE_API_TOKEN")
MAX_VALUE_FILE = 1 << 20    # bytes: far above any, and /dev/zero has an end

OTHER_VARIABLES.update({option: (option + "_FILE",) for option in FILE_OPTIONS})
MORE_HELP += ["", "NAME_FILE names a file that holds the value, an entry a line, for:",
              "  " + ", ".join(FILE_OPTIONS)]

def read_value_files(settings):
    """Read the entries of the files. SettingError if one cannot be read, or has none."""
    for name in FILE_OPTIONS:
        variable = name + "_FILE"
        path = settings.environ.get(variable)
        if path is None:
            continue
        if name in settings.environ:
            raise SettingError("%s and %s are both set; set one of them" % (name, variable))
        lines = value_lines(variable, read_file(variable, path, MAX_VALUE_FILE + 1))
        settings.file_values[variable] = SEPARATORS.get(name, ",").join(lines)
        settings.shown[variable] = path         # it is one, then

def value_lines(variable, data):
    """The lines of a file that are neither empty nor comments."""
    if len(data) > MAX_VALUE_FILE:
        raise SettingError("%s: the file is larger than %d bytes" % (variable, MAX_VALUE_FILE))
    try:
        text = data.decode("utf-8-sig")         # Windows' editors begin with a byte order mark
    except UnicodeDecodeError:                  # its message would hold a part of the value
        text = "\0"
    if "\0" in text:                            # UTF-16 without a mark looks like that
        raise SettingError("%s: the file is no text in UTF-8" % variable)
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise SettingError("%s: the file holds no value" % variable)
    if OWN_VARIABLE.match(lines[0]) and "=" in lines[0]:
        raise SettingError("%s: the file holds NAME=value; it takes the value alone" % variable)
    return lines

# ---- Review of the settings ----------------------------------------------------------------------
# Does: stops the start for settings that would be lost in silence; works out what --check prints.
# Touches: nothing but `shown`.
# Entered: `review_settings` in Settings.
# Needs: Log lines as text.

# What a base URL is sometimes copied with.
ENDPOINTS = tuple(path[len("/v1"):] for path in INFERENCE_PATHS) + (
    "/images/generations", "/images/edits", "/audio/speech", "/audio/transcriptions",
    "/audio/translations", "/moderations", "/rerank")

def show_settings(settings):
    """What --check prints of each setting, unless a section knows better what is in force."""
    shown = collections.defaultdict(str)
    for option in OPTIONS:
        shown[option.name] = settings.find_text(option)[1]
        if option.parse in SECRET_PARSERS:
            shown[option.name] = "none"
    shown.update(settings.shown)
    if settings.provider_keys:
        lengths = ["%d characters" % len(key) for key in settings.provider_keys]
        variable = settings.upstream.provider.key_variable
        shown[variable] = ", ".join(lengths)
    if settings.client_keys:
        names = ["%s=***" % name for name, _ in settings.client_keys]
        shown["AIPROXY_CLIENT_KEYS"] = ", ".join(names)
    paths = ["%s %s" % rule for rule in settings.paths or ()]
    fields = [name.decode() for name, _ in settings.key_fields[:1]]
    shown["AIPROXY_PATHS"] = ", ".join(paths) or "all"
    shown["AIPROXY_KEY_HEADER"] = "".join(fields) or "none"
    shown["AIPROXY_OPEN"] = str(int(settings.open))
    settings.shown = shown

MORE_SETTINGS.append(show_settings)

def hide_misplaced_key(settings):
    """A key may stand in AIPROXY_HOST by mistake."""
    is_one = settings.host.encode() in settings.log_secrets
    if is_one or LIKE_KEY.search(settings.host):
        settings.shown["AIPROXY_HOST"] = "***"

MORE_SETTINGS.append(hide_misplaced_key)

def review_settings(settings):
    """SettingError for what is set and cannot be meant."""
    check_names(settings.environ)
    check_keys(settings)
    check_upstream(settings)
    if settings.upstream.scheme == "https":
        check_certificates(settings.environ)

def check_names(environ):
    """SettingError for a variable that looks like ours: a misspelt limit would be no limit."""
    names = [option.name for option in OPTIONS]
    constants = [name for name in globals() if name.startswith("AIPROXY_")]
    for name in constants:
        if name in names:
            continue
        # Somebody has added it at the top.
        for nearest in difflib.get_close_matches(name, names, 1, 0.9):
            raise SettingError("%s in this file is not a setting; did you mean %s?"
                               % (name, nearest))
    names += itertools.chain.from_iterable(OTHER_VARIABLES.values())
    for name in environ:
        # Docker takes the byte order mark of an env file for a part of the first name.
        plain_name = name.strip("\ufeff").upper()
        if plain_name.startswith("AIPROXY_") and name not in names:
            without_file = re.sub("_FILE$", "", plain_name)
            wanted = without_file if without_file in names else plain_name
            nearest = difflib.get_close_matches(wanted, names, 1, 0)
            raise SettingError("%s is not a setting; did you mean %s?"
                               % (printable(name[:64]), nearest[0]))

def check_keys(settings):
    """SettingError for keys in places that are not theirs, or without those that they need."""
    if any(client_key in settings.provider_keys for _, client_key in settings.client_keys):
        raise SettingError("AIPROXY_CLIENT_KEYS holds the provider key; make up another key "
                           "for the client")
    if settings.client_keys and not settings.provider_keys and settings.upstream.wants_key:
        raise SettingError(
            "AIPROXY_CLIENT_KEYS is set but AIPROXY_KEY is not: clients could present only one "
            "key, and it would be ours. Set AIPROXY_KEY to the provider key (any word, if the "
            "upstream wants none), or leave AIPROXY_CLIENT_KEYS empty")

def check_upstream(settings):
    """SettingError for a base URL that goes too far, or comes back to us."""
    url = settings.upstream.shown
    takes = ""
    for endpoint in ENDPOINTS:
        if url.lower().endswith(endpoint) and not takes:
            takes = "a base URL, to which clients add %s: %s" % (endpoint, url[:-len(endpoint)])
    if url.lower().endswith("/anthropic"):
        takes = "the base URL with /v1, in whose place it stands: %s/v1" % url
    if settings.port == settings.upstream.port and is_own_address(settings.upstream.host):
        takes = "a server other than this proxy: that is its own address and AIPROXY_PORT"
    if takes:
        raise SettingError("AIPROXY_UPSTREAM: got %r; it takes %s" % (url, takes))

def is_own_address(host):
    """Does this host lead to this machine? Only to an address of its own can a socket be bound."""
    host = numeric_host(host)
    if is_loopback(host):
        return True
    try:
        found = socket.getaddrinfo(host, 0, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as sock:
            sock.bind(address)
            return True
    return False

def check_certificates(environ):
    """SettingError for certificates in the environment that OpenSSL would just pass over."""
    file = environ.get("SSL_CERT_FILE")
    folders = environ.get("SSL_CERT_DIR", "").split(os.pathsep)
    try:
        name = "SSL_CERT_FILE"
        if file:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        name = "SSL_CERT_DIR"
        for folder in filter(None, folders):
            os.listdir(folder)
    except OSError as error:            # an SSLError is one, too
        raise SettingError("%s: certificates cannot be read there: %s"
                           % (name, error.strerror or error))

# ---- Reload --------------------------------------------------------------------------------------
# Does: reads the settings again at SIGHUP, and every minute looks whether a certificate is new.
# Touches: the server's service, which it replaces as a whole; the environment. In a thread.
# Entered: `prepare_reload` in read_command_line.
# Needs: Command line.

RELOAD_SECONDS = 60     # between two looks at the files that may change
# In force until the end: the listener, and what was made for its number of clients.
FIXED_OPTIONS = ("AIPROXY_HOST", "AIPROXY_PORT", "AIPROXY_MAX_CONNECTIONS", "AIPROXY_WORKERS")

def prepare_reload(options, environ):
    """Returns what to call once we serve."""
    if options.demo:            # its settings stand in no file
        return []
    reloader = Reloader(options, environ)
    # Also under nohup, which ignores it: a terminal that goes away then only costs a reload.
    if hasattr(signal, "SIGHUP"):       # not on Windows
        signal.signal(signal.SIGHUP, lambda number, frame: reloader.signals.put(number))
    return [reloader]


class Reloader:
    """Puts new settings in force for the requests that come from then on.

    Rates, key cooldowns and the pool of idle connections begin anew with them.
    """

    def __init__(self, options, environ):
        self.options = options
        self.given = dict(environ)              # as we were started, without the env files
        self.signals = queue.SimpleQueue()      # a signal handler may put something into it
        self.has_terminal = os.isatty(0)        # on stdin, which nohup and services do not have
        self.stamps = None                      # of the watched files, when they were last read

    def begin(self, settings):
        """From now on it is seen when a file of theirs changes."""
        if self.stamps is None:
            self.stamps = file_stamps(settings.watched_files)

    def __call__(self, server):
        """Serves as a thread."""
        self.begin(server.settings)
        while True:
            try:
                self.wait(server)
            except Exception as error:          # a fault of ours must not end the thread
                server.report_fault(error)

    def wait(self, server):
        """Wait for a signal, or until it is time to look at the files."""
        read = self.read
        try:
            self.signals.get(timeout=RELOAD_SECONDS)
        except queue.Empty:
            if file_stamps(server.settings.watched_files) == self.stamps:
                return
            read = self.read_watched            # nobody has said that the others are ready
        if self.has_terminal and not os.isatty(0):
            os.kill(os.getpid(), signal.SIGTERM)        # the window has been closed: end with it
        elif not server.closing:
            self.reload(server, read)

    def reload(self, server, read):
        """Put in force what `read` makes of the settings."""
        if not (self.options.env_file or server.settings.watched_files
                or server.settings.file_values):
            server.log.warn("there is no file to read settings from again (--env-file names one): "
                            "a restart takes new ones")
            return
        try:
            settings, fixed = read(server.settings)
        except SettingError as error:
            server.log.warn("nothing has changed, because the new settings cannot be used: %s"
                            % " ".join(str(error).split()))
            return
        server.log.add_secrets(settings.log_secrets)    # the old ones are not to be shown either
        server.log.format = settings.log
        old = server.service
        server.service = Service(settings, server)
        old.retire()
        server.log.warn("the settings have been read again and are in force")
        for note in self.options.notes:
            server.log.warn(note)
        if fixed:
            server.log.warn("a change of %s needs a restart" % ", ".join(fixed))

    def read(self, old):
        """As read_new_settings. A SettingError leaves the environment as it was."""
        # Before they are read: what changes meanwhile is seen the next time.
        stamps = file_stamps(old.watched_files)
        before = dict(os.environ)
        environ = dict(self.given)
        try:
            read_environment(self.options, environ)
            replace_environment(environ)        # urllib and OpenSSL read it, too
            found = read_new_settings(environ, old)
        except SettingError:
            replace_environment(before)
            raise
        self.stamps = stamps
        return found

    def read_watched(self, old):
        """The same settings, but for what the watched files hold now. SettingError.

        A client key's file may have changed as well: a worker that is started again would begin
        with the old one, and take a key that the others do not take any more.
        """
        stamps = file_stamps(old.watched_files)
        settings = copy.copy(old)
        settings.watched_files = {}
        for read_again in dict.fromkeys(old.watched_files.values()):
            read_again(settings)
        self.stamps = stamps
        return settings, []


def file_stamps(paths):
    """What differs once one of these files has been written or replaced."""
    stamps = []
    for path in paths:
        try:
            found = os.stat(path)
            stamp = (path, found.st_mtime_ns, found.st_ino, found.st_size)
            stamps.append(stamp)
        except OSError:
            stamps.append((path,))
    return stamps

def replace_environment(environ):
    """Change what differs, and only that: other threads may be reading it."""
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value

def read_new_settings(environ, old):
    """The settings to put in force, and the names of those that need a restart. SettingError.

    The guards must hold for the address on which we do listen: with a new AIPROXY_HOST=127.0.0.1
    nobody would be asked for a key, and 0.0.0.0 would still be open.
    """
    settings = Settings(environ)
    if settings.upstream.provider.handler != old.upstream.provider.handler:
        raise SettingError("AIPROXY_UPSTREAM: this change of the provider needs a restart")
    fixed = [option.name for option in OPTIONS if option.name in FIXED_OPTIONS
             and settings.find_text(option)[1] != old.find_text(option)[1]]
    if settings.scheme != old.scheme:
        fixed += ["AIPROXY_TLS_CERT", "AIPROXY_TLS_KEY"]
    for name in fixed:
        environ[name] = old.find_text(find_option(name))[1]
    return (Settings(environ) if fixed else settings), fixed

# ---- HTTPS ---------------------------------------------------------------------------------------
# Does: serves clients over TLS, with the certificate that AIPROXY_TLS_CERT names.
# Touches: every client connection, from the moment when it is accepted; the scheme of our URLs.
# Entered: `install_https` in install_features replaces functions that do nothing.

TLS_HANDSHAKE = b"\x16"      # the first byte of a client that speaks TLS (RFC 8446 section 5.1)
OP_NO_RENEGOTIATION = 1 << 30   # OpenSSL's number; PyPy's ssl module does not name it
TLS_REFUSALS = 10           # clients a second that get a 503, and for it a handshake by the loop

def install_https(service):
    context = service.settings.tls
    if not context:
        return

    def wrap_client(sock):
        """The handshake comes later: this is on the accepting thread."""
        return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False,
                                   suppress_ragged_eofs=False)

    service.wrap_client = wrap_client
    service.begin_client = begin_tls
    service.end_client = send_close_notify
    service.refuse = limit_refusals(service.refuse, service.log)

def limit_refusals(refuse, log):
    """A `refuse` that just hangs up where too many are refused: the loop has streams to move."""
    recent = collections.deque(maxlen=TLS_REFUSALS)     # when the last ones were

    def refuse_some(sock, record):
        now = time.monotonic()
        if len(recent) < TLS_REFUSALS or now - recent[0] > 1:
            recent.append(now)
            refuse(sock, record)
        else:
            record.outcome = "server_busy"
            log.write(record)
    return refuse_some

def begin_tls(handler):
    """The handshake, in the client's own thread and the time of its first head."""
    client = handler.client
    handler.wait_idle(HEAD_SECONDS)

    def wait(connection, mask):
        if not wait_ready(connection, mask, handler.head_deadline - time.monotonic()):
            raise ClientGone()

    try:
        speaks_tls = peek(client) == TLS_HANDSHAKE
        if speaks_tls:
            client.complete(client.sock.do_handshake, wait)
    except OSError:                     # it has left, or takes none of the TLS that we speak
        raise ClientGone()
    if not speaks_tls:
        # What it sends is read, and what it gets is sent, on the connection below the TLS.
        plain = socket.socket(fileno=client.sock.detach())
        handler.client = BufferedSocket(plain)
        raise ErrorResponse(400, "https_required", "This port speaks HTTPS, and this was plain "
                            "HTTP: the URL must begin with https://.")

def send_close_notify(handler):
    """Tell the client that nothing is missing (RFC 8446 section 6.1). It need not answer."""
    def wait(connection, mask):
        if mask == READ or not wait_ready(connection, mask, STALL_SECONDS):
            raise ClientGone()

    if handler.client.is_tls:
        with contextlib.suppress(OSError, ValueError, ClientGone):
            handler.client.complete(handler.client.sock.unwrap, wait)

def read_certificate(settings):
    """The TLS context for clients, None for plain HTTP. SettingError for what cannot be used."""
    settings.tls = None
    if not settings.tls_cert and not settings.tls_key:
        return
    if not settings.tls_cert:
        raise SettingError("AIPROXY_TLS_KEY is set but AIPROXY_TLS_CERT is not; set it to the PEM "
                           "file with the certificate chain, or leave both empty")
    key_name = "AIPROXY_TLS_KEY" if settings.tls_key else "AIPROXY_TLS_CERT"
    key_path = settings.tls_key or settings.tls_cert
    check_pem("AIPROXY_TLS_CERT", settings.tls_cert, b"CERTIFICATE-----")
    check_pem(key_name, key_path, b"PRIVATE KEY-----")
    settings.watched_files.update({settings.tls_cert: read_certificate, key_path: read_certificate})
    settings.tls = make_tls_context(ssl.PROTOCOL_TLS_SERVER)
    settings.tls.options |= OP_NO_RENEGOTIATION     # a write would have to wait for a read
    try:
        settings.tls.load_cert_chain(settings.tls_cert, key_path, refuse_password)
    except (OSError, ValueError) as error:      # an SSLError is an OSError
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            reason = "the private key does not belong to the certificate"
        elif isinstance(error, ssl.SSLError):
            reason = "certificate or key cannot be used (%s)" % (error.reason or "unknown form")
        raise SettingError("%s: %s" % (key_name, reason))
    settings.scheme = "https"

MORE_SETTINGS.append(read_certificate)

def check_pem(name, path, mark):
    """SettingError unless the file can be read and holds something of this kind."""
    if mark not in read_file(name, path):
        what = "private key" if b"KEY" in mark else "certificate"
        raise SettingError("%s: the file holds no %s in PEM form; a key may stand in the "
                           "certificate's file or in that of AIPROXY_TLS_KEY" % (name, what))

def refuse_password():
    """OpenSSL would ask for it on the terminal."""
    raise ValueError("the private key is encrypted; it takes one without a password")

OPTIONS += (
    Option("AIPROXY_TLS_CERT", AIPROXY_TLS_CERT, str,
           "PEM file with a certificate chain: serve HTTPS with it; empty: plain HTTP"),
    Option("AIPROXY_TLS_KEY", AIPROXY_TLS_KEY, str,
           "PEM file with the private key; empty: it stands in the certificate's file"),
)

# ---- Health --------------------------------------------------------------------------------------
# Does: answers /health, / and what balancers and browsers ask every server for.
# Touches: nothing. No key is needed, and no upstream call.
# Entered: `install_health` in install_features adds an answer.

LOOP_SECONDS = 5        # of failures without end: /health calls the relay loop dead
PROBES = (("OPTIONS", "/"), ("GET", "/favicon.ico"), ("HEAD", "/favicon.ico"))

def install_health(service):
    service.free_answers.append(answer_about_us)

def answer_about_us(handler):
    request = handler.request
    if (request.method, request.path) in PROBES:
        handler.send_response(204)
    elif request.method not in READ_METHODS:
        return False
    elif request.path == "/":
        send_json(handler, describe_api(handler.settings))
    elif request.path in ("/health", "/healthz"):
        send_health(handler)
    else:
        return False
    return True

def send_health(handler):
    """Are we able to serve? Models are shown to those who may list them."""
    health = {"status": "healthy", "timestamp": int(time.time())}
    if not is_working(handler.server.relay_loop):
        health["status"] = "unhealthy"
        return send_json(handler, health, 503)
    with contextlib.suppress(ErrorResponse, ProtocolError):
        handler.check_caller()
        health["models"] = handler.settings.models_shown
    return send_json(handler, health)

def send_json(handler, value, status=200):
    content = json.dumps(value).encode()
    handler.send_response(status, [JSON_TYPE], content)

def is_working(loop):
    """False too if it has done nothing but fail for a while. A busy one only takes longer."""
    since = loop.failing_since
    is_failing = since is not None and time.monotonic() - since >= LOOP_SECONDS
    return loop.is_alive() and not is_failing

def describe_api(settings):
    """What / answers to a program."""
    return {"name": "aiproxy", "version": __version__, "api": "/v1", "health": "/health",
            "default_path": example_path(settings), "client_key_needed": callers_need_key(settings)}

def callers_need_key(settings):
    """Must a request carry a key, ours or the provider's?"""
    bring_their_own = settings.upstream.wants_key and not settings.provider_keys
    return bring_their_own or bool(settings.client_keys)

def example_path(settings):
    """The path of the examples that we give."""
    paths = settings.upstream.provider.paths + INFERENCE_PATHS
    allowed = [path for path in paths
               if settings.paths is None or "POST" in allowed_methods(path, settings.paths)]
    chats = [path for path in allowed if path in ("/v1/chat/completions", "/v1/messages")]
    return (chats or allowed or paths)[0]

# ---- Another key header --------------------------------------------------------------------------
# Does: sends the provider key in the field that AIPROXY_KEY_HEADER names.
# Touches: nothing else.
# Entered: its setting, in Settings.derive_keys.

NOT_FOR_KEYS = frozenset((b"host", b"content-length", b"content-type", b"accept-encoding"))

def parse_key_header(text):
    takes = "a header field's name, such as x-api-key"
    if LIKE_KEY.search(text):
        raise ValueError(takes)
    return match_all("(?:%s)?" % TOKEN.decode(), text, takes).group()

def check_key_header(settings):
    if settings.key_header.encode() in settings.log_secrets:
        raise SettingError("AIPROXY_KEY_HEADER holds a key; it takes the name of the field for "
                           "it")
    if settings.key_header.lower().encode() in HOP_BY_HOP | NOT_FOR_KEYS:
        raise SettingError("AIPROXY_KEY_HEADER: got %r, which says something else; it takes the "
                           "field for a key, such as x-api-key" % settings.key_header)

MORE_SETTINGS.append(check_key_header)
SECRET_PARSERS.append(parse_key_header)
OPTIONS += (
    Option("AIPROXY_KEY_HEADER", AIPROXY_KEY_HEADER, parse_key_header,
           "field that carries the provider key, such as x-api-key; empty: by provider"),
)

# ---- Keys in URLs --------------------------------------------------------------------------------
# Does: refuses a key in the query, where it would stand in the logs of everybody on the way.
# Touches: nothing.
# Entered: `check_query` in Handler.check_caller.

KEY_PARAMETERS = ("key", "api_key", "access_token")

def check_query(request, settings):
    has_query = settings.is_restricted and request.query
    if has_query and has_key_in_query(request.query, settings.client_keys):
        raise ErrorResponse(400, "key_in_query", "A key does not belong in a URL, where logs keep "
                            "it. Send it as Authorization: Bearer.")

def has_key_in_query(query, client_keys):
    """Does a part of the query have a key's name, or is it one of our client keys?

    A set compares hashes, which Python salts: its time tells nothing of how near a guess was.
    """
    values = {key for _, key in client_keys}
    for part in set(query[1:].split("&")):
        name, _, value = part.partition("=")
        if urllib.parse.unquote(name).casefold() in KEY_PARAMETERS:
            return True
        words = []
        for half in (name, value):          # a `+` may be one, or a space
            words += urllib.parse.unquote(half).split()
            words += urllib.parse.unquote_plus(half).split()
        if values.intersection(map(str.encode, words)):
            return True
    return False

# ---- Patterns of paths ---------------------------------------------------------------------------
# Does: lets a `*` in AIPROXY_PATHS stand for a segment. (Part one allows the paths as they are.)
# Touches: nothing. Without it the paths of single models are not served, either.
# Entered: `fits_pattern` in allowed_methods.

# What a `*` in a path may be, decoded; behind /v1/models/, the name of a model, with slashes in it.
SEGMENT = re.compile(r"[\w@:.~+,=()!$&'* -]+")
MODEL_SEGMENTS = re.compile(r"%s(?:/%s)*" % (SEGMENT.pattern, SEGMENT.pattern))

def fits_pattern(path, pattern):
    """Does `pattern` fit the raw path? A `*` in it stands for exactly one plain segment."""
    if pattern == "/v1/models/*" and path.startswith("/v1/models/"):
        return is_plain(path[len("/v1/models/"):], MODEL_SEGMENTS)
    segments = path.split("/")
    wanted = pattern.split("/")
    return len(segments) == len(wanted) and all(
        want == segment or (want == "*" and is_plain(segment, SEGMENT))
        for segment, want in zip(segments, wanted))

def check_patterns(settings):
    """SettingError for a pattern that would fit nothing."""
    for _, path in settings.paths or ():
        if path != "*" and re.search(r"[^/]\*|\*[^/]", path):
            raise SettingError("AIPROXY_PATHS: got %r; a * in a path takes the place of a whole "
                               "segment, as in /v1/files/*/content" % path)

MORE_SETTINGS.append(check_patterns)

def is_plain(text, pattern):
    """Is it plain when decoded once? (`check_target` has refused dot segments already.)"""
    try:
        return pattern.fullmatch(urllib.parse.unquote(text, errors="strict")) is not None
    except UnicodeDecodeError:
        return False

# ---- Forgiving paths -----------------------------------------------------------------------------
# Does: reads what a slightly wrong base URL leads to as what was meant, names the nearest path in
# a 404, and says to a plain OPTIONS what a path takes.
# Touches: the path of a request, before it is checked.
# Entered: `install_forgiving_paths` in install_features.

def install_forgiving_paths(service):
    service.normalize_path = normalize_path
    service.suggest_path = suggest_path
    service.own_answers.append(answer_options)

def normalize_path(path, rules):
    """The path that a client with a slightly wrong base URL meant: /v1/v1/x, /x, //v1/x/ are /v1/x.

    Only if that leads to something, and never for a path that AIPROXY_PATHS names as it is.
    """
    if any(path == pattern for _, pattern in rules):
        return path
    meant = re.sub("//+", "/", path)
    meant = meant.rstrip("/") or "/"
    if meant.startswith("/v1/v1/"):
        meant = meant[len("/v1"):]
    elif "/v1" + meant in INFERENCE_PATHS or meant == "/models":
        meant = "/v1" + meant
    if meant == path:
        return path
    leads_to_something = meant.startswith("/v1/models") or allowed_methods(meant, rules)
    return meant if leads_to_something else path

def suggest_path(path, rules):
    """Names the path of the rules that is most like this one, for somebody who has mistyped it."""
    def likeness(pattern):
        return difflib.SequenceMatcher(None, pattern, path[:200]).ratio()
    return " Did you mean %s?" % max((pattern for _, pattern in rules), key=likeness)

def answer_options(handler):
    """A plain OPTIONS on a path that is allowed gets its methods. (Without keys it goes up.)"""
    path = handler.request.path
    settings = handler.settings
    if handler.request.method != "OPTIONS" or not settings.is_restricted:
        return False
    methods = allowed_methods(path, settings.paths)
    if not methods or settings.upstream.map_path(path) is None:
        return False
    handler.send_response(204, [allow_header(methods)])
    return True

# ---- CORS ----------------------------------------------------------------------------------------
# Does: lets the pages of AIPROXY_ORIGINS call us and read every response, and answers preflights.
# Touches: which pages are refused; it adds header fields to responses.
# Entered: `install_cors` in install_features replaces `refuse_pages`, and adds header fields.

# What a page's script may read of a response, besides the x-ratelimit-... fields that it holds.
EXPOSED_FIELDS = b"x-request-id, request-id, retry-after, retry-after-ms, x-should-retry"
# RFC 6454 section 6.2, and a `*` where a list may have one. Only http and https have host names.
WEB_ORIGIN = re.compile(
    r"(https?://(?:\*\.)?)(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?:([0-9]{1,5})|(\*)))?")
OTHER_ORIGIN = re.compile(r"\*|null|(?!https?:)[a-z][a-z0-9+.-]*://(?:\*|[^/?#@\s*]+)")
MAX_REPORTED_ORIGINS = 100      # that were refused: a client may make up any number of them

def install_cors(service):
    service.free_answers.append(answer_preflight)
    service.report_origin = origin_report(service.log)
    service.check_origin = functools.partial(check_origin, service)
    service.cors_headers = cors_headers
    if service.settings.is_guarded_by_loopback and service.settings.any_origin:
        service.warnings.append(
            "AIPROXY_ORIGINS=*: any web page that you open can spend your key")

def origin_report(log):
    """What to call with an Origin that was refused: of each it warns once.

    The page's script cannot see which one that was, and a line of the log has no field for it.
    """
    reported = set()

    def report(origin):
        shown = log.redact((origin or b"").decode("latin-1"), 200)
        if shown and shown not in reported and len(reported) < MAX_REPORTED_ORIGINS:
            reported.add(shown)
            log.warn("pages from %s are refused: AIPROXY_ORIGINS does not name that origin" % shown)
    return report

def is_preflight(request):
    """A browser's question before the request itself (Fetch standard, section 4.8)."""
    headers = request.headers
    return (request.method == "OPTIONS" and b"origin" in headers
            and b"access-control-request-method" in headers)

def answer_preflight(handler):
    if not is_preflight(handler.request):
        return False
    headers = handler.request.headers
    if not is_origin_allowed(headers, handler.settings):
        handler.record.outcome = "origin_not_allowed"   # for the log: a browser says no more
        handler.service.report_origin(headers.get(b"origin"))
    handler.send_response(204)              # with the fields of cors_headers
    return True

def check_origin(service, request, settings):
    if not is_origin_allowed(request.headers, settings):
        service.report_origin(request.headers.get(b"origin"))
        origin = request.headers.get(b"origin", b"another site").decode("latin-1")[:200]
        raise ErrorResponse(403, "origin_not_allowed", "Pages from %s may not call this proxy. "
                            "Its operator can add that origin to AIPROXY_ORIGINS." % origin)

def is_origin_allowed(headers, settings):
    """May this page call us?

    No Origin means no page, unless Sec-Fetch-Site says that another site's page is behind it.
    """
    origin = headers.get(b"origin")
    if settings.any_origin:
        return True
    if origin is None:
        is_foreign = headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        return settings.is_guarded_by_keys or not is_foreign
    if is_listed_origin(origin, settings):
        return True
    host = headers.get(b"host", b"")        # our own start page, on this machine
    own = b"%b://%b" % (settings.scheme.encode(), host)
    return origin == own and is_loopback_host(host)

def is_listed_origin(origin, settings):
    """Does it fit one that AIPROXY_ORIGINS names?"""
    return settings.origin_pattern.fullmatch(canonical_origin(origin.decode("latin-1"))) is not None

def canonical_origin(origin):
    """As browsers send it: in lower case, without the scheme's own port."""
    origin = origin.lower()
    port = DEFAULT_PORTS.get(origin.partition("://")[0])
    if port and origin.endswith(":%d" % port):
        return origin.rpartition(":")[0]
    return origin

def cors_headers(request, settings, names=()):
    """The CORS fields of every response: the origin if it is allowed, and what scripts may read.

    `request` is None if it could not be read. `names` are the response's fields, in lower case.
    """
    origin = request.headers.get(b"origin") if request else None
    if settings.any_origin:
        fields = [(b"Access-Control-Allow-Origin", b"*")]
    elif origin is not None and is_origin_allowed(request.headers, settings):
        # Reflected, since a list decides: a cache must not give it to another origin.
        fields = [(b"Access-Control-Allow-Origin", origin), (b"Vary", b"Origin"),
                  # We use no cookies, but some pages always ask with `credentials: include`.
                  (b"Access-Control-Allow-Credentials", b"true")]
    else:
        return [(b"Vary", b"Origin")] if settings.origins else []
    rate_limits = sorted(name for name in names if b"ratelimit-" in name)
    fields.append((b"Access-Control-Expose-Headers", b", ".join([EXPOSED_FIELDS] + rate_limits)))
    if request and is_preflight(request):
        fields += preflight_headers(request.headers, settings)
    return fields

def preflight_headers(headers, settings):
    """Everything that the browser asks for."""
    fields = [(b"Access-Control-Allow-Methods", ", ".join(METHODS).encode()),
              (b"Access-Control-Max-Age", b"86400"),
              (b"Vary", b"Access-Control-Request-Headers")]
    wanted = headers.get(b"access-control-request-headers")
    if wanted:
        fields.append((b"Access-Control-Allow-Headers", wanted))
    is_listed = is_listed_origin(headers.get(b"origin"), settings)
    if is_listed and headers.get(b"access-control-request-private-network") == b"true":
        fields.append((b"Access-Control-Allow-Private-Network", b"true"))
    return fields

# -- the setting

def parse_origins(text):
    return [parse_origin(item) for item in parse_list(text)]

def parse_origin(text):
    """An origin as browsers send it, perhaps with a `*` in the place of what may differ."""
    takes = ("* or origins, comma-separated, as browsers send them, without a path: "
             "https://app.example, https://*.app.example, http://localhost:*, chrome-extension://*")
    text = text.lower()
    if OTHER_ORIGIN.fullmatch(text):
        return text
    try:
        ascii_text = re.sub(r"[^/:]*[^\0-\x7f][^/:]*", encode_host, text)
        scheme, host, port, any_port = match_all(WEB_ORIGIN, ascii_text, takes).groups()
        if int(port or 0) > 65535:
            raise ValueError()
        if host.startswith("["):
            host = "[%s]" % ipaddress.IPv6Address(host[1:-1])
        elif re.fullmatch(r"(.*\.)?[0-9]+\.?", host):
            host = str(ipaddress.IPv4Address(host))
    except ValueError:
        raise ValueError(takes)
    default = DEFAULT_PORTS[scheme.partition(":")[0]]
    end = ":*" if any_port else ":%d" % int(port or default)
    return canonical_origin(scheme + host + end)

def encode_host(match):
    """A host name that is not ASCII, as it travels."""
    return match.group().encode("idna").decode()

def origin_pattern(origins):
    """What fits one of these origins, as `canonical_origin` has it."""
    patterns = []
    for origin in origins:
        pattern = re.escape(origin)
        pattern = pattern.replace(r"//\*\.", r"//(?:[a-z0-9_-]+\.)+")
        pattern = pattern.replace(r"//\*", r"//[^/:]+")
        patterns.append(pattern.replace(r":\*", r"(?::[0-9]+)?"))
    return re.compile("|".join(patterns) or "(?!)")

def derive_origins(settings):
    """Any page where nobody gets through without a key, else those that are named."""
    if not settings.origins and settings.is_guarded_by_keys:
        settings.origins = ["*"]
    settings.any_origin = "*" in settings.origins
    settings.origin_pattern = origin_pattern(settings.origins)
    settings.shown["AIPROXY_ORIGINS"] = ", ".join(settings.origins) or "none"

MORE_SETTINGS.append(derive_origins)
OPTIONS += (
    Option("AIPROXY_ORIGINS", AIPROXY_ORIGINS, parse_origins,
           "browser origins allowed, comma-separated; * for any, or for a port, the labels in "
           "front of a host, an extension's id; empty: any where callers must present a key, "
           "else none"),
)

# ---- Room for clients ----------------------------------------------------------------------------
# Does: lets an idle client make room for a new one, and holds each address to
# AIPROXY_MAX_PER_CLIENT. (Part one serves the first that come.)
# Touches: idle connections, which it ends; those that jobs have taken over count here.
# Entered: `install_room` in install_features sets `make_room` and what belongs to it.

NEW_SECONDS = 1         # that the first request of a client may take to come: it gives up no place
TAKING_SECONDS = 5      # for an idle client to take its responses, once its place is wanted
SIOCOUTQNSD = 0x894B    # Linux' linux/sockios.h: the bytes that it has not sent yet

def install_room(service):
    room = find_room(service.server)
    service.make_room = room.make_room
    service.forget_client = room.forget
    service.may_linger = lambda: not room.is_crowded()
    service.may_evict = room.may_evict
    service.free_answers.append(room.see_request)
    service.is_trusted_proxy = is_loopback      # (address): may it have many connections?

def find_room(server):
    """The Room of a server, whatever its service."""
    return server.shared.setdefault("room", Room(server))


def unsent_bytes(sock):
    """What the system has not sent yet of what we gave it; 0 where it does not tell."""
    # On Windows, on other systems, of a socket that has just been closed.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        answer = fcntl.ioctl(sock.fileno(), SIOCOUTQNSD, bytes(4))
        return int.from_bytes(answer, sys.byteorder)
    return 0


class Room:
    """Which address each connection counts for. The server's condition guards all of it."""

    def __init__(self, server):
        self.server = server
        self.lock = server.client_ended
        self.addresses = {}         # by a client's socket, or a job that has taken one over
        self.counts = collections.Counter()     # by address: the number of its connections
        self.lingering = {}         # those jobs, in their order
        self.taking = {}            # by socket: since when we wait for it to take its responses

    def count(self, connection, client_address):
        address = network_of(client_address)
        with self.lock:
            self.addresses[connection] = address
            self.counts[address] += 1
        return address

    def forget(self, connection):
        with self.lock:
            self.lingering.pop(connection, None)
            self.taking.pop(connection, None)
            address = self.addresses.pop(connection, None)
            self.counts[address] -= 1
            if self.counts[address] <= 0:       # of None, if it has been hung up on
                del self.counts[address]
            self.lock.notify_all()

    def may_evict(self, handler):
        """Is a client idle that neither sends nor still takes its responses?

        If we had hung up on it, and it then sent its next request, a reset would eat what it has
        not taken (RFC 9112, 9.6).
        """
        sock = handler.connection
        now = time.monotonic()
        if not unsent_bytes(sock):
            self.taking.pop(sock, None)
        elif now - self.taking.setdefault(sock, now) < TAKING_SECONDS:
            return False
        return not has_sent(handler.client)

    def see_request(self, handler):
        """A client that asks anew, and has taken all before, gets new seconds. Answers nobody."""
        sock = handler.connection
        if sock in self.taking and not unsent_bytes(sock):
            self.taking.pop(sock, None)
        return False

    def take_over(self, job, client_address):
        """Leave a connection to a job of the relay loop; until the job's end it counts."""
        self.count(job, client_address)
        self.lingering[job] = None
        job.on_end = functools.partial(self.forget, job)
        self.server.relay_loop.submit(job)

    def make_room(self, sock, client_address):
        """Is there room for the newest client? If it takes that, an idle one is hung up on."""
        server = self.server
        address = self.count(sock, client_address)
        if self.is_crowded():
            self.evict_lingering()
        if self.counts[address] > server.settings.max_per_client:
            is_exempt = is_loopback(address) or server.service.is_trusted_proxy(client_address)
            if not is_exempt:
                return self.evict_idle(address)
        return len(server.clients) <= server.capacity or self.evict_idle()

    def evict_idle(self, address=None):
        """Hang up on the client, or only one of this address, that has been idle longest.

        False if there is none. One that has hung up itself counts.
        """
        for handler, since in self.server.idle.copy().values():
            is_meant = address in (None, self.addresses.get(handler.connection))
            waited = time.monotonic() - since
            is_new = handler.is_first_request and waited < NEW_SECONDS
            if is_meant and not is_new and self.server.evict(handler):
                return True
        return False

    def is_crowded(self):
        """Are there so many connections, with the lingering ones, that no more may linger?"""
        number = len(self.server.clients) + len(self.lingering)
        return number >= self.server.capacity + SPARE_FILES // 2

    def evict_lingering(self):
        """Hang up on the client that lingers longest, if there is one.

        The loop sees its end and closes it, but no sooner: to forget it, it waits for the lock.
        """
        with self.lock, contextlib.suppress(IndexError, OSError):
            job = list(self.lingering)[0]
            self.forget(job)
            hang_up(job.client.sock)


@functools.lru_cache(1024)          # clients come again
def network_of(address):
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 one, one household's."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:              # not an address of the Internet
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip     # an IPv4 address as an IPv6 socket has it
    if ip.version == 4 or ip.is_loopback:
        return str(ip)
    return str(ipaddress.ip_network((ip, 64), strict=False).network_address)

OPTIONS += (
    Option("AIPROXY_MAX_PER_CLIENT", AIPROXY_MAX_PER_CLIENT, COUNT,
           "connections from one client address, but for this machine and trusted proxies; above "
           "it 503"),
)

# ---- Lingering close -----------------------------------------------------------------------------
# Does: reads on for a while from a client that has been answered and may still be sending.
# Touches: sockets after their last response, in the relay loop. They count as connections.
# Entered: `install_lingering_close` in install_features sets `linger` and `must_linger`.
# Needs: Room for clients.

LINGER_SILENCE = 5      # a refused client may go on sending, so that it can read why: until it
LINGER_SECONDS = 30     # is silent for so long, and for so long in all (nginx's lingering_...)

def install_lingering_close(service):
    def linger(sock, address):
        find_room(service.server).take_over(LingeringClose(sock), address)
    service.linger = linger
    service.must_linger = must_linger

def must_linger(handler):
    """Closed with bytes unread it would send a reset, which eats our response (RFC 9112, 9.6)."""
    if not handler.head_sent or handler.client.ended:
        return False
    has_unread = handler.client.buffer or handler.client.receive()
    upload = handler.upload
    return has_unread or upload is None or not upload.done or handler.record.status == 101


class LingeringClose(Job):
    """Reads on for a while. The socket is taken over: nobody else may close it."""

    def __init__(self, sock):
        self.client = BufferedSocket(socket.socket(fileno=sock.detach()))
        super().__init__(self.client)
        self.began = time.monotonic()
        self.heard = self.began

    def start(self):
        self.state = "lingering"
        self.loop.watch(self.client, READ, self.on_client)
        try:
            self.client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.finish("client_gone")

    def on_client(self, mask):
        self.heard = self.loop.now
        try:
            is_over = self.client.receive() == b""
        except OSError:
            is_over = True
        if is_over:
            self.finish("ok")

    def on_tick(self):
        silence = self.loop.now - self.heard
        lingered = self.loop.now - self.began
        if silence > LINGER_SILENCE or lingered > LINGER_SECONDS:
            self.finish("timeout")

    def finish(self, outcome):
        super().finish(outcome)
        self.client.sock.close()

# ---- Refusals in the right form ------------------------------------------------------------------
# Does: reads the head of a request for which there is no room, so that the page that sent it may
# read the 503 (CORS), and the SDK understands it.
# Touches: the sockets of refused clients, until their 503 is sent.
# Entered: `install_busy_refusals` in install_features takes the place of `send_busy`.
# Needs: Room for clients.

BUSY_SECONDS = 1        # for the head

def install_busy_refusals(service):
    room = find_room(service.server)

    def refuse(sock, record):
        if room.is_crowded():               # too many linger already
            return service.server.send_busy(sock, record)
        try:
            own_socket = service.wrap_client(socket.socket(fileno=sock.detach()))
        except OSError:                     # it has reset its connection
            return None
        job = RefusedClient(own_socket, record, service.server.send_busy)
        return room.take_over(job, record.client)
    service.refuse = refuse


class RefusedClient(Job):
    """The accepting thread cannot wait for a head. The socket is this job's own."""

    def __init__(self, sock, record, send_busy):
        self.client = BufferedSocket(sock)
        super().__init__(self.client)
        self.record = record
        self.send_busy = send_busy          # (socket, record, request)
        self.deadline = time.monotonic() + BUSY_SECONDS
        self.request = None                 # what could be read

    def start(self):
        self.state = "reading"
        self.loop.watch(self.client, READ, self.on_client)

    def on_client(self, mask):
        try:
            if not self.client.fill():
                raise ClosedEarly()
            first_line, headers = read_head(self.client, REQUEST_LINE, self.read_more)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            return self.finish("server_busy")
        self.request = Request(first_line, headers)
        self.record.method = self.request.method
        self.record.path = self.request.path
        self.finish("server_busy")

    def read_more(self):
        """What `read_head` calls if the head is not all here."""
        raise BlockingIOError()

    def on_tick(self):
        if self.loop.now > self.deadline:
            self.finish("server_busy")

    def finish(self, outcome):
        super().finish(outcome)
        self.send_busy(self.client.sock, self.record, self.request)
        self.client.close()                 # unless it lingers

# ---- Keys in long errors -------------------------------------------------------------------------
# Does: looks for the provider key in an error as it passes, so that a long one, or one that
# trickles, is not withheld.
# Touches: errors of the upstream, where a provider key is configured: they are cut where it begins.
# Entered: `install_secret_filter` in install_features takes the place of `check_for_key`.

# A letter as JSON may have it, cut off.
PART_OF_ESCAPE = re.compile(br"\\(?:u(?:0(?:0[2-7]?)?)?)?\Z")

def install_secret_filter(service):
    service.check_for_key = filter_error

def filter_error(exchange, settings):
    """The filter for an error's body. 502 if its beginning holds the key already."""
    if not settings.provider_keys or exchange.status < 300:
        return None
    if exchange.status == 401:
        raise rejected_key()
    if exchange.is_coded() and not exchange.body.done:
        raise upstream_error("upstream_bad_response", "The upstream answered with status %d and a "
                             "compressed body, although it was asked not to compress: it could "
                             "not be searched for the proxy's key." % exchange.status)
    secret_filter = SecretFilter(settings.upstream_secrets)
    exchange.prefetch(PREFETCH_BYTES, PREFETCH_SECONDS)
    is_found = secret_filter.find(exchange.prefetched) >= 0
    if is_found or holds_secret(exchange.prefetched, settings.upstream_secrets):
        raise rejected_key()
    return secret_filter

def escaped_pattern(secret):
    """What finds a secret, however JSON has it."""
    letters = []
    for number in secret:
        letter = re.escape(bytes([number]))
        letters.append(br"(?:\\?%b|\\u(?i:%04x))" % (letter, number))
    return re.compile(b"".join(letters))


def spellings(secret):
    """A secret as it is, and as URLs may have it."""
    quoted = urllib.parse.quote_from_bytes(secret, safe="").encode()
    return {secret, quoted, re.sub(b"%..", lambda match: match[0].lower(), quoted)}


class SecretFilter:
    """Looks for secrets, as they are and as URLs or JSON may have them, in bytes as they pass."""

    def __init__(self, secrets):
        self.secrets = []
        for secret in secrets:
            self.secrets += spellings(secret)
        self.longest = 6 * max(map(len, self.secrets))  # `\\u0061` is six bytes
        first = b"|".join(re.escape(secret[:1]) for secret in self.secrets)
        # A look ahead: what begins in the middle of another is not passed over.
        self.beginning = re.compile(br"(?=\\(?:u|\Z)|\\?(?:%b))" % first)
        self.waiting = b""                  # the end of what came, if a secret may begin in it
        self.found = False

    def find(self, data):
        """Where the first secret begins; -1 if there is none."""
        starts = [data.index(secret) for secret in self.secrets if secret in data]
        if b"\\" in data:
            text = unescape(data)
            starts += [escaped_pattern(secret).search(data).start()
                       for secret in self.secrets if secret in text]
        return min(starts, default=-1)

    def feed(self, data, is_end=False):
        """What may pass of `data` and of what was waiting. `found` is set at the first secret."""
        data = self.waiting + data
        self.waiting = b""
        end = self.find(data)
        if end >= 0:
            self.found = True
        elif is_end:
            end = len(data)
        else:
            end = self.find_beginning(data)
            self.waiting = data[end:]
        return data[:end]

    def find_beginning(self, data):
        """Where the end of `data` could be the beginning of a secret; its length if nowhere."""
        start = max(0, len(data) - self.longest + 1)
        for match in self.beginning.finditer(data, start):
            rest = data[match.start():]
            text = unescape(PART_OF_ESCAPE.sub(b"", rest))
            if any(secret.startswith((rest, text)) for secret in self.secrets):
                return match.start()
        return len(data)

# ---- Redirects -----------------------------------------------------------------------------------
# Does: keeps clients with us. A Location on the upstream's own host becomes a path of ours; a
# redirect to another host is refused if clients would repeat a body there.
# Touches: the Location of a response, where a provider key is configured.
# Entered: `install_redirects` in install_features adds a check.

def install_redirects(service):
    if service.settings.provider_keys:
        service.response_checks.append(check_location)

def check_location(handler, exchange):
    """Rewrite the response's Location. ErrorResponse 502 for a body that would go elsewhere."""
    if b"location" not in exchange.headers:
        return
    upload = handler.upload
    has_no_body = upload.done and not upload.received
    may_lead_elsewhere = exchange.status // 100 != 3 or has_no_body
    fields = []
    for name, value in exchange.headers.fields:
        if name.lower() == b"location":
            path = map_location(value, exchange.request.full_url, handler.settings.upstream)
            if path is None and not may_lead_elsewhere:
                raise upstream_error(
                    "upstream_bad_response", "The upstream redirects this request to another "
                    "host, where its body must not go. AIPROXY_UPSTREAM may be out of date.",
                    [NO_RETRY])
            value = value if path is None else path
        fields.append((name, value))
    exchange.headers = Headers(fields)

def map_location(location, asked, upstream):
    """The path of ours for a Location in the answer to `asked`; None if it leads elsewhere."""
    try:
        target = urllib.parse.urljoin(asked, location.decode("latin-1"))
        parts = urllib.parse.urlsplit(target)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    host = (parts.hostname or "").rstrip(".")
    path = parts.path or "/"
    is_same_host = host == upstream.host.rstrip(".")
    if not is_same_host or port != upstream.port or not is_plain_path(path):
        return None
    if upstream.base and (path + "/").startswith(upstream.base + "/"):
        path = "/v1" + path[len(upstream.base):]
    location = urllib.parse.urlunsplit(("", "", path, parts.query, parts.fragment))
    return location.encode("latin-1")

# ---- Rates ---------------------------------------------------------------------------------------
# Does: holds each client to AIPROXY_RATE, with token buckets.
# Touches: nothing but its own buckets.
# Entered: `install_rates` in install_features adds a check.
# Needs: Room for clients.

MAX_BUCKETS = 10000     # clients whose rate is remembered: about 3 MB

def install_rates(service):
    if service.settings.rate:
        shown = service.settings.shown["AIPROXY_RATE"]
        service.rate_limiter = RateLimiter(*service.settings.rate, shown=shown)
        service.checks.append(service.rate_limiter.check)


class RateLimiter:
    """Token buckets, one a client: `count` requests at once, refilled evenly over `period` seconds.

    The longest unused are dropped.
    """

    def __init__(self, count, period, shown=""):
        self.count = count
        self.speed = count / period
        self.shown = shown
        self.buckets = collections.OrderedDict()    # client: (tokens, when)
        self.lock = threading.Lock()

    def check(self, handler):
        """429 once the client has used up its rate; the fields are OpenAI's."""
        # The name of a client key, or an address.
        client = network_of(handler.record.client)
        refused = self.take(client, time.monotonic())
        if not refused:
            return
        until_next, until_full, count = refused
        raise ErrorResponse(
            429, "rate_limit_exceeded",
            "Too many requests: AIPROXY_RATE allows %s. Try again in %.1f seconds."
            % (self.shown, until_next),
            headers=[
                (b"Retry-After", b"%d" % math.ceil(until_next)),
                (b"x-ratelimit-limit-requests", b"%d" % count),
                (b"x-ratelimit-remaining-requests", b"0"),
                (b"x-ratelimit-reset-requests", format_duration(until_full).encode()),
            ])

    def take(self, client, now):
        """None if a token was there, else the seconds until one and until all are back; `count`."""
        with self.lock:
            tokens, since = self.buckets.pop(client, (self.count, now))
            earned = (now - since) * self.speed
            tokens = min(self.count, tokens + earned)
            is_allowed = tokens >= 1
            if is_allowed:
                tokens -= 1
            self.buckets[client] = (tokens, now)
            if len(self.buckets) > MAX_BUCKETS:
                self.buckets.popitem(last=False)
        if is_allowed:
            return None
        until_next = (1 - tokens) / self.speed
        until_full = (self.count - tokens) / self.speed
        return until_next, until_full, self.count

def format_duration(seconds):
    """As OpenAI writes it in x-ratelimit-reset-...: 20ms, 1s, 6m0s, 1h0m0s."""
    if seconds <= 0.999:
        return "%dms" % math.ceil(seconds * 1000)
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return "%dh%dm%ds" % (hours, minutes, seconds)
    if minutes:
        return "%dm%ds" % (minutes, seconds)
    return "%ds" % seconds

def parse_rate(text):
    """Requests and seconds; None for no limit."""
    if not text:
        return None
    match = match_all(r"([1-9][0-9]{0,8})\s*/\s*(s|sec|min|m|h|hour|d|day)", text,
                      "a rate such as 20/s, 60/min, 100/h or 1000/day")
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return int(match.group(1)), seconds[match.group(2)[0]]

def derive_rate(settings):
    """Whoever serves anybody gets a rate."""
    text = settings.find_text(find_option("AIPROXY_RATE"))[1]
    if settings.open and not settings.rate:
        text = "60/min"
        settings.rate = parse_rate(text)
    settings.shown["AIPROXY_RATE"] = text or "none"

MORE_SETTINGS.append(derive_rate)
OPTIONS += (
    Option("AIPROXY_RATE", AIPROXY_RATE, parse_rate,
           "requests per client key, else per client address: 20/s, 60/min, 100/h, 1000/day; "
           "empty: no limit, or 60/min with AIPROXY_OPEN"),
)

# ---- Trusted proxies -----------------------------------------------------------------------------
# Does: believes the X-Forwarded-For of the proxies that AIPROXY_TRUSTED_PROXIES names.
# Touches: who counts as the client of a request; whose connections AIPROXY_MAX_PER_CLIENT limits.
# Entered: `install_trusted_proxies` in install_features replaces `is_forwarded`, `is_loopback`.

# A client's address as proxies write it, with brackets, port and zone or without.
NAMED_ADDRESS = re.compile(
    r"\[([0-9A-Fa-f:.]+)(?:%[^\]]*)?\](?::[0-9]+)?"
    r"|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)(?:%.*)?")
# Where a client's address stands in Forwarded (RFC 7239 section 6).
FORWARDED_FOR = re.compile(br'(?i)\bfor\s*=\s*("[^"]*"|[^;,\s]*)')
# RFC 1918, RFC 4193, link-local addresses (RFC 3927, RFC 4291), shared ones (RFC 6598).
NETWORK_WORDS = {
    "loopback": "127.0.0.0/8 ::1/128",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 169.254.0.0/16 fe80::/10 "
               "100.64.0.0/10",
    "*": "0.0.0.0/0 ::/0",
}

def install_trusted_proxies(service):
    networks = service.settings.trusted_proxies

    @functools.lru_cache(1024)      # there are few proxies
    def is_trusted_proxy(address):
        plain = plain_address(address)
        if not plain:
            return False
        return any(ipaddress.ip_address(plain) in one for one in networks)

    service.is_trusted_proxy = is_trusted_proxy
    service.find_client = functools.partial(find_client, is_trusted_proxy)
    service.asks_for_others = asks_for_others

def find_client(is_trusted_proxy, address, headers):
    """Who asks: of X-Forwarded-For the rightmost address that is not a trusted proxy's.

    `address` is the connection's. Each proxy adds on the right whom it was asked by; what stands
    further left anybody may have made up.
    """
    if b"x-forwarded-for" not in headers:
        return address
    for name in reversed(headers.elements(b"x-forwarded-for")):
        named_address = plain_address(name.decode("latin-1"))
        if not named_address or not is_trusted_proxy(address):
            break
        address = named_address
    return address

def asks_for_others(headers):
    """Does a proxy in front ask for anybody who is not on this machine?"""
    return not all(map(is_loopback, forwarded_clients(headers)))

def forwarded_clients(headers):
    """Everybody for whom a proxy in front says that it asks."""
    if FORWARDED_FIELDS.isdisjoint(headers.first):
        return []
    names = []
    for field in FORWARDED_FIELDS - {b"forwarded"}:
        names += headers.elements(field)
    for value in headers.get_all(b"forwarded"):
        names += FORWARDED_FOR.findall(value)
    texts = [name.decode("latin-1").strip('"') for name in names]
    return [plain_address(text) or text for text in texts if text]

def plain_address(text):
    """The IP address that a proxy or a socket names, without brackets, port and zone; or ""."""
    match = NAMED_ADDRESS.fullmatch(text[:64])
    if not match:
        return ""
    try:
        ip = ipaddress.ip_address(match.group(match.lastindex))
    except ValueError:
        return ""
    return str(getattr(ip, "ipv4_mapped", None) or ip)

def parse_networks(text):
    """The networks of a list of addresses, networks and words."""
    networks = []
    for item in parse_list(text):
        for network in NETWORK_WORDS.get(item.lower(), item).split():
            try:
                networks.append(ipaddress.ip_network(network, strict=False))
            except ValueError:
                raise ValueError("addresses and networks such as 10.0.0.0/8, comma-separated, or "
                                 "the words loopback, private and *")
    return networks

OPTIONS += (
    Option("AIPROXY_TRUSTED_PROXIES", AIPROXY_TRUSTED_PROXIES, parse_networks,
           "whose X-Forwarded-For is believed: addresses, networks, loopback, private or *, "
           "comma-separated"),
)

# ---- Body rules ----------------------------------------------------------------------------------
# Does: reads bodies as a whole where a setting wants them looked into, strictly, and edits them.
# Touches: members that a rule changes; no other byte. Bodies are held until they have gone up.
# Entered: `install_body_rules` in install_features sets `read_whole_body`.

MAX_DEPTH = 100         # nesting of a JSON body: far above any schema, far below a parser's stack
MAX_VALUES = 1000000    # values in a JSON body: each takes some 70 bytes when it is parsed
MAX_DIGITS = 400        # of a number in a JSON body

BODIES_HELD = 8         # times AIPROXY_MAX_BODY: all bodies that are held in memory together
SMALL_BODY = 1 / 8192   # of that: a body that is never refused for the others' sake
LARGE_BODY = 1 << 20    # bytes of a body; those above are parsed one at a time

def install_body_rules(service):
    service.body_budget = service.server.shared.setdefault("body budget", BodyBudget())
    service.on_body_gone = service.body_budget.let_go
    service.read_whole_body = read_whole_body
    service.needs_whole_bodies = False   # must each be here before it goes up?
    service.inspects_bodies = False      # does a setting want them looked into?
    service.body_rules = []              # (members, request, settings): changes to the members
    service.check_form = refuse_form     # (body, request, settings): the form to send up


class BodyBudget:
    """The memory of all bodies that are held as a whole, each until it has gone up."""

    def __init__(self):
        self.held = 0                       # bytes
        self.sizes = {}                     # by Upload
        self.lock = threading.Lock()        # guards it
        self.parsing = threading.Lock()     # held while a large body is parsed

    def count(self, upload, most):
        """Yield the pieces of a body. ErrorResponse 503 once all bodies have `most` bytes.

        A small one passes all the same: a few large ones that come slowly must not lock out chats.
        """
        for piece in read_pieces(upload, upload.wait_for_client, math.inf):
            with self.lock:
                size = self.sizes.get(upload, 0) + len(piece)
                is_full = self.held + len(piece) > most
                if is_full and size > most * SMALL_BODY:
                    raise ErrorResponse(503, "server_busy", "The proxy holds as many large "
                                        "requests as it can. Try again.",
                                        headers=[(b"Retry-After", b"1")])
                self.held += len(piece)
                self.sizes[upload] = size
            yield piece

    def let_go(self, upload):
        with self.lock:
            self.held -= self.sizes.pop(upload, 0)


def read_whole_body(handler):
    """A body that must be here before it goes up, as it is to go up; None for any other."""
    if needs_body_inspection(handler):
        return read_inspected_body(handler, apply_body_rules)
    if not handler.service.needs_whole_bodies:
        return None
    handler.upload.observe = handler.service.observe_request(handler.record)
    return hold_body(handler)

def read_inspected_body(handler, edit):
    """What `edit(handler, body)` makes of the body."""
    check_content_coding(handler.request)                   # 415
    body = hold_body(handler)
    # The values of a large one take several times its size: they are parsed one at a time.
    parsing = handler.service.body_budget.parsing
    with parsing if len(body) > LARGE_BODY else contextlib.nullcontext():
        return edit(handler, body)                          # 400 403

def hold_body(handler):
    most = handler.settings.max_body
    handler.start_body(most)                                # 413
    pieces = handler.service.body_budget.count(handler.upload, BODIES_HELD * most)
    return join_pieces(pieces)                              # 400 408 413 503

def needs_body_inspection(handler):
    """Does a setting want the body looked into? The path decides, never the content type."""
    if not handler.service.inspects_bodies:
        return False
    has_body = not handler.upload.done
    return is_inference(handler.request) or (has_body and handler.settings.is_restricted)

def is_inference(request):
    """Also by other spellings of the path, which the upstream may take for the same."""
    if request.method != "POST":
        return False
    path = request.path
    if path in INFERENCE_PATHS:
        return True
    path = plain_spelling(path)
    return path in INFERENCE_PATHS or "/v1" + path in INFERENCE_PATHS   # DeepSeek knows both

def plain_spelling(path):
    path = re.sub("//+", "/", urllib.parse.unquote(path))
    return path.rstrip("/").casefold()

def is_form(headers):
    return headers.get(b"content-type", b"").lower().startswith(b"multipart/")

def check_content_coding(request):
    """415 for a body that we cannot read without decompressing it.

    A misspelt field counts, too: CGI-like servers take `_` for `-`.
    """
    codings = [value.lower() for value in request.headers.get_all(b"content-encoding")]
    if b"content_encoding" in request.headers or codings not in ([], [b"identity"]):
        raise ErrorResponse(415, "unsupported_encoding",
                            "The body must not be compressed here: its model has to be read.",
                            headers=[(b"Accept-Encoding", b"identity")])

def apply_body_rules(handler, body):
    """The body to send up: only what a setting changes differs."""
    request = handler.request
    if not is_inference(request):
        if not body:                        # a job is cancelled so
            return body
        if is_form(request.headers):
            try:
                return handler.service.check_form(body, request, handler.settings)
            finally:                        # the log also names a model that is refused
                handler.record.model = request.model
    return edit_members(body, check_body(handler, body)[1])

def check_body(handler, body):
    """Its members, and the changes that the rules want."""
    request = handler.request
    # What it has been read as, whatever the client calls it.
    request.own_fields[b"content-type"] = (b"Content-Type", b"application/json")
    members = parse_object(body)
    changes = {}
    try:
        for rule in handler.service.body_rules:
            changes.update(rule(members, request, handler.settings))
    finally:
        handler.record.model = request.model
    return members, changes

def refuse_form(body, request, settings):
    """No rule reads forms. See "Model rules"."""
    raise ErrorResponse(400, "invalid_form", "The body must be JSON here.")

# -- strict JSON

def parse_object(body):
    """The members of a JSON object. ErrorResponse 400 for what could be read in two ways.

    Strict where json is not: one encoding, no NaN, no infinite or absurd numbers, no name twice in
    an object, bounded nesting. Otherwise our check could pass what the upstream reads differently.
    """
    try:
        check_nesting(body)
        members = STRICT_JSON.decode(body.decode("utf-8"))
        if not isinstance(members, dict):
            raise ValueError("it is not an object")
        return members
    except ValueError as error:         # UnicodeDecodeError is one, too
        reason = str(error).partition(":")[0]
        raise ErrorResponse(400, "invalid_json", "The body is not valid JSON: %s." % reason)

NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))

def check_nesting(body):
    """ValueError above MAX_DEPTH or MAX_VALUES, found without parsing.

    A parser recurses, and a thread's stack is small. Without its strings a JSON text is little more
    than its brackets and commas: they can be counted, in time proportional to its length.
    """
    may_be_deep = body.count(b"[") + body.count(b"{") > MAX_DEPTH
    if not may_be_deep and len(body) <= 2 * MAX_VALUES:     # a value and its comma are 2 bytes
        return
    values = 0
    depth = 0
    for structure in json_structure(body):
        values += sum(map(structure.count, (b",", b"[", b"{")))
        if values > MAX_VALUES:
            raise ValueError("it holds more than %d values" % MAX_VALUES)
        for mark in structure.replace(b",", b""):
            depth += 1 if mark in b"[{" else -1
            if depth > MAX_DEPTH:
                raise ValueError("it is nested more than %d levels deep" % MAX_DEPTH)

def json_structure(body):
    """The brackets and commas outside of strings, a block at a time: memory is for few blocks."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    in_string = False
    for start in range(0, len(unescaped), READ_SIZE):
        parts = unescaped[start:start + READ_SIZE].split(b'"')
        outside = parts[1::2] if in_string else parts[::2]
        yield b"".join(outside).translate(None, NOT_STRUCTURE)
        if len(parts) % 2 == 0:
            in_string = not in_string

def unique_members(pairs):
    members = dict(pairs)
    if len(members) < len(pairs):
        if [name for name, _ in pairs].count("model") > 1:
            raise ErrorResponse(400, "invalid_model", "The body must hold `model` once.", "model")
        raise ValueError("a name appears twice")
    return members

def parse_number(digits, kind):
    value = kind(digits) if len(digits) <= MAX_DIGITS else math.inf
    if value in (math.inf, -math.inf):
        raise ValueError("a number is out of range")
    return value

def refuse_constant(name):
    raise ValueError("%s is not JSON" % name)

STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=unique_members, parse_constant=refuse_constant,
    parse_int=functools.partial(parse_number, kind=int),
    parse_float=functools.partial(parse_number, kind=float))

def check_spelling(members, names):
    """400 for `Model` and its like: some parsers would take it for the real one.

    `names` has the right spellings, each by its own in lower case.
    """
    for name in members:
        right = names.get(name.casefold(), name)
        if name != right:
            code = "invalid_model" if right == "model" else "invalid_parameter"
            raise ErrorResponse(400, code, "`%s` must be written so." % right, right)

# -- changing a body

# A body that is edited has been parsed strictly before.
JSON = json.JSONDecoder()
# What stands between names and values: RFC 8259 section 2.
JSON_GAP = re.compile(r"[ \t\n\r]*[:,]?[ \t\n\r]*")

def find_values(text, start, wanted):
    """Where wanted values stand in the array or object that begins at `start`; returns its end.

    `wanted` has, by name or index, what to call a value, or a dict of the same kind for what is
    inside it. Yields for each what it is called, where it begins and where it ends. Nothing is
    decoded twice.
    """
    has_names = text[start] == "{"
    position = JSON_GAP.match(text, start + 1).end()
    for name in itertools.count():
        if text[position] in "]}":
            return position + 1
        if has_names:
            name, name_end = JSON.raw_decode(text, position)
            if not name.isascii():          # `text` is UTF-8, read as Latin-1
                name = json.loads(text[position:name_end].encode("latin-1"))
            position = JSON_GAP.match(text, name_end).end()
        called = wanted.get(name)
        if isinstance(called, dict):
            end = yield from find_values(text, position, called)
        else:
            _, end = JSON.raw_decode(text, position)
            if called is not None:
                yield called, position, end
        position = JSON_GAP.match(text, end).end()

def edit_members(body, changes):
    """A JSON object with other values for what `changes` names, new members put in front.

    A key of `changes` is the name of a member, or the path to a value inside one: a tuple of names
    and indexes. No other byte differs.
    """
    if not changes:
        return body
    text = body.decode("latin-1")           # a byte a character: of an emoji, all would take four
    added = dict(changes)
    inside = text.index("{") + 1
    copied = inside                         # up to here, `edited` has the text
    edited = []
    for key, start, end in find_values(text, inside - 1, as_tree(changes)):
        value = added.pop(key)
        edited += [text[copied:start], json.dumps(value)]
        copied = end
        if not added:
            break

    front = json.dumps(added)[1:-1]
    is_empty = text[JSON_GAP.match(text, inside).end()] == "}"
    if front and not is_empty:
        front += ", "
    edited = [text[:inside], front] + edited
    edited.append(text[copied:])
    return "".join(edited).encode("latin-1")

def as_tree(changes):
    """The keys of `changes` as find_values wants them: ("a", 0) becomes {"a": {0: ("a", 0)}}."""
    tree = {}
    for key in changes:
        *outer, last = key if isinstance(key, tuple) else (key,)
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = key
    return tree

# ---- Model rules ---------------------------------------------------------------------------------
# Does: holds requests to AIPROXY_MODELS wherever they name a model: in a path, in JSON, in a form.
# Touches: the path, members of an inspected body, a form: aliases become the models behind them.
# Entered: `install_model_rules` in install_features adds checks and a rule.
# Needs: Body rules.

# Where a body names models besides `model`: OpenRouter's and Anthropic's lists of others to try,
# and what has a model of its own: tools, a realtime session, the requests of a batch, Groq's
# compound systems. Not searched is what a model has written, and what describes a function.
MODEL_LISTS = ("models", "fallbacks")
MODEL_HOLDERS = MODEL_LISTS + ("tools", "plugins", "session", "requests", "compound_custom",
                               "input_audio_transcription", "providerOptions", "extra_body")
MODEL_SPELLINGS = {name: name for name in ("model",) + MODEL_HOLDERS}
NOT_SEARCHED = ("messages", "input", "contents", "input_schema", "input_examples",
                "functionDeclarations", "function_declarations")
MAX_MODELS = 100        # in one request

# Azure's /openai/deployments/MODEL/..., Gemini's /v1beta/models/MODEL:method.
BEFORE_MODEL = re.compile("/(deployments|models|tunedmodels)/", re.I)
QUERY_MODELS = ("model", "deployment")
ANSWER_PATHS = tuple(path[len("/v1"):] for path in INFERENCE_PATHS)     # how they end

# RFC 7578, read strictly: a boundary that needs no escapes, names and file names in plain quotes or
# bare, values as they are. Behind a `;` inside the quotes stands no `=`: it might be a name again.
FORM_CHARSET = br'(?:[ \t]*;[ \t]*charset="?(?:utf-8|us-ascii|iso-8859-1)"?)?'
FORM_TYPE = re.compile(br"multipart/form-data" + FORM_CHARSET + br"[ \t]*;[ \t]*"
                       br"boundary=(\"?)([0-9A-Za-z'+_.-]{1,70})\1" + FORM_CHARSET, re.I)
FILE_NAME = br'filename\*?=(?:"[^"\\;]*(?:;[^"\\;=]*)*"|[\w.%\'-]+)'
FORM_FIELD = re.compile(br'form-data;[ \t]*name=("?)([\w.\[\]-]+)\1'
                        br'((?:;[ \t]*' + FILE_NAME + br'){0,2})', re.I)
FORM_PLAIN = re.compile(br"text/plain" + FORM_CHARSET, re.I)
FORM_CODINGS = (b"binary", b"8bit", b"7bit")
MAX_PARTS = 1000

def install_model_rules(service):
    settings = service.settings
    if settings.models and settings.is_restricted:
        service.checks.append(check_named_model)
    service.body_rules.append(apply_model_rules)
    service.check_form = apply_form_rules
    if settings.models or settings.default_model:
        service.inspects_bodies = True

def check_named_model(handler):
    """400 or 403 for the model that a path or a query names; an alias in the path is replaced.

    A request without a body, such as one that cancels a job, names none.
    """
    request = handler.request
    settings = handler.settings
    if request.method != "POST" and handler.upload.done:
        return
    # Old Pythons take a `;` for a separator, too, and so may an upstream in Python.
    for value in models_in_query(request):
        check_model(value, settings)
    replace_in_query(request, settings)

    path = urllib.parse.unquote(request.path)
    before, name, after = find_path_model(path)
    if name is None:
        return
    request.model = name
    handler.record.model = name
    model = check_model(name, settings)
    if model != name:
        before = urllib.parse.quote(before, "/:@")
        after = urllib.parse.quote(after, "/:@")
        request.path = before + urllib.parse.quote(model, "@") + after

def models_in_query(request):
    return [value for name, value in urllib.parse.parse_qsl(request.query[1:])
            if name.casefold() in QUERY_MODELS]

def replace_in_query(request, settings):
    """Put the real names in the place of aliases. 403 for a model that is not on the list."""
    parts = request.query[1:].split("&")
    for index, part in enumerate(parts):
        name, _, value = part.partition("=")
        name = urllib.parse.unquote_plus(name).casefold()
        if value and name in QUERY_MODELS:
            model = check_model(urllib.parse.unquote_plus(value), settings)
            parts[index] = "%s=%s" % (name, urllib.parse.quote(model, ""))
    request.query = request.query[:1] + "&".join(parts)

def find_path_model(path):
    """The model that a decoded path names, or None, between what stands before and behind it."""
    for match in BEFORE_MODEL.finditer(path):
        rest = path[match.end():]
        if match.group(1).lower() == "deployments":
            name, mark, after = rest.partition("/")
        else:
            name, mark, after = rest.rpartition(":")
        if mark:
            return path[:match.end()], name, mark + after
    return path, None, ""

def check_model(model, settings):
    """The real name of a model. 403 unless it is on the list, or fits a pattern there."""
    if settings.models and not allows_model(model, settings):
        raise ErrorResponse(403, "model_not_allowed", "Model not allowed. Allowed models are: %s."
                            % ", ".join(settings.models), param="model")
    return settings.aliases.get(model, model)

def allows_model(name, settings):
    """Is it on the list of models, or does it fit a pattern there?"""
    if name in settings.models:
        return True
    return any(fits(name, parts) for parts in settings.model_patterns)

def fits(name, parts):
    """Does a name consist of these parts, with anything between them? In linear time."""
    first, *middle, last = parts
    if not name.startswith(first):
        return False
    position = len(first)
    for part in middle:
        found = name.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    end = position + len(last)
    return name.endswith(last) and end <= len(name)

# -- in JSON

def apply_model_rules(members, request, settings):
    """The changes that aliases and the default model want. ErrorResponse 400 or 403."""
    check_spelling(members, MODEL_SPELLINGS)
    changes = {}
    name = named_model(members, request, settings)
    if name:
        request.model = request.model or name
        model = real_name(name, request, settings)
        if model != members.get("model"):
            changes["model"] = model
    request.listed_model = listed_model(members, request, settings)
    if not settings.aliases:                # any model will do
        return changes
    for count, (path, name) in enumerate(find_other_models(members), 1):
        if count > MAX_MODELS:
            raise invalid_model("names more than %d models" % MAX_MODELS)
        model = real_name(name, request, settings)
        if model != name:
            changes[path] = model
    return changes

def listed_model(members, request, settings):
    """The one model that may answer, as the operator's list has it; for others nobody vouches.

    Of one that fits a pattern, what stands in front of the first star.
    """
    if any(members.get(name) for name in MODEL_LISTS):
        return ""
    fitting = [parts[0] for parts in settings.model_patterns if fits(request.model, parts)]
    return settings.models.get(request.model) or max(fitting, default="")

def real_name(name, request, settings):
    """As check_model. Gemini's SDKs repeat the path's model in the body, as models/NAME."""
    repeats_path = request.model and name == "models/" + request.model
    prefix = "models/" if repeats_path else ""
    return prefix + check_model(name[len(prefix):], settings)

def named_model(members, request, settings):
    """The member `model`, or the default one; "" where none is needed. ErrorResponse 400."""
    model = members.get("model")
    if isinstance(model, str) and model:
        return model
    if model is not None:
        raise invalid_model("must hold `model` as a string that is not empty")
    # null is none: LangChain sends it to Azure, whose paths name the model.
    if request.model or names_elsewhere(members, request):
        return ""
    if settings.default_model and is_inference(request):
        return settings.default_model
    if settings.aliases:
        raise missing_model()
    return ""

def names_elsewhere(members, request):
    """Does it need no `model`? A list names some, or the session does, or all requests of a batch.

    Where answers are asked for, only the list does: what else is there, an upstream passes over.
    """
    models = members.get("models")
    for other in models if isinstance(models, list) else [models]:
        if isinstance(other, str) or names_its_model(other):
            return True
    if plain_spelling(request.path).endswith(ANSWER_PATHS):
        return False
    if "session" in members:
        return names_its_model(members["session"])
    requests = members.get("requests")
    if not isinstance(requests, list) or not requests:
        return False
    # Anthropic's have it in `params`.
    requests = [each.get("params", each) if isinstance(each, dict) else None for each in requests]
    return all(map(names_its_model, requests))

def names_its_model(holder):
    name = holder.get("model") if isinstance(holder, dict) else None
    return isinstance(name, str) and name

def find_other_models(members):
    """Pairs of a path and a name: the models of a request besides `model`."""
    for name in members:
        if name in MODEL_LISTS:
            check_other_models(name, members[name])
        if name in MODEL_HOLDERS:
            yield from find_models(members[name], (name,), name in MODEL_LISTS)

def check_other_models(name, others):
    """400 unless the items of `models` or `fallbacks` have a form that we know."""
    for other in others if isinstance(others, list) else [others]:
        if isinstance(other, dict):
            other = other.get("model", 0)
        if other is not None and not isinstance(other, str):
            raise invalid_model("must name models in `%s`, by strings or by `model`" % name)

def find_models(value, path, is_name):
    """Pairs of a path and a name, of each member that names models; `value` does if `is_name`.

    An object that is called `model`, as in a tool's schema, is none, but may hold some.
    """
    if isinstance(value, str) and is_name:
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_models(item, path + (index,), is_name)
    elif isinstance(value, dict) and not is_function(value, path):
        for name, item in value.items():
            if name not in NOT_SEARCHED or path[-1] == "audio":      # session.audio.input
                yield from find_models(item, path + (name,), names_models(name))

def is_function(value, path):
    """Is it a tool that the client runs? A `model` in its schema is one of its parameters."""
    return "tools" in path and value.get("type") == "function"

def names_models(name):
    """Does a member of this name hold models, as `model` and `allowed_models` do?"""
    low = name.casefold()
    return low.endswith(("model", "models")) or low == "fallbacks"

def invalid_model(rule):
    return ErrorResponse(400, "invalid_model", "The body %s." % rule, "model")

def missing_model():
    return ErrorResponse(400, "missing_model", "Missing required parameter: `model`.", "model")

# -- in a form

def apply_form_rules(body, request, settings):
    """A multipart/form-data body with the real name of its model. ErrorResponse 400 or 403."""
    fields = read_form(body, request.headers)
    models = [field for field in fields if field[0] == b"model"]
    if len(models) > 1:
        raise invalid_model("must hold `model` once")
    if not models:
        if settings.aliases and not request.model:
            raise missing_model()
        return body
    _, start, end = models[0]
    try:
        name = body[start:end].decode()
    except UnicodeDecodeError:
        raise invalid_model("must hold `model` in UTF-8")
    request.model = request.model or name
    model = check_model(name, settings)
    if model == name:
        return body
    return body[:start] + model.encode() + body[end:]

def read_form(body, headers):
    """The fields of a form: for each its name, where its value begins and ends. Else 400.

    Strict, so that nobody can read another model in it: nothing in front of the first part or
    behind the last, and the delimiter nowhere else than between two parts.
    """
    form_type = FORM_TYPE.fullmatch(headers.get(b"content-type"))
    if not form_type:
        raise invalid_form("its type must be multipart/form-data with a plain boundary")
    delimiter = b"--" + form_type.group(2)
    if body.count(delimiter) > MAX_PARTS:
        raise invalid_form("it has more than %d parts" % MAX_PARTS)
    fields = []
    position = body.find(delimiter)
    if position:
        raise invalid_form("it must begin with its boundary")
    while True:
        start = position + len(delimiter)
        position = body.find(delimiter, start)
        if position < 0:
            break
        is_line = body.startswith(b"\r\n", start) and body.endswith(b"\r\n", start, position)
        if not is_line:
            raise invalid_form("a line with its boundary holds more than that")
        fields.append(read_part(body, start, position - 2))
    if body[start:] not in (b"--", b"--\r\n"):
        raise invalid_form("it must end with its boundary")
    return fields

def read_part(body, start, end):
    """The name of a part, where its value begins and ends. Each line begins with CRLF."""
    head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_LINE))
    if head_end < 0:
        raise invalid_form("a part has no end of its header fields")
    head = body[start:head_end]
    headers = Headers(FIELD_LINES.findall(head))
    is_malformed = len(headers.fields) != head.count(b"\n")
    if is_malformed or headers.has_duplicates:
        raise invalid_form("a part has malformed header fields")

    disposition = FORM_FIELD.fullmatch(headers.get(b"content-disposition", b""))
    if not disposition:
        raise invalid_form("a part needs a plain name, and a plain file name if it has one: "
                           "form-data; name=\"...\"; filename=\"...\"")
    _, name, filename = disposition.groups()
    if looks_like_model(name):      # not as JSON, either, as `session` has it
        check_model_part(name, filename, headers)
    return name, head_end + 4, end

def looks_like_model(name):
    """Might some parser make a list of models, or a charset for all, of a field of this name?"""
    plain = re.split(br"[\[.]", name.lower())[0]
    return plain.decode() in MODEL_SPELLINGS or plain == b"_charset_"

def check_model_part(name, filename, headers):
    """400 unless it is the field `model`, as plain text."""
    coding = headers.get(b"content-transfer-encoding", b"binary")
    kind = headers.get(b"content-type", b"text/plain")
    is_plain_text = FORM_PLAIN.fullmatch(kind) and coding.lower() in FORM_CODINGS
    if name != b"model" or filename or not is_plain_text:
        raise invalid_model("may name its model only in the field `model`, as plain text")

def invalid_form(reason):
    return ErrorResponse(400, "invalid_form", "The form cannot be read: %s." % reason)

# -- the settings

def parse_model(text):
    """The name of a model, of whatever script. A Chinese comma would make one name of two."""
    takes = "a model's name: printable characters but commas, ';', '=' and white space"
    if not text.isprintable():
        raise ValueError(takes)
    return match_all("[^\\s=,，、;；]*", text, takes).group()

def parse_models(text):
    """Names and aliases, each with the model behind it, in the order of the list."""
    models = {}
    takes = ("names, comma-separated, each once: model, alias=model, or a pattern such as gpt-4o* "
             "that is no alias")
    for entry in parse_list(text):
        name, equals, model = map(str.strip, entry.partition("="))
        has_bad_alias = equals and (not model or "*" in entry)
        if not name or name in models or has_bad_alias:
            raise ValueError(takes)
        models[parse_model(name)] = parse_model(model or name)
    return models

def derive_models(settings):
    """What follows from the list of models. A provider may have set names that it replaces."""
    settings.aliases = settings.models or settings.aliases
    settings.models_shown = [name for name in settings.models if "*" not in name]
    settings.model_patterns = [name.split("*") for name in settings.models if "*" in name]
    default = settings.default_model
    if settings.models and default and not allows_model(default, settings):
        raise SettingError("AIPROXY_DEFAULT_MODEL: got %r; it takes a name on AIPROXY_MODELS"
                           % default)
    settings.shown["AIPROXY_MODELS"] = settings.shown["AIPROXY_MODELS"] or "all"
    settings.shown["AIPROXY_DEFAULT_MODEL"] = default or "none"

MORE_SETTINGS.append(derive_models)
OPTIONS += (
    Option("AIPROXY_MODELS", AIPROXY_MODELS, parse_models,
           "models allowed, comma-separated; alias=model adds a short name; gpt-4o* allows all "
           "that begin so; empty: all"),
    Option("AIPROXY_DEFAULT_MODEL", AIPROXY_DEFAULT_MODEL, parse_model,
           "the model of a request on an inference path that names none; empty: it is refused if "
           "AIPROXY_MODELS is set"),
)

# ---- Model list ----------------------------------------------------------------------------------
# Does: answers GET /v1/models where AIPROXY_MODELS names some.
# Touches: nothing.
# Entered: `install_model_list` in install_features adds an answer.
# Needs: Model rules.

STARTED = int(time.time())      # when each model was created, as the list has it

def install_model_list(service):
    if service.settings.aliases:
        service.own_answers.append(answer_model_list)

def answer_model_list(handler):
    if not is_model_list(handler.request):
        return False
    name = urllib.parse.unquote(handler.request.path[len("/v1/models/"):])
    patterns = handler.settings.model_patterns
    if name and any(fits(name, parts) for parts in patterns):
        return False                    # whether there is one, the upstream knows
    send_models(handler, list_models(handler.service))
    return True

def send_models(handler, items):
    found = find_model(handler.request.path, items)
    content = json.dumps(found).encode()
    handler.send_response(200, [JSON_TYPE], content)

def list_models(service):
    """The items of the model list, in OpenAI's form."""
    return [{"id": name, "object": "model", "created": STARTED,
             "owned_by": "aiproxy"} for name in service.settings.models_shown]

def is_model_list(request):
    return request.method in READ_METHODS and (request.path + "/").startswith("/v1/models/")

def find_model(path, items):
    """The whole list, or one entry of it. SDKs send the slashes of an id as %2F."""
    wanted = urllib.parse.unquote(path[len("/v1/models/"):])
    if not wanted:
        return {"object": "list", "data": items}
    for item in items:
        if item["id"] == wanted:
            return item
    raise ErrorResponse(404, "model_not_found", "The model %s does not exist or you may not use it."
                        % json.dumps(wanted[:200]), param="model")

# ---- Token and prompt limits ---------------------------------------------------------------------
# Does: holds requests to AIPROXY_MAX_TOKENS and AIPROXY_MAX_CHARS.
# Touches: members of an inspected body: token limits are lowered, and added where there is none.
# Entered: `install_limits` in install_features adds a rule, and a warning for the banner.
# Needs: Body rules.

# The names of a token limit, and of the objects that may hold one: OpenAI's, Anthropic's,
# llama.cpp's, Ollama's, Hugging Face's, SGLang's, LiteLLM's, and Gemini's in both spellings.
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict",
                "num_predict", "max_new_tokens", "maxOutputTokens")
LIMIT_HOLDERS = ("options", "parameters", "sampling_params", "generationConfig",
                 "generation_config", "extra_body")
# Lowered if too large, else left: 0 or less is not `no limit` here. DashScope's and SiliconFlow's
# thoughts, vLLM's least number of tokens.
LOWERED_ONLY = ("thinking_budget", "min_tokens")
# Budgets for thoughts that are a part of the limit, and must be smaller: Anthropic's, OpenRouter's.
THOUGHTS = (("thinking", "budget_tokens"), ("reasoning", "max_tokens"))
ANSWER_COUNTS = ("n", "best_of", "candidateCount", "candidate_count")
LIMIT_SPELLINGS = {name.casefold(): name
                   for name in TOKEN_LIMITS + LIMIT_HOLDERS + ANSWER_COUNTS}
# How paths end where we know the names of the limit: the one that all providers take first.
LIMITED_PATHS = {
    "/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/completions": ("max_tokens",),
    "/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
UNLIMITED_PATHS = ("/embeddings", "/count_tokens")      # nothing is written there
# The newer models here refuse max_tokens; all others know it.
NEW_NAME_HOSTS = re.compile(
    r"(.+\.)?(api\.openai\.com|(openai|cognitiveservices|services\.ai)\.azure\.(com|us|cn))", re.I)

# OpenAI's models that refuse max_tokens, and two names of the limit, whatever host serves them.
NEW_NAME_MODELS = re.compile(r"(.*/)?(gpt-5|o[1-9])([.-].*)?", re.I)

# GitHub's other models may know max_tokens alone.
EITHER_NAME_HOSTS = re.compile(r"models\.github\.ai|models\.inference\.ai\.azure\.com", re.I)

# What of a request is not for the model, and which strings inside are no text: short ones of these
# names, and media of those.
NOT_PROMPT = frozenset((
    "model", "models", "user", "metadata", "service_tier", "stop", "reasoning_effort", "reasoning",
    "tool_choice", "safety_identifier", "prompt_cache_key", "previous_response_id", "include",
    "modalities", "truncation", "encoding_format", "keep_alive", "store", "stream_options"))
MEDIA_TYPES = ("media_type", "mime_type", "mimeType")
NOT_TEXT = frozenset(MEDIA_TYPES + (
    "role", "type", "id", "call_id", "tool_call_id", "tool_use_id", "status", "detail", "format",
    "filename", "file_id"))
MAX_NOT_TEXT = 256      # characters
MEDIA = frozenset((
    "url", "image_url", "file_url", "file_uri", "fileUri", "image", "data", "file_data",
    "encrypted_content", "signature", "thoughtSignature"))
TEXT_TYPE = (r"text/|application/(?:[\w.-]+\+)?(?:x-)?"
             r"(?:json5?|ndjson|jsonl|jsonlines|xml|yaml|(?:java|ecma|type)script|csv|sql)\b")
MEDIA_DATA = re.compile(        # a URL, or base64; without re.I, which would be slow
    r"(?i:[a-z]{1,20})://\S*|(?i:data:(?!%s|[,;]))\S*|[A-Za-z0-9+/=_\r\n-]*" % TEXT_TYPE)
# The names in these objects are a tool's own; in those everything is.
NAMED_BY_TOOL = frozenset(("properties", "patternProperties", "$defs", "definitions"))
WRITTEN_FOR_TOOL = frozenset(("input", "args", "arguments", "response"))
ONE_TOKEN = "...."     # what a token number counts as

def install_limits(service):
    service.body_rules.append(limit_body)
    settings = service.settings
    if settings.max_tokens or settings.max_chars:
        service.inspects_bodies = True
    if service.inspects_bodies and not settings.is_restricted:
        service.warnings.append("without AIPROXY_KEY the rules for bodies hold for POST to %s only"
                                % ", ".join(INFERENCE_PATHS))
    if not settings.max_tokens or settings.paths is None:
        return
    paths = [path for method, path in settings.paths if method in ("POST", "PUT", "PATCH", "*")]
    paths = [path for path in paths if not path.endswith((*LIMITED_PATHS, *UNLIMITED_PATHS))]
    if paths:
        service.warnings.append(
            "AIPROXY_MAX_TOKENS adds no limit on %s: there it only lowers one that stands at the "
            "top of a request" % ", ".join(paths))

def limit_body(members, request, settings):
    """The changes that the limits want. ErrorResponse 400."""
    check_prompt_length(members, settings.max_chars)
    model = getattr(request, "listed_model", "")        # see "Model rules"
    return limit_tokens(members, plain_spelling(request.path), model, settings)

def limit_tokens(members, path, model, settings):
    """What AIPROXY_MAX_TOKENS changes in a request: a dict of changes.

    It holds for all answers together. 400 if they are too many, or if a limit is no number.
    """
    most = settings.max_tokens
    if not most:
        return {}
    holders = dict(find_holders(members))
    each = most // count_answers(members, holders, most)
    changes = {}
    for place, holder in holders.items():
        for name in names_above(holder, each):
            changes[place + (name,) if place else name] = each
        changes.update(limit_thinking(holder, place, each))
    added = missing_limit(members, path, model, settings.upstream.server_name)
    if added:
        wanted = whole_number(members, "max_completion_tokens") or each     # the newer name
        changes[added] = wanted if 0 < wanted < each else each
    return changes

def find_holders(members, place=()):
    """Pairs of a place and an object that may hold a limit: a request, and what is inside it."""
    yield place, members
    for name in LIMIT_HOLDERS:
        if isinstance(members.get(name), dict):
            yield from find_holders(members[name], place + (name,))

def names_above(holder, most):
    """The names of the limits in an object that are above `most`."""
    for name in TOKEN_LIMITS:
        tokens = whole_number(holder, name)
        if tokens is not None and not 0 < tokens <= most:   # to some, others mean unlimited
            yield name
    for name in LOWERED_ONLY:
        tokens = whole_number(holder, name)
        if tokens is not None and tokens > most:
            yield name

def limit_thinking(holder, place, most):
    """A budget for thoughts must be smaller than the limit; Anthropic wants no fewer than 1024."""
    changes = {}
    lowered = max(1024, most // 2)
    for inside, name in THOUGHTS:
        thoughts = holder.get(inside)
        budget = isinstance(thoughts, dict) and whole_number(thoughts, name) or 0
        if budget >= most and budget > lowered:
            changes[place + (inside, name)] = lowered
    return changes

def missing_limit(members, path, model, host):
    """The name under which a limit must be added, so that this upstream keeps it; "" for none."""
    for suffix, names in LIMITED_PATHS.items():
        if path.endswith(suffix):
            break
    else:
        return ""
    given = [name for name in names if members.get(name) is not None]
    if EITHER_NAME_HOSTS.fullmatch(host) and given:     # they know all names, and refuse two
        return ""
    if NEW_NAME_HOSTS.fullmatch(host) or NEW_NAME_MODELS.fullmatch(model):
        return "" if given else names[-1]
    return "" if names[0] in given else names[0]

def count_answers(members, holders, most):
    """How many answers a request wants, to all prompts. 400 for more than it can have tokens."""
    count = 1
    param = "prompt"
    for holder in holders.values():
        check_spelling(holder, LIMIT_SPELLINGS)
        for name in ANSWER_COUNTS:
            number = whole_number(holder, name) or 1
            if number < 0:
                raise invalid_parameter(name, "must be a whole number")
            if number > count:
                count = number
                param = name
    prompts = members.get("prompt")
    if isinstance(prompts, list):
        is_tokens = all(isinstance(item, int) for item in prompts)
        count *= 1 if is_tokens else len(prompts)       # tokens are one prompt
    if count > most:
        raise ErrorResponse(400, "invalid_parameter", "`%s` asks for more answers than "
                            "AIPROXY_MAX_TOKENS allows tokens." % param, param=param)
    return count

def whole_number(members, name):
    """The value of a member that must be a whole number; None if it is absent."""
    value = members.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid_parameter(name, "must be a whole number")
    if value != int(value):
        raise invalid_parameter(name, "must be a whole number")
    return int(value)

def check_prompt_length(members, most):
    """400 for a prompt of more than `most` characters: all that is text, no images or audio."""
    count = count_characters(members) if most else 0
    if count > most:
        raise ErrorResponse(400, "invalid_parameter", "The request holds %d characters of text; "
                            "AIPROXY_MAX_CHARS allows %d." % (count, most))

def count_characters(members):
    """The characters that a model reads."""
    values = [value for name, value in members.items()
              if name not in NOT_PROMPT and isinstance(value, (str, list, dict))]
    count = 0
    pending = [(values, False, False)]
    while pending:
        for item, names_count, all_counts in text_parts(*pending.pop()):
            if isinstance(item, str):
                count += len(item)
            else:
                pending.append((item, names_count, all_counts))
    return count

def text_parts(value, names_count, all_counts):
    """The strings, arrays and objects in one that count; of the last, do all names, all strings?"""
    if isinstance(value, dict):
        yield from text_members(value, names_count, all_counts)
        return
    for item in value:
        if isinstance(item, (str, list, dict)):
            yield item, False, all_counts
        elif type(item) in (int, float):        # some take 7.0 for 7
            yield ONE_TOKEN, False, False

def text_members(members, names_count, all_counts):
    for name, value in members.items():
        if names_count or all_counts or len(name) > MAX_NOT_TEXT:
            yield name, False, False
        if isinstance(value, str):
            if all_counts or is_text(name, value, members):
                yield value, False, False
        elif isinstance(value, list):
            yield value, False, all_counts
        elif isinstance(value, dict):
            all_inside = all_counts or name in WRITTEN_FOR_TOOL
            yield value, name in NAMED_BY_TOOL, all_inside

def is_text(name, value, siblings):
    """Is a string that has this name for the model to read? Documents are, also as `data`."""
    if name in NOT_TEXT:
        return len(value) > MAX_NOT_TEXT
    if name not in MEDIA or siblings.get("type") == "text":
        return True
    for media_type in MEDIA_TYPES:
        if re.match(TEXT_TYPE, str(siblings.get(media_type)), re.I):
            return True
    return not MEDIA_DATA.fullmatch(value)

def derive_limits(settings):
    if not settings.find_text(find_option("AIPROXY_MAX_CHARS"))[1]:
        settings.max_chars = settings.upstream.provider.max_chars
    settings.shown["AIPROXY_MAX_TOKENS"] = str(settings.max_tokens or "none")
    settings.shown["AIPROXY_MAX_CHARS"] = str(settings.max_chars or "none")

MORE_SETTINGS.append(derive_limits)
OPTIONS += (
    Option("AIPROXY_MAX_TOKENS", AIPROXY_MAX_TOKENS,
           number_parser(int, 0, 10 ** 9, "a number of tokens"),
           "most output tokens of a request, all its answers together: larger limits are lowered, "
           "missing ones added; empty: no limit"),
    Option("AIPROXY_MAX_CHARS", AIPROXY_MAX_CHARS, number_parser(int, 0, 10 ** 12, "a number"),
           "most characters of prompt text, a token number being four; 0: no limit; empty: 131072 "
           "for workers-ai, else 0"),
)

# ---- Several provider keys -----------------------------------------------------------------------
# Does: uses the provider keys in turn, and tries the next one where one is refused.
# Touches: which key a request is sent with; the exchange of a key that was refused.
# Entered: `install_key_rotation` in install_features sets `use_key`.
# Needs: Body rules.

FAILOVER_STATUSES = (401, 402, 403, 429)    # what an upstream says where another key may do better
KEY_COOLDOWN = 60                           # seconds, after a status that names no time
REJECTED_COOLDOWN = 600                     # seconds, after a 401
MAX_COOLDOWN = 86400                        # seconds

def install_key_rotation(service):
    count = len(service.settings.provider_keys)
    if count > 1:
        service.use_key = KeyRotation(count, service.log.warn).use
        service.needs_whole_bodies = True        # a body that is being streamed is sent only once


class KeyRotation:
    """Several provider keys, each named by its index, never by its text."""

    def __init__(self, count, warn):
        self.cooldowns = [0.0] * count      # until when each is left alone
        self.turn = 0
        self.lock = threading.Lock()
        self.warn = warn

    def use(self, send):
        """The exchange that `send(index)` makes with the first key that is not refused.

        With the last one if all are. Then it was the request's fault, or everybody's: a key has a
        cooldown only after another has done better with the same request. Otherwise one client
        could take the keys away from all the others.
        """
        indexes = self.order(time.monotonic())
        refused = []
        for index in indexes:
            exchange = send(index)
            if exchange.status not in FAILOVER_STATUSES:
                break
            refused.append((index, exchange.status, exchange.headers))
            if index != indexes[-1]:
                exchange.close()
        # A 5xx says nothing about the key.
        if exchange.status not in FAILOVER_STATUSES and exchange.status < 500:
            for index, status, headers in refused:
                self.set_aside(index, status, headers, time.monotonic())
        return exchange

    def order(self, now):
        """The keys to try, each once: those without a cooldown, in turn; else the next to be."""
        with self.lock:
            ready = [index for index, until in enumerate(self.cooldowns)
                     if until <= now]
            if not ready:
                return [self.cooldowns.index(min(self.cooldowns))]
            self.turn += 1
            start = self.turn % len(ready)
            return ready[start:] + ready[:start]

    def set_aside(self, index, status, headers, now):
        """Leave a key alone: for the response's Retry-After, after a 401 for ten minutes."""
        seconds = retry_after(headers.get(b"retry-after", b""))
        if status == 401:
            seconds = REJECTED_COOLDOWN
        with self.lock:
            was_ready = self.cooldowns[index] <= now
            until = self.cooldowns[index]
            self.cooldowns[index] = max(until, now + seconds)
        if status == 401 and was_ready:
            self.warn("the upstream rejected key %d of %d (401); it is set aside for %d minutes"
                      % (index + 1, len(self.cooldowns), seconds // 60))

def retry_after(value):
    """The seconds of a Retry-After, a number or a date (RFC 9110 section 10.2.3).

    KEY_COOLDOWN for anything else, MAX_COOLDOWN at most.
    """
    text = value.decode("latin-1")
    seconds = KEY_COOLDOWN
    if re.fullmatch("[0-9]{1,9}", text):
        seconds = int(text)
    else:
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(seconds, 0), MAX_COOLDOWN)

# ---- Kept connections ----------------------------------------------------------------------------
# Does: keeps connections to the upstream for the next request: a new one costs two round trips.
# Touches: connections after the end of an exchange. A request is sent again at most once.
# Entered: `install_kept_connections` in install_features sets `try_kept` and `keep`.

POOL_SIZE = 100         # idle upstream connections
POOL_SECONDS = 30       # for each: providers close theirs after 60

def install_kept_connections(service):
    pool = Pool()
    handler = service.upstream_handler
    handler.pool = pool
    handler.keep = pool.release
    handler.try_kept = functools.partial(try_kept, handler)
    service.on_tick = pool.close_old
    service.retire = pool.retire

def try_kept(handler, request):
    """An exchange over a kept connection; None if there is none, or it was closed meanwhile.

    A request may be sent again if such a connection was closed before any byte of a response.
    Either no byte of it had been taken, or it is one that may be carried out twice (RFC 9110
    section 9.2.2): GET, HEAD, or any with an Idempotency-Key.
    """
    connection = handler.pool.acquire()
    if connection is None:
        return None
    is_all_here = request.upload.done
    exchange = Exchange(connection, request, handler.keep)
    try:
        return handler.run_exchange(exchange)
    except (OSError, ProtocolError) as error:
        is_answered = isinstance(error, ProtocolError) or connection.buffer or exchange.interim
        is_taken = exchange.bytes_sent and not (is_all_here and is_repeatable(request))
        if is_answered or is_taken or isinstance(error, TimedOut):
            raise response_error(error)
    return None

def is_repeatable(request):
    """May it be carried out twice?"""
    is_idempotent = any(name.lower() == b"idempotency-key" for name, _ in request.fields)
    return is_idempotent or request.method in READ_METHODS


class Pool:
    """The idle connections to the upstream."""

    def __init__(self):
        self.size = POOL_SIZE               # connections at most
        self.idle = collections.deque()     # of (connection, until); the newest at the right

    def acquire(self):
        """An idle connection that is still good; None if there is none."""
        while True:
            try:
                connection, until = self.idle.pop()
            except IndexError:              # other threads take some, too
                return None
            if time.monotonic() < until and is_silent(connection):
                return connection
            connection.close()

    def release(self, connection, headers):
        """Keep a connection whose last response had these headers."""
        until = time.monotonic() + idle_seconds(headers)
        self.idle.append((connection, until))
        with contextlib.suppress(IndexError):       # other threads take some, too
            while len(self.idle) > self.size:
                self.idle.popleft()[0].close()

    def retire(self):
        """Keep no more: running requests may still bring some."""
        self.size = 0
        self.close_old(math.inf)

    def close_old(self, now):
        """Close what has been idle too long; called by the relay loop twice a second."""
        for entry in self.idle.copy():
            if now >= entry[1]:
                with contextlib.suppress(ValueError):       # it has just been taken
                    self.idle.remove(entry)
                    entry[0].close()


def idle_seconds(headers):
    """How long to keep the connection: a second less than the upstream says that it does."""
    says = headers.get(b"keep-alive")
    timeout = says and re.search(br"timeout *= *([0-9]{1,9})", says, re.I)
    if not timeout:
        return POOL_SECONDS
    return min(POOL_SECONDS, int(timeout.group(1)) - 1)

def is_silent(connection):
    """Has nothing come while it was idle: no hang-up, and no bytes that nobody asked for?"""
    try:
        return connection.receive() is None
    except OSError:
        return False

# ---- TLS errors in words -------------------------------------------------------------------------
# Does: says what is wrong where the upstream's TLS or its certificate is, and that no retry helps.
# Touches: nothing.
# Entered: `check_tls_error` in connect_error.

def check_tls_error(error):
    if isinstance(error, ssl.SSLCertVerificationError):
        raise upstream_error("upstream_tls_error", "The upstream's certificate cannot be trusted "
                              "(CERTIFICATE_VERIFY_FAILED): %s." % error.verify_message, [NO_RETRY])
    if isinstance(error, ssl.SSLError):
        raise upstream_error("upstream_tls_error", "The upstream does not speak TLS as it should "
                              "(%s)." % (error.reason or "handshake failed"), [NO_RETRY])

# ---- Proxies on the way up -----------------------------------------------------------------------
# Does: reaches the upstream through the environment's HTTPS_PROXY, HTTP_PROXY or ALL_PROXY.
# Touches: the address that is connected to; a connection before its TLS; plain requests.
# Entered: `install_upstream_proxy` in install_features changes the connector or the opener.

def install_upstream_proxy(service):
    proxy = service.settings.proxy
    if not proxy:
        return
    service.proxy = proxy.netloc
    service.upstream_handler.connector.address = proxy.address
    if service.settings.upstream.scheme == "https":
        service.upstream_handler.connector.open_tunnel = proxy.open_tunnel
    else:
        service.opener.add_handler(proxy)

def read_proxy(settings):
    """The environment's proxy for the upstream, as a setting."""
    settings.proxy = None
    name, url = find_proxy(settings.upstream)
    if not url:
        return
    try:
        settings.proxy = UpstreamProxy(url, settings.upstream)
    except ValueError:          # its message would hold a part of the URL, perhaps of the password
        raise SettingError("%s: got something that is not shown here because it may be secret; it "
                           "takes the URL of an HTTP proxy, such as http://host:8080 (proxies that "
                           "speak SOCKS or TLS are not supported)" % name)
    settings.shown[name] = settings.proxy.netloc

MORE_SETTINGS.append(read_proxy)

def find_proxy(upstream):
    """Variable and URL of the environment's proxy for this upstream. None for a loopback one."""
    if upstream.is_loopback or urllib.request.proxy_bypass(upstream.netloc.decode()):
        return "", None
    proxies = urllib.request.getproxies()
    kind = upstream.scheme if proxies.get(upstream.scheme) else "all"
    name = kind + "_proxy"
    if not os.environ.get(name):
        name = name.upper()
    return name, proxies.get(kind)


class UpstreamProxy(urllib.request.BaseHandler):
    """An HTTP proxy in front of the upstream. ValueError for what is not the URL of one."""

    def __init__(self, url, upstream):
        parts = urllib.parse.urlsplit(url if "//" in url else "http://" + url)
        has_more = parts.path.strip("/") or parts.query or parts.fragment
        if parts.scheme != "http" or not parts.hostname or parts.port == 0 or has_more:
            raise ValueError()
        self.address = (parts.hostname, parts.port or 80)
        self.netloc = parts.netloc.rpartition("@")[2]       # without the user info: it is secret
        self.target = upstream.netloc                       # of CONNECT, always with its port
        if not self.target.endswith(b":%d" % upstream.port):
            self.target += b":%d" % upstream.port
        self.fields = []                                    # for the proxy alone
        if parts.username:
            user = urllib.parse.unquote("%s:%s" % (parts.username, parts.password or ""))
            self.fields = [(b"Proxy-Authorization", b"Basic " + base64.b64encode(user.encode()))]

    def http_request(self, request):
        """Called by the opener for a plain upstream: the proxy is asked for the whole URL.

        RFC 9112 section 3.2.2.
        """
        request.selector = request.full_url
        request.fields += self.fields
        return request

    def http_response(self, request, exchange):
        """Called by the opener: a 407 is the proxy's own, and may repeat what was sent to it."""
        if exchange.status == 407:
            exchange.close()
            raise connect_error(OSError("the proxy refused our credentials with status 407"))
        return exchange

    def open_tunnel(self, connection, wait):
        """Ask for a way through, for TLS (RFC 9110 section 9.3.6). OSError if there is none."""
        fields = [(b"Host", self.target)] + self.fields
        data = render_head(b"CONNECT %b HTTP/1.1" % self.target, fields)
        while data:
            wait(connection, WRITE)
            data = data[connection.send_some(data):]

        def read_more():
            wait(connection, READ)
            if not connection.fill():
                raise ClosedEarly()

        (_, status, _), _ = read_head(connection, STATUS_LINE, read_more)
        if not status.startswith(b"2"):
            raise OSError("the proxy refused the tunnel with status %s" % status.decode())
        if connection.buffer:       # it would be taken for something that came through TLS
            raise ProtocolError("the proxy sent bytes behind its response")

# ---- Fields for the upstream ---------------------------------------------------------------------
# Does: adds the header fields of AIPROXY_UPSTREAM_HEADERS to every request to the upstream.
# Touches: the fields of the request; the responses, in which their values must not come down.
# Entered: `install_upstream_fields` in install_features sets `edit_upstream_headers`.
# Needs: Keys in long errors.

# Host, framing, and what speaks of the body, the connection or one request: ours to write.
RESERVED_FIELDS = HOP_BY_HOP | frozenset(
    b"host content-length content-type content-encoding expect accept-encoding "
    b"idempotency-key".split())
KEY_FIELDS = frozenset(API_KEY_FIELDS) | {b"authorization", b"ocp-apim-subscription-key"}  # Azure's
# A shorter value is looked for nowhere: it would be found in half of all texts.
MIN_HIDDEN = 8
MEDIA_TYPE = re.compile(br"(?:application|text|audio|image)/[\w.+*-]+", re.I)
CREDENTIAL = re.compile(br"(?:(?:bearer|basic|token) +)?(.+)", re.I)

def install_upstream_fields(service):
    service.edit_upstream_headers = set_upstream_fields
    service.response_checks.append(mask_operator_values)

def parse_upstream_headers(text):
    """Pairs of a name and a value, as bytes."""
    fields = {}
    takes = ("Name: value, several separated by ';' and not by '；', each name once and each value "
             "of visible ASCII characters and spaces, without ';'")
    for entry in map(clean, text.split(";")):
        if not entry:
            continue
        match = match_all(r"(%s):[ \t]*([\x21-\x7e](?:[ -~]*[\x21-\x7e])?)" % TOKEN.decode(),
                          entry, takes)
        name = match.group(1).encode()
        low = plain_name(name)
        if low in fields:
            raise ValueError(takes)
        if low in RESERVED_FIELDS or low.startswith(b"sec-websocket-"):
            raise ValueError("other fields than %s, which is for the proxy to write"
                             % low.decode())
        fields[low] = (name, match.group(2).encode())
    if text and not fields:
        raise ValueError(takes)
    return list(fields.values())

def plain_name(name):
    """A field's name as CGI-like servers compare it: they take `_` for `-`."""
    return name.lower().replace(b"_", b"-")

def check_upstream_fields(settings):
    """SettingError for a key among the fields."""
    reserved = {plain_name(name) for name, _ in settings.key_fields}
    if not settings.provider_keys:
        reserved |= KEY_FIELDS              # any caller could spend it
    for name, _ in settings.upstream_headers:
        low = plain_name(name)
        if low in reserved:
            variable = settings.upstream.provider.key_variable
            raise SettingError("AIPROXY_UPSTREAM_HEADERS: the field %s is for the provider key, "
                               "which belongs in %s" % (low.decode(), variable))

def hide_upstream_values(settings):
    """Keep what the fields hold out of --check, the log and the responses."""
    fields = settings.upstream_headers
    if fields:
        shown = ["%s: ***" % name.decode() for name, _ in fields]
        settings.shown["AIPROXY_UPSTREAM_HEADERS"] = "; ".join(shown)

    # What a client could send as well is no secret.
    values = [CREDENTIAL.fullmatch(value).group(1) for name, value in fields
              if plain_name(name) not in ALLOWED_REQUEST_FIELDS]
    values = [value for value in values
              if len(value) >= MIN_HIDDEN and not MEDIA_TYPE.fullmatch(value)]
    settings.masked_values = values
    settings.log_secrets = settings.log_secrets + values
    settings.field_secrets = settings.field_secrets + values
    # Workers AI has words of its own for errors.
    getattr(settings, "workers_secrets", []).extend(value.decode() for value in values)

def set_upstream_fields(fields, settings):
    """The operator's fields in the place of those that bear their names."""
    if not settings.upstream_headers:
        return fields
    names = {plain_name(name) for name, _ in settings.upstream_headers}
    kept = [field for field in fields if plain_name(field[0]) not in names]
    return kept + settings.upstream_headers

def mask_operator_values(handler, exchange):
    """Let an error come down with stars for the operator's values: many name the organization."""
    values = handler.settings.masked_values
    if values and exchange.status >= 300 and not exchange.is_coded():
        exchange.body = MaskedBody(exchange.body, values)
        exchange.prefetched = exchange.body.mask(exchange.prefetched)


class MaskedBody:
    """A body with stars for certain values, as many as they have bytes: its length stays."""

    def __init__(self, body, values):
        self.body = body
        self.length = body.length
        longest_first = sorted(values, key=len, reverse=True)
        self.patterns = [escaped_pattern(value) for value in longest_first]
        self.filter = SecretFilter(values)
        self.waiting = b""                  # the end of what came, if a value may begin in it

    @property
    def done(self):
        return self.body.done

    def read(self):
        return self.mask(self.body.read())

    def mask(self, data):
        data = self.waiting + data
        end = len(data) if self.body.done else self.find_end(data)
        self.waiting = data[end:]
        data = data[:end]
        for pattern in self.patterns:
            data = pattern.sub(lambda match: b"*" * len(match.group()), data)
        return data

    def find_end(self, data):
        """How much of `data` is sure: a value may go on behind it, and so may a longer one."""
        end = self.filter.find_beginning(data)
        for pattern in self.patterns:
            for match in pattern.finditer(data):
                if match.start() < end < match.end():
                    end = match.start()
        return end

MORE_SETTINGS += [check_upstream_fields, hide_upstream_values]
SECRET_PARSERS.append(parse_upstream_headers)
SEPARATORS["AIPROXY_UPSTREAM_HEADERS"] = ";"
OPTIONS += (
    Option("AIPROXY_UPSTREAM_HEADERS", AIPROXY_UPSTREAM_HEADERS, parse_upstream_headers,
           "header fields for every request to the upstream, Name: value, several separated by "
           "';'; they replace the client's, and their values are secret"),
)

# ---- Early responses -----------------------------------------------------------------------------
# Does: lets a request's body go on up while the response that came before its end goes down. (Part
# one ends such an upload, and with it both connections.)
# Touches: both connections, in the relay loop.
# Entered: `install_early_responses` in install_features sets `make_job`.

def install_early_responses(service):
    service.make_job = make_job

def make_job(handler, exchange, is_chunked, secret_filter):
    kind = ResponseJob if exchange.request_sent else TwoWayJob
    return kind(handler, exchange, is_chunked, secret_filter)


class TwoWayJob(ResponseJob):
    """The body of a response on its way down, and the rest of the request's on its way up."""

    up_waits_for = None                     # the side that what goes up waits for

    def start(self):
        super().start()
        if self.state != self.ENDED:
            self.move_up()

    def move_up(self):
        """The upstream has responded before the end of the request's body, which goes on."""
        if self.outcome:                    # the response has ended, and with it the exchange
            return None
        sent = self.exchange.bytes_sent
        try:
            self.up_waits_for = self.exchange.send_more()
        except ClientGone as gone:
            return self.finish(gone.outcome)
        except ErrorResponse as error:      # the body breaks a rule, or off
            return self.end_early(error.code)
        if self.exchange.bytes_sent > sent:
            self.heard = self.loop.now
        return self.set_state(self.state)

    def upstream_mask(self):
        goes_up = self.up_waits_for is self.upstream and not self.outcome
        return super().upstream_mask() | (WRITE if goes_up else 0)

    def on_upstream(self, mask):
        if mask & WRITE:
            self.move_up()
        super().on_upstream(mask)

    def on_client(self, mask):
        super().on_client(mask)
        if self.state != self.ENDED and self.up_waits_for is self.client:
            self.move_up()

    def on_tick(self):
        """As long as the body's next bytes are the client's to send, its pace counts."""
        if self.up_waits_for is not self.client or self.is_stalled():
            super().on_tick()
            return
        try:
            self.exchange.request.upload.add_wait(TICK_SECONDS)
        except ErrorResponse as error:
            self.end_early(error.code)

# ---- Event streams -------------------------------------------------------------------------------
# Does: tells of a cut in an event stream by an event of our own, takes the API's own last event
# for the end where TLS ends without close_notify, and has proxies in front hold nothing back.
# Where a stream is translated: takes its events out of the bytes.
# Touches: event streams, between two events; what counts as a cut; header fields of streams.
# Entered: `install_event_streams` in install_features sets `follow_events` and `stream_headers`.

EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")

def install_event_streams(service):
    service.follow_events = follow_events
    service.stream_headers = stream_headers
    service.error_form = lambda path: OPENAI_ERRORS      # of the events of the API there

def stream_headers(present, is_open_ended):
    """What a response gets whose length is not declared, or that is an event stream."""
    fields = []
    is_event_stream = present.get(b"content-type", b"").lower().startswith(b"text/event-stream")
    if is_event_stream or is_open_ended:
        fields.append((b"X-Accel-Buffering", b"no"))        # nginx would buffer it
    if is_event_stream:
        fields.append((b"Cache-Control", b"no-cache"))
    return fields

def follow_events(job, handler):
    """What follows the events of a response; None where no event of ours can go down."""
    exchange = job.exchange
    # A length, or a filter, says by itself where the body would have ended.
    is_open_ended = exchange.declared_length is None and job.secret_filter is None
    if not is_open_ended or exchange.is_coded() or exchange.media_type() != b"text/event-stream":
        return None
    ends_by_close = isinstance(job.body, UntilCloseBody)
    # Some upstreams end TLS without close_notify. Then only the API can tell an end from a cut.
    last_event = LastEvent() if ends_by_close and job.upstream.is_tls else None
    return EventStream(ends_by_close, last_event, functools.partial(error_event, handler))


class OpenAIErrors:
    """How our errors look in OpenAI's API."""

    def body(self, error, request_id):
        """What the body of an error response is the JSON of."""
        return {"error": error_object(error)}

    def event(self, error, request_id):
        """The data of the event that tells of a cut stream, and its name."""
        return self.body(error, request_id), ""


OPENAI_ERRORS = OpenAIErrors()

def error_event(handler, error):
    """The event that tells of an error in a stream that has begun."""
    form = handler.service.error_form(handler.record.path)
    return render_error_event(error, form, handler.record.id)

def render_error_event(error, form=OPENAI_ERRORS, request_id=""):
    return render_event(*form.event(error, request_id))

def render_event(data, name=""):
    """One event of a stream, in ASCII, because a delta may hold half a surrogate pair.

    Never with `id:` or `retry:`, which openai-python stumbles over.
    """
    event = "data: %s\n\n" % json.dumps(data)
    return ("event: %s\n%s" % (name, event) if name else event).encode()


class EventStream:
    """Where a stream of events stands: an event of our own can only go between two events."""

    CUT_REASONS = {     # other outcomes: the upstream has closed the connection
        "upstream_timeout": "The upstream timed out",
        "shutdown": "The proxy was stopped",
        "request_timeout": "The request's body came too slowly",
        "request_too_large": "The request's body is larger than allowed",
        "bad_request": "The request's body is malformed",
        "incomplete_body": "The request's body ended early",
    }

    def __init__(self, ends_by_close, last_event, render_error):
        self.ends_by_close = ends_by_close  # does only the connection's end end it?
        self.last_event = last_event
        self.render_error = render_error
        self.tail = EVENT_ENDS[0]           # the end of what went down

    def feed(self, data):
        self.tail = (self.tail + data[-4:])[-4:]
        if self.last_event:
            self.last_event.feed(data)

    def is_between_events(self):
        return self.tail.endswith(EVENT_ENDS)

    def is_broken_off(self):
        """Has it ended inside a line? A process that dies ends its connections cleanly."""
        return self.ends_by_close and not self.tail.endswith((b"\n", b"\r"))

    def is_final(self):
        """Is this the API's own end, where nothing else tells?"""
        return self.last_event is not None and self.last_event.is_final()

    def tell_cut(self, outcome):
        """The event for it, if one can go down."""
        if not self.is_between_events():
            return b""
        reason = self.CUT_REASONS.get(outcome, "The upstream closed the connection")
        return self.render_error(upstream_error(
            outcome, reason + " in the middle of this response."))


class LastEvent:
    """The beginning of the last event of a stream, kept as it passes."""

    FINAL = re.compile(br'(?:(?:event|id|retry):[^\n]*\n)*data: ?(?:\[DONE\]|\{"type": ?'
                       br'"(?:message_stop|response\.(?:completed|incomplete|failed))")')

    def __init__(self):
        self.event = b""

    def feed(self, data):
        data = (self.event + data).replace(b"\r\n", b"\n")
        content = data.rstrip(b"\n")
        line_ends = data[len(content):]
        self.event = content.rpartition(b"\n\n")[2][:256] + line_ends[:2]

    def is_final(self):
        """Is it whole, and the API's own end? OpenAI's and Anthropic's are known."""
        is_whole = self.event.endswith(b"\n\n")
        return is_whole and self.FINAL.match(self.event) is not None

# -- events out of bytes, for a stream that is translated

MAX_EVENT = 4 << 20     # bytes of an event: far above any, so that none fills the memory
BLANK_LINE = re.compile(br"\r?\n(?:\r?\n)+")


class EventReader:
    """Events out of bytes as they come, with line ends LF or CRLF (WHATWG HTML, 9.2.6)."""

    def __init__(self):
        self.buffer = bytearray()       # the event whose end has not come yet

    def feed(self, piece):
        """The data of the events that `piece` completes, without those that have none."""
        # Only the new part is searched, with the 3 bytes before it, where "\r\n\r" may stand: to
        # search all of it again would cost the square of an event's length.
        position = max(len(self.buffer) - 3, 0)
        self.buffer += piece
        events = []
        begin = 0
        for blank_line in BLANK_LINE.finditer(self.buffer, position):
            block = self.buffer[begin:blank_line.start()]
            events.append(read_event(block))
            begin = blank_line.end()
        del self.buffer[:begin]
        if len(self.buffer) > MAX_EVENT:
            raise upstream_error("upstream_bad_response", "An event of the upstream's is too long.")
        return list(filter(None, events))

def read_event(block):
    """The data of one event. The first may begin with a byte order mark."""
    lines = block.decode("utf-8-sig", "replace").split("\n")
    data = [line[len("data:"):].strip() for line in lines
            if line.startswith("data:")]
    return "\n".join(data)

# ---- Errors in the form of other APIs ------------------------------------------------------------
# Does: gives our errors the form of the API that was called, so that its SDK can show them.
# Touches: nothing; it makes other objects of the same errors.
# Entered: `install_error_forms` in install_features finds the form by the path.
# Needs: Event streams.

ANTHROPIC_TYPES = {     # docs.claude.com, "Errors"; any other is api_error or invalid_request_error
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error"}
GOOGLE_STATUSES = {     # google/rpc/code.proto; any other is UNAVAILABLE or INVALID_ARGUMENT
    401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED",
    504: "DEADLINE_EXCEEDED"}


class ResponsesErrors(OpenAIErrors):
    """OpenAI's Responses API: its own kind of event, whose name says what it is.

    `error` is what OpenAI's SDKs raise, the rest is what the API documents. Some clients pass over
    an event without its number, which nobody here has counted.
    """

    def event(self, error, request_id):
        details = error_object(error)
        return dict(details, type="error", sequence_number=0, error=details), "error"


class AnthropicErrors(OpenAIErrors):
    """The Messages API. Its SDKs pass over events without a name."""

    def body(self, error, request_id):
        kind = "api_error" if error.status >= 500 else "invalid_request_error"
        details = {"type": ANTHROPIC_TYPES.get(error.status, kind), "message": error.message}
        return {"type": "error", "error": details, "request_id": request_id}

    def event(self, error, request_id):
        return self.body(error, request_id), "error"


class GoogleErrors(OpenAIErrors):
    """Gemini's own API. Its SDKs compare `code` with numbers, in an event as well."""

    def body(self, error, request_id):
        status = "UNAVAILABLE" if error.status >= 500 else "INVALID_ARGUMENT"
        return {"error": {"code": error.status, "message": error.message,
                          "status": GOOGLE_STATUSES.get(error.status, status)}}


ERROR_FORMS = (     # by the path, also as a client with a slightly wrong base URL has it
    (re.compile("(?:/+v1)*/+messages(?:/|$)"), AnthropicErrors()),
    (re.compile("(?:/+v1)*/+responses(?:/|$)"), ResponsesErrors()),
    (re.compile("/+v1(?:alpha|beta)/"), GoogleErrors()),
    # google-genai 3 calls /v1/models/MODEL:generateContent. OpenAI-style names have tags (m:8b).
    (re.compile("/+v1/+models/[^/]+:[a-z]+[A-Z][A-Za-z]+$"), GoogleErrors()),
)

def install_error_forms(service):
    service.error_form = find_error_form
    service.error_body = error_body

def error_body(path, error, request_id):
    return find_error_form(path).body(error, request_id)

def find_error_form(path):
    for pattern, form in ERROR_FORMS:
        if pattern.match(path):
            return form
    return OPENAI_ERRORS

# ---- Heartbeats ----------------------------------------------------------------------------------
# Does: sends a comment down an event stream that is silent, so that no load balancer cuts it.
# Touches: event streams, between two events. The upstream's silence counts on meanwhile.
# Entered: `install_heartbeats` in install_features sets `on_silence`, `add_heartbeats`.
# Needs: Event streams.

HEARTBEAT = b": keep-alive\n\n"    # a comment and an empty line (WHATWG HTML, 9.2.6)

def install_heartbeats(service):
    seconds = service.settings.heartbeat
    if seconds:
        service.on_silence = functools.partial(send_heartbeat, seconds)
        service.add_heartbeats = functools.partial(wait_with_heartbeats, seconds)

def send_heartbeat(seconds, job):
    """Called by the relay loop twice a second."""
    if not job.events or not job.events.is_between_events():
        return
    last_move = max(job.heard, job.last_taken)
    if job.loop.now - last_move >= seconds:
        job.bytes += len(HEARTBEAT)
        job.send(encode_chunk(HEARTBEAT, job.is_chunked))

def wait_with_heartbeats(seconds, wait, send):
    """A `wait(connection, mask, seconds)` that calls `send` with a heartbeat every so often.

    The time runs across waits: bytes of the upstream that lead to nothing for the client do not put
    a heartbeat off. Whoever has sent something makes a new one of these.
    """
    due = time.monotonic() + seconds

    def wait_in_parts(connection, mask, patience):
        nonlocal due
        deadline = time.monotonic() + patience
        while True:
            until = min(deadline, due)
            try:
                return wait(connection, mask, until - time.monotonic())
            except TimedOut:
                if until == deadline:
                    raise
                send(HEARTBEAT)
                due = time.monotonic() + seconds
    return wait_in_parts

OPTIONS += (
    Option("AIPROXY_HEARTBEAT", AIPROXY_HEARTBEAT,
           number_parser(float, 0, 86400, "seconds, 0 for none"),
           "seconds between the comments that a silent event stream gets, so that no load balancer "
           "cuts it; 0: none"),
)

# ---- Log lines as text ---------------------------------------------------------------------------
# Does: writes the lines of the log for people. (Part one knows JSON only.)
# Touches: nothing else.
# Entered: the function that it adds to LOG_FORMATS.

LOG_LINE = (
    "%(time)s %(client)s %(method)s %(path)s %(model)s %(status)s upstream=%(upstream_status)s "
    "first=%(first_byte)ss total=%(total)ss bytes=%(bytes)s "
    "tokens=%(prompt_tokens)s+%(completion_tokens)s id=%(request_id)s %(outcome)s")

VISIBLE_ASCII = re.compile("[!-~]+")

def text_line(values):
    words = {name: printable(value) for name, value in values.items()}
    return LOG_LINE % words

LOG_FORMATS["text"] = text_line

def printable(value):
    """A value as one word: it cannot end the line, start a field or move a terminal's cursor."""
    if value is None or value == "":
        return "-"
    text = str(value)
    if VISIBLE_ASCII.fullmatch(text):
        return text
    return json.dumps(value).replace(" ", "\\u0020")

# ---- Raw output ----------------------------------------------------------------------------------
# Does: writes to stdout and stderr past Python's own buffers, which lose text where the stream is
# non-blocking, and where it is closed fail once more at the exit.
# Touches: nothing else.
# Entered: `write_bytes` in write_all.

def write_bytes(stream, text):
    """Write all of it. False where that cannot be: Windows' console has its own coding."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return False
    if os.name != "posix":
        return False
    data = text.encode(stream.encoding, "backslashreplace")
    while data:
        select.select([], [number], [])
        # Whole lines, where that can be: other processes may write there, too.
        end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        with contextlib.suppress(BlockingIOError):      # somebody else was faster
            data = data[os.write(number, data[:end]):]
    return True

# ---- Queued log ----------------------------------------------------------------------------------
# Does: has a thread for each of stdout and stderr write the log, so that a reader that stalls holds
# up no client.
# Touches: nothing but the log; lines that nobody reads in time are dropped and counted.
# Entered: `QueuedLog` in Server takes the place of `Log`.

LOG_SECONDS = 0.05      # between two writes of the log: many lines are one write
MAX_LOG_LINES = 10000   # that wait to be written


class QueuedLog(Log):

    def __init__(self, format, secrets):
        super().__init__(format, secrets)
        streams = (sys.stdout, sys.stderr)
        self.writers = {stream: LogWriter(stream, self.warn) for stream in streams}

    def start(self):
        for writer in self.writers.values():
            writer.start()

    def put(self, stream, line, end="\n"):
        self.writers[stream].put(line + end)

    def close(self, seconds):
        """Wait until all lines are written, or for `seconds`."""
        for writer in self.writers.values():    # stderr is the last: it tells what stdout lost
            writer.queue.put(None)
            writer.join(seconds / 2)


class LogWriter(threading.Thread):
    """Writes lines to one stream, so that a reader that stalls holds up nobody else."""

    def __init__(self, stream, warn):
        super().__init__(daemon=True, name="log")
        self.stream = stream
        self.warn = warn
        self.queue = queue.SimpleQueue()    # of lines; None is the end
        self.lost = 0                       # lines that nobody read in time

    def put(self, line):
        if self.queue.qsize() < MAX_LOG_LINES:
            self.queue.put(line)
        else:
            self.lost += 1

    def run(self):
        ended = False
        while not ended:
            batch = [self.queue.get()]
            while not self.queue.empty():
                batch.append(self.queue.get())
            ended = None in batch
            write_all(self.stream, "".join(filter(None, batch)))
            if self.lost:
                self.warn("%d lines of the log were lost: nobody read them in time" % self.lost)
                self.lost = 0
            if not ended:
                time.sleep(LOG_SECONDS)     # what comes meanwhile is one write

# ---- Model names for the log ---------------------------------------------------------------------
# Does: finds the name of the model in a request that no rule reads, for the log.
# Touches: nothing; it sees the bytes of each such body as they pass.
# Entered: `install_model_names` in install_features sets `observe_request`.

MODEL_IN_PATH = re.compile(r"/v1(?:alpha|beta)?/models/([^/]+):[a-z]+[A-Z]|/deployments/([^/]+)"
                           r"|/v1/models/(.+)")
# Of a JSON object, wherever in it, or of a form (RFC 7578).
MODEL_IN_JSON = re.compile(br'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.){1,200}")')
MODEL_IN_FORM = re.compile(
    br'name="model"\r\n(?:(?i:content-)[^\r\n]{1,99}\r\n){0,2}\r\n([^\r\n]{1,200})\r\n')
MODEL_BYTES = 1024      # more than any of these takes

def install_model_names(service):
    if service.settings.log != "off":
        service.observe_request = observe_model

def observe_model(record):
    in_path = MODEL_IN_PATH.search(record.path)
    if in_path:
        record.model = urllib.parse.unquote(in_path[in_path.lastindex][:1000])
        return None
    return ModelFinder(record).observe


class ModelFinder:
    """The first thing in a body that looks like the name of the model."""

    def __init__(self, record):
        self.record = record
        self.tail = b""         # of what has passed: the name may be cut in two

    def observe(self, data):
        if self.record.model:
            return
        window = self.tail + data
        self.tail = window[-MODEL_BYTES:]
        if b'model"' in window:
            self.look(window)

    def look(self, window):
        match = MODEL_IN_JSON.search(window)
        with contextlib.suppress(ValueError):
            if match:
                self.record.model = json.loads(match[1].decode("utf-8", "replace"))
        match = MODEL_IN_FORM.search(window)
        if match and not self.record.model:
            self.record.model = match[1].decode("utf-8", "replace")

# ---- Token counts --------------------------------------------------------------------------------
# Does: reads the token counts in a response as it passes, for the log.
# Touches: nothing; it sees the bytes of each response.
# Entered: `install_token_counts` in install_features sets `observe_response`.

USAGE_OBJECT = re.compile(br'"usage"[ \t\r\n]*:[ \t\r\n]*\{')
USAGE_BYTES = 4096      # of a response, kept from where a `usage` begins
MAX_USAGE_DEPTH = 100   # objects and arrays in it: a parser recurses, and a stack is small
CACHE_TOKENS = ("cache_creation_input_tokens", "cache_read_input_tokens")
USAGE_NAMES = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))

def install_token_counts(service):
    if service.settings.log != "off":
        service.observe_response = observe_tokens

def observe_tokens(record):
    counter = TokenCounter()
    record.count_tokens = counter.counts
    return counter.observe


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


class TokenCounter:
    """The token counts in a response, read as it passes.

    From its first and its last `usage`: Anthropic's events share the counts out between two.
    """

    def __init__(self):
        self.found = []         # the beginnings of up to two such objects
        self.tail = b""         # of what has passed: the word may be cut in two

    def observe(self, data):
        """Take note of the next bytes of the body."""
        for index, part in enumerate(self.found):
            if len(part) < USAGE_BYTES:
                self.found[index] = part + data[:USAGE_BYTES]
        window = self.tail + data
        if b'"usage"' in window:
            self.look(window)
        self.tail = window[-32:]

    def look(self, window):
        starts = [match.end() - 1 for match in USAGE_OBJECT.finditer(window)
                  if match.end() > len(self.tail)]
        for start in starts[:1] + starts[1:][-1:]:
            self.found[1:] = []
            self.found.append(window[start:start + USAGE_BYTES])

    def counts(self):
        """Prompt tokens and completion tokens, None for what is not told."""
        counts = {}
        for part in self.found:
            usage = self.parse(part)
            for name, other in USAGE_NAMES:
                count = usage.get(name, usage.get(other))
                if is_count(count):
                    counts[name] = count
            # Anthropic's input_tokens are what no cache had, or took. Prompt_tokens are all.
            if is_count(usage.get("input_tokens")) and "prompt_tokens" not in usage:
                cached = map(usage.get, CACHE_TOKENS)
                counts["prompt_tokens"] += sum(filter(is_count, cached))
        return counts.get("prompt_tokens"), counts.get("completion_tokens")

    def parse(self, part):
        """The object that `part` begins with; {} if it is none."""
        if part.count(b"[") + part.count(b"{") > MAX_USAGE_DEPTH:
            return {}
        try:
            return json.JSONDecoder().raw_decode(part.decode("utf-8", "replace"))[0]
        except ValueError:
            return {}

# ---- Early hints ---------------------------------------------------------------------------------
# Does: passes a 103 (RFC 8297) on where no key is hidden, so that a page may begin to load.
# Touches: nothing; it sends a head of its own.
# Entered: `install_early_hints` in install_features sets `on_interim`.

def install_early_hints(service):
    if not service.settings.provider_keys:
        service.on_interim = pass_early_hints

def pass_early_hints(handler, status, headers):
    is_clean = not holds_secret(headers.raw, handler.settings.field_secrets)
    if status == 103 and is_clean and not handler.request.is_http10:
        fields = downstream_headers(headers, handler.settings)
        handler.send_to_client(render_head(b"HTTP/1.1 103 Early Hints", fields))

# ---- WebSocket -----------------------------------------------------------------------------------
# Does: relays WebSocket upgrades (RFC 6455): after the 101, bytes both ways.
# Touches: the request's header fields, its query, both connections after the 101.
# Entered: `install_websocket` in install_features adds a check, and what follows a 101.
# Needs: Model rules, Token and prompt limits.

HALF_SECONDS = 60       # of silence in a tunnel, once one side has ended its half: then it closes
UNTOLD_SECONDS = 2      # where the other side cannot be told that it has
KEY_PROTOCOL = b"openai-insecure-api-key."      # how a browser's WebSocket carries a key

def install_websocket(service):
    service.prepare_request = prepare_websocket
    service.checks.insert(0, check_websocket)
    service.switch_protocols = relay_websocket
    settings = service.settings
    is_limited = settings.max_tokens or settings.max_chars
    if is_limited and settings.paths and "GET" in allowed_methods("/v1/realtime", settings.paths):
        service.warnings.append("AIPROXY_MAX_TOKENS and AIPROXY_MAX_CHARS do not hold in a "
                                "WebSocket at /v1/realtime")

def prepare_websocket(handler):
    """Let the fields of an upgrade go up, and none that carries a client key."""
    request = handler.request
    settings = handler.settings
    is_plain = request.method != "GET" or request.is_http10 or not handler.upload.done
    if is_plain or wanted_upgrade(request.headers) != b"websocket":
        return
    if settings.is_restricted:
        take_key_protocol(request)
        for name, _ in request.headers.fields:
            low = name.lower()
            if low.startswith(b"sec-websocket-") and low not in request.headers.connection_options:
                value = b", ".join(request.headers.get_all(low))
                request.own_fields[low] = (name, value)
    request.own_fields[b"connection"] = (b"Connection", b"Upgrade")
    request.own_fields[b"upgrade"] = (b"Upgrade", b"websocket")

def wanted_upgrade(headers):
    """The one protocol that a peer wants to change to, in lower case; b"" for none."""
    protocols = headers.elements(b"upgrade")
    is_wanted = b"upgrade" in headers.connection_options and len(protocols) == 1
    return protocols[0].lower() if is_wanted else b""

def take_key_protocol(request):
    """Turn the key in Sec-WebSocket-Protocol into the header field that it stands for.

    Browsers cannot set one here. Our own key must not go up, but a caller's own key may.
    """
    fields = []
    for name, value in request.headers.fields:
        if name.lower().replace(b"_", b"-") == b"sec-websocket-protocol":
            protocols = [one.strip() for one in value.split(b",")]
            fields += [(b"x-api-key", one[len(KEY_PROTOCOL):]) for one in protocols
                       if one.startswith(KEY_PROTOCOL)]
            value = b", ".join(one for one in protocols if not one.startswith(KEY_PROTOCOL))
            if not value:
                continue
        fields.append((name, value))
    request.headers = Headers(fields)

def check_websocket(handler):
    """The model stands in the query, at one path for all of the connection. Else 400 or 403."""
    request = handler.request
    settings = handler.settings
    if b"upgrade" not in request.own_fields:
        return
    reads_frames = settings.models or settings.max_tokens or settings.max_chars
    if reads_frames and request.path != "/v1/realtime":
        raise ErrorResponse(403, "websocket_not_allowed", "AIPROXY_MODELS, AIPROXY_MAX_TOKENS "
                            "and AIPROXY_MAX_CHARS cannot hold in a WebSocket here.")
    models = models_in_query(request)
    request.model = ",".join(models)
    handler.record.model = request.model
    if not settings.models:
        return
    if len(models) != 1:
        code = "invalid_model" if models else "missing_model"
        raise ErrorResponse(400, code, "The query must hold `model` once.", param="model")
    replace_in_query(request, settings)

def relay_websocket(handler, exchange):
    """The relay loop moves bytes both ways."""
    settings = handler.settings
    tunnel = Tunnel(handler.client, exchange.connection, settings.timeout)
    try:
        if wanted_upgrade(exchange.headers) != b"websocket":    # RFC 9110 section 7.8
            raise response_error(ProtocolError("it switched protocols unasked"))
        headers = downstream_headers(exchange.headers, settings)
        headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        handler.start_response(101, exchange.reason, headers)
        handler.server.relay_loop.run_and_wait(tunnel)
    finally:
        exchange.close()
    handler.record.outcome = tunnel.outcome
    handler.is_whole = tunnel.outcome == "ok"
    handler.record.bytes = tunnel.bytes


class Tunnel(Job):
    """Bytes both ways, whatever they are, until both sides have ended or both are silent.

    OPEN           both directions move
    HALF_CLOSED    one side has ended its sending; the other may go on, but not silently
    """

    OPEN = "open"
    HALF_CLOSED = "half closed"

    def __init__(self, client, upstream, timeout):
        super().__init__(client, upstream)
        self.up = Direction(client, upstream)
        self.down = Direction(upstream, client)
        self.silence = timeout              # seconds
        self.last_move = 0.0                # when a side last had bytes, or took some

    def start(self):
        self.state = self.OPEN
        self.on_ready()

    def on_ready(self, mask=READ):
        """One of the sides is ready. Both directions move: nothing is lost by trying."""
        if self.state == self.ENDED:        # by an event of the same batch
            return
        self.last_move = self.loop.now
        try:
            self.up.move()
            self.down.move()
        except OSError:                     # a reset: nobody is left to pass bytes to
            self.finish("ok")
            return
        self.bytes = self.down.bytes
        if self.up.is_over and self.down.is_over:
            self.finish("ok")
            return
        ended = self.up if self.up.is_over else self.down
        if ended.is_over and self.state == self.OPEN:
            self.state = self.HALF_CLOSED
            self.silence = UNTOLD_SECONDS if ended.sink.is_tls else HALF_SECONDS
        self.watch(self.up, self.down)
        self.watch(self.down, self.up)

    def watch(self, leaving, coming):
        """Watch the side from which one direction comes and to which the other goes."""
        mask = 0
        if not leaving.unsent and not leaving.is_over:
            mask |= READ
        if coming.unsent:
            mask |= WRITE
        self.loop.watch(leaving.source, mask, self.on_ready)

    def on_tick(self):
        if self.loop.now - self.last_move > self.silence:
            self.finish("ok" if self.state == self.HALF_CLOSED else "idle")
        # A side that is not read, because the other is behind, may have been reset all the same.
        elif any(side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                 for side in self.connections):
            self.finish("ok")


class Direction:
    """One way through a tunnel, from the side `source` to the side `sink`."""

    def __init__(self, source, sink):
        self.source = source
        self.sink = sink
        self.unsent = source.buffer         # what has been read, and the sink still has to take
        self.bytes = 0                      # that the sink has taken
        self.is_over = False                # the source has ended, and the sink has all of it
        source.buffer = b""

    def move(self):
        """Pass on what is here; where the source has ended, pass that on as well. OSError."""
        if self.is_over:
            return
        # A piece is read when the sink has taken all before it: back-pressure.
        with contextlib.suppress(ClosedEarly):      # many end TLS without saying so
            self.unsent = self.unsent or self.source.receive() or b""
        if self.unsent:
            sent = self.sink.send_some(self.unsent)
            self.unsent = self.unsent[sent:]
            self.bytes += sent
        self.is_over = self.source.ended and not self.unsent
        # SSLSocket can only end both: a TLS side learns of it when the tunnel closes.
        if self.is_over and not self.sink.is_tls:
            with contextlib.suppress(OSError):
                self.sink.sock.shutdown(socket.SHUT_WR)

# ---- More providers ------------------------------------------------------------------------------
# Does: knows more providers by name, and those of the table by the hosts of base URLs, too.
# Touches: which field carries the key to a base URL on such a host, and which paths are served.
# Entered: the rows that it adds to PROVIDERS; `find_provider` in Upstream.
#
# Each with the page of the provider's own documentation that names its base URL and its key's
# field, as read in November 2026. What a provider does not serve, it answers with 404 itself.

PROVIDERS.update({
    "siliconflow": Provider("https://api.siliconflow.cn/v1"),
    "openrouter": Provider("https://openrouter.ai/api/v1"),
    "dashscope": Provider("https://dashscope.aliyuncs.com/compatible-mode/v1"),
    "moonshot": Provider("https://api.moonshot.cn/v1"),
    "zhipu": Provider("https://open.bigmodel.cn/api/paas/v4"),
    "groq": Provider("https://api.groq.com/openai/v1"),
    "mistral": Provider("https://api.mistral.ai/v1"),
    # https://www.volcengine.com/docs/82379/1298459
    "volcengine": Provider("https://ark.cn-beijing.volces.com/api/v3"),
    # https://cloud.tencent.com/document/product/1729/111007
    "hunyuan": Provider("https://api.hunyuan.cloud.tencent.com/v1"),
    # https://cloud.baidu.com/doc/qianfan/s/Hmh4suq26
    "qianfan": Provider("https://qianfan.baidubce.com/v2"),
    # https://platform.minimaxi.com/docs/api-reference/text-openai-api
    "minimax": Provider("https://api.minimaxi.com/v1"),
    # https://platform.stepfun.com/docs/zh/guides/developer/openai
    "stepfun": Provider("https://api.stepfun.com/v1"),
    # https://modelscope.cn/docs/model-service/API-Inference/intro
    "modelscope": Provider("https://api-inference.modelscope.cn/v1"),
    # https://docs.x.ai/developers/rest-api-reference/inference
    "xai": Provider("https://api.x.ai/v1"),
    # https://docs.together.ai/docs/inference/openai-compatibility
    "together": Provider("https://api.together.ai/v1"),
    # https://docs.fireworks.ai/tools-sdks/openai-compatibility
    "fireworks": Provider("https://api.fireworks.ai/inference/v1"),
    # https://build.nvidia.com/ (the examples of each model)
    "nvidia": Provider("https://integrate.api.nvidia.com/v1"),
    # https://docs.github.com/en/rest/models/inference (its model list is at /catalog/models)
    "github": Provider("https://models.github.ai/inference"),
    # https://huggingface.co/docs/inference-providers/en/providers/cerebras
    "huggingface": Provider("https://router.huggingface.co/v1"),
    # https://inference-docs.cerebras.ai/resources/openai
    "cerebras": Provider("https://api.cerebras.ai/v1"),
    # https://docs.sambanova.ai/docs/en/get-started/api-keys-urls
    "sambanova": Provider("https://api.sambanova.ai/v1"),
    # https://docs.cohere.com/docs/compatibility-api
    "cohere": Provider("https://api.cohere.ai/compatibility/v1"),
    # https://docs.deepinfra.com/chat/overview
    "deepinfra": Provider("https://api.deepinfra.com/v1/openai"),
    # https://novita.ai/docs/api-reference/model-apis-llm-create-chat-completion
    "novita": Provider("https://api.novita.ai/openai/v1"),
    # https://docs.perplexity.ai/docs/grounded-llm/openai-compatibility
    "perplexity": Provider("https://api.perplexity.ai/v1", paths=("/v1/responses",)),
})

# https://name.openai.azure.com/openai/v1 and the like: the name is the customer's.
# https://learn.microsoft.com/azure/ai-services/openai/reference (the key's field) and
# https://learn.microsoft.com/azure/foundry/openai/api-version-lifecycle (the base URL)
AZURE_HOST = re.compile(
    r"[a-z0-9.-]+\.(?:openai|cognitiveservices|services\.ai)\.azure\.(?:com|us|cn)")
PROVIDER_HOSTS = [(AZURE_HOST, Provider("", "api-key"))]
GOOGLE_HOST = "generativelanguage.googleapis.com"

def find_provider(upstream):
    """For a base URL on a known host a Provider with that row's key header and paths, or None."""
    for row in PROVIDERS.values():
        parts = urllib.parse.urlsplit(row.base_url)
        port = parts.port or DEFAULT_PORTS[upstream.scheme]
        if (parts.hostname, port) == (upstream.server_name, upstream.port):
            return describe_provider(upstream, row)
    for host, row in PROVIDER_HOSTS:
        if host.fullmatch(upstream.server_name):
            return describe_provider(upstream, row)
    return None

def describe_provider(upstream, row):
    """What a row says of a base URL on its host, which may lead to another of its APIs."""
    key_header, paths = row.key_header, row.paths
    if upstream.base.endswith("/anthropic/v1"):         # DeepSeek, Moonshot, Zhipu, DashScope
        paths = ANTHROPIC_PATHS
    if upstream.server_name == GOOGLE_HOST and not upstream.base.endswith("/openai"):
        key_header = "x-goog-api-key"                   # Gemini's own API
    return Provider(upstream.shown, key_header, paths)

# ---- Keys that Google does not know --------------------------------------------------------------
# Does: takes Google's 400 for a wrong key of ours for the 401 that others say.
# Touches: the status of an exchange, before anybody else sees it.
# Entered: `install_google_refusals` in install_features.
# Needs: More providers.

KEY_INVALID = re.compile(br'"reason"\s*:\s*"API_KEY_INVALID"')     # quoted, it would have escapes

def install_google_refusals(service):
    settings = service.settings
    if settings.provider_keys and settings.upstream.server_name == GOOGLE_HOST:
        service.opener.add_handler(GoogleRefusals())


class GoogleRefusals(urllib.request.BaseHandler):
    """Called by the opener with each exchange."""

    def https_response(self, request, exchange):
        if exchange.status != 400:
            return exchange
        try:
            exchange.prefetch(PREFETCH_BYTES, PREFETCH_SECONDS)
        except ClientGone:
            exchange.close()
            raise
        if KEY_INVALID.search(exchange.prefetched):
            exchange.status = 401
            exchange.reason = b"Unauthorized"
        return exchange

    http_response = https_response

# ---- Banner --------------------------------------------------------------------------------------
# Does: tells the operator what is in force, with keys masked, and a command to try.
# Touches: nothing.
# Entered: `print_banner` in serve().
# Needs: Health.

SHORT_KEY = 16      # characters: wrong guesses are not counted

def print_banner(server):
    settings = server.settings
    client_names = [name for name, _ in settings.client_keys]
    shown = collections.defaultdict(lambda: "none", settings.shown)
    origins = shown["AIPROXY_ORIGINS"]
    lines = []
    host = server.server_address[0]
    if host in ("0.0.0.0", "::"):           # the URL above names only one
        lines.append("listening on %s, every address of this machine: others can reach it" % host)
    lines += [
        "upstream     " + describe_upstream(server),
        "client keys  " + (", ".join(client_names) or "none"),
        "models       " + ", ".join(parse_list(settings.shown.get("AIPROXY_MODELS", "all"))),
        "paths        " + shown["AIPROXY_PATHS"],
        "origins      " + {"*": "any", "none": "none: browsers are refused"}.get(origins, origins),
        "limits       rate %s, tokens %s, characters %s, %d bytes a body" % (
            shown["AIPROXY_RATE"], shown["AIPROXY_MAX_TOKENS"], shown["AIPROXY_MAX_CHARS"],
            settings.max_body),
        "             %d clients, %s from an address, %gs to connect, %gs of silence" % (
            server.capacity, shown["AIPROXY_MAX_PER_CLIENT"], settings.connect_timeout,
            settings.timeout),
    ]
    if server.processes > 1:
        lines.append("workers      %d, each with these limits: %d clients%s in all" % (
            server.processes, server.processes * server.capacity, all_rates(server)))
    lines += ["warning: " + warning for warning in warnings(server)]
    lines.append("try          " + curl_command(server))
    text = "\n".join("  " + line for line in lines)
    server.log.put(sys.stderr, text)

def describe_upstream(server):
    settings = server.settings
    if settings.provider_keys:
        mode = "key hidden (%s)" % settings.shown[settings.upstream.provider.key_variable]
    elif settings.upstream.wants_key:
        mode = "transparent: callers bring their own key"
    else:
        mode = "no key needed"
    text = "%s, %s" % (settings.upstream.shown, mode)
    proxy = server.service.proxy
    if proxy:
        text += ", through the proxy %s" % proxy
    return text

def all_rates(server):
    """The rate of all processes together, each of which counts for itself."""
    rate = server.settings.shown.get("AIPROXY_RATE", "")
    number, _, unit = rate.partition("/")
    if not unit:
        return ""
    return " and %d/%s" % (server.processes * int(number), unit)

def warnings(server):
    settings = server.settings
    yield from getattr(settings, "notes", ())       # see "Command line"
    yield from server.service.warnings
    if server.capacity < settings.max_connections:
        yield ("the limit of open files leaves room for %d clients, not %d (ulimit -n)"
               % (server.capacity, settings.max_connections))
    if settings.provider_keys and settings.open and not settings.client_keys:
        yield "AIPROXY_OPEN is set: anyone who can reach this address spends your key"
    short = [name for name, key in settings.client_keys
             if len(key) < SHORT_KEY]
    if short:
        yield ("client keys shorter than %d characters can be guessed: %s"
               % (SHORT_KEY, ", ".join(short)))
    yield from warn_of_others_names(settings)
    if "CLOUDFLARE_API_TOKEN" in settings.environ and not settings.upstream.provider.handler:
        yield "CLOUDFLARE_API_TOKEN is not used: AIPROXY_UPSTREAM is not workers-ai"
    is_on_platform = any(name in settings.environ for name in OTHER_VARIABLES["AIPROXY_PORT"])
    if is_loopback(settings.host) and is_on_platform:
        yield "on this platform AIPROXY_HOST=0.0.0.0 is needed to be reached"

def warn_of_others_names(settings):
    """Variables of similar programs, where ours is not set."""
    names = (
        ("VALID_API_KEYS", "AIPROXY_CLIENT_KEYS", settings.client_keys),
        ("API_KEY", settings.upstream.provider.key_variable, settings.provider_keys),
        ("MODELS", "AIPROXY_MODELS", settings.shown.get("AIPROXY_MODELS") != "all"),
    )
    for name, ours, is_set in names:
        if settings.environ.get(name) and not is_set:
            yield "%s is not read; the name here is %s" % (name, ours)

def curl_command(server):
    """A command to paste that asks this server for something."""
    settings = server.settings
    path = example_path(settings)
    default = settings.environ.get("AIPROXY_DEFAULT_MODEL") or "MODEL"
    aliases = [name for name in settings.aliases if "*" not in name]
    model = (settings.models_shown or aliases or [default])[0]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]}
    fields = ["Content-Type: application/json"]
    key_field = "Authorization: Bearer YOUR_KEY"
    if path in ANTHROPIC_PATHS:
        body["max_tokens"] = 256
        fields.append("anthropic-version: 2023-06-01")
        key_field = "x-api-key: YOUR_KEY"
    if callers_need_key(settings):
        fields.append(key_field)
    options = " ".join("-H '%s'" % field for field in fields)
    # No certificate is for the address that we name here.
    curl = "curl -kN" if settings.scheme == "https" else "curl -N"
    return "%s %s%s %s \\\n  -d '%s'" % (
        curl, server.url(), path, options, json.dumps(body))

# ---- A live check --------------------------------------------------------------------------------
# Does: `--check --live` asks the upstream for its model list with each provider key, and says
# of each by its place whether it was accepted.
# Touches: nothing. It asks as the relay does: through the same proxy, with the same TLS and limits.
# Entered: `check_live` in check().
# Needs: Command line.

MORE_ARGUMENTS["--live"] = {
    "action": "store_true",
    "help": "with --check: try each provider key at the upstream; exit status 2 if it refuses one, "
            "1 if one cannot be tried"}
ACCEPTED = "accepted"
NO_LIST = "there is no model list, so it could not be tried"
VERDICTS = {    # by the upstream's status: in words, and our exit status
    401: ("refused", 2),
    403: ("refused", 2),
    404: (NO_LIST, 0),
    405: (NO_LIST, 0),
}

def check_live(options, settings):
    """Print what becomes of each key. Returns the exit status, which the option's help explains."""
    if not options.live:
        return 0
    try:
        not_listening = socket.socket()
        not_listening.bind(("127.0.0.1", 0))
        server = Server(settings, not_listening)
    except (OSError, RuntimeError) as error:
        write_all(sys.stderr, "aiproxy: %s\n" % error)
        return 1
    if settings.provider_keys:
        status = try_keys(server)
    else:
        words, status = try_key(server, 0)
        write_all(sys.stdout, "no key is configured; without one: %s\n" % words)
        if status == 2:             # callers bring their own
            status = 0
    server.log.close(SHUTDOWN_SECONDS)
    return status

def try_keys(server):
    """Print what becomes of each key. Returns the worst exit status."""
    count = len(server.settings.provider_keys)
    results = []
    for index in range(count):
        words, status = try_key(server, index)
        write_all(sys.stdout, "key %d of %d: %s\n" % (index + 1, count, words))
        results.append((words, status))
    if any(words.startswith(ACCEPTED) for words, _ in results):
        words, _ = try_key(server, count)
        if words.startswith(ACCEPTED):
            write_all(sys.stdout, "The upstream gives its model list to anybody: that proves no "
                                  "key.\n")
    return max(status for _, status in results)

def try_key(server, index):
    """What the upstream makes of a key, in words that are none of its own, and our exit status."""
    try:
        status, refusal = ask_for_models(server, index)
    except ErrorResponse as error:
        return "could not be tried. %s" % error.message, 1
    words, exit_status = VERDICTS.get(status, ("could not be tried", 1))
    if status == 404 and server.settings.upstream.provider.handler:     # the path names an account
        words, exit_status = "refused: there is no such account", 2
    if 200 <= status < 300:
        words, exit_status = ACCEPTED, 0
    if refusal:
        return "refused (%d). %s" % (status, refusal), 2
    return "%s (%d)" % (words, status), exit_status

def ask_for_models(server, index):
    """The status of the upstream's model list, and why it refuses the key, if we know.

    ErrorResponse if it does not answer. `index` is a key's; that of none stands for no key.
    """
    settings = server.settings
    upstream = settings.upstream
    fields = [(b"Accept", b"application/json"),
              (b"User-Agent", b"aiproxy/%b" % __version__.encode())]
    if "/v1/messages" in upstream.provider.paths:
        fields.append((b"anthropic-version", b"2023-06-01"))
    request = Request((b"GET", b"/v1/models", None, b"1", b"1"), Headers(fields))
    fields = server.service.edit_upstream_headers(upstream_headers(request, settings), settings)

    target = upstream.map_path("/v1/models")
    accounts = getattr(settings, "account_paths", None)     # see "Workers AI"
    if accounts:
        target = accounts[index % len(accounts)] + "/ai/models/search?per_page=1"
    url = upstream.url + target
    no_body = Upload(None, ContentLengthBody(None, 0))
    request = UpstreamRequest(url, "GET", fields + settings.key_fields[index:index + 1], b"",
                              no_body)
    request.wait = wait_alone
    exchange = server.service.opener.open(request, timeout=settings.timeout)
    refusal = ""
    if accounts and exchange.status >= 400:
        refusal = upstream.provider.handler.refusal(exchange)
    exchange.close()
    return exchange.status, refusal

def wait_alone(connection, mask, seconds):
    """What `wait_for_upstream` does, without a client to watch."""
    if not wait_ready(connection, mask, seconds):
        raise TimedOut()

# ---- Several processes ---------------------------------------------------------------------------
# Does: AIPROXY_WORKERS processes share the listener, each on a CPU of its own. The parent serves
# nobody: it starts workers again that have died, and passes signals on.
# Touches: the process, which forks before any thread is started; accepting, to share it evenly.
# Entered: `start_workers` in serve().

WORKER_PAUSE = 0.1      # seconds until a worker that has died is started again: twice as many for
MAX_WORKER_PAUSE = 30   # each time that it dies soon, up to so many
SETTLED_SECONDS = 60    # soon: before it has run for so long
WATCH_SECONDS = 0.1     # between two looks of the parent
LATE_SECONDS = 1        # for a worker to end after what it may take: then it is stuck
HAND_OVER_SECONDS = 0.002       # for a worker that has fewer clients to take a new one: for each
MAX_HAND_OVER = 0.1             # that it has fewer, and at most
NO_CLIENTS_WANTED = 0xFFFFFFFF  # the count of a worker that does not run

def start_workers(settings, on_start):
    """What makes the server, in each worker. SystemExit in the parent, once all have ended."""
    if settings.workers == 1:
        return Server
    return Crew(settings, on_start).run()


class Worker(Server):
    """A Server that leaves new clients to those workers that have fewer.

    It begins with the crew's settings, which may be newer than those of the start.
    """

    def __init__(self, crew, index, announces, first_settings):
        self.processes = crew.count
        self.announces = announces
        self.client_numbers = crew.client_numbers
        self.index = index
        super().__init__(crew.settings, crew.listener)
        self.client_numbers[index] = 0
        # The parent ends us, however often somebody tells us to: a service manager tells both.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.end)
        threading.Thread(target=self.watch_parent, args=(crew.lifeline,), daemon=True).start()

    def end(self, number=None, frame=None):
        self.closing = True

    def watch_parent(self, lifeline):
        """End when the parent has closed its side of the pipe, or has died."""
        os.read(lifeline, 1)
        self.end()

    def handle_timeout(self):
        """Called each tenth of a second in which nobody comes: the others see who has left."""
        self.client_numbers[self.index] = len(self.clients)

    def get_request(self):
        self.client_numbers[self.index] = len(self.clients)
        lead = len(self.clients) - min(self.client_numbers)
        if lead > 0 and not self.closing:
            time.sleep(min(lead * HAND_OVER_SECONDS, MAX_HAND_OVER))
        return super().get_request()        # BlockingIOError, an OSError: another has taken it


class Crew:
    """The parent's side: which workers run, and when the others are to be started again."""

    def __init__(self, settings, on_start):
        self.settings = settings            # in force: what the next worker begins with
        self.must_read = False              # are they to be read again?
        self.readers = [each for each in on_start if hasattr(each, "read")]
        for reader in self.readers:
            reader.begin(settings)
        self.count = settings.workers
        self.listener = open_listener(settings)
        # How many clients each worker has, in memory that all of them share.
        shared = mmap.mmap(-1, 4 * self.count)
        self.client_numbers = memoryview(shared).cast("I")
        # A pipe that ends with the parent: nobody else has the writing side.
        self.lifeline, self.lifeline_writer = os.pipe()
        self.cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.running = {}                   # by process id: its index, and since when
        self.due = {index: 0 for index in range(self.count)}    # when to start which
        self.pauses = [WORKER_PAUSE] * self.count
        self.starts = 0
        self.closing = False
        self.deadline = math.inf            # for all workers to have ended
        self.has_terminal = os.isatty(0)
        self.former_handlers = {}           # of signals: a worker has them again

    def run(self):
        """Returns in each worker, with what makes its server. The parent exits in here."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # ignored, it would hide who has ended
        self.handle(signal.SIGINT, self.on_stop)
        self.handle(signal.SIGTERM, self.on_stop)
        self.handle(signal.SIGHUP, self.on_reload)
        while self.running or not self.closing:
            if self.must_read:
                self.reload()
            for index, when in list(self.due.items()):
                if when <= time.monotonic() and self.fork(index):
                    return functools.partial(Worker, self, index, self.starts == 1)
            self.reap()
            if time.monotonic() > self.deadline:
                self.pass_on(signal.SIGKILL)
            time.sleep(WATCH_SECONDS)
        sys.exit(0)

    def handle(self, number, handler):
        self.former_handlers[number] = signal.signal(number, handler)

    def on_stop(self, number, frame):
        """The first one ends the workers in peace, the second at once."""
        if self.closing:
            self.pass_on(signal.SIGKILL)
            os._exit(0)
        self.closing = True
        longest = self.settings.grace + SHUTDOWN_SECONDS
        self.deadline = time.monotonic() + longest + LATE_SECONDS
        self.listener.close()
        os.close(self.lifeline_writer)

    def on_reload(self, number, frame):
        is_window_closed = self.has_terminal and not os.isatty(0)
        if not is_window_closed:
            self.must_read = True
        elif not self.closing:
            self.on_stop(number, frame)

    def pass_on(self, number):
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def reload(self):
        """Read the settings, then let the workers do so.

        Were they first, the file might be wrong by our turn, and a later worker would begin with
        the old settings and take a revoked key.
        """
        self.must_read = False
        for reader in self.readers:
            # Whatever is wrong, each worker says it, and goes on with what it has. So do we.
            with contextlib.suppress(Exception):
                self.settings = reader.read(self.settings)[0]
        self.pass_on(signal.SIGHUP)

    def fork(self, index):
        """Start a worker. True in the worker."""
        # Else a signal that comes now might be lost, or be passed on by the wrong process.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.former_handlers)
        try:
            is_in_time = not self.closing and not self.must_read
            return is_in_time and self.fork_undisturbed(index)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.former_handlers)

    def fork_undisturbed(self, index):
        del self.due[index]
        for reader in self.readers:         # a certificate may be newer than the settings
            with contextlib.suppress(Exception):
                self.settings = reader.read_watched(self.settings)[0]
        try:
            process = os.fork()
        except OSError as error:
            self.plan(index, MAX_WORKER_PAUSE, error.strerror)
            return False
        self.starts += 1                    # here and in the worker: the first one announces us
        if process:
            self.running[process] = (index, time.monotonic())
            return False
        os.close(self.lifeline_writer)
        for number, handler in self.former_handlers.items():
            signal.signal(number, handler)
        if self.cpus:
            with contextlib.suppress(OSError):
                cpu = self.cpus[index % len(self.cpus)]
                os.sched_setaffinity(0, {cpu})
        return True

    def reap(self):
        """See who has ended, and say when it is to be started again."""
        while self.running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            if process not in self.running:     # as process 1 we get those of others
                continue
            index, started = self.running.pop(process)
            self.client_numbers[index] = NO_CLIENTS_WANTED
            if self.closing:
                continue
            pause = self.pauses[index]
            if time.monotonic() - started > SETTLED_SECONDS:
                pause = WORKER_PAUSE
            self.pauses[index] = min(2 * pause, MAX_WORKER_PAUSE)
            self.plan(index, pause, describe_end(status))

    def plan(self, index, pause, reason):
        self.due[index] = time.monotonic() + pause
        # If nobody reads stderr the line is lost: this thread must not wait.
        with contextlib.suppress(OSError, ValueError):      # it is closed
            if select.select([], [sys.stderr], [], 0)[1]:
                write_all(sys.stderr, "aiproxy: worker %d has ended (%s); another one starts in "
                          "%gs\n" % (index + 1, reason, pause))


def describe_end(status):
    if os.WIFSIGNALED(status):
        return "signal %d" % os.WTERMSIG(status)
    return "exit status %d" % os.WEXITSTATUS(status)

def parse_workers(text):
    """A number of processes; auto: one for each CPU that we may use."""
    if text == "auto":
        return count_cpus() if hasattr(os, "fork") else 1
    return number_parser(int, 1, 1000, "a number of processes, or auto")(text)

def count_cpus():
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    # A container may have less: microseconds in each period (cgroup v2). ValueError: "max".
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = map(int, file.read().split())
        cpus = max(1, min(cpus, quota // period))
    return cpus

def check_workers(settings):
    if settings.workers > 1 and not hasattr(os, "fork"):
        raise SettingError("AIPROXY_WORKERS: this system cannot fork; it takes 1")

OPTIONS += (
    Option("AIPROXY_WORKERS", AIPROXY_WORKERS, parse_workers,
           "processes that share the port, each on a CPU of its own, and each with its own rates "
           "and limits; auto: one for each CPU"),
)
MORE_SETTINGS.append(check_workers)

# ---- Tuning of the process -----------------------------------------------------------------------
# Does: keeps the process on one CPU, and tells glibc's malloc what to keep.
# Touches: the process as the system sees it.
# Entered: `tune_process` in serve().

LOOK_SECONDS = 0.03     # for how long we look at who is busy: three of the system's ticks

def tune_process():
    stay_on_one_cpu()
    tune_malloc()

def stay_on_one_cpu():
    """CPython runs one thread at a time; on several CPUs the threads fight over whose turn it is.

    Measured on two CPUs with 16 busy clients: 235 microseconds of CPU a request, 105 on one.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if hasattr(os, "sched_setaffinity") and has_lock:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {find_idle_cpu(list(os.sched_getaffinity(0)))})

def find_idle_cpu(cpus):
    """The one of these that is least busy at this moment."""
    random.shuffle(cpus)                # of equals any: others may be starting, too
    with contextlib.suppress(OSError, KeyError, ValueError):
        before = read_idle_times()
        time.sleep(LOOK_SECONDS)
        after = read_idle_times()
        return max(cpus, key=lambda cpu: after[cpu] - before[cpu])
    return cpus[0]

def read_idle_times():
    """By CPU: for how many hundredths of a second it had nothing to do (proc(5))."""
    with open("/proc/stat") as file:
        lines = [line.split() for line in file if re.match("cpu[0-9]", line)]
    return {int(words[0][3:]): int(words[4]) for words in lines}

MALLOPT = (     # malloc.h
    (-8, 1),            # M_ARENA_MAX: one heap for all threads
    (-3, 4 << 20),      # M_MMAP_THRESHOLD: bodies come from the heap
    (-1, 16 << 20),     # M_TRIM_THRESHOLD: 16 MB of it are kept for the next one
)

def tune_malloc():
    """Where the C library is glibc: give back what starting took, then keep what bodies need.

    Measured with bodies of 1 MB: 2.0 milliseconds of CPU a request where the memory is given back
    and cleared anew each time, 0.8 so.
    """
    # Other systems; MemoryError where systemd denies ctypes executable memory.
    with contextlib.suppress(ImportError, AttributeError, OSError, TypeError, MemoryError):
        import ctypes
        libc = ctypes.CDLL(None)
        for option, value in MALLOPT:
            libc.mallopt(option, value)
        libc.malloc_trim(0)

# ---- Open files ----------------------------------------------------------------------------------
# Does: raises the limit of open files, and serves as many clients as it leaves room for.
# Touches: the process's limit.
# Entered: `raise_file_limit` in Server.

WINDOWS_SOCKETS = 512       # that CPython's select takes there

def raise_file_limit(wanted):
    """Raise the limit of open files as far as it goes. Returns how many of `wanted` clients fit.

    Each client needs two: its own connection and its upstream's.
    """
    try:
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if hard == resource.RLIM_INFINITY:
            return wanted
    except ImportError:
        hard = WINDOWS_SOCKETS
    except (ValueError, OSError):
        return wanted
    return max(1, min(wanted, (hard - SPARE_FILES) // 2))

# ---- Responses made of chat ----------------------------------------------------------------------
# Does: makes chat requests of those of OpenAI's Responses API, and its responses of chat's deltas.
# Touches: nothing; values in, values out.
# Entered: `install_responses`, by an API that has no Responses of its own.

# Of the request: what a chat says otherwise or has no use for, and what would have to be stored.
RESPONSES_ONLY = frozenset((
    "input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "n",
    "include", "truncation", "store", "background", "prompt_cache_key", "client_metadata"))
STORED = ("previous_response_id", "conversation", "prompt")
# Of the response: for each kind of item what is in it at first, what its events are called, and the
# part that has its text; what chat's finish_reasons are called.
RESPONSE_ITEMS = {
    "reasoning": ({"summary": [], "content": []}, "response.reasoning_text",
                  {"type": "reasoning_text", "text": ""}),
    "message": ({"role": "assistant", "content": []}, "response.output_text",
                {"type": "output_text", "text": "", "annotations": [], "logprobs": []}),
    "function_call": ({"arguments": ""}, "response.function_call_arguments", None),
}
DELTA_ITEMS = {"reasoning_content": "reasoning", "refusal": "message", "content": "message"}
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}

def install_responses(paths, chat_makers, event_makers):
    paths["/v1/responses"] = "responses"
    chat_makers["responses"] = chat_of_response
    event_makers["responses"] = ResponseEvents

def chat_of_response(given):
    """The members of a chat request that asks for the same. ErrorResponse 400."""
    stored = [name for name in STORED if given.get(name)]
    if stored:
        raise invalid_parameter(stored[0], "refers to what is stored, and nothing is stored here: "
                                           "send the whole conversation in `input`")
    try:
        return read_response_request(given)
    except (TypeError, AttributeError, LookupError):
        raise invalid_parameter("input", "or another member is not as OpenAI has it")

def read_response_request(given):
    messages = []
    if given.get("instructions"):
        messages.append({"role": "system", "content": given["instructions"]})
    items = given["input"]
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    for item in items:
        add_item(messages, item)

    chat = {name: value for name, value in given.items() if name not in RESPONSES_ONLY}
    chat.update(read_choices(given), messages=messages)
    if given.get("max_output_tokens"):
        chat["max_tokens"] = given["max_output_tokens"]
    if given.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return chat

def read_choices(given):
    """What a request says of tools, the form of the answer, and thinking."""
    chat = {}
    # Tools of OpenAI's own, such as web_search, are not here: the model does without.
    tools = [tool for tool in given.get("tools") or () if tool["type"] == "function"]
    if tools:
        chat["tools"] = [nest(tool, "function") for tool in tools]
        chat["tool_choice"] = nest(chat_choice(given.get("tool_choice") or "auto"), "function")
    text_format = (given.get("text") or {}).get("format") or {"type": "text"}
    if text_format["type"] != "text":
        chat["response_format"] = nest(text_format, "json_schema")
    effort = (given.get("reasoning") or {}).get("effort")
    if effort:
        chat["reasoning_effort"] = effort
    return chat

def chat_choice(choice):
    """A choice of tools. Of `allowed_tools` only the mode is left, of OpenAI's own nothing."""
    is_other = isinstance(choice, dict) and choice.get("type") != "function"
    return choice.get("mode", "auto") if is_other else choice

def nest(value, name):
    """What has members beside its type, as a chat has it: inside a member of this name."""
    if isinstance(value, str) or name in value:     # a tool_choice such as `auto`; a chat's own
        return value
    inner = {key: item for key, item in value.items() if key != "type" and item is not None}
    return {"type": value["type"], name: inner} if inner else value

def add_item(messages, item):
    """Add an item to the messages of a chat."""
    kind = item.get("type", "message")
    if kind == "message":
        add_message(messages, item["role"], chat_content(item["content"]))
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"],
                         "content": chat_content(item["output"])})
    # No model wants its old thoughts; the AI SDK refers to them by our ids.
    elif kind != "reasoning" and not item.get("id", "").startswith("reasoning_"):
        raise unknown_type(kind)

def add_message(messages, role, content):
    """What a model says behind its calls stands with them: their outputs must come next."""
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("tool_calls") and not last["content"]:
        last["content"] = content
    else:
        messages.append({"role": role, "content": content})

def chat_content(content):
    """The content of an item as a message has it."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"].endswith("text"):       # input_text, output_text
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "input_image":
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            raise unknown_type(part["type"])
    return parts

def unknown_type(kind):
    return invalid_parameter("input", "has a %.40s. Nothing is stored here (set `store` to false); "
                             "known are texts, images, functions and outputs" % kind)


class ResponseEvents:
    """The events of a Responses object: each item is added and filled, and all are done at last."""

    def __init__(self, call, send):
        self.send = send        # called with each event and its name
        self.id = call.id
        self.count = 0          # of the events
        self.open = {}          # items and the pieces of their text, by kind or the call's number
        self.places = {}        # where each is
        self.response = {
            "id": "resp_" + call.id, "object": "response", "created_at": call.created,
            "status": "in_progress", "model": call.model, "output": [], "usage": None,
            "error": None, "incomplete_details": None, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": True}

    def event(self, name, key=None, **members):
        members.update(self.places.get(key, ()), type=name, sequence_number=self.count)
        self.count += 1
        self.send(members, name)

    def begin(self, index):
        self.event("response.created", response=self.response)
        self.event("response.in_progress", response=self.response)

    def add(self, index, delta, finish=None, logprobs=None):
        """Send what is new in a choice: a delta of a chat, and its finish_reason with the last."""
        for name, kind in DELTA_ITEMS.items():
            if name in delta:
                self.write(kind, kind, delta[name])
        for call in delta.get("tool_calls", ()):
            self.write(call["index"], "function_call", call["function"]["arguments"],
                       call_id=call.get("id"), name=call["function"].get("name"))
        if finish in INCOMPLETE:
            self.response["incomplete_details"] = {"reason": INCOMPLETE[finish]}

    def write(self, key, kind, text, **members):
        """Add text to an item, which may be a new one."""
        empty, events, part = RESPONSE_ITEMS[kind]
        if key not in self.open:
            for other in RESPONSE_ITEMS.keys() & self.open:     # only calls come in turns
                self.close(other, "completed")
            number = len(self.response["output"])
            ident = "%s_%s_%d" % (kind, self.id, number)
            item = dict(empty, id=ident, type=kind, status="in_progress", **members)
            self.response["output"].append(item)
            self.open[key] = item, []
            self.places[key] = {"output_index": number, "content_index": 0, "item_id": ident}
            self.event("response.output_item.added", key, item=item)
            if part:
                self.event("response.content_part.added", key, part=part)
        if text:
            self.open[key][1].append(text)
            self.event(events + ".delta", key, delta=text)

    def close(self, key, status):
        item, pieces = self.open.pop(key)
        _, events, part = RESPONSE_ITEMS[item["type"]]
        item["status"] = status
        text = "".join(pieces)
        if part:
            item["content"] = [dict(part, text=text)]
            self.event(events + ".done", key, text=text)
            self.event("response.content_part.done", key, part=item["content"][0])
        else:
            item["arguments"] = text
            self.event(events + ".done", key, arguments=text)
        self.event("response.output_item.done", key, item=item)

    def conclude(self, usage):
        """Send what closes the response; `usage` is chat's."""
        status = "incomplete" if self.response["incomplete_details"] else "completed"
        while self.open:
            self.close(next(iter(self.open)), status if len(self.open) == 1 else "completed")
        if usage:
            counts = {"input_tokens_details": {"cached_tokens": 0},
                      "output_tokens_details": {"reasoning_tokens": 0}}
            for name, count in usage.items():
                name = name.replace("prompt_", "input_").replace("completion_", "output_")
                counts[name] = dict(counts[name], **count) if name in counts else count
            self.response["usage"] = counts
        self.response["status"] = status
        self.event("response." + status, response=self.response)

# ---- Workers AI ----------------------------------------------------------------------------------
# Does: Cloudflare Workers AI in OpenAI's format: requests, responses, streams, errors, models.
# Touches: values in, values out, until its handler at the end.
# Entered: its row in PROVIDERS, which the section adds at its end.
# Needs: Placeholders, Body rules, Model rules, Model list, Event streams.
# Follow translate_request, then translate_response or StreamTranslator, or translate_error.
# [O] official, [T] told by others: how far a fact can be trusted.

WORKERS_ALIASES = {     # to add a short name, add a row; AIPROXY_MODELS replaces them all
    "deepseek-r1": "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b",
    "gpt-oss-120b": "@cf/openai/gpt-oss-120b",
    "gpt-oss-20b": "@cf/openai/gpt-oss-20b",
    "llama-4-scout": "@cf/meta/llama-4-scout-17b-16e-instruct",
    "qwen2.5-coder": "@cf/qwen/qwen2.5-coder-32b-instruct",
    "gemma-3": "@cf/google/gemma-4-26b-a4b-it",     # gemma-3-12b-it was retired on 2026-05-30
    "gemma-4": "@cf/google/gemma-4-26b-a4b-it",
    "glm-4.7-flash": "@cf/zai-org/glm-4.7-flash",
    "kimi-k2.6": "@cf/moonshotai/kimi-k2.6",
}
WORKERS_MAX_TOKENS = 4096       # where a request sets none: Cloudflare's 256 end in mid-sentence
WINDOW_SHARE = 4                # but at most the fourth part of the model's window
MAX_CHOICES = 128               # in one response, as OpenAI allows: each becomes several events
MAX_MESSAGE_READ = 1 << 16      # characters of an error's message that are looked at,
MAX_MESSAGE_SHOWN = 2000        # and of those, the characters that are shown
BROKEN_OFF = "The upstream broke off in the middle of this response."
# What the client calls: the kind of its response. All text goes up as a chat: /ai/v1/completions
# is documented nowhere, /ai/v1/responses serves gpt-oss alone, and whole (cloudflare-docs#32116).
WORKERS_PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "text",
                 "/v1/embeddings": "embeddings"}
# These mean `off` elsewhere (SillyTavern#1823), and are left out. No schema forbids others [O].
MEANINGLESS = (("top_k", 0), ("top_k", -1), ("response_format", {"type": "text"}))
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
SMALL = re.compile(r"-[27]b\b|lora|llama-2|phi-2|tinyllama|qwen1\.5")   # windows of 2,000 to 8,000
BARE_SCHEMA = re.compile(r"/meta/|deepseek-r1|deepseek-coder|hermes-2")     # json-mode.mdx [O]
DATA_IMAGES = re.compile(r"llama-4|llama-3\.2|mistral-small|gemma-3")   # no URLs: their schemas [O]
THINKS_IN_TEXT = re.compile(r"deepseek-r1|qwq")     # <think>, often without it, </think> [T]

CLOUDFLARE_ERRORS = {       # our code: our status, Cloudflare's codes, and statuses without one
    "model_not_found": (404, 5007, 3042, 410),
    "context_length_exceeded": (400, 5021),
    "invalid_request": (400, 3003, 3039, 5004, 5005, 5006, 5019, 8001, 8007),
    "request_too_large": (413, 3006, 413),
    "permission_denied": (403, 3023, 3041, 5016, 5018, 5035, 403),
    "rate_limit_exceeded": (429, 3021, 3040, 429),
    "insufficient_quota": (429, 3036, 4006),        # 3036 in the docs, 4006 on the wire
    "upstream_timeout": (504, 3007, 3008, 408),
    "upstream_error": (502, 7009, 8005),            # Cloudflare's own, whatever it calls them
    "upstream_credentials_rejected": (502, 6003, 7403, 9106, 9109, 10000, 401),     # ours
    "upstream_misconfigured": (502, 7000, 7001, 7003),      # no such route or account
    "not_found": (404, 404),
}
# Errors that no client could fix: what it reads in place of Cloudflare's words.
OPERATOR_ERRORS = {
    "upstream_credentials_rejected": "Cloudflare rejected the API token for this account. "
    "CLOUDFLARE_API_TOKEN must be valid, allow Workers AI Read and Edit, and belong to "
    "CLOUDFLARE_ACCOUNT_ID.",
    "upstream_misconfigured": "Cloudflare knows no such account or route. "
    "CLOUDFLARE_ACCOUNT_ID or CLOUDFLARE_API_BASE_URL is wrong.",
}
# Cloudflare's: OpenAI's; any other is `stop`, or `tool_calls` after a call.
FINISH_REASONS = {"length": "length", "model_length": "length", "content_filter": "content_filter"}
# A name that stays in its place in any URL.
MODEL_NAME = re.compile(r"(?!.*\.\.)(?=.{1,200}\Z)"
                        r"@?[A-Za-z0-9][\w.:+-]*(?:/[A-Za-z0-9][\w.:+-]*)*", re.A)
TOO_LONG = re.compile("maximum context length|context window", re.I)    # in vLLM's words, say
# What no client needs of an error's message.
NOISE = re.compile(r"^(?:\s*(?:AiError|InferenceUpstreamError)\s*:)+"
                   r"|\(?\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b\)?", re.I)
ABOUT_BODY = re.compile(br"content-|etag$|last-modified$", re.I)
PART_OF_TAG = re.compile(r"(?:</?(?:t|th|thi|thin|think)?)?\Z")
MAY_BE_CALL = re.compile(br"\s{0,99}(?:\{|\Z)")
MAX_CALL_TEXT = 1 << 16         # bytes of text that are held back because they may be a call

Call = collections.namedtuple("Call", (    # one request
    "kind", "stream", "include_usage", "base64",    # what the client wants: see WORKERS_PATHS
    "model", "id", "created",       # what the response shows: the client's name, an id, seconds
    "secrets",                      # what no error may show: the account ids, the tokens
    "thinks",                       # does its model think in its text?
    "forced",                       # the function that it must call, as its tool has it, or None
), defaults=(False, None))

# -- requests

def translate_request(path, body, values, model, shown, secrets=(), changes=None, window=None):
    """The Call for the body of a client's request, and Cloudflare's body. ErrorResponse 400.

    `values` is the body, parsed, `model` the real name, `shown` the client's, `changes` what
    settings want. What a model takes is Cloudflare's to say: only what we act on is checked.
    """
    kind = WORKERS_PATHS[path]
    if not MODEL_NAME.fullmatch(model):
        raise ErrorResponse(400, "invalid_model", "`model` is not the name of a model.", "model")
    given = {name: value for name, value in values.items() if value is not None}
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise invalid_parameter("stream", "must be true or false")
    if changes and set(changes) != {"model"}:
        body = edit_members(body, changes)
        values = json.loads(body.decode())
    chat = dict(values, model=model)
    if kind != "embeddings":
        # Cursor posts the body of a Responses request as a chat (Helicone#5629).
        is_misplaced = kind == "chat" and "input" in given and "messages" not in given
        make_chat = CHAT_MAKERS.get("responses" if is_misplaced else kind, dict)
        chat = fit_chat(make_chat(chat), model)
        if not LIMITS & set(given):
            add_limit(chat, window)
    call = Call(
        kind=kind, model=shown, id=os.urandom(12).hex(), created=int(time.time()),
        stream=stream and kind != "embeddings",
        include_usage=as_dict(given.get("stream_options")).get("include_usage") is True,
        base64=given.get("encoding_format") == "base64", secrets=secrets,
        thinks=bool(THINKS_IN_TEXT.search(model)),
        forced=None if kind == "text" else forced_function(chat))
    return call, edit_body(body, values, chat)

def forced_function(chat):
    """The function that a chat request leaves the model to call; None if it has a choice."""
    functions = [as_dict(tool.get("function")) for tool in dicts(chat.get("tools"))]
    choice = chat.get("tool_choice")
    if choice != "required":
        name = as_dict(as_dict(choice).get("function")).get("name", "")
        functions = [function for function in functions if function.get("name") == name]
    return functions[0] if len(functions) == 1 else None

def edit_body(body, values, wanted):
    """The body of an object with other values; if it can be edited, no other byte differs."""
    changes = {name: value for name, value in wanted.items()
               if name not in values or value != values[name]}
    if set(values) <= set(wanted):
        return edit_members(body, changes)
    return json.dumps(wanted).encode()

def add_limit(chat, window):
    """Add max_tokens, which counts against the model's window; Cloudflare's own fits small ones."""
    most = chat.get("max_tokens") or WORKERS_MAX_TOKENS     # the first is AIPROXY_MAX_TOKENS
    if window or not SMALL.search(chat["model"]):
        chat["max_tokens"] = min(most, window // WINDOW_SHARE) if window else most

def chat_of_prompt(given):
    """The members of a chat request that asks for what a completion does. Else 400."""
    prompt = given.pop("prompt", None)
    texts = prompt if isinstance(prompt, list) else [prompt]
    if len(texts) != 1 or not isinstance(texts[0], str) or "messages" in given:
        raise invalid_parameter("prompt", "must be one text, and without `messages` beside it")
    return dict(given, messages=[{"role": "user", "content": texts[0]}])

def fit_chat(chat, model):
    """A chat request as Cloudflare's strictest schemas take it. Else 400."""
    messages = chat.get("messages")
    if isinstance(messages, list):
        chat["messages"] = [fit_message(message, model) for message in messages]
    schema = as_dict(as_dict(chat.get("response_format")).get("json_schema")).get("schema")
    if schema is not None and BARE_SCHEMA.search(model):
        chat["response_format"] = dict(chat["response_format"], json_schema=schema)
    if chat.get("max_completion_tokens"):       # LangChain's only one; older schemas lack it
        chat.setdefault("max_tokens", chat["max_completion_tokens"])
    return {name: value for name, value in chat.items() if (name, value) not in MEANINGLESS}

def fit_message(message, model):
    """Text becomes a string, and nothing an empty one; other parts stay."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    for part in dicts(content):
        url = as_text(as_dict(part.get("image_url")).get("url") or part.get("image_url"))
        # To fetch it for the client would let anybody send us anywhere (SSRF).
        if url.lower().startswith("http") and DATA_IMAGES.search(model):
            raise invalid_parameter("messages", "has an image by its URL, and this model takes "
                                    "only data: send it as data:image/...;base64,...")
    if isinstance(content, list) and all(as_dict(part).get("type") == "text" for part in content):
        content = "\n".join(as_text(part.get("text")) for part in content)     # as vLLM does
    fitted = dict(message, content="" if content is None else content)
    if message.get("role") == "developer":      # Qwen's template passes over it
        fitted["role"] = "system"
    return {name: value for name, value in fitted.items() if value is not None}

# -- responses: every shape into one form, and that into OpenAI's objects

# What Python raises for JSON of a shape that nobody expects: no member needs a guard of its own.
WRONG_SHAPE = (TypeError, AttributeError, LookupError, ValueError, OverflowError, struct.error)

def unreadable(message="Cloudflare's answer could not be read."):
    return ErrorResponse(502, "upstream_bad_response", message)

def read_json(data, secrets):
    """Cloudflare's response or event, out of its envelope. ErrorResponse if it is none."""
    try:
        value = parse_object(data)
    except ErrorResponse:
        raise unreadable()
    if isinstance(value.get("result"), dict) and value.get("success") is not False:
        value = value["result"]
    has_error = value.get("error") or value.get("errors") or value.get("success") is False
    if has_error or "error" in (value.get("type"), value.get("object")):
        raise translate_error(200, value, secrets)
    return value

def read_response(body, secrets):
    """The choices and the usage of a response or an event (cloudflare/workerd, ai.d.ts).

    legacy     {"response": text, number, object or null, "tool_calls": [{"name", "arguments"}]}
    OpenAI     {"choices": [{"message" or "delta" or "text"}]}, in an envelope from /ai/run
    both       in one event, with the same text (cloudflare/ai#615): choices go first
    """
    data = read_json(body, secrets)
    choices = dicts(data.get("choices"))
    if not choices and {"response", "tool_calls", "finish_reason"} & set(data):
        choices = [{}]
    if len(choices) > MAX_CHOICES:
        raise unreadable()
    choices = [read_choice(choice, index, data) for index, choice in enumerate(choices)]
    return choices, openai_usage(data.get("usage"))

def read_choice(choice, position, beside):
    """One of OpenAI's choices. What it lacks may be in the members `beside` them."""
    message = choice.get("delta") or choice.get("message") or {}
    finish = choice.get("finish_reason") or beside.get("finish_reason")
    if finish == "error":
        raise unreadable("The model broke off with an error.")
    content = message.get("content") or choice.get("text") or beside.get("response")
    members = {     # empty ones are left out later
        # gemma-4 uses the short name
        "reasoning_content": as_text(message.get("reasoning_content") or message.get("reasoning")),
        "refusal": as_text(message.get("refusal")), "content": as_text(content),
        "tool_calls": dicts(message.get("tool_calls") or beside.get("tool_calls")),
    }
    return {"index": choice.get("index", position), "message": members,
            "logprobs": choice.get("logprobs"), "finish_reason": finish}

def as_text(value):
    """JSON mode puts an object into `response`, llama-4 a number: both are text to the client."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)

def as_dict(value):
    return value if isinstance(value, dict) else {}

def dicts(value):
    """The objects in a list; none if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

def openai_usage(usage):
    """OpenAI's counts out of either naming, or None."""
    counts = {name.replace("input_", "prompt_").replace("output_", "completion_"): value
              for name, value in as_dict(usage).items() if value is not None}
    # Zeros mean that Cloudflare did not count, and a guess would be worse than none.
    total = counts.get("prompt_tokens", 0) + counts.get("completion_tokens", 0)
    return dict({"total_tokens": total}, **counts) if total else None


class Choice:
    """One choice of a response as it comes: Cloudflare's deltas in, OpenAI's out."""

    def __init__(self, call):
        self.id = call.id
        self.is_thinking = call.thinks
        self.held = ""          # of a thought, what may be the beginning of a tag
        self.thoughts = []      # which may be none
        self.may_be_text = True     # as long as there were no tags
        self.forced = call.forced   # as long as its call may come as text,
        self.unsure = bytearray()   # which is held back
        self.numbers = {}       # of tool calls, by Cloudflare's id and `index`, the last by None
        self.bare = set()       # those without arguments so far
        self.finish_reason = None

    def feed(self, message, reason=None):
        """What is new: a delta that may be empty, and the finish_reason if this is the last."""
        is_last = bool(reason) and not self.finish_reason
        delta = dict(message)
        if message.get("reasoning_content"):
            self.is_thinking = False        # Cloudflare has split it
        if self.is_thinking:
            self.split_thoughts(delta, is_last, reason)
        if self.forced:
            self.find_forced_call(delta, is_last)
        delta["tool_calls"] = list(self.number_calls(delta.get("tool_calls", ()), is_last))
        if is_last:         # agents look for tool_calls; some models end with `stop` after one
            delta["tool_calls"] += [{"index": number, "function": {"arguments": "{}"}}
                                    for number in sorted(self.bare)]
            default = "tool_calls" if self.numbers else "stop"
            self.finish_reason = FINISH_REASONS.get(reason, default)
        delta = {name: value for name, value in delta.items() if value}
        return delta, self.finish_reason if is_last else None

    def split_thoughts(self, delta, is_last, reason):
        """Make reasoning of what stands in front of </think>, wherever the text was cut."""
        thought, tag, text = (self.held + delta.get("content", "")).partition("</think>")
        self.held = "" if tag or is_last else PART_OF_TAG.search(thought).group()
        thought = thought[:len(thought) - len(self.held)]
        self.thoughts.append(thought)
        self.is_thinking = not tag
        if tag or "<think>" in thought:
            self.may_be_text = False
        if is_last and self.may_be_text and reason != "length":
            delta["content"] = "".join(self.thoughts)
        else:
            delta.update(reasoning_content=thought.replace("<think>", ""), content=text)

    def find_forced_call(self, delta, is_last):
        """Hold text back until it cannot be a forced call any more, or surely is one."""
        self.unsure += delta.pop("content", "").encode("utf-8", "surrogatepass")
        is_text = delta.get("tool_calls") or not MAY_BE_CALL.match(self.unsure)
        if not (is_text or is_last or len(self.unsure) > MAX_CALL_TEXT):
            return
        arguments = leaked_arguments(self.unsure, self.forced) if is_last and not is_text else None
        if arguments is None:
            delta["content"] = self.unsure.decode("utf-8", "surrogatepass")
        else:
            delta["tool_calls"] = [{"name": self.forced["name"], "arguments": arguments}]
        self.forced = None

    def number_calls(self, calls, is_last):
        """OpenAI's deltas of tool calls: id and name once, after that only arguments."""
        empty = "{}" if is_last else ""     # nobody can parse no arguments at all
        for call in calls:
            function = call.get("function") or call     # llama-3.3's are flat
            ident = call.get("id")
            name = function.get("name")
            arguments = as_text(function.get("arguments"))
            # Two ids are two calls, even at one index. What has neither id nor name goes on with
            # one, or is the null sentinel after it (workers-ai-provider, streaming.ts).
            key = ident or call.get("index")
            if (ident or name) and (key is None or key not in self.numbers):
                number = self.numbers.get(None, -1) + 1
                self.numbers.update({ident: number, call.get("index"): number, None: number})
                # Kimi gives the same ids in every turn (cloudflare/ai#526); Mistral's template
                # looks at the last nine characters, which must be letters and digits.
                function = {"name": name, "arguments": decode_twice(arguments) or empty}
                if not function["arguments"]:
                    self.bare.add(number)
                yield {"index": number, "id": "call_%s%02d" % (self.id, number),
                       "type": "function", "function": function}
            elif arguments:
                number = self.numbers.get(key, 0)
                self.bare.discard(number)
                yield {"index": number, "function": {"arguments": arguments}}

def leaked_arguments(text, function):
    """The arguments in text that is nothing but a call of this function; None if in doubt."""
    try:
        members = parse_object(text)
    except ErrorResponse:
        return None
    if members.pop("name", "") != function.get("name"):
        return None
    # gpt-oss has them beside the name (cloudflare/ai#574 [O]), others in a member of their own.
    properties = set(as_dict(as_dict(function.get("parameters")).get("properties")))
    others = set(members) - properties
    if len(members) == 1 and others & {"arguments", "parameters"}:
        members = members.popitem()[1]
    elif others or properties & {"name", "arguments", "parameters"}:
        return None
    return members if isinstance(members, dict) else None

def decode_twice(text):
    """The JSON object in a JSON string: granite and deepseek-r1 encode arguments twice [T]."""
    if text.startswith('"'):
        with contextlib.suppress(ValueError, ErrorResponse):
            parse_object(json.loads(text).encode())
            return json.loads(text)
    return text

def translate_response(call, body):
    """A whole response in OpenAI's form. Raises ErrorResponse or WRONG_SHAPE if it is none."""
    if call.kind == "embeddings":
        return embeddings_object(read_json(body, call.secrets), call)
    if call.kind not in ("chat", "text"):
        translator = StreamTranslator(call)
        translator.whole(body)
        return translator.form.response
    choices, usage = read_response(body, call.secrets)
    if not choices:
        raise unreadable()
    for choice in choices:
        reason = choice["finish_reason"] or "stop"
        delta, choice["finish_reason"] = Choice(call).feed(choice["message"], reason)
        message = dict({"role": "assistant", "content": "", "refusal": None}, **delta)
        for tool_call in message.get("tool_calls", ()):
            del tool_call["index"]      # only deltas number them
            message["content"] = message["content"] or None
        choice["message"] = message
    return completion_object(call, choices, usage)

def completion_object(call, choices, usage, chunk=""):
    """A chat.completion, with ".chunk" a chat.completion.chunk, or a text_completion for both."""
    completion = {"id": "chatcmpl-" + call.id, "object": "chat.completion" + chunk,
                  "created": call.created, "model": call.model, "choices": choices}
    if call.kind == "text":
        completion.update(id="cmpl-" + call.id, object="text_completion")
        for choice in choices:
            message = choice.pop("delta" if chunk else "message")
            choice.update(text=message.get("content") or "", logprobs=None)     # unlike chat's
    if usage or chunk and call.include_usage:
        completion["usage"] = usage
    return completion

def embeddings_object(data, call):
    """OpenAI's list of embeddings, from that or from the legacy {"shape", "data": [[...]]}."""
    listed = []
    for index, row in enumerate(data["data"]):
        vector = row.get("embedding") if isinstance(row, dict) else row
        # Node's SDK requests base64, and decodes a list of floats to zeros.
        if call.base64 and not isinstance(vector, str):
            vector = base64.b64encode(struct.pack("<%df" % len(vector), *vector)).decode()
        listed.append({"object": "embedding", "index": index, "embedding": vector})
    if not listed:
        raise unreadable()
    embeddings = {"object": "list", "data": listed, "model": call.model}
    usage = openai_usage(data.get("usage"))
    if usage:
        embeddings["usage"] = usage
        usage.pop("completion_tokens", None)
    return embeddings

# -- streams

class StreamTranslator:
    """Cloudflare's events in, OpenAI's out, each as soon as it is there."""

    def __init__(self, call, render_error=render_error_event):
        self.call = call
        self.render_error = render_error    # the event for an ErrorResponse
        self.events = EventReader()
        self.choices = {}       # the Choices that began, by index
        self.out = []           # events for the client, in bytes
        self.form = EVENT_MAKERS.get(call.kind, ChatEvents)(call, self.send)
        self.usage = {}         # OpenAI's counts, if there were any
        self.failed = None      # the code of the error that ended the stream
        self.done = False       # the client has all that it will get

    def feed(self, piece):
        """The bytes for the client that `piece` leads to. Any error in it is the last event."""
        try:
            for data in self.events.feed(piece):
                if data == "[DONE]" and not self.done:
                    self.finish()
                elif not self.done:
                    self.translate(data.encode())
        except (ErrorResponse,) + WRONG_SHAPE as error:
            self.fail(error if isinstance(error, ErrorResponse) else unreadable())
        return self.take_out()

    def end(self, reason=None):
        """The last bytes, at the end of the upstream's body; `reason` is what broke it, if any."""
        # A last event may lack its blank line.
        out = b"" if reason or self.is_complete() else self.feed(b"\n\n")
        if not self.done and self.is_complete():
            self.finish()
        if not self.done:
            self.fail(reason or unreadable(BROKEN_OFF))
        return out + self.take_out()

    def whole(self, body):
        """A whole JSON response as a stream: gpt-oss may respond so. Raises ErrorResponse."""
        self.translate(body)
        self.finish()
        return self.take_out()

    def take_out(self):
        out, self.out = self.out, []
        return b"".join(out)

    def translate(self, data):
        """Send the events of choices: the beginning first, then what is new or the finish."""
        choices, usage = read_response(data, self.call.secrets)
        self.usage = usage or self.usage        # of two finish chunks the second has zeros
        for choice in choices:
            index = choice["index"]
            if index not in self.choices:
                self.choices[index] = Choice(self.call)
                self.form.begin(index)
            new = self.choices[index].feed(choice["message"], choice["finish_reason"])
            self.form.add(index, *new, logprobs=choice["logprobs"])

    def finish(self):
        """What closes a stream that the upstream ended well: legacy ones give no finish_reason."""
        if not self.choices:
            raise unreadable()
        self.done = True
        for index, choice in self.choices.items():
            self.form.add(index, *choice.feed({}, "stop"))
        self.form.conclude(self.usage)
        if self.call.kind in ("chat", "text"):
            self.out.append(b"data: [DONE]\n\n")

    def fail(self, error_response):
        """The last event, which the SDKs raise: never a finish_reason after it, never [DONE]."""
        self.done = True
        self.failed = error_response.code
        self.out.append(self.render_error(error_response))

    def is_complete(self):
        """Has every choice that began its finish_reason?"""
        return bool(self.choices) and all(one.finish_reason for one in self.choices.values())

    def count_tokens(self):
        return self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")

    def send(self, event, name=""):
        self.out.append(render_event(event, name))


class ChatEvents:
    """The events of OpenAI's chat, or of a completion, which has room for content alone."""

    def __init__(self, call, send):
        self.call = call
        self.send = send        # called with each event

    def begin(self, index):
        self.add(index, {"role": "assistant", "content": "", "refusal": None})

    def add(self, index, delta, finish=None, logprobs=None):
        if delta.get("content") or delta and self.call.kind == "chat":
            self.chunk(index, delta, None, logprobs)
        if finish:
            self.chunk(index, {}, finish)

    def chunk(self, index, delta, finish=None, logprobs=None):
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        self.send(completion_object(self.call, [choice], None, ".chunk"))

    def conclude(self, usage):
        if self.call.include_usage and usage:
            self.send(completion_object(self.call, [], usage, ".chunk"))

# By kind: what makes a chat request of another one, and the events of a stream.
CHAT_MAKERS = {"text": chat_of_prompt}
EVENT_MAKERS = {"chat": ChatEvents, "text": ChatEvents}
install_responses(WORKERS_PATHS, CHAT_MAKERS, EVENT_MAKERS)     # part two: Responses made of chat

# -- errors

def translate_error(status, body, secrets=(), retry_after=None):
    """The ErrorResponse for Cloudflare's error, parsed or not: by its code, else its status."""
    error = extract_error(body)
    word = redact_message(as_text(error.get("code")), secrets)
    number = int(word) if re.fullmatch("[0-9]{3,5}", word) else 0
    if status < 400 <= number < 600:    # vLLM's {"object": "error", "code": 400} inside a 200
        status = number
    our_status, code = classify_error(number, status, word)
    message = (OPERATOR_ERRORS.get(code) or clean_message(error.get("message"), secrets)
               or "Cloudflare answered with status %d and no reason that could be read." % status)
    if code == "invalid_request" and TOO_LONG.search(message):
        code = "context_length_exceeded"
    if code == "model_not_found":
        message = "%s. See GET /v1/models." % message.rstrip(".")
    if code == "insufficient_quota":
        message = "%s. The quota is back at 00:00 UTC." % message.rstrip(".")
    headers = [(b"Retry-After", retry_after)] if retry_after else []
    if code == "insufficient_quota" or code in OPERATOR_ERRORS:
        headers.append(NO_RETRY)
    param = "model" if code == "model_not_found" else None
    return ErrorResponse(our_status, code, message, param, headers)

def error_code(exchange):
    """Our code for an error, whose body is still to be read."""
    exchange.prefetch(PREFETCH_BYTES, PREFETCH_SECONDS)
    return translate_error(exchange.status, exchange.prefetched).code

def classify_error(number, status, word):
    """Our status and code for Cloudflare's number, status and word."""
    for key in (number, status):
        for code, numbers in CLOUDFLARE_ERRORS.items():
            if key in numbers[1:]:
                return numbers[0], code
    code = {4: "invalid_request", 5: "upstream_error"}.get(status // 100, "upstream_bad_response")
    is_name = re.fullmatch("[a-z_]{1,64}", word)
    return status if status >= 400 else 502, word if is_name else code

def extract_error(error):
    """The object in an error, parsed or not, that has the code and the message; {} if none has."""
    if isinstance(error, bytes):
        try:
            error = parse_object(error)
        except ErrorResponse:
            return {}
    listed = dicts(error.get("errors"))
    detail = listed[0] if listed else error.get("error") or error
    return {"message": detail} if isinstance(detail, str) else as_dict(detail)

def clean_message(message, secrets):
    """Cloudflare's words without `AiError:`, JSON around them, uuids and secrets."""
    # Cut it, for a hostile one is long; redact it before, for half a secret is not recognized.
    message = redact_message(as_text(message), secrets)[:MAX_MESSAGE_READ]
    inner = message
    while inner:            # AiError: AiError: {"object": "error", "message": ...}
        message = NOISE.sub("", as_text(inner)).strip()
        inner = extract_error(message.encode("utf-8", "replace")).get("message")
    return redact_message(message, secrets)[:MAX_MESSAGE_SHOWN]

def redact_message(text, secrets):
    for secret in sorted(secrets, key=len, reverse=True):
        text = re.sub(re.escape(secret), "***", text, flags=re.I)
    return text

# -- the model list

def translate_catalogue(items, today, names, only_names):
    """OpenAI's models out of the items of all pages: `names` first, aliases ahead, then others."""
    models = {item.get("name"): model_object(item, today) for item in items}    # pages may overlap
    shown = dict(sorted(names.items(), key=lambda pair: pair[0] == pair[1]))
    for model in names.values() if only_names else ():
        models.setdefault(model, plain_model(model))    # Cloudflare may serve what it does not list
    shown.update(() if only_names else zip(models, models))
    return [dict(models[model], id=name) for name, model in shown.items()
            if models.get(model) and "*" not in name]

def plain_model(name):
    """A model of OpenAI's list of which only the name is known."""
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "cloudflare",
            "permission": [], "root": name, "parent": None, "metadata": {"context_window": None}}

def model_object(item, today):
    """A model of OpenAI's list, by its own name; None if it is no model for text, or is retired."""
    properties = {entry.get("property_id"): entry.get("value")
                  for entry in dicts(item.get("properties"))}
    retired = properties.get("planned_deprecation_date")
    # Not by the query's task=: it yields nothing when the label changes that it must match.
    task = as_text(as_dict(item.get("task")).get("name"))
    is_text = re.sub(r"\W", "", task).lower() in ("textgeneration", "textembeddings")
    if not is_text or retired and retired[:10] <= today:
        return None
    # "2025-08-05 10:49:53.265" is UTC without its mark; it may be missing.
    moment = as_text(item.get("created_at"))[:19] + "+00:00"
    created = 0
    with contextlib.suppress(ValueError):
        created = int(datetime.datetime.fromisoformat(moment).timestamp())
    window = as_text(properties.get("context_window"))
    metadata = {"description": item.get("description"), "planned_deprecation_date": retired,
                "require_workers_paid": properties.get("require_workers_paid") == "true"}
    metadata = {name: value for name, value in metadata.items() if value}
    metadata.update(task=task, context_window=window if window.isdecimal() else None)
    return dict(plain_model(item["name"]), created=created, metadata=metadata)

# -- the way in: the settings, the handler and the row of PROVIDERS

CATALOGUE_SECONDS = 600     # a model list is good for so long,
CATALOGUE_RETRY = 30        # and one that could not be read is tried again after
CATALOGUE_TIMEOUT = 10      # seconds for all of its pages,
CATALOGUE_PAGES = 50        # which are so many at most
MAX_RESPONSE = 64 << 20     # bytes of a response that is translated as a whole
WHOLE_TYPES = (b"application/json", b"text/html")   # of responses that are not streams
NOT_ALLOWED = ("upstream_credentials_rejected", "permission_denied")    # to list models

def prepare_workers(settings):
    """The accounts, the base URL and the models. Raises SettingError."""
    accounts = settings.read("CLOUDFLARE_ACCOUNT_ID")
    keys = settings.provider_keys
    both = {"CLOUDFLARE_API_TOKEN": keys, "CLOUDFLARE_ACCOUNT_ID": accounts}
    missing = [name for name, values in both.items() if not values]
    if missing:
        raise SettingError("workers-ai needs %s: see Workers AI > Use REST API in Cloudflare's "
                           "dashboard" % " and ".join(missing))
    if len(accounts) not in (1, len(keys)):
        raise SettingError("CLOUDFLARE_ACCOUNT_ID: got %d accounts; it takes one for all tokens, "
                           "or one for each, in order" % len(accounts))
    provider = settings.upstream.provider
    settings.upstream = settings.read("CLOUDFLARE_API_BASE_URL")
    settings.upstream.provider = provider
    paths = ["%s/accounts/%s" % (settings.upstream.base, account) for account in accounts]
    settings.account_paths = paths * (len(keys) // len(accounts))       # by the key's index
    settings.hidden_words = [account.encode() for account in accounts]
    settings.workers_secrets = accounts + [key.decode() for key in keys]
    models = {name: WORKERS_ALIASES.get(model, model) for name, model in settings.models.items()}
    if models.get("short") == "short":
        del models["short"]
        models = dict(WORKERS_ALIASES, **models)
    known = dict(WORKERS_ALIASES, **models)
    default = known.get(settings.default_model, settings.default_model)
    check_workers_models("AIPROXY_MODELS", models.values())
    check_workers_models("AIPROXY_DEFAULT_MODEL", [default] if default else ())
    if models != settings.models:       # what the short names stand for is not what was typed
        listed = ["=".join(dict.fromkeys(pair)) for pair in models.items()]
        settings.shown["AIPROXY_MODELS"] = ", ".join(listed)
    settings.models = models
    settings.aliases = models or WORKERS_ALIASES
    settings.catalogue = Catalogue(settings.aliases, bool(models))

def check_workers_models(variable, models):
    """SettingError for a bare name that is no short name of ours: Cloudflare's have a slash."""
    for model in models:
        if not re.search("[/*]", model):
            got = "what may be a key" if LIKE_KEY.search(model) else repr(model)
            raise SettingError("%s: got %s; for workers-ai it takes models, which begin with "
                               "@cf/ or @hf/, and short names: %s, or in AIPROXY_MODELS `short` "
                               "for all" % (variable, got, ", ".join(WORKERS_ALIASES)))


class Catalogue:
    """Cloudflare's model list. Where it cannot be read: the last one, the names, or an error."""

    def __init__(self, names, only_names):
        self.names = names
        self.only_names = only_names
        self.last = None
        self.failure = None
        self.valid_until = 0
        self.reading = threading.Lock()     # whose holder alone asks Cloudflare

    def items(self, read, warn):
        """OpenAI's list. Only for a first one does a client wait for another that asks."""
        if self.reading.acquire(blocking=self.last is None):
            try:
                if time.monotonic() >= self.valid_until:
                    self.refresh(read, warn)
            finally:
                self.reading.release()
        if self.last is not None:
            return self.last
        if not (self.only_names or self.failure.code in NOT_ALLOWED):
            raise self.failure.with_traceback(None)
        return translate_catalogue((), "", self.names, True)

    def refresh(self, read, warn):
        today = time.strftime("%Y-%m-%d", time.gmtime())
        try:
            self.last = translate_catalogue(read(), today, self.names, self.only_names)
            self.valid_until = time.monotonic() + CATALOGUE_SECONDS
        except (ErrorResponse,) + WRONG_SHAPE as error:
            self.failure = error if isinstance(error, ErrorResponse) else unreadable()
            self.valid_until = time.monotonic() + CATALOGUE_RETRY
            warn("the model list cannot be read: " + self.failure.message)

    def window(self, model):
        """How many tokens a model can hold; 0 if the list does not say."""
        windows = {item["root"]: item["metadata"]["context_window"] for item in self.last or ()}
        return int(windows.get(model) or 0)


class WorkersHandler(Handler):
    """Handler's steps where Workers AI needs others."""

    def check_path(self):
        super().check_path()
        is_call = self.request.method == "POST" and self.request.path in WORKERS_PATHS
        if not is_call and self.request.method != "OPTIONS":
            raise ErrorResponse(404, "not_found", "Workers AI has POST %s and GET /v1/models."
                                % ", ".join(WORKERS_PATHS))

    def answer_ourselves(self):
        if not is_model_list(self.request):
            return super().answer_ourselves()
        for check in self.service.checks:       # the list may cost a call
            check(self)
        hold_body(self)         # one that comes with it is not for Cloudflare, nor for others
        send_models(self, self.settings.catalogue.items(self.read_catalogue, self.server.log.warn))
        return True

    def read_catalogue(self):
        """The items of all pages of Cloudflare's own list."""
        deadline = time.monotonic() + CATALOGUE_TIMEOUT

        def wait(connection, mask, seconds):
            seconds = min(seconds, max(deadline - time.monotonic(), 0))
            try:
                wait_for_upstream(self.client, connection, mask, seconds)
            except TimedOut:
                raise upstream_error("upstream_timeout", "The model list did not come in time.")
        items = []
        for number in range(1, CATALOGUE_PAGES + 1):
            target = "/ai/models/search?per_page=50&page=%d" % number
            with contextlib.closing(self.open_exchange("GET", target, b"", wait)) as exchange:
                body = self.read_whole(exchange)
            page = read_json(body, self.settings.workers_secrets)["result"]
            items += page
            if not page:
                break
        return items

    def read_body(self):
        return read_inspected_body(self, WorkersHandler.translate_body)

    def translate_body(self, body):
        members, changes = check_body(self, body)
        shown = self.request.model
        model = self.settings.aliases.get(shown, WORKERS_ALIASES.get(shown, shown))
        self.call, body = translate_request(
            self.request.path, body, members, model, shown, changes=changes,
            secrets=self.settings.workers_secrets, window=self.settings.catalogue.window(model))
        return body

    def ask_upstream(self, body):
        path = "/ai/v1/embeddings" if self.call.kind == "embeddings" else "/ai/v1/chat/completions"
        return self.open_exchange("POST", path, body)

    def send_up(self, key_index, method, target, *others):
        """A request with one of the keys, to its account. Its daily quota ends at midnight UTC."""
        account = self.settings.account_paths[key_index]
        exchange = super().send_up(key_index, method, account + target, *others)
        if exchange.status < 400 or len(self.settings.account_paths) == 1:
            return exchange
        code = error_code(exchange)
        if code == "insufficient_quota":
            seconds = b"%d" % (86400 - time.time() % 86400)
            exchange.headers = Headers([(b"Retry-After", seconds)] + exchange.headers.fields)
            exchange.status = 429           # on which KeyRotation tries the next account,
        if code in OPERATOR_ERRORS:
            exchange.status = 401           # as on this
        return exchange

    @staticmethod
    def refusal(exchange):
        """Why an error refuses the token or the account, in our words; "" if it does not."""
        return OPERATOR_ERRORS.get(error_code(exchange), "")

    def relay(self, exchange):
        """A response in OpenAI's format. Errors before its first byte are ErrorResponses."""
        # gpt-oss may answer a streaming request as a whole, and an edge with a page.
        is_whole = exchange.status != 200 or exchange.media_type() in WHOLE_TYPES
        relay = self.relay_events if self.call.stream and not is_whole else self.relay_whole
        with contextlib.closing(exchange):
            relay(exchange, StreamTranslator(self.call, functools.partial(error_event, self)))

    def read_whole(self, exchange):
        """The body of a response. ErrorResponse for one that says so, or cannot be had."""
        pieces = read_pieces(exchange.body, exchange.wait, MAX_RESPONSE + 1)
        try:
            body = exchange.prefetched + join_pieces(pieces)
        except (OSError, ProtocolError) as error:
            raise response_error(error)
        if exchange.status != 200:
            raise translate_error(exchange.status, body, self.settings.workers_secrets,
                                  exchange.headers.get(b"retry-after"))
        if len(body) > MAX_RESPONSE:
            raise unreadable()
        return body

    def translated_headers(self, exchange, media_type):
        """The upstream's header fields without those that speak of another body."""
        fields = downstream_headers(exchange.headers, self.settings)
        fields = [field for field in fields if not ABOUT_BODY.match(field[0])]
        return [(b"Content-Type", media_type)] + fields

    def relay_whole(self, exchange, translator):
        body = self.read_whole(exchange)
        try:
            content = (translator.whole(body) if self.call.stream
                       else json.dumps(translate_response(self.call, body)).encode())
        except WRONG_SHAPE:
            raise unreadable()
        observe = self.service.observe_response(self.record)
        if observe:
            observe(body)
        media_type = b"text/event-stream" if self.call.stream else b"application/json"
        self.send_response(200, self.translated_headers(exchange, media_type), content)

    def relay_events(self, exchange, translator):
        """A stream. The client thread moves it: it has more to do than to move bytes."""
        is_chunked = not self.request.is_http10
        headers = self.translated_headers(exchange, b"text/event-stream; charset=utf-8")
        self.start_response(200, b"OK", headers, is_chunked=is_chunked)
        self.record.count_tokens = translator.count_tokens

        def send(events):
            self.record.bytes += len(events)
            self.send_to_client(encode_chunk(events, is_chunked))
        wait = exchange.request.wait
        exchange.request.wait = self.service.add_heartbeats(wait, send)
        while not translator.done:
            try:
                piece = b"".join(read_pieces(exchange.body, exchange.wait, 1))
                events = translator.feed(piece) if piece else translator.end()
            except (OSError, ProtocolError) as error:
                code = "upstream_timeout" if isinstance(error, TimedOut) else "upstream_died"
                events = translator.end(upstream_error(code, BROKEN_OFF))
            if events:
                send(events)
                exchange.request.wait = self.service.add_heartbeats(wait, send)
        exchange.request.wait = wait
        self.record.outcome = translator.failed or "ok"
        if translator.failed:
            return
        if is_chunked:
            self.send_to_client(LAST_CHUNK)
            self.close_connection = self.must_close()
        self.is_whole = True
        with contextlib.suppress(ClientGone):
            exchange.prefetch(PREFETCH_BYTES, PREFETCH_SECONDS)     # what is left, for its reuse

def parse_accounts(text):
    takes = "the id of an account, letters and digits, or several, comma-separated"
    if any(map(PLACEHOLDER.fullmatch, parse_list(text))):
        raise ValueError(takes)
    return [match_all("[A-Za-z0-9_-]{1,64}", item, takes).group() for item in parse_list(text)]

OPTIONS += (
    Option("CLOUDFLARE_ACCOUNT_ID", CLOUDFLARE_ACCOUNT_ID, parse_accounts,
           "for workers-ai: the account, or several, as many as tokens"),
    Option("CLOUDFLARE_API_TOKEN", CLOUDFLARE_API_TOKEN, parse_keys,
           "for workers-ai: the provider key, a token with Workers AI Read and Edit"),
    Option("CLOUDFLARE_API_BASE_URL", CLOUDFLARE_API_BASE_URL, Upstream,
           "for workers-ai: where Cloudflare's API is"),
)
PROVIDERS["workers-ai"] = Provider(
    CLOUDFLARE_API_BASE_URL, key_variable="CLOUDFLARE_API_TOKEN", max_chars=131072,
    prepare=prepare_workers, handler=WorkersHandler)

# ---- Start page ----------------------------------------------------------------------------------
# Does: gives a browser a page at /, English or Chinese: a prompt to try, snippets to copy.
# Touches: nothing. It is a constant, and asks /, /health and /v1 like any client.
# Entered: `install_start_page` in install_features, for GET / with Accept: text/html.

# The words in {{ }} are replaced by those of CHINESE, and the nonce by a new one.
PAGE = r"""<!doctype html><html lang="{{en}}"><title>{{aiproxy: an AI endpoint}}</title>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<style nonce="{{NONCE}}">
  :root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --accent: #0b5fc4 }
  :root { --page: #f4f6f8; --card: #fff; --line: #d5dbe1; --bad: #b3261e }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6e9ed; --dim: #9da7b1; --accent: #75b5ff }
    :root { --page: #101317; --card: #191d23; --line: #343c46; --bad: #ff9c94 } }
  * { box-sizing: border-box; margin: 0 }
  body { font: 16px/1.5 system-ui, sans-serif; padding: clamp(16px, 4vw, 40px) }
  main { display: grid; gap: 20px; align-items: start; max-width: 1160px; margin: auto }
  main { grid-template-columns: repeat(auto-fit, minmax(min(100%, 404px), 1fr)) }
  header { grid-column: 1 / -1 }
  body, input, textarea, pre { background: var(--page); color: var(--ink) }
  form, section, button { background: var(--card); color: var(--ink) }
  form, section, button, input, textarea, pre { border: 1px solid var(--line); border-radius: 6px }
  form, section { border-radius: 10px; padding: 20px }
  h1 { font-size: 26px }  h2 { font-size: 18px }
  small, dt, #thought { color: var(--dim); font-size: 14px; font-weight: 400 }
  dl { display: grid; grid: auto / auto minmax(0, 1fr); gap: 6px 16px; align-items: baseline }
  dd { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; max-height: 112px }
  h3, label, .bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center }
  h3, label { font-size: 14px; justify-content: space-between }
  dl, h3, label, .bar, .bar ~ p { margin-top: 14px }
  input, textarea, pre { font: inherit; width: 100%; padding: 9px 11px; margin-top: 5px }
  input, textarea { border-color: gray; resize: vertical }
  pre, code { font: 12.5px/1.6 ui-monospace, Menlo, Consolas, monospace }
  dd, pre, .bar ~ p { overflow: auto; overflow-wrap: anywhere }
  button { font: 14px/1.5 system-ui, sans-serif; padding: 3px 11px }
  .bar button { font-size: 16px; padding: 7px 18px }
  #send { background: var(--accent); color: var(--card); font-weight: 600 }
  button:disabled { opacity: .4 }
  .bar ~ p { white-space: pre-wrap; max-height: 60vh }
  #error { color: var(--bad); border-left: 3px solid; padding-left: 12px }
  p:empty { margin: 0 }
</style>
<main><header>
    <h1>aiproxy <small id="version"></small></h1><p id="what"></p>
    <dl><dt>Base URL</dt><dd><code id="base"></code><button data-of="base">{{Copy}}</button></dd>
      <dt>{{Key}}</dt><dd id="rule"></dd><dt>{{Models}}</dt><dd id="models"></dd></dl>
  </header><form id="form"><h2>{{Try it}}</h2>
    <div id="keys" hidden>
      <label for="key">{{Your key}}</label><input id="key" type="password" autocomplete="off">
      <small>{{Sent to this address only, kept nowhere.}}</small></div>
    <label for="model">{{Model}}</label>
    <input id="model" autocomplete="off" autocapitalize="off" spellcheck="false">
    <label for="prompt">{{Prompt}} <small>{{Enter sends, Shift+Enter: new line}}</small></label>
    <textarea id="prompt" rows="3" enterkeyhint="send">{{Say hello in a sentence.}}</textarea>
    <div class="bar"><button id="send">{{Send}}</button>
      <button id="stop" type="button" disabled>{{Stop}}</button><small id="figures"></small></div>
    <p id="error" role="alert"></p><p id="thought"></p><p id="answer" aria-live="polite"></p>
  </form><section><h2>{{Use it}}</h2>
    <h3>curl <button data-of="curl">{{Copy}}</button></h3><pre id="curl" tabindex="0"></pre>
    <h3>Python <button data-of="python">{{Copy}}</button></h3><pre id="python" tabindex="0"></pre>
    <h3>{{JavaScript (browser)}} <button data-of="script">{{Copy}}</button></h3>
    <pre id="script" tabindex="0"></pre>
</section></main>
<script type="module" nonce="{{NONCE}}">
const OPENAI_SDK = ["OpenAI", "chat.completions.create(", 'event.choices[0].delta.content or ""']
const ANTHROPIC_SDK = ["Anthropic", "messages.create(max_tokens=1024,",
  'event.delta.text if event.type == "content_block_delta" else ""']
const page = {}     // every element that has an id; text goes in as textContent, never as HTML
for (const element of document.querySelectorAll("[id]")) page[element.id] = element
const about = await (await fetch("/", { headers: { Accept: "application/json" } })).json()
const path = about.default_path ?? "/v1/chat/completions"
const anthropic = path === "/v1/messages"
const chosenModel = () => page.model.value.trim() || page.model.placeholder
let modelsShown, controller
function requestHeaders(key) {
  const headers = { "Content-Type": "application/json" }
  if (key && anthropic) headers["x-api-key"] = key
  if (key && !anthropic) headers.Authorization = "Bearer " + key
  if (anthropic) headers["anthropic-version"] = "2023-06-01"
  return headers
}
function requestBody(model, content) {
  const max_tokens = anthropic ? 1024 : undefined     // JSON leaves out what is undefined
  return JSON.stringify({ model, stream: true, max_tokens, messages: [{ role: "user", content }] })
}
async function send(path, options) {    // an error: status, code and message, or the whole body
  const response = await fetch(path, { headers: requestHeaders(page.key.value.trim()), ...options })
  if (response.ok) return response
  const error = (await response.clone().json().catch(() => null))?.error
  const code = error?.code ?? error?.type ?? response.statusText
  throw new Error(`HTTP ${response.status} ${code}\n${error?.message ?? await response.text()}`)
}
const getJson = async path => (await send(path)).json()
async function showModels() {       // from /health, or else from the provider's own list
  page.models.textContent = "{{shown once your key is typed in}}"
  try {
    let names = (await getJson("/health")).models ?? []
    const mayAsk = !about.client_key_needed || page.key.value.trim()
    if (!names.length && mayAsk) names = (await getJson("/v1/models")).data.map(model => model.id)
    if (names.length) page.models.replaceChildren(...names.map(modelButton))
    page.model.placeholder = names[0] ?? ""     // somebody may be typing: the value is theirs
  } catch (error) { page.models.textContent = error.message }
  showSnippets()
}
function modelButton(name) {
  const choose = () => { page.model.value = name; showSnippets() }
  return Object.assign(document.createElement("button"), { textContent: name, onclick: choose })
}
async function* readEvents(response) {      // the JSON of each `data:` line as it arrives
  if (!/event-stream/.test(response.headers.get("Content-Type"))) return yield response.json()
  const reader = response.body.getReader()
  const decoder = new TextDecoder()     // a TextDecoderStream would lose what came before a cut
  for (let rest = "", piece = {}; !piece.done;) {
    piece = await reader.read()
    rest += piece.done ? "\n" : decoder.decode(piece.value, { stream: true })
    const lines = rest.split(/\r?\n/)
    rest = lines.pop()
    for (const line of lines) if (/^data: *{/.test(line)) yield JSON.parse(line.slice(5))
  }
}
async function ask() {
  const timing = { sent: performance.now(), texts: [], tokens: 0 }
  controller = new AbortController()
  for (const button of [page.send, page.stop]) button.toggleAttribute("disabled")
  for (const element of [page.error, page.thought, page.answer]) element.textContent = ""
  page.figures.textContent = "{{waiting ...}}"
  try {
    await modelsShown
    const body = requestBody(chosenModel() || undefined, page.prompt.value)
    const response = await send(path, { method: "POST", body, signal: controller.signal })
    for await (const event of readEvents(response)) showEvent(event, timing)
  } catch (error) {
    if (!timing.first) page.figures.textContent = ""
    if (error.name === "AbortError") page.figures.append("{{ (stopped)}}")
    else page.error.textContent = error.message
  }
  for (const button of [page.send, page.stop]) button.toggleAttribute("disabled")
}
function showEvent({ error, usage, delta, content, choices }, timing) {     // of either API
  if (error) throw new Error(`${error.code ?? error.type}\n${error.message}`)
  const part = delta ?? content?.[0] ?? choices?.[0]?.delta ?? choices?.[0]?.message ?? {}
  const text = part.content ?? part.text ?? ""
  const thought = part.reasoning_content ?? part.reasoning ?? part.thinking ?? ""
  page.answer.append(text)
  page.thought.append(thought)
  const now = performance.now()
  timing.first ??= now
  if (text || thought) timing.texts.push(now)
  timing.tokens = usage?.completion_tokens ?? usage?.output_tokens ?? timing.tokens
  page.figures.textContent = figures(timing)
}
function figures({ sent, first, texts, tokens }) {
  const delay = "{{first event after}} " + Math.round(first - sent) + " ms"
  const seconds = (texts.at(-1) - texts[0]) / 1000
  if (!(seconds > 0.1)) return delay        // as long as there is no text, it is not a number
  const speed = (Math.max(tokens, texts.length) - 1) / seconds
  return delay + "{{, }}" + (tokens ? "" : "~") + speed.toFixed(1) + " tokens/s"
}
function showSnippets() {       // the same call three times, for this very address
  const url = location.origin + path, model = chosenModel() || "MODEL"
  const headers = requestHeaders(about.client_key_needed && "YOUR_KEY")
  const body = requestBody(model, "Hello!").replace('"messages"', '\n    "messages"')
  const options = Object.keys(headers).map(name => `-H '${name}: ${headers[name]}' \\\n  `).join("")
  const [sdk, create, text] = anthropic ? ANTHROPIC_SDK : OPENAI_SDK
  page.curl.textContent = `curl -N ${url} \\\n  ${options}-d '${body.replaceAll("'", "'\\''")}'`
  page.python.textContent = `from ${sdk.toLowerCase()} import ${sdk}
client = ${sdk}(base_url="${page.base.textContent}",
    api_key="${about.client_key_needed ? "YOUR_KEY" : "none"}")
stream = client.${create}
    model=${JSON.stringify(model)}, stream=True,
    messages=[{"role": "user", "content": "Hello!"}])
for event in stream:
    print(${text}, end="", flush=True)`
  page.script.textContent = `const url = "${url}"
const answer = await fetch(url, {
  method: "POST",
  headers: ${JSON.stringify(headers, null, 4).replace("\n}", " }")},
  body: JSON.stringify(${body})
})
const reader = answer.body.getReader(), text = new TextDecoder()
for (let piece; !(piece = await reader.read()).done;)
  console.log(text.decode(piece.value, { stream: true }))`
}
page.version.textContent = about.version
page.what.textContent = (anthropic ? "Anthropic" : "OpenAI") +
  "{{-style API, relayed to an AI provider. Answers stream in.}}"
page.base.textContent = location.origin + (anthropic ? "" : about.api)
page.keys.hidden = !about.client_key_needed
page.rule.textContent = about.client_key_needed ? "{{needed with each request}}" : "{{not needed}}"
page.form.onsubmit = event => { event.preventDefault(); if (!page.send.disabled) ask() }
page.stop.onclick = () => controller.abort()
page.model.oninput = showSnippets
page.key.onchange = () => { modelsShown = showModels() }
page.key.onchange()
const isSend = event => event.keyCode === 13 && !event.shiftKey     // 229 as part of composing
page.prompt.onkeydown = event => { if (isSend(event)) page.form.onsubmit(event) }
for (const button of document.querySelectorAll("[data-of]")) button.onclick = () => {
  getSelection().selectAllChildren(page[button.dataset.of])
  document.execCommand("copy")      // over plain http there is no navigator.clipboard
  button.textContent = "{{Copied}}"
  setTimeout(() => { button.textContent = "{{Copy}}" }, 2000)
}
</script>
"""
CHINESE = {
    "en": "zh-CN", "aiproxy: an AI endpoint": "aiproxy：AI 接口", "Use it": "调用示例",
    "-style API, relayed to an AI provider. Answers stream in.":
        " 兼容 API，转发至 AI 服务商，回答流式输出。",
    "Key": "API Key", "needed with each request": "每次请求都需要", "not needed": "不需要",
    "Models": "模型", "shown once your key is typed in": "填写 API Key 后显示", "Try it": "试一试",
    "Your key": "你的 API Key", "Model": "模型", "Copy": "复制", "Copied": "已复制",
    "Sent to this address only, kept nowhere.": "只发送到此地址，不会保存。",
    "Prompt": "提示词", "Say hello in a sentence.": "用一句话打个招呼。", "Send": "发送",
    "Enter sends, Shift+Enter: new line": "Enter 发送，Shift+Enter 换行", "Stop": "停止",
    "waiting ...": "等待响应……", "first event after": "首个事件耗时", ", ": "，",
    " (stopped)": "（已停止）", "JavaScript (browser)": "JavaScript（浏览器）",
}
PAGE_RULES = (
    "default-src 'none'; style-src 'nonce-%s'; script-src 'nonce-%s'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

def install_start_page(service):
    service.free_answers.insert(0, answer_with_page)

def answer_with_page(handler):
    request = handler.request
    if request.path != "/" or request.method not in READ_METHODS:
        return False
    if b"text/html" not in request.headers.get(b"accept", b""):
        return False
    handler.send_response(200, *start_page(request))
    return True

def start_page(request):
    """The headers and the content of the page, as bytes.

    Nothing runs or is fetched but what stands in it: each response has a nonce of its own.
    """
    nonce = os.urandom(16).hex()
    headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", PAGE_RULES % (nonce, nonce)),
        ("Vary", "Accept, Accept-Language"),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    ]
    # Browsers name the language that they prefer first.
    prefers_chinese = request.headers.get(b"accept-language", b"").lower().startswith(b"zh")
    words = dict(CHINESE if prefers_chinese else {}, NONCE=nonce)
    content = re.sub("{{(.+?)}}", lambda match: words.get(match[1], match[1]), PAGE)
    fields = [(name.encode(), value.encode()) for name, value in headers]
    return fields, content.encode()

# ---- Demo ----------------------------------------------------------------------------------------
# Does: starts a small OpenAI-style provider inside, and sends it one chat request by the relay.
# Touches: two settings in the environment, before they are read, and threads of its own.
# Entered: `start_demo` in read_command_line.
# Needs: Command line.

MORE_ARGUMENTS["--demo"] = {"action": "store_true", "help": "run against a small provider inside"}

DEMO_TEXT = ("This answer comes from the small provider inside aiproxy: "
             "each word is an event, relayed as it arrives.")
DEMO_DELTAS = [{"content": word} for word in re.findall(r"\S+ ?", DEMO_TEXT)] + [{}]
DEMO_DELTAS[0]["role"] = "assistant"


class DemoProvider(http.server.BaseHTTPRequestHandler):
    """Chat and models. It refuses any key but the provider key."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.check_provider_key():
            model = {"id": "demo", "object": "model", "created": 0, "owned_by": "aiproxy"}
            self.send_json(200, {"object": "list", "data": [model]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            completion = {"id": "demo-1", "created": int(time.time()), "model": request["model"]}
        except (ValueError, KeyError, TypeError):
            return self.send_failure(400, "invalid_model", "A JSON object with a model is needed.")
        if not self.check_provider_key():
            return None
        if self.path != "/v1/chat/completions":
            return self.send_failure(404, "not_found", "The demo has chat and models only.")
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(DEMO_DELTAS) - 1}
        usage["total_tokens"] = sum(usage.values())
        if request.get("stream"):
            options = request.get("stream_options") or {}
            return self.stream(completion, usage if options.get("include_usage") else None)
        message = {"role": "assistant", "content": DEMO_TEXT}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion.update(object="chat.completion", choices=[choice], usage=usage)
        return self.send_json(200, completion)

    def stream(self, completion, usage):
        """The words as events, each with time to be seen; then the usage, if it is wanted."""
        self.send_head(200, "text/event-stream", "Transfer-Encoding", "chunked")
        completion["object"] = "chat.completion.chunk"
        for delta in DEMO_DELTAS:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            self.send_event(dict(completion, choices=[choice]))
            time.sleep(0.06)
        if usage:
            self.send_event(dict(completion, choices=[], usage=usage))
        self.wfile.write(encode_chunk(b"data: [DONE]\n\n") + LAST_CHUNK)

    def check_provider_key(self):
        received = self.headers.get("Authorization", "").encode("latin-1")
        if hmac.compare_digest(received, b"Bearer " + self.server.provider_key.encode()):
            return True
        return self.send_failure(401, "invalid_api_key", "Incorrect API key.")

    def send_event(self, data):
        event = "data: %s\n\n" % json.dumps(data)
        self.wfile.write(encode_chunk(event.encode()))

    def send_failure(self, status, code, message):
        error = ErrorResponse(status, code, message)
        self.send_json(status, {"error": error_object(error)})

    def send_json(self, status, data):
        body = json.dumps(data).encode()
        self.send_head(status, "application/json", "Content-Length", str(len(body)))
        self.wfile.write(body)

    def send_head(self, status, content_type, framing, value):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header(framing, value)
        self.end_headers()

    def handle(self):
        with contextlib.suppress(ConnectionError):      # a relay that leaves is nothing to report
            super().handle()

    def log_message(self, format, *args):
        pass

def start_demo(options, environ):
    """Start the provider as the upstream in `environ`. Returns what to call once we serve."""
    if not options.demo:
        return []
    if options.upstream:
        raise SettingError("--demo has an upstream of its own; leave out --upstream")
    provider = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DemoProvider)
    provider.provider_key = "demo-" + os.urandom(16).hex()
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    environ["AIPROXY_UPSTREAM"] = "http://127.0.0.1:%d" % provider.server_port
    environ["AIPROXY_KEY"] = provider.provider_key
    # The provider is a thread of this process, takes its key in the usual field, and has one path.
    for name in ("KEY_FILE", "WORKERS", "KEY_HEADER", "PATHS"):
        environ.pop("AIPROXY_" + name, None)
    return [show_demo]

def show_demo(server):
    """Send one chat request through the running relay and print the answer as it comes."""
    model = (server.settings.models_shown or ["demo"])[0]
    request = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]}
    # The Host is a loopback name: without client keys the relay answers to no other.
    headers = {"Content-Type": "application/json", "Host": "localhost"}
    for _, client_key in server.settings.client_keys[:1]:
        headers["Authorization"] = "Bearer " + client_key.decode()
    show = functools.partial(server.log.put, sys.stderr, end="")
    show("\nOne chat request through the relay, its answer as it comes:\n\n  ")
    begin = time.monotonic()
    delay = 0
    connection = connect_to(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
    response = connection.getresponse()
    if response.status != 200:
        show("refused, with status %d: %s\n\n" % (response.status, response.read().decode()))
        return
    for line in response:
        if line.startswith(b"data: {"):
            delay = delay or time.monotonic() - begin
            for choice in json.loads(line[len("data: "):])["choices"]:
                show(choice["delta"].get("content", ""))
    show("\n\nFirst event after %.0f ms. " % (delay * 1000))
    show("Now it serves until Ctrl+C: try the command above.\n\n")

def connect_to(server):
    """A connection to ourselves: whose certificate it is needs no proof."""
    scheme, _, address = server.url().partition("://")
    if scheme == "http":
        return http.client.HTTPConnection(address, timeout=10)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(address, timeout=10, context=context)

# ==== The end =====================================================================================

if __name__ == "__main__":
    sys.exit(main())
