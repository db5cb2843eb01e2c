"""What the tests share: a scripted upstream, a relay, and a raw client.

Real sockets, no sleeps: everything waits for an event.
"""

import contextlib
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import time


import aiproxy

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "aiproxy.py")

# What runs the program where it is a process of its own. With AIPROXY_TEST_PYTHON it is one for
# every test with a relay, and what cannot be tested from outside is skipped: for a Python that
# pytest does not run on.
OTHER_PYTHON = shlex.split(os.environ.get("AIPROXY_TEST_PYTHON", ""))
PYTHON = OTHER_PYTHON or [sys.executable]


def program_command():
    """What starts the program; its options come behind. conftest.py has something quicker."""
    return [*PYTHON, PROGRAM]


# Seconds until a wait that ought to end at once counts as a failure: generous, for slow machines.
PATIENCE = 60

# For openssl: a key that is made in a millisecond, where one of RSA takes half a second.
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]

CHAT = "/v1/chat/completions"
OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{"ok":true}'
EVENT_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n"
    b"\r\n"
)


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text):
    return b"data: " + text.encode() + b"\n\n"


class Received:
    """One request as the upstream received it, and the connection to answer it on."""

    def __init__(self, connection, number, reading=None):
        self.connection = connection
        # Connections to this upstream are numbered from 1.
        self.number = number
        # One thread reads at a time: two threads that read from one TLS connection
        # corrupt memory up to CPython 3.13.
        self.reading = reading or threading.Lock()
        self.head = b""
        self.body = b""
        self.whole = False

    @property
    def line(self):
        return self.head.split(b"\r\n")[0].decode("latin-1")

    def fields(self, name):
        """All values of a header field, in order."""
        values = []
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name.lower().encode():
                values.append(value.strip().decode("latin-1"))
        return values

    def field(self, name):
        values = self.fields(name)
        assert len(values) <= 1, values
        return values[0] if values else None

    def send(self, data):
        self.connection.sendall(data)

    def wait_closed(self, timeout=PATIENCE):
        """Seconds until the other side closed the connection; None if it did not."""
        begin = time.monotonic()
        if not self.reading.acquire(timeout=timeout):
            return None
        try:
            self.connection.settimeout(timeout)
            while self.connection.recv(65536):
                pass
        except socket.timeout:
            return None
        except OSError:
            pass
        finally:
            self.reading.release()
        return time.monotonic() - begin

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def close(self):
        """Close the connection; over TLS without close_notify, as a dying server does."""
        if not isinstance(self.connection, ssl.SSLSocket):
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.connection.close()


class Upstream:
    """An HTTP/1.1 server on a free port.

    Set `answer` to bytes that are sent as they are, or to a function: `answer(received)` is called
    for each request, and what it raises is kept in `errors`.
    `received` has every request, `all_bytes` every byte that arrived.
    """

    def __init__(self, tls=None, answer=OK):
        self.tls = tls
        self.answer = answer
        self.received = []
        self.arrived = threading.Condition()
        self.errors = []
        self.all_bytes = b""
        self.connections = 0
        self.open = []

        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.port = self.listener.getsockname()[1]
        self.url = ("https://localhost:%d" if tls else "http://127.0.0.1:%d") % self.port

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        # The shutdown wakes the thread in accept(), which would keep the port open.
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()

        # Each connection is closed by its own thread, never while that thread reads from it.
        for connection in self.open:
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                pass

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            arguments = (connection, self.connections)
            threading.Thread(target=self.serve, args=arguments, daemon=True).start()

    def serve(self, connection, number):
        rest = b""
        reading = threading.Lock()
        try:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            self.open.append(connection)
            while True:
                received = Received(connection, number, reading)
                rest = self.read_request(received, rest)
                if rest is None:
                    return
                if callable(self.answer):
                    self.answer(received)
                else:
                    received.send(self.answer)
        except OSError:
            pass
        except Exception as error:
            # Kept for the test: an exception that ends a thread would be lost.
            self.errors.append(error)
        finally:
            with reading:
                connection.close()

    def read_request(self, received, data):
        """Read one request; return the bytes after it, or None if the connection ended."""

        def more():
            with received.reading:
                piece = received.connection.recv(65536)
            self.all_bytes += piece
            if not piece:
                raise ConnectionResetError()
            return piece

        try:
            while b"\r\n\r\n" not in data:
                data += more()
            received.head, _, data = data.partition(b"\r\n\r\n")
            with self.arrived:
                self.received.append(received)
                self.arrived.notify_all()

            if received.field("transfer-encoding") == "chunked":
                while True:
                    while b"\r\n" not in data:
                        data += more()
                    size, _, data = data.partition(b"\r\n")
                    size = int(size, 16)
                    while len(data) < size + 2:
                        data += more()
                    received.body += data[:size]
                    data = data[size + 2:]
                    if not size:
                        break
            else:
                length = int(received.field("content-length") or 0)
                while len(data) < length:
                    data += more()
                    received.body = data[:length]
                received.body, data = data[:length], data[length:]

            received.whole = True
            return data
        except OSError:
            return None

    def wait_for(self, count=1):
        """The count-th request, as soon as its head has arrived."""
        with self.arrived:
            arrived = self.arrived.wait_for(lambda: len(self.received) >= count, PATIENCE)
            assert arrived, "the upstream received %d requests" % len(self.received)
            return self.received[count - 1]


def relay_environ(settings):
    """The environment for these settings, whose names go without AIPROXY_."""
    environ = {"AIPROXY_PORT": "0"}
    for name, value in settings.items():
        if not name.startswith(("CLOUDFLARE_", "PORT", "FC_")):
            name = "AIPROXY_" + name
        environ[name] = str(value)
    return environ


def close_server(server):
    """Hang up on all clients and end all threads."""
    server.server_close()
    for sock in list(server.clients):
        with contextlib.suppress(OSError):      # it may leave by itself at any moment
            aiproxy.hang_up(sock)
    server.relay_loop.stopping = True
    server.relay_loop.closed = True
    server.relay_loop.wake()
    server.threads.shutdown(wait=False)
    server.log.close(0)


class Relay:
    """An aiproxy Server in this process, on a free port."""

    def __init__(self, **settings):
        self.settings = aiproxy.Settings(relay_environ(settings))
        self.server = aiproxy.Server(self.settings)
        self.records = []
        self.recorded = threading.Condition()
        self.server.log.write = self.record
        # Lines are printed at once, not by the log's own thread.
        self.server.log.put = lambda stream, line: print(line, file=stream, flush=True)

        self.address = self.server.server_address[:2]
        self.url = "%s://127.0.0.1:%d" % (self.settings.scheme, self.address[1])
        serve = self.server.serve_forever
        self.thread = threading.Thread(target=serve, args=(0.002,), daemon=True)
        self.thread.start()

    def record(self, record):
        with self.recorded:
            self.records.append(record.as_dict(lambda text, most: text[:most]))
            self.recorded.notify_all()

    def wait_for_record(self, count=1):
        """The count-th line of the log, as a dict."""
        with self.recorded:
            written = self.recorded.wait_for(lambda: len(self.records) >= count, PATIENCE)
            assert written, "%d records" % len(self.records)
            return self.records[count - 1]

    def client(self, receive_buffer=None):
        return Client(self.address, receive_buffer, tls=self.settings.scheme == "https")

    def ask(self, method="GET", path="/v1/models", body=None, fields=(), version="HTTP/1.1"):
        """The Reply to one request on a connection of its own, read to the end."""
        with self.client() as client:
            client.request(method, path, body, fields, version)
            return client.read_reply(method)

    def chat(self, body=b'{"model":"m","messages":[]}', key="ck-alice", fields=()):
        fields = list(fields)
        if key:
            fields.insert(0, ("Authorization", "Bearer " + key))
        return self.ask("POST", CHAT, body, fields)

    def close(self):
        self.server.shutdown()
        close_server(self.server)


class Reply:
    """A response as a client read it.

    `complete` is False where the framing shows that something is missing.
    """

    def __init__(self, head):
        lines = head.decode("latin-1").split("\r\n")
        self.raw_head = head
        self.status_line = lines[0]
        self.status = int(lines[0].split(" ")[1])
        self.fields = []
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.fields.append((name.lower(), value.strip()))
        self.body = b""
        self.complete = False

    def all(self, name):
        return [value for key, value in self.fields if key == name.lower()]

    def get(self, name, default=None):
        values = self.all(name)
        return values[0] if values else default

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json["error"]["code"]


class Client:
    """A raw client: it sends the bytes it is given and reads responses strictly.

    Over TLS an end without close_notify is a ConnectionError.
    """

    def __init__(self, address, receive_buffer=None, tls=False):
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""
        # Over TLS: has the other side said that nothing is missing?
        self.got_close_notify = False
        if tls:
            self.start_tls()

    def start_tls(self):
        self.sock = client_tls().wrap_socket(self.sock, suppress_ragged_eofs=False)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()

    def send(self, data):
        try:
            self.sock.sendall(data)
        except ssl.SSLEOFError:
            raise ConnectionAbortedError("without close_notify")

    def request(self, method="GET", path="/v1/models", body=None, fields=(), version="HTTP/1.1"):
        names = {name.lower() for name, _ in fields}
        lines = ["%s %s %s" % (method, path, version)]
        if "host" not in names:
            lines.append("Host: 127.0.0.1:8000")
        lines.extend("%s: %s" % field for field in fields)
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            lines.append("Content-Length: %d" % len(body))
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))

    def receive(self, most=65536):
        """The next bytes, b"" at the end."""
        try:
            piece = self.sock.recv(most)
        except ssl.SSLZeroReturnError:
            piece = b""
        except ssl.SSLError as error:       # PyPy has no class of its own for it
            if isinstance(error, ssl.SSLEOFError) or "UNEXPECTED_EOF" in (error.reason or ""):
                raise ConnectionAbortedError("without close_notify")
            raise
        if not piece:
            self.got_close_notify = True
        return piece

    def more(self):
        """Read the next bytes; False at the end."""
        piece = self.receive()
        self.data += piece
        return bool(piece)

    def read_until(self, mark):
        """All bytes up to and including `mark`, as soon as they have arrived."""
        while mark not in self.data:
            assert self.more(), "ended before %r: %r" % (mark, self.data[-200:])
        front, _, self.data = self.data.partition(mark)
        return front + mark

    def fill(self, count):
        """Read until `count` bytes are here, in linear time; False if the end came before."""
        pieces = [self.data]
        missing = count - len(self.data)
        try:
            while missing > 0:
                piece = self.receive()
                if not piece:
                    return False
                pieces.append(piece)
                missing -= len(piece)
            return True
        finally:
            self.data = b"".join(pieces)

    def read_exactly(self, count):
        if not self.fill(count):
            return None
        front, self.data = self.data[:count], self.data[count:]
        return front

    def read_head(self):
        """The head of the next response that is not a 1xx interim one."""
        while True:
            reply = Reply(self.read_until(b"\r\n\r\n")[:-4])
            if reply.status >= 200 or reply.status == 101:
                return reply

    def read_reply(self, method="GET"):
        """The next response with its body. A reset or an early end leaves it incomplete."""
        reply = self.read_head()
        try:
            self.read_body(reply, method)
        except ConnectionError:
            reply.complete = False
            if reply.get("content-length"):
                reply.body = self.data
        return reply

    def read_body(self, reply, method="GET"):
        if method == "HEAD" or reply.status in (204, 304):
            reply.complete = True
        elif reply.get("transfer-encoding") == "chunked":
            pieces = []
            try:
                while True:
                    piece = self.read_chunk()
                    if not piece:
                        reply.complete = piece == b""
                        return
                    pieces.append(piece)
            finally:
                reply.body += b"".join(pieces)
        elif reply.get("content-length") is not None:
            length = int(reply.get("content-length"))
            self.fill(length)
            reply.body, self.data = self.data[:length], self.data[length:]
            reply.complete = len(reply.body) == length
        else:
            self.fill(float("inf"))
            reply.body, self.data = self.data, b""
            reply.complete = True

    def read_chunk(self):
        """One chunk's data, b"" for the last chunk, None if the connection ended."""
        while b"\r\n" not in self.data:
            if not self.more():
                return None
        size, _, self.data = self.data.partition(b"\r\n")
        data = self.read_exactly(int(size, 16) + 2)
        assert data is None or data.endswith(b"\r\n")
        return data if data is None else data[:-2]

    def ended(self):
        """Wait for the other side; True if it closed and sent nothing more."""
        try:
            return not self.more()
        except ConnectionError:
            return True


def allow_no_silence(running, seconds=0.2):
    """From now on AIPROXY_TIMEOUT is so short for the response that is being relayed.

    What comes before, like the head, may take its time on a slow machine.
    """
    loop = running.server.relay_loop
    deadline = time.monotonic() + PATIENCE
    while not loop.jobs:
        assert time.monotonic() < deadline, "no response is being relayed"
        time.sleep(0.01)
    for job in list(loop.jobs):
        job.timeout = job.silence = seconds         # the latter in a tunnel


def watch(monkeypatch, owner, name):
    """done(): wait until `owner.name` has been called once more than the last time."""
    calls = threading.Semaphore(0)
    original = getattr(owner, name)

    def call(*args):
        result = original(*args)
        calls.release()
        return result

    monkeypatch.setattr(owner, name, call)
    return lambda: calls.acquire(timeout=PATIENCE)


def run_program(*arguments, env=None, timeout=PATIENCE):
    """Run `aiproxy.py ARGUMENTS` under this Python, with only the settings in `env`."""
    return subprocess.run(
        [*program_command(), *arguments],
        env=clean_environ(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=timeout,
        universal_newlines=True,
    )


def clean_environ(env=None):
    """This process's environment without its settings and proxies, but with `env`."""
    environ = {}
    for name, value in os.environ.items():
        if name.startswith(("AIPROXY_", "CLOUDFLARE_")):
            continue
        if name.lower() in ("http_proxy", "https_proxy", "no_proxy", "port"):
            continue
        environ[name] = value

    environ["PYTHONIOENCODING"] = "utf-8"
    environ.update(env or {})
    return environ


class Program:
    """aiproxy.py as a process of its own, on a free port that its banner names.

    `command` is what starts it, if not program_command().
    """

    def __init__(self, *arguments, env=None, command=None):
        self.process = subprocess.Popen(
            [*(command or program_command()), *arguments],
            env=clean_environ({"AIPROXY_PORT": "0", **(env or {})}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            encoding="utf-8",
        )
        self.banner = ""
        self.errors = []
        self.lines = []
        self.news = threading.Condition()
        self.start_collecting(self.process.stderr, self.errors)
        self.start_collecting(self.process.stdout, self.lines)

        match = self.wait_for_line(self.errors, r"on (https?://\S+:(\d+))")
        self.url = match.group(1)
        self.address = ("127.0.0.1", int(match.group(2)))

    def start_collecting(self, stream, lines):
        threading.Thread(target=self.collect, args=(stream, lines), daemon=True).start()

    def collect(self, stream, lines):
        for line in stream:
            with self.news:
                lines.append(line)
                self.news.notify_all()
        stream.close()

    def wait_for_line(self, lines, pattern):
        def search():
            for line in lines:
                match = re.search(pattern, line)
                if match:
                    return match
            return None

        with self.news:
            assert self.news.wait_for(search, PATIENCE), "%r is not in %r" % (pattern, lines)
            return search()

    def stop(self, number=15):
        """Send a signal, wait for the end, return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()


class ProcessRelay(Relay):
    """The program as a process, with what a Relay offers to those that look from outside."""

    def __init__(self, **settings):
        environ = relay_environ(settings)
        self.settings = aiproxy.Settings(environ)
        self.program = Program(env={"AIPROXY_LOG": "json", **environ})
        self.address = self.program.address
        self.url = self.program.url

    @property
    def server(self):
        import pytest                       # tests/real/ does without it
        pytest.skip("looks into the server")

    @property
    def records(self):
        return [json.loads(line) for line in self.program.lines]

    def wait_for_record(self, count=1):
        with self.program.news:
            written = self.program.news.wait_for(lambda: len(self.program.lines) >= count, PATIENCE)
            assert written, "%d records" % len(self.program.lines)
            return self.records[count - 1]

    def close(self):
        self.program.__exit__()


start_relay = ProcessRelay if OTHER_PYTHON else Relay


def banner_of(environ):
    """What a server in this process prints of itself when it starts."""
    server = aiproxy.Server(aiproxy.Settings({"AIPROXY_PORT": "0", **environ}))
    printed = []
    server.log.put = lambda stream, text: printed.append(text)
    try:
        aiproxy.print_banner(server)
        assert server.url() in printed[0]
    finally:
        close_server(server)
    return printed[0]


def children(process):
    """The ids of its child processes, the oldest first."""
    with open("/proc/%d/task/%d/children" % (process, process)) as file:
        return [int(word) for word in file.read().split()]


def process_state(process):
    """Its letter in proc(5): T is stopped, Z has ended; None if there is none."""
    try:
        with open("/proc/%d/stat" % process) as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None


def sockets_of(process):
    """The inodes of the sockets that it has open."""
    folder = "/proc/%d/fd/" % process
    inodes = set()
    for name in os.listdir(folder):
        try:
            target = os.readlink(folder + name)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:["):-1])
    return inodes


def make_certificate(folder, name="localhost", days=1, ip="127.0.0.1", key="good"):
    """Make a self-signed certificate for `name` with the openssl program.

    Returns the paths of the certificate and of its private key.
    """
    certificate = os.path.join(folder, key + ".pem")
    private = os.path.join(folder, key + ".key")
    command = ["openssl", "req", "-x509", *NEW_KEY, "-nodes"]
    command += ["-days", str(days)]
    command += ["-subj", "/CN=" + name]
    command += ["-addext", "subjectAltName=DNS:%s,IP:%s" % (name, ip)]
    command += ["-keyout", private, "-out", certificate]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return certificate, private


def server_tls(certificate, private):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return context


def client_tls():
    """TLS as a client that takes any certificate, and HTTP/1.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    if ssl.OPENSSL_VERSION_INFO >= (3,):        # CPython 3.8 and 3.9 set it: a cut looked complete
        context.options &= ~0x80
    return context
