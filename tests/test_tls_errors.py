"""A TLS upstream whose certificate is no good: a 502 that says why in plain words, and nothing of the request on the wire."""
import subprocess

import pytest

from support import Upstream, make_certificate, server_tls

CONFIGURATION = """
[ca]
default_ca = this
[this]
database = {0}/index
serial = {0}/serial
new_certs_dir = {0}
default_md = sha256
policy = names
x509_extensions = extensions
[names]
commonName = supplied
[extensions]
subjectAltName = DNS:localhost
"""


def make_old_certificate(folder, begin, end):
    """A self-signed certificate for localhost that is good from `begin` to `end`: `openssl ca` takes dates in every version."""
    for name, text in (("index", ""), ("serial", "01\n"), ("configuration", CONFIGURATION.format(folder.as_posix()))):
        (folder / name).write_text(text)
    paths = certificate, private = [str(folder / name) for name in ("certificate", "private")]
    for command in (["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", private, "-out", str(folder / "request")],
                    ["ca", "-batch", "-notext", "-selfsign", "-config", str(folder / "configuration"), "-in", str(folder / "request"), "-keyfile", private,
                     "-startdate", begin, "-enddate", end, "-out", certificate]):
        subprocess.run(["openssl"] + command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return paths


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Paths of certificates and their keys, by what is wrong with them."""
    folders = [tmp_path_factory.mktemp("tls") for _ in range(5)]
    return {"expired": make_old_certificate(folders[0], "20200101000000Z", "20200201000000Z"), "not valid yet": make_old_certificate(folders[1], "20490101000000Z", "20490201000000Z"),
            "self-signed": make_certificate(str(folders[2])), "for another host": make_certificate(str(folders[3]), "provider.test", ip="192.0.2.1"), "good": make_certificate(str(folders[4]))}


@pytest.mark.parametrize("wrong,trusted,words", [
    ("expired", "expired", ["expired"]),
    ("not valid yet", "not valid yet", ["not yet valid"]),
    ("self-signed", "good", ["self-signed"]),
    ("for another host", "for another host", ["not valid for", "localhost"]),
])
def test_the_client_reads_what_is_wrong_with_the_certificate(relay, monkeypatch, certificates, wrong, trusted, words):
    monkeypatch.setenv("SSL_CERT_FILE", certificates[trusted][0])
    with Upstream(tls=server_tls(*certificates[wrong])) as fake:
        reply = relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat()
        assert reply.status == 502 and reply.code == "upstream_tls_error" and reply.json["error"]["type"] == "server_error"
        assert all(word in reply.json["error"]["message"].replace("self signed", "self-signed") for word in words)      # OpenSSL 1.1 writes two words
        assert reply.get("x-should-retry") == "false" and not fake.all_bytes


def test_the_same_server_with_a_good_certificate_is_served(relay, monkeypatch, certificates):
    monkeypatch.setenv("SSL_CERT_FILE", certificates["good"][0])
    with Upstream(tls=server_tls(*certificates["good"])) as fake:
        assert relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice").chat().status == 200
