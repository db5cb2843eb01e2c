"""The README's recipes for a server, as far as they run on one machine without its root.

The relay serves HTTPS with a certificate of our own. nginx and Caddy stand with the README's
lines in front of a relay. systemd checks its unit. The container of Kubernetes is started with its
command, its settings and its probe.
"""

import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

import yaml

from stand import TESTS, Checks, start
from support import (
    CHAT,
    EVENT_HEAD,
    OK,
    PATIENCE,
    PROGRAM,
    Upstream,
    chunk,
    clean_environ,
    event,
    make_certificate,
)

README = open(os.path.join(os.path.dirname(TESTS), "README.md"), encoding="utf-8").read()
KEYS = {"AIPROXY_KEY": "sk-0123456789", "AIPROXY_CLIENT_KEYS": "app=ck-0123456789"}
FIELDS = {"Authorization": "Bearer ck-0123456789", "Content-Type": "application/json"}


def recipe(heading):
    """The first block below a heading."""
    return re.search(r"^### %s\n.*?^```\w+\n(.*?)^```" % re.escape(heading), README, re.M | re.S)[1]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def write(folder, name, text):
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


class Front:
    """A server in front of the relay, until it is left.

    `authority`: the file with the certificate to trust; None for plain HTTP.
    """

    def __init__(self, folder, command, port, environ=None, authority=None):
        self.output = open(os.path.join(folder, "output"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=self.output, env={**os.environ, **(environ or {})})
        self.port = port
        self.authority = authority

    def __enter__(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.output.seek(0)
                    raise AssertionError("the front does not run: " + self.output.read())
                time.sleep(0.05)

    def __exit__(self, *exc):
        self.process.terminate()
        self.process.wait()
        self.output.close()


def nginx(folder, location, more=""):
    """nginx with a `location`, and with `more` outside of its server."""
    port = free_port()
    config = write(folder, "nginx.conf", """
        daemon off; master_process off; pid %(folder)s/pid; error_log stderr;
        events {}
        http {
            access_log off;
            client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy;
            fastcgi_temp_path %(folder)s/fastcgi; uwsgi_temp_path %(folder)s/uwsgi;
            scgi_temp_path %(folder)s/scgi;
            %(more)s
            server { listen %(port)d; %(location)s }
        }""" % {"folder": folder, "port": port, "location": location, "more": more})
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return Front(folder, [program, "-p", folder, "-e", "stderr", "-c", config], port)


def caddy(folder, site):
    """Caddy with a certificate of its own making, for there is nobody to ask for a real one."""
    port = free_port()
    options = "{\n admin off\n local_certs\n skip_install_trust\n http_port %d\n https_port %d\n}\n"
    config = write(folder, "Caddyfile", options % (free_port(), port) + site)
    environ = {"XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder, "HOME": folder}
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", config]
    authority = folder + "/caddy/pki/authorities/local/root.crt"
    return Front(folder, command, port, environ, authority)


def https(folder, upstream):
    """The relay with the file for a page, but keys, a certificate, a port, an upstream of ours."""
    port = free_port()
    env_file = recipe("Your page")
    certificate, private = make_certificate(folder, "relay.example")
    for name, value in (
        ("AIPROXY_UPSTREAM", upstream.url),
        ("AIPROXY_KEY", KEYS["AIPROXY_KEY"]),
        ("AIPROXY_CLIENT_KEYS", KEYS["AIPROXY_CLIENT_KEYS"]),
        ("AIPROXY_MODELS", "m"),
        ("AIPROXY_PORT", str(port)),
        ("AIPROXY_TLS_CERT", certificate),
        ("AIPROXY_TLS_KEY", private),
    ):
        env_file, count = re.subn("^%s=.*" % name, "%s=%s" % (name, value), env_file, flags=re.M)
        assert count == 1, name
    command = [sys.executable, PROGRAM, "--env-file", write(folder, "aiproxy.env", env_file)]
    return Front(folder, command, port, clean_environ({}), authority=certificate)


class Connection(http.client.HTTPConnection):
    """To a front as relay.example, by one of this machine's addresses: that is who it comes from.

    It trusts the front's own certificate alone.
    """

    def __init__(self, front, address="127.0.0.1"):
        super().__init__("relay.example", front.port, timeout=PATIENCE)
        self.authority = front.authority
        self.address = address

    def connect(self):
        """Connect; with TLS again and again: Caddy listens before it has its certificate."""
        deadline = time.monotonic() + PATIENCE
        while True:
            plain = socket.create_connection((self.address, self.port), PATIENCE)
            if not self.authority:
                self.sock = plain
                return
            try:
                context = ssl.create_default_context(cafile=self.authority)
                self.sock = context.wrap_socket(plain, server_hostname="relay.example")
                return
            except (FileNotFoundError, ssl.SSLError):
                plain.close()
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)


def check_front(checks, name, front, upstream):
    """Events one by one, clients that leave, and a body of 2 MB, through a front."""
    gate = threading.Event()
    sent = []

    def stream(received):
        sent.append(time.monotonic())
        received.send(EVENT_HEAD + chunk(event("first")))
        assert gate.wait(PATIENCE)
        received.send(chunk(event("second")) + b"0\r\n\r\n")

    with checks(name + ": the first event is here before the second is sent"):
        upstream.answer = stream
        connection = Connection(front)
        connection.request("POST", CHAT, b'{"model":"m","stream":true}', FIELDS)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.read1(65536) == event("first")
        print("       after %.1f ms" % ((time.monotonic() - sent[0]) * 1000))
        gate.set()
        assert response.read() == event("second")
        connection.close()
    with checks(name + ": a client that leaves in the middle ends its upstream connection"):
        left = threading.Event()

        def endless(received):
            received.send(EVENT_HEAD + chunk(event("first")))
            if received.wait_closed() is not None:
                left.set()

        upstream.answer = endless
        connection = Connection(front)
        connection.request("POST", CHAT, b'{"model":"m","stream":true}', FIELDS)
        response = connection.getresponse()
        response.read1(65536)
        response.close()
        connection.close()
        assert left.wait(PATIENCE)
    with checks(name + ": so does one that leaves before the first byte"):
        asked = threading.Event()
        given_up = threading.Event()

        def silent(received):
            asked.set()
            if received.wait_closed() is not None:
                given_up.set()

        upstream.answer = silent
        connection = Connection(front)
        connection.request("POST", CHAT, b'{"model":"m"}', FIELDS)
        assert asked.wait(PATIENCE)
        connection.close()
        assert given_up.wait(PATIENCE)
    with checks(name + ": a body of 2 MB goes up"):
        upstream.answer = OK
        body = b'{"model":"m","x":"%b"}' % (b"x" * (2 << 20))
        connection = Connection(front)
        connection.request("POST", CHAT, body, FIELDS)
        assert connection.getresponse().read() == b'{"ok":true}'
        assert upstream.received[-1].body == body
        connection.close()


def check_page(checks, front):
    """Only the pages that the file lists may call; the relay's own start page is one of them."""
    for origin, status in (("https://app.example", 200), ("https://relay.example", 200),
                           ("https://other.example", 403)):
        with checks("HTTPS: a page from %s gets %d" % (origin, status)):
            connection = Connection(front)
            connection.request("POST", CHAT, b'{"model":"m"}', dict(FIELDS, Origin=origin))
            response = connection.getresponse()
            response.read()
            shown = response.getheader("Access-Control-Allow-Origin")
            assert (response.status, shown == origin) == (status, status == 200)
            connection.close()


def check_container(checks, upstream):
    """Start what Kubernetes would, and ask what its probes ask."""
    pod = yaml.safe_load(recipe("Kubernetes"))["spec"]["template"]["spec"]
    container = pod["containers"][0]
    port = free_port()
    environ = {one["name"]: one["value"] for one in container["env"]}
    # What Kubernetes makes up for a service of this name, and the secret.
    environ.update(KEYS, AIPROXY_PORT="tcp://10.0.0.1:8000", AIPROXY_SERVICE_HOST="10.0.0.1")
    environ["AIPROXY_UPSTREAM"] = upstream.url
    environ["PORT"] = str(port)
    command = [sys.executable if part == "python3" else part for part in container["command"]]
    command = [part.replace("/code/aiproxy.py", PROGRAM) for part in command]
    with checks("Kubernetes: the container starts and its probes are answered"):
        assert environ["AIPROXY_HOST"] == "0.0.0.0" and PROGRAM in command
        with tempfile.TemporaryDirectory() as folder:
            with Front(folder, command, port, clean_environ(environ)):
                probe = container["readinessProbe"]["httpGet"]
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                connection.request("GET", probe["path"], headers={"Host": "10.1.2.3:8000"})
                assert (connection.getresponse().status, probe["port"]) == (200, 8000)
                connection.close()
                assert container["livenessProbe"]["tcpSocket"] == {"port": 8000}
    with checks("Kubernetes: the pod pauses before it is stopped, and may not write"):
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    with checks("Kubernetes: the program is mounted where the command looks for it"):
        mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert [mounts[volume["name"]] for volume in pod["volumes"]] == ["/code"]


def check_unit(checks, folder):
    with checks("systemd: the unit has no fault"):
        path = write(folder, "aiproxy.service", recipe("systemd"))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode()
        assert done.returncode == 0 and "aiproxy.service" not in said, said


def main():
    checks = Checks()
    settings = {name.replace("AIPROXY_", ""): value for name, value in KEYS.items()}
    with Upstream() as upstream, start(upstream.url, **settings) as relay:
        here = "127.0.0.1:%d" % relay.address[1]
        for name, make in (("nginx", nginx), ("Caddy", caddy)):
            lines = recipe(name).replace("127.0.0.1:8000", here)
            with tempfile.TemporaryDirectory() as folder, make(folder, lines) as front:
                check_front(checks, name, front, upstream)
        with tempfile.TemporaryDirectory() as folder, https(folder, upstream) as front:
            check_front(checks, "HTTPS", front, upstream)
            check_page(checks, front)
        check_container(checks, upstream)
    with tempfile.TemporaryDirectory() as folder:
        check_unit(checks, folder)
    checks.end()


if __name__ == "__main__":
    main()
