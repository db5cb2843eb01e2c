#!/usr/bin/env python3
"""A small benchmark: python3 tests/bench.py, about a minute, standard library only.

aiproxy against the relay that one would write in ten lines (Naive below), in front of the same
upstream, in the same run; `direct` is the upstream without a relay: what this tool can measure at
best. Only the ratios mean something, and only on a quiet machine.
Streams bring 20 events a second each. The naive relay's read(4096) waits until there are 4096
bytes of events: that makes its CPU per event cheap and its first event late. CPU and memory are
the kernel's figures for the relay's process (Linux only).
"""
import argparse
import collections
import contextlib
import http.server
import os
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "aiproxy.py")
NAMES = ("direct", "naive", "aiproxy")
PROVIDER_KEY = "sk-bench-key"
CLIENT_KEY = "ck-bench-key"

STREAMS = (1, 100, 500)     # event streams at once
BUSY_CLIENTS = (1, 16)      # clients that ask again as soon as they have a response
EVENTS_PER_SECOND = 20      # of each stream

EVENT = (b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
         b'"choices":[{"index":0,"delta":{"content":"%06d"},"finish_reason":null}]}\n\n')
RESPONSE_BODY = (b'{"choices":[{"message":{"role":"assistant","content":"'
                 + b"x" * 900 + b'"}}]}')
RESPONSE = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(RESPONSE_BODY)) + RESPONSE_BODY
EVENT_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
              b"Transfer-Encoding: chunked\r\n\r\n")
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- The relay to compare with --------------------------------------------------------------


class Naive(http.server.BaseHTTPRequestHandler):
    """The obvious relay: a new upstream connection for each request, read(4096)."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + PROVIDER_KEY}
        request = urllib.request.Request(self.server.upstream + self.path, body, headers)
        with urllib.request.urlopen(request) as response:
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.end_headers()
            while True:
                data = response.read(4096)
                if not data:
                    break
                self.wfile.write(data)

    def log_message(self, *args):
        pass


def run_naive(upstream):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Naive)
    server.socket.listen(1024)      # not the default 5: the backlog is not what is measured
    server.upstream = upstream
    print("on http://127.0.0.1:%d" % server.server_port, flush=True)
    server.serve_forever()


# ---- The upstream ---------------------------------------------------------------------------


class EventStream:
    """A response that is still running."""

    def __init__(self, peer, total):
        self.peer = peer
        self.sent = 0           # events
        self.total = total

    def send_next(self):
        """Send an event or the last chunk; False when the stream has ended."""
        if self.sent == self.total:
            send(self.peer, LAST_CHUNK)
            return False
        self.sent += 1
        return send(self.peer, chunk(EVENT % (self.sent - 1)))


def send(peer, data):
    """Send without waiting; False if the peer is gone or reads too slowly."""
    try:
        peer.send(data)
        return True
    except OSError:
        return False


class Upstream:
    """Responds at once: with RESPONSE, or with as many events as the request's `stream` says.

    One thread and one selector, so that it takes little of the CPU that the relay needs.
    """

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.buffers = {}       # what each connection has sent of its next request
        self.streams = []       # those that are running
        self.next_tick = 0.0    # when each of them is due to send an event
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self):
        print("on http://127.0.0.1:%d" % self.listener.getsockname()[1], flush=True)
        while True:
            timeout = None
            if self.streams:
                timeout = max(0, self.next_tick - time.monotonic())
            for key, _ in self.selector.select(timeout):
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.receive(key.fileobj)
            if self.streams and time.monotonic() >= self.next_tick:
                self.tick()

    def accept(self):
        peer = self.listener.accept()[0]
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(peer, selectors.EVENT_READ)
        self.buffers[peer] = b""

    def receive(self, peer):
        try:
            data = peer.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(peer)
            peer.close()
            del self.buffers[peer]
            return

        self.buffers[peer] += data
        _, separator, body = self.buffers[peer].partition(b"\r\n\r\n")
        if separator and body.endswith(b"}"):
            self.buffers[peer] = b""
            self.respond(peer, body)

    def respond(self, peer, body):
        _, is_stream, total = body.partition(b'"stream":')
        if not is_stream:
            send(peer, RESPONSE)
            return
        stream = EventStream(peer, int(total[:-1]))
        stream.sent = 1
        send(peer, EVENT_HEAD + chunk(EVENT % 0))
        self.streams.append(stream)

    def tick(self):
        """An event on every stream, at a steady pace unless this process comes late."""
        pace = 1 / EVENTS_PER_SECOND
        self.next_tick = max(self.next_tick + pace, time.monotonic() + pace / 2)
        self.streams = [stream for stream in self.streams if stream.send_next()]


# ---- What is measured -----------------------------------------------------------------------


class Target:
    """A program as a process that prints "on http://HOST:PORT" when it is ready."""

    def __init__(self, command, env=None):
        self.process = subprocess.Popen(
            [sys.executable] + command, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True)
        self.url = self.read_url()
        if self.url is None:
            raise SystemExit("%s did not start" % command)
        self.address = ("127.0.0.1", int(self.url.rpartition(":")[2]))

    def read_url(self):
        for line in self.process.stdout:
            if "on http://" in line:
                return line[line.index("http://"):].strip()
        return None

    def cpu(self):
        """Seconds of CPU so far."""
        if sys.platform != "linux":
            return 0.0
        # Linux has a clock for every process, whose number is made of the process's number:
        # clock_getcpuclockid(3).
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def peak(self):
        """The most memory it ever had, in MB."""
        if sys.platform != "linux":
            return 0.0
        with open("/proc/%d/status" % self.process.pid) as status:
            for line in status:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1000
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def make_request(address, body):
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Authorization: Bearer %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (address[1], CLIENT_KEY.encode(), len(body)))
    return head + body


def connect(address, request):
    """A new connection on which this request has been sent."""
    sock = socket.create_connection(address, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(request)
    return sock


def receive(sock):
    """What has come; empty at the end of the connection."""
    try:
        return sock.recv(65536)
    except ConnectionError:
        return b""


class BusyClients:
    """Clients that ask again at once, on the same connection where the relay keeps it alive."""

    def __init__(self, address):
        self.address = address
        self.request = make_request(address, b'{"model":"m"}')
        self.selector = selectors.DefaultSelector()
        self.buffers = {}       # what each connection has received of its response
        self.responses = 0

    def add(self):
        sock = connect(self.address, self.request)
        self.selector.register(sock, selectors.EVENT_READ)
        self.buffers[sock] = b""

    def receive(self, sock):
        data = receive(sock)
        self.buffers[sock] += data
        if self.buffers[sock].endswith(RESPONSE_BODY):
            self.responses += 1
            if b"\nContent-Length:" in self.buffers[sock]:
                self.buffers[sock] = b""
                sock.sendall(self.request)
                return
            data = b""          # without a length the relay closes the connection
        if not data:
            self.selector.unregister(sock)
            sock.close()
            del self.buffers[sock]
            self.add()

    def run(self, count, seconds):
        """Responses a second."""
        for _ in range(count):
            self.add()
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            for key, _ in self.selector.select(1):
                self.receive(key.fileobj)
        elapsed = time.monotonic() - start
        for sock in self.buffers:
            sock.close()
        return self.responses / elapsed


class StreamClients:
    """Clients that each read one event stream; all begin within a second."""

    def __init__(self, address, seconds):
        self.address = address
        self.events = int(seconds * EVENTS_PER_SECOND)      # of each stream
        self.request = make_request(address, b'{"model":"m","stream":%d}' % self.events)
        self.selector = selectors.DefaultSelector()
        self.start_times = {}
        self.first_event_times = {}     # seconds after the start
        self.buffers = {}

    def add(self):
        start = time.monotonic()
        sock = connect(self.address, self.request)
        self.start_times[sock] = start
        self.buffers[sock] = bytearray()
        self.selector.register(sock, selectors.EVENT_READ)

    def receive(self, sock):
        data = receive(sock)
        buffer = self.buffers[sock]
        buffer += data
        if sock not in self.first_event_times and b"data: " in buffer:
            self.first_event_times[sock] = time.monotonic() - self.start_times[sock]
        if not data or buffer.endswith(b"\r\n" + LAST_CHUNK):
            self.selector.unregister(sock)
            sock.close()

    def run(self, count, seconds):
        waiting = count
        start = time.monotonic()
        deadline = start + seconds * 2 + 10
        while waiting or self.selector.get_map():
            if time.monotonic() >= deadline:
                break
            while waiting and time.monotonic() - start >= (count - waiting) / count:
                self.add()
                waiting -= 1
            for key, _ in self.selector.select(0.001 if waiting else 0.5):
                self.receive(key.fileobj)

    def received_events(self):
        return sum(buffer.count(b"data: {") for buffer in self.buffers.values())


Figures = collections.namedtuple("Figures", "median percentile_99 cpu peak lost")


def measure_streams(target, count, seconds):
    """Figures: ms to the first event, µs of CPU per event, MB of memory, events lost."""
    cpu = target.cpu()
    clients = StreamClients(target.address, seconds)
    clients.run(count, seconds)
    cpu = target.cpu() - cpu

    events = clients.received_events()
    times = sorted(clients.first_event_times.values()) or [float("nan")]
    percentile_99 = times[min(len(times) - 1, len(times) * 99 // 100)]
    return Figures(
        median=statistics.median(times) * 1000,
        percentile_99=percentile_99 * 1000,
        cpu=cpu / max(1, events) * 1e6,
        peak=target.peak(),
        lost=count * clients.events - events)


class Bench:
    """Measures the three programs one after the other, each relay in a fresh process."""

    def __init__(self, upstream, seconds):
        self.upstream = upstream
        self.seconds = seconds          # of each measurement
        self.environ = clean_environ()

    def start(self, name):
        if name == "direct":
            return contextlib.nullcontext(self.upstream)
        if name == "naive":
            command = [os.path.abspath(__file__), "--run", "naive", self.upstream.url]
            return Target(command, self.environ)
        settings = {
            "AIPROXY_UPSTREAM": self.upstream.url,
            "AIPROXY_KEY": PROVIDER_KEY,
            "AIPROXY_CLIENT_KEYS": CLIENT_KEY,
            "AIPROXY_PORT": "0",
            "AIPROXY_LOG": "off",
        }
        return Target([PROGRAM], dict(self.environ, **settings))

    def requests_row(self, clients):
        """A row: what it is, the values of the three programs, their format."""
        values = []
        for name in NAMES:
            with self.start(name) as target:
                rate = BusyClients(target.address).run(clients, self.seconds / 2)
                values.append(rate)
        return "requests/s, " + plural(clients, "client"), values, "%.0f"

    def stream_rows(self, count):
        """Rows as above. One stream has no percentiles, and lost events are the exception."""
        figures = []
        for name in NAMES:
            with self.start(name) as target:
                figures.append(measure_streams(target, count, self.seconds))
        median, percentile_99, cpu, peak, lost = zip(*figures)

        label = ", " + plural(count, "stream")
        yield "first event, median ms" + label, median, "%.1f"
        if count > 1:
            yield "first event, 99 % ms" + label, percentile_99, "%.1f"
        yield "CPU per event, µs" + label, cpu, "%.1f"
        yield "peak memory, MB" + label, peak, "%.1f"
        if any(lost):
            yield "events lost" + label, lost, "%d"


def plural(count, noun):
    return "%d %s%s" % (count, noun, "s" if count > 1 else "")


def clean_environ():
    """The environment without settings of aiproxy.py and without proxies."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith("AIPROXY_") and not name.lower().endswith("_proxy")}


def raise_descriptor_limit():
    try:
        import resource
    except ImportError:         # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- The run --------------------------------------------------------------------------------


def cell(value, form):
    is_missing = value is None or value != value        # not a number: no event came at all
    return "-" if is_missing else form % value


def print_table(rows):
    moment = time.strftime("%Y-%m-%d %H:%M")
    print("Python %s, %s, %d CPUs, %s"
          % (platform.python_version(), platform.system(), os.cpu_count(), moment))
    print("%-36s %10s %10s %10s %16s" % ("", *NAMES, "aiproxy / naive"))
    for label, values, form in rows:
        direct, naive, aiproxy = values
        if label.startswith(("CPU", "peak")):
            direct = None               # the upstream's own are not the question
        cells = [cell(value, form) for value in (direct, naive, aiproxy)]
        ratio = "%.3g" % (aiproxy / naive) if naive else "-"
        print("%-36s %10s %10s %10s %16s" % (label, *cells, ratio))


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=4,
        help="of each measurement; about 60 s in all with the default")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = read_options()
    if options.run:
        if options.run[0] == "naive":
            return run_naive(options.run[1])
        return Upstream().run()

    raise_descriptor_limit()
    rows = []
    with Target([os.path.abspath(__file__), "--run", "upstream"]) as upstream:
        bench = Bench(upstream, options.seconds)
        for clients in BUSY_CLIENTS:
            rows.append(bench.requests_row(clients))
        for count in STREAMS:
            rows.extend(bench.stream_rows(count))
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
