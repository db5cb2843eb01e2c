#!/usr/bin/env python3
"""A small benchmark: python3 tests/bench.py, about a minute, standard library only.

aiproxy against the relay that one would write in ten lines (`naive`), and against the same with
one word changed, which a careful person would write (`read1`), in front of the same upstream, in
the same run; `direct` is the upstream without a relay: what this tool can measure at best. Only
the ratios mean something, and only on a quiet machine.
Streams bring 20 events a second each. The naive relay's read(4096) waits until there are 4096
bytes of events: that makes its CPU per event cheap and its first event late. CPU and memory are
the kernel's figures for the relay's process (Linux only).

--growth, six minutes: how the cost grows from 1 to 2,000 streams, which bring 2 events a second
each, and from 1 to 256 clients, also with two workers (the sums of all processes; memory that
they share is counted once). CPU per event and memory are those of streams that run, after their
requests. An event is late 0.1 s after it was due, or if it never came: where many are, and where
clients, upstream and relay share CPUs that are all busy, a figure is not the relay's best.
"""
import argparse
import collections
import contextlib
import heapq
import http.server
import itertools
import os
import platform
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(HERE), "aiproxy.py")
PROVIDER_KEY = "sk-bench-key"
CLIENT_KEY = "ck-bench-key"

STREAMS = (1, 100, 500)     # event streams at once
BUSY_CLIENTS = (1, 16)      # clients that ask again as soon as they have a response
EVENTS_PER_SECOND = 20      # of each stream
PROGRAMS = ("direct", "naive", "read1", "aiproxy")

GROWING_STREAMS = (1, 10, 100, 1000, 2000)
GROWING_CLIENTS = (1, 4, 16, 64, 256)
GROWTH_EVENTS_PER_SECOND = 2        # 4,000 in all: less than a CPU has time for
GROWTH_PROGRAMS = ("direct", "read1", "aiproxy", "2 workers")
STARTS_PER_SECOND = 250     # of streams
MOST_STARTING_SECONDS = 20  # after the last start, for all streams to bring an event
SETTLING_SECONDS = 2        # after that, and before anything is measured
LATE_SECONDS = 0.1          # after an event was due: it counts as late
WITHOUT_END = 10 ** 6       # events

EVENT = (b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":%d,"model":"m",'
         b'"choices":[{"index":0,"delta":{"content":"a word"},"finish_reason":null}]}\n\n')
DUE = re.compile(br'"created":(\d+),')      # ms of the monotonic clock, the same in all processes
STREAM = re.compile(br'"rate":(\d+),"stream":(\d+)')     # events a second, events in all
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
    """The obvious relay: a new upstream connection for each request, read(4096) or read1(4096)."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + PROVIDER_KEY}
        request = urllib.request.Request(self.server.upstream + self.path, body, headers)
        with urllib.request.urlopen(request) as response:
            read = getattr(response, self.server.read)
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.end_headers()
            while True:
                data = read(4096)
                if not data:
                    break
                self.wfile.write(data)

    def log_message(self, *args):
        pass


def run_naive(read, upstream):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Naive)
    server.socket.listen(1024)      # not the default 5: the backlog is not what is measured
    server.read = read
    server.upstream = upstream
    print("on http://127.0.0.1:%d" % server.server_port, flush=True)
    server.serve_forever()


# ---- The upstream ---------------------------------------------------------------------------


class EventStream:
    """A response that is still running. Each event says when it was due."""

    def __init__(self, peer, rate, total):
        self.peer = peer
        self.pace = 1 / rate
        self.left = total       # events
        self.due = time.monotonic()

    def __lt__(self, other):
        return self.due < other.due

    def send_next(self):
        """Send an event or the last chunk; False when the stream has ended."""
        if self.left == 0:
            send(self.peer, LAST_CHUNK)
            return False
        self.left -= 1
        event = EVENT % (self.due * 1000)
        self.due += self.pace
        return send(self.peer, chunk(event))


def send(peer, data):
    """Send without waiting; False if the peer is gone or reads too slowly."""
    try:
        peer.send(data)
        return True
    except OSError:
        return False


class Upstream:
    """Responds at once: with RESPONSE, or with events as the request's `rate` and `stream` say.

    One thread and one selector, so that it takes little of the CPU that the relay needs.
    """

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.buffers = {}       # what each connection has sent of its next request
        self.streams = []       # those that are running, a heap: the one that is due next is first
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
                timeout = max(0, self.streams[0].due - time.monotonic())
            for key, _ in self.selector.select(timeout):
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.receive(key.fileobj)
            self.send_events()

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
        asked = STREAM.search(body)
        if not asked:
            send(peer, RESPONSE)
            return
        send(peer, EVENT_HEAD)
        heapq.heappush(self.streams, EventStream(peer, int(asked[1]), int(asked[2])))

    def send_events(self):
        """Those that are due."""
        now = time.monotonic()
        while self.streams and self.streams[0].due <= now:
            stream = self.streams[0]
            if stream.send_next():
                heapq.heapreplace(self.streams, stream)
            else:
                heapq.heappop(self.streams)


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

    def pids(self):
        """Its own and those of its workers."""
        pid = self.process.pid
        children = read_text("/proc/%d/task/%d/children" % (pid, pid)).split()
        return [pid] + [int(child) for child in children]

    def cpu(self):
        """Seconds of CPU so far."""
        if sys.platform != "linux":
            return 0.0
        # Linux has a clock for every process, whose number is made of the process's number:
        # clock_getcpuclockid(3).
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids())

    def peak(self):
        """The most memory it ever had, in MB."""
        return sum(read_megabytes(pid, "status", "VmHWM") for pid in self.pids())

    def memory(self):
        """What it has now, in MB; of what processes share, each has its part."""
        return sum(read_megabytes(pid, "smaps_rollup", "Pss") for pid in self.pids())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        workers = self.pids()[1:]
        self.process.kill()             # first: it would start workers again
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


def read_text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:             # not Linux
        return ""


def read_megabytes(pid, file, name):
    found = re.search(r"^%s:\s*(\d+) kB" % name, read_text("/proc/%d/%s" % (pid, file)), re.M)
    return int(found[1]) / 1000 if found else 0.0


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


def measure_idle(target, seconds):
    """ms of CPU a second, MB of memory."""
    time.sleep(SETTLING_SECONDS)
    cpu = target.cpu()
    time.sleep(seconds)
    return (target.cpu() - cpu) / seconds * 1000, target.memory()


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


def measure_requests(target, count, seconds):
    """Responses a second, µs of CPU per response."""
    cpu = target.cpu()
    clients = BusyClients(target.address)
    rate = clients.run(count, seconds / 2)
    cpu = target.cpu() - cpu
    return rate, cpu / max(1, clients.responses) * 1e6


class StreamClients:
    """Clients that each read one event stream."""

    def __init__(self, address, rate, total):
        self.address = address
        self.request = make_request(
            address, b'{"model":"m","rate":%d,"stream":%d}' % (rate, total))
        self.selector = selectors.DefaultSelector()
        self.start_times = {}
        self.first_event_times = {}     # seconds after the start
        self.buffers = {}               # what has come after the last event's time
        self.events = 0                 # of all streams
        self.late = 0                   # of these

    def add(self):
        start = time.monotonic()
        sock = connect(self.address, self.request)
        self.start_times[sock] = start
        self.buffers[sock] = b""
        self.selector.register(sock, selectors.EVENT_READ)

    def receive(self, sock):
        data = receive(sock)
        now = time.monotonic()
        buffer = self.buffers[sock] + data
        end = 0
        for match in DUE.finditer(buffer):
            end = match.end()
            self.events += 1
            self.late += now - int(match[1]) / 1000 > LATE_SECONDS
        self.buffers[sock] = buffer[end:]
        if end and sock not in self.first_event_times:
            self.first_event_times[sock] = now - self.start_times[sock]
        if not data or buffer.endswith(b"\r\n" + LAST_CHUNK):
            self.selector.unregister(sock)
            sock.close()

    def receive_until(self, deadline):
        """Or until all streams have ended."""
        while self.selector.get_map():
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                break
            for key, _ in self.selector.select(seconds_left):
                self.receive(key.fileobj)

    def begin(self, count, seconds):
        start = time.monotonic()
        for number in range(count):
            self.receive_until(start + seconds * number / count)
            self.add()

    def wait_for_first_events(self, deadline):
        while len(self.first_event_times) < len(self.buffers) and time.monotonic() < deadline:
            self.receive_until(time.monotonic() + 0.1)
            if not self.selector.get_map():
                break

    def close(self):
        for sock in self.buffers:
            sock.close()


Figures = collections.namedtuple("Figures", "median percentile_99 cpu peak lost")


def measure_streams(target, count, seconds):
    """Figures: ms to the first event, µs of CPU per event, MB of memory, events lost."""
    cpu = target.cpu()
    total = int(seconds * EVENTS_PER_SECOND)
    clients = StreamClients(target.address, EVENTS_PER_SECOND, total)
    deadline = time.monotonic() + seconds * 2 + 10
    clients.begin(count, 1)
    clients.receive_until(deadline)
    cpu = target.cpu() - cpu

    clients.close()
    times = sorted(clients.first_event_times.values()) or [float("nan")]
    percentile_99 = times[min(len(times) - 1, len(times) * 99 // 100)]
    return Figures(
        median=statistics.median(times) * 1000,
        percentile_99=percentile_99 * 1000,
        cpu=cpu / max(1, clients.events) * 1e6,
        peak=target.peak(),
        lost=count * total - clients.events)


def measure_running_streams(target, count, seconds):
    """µs of CPU per event, MB of memory, % of the events that were late or never came."""
    clients = StreamClients(target.address, GROWTH_EVENTS_PER_SECOND, WITHOUT_END)
    try:
        clients.begin(count, count / STARTS_PER_SECOND)
    except OSError:             # it takes no more
        clients.close()
        return None, None, 100.0

    clients.wait_for_first_events(time.monotonic() + MOST_STARTING_SECONDS)
    clients.receive_until(time.monotonic() + SETTLING_SECONDS)
    start = time.monotonic()
    cpu, events, late = target.cpu(), clients.events, clients.late
    clients.receive_until(start + seconds)
    due = count * GROWTH_EVENTS_PER_SECOND * (time.monotonic() - start)
    cpu = target.cpu() - cpu
    events = clients.events - events
    in_time = events - (clients.late - late)

    memory = target.memory()
    clients.close()
    return cpu / max(1, events) * 1e6, memory, max(0, 1 - in_time / due) * 100


class Bench:
    """Measures the programs one after the other, each relay in a fresh process."""

    def __init__(self, upstream, names, seconds):
        self.upstream = upstream
        self.names = names
        self.seconds = seconds          # of each measurement
        self.environ = clean_environ()

    def start(self, name):
        if name == "direct":
            return contextlib.nullcontext(self.upstream)
        if name in ("naive", "read1"):
            read = "read" if name == "naive" else name
            command = [os.path.abspath(__file__), "--run", "naive", read, self.upstream.url]
            return Target(command, self.environ)
        settings = {
            "AIPROXY_UPSTREAM": self.upstream.url,
            "AIPROXY_KEY": PROVIDER_KEY,
            "AIPROXY_CLIENT_KEYS": CLIENT_KEY,
            "AIPROXY_PORT": "0",
            "AIPROXY_LOG": "off",
            "AIPROXY_MAX_CONNECTIONS": "4096",
            "AIPROXY_WORKERS": "2" if name == "2 workers" else "1",
        }
        return Target([PROGRAM], dict(self.environ, **settings))

    def measure(self, function, *args):
        """What the function says of each program: a list for each of its figures."""
        figures = []
        for name in self.names:
            with self.start(name) as target:
                figures.append(function(target, *args, self.seconds))
        return zip(*figures)

    def request_rows(self, count):
        """Rows: what it is, the values of the programs, their format."""
        rate, cpu = self.measure(measure_requests, count)
        label = ", " + plural(count, "client")
        yield "requests/s" + label, rate, "%.0f"
        yield "CPU per request, µs" + label, cpu, "%.0f"

    def stream_rows(self, count):
        """Rows as above. One stream has no percentiles, and lost events are the exception."""
        median, percentile_99, cpu, peak, lost = self.measure(measure_streams, count)
        label = ", " + plural(count, "stream")
        yield "first event, median ms" + label, median, "%.1f"
        if count > 1:
            yield "first event, 99 % ms" + label, percentile_99, "%.1f"
        yield "CPU per event, µs" + label, cpu, "%.1f"
        yield "peak memory, MB" + label, peak, "%.1f"
        if any(lost):
            yield "events lost" + label, lost, "%d"

    def idle_rows(self):
        cpu, memory = self.measure(measure_idle)
        yield "CPU, ms a second, idle", cpu, "%.1f"
        yield "memory, MB, idle", memory, "%.1f"

    def growth_rows(self, count):
        cpu, memory, late = self.measure(measure_running_streams, count)
        label = ", " + plural(count, "stream")
        yield "CPU per event, µs" + label, cpu, "%.1f"
        yield "memory, MB" + label, memory, "%.1f"
        yield "events late, %" + label, late, "%.0f"


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


def print_table(names, rows):
    """The rows as they come, with aiproxy's ratios to the other relays."""
    moment = time.strftime("%Y-%m-%d %H:%M")
    load = "%.1f" % os.getloadavg()[0] if hasattr(os, "getloadavg") else "unknown"
    print("Python %s, %s, %d CPUs, load before %s, %s" % (
        platform.python_version(), platform.system(), os.cpu_count(), load, moment))
    others = [name for name in names if name in ("naive", "read1")]
    ratios = ["a. / " + name for name in others]
    print("%-35s" % "" + "".join("%11s" % name for name in (*names, *ratios)))
    for label, row, form in rows:
        values = dict(zip(names, row))
        if label.startswith(("CPU", "peak", "memory")):
            values["direct"] = None     # the upstream's own are not the question
        cells = [cell(value, form) for value in values.values()]
        for name in others:
            is_known = values["aiproxy"] and values[name] and "late" not in label
            cells.append(cell(values["aiproxy"] / values[name] if is_known else None, "%.3g"))
        print("%-35s" % label + "".join("%11s" % each for each in cells), flush=True)


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--growth", action="store_true",
        help="how the cost grows with streams, clients and workers; about six minutes")
    parser.add_argument(
        "--seconds", type=float, help="of each measurement; 3 if not given, or 8 with --growth")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(measure_rows, counts):
    for count in counts:
        yield from measure_rows(count)


def main():
    options = read_options()
    if options.run:
        if options.run[0] == "naive":
            return run_naive(*options.run[1:])
        return Upstream().run()

    raise_descriptor_limit()
    with Target([os.path.abspath(__file__), "--run", "upstream"]) as upstream:
        if options.growth:
            bench = Bench(upstream, GROWTH_PROGRAMS, options.seconds or 8)
            rows = itertools.chain(bench.idle_rows(),
                                   run_all(bench.growth_rows, GROWING_STREAMS),
                                   run_all(bench.request_rows, GROWING_CLIENTS))
        else:
            bench = Bench(upstream, PROGRAMS, options.seconds or 3)
            rows = itertools.chain(run_all(bench.request_rows, BUSY_CLIENTS),
                                   run_all(bench.stream_rows, STREAMS))
        print_table(bench.names, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
