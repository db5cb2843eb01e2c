"""A TLS upstream with a bad certificate.

The client receives a 502 that says why in plain words, and the upstream receives nothing.
"""

import subprocess

import pytest

from support import NEW_KEY, Upstream, make_certificate, server_tls

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
    """Make a self-signed certificate for localhost that is valid from `begin` to `end`.

    With `openssl ca`, because that command takes dates in every version of openssl.
    Returns the paths of the certificate and of its private key.
    """
    (folder / "index").write_text("")
    (folder / "serial").write_text("01\n")
    configuration = folder / "configuration"
    configuration.write_text(CONFIGURATION.format(folder.as_posix()))
    certificate = str(folder / "certificate")
    private = str(folder / "private")
    request = str(folder / "request")

    make_request = ["req", "-new", *NEW_KEY, "-nodes", "-subj", "/CN=localhost"]
    make_request += ["-keyout", private, "-out", request]
    run_openssl(make_request)

    sign = ["ca", "-batch", "-notext", "-selfsign", "-config", str(configuration)]
    sign += ["-in", request, "-keyfile", private]
    sign += ["-startdate", begin, "-enddate", end, "-out", certificate]
    run_openssl(sign)

    return [certificate, private]


def run_openssl(arguments):
    command = ["openssl"] + arguments
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Paths of certificates and their keys, by what is wrong with them."""
    folders = [tmp_path_factory.mktemp("tls") for _ in range(5)]
    return {
        "expired": make_old_certificate(folders[0], "20200101000000Z", "20200201000000Z"),
        "not valid yet": make_old_certificate(folders[1], "20490101000000Z", "20490201000000Z"),
        "self-signed": make_certificate(str(folders[2])),
        "for another host": make_certificate(str(folders[3]), "provider.test", ip="192.0.2.1"),
        "good": make_certificate(str(folders[4])),
    }


BAD_CERTIFICATES = [  # the certificate served, the one trusted, words that the message must contain
    ("expired", "expired", ["expired"]),
    ("not valid yet", "not valid yet", ["not yet valid"]),
    ("self-signed", "good", ["self-signed"]),
    ("for another host", "for another host", ["not valid for", "localhost"]),
]


@pytest.mark.parametrize("wrong,trusted,words", BAD_CERTIFICATES)
def test_the_client_reads_what_is_wrong_with_the_certificate(
    relay, monkeypatch, certificates, wrong, trusted, words
):
    monkeypatch.setenv("SSL_CERT_FILE", certificates[trusted][0])
    with Upstream(tls=server_tls(*certificates[wrong])) as fake:
        running = relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
        reply = running.chat()

        assert reply.status == 502
        assert reply.code == "upstream_tls_error"
        assert reply.json["error"]["type"] == "server_error"
        # OpenSSL 1.1 writes "self signed" as two words.
        message = reply.json["error"]["message"].replace("self signed", "self-signed")
        assert all(word in message for word in words)
        assert reply.get("x-should-retry") == "false"
        assert not fake.all_bytes


def test_the_same_server_with_a_good_certificate_is_served(relay, monkeypatch, certificates):
    monkeypatch.setenv("SSL_CERT_FILE", certificates["good"][0])
    with Upstream(tls=server_tls(*certificates["good"])) as fake:
        running = relay(UPSTREAM=fake.url, KEY="sk-hidden-key", CLIENT_KEYS="ck-alice")
        assert running.chat().status == 200
