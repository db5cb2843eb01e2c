#!/usr/bin/env python3
"""A small benchmark: python3 tests/bench.py, about a minute, standard library only.

aiproxy against the relay that one would write in ten lines (Naive below), in front of the same upstream, in the same run; `direct`
is the upstream without a relay: what this tool can measure at best. Only the ratios mean something, and only on a quiet machine.
Streams bring 20 events a second each. The naive relay's read(4096) holds events back until there are 4096 bytes of them: that makes
its CPU per event cheap and its first event late. CPU and memory are the kernel's figures for the relay's process (Linux only).
"""
import argparse
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
PACE = 20                                   # events a second of each stream
EVENT = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%06d"},"finish_reason":null}]}\n\n'
ANSWER = b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 900 + b'"}}]}'
STREAMS, BUSY = (1, 100, 500), (1, 16)      # streams at once; clients that ask again as soon as they are answered


class Naive(http.server.BaseHTTPRequestHandler):
    """The obvious relay: a new upstream connection for each request, read(4096)."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = urllib.request.Request(self.server.upstream + self.path, body, {"Content-Type": "application/json", "Authorization": "Bearer sk-bench-key"})
        with urllib.request.urlopen(request) as answer:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            while True:
                piece = answer.read(4096)
                if not piece:
                    break
                self.wfile.write(piece)

    def log_message(self, *args):
        pass


def run_naive(upstream):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Naive)
    server.socket.listen(1024)              # not the default 5: it is not the backlog that is measured
    server.upstream = upstream
    print("on http://127.0.0.1:%d" % server.server_port, flush=True)
    server.serve_forever()


def run_upstream():
    """Answers at once: ANSWER, or as many events as the body's length says, PACE a second. One thread, one selector."""
    selector, due, listener = selectors.DefaultSelector(), [], socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    print("on http://127.0.0.1:%d" % listener.getsockname()[1], flush=True)
    buffers, turn = {}, 0.0

    def send(peer, data):
        try:
            peer.send(data)
            return True
        except OSError:
            return False

    while True:
        for key, _ in selector.select(max(0, turn - time.monotonic()) if due else None):
            if key.fileobj is listener:
                peer = listener.accept()[0]
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(peer, selectors.EVENT_READ)
                buffers[peer] = b""
                continue
            peer = key.fileobj
            try:
                data = peer.recv(65536)
            except OSError:
                data = b""
            buffers[peer] += data
            head, end, body = buffers[peer].partition(b"\r\n\r\n")
            if not data:
                selector.unregister(peer)
                peer.close()
                del buffers[peer]
            elif end and body.endswith(b"}"):
                buffers[peer] = b""
                if b'"stream":' in body:
                    send(peer, b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + framed(EVENT % 0))
                    due.append([peer, 1, int(body.partition(b'"stream":')[2][:-1])])
                else:
                    send(peer, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
        if due and time.monotonic() >= turn:
            turn = max(turn + 1 / PACE, time.monotonic() + 0.5 / PACE)
            going = []
            for stream in due:
                peer, sent, total = stream
                if send(peer, framed(EVENT % sent) if sent < total else b"0\r\n\r\n") and sent < total:
                    stream[1] += 1
                    going.append(stream)
            due = going


def framed(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- What is measured -----------------------------------------------------------------------------------------------------------


class Target:
    """A program as a process that says "on http://HOST:PORT" when it is ready."""

    def __init__(self, command, env=None):
        self.process = subprocess.Popen([sys.executable] + command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        for line in self.process.stdout:
            if "on http://" in line:
                self.url = line[line.index("http://"):].strip()
                self.address = "127.0.0.1", int(self.url.rpartition(":")[2])
                return
        raise SystemExit("%s did not start" % command)

    def cpu(self):
        """Seconds of CPU so far: Linux keeps a clock for every process, made of its number (see clock_getcpuclockid)."""
        return time.clock_gettime(~self.process.pid << 3 | 2) if sys.platform == "linux" else 0.0

    def peak(self):
        """The most memory it ever had, in MB."""
        if sys.platform != "linux":
            return 0.0
        with open("/proc/%d/status" % self.process.pid) as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def connect(address, request):
    sock = socket.create_connection(address, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(request)
    return sock


def request(address, body):
    return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer ck-bench-key\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (address[1], len(body))) + body


def requests_per_second(target, clients, seconds):
    """How many requests `clients` clients get answered, each asking again at once; connections are kept where the relay keeps them."""
    ask, selector, buffers, done = request(target.address, b'{"model":"m"}'), selectors.DefaultSelector(), {}, 0

    def begin():
        sock = connect(target.address, ask)
        selector.register(sock, selectors.EVENT_READ)
        buffers[sock] = b""
    for _ in range(clients):
        begin()
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        for key, _ in selector.select(1):
            sock = key.fileobj
            try:
                data = sock.recv(65536)
            except ConnectionError:
                data = b""
            buffers[sock] += data
            if buffers[sock].endswith(ANSWER):
                done += 1
                if b"\nContent-Length:" in buffers[sock]:
                    buffers[sock] = b""
                    sock.sendall(ask)
                    continue
                data = b""                  # without a length: the relay closes
            if not data:
                selector.unregister(sock)
                sock.close()
                del buffers[sock]
                begin()
    elapsed = time.monotonic() - start
    for sock in buffers:
        sock.close()
    return done / elapsed


def stream(target, count, seconds):
    """(median and 99th percentile of ms to the first event, events received, events lost) of `count` streams that begin within a second."""
    total = int(seconds * PACE)
    ask, selector = request(target.address, b'{"model":"m","stream":%d}' % total), selectors.DefaultSelector()
    begun, firsts, got, waiting, start = {}, {}, {}, count, time.monotonic()
    deadline = start + seconds * 2 + 10
    while (waiting or len(selector.get_map())) and time.monotonic() < deadline:
        while waiting and time.monotonic() - start >= (count - waiting) / count:
            now = time.monotonic()
            sock = connect(target.address, ask)
            begun[sock], got[sock] = now, bytearray()
            selector.register(sock, selectors.EVENT_READ)
            waiting -= 1
        for key, _ in selector.select(0.001 if waiting else 0.5):
            sock = key.fileobj
            try:
                data = sock.recv(65536)
            except ConnectionError:
                data = b""
            got[sock] += data
            if sock not in firsts and b"data: " in got[sock]:
                firsts[sock] = time.monotonic() - begun[sock]
            if not data or got[sock].endswith(b"\r\n0\r\n\r\n"):
                selector.unregister(sock)
                sock.close()
    events = sum(data.count(b"data: {") for data in got.values())
    times = sorted(firsts.values()) or [float("nan")]
    return statistics.median(times) * 1000, times[min(len(times) - 1, len(times) * 99 // 100)] * 1000, events, count * total - events


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement; about 60 s in all with the default")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run_naive(*options.run[1:]) if options.run[0] == "naive" else run_upstream()
    with contextlib.suppress(ImportError):
        import resource                     # not on Windows
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    me, names, rows = os.path.abspath(__file__), ("direct", "naive", "aiproxy"), []
    with Target([me, "--run", "upstream"]) as upstream:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AIPROXY_") and not name.lower().endswith("_proxy")}

        def start(name):
            if name == "direct":
                return contextlib.nullcontext(upstream)
            if name == "naive":
                return Target([me, "--run", "naive", upstream.url], environ)
            return Target([PROGRAM], dict(environ, AIPROXY_UPSTREAM=upstream.url, AIPROXY_KEY="sk-bench-key", AIPROXY_CLIENT_KEYS="ck-bench-key", AIPROXY_PORT="0", AIPROXY_LOG="off"))

        def each(measure):
            """The figures of all three, one after the other, each relay in a fresh process."""
            figures = []
            for name in names:
                with start(name) as target:
                    figures.append(measure(target))
            return figures

        for clients in BUSY:
            rows.append(("requests/s, %d client%s" % (clients, "s" * (clients > 1)), each(lambda target: requests_per_second(target, clients, options.seconds / 2)), "%.0f"))
        for count in STREAMS:
            def measure(target):
                before = target.cpu()
                median, worst, events, lost = stream(target, count, options.seconds)
                return median, worst, (target.cpu() - before) / max(1, events) * 1e6, target.peak(), lost
            figures = list(zip(*each(measure)))
            label = ", %d stream%s" % (count, "s" * (count > 1))
            for what, values, form in zip(("first event, median ms", "first event, 99 % ms", "CPU per event, µs", "peak memory, MB", "events lost"), figures, ("%.1f", "%.1f", "%.1f", "%.1f", "%d")):
                if what != "events lost" and (count > 1 or "99" not in what) or what == "events lost" and any(values):
                    rows.append((what + label, values, form))
    print("Python %s, %s, %d CPUs, %s" % (platform.python_version(), platform.system(), os.cpu_count(), time.strftime("%Y-%m-%d %H:%M")))
    print("%-36s %10s %10s %10s %16s" % (("",) + names + ("aiproxy / naive",)))
    for what, values, form in rows:
        if what.startswith(("CPU", "peak")):        # the upstream's own are not the question
            values = (None,) + tuple(values[1:])
        print("%-36s %10s %10s %10s" % ((what,) + tuple("-" if value is None or value != value else form % value for value in values)), end="")
        print(" %16s" % ("-" if not values[1] else "%.3g" % (values[2] / values[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
