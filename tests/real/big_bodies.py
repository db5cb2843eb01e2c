"""A large upload and a large download through a transparent relay.

The digest must be the same at the far end, and the memory flat.

    python3 big_bodies.py [SIZE_IN_MB]      1024 unless said otherwise
"""

import hashlib
import http.client
import http.server
import os
import sys
import threading
import time

from stand import Checks, check_calm, memory, start

SIZE = int(sys.argv[1] if len(sys.argv) > 1 else 1024) << 20
PEAK = 60  # MB
BLOCK = os.urandom(1 << 20)
HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
)
TAIL = b"\r\n--b--\r\n"


def pieces(head=b"", tail=b""):
    yield head
    for number in range(SIZE // len(BLOCK)):
        yield number.to_bytes(8, "big") + BLOCK[8:]  # no two alike: a lost or swapped one shows
    yield tail


def digest(parts):
    found = hashlib.blake2b()
    for part in parts:
        found.update(part)
    return found.hexdigest()


class Provider(http.server.BaseHTTPRequestHandler):
    """Answers an upload with its digest, and a GET with SIZE bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        found = digest(self.upload()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    def upload(self):
        if self.headers["Transfer-Encoding"] == "chunked":
            while True:
                data = self.rfile.read(int(self.rfile.readline(), 16))
                self.rfile.readline()
                yield data
                if not data:
                    return
        left = int(self.headers["Content-Length"])
        while left:
            data = self.rfile.read(min(left, 1 << 20))
            left -= len(data)
            yield data

    def do_GET(self):
        chunked = self.path == "/chunked"
        self.send_response(200)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(SIZE))
        self.end_headers()
        for piece in pieces():
            if piece:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments):
        pass


def upload(connection, chunked):
    fields = {"Content-Type": "multipart/form-data; boundary=b"}
    if not chunked:
        fields["Content-Length"] = str(len(HEAD) + SIZE + len(TAIL))
    body = (piece for piece in pieces(HEAD, TAIL) if piece)
    connection.request("POST", "/v1/files", body, fields, encode_chunked=chunked)
    return connection.getresponse().read().decode()


def download(connection, chunked):
    connection.request("GET", "/chunked" if chunked else "/length")
    answer = connection.getresponse()
    return digest(iter(lambda: answer.read(1 << 20), b""))


if __name__ == "__main__":
    checks = Checks()
    provider = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    sent, served = digest(pieces(HEAD, TAIL)), digest(pieces())
    for name, move, wanted in (("upload", upload, sent), ("download", download, served)):
        for framing in ("length", "chunked"):
            title = "%s of %d MB, %s" % (name, SIZE >> 20, framing)
            with checks(title), start("http://127.0.0.1:%d" % provider.server_port) as program:
                connection = http.client.HTTPConnection(*program.address, timeout=600)
                before, begin = memory(program), time.monotonic()
                assert move(connection, framing == "chunked") == wanted
                taken, peak = time.monotonic() - begin, memory(program)
                print(
                    "       %.0f MB/s, peak memory %.1f MB (%.1f MB before)"
                    % ((SIZE >> 20) / taken, peak, before)
                )
                assert peak < PEAK
                connection.close()
                check_calm(program)
    checks.end()
