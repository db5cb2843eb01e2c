"""Random input for everything that reads what strangers send.

The budget is fixed: MAX_EXAMPLES for each property, under a minute in all.

    python3 fuzz.py [MAX_EXAMPLES]
"""

import json
import math
import random
import os
import re
import sys
import tempfile
import urllib.parse

from hypothesis import HealthCheck, configuration, given, settings, strategies as st

from stand import Checks
import aiproxy
from support import Relay, Upstream

# Its database goes where temporary files go, not into the repository.
configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "aiproxy-hypothesis"))
BUDGET = settings(
    max_examples=int(sys.argv[1] if len(sys.argv) > 1 else 4000),
    deadline=None,
    database=None,
    derandomize=False,
    suppress_health_check=list(HealthCheck),
)
FEWER = settings(BUDGET, max_examples=BUDGET.max_examples // 5)


def cut(data, seed):
    """`data` in random pieces."""
    chance, start = random.Random(seed), 0
    while start < len(data):
        end = start + chance.choice((1, 1, 2, 3, 7, 50, 1000))
        yield data[start:end]
        start = end


# ---- heads


class Ended(Exception):
    """The connection ended in the middle of a head."""


class Connection:
    """A buffered socket without a socket: nothing arrives but what is put into its buffer."""

    def __init__(self):
        self.buffer = b""

    def receive(self):
        return None


def read_head(first_line, pieces):
    """What the strict reader makes of pieces.

    ("head", its start line, its fields, the rest), ("bad",) or ("cut",).
    """
    connection = Connection()
    pieces = iter(pieces)

    def read_more():
        piece = next(pieces, None)
        if piece is None:
            raise Ended()
        connection.buffer += piece

    try:
        aiproxy.skip_empty_lines(connection, read_more)
        groups, headers = aiproxy.read_head(connection, first_line, read_more)
        return "head", groups, headers.fields, connection.buffer + b"".join(pieces)
    except aiproxy.ProtocolError:
        return ("bad",)
    except Ended:
        return ("cut",)


TOKEN = st.text("!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=12).map(str.encode)
ODD = st.sampled_from([
    b"\0", b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\x0b", b"\x7f", b"\x80",
    b"\xff", b"\r\n ", b"\n\n", b",", b";", b"#", b"\\",
]) | st.binary(max_size=3)
VALUE = st.binary(max_size=20).map(lambda data: re.sub(rb"[^\t\x20-\x7e\x80-\xff]", b"v", data))
REQUESTS = st.tuples(
    st.sampled_from([b"GET", b"POST", b"PROPFIND"]),
    st.sampled_from([b"/", b"/v1/models?x=%20", b"*", b"http://a/b", b"//a"]),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.9", b"HTTP/2.0"]),
).map(b" ".join)
ANSWERS = st.tuples(
    st.sampled_from([b"HTTP/1.1 200", b"HTTP/1.0 404", b"HTTP/1.1 999"]),
    st.sampled_from([b"", b" ", b" OK", b" caf\xe9"]),
).map(b"".join)


def heads(first):
    """Well-formed heads, with up to four odd bytes put in somewhere."""

    def build(line, fields, odd):
        data = b"\r\n".join([line] + [name + b":" + value for name, value in fields]) + b"\r\n\r\n"
        for place, what in odd:
            data = data[: place % len(data)] + what + data[place % len(data) :]
        return data

    return st.builds(
        build,
        first,
        st.lists(st.tuples(TOKEN, VALUE), max_size=5),
        st.lists(st.tuples(st.integers(0, 1000), ODD), max_size=4),
    ) | st.binary(max_size=200)


def plain_head(line, data):
    """The same by the simplest means: split at CRLF, split at the first colon."""
    block, end, rest = re.sub(rb"\A(?:\r\n){0,4}", b"", data).partition(b"\r\n\r\n")
    lines = block.split(b"\r\n")
    good = (
        end
        and line.fullmatch(lines[0])
        and all(
            re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\0-\x08\x0a-\x1f\x7f]*", one)
            for one in lines[1:]
        )
    )
    if not good:
        return None
    fields = []
    for one in lines[1:]:
        name, _, value = one.partition(b":")
        fields.append((name, value.strip(b" \t")))
    return "head", line.fullmatch(lines[0]).groups(), fields, rest


@BUDGET
@given(
    st.sampled_from([aiproxy.REQUEST_LINE, aiproxy.STATUS_LINE]).flatmap(
        lambda line: st.tuples(
            st.just(line), heads(REQUESTS if line is aiproxy.REQUEST_LINE else ANSWERS)
        )
    ),
    st.integers(),
)
def fuzz_heads(line_and_data, seed):
    line, data = line_and_data
    found, plain = read_head(line, [data]), plain_head(line, data)
    if found[0] == "head":
        assert found == plain, (found, plain)
    else:
        assert plain is None, (found, plain)
    # In pieces a bad head may be recognized sooner, before the connection ends.
    assert read_head(line, cut(data, seed)) == found or found[0] == "cut"
    if found[0] == "cut":
        assert read_head(line, cut(data, seed))[0] != "head"


# ---- chunks


def plain_chunks(data):
    """The same by RFC 9112 section 7.1, one byte after the other.

    (body, "done", rest), (body, "more") or (body, "bad").
    """
    body, place, trailer = b"", 0, 0
    while True:
        end = data.find(b"\r\n", place)
        line = data[place:] if end < 0 else data[place:end]
        if end < 0:
            whole = re.fullmatch(
                rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?)?\r?", line
            )
            return body, "more" if whole and len(line) <= 4096 else "bad"
        size = re.fullmatch(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?", line)
        if not size or len(line) > 4096:
            return body, "bad"
        place, left = end + 2, int(size.group(1), 16)
        if left == 0:
            break
        body += data[place : place + left]
        place += left
        if not b"\r\n".startswith(data[place : place + 2]):
            return body, "bad"
        if len(data) < place + 2:
            return body, "more"
        place += 2
    while True:
        end = data.find(b"\r\n", place)
        line = data[place:] if end < 0 else data[place:end]
        if end < 0:
            return body, "bad" if b"\n" in line or trailer + len(line) > 8192 else "more"
        if not line:
            return body, "done", data[end + 2 :]
        trailer += len(line)
        name = line.partition(b":")[0].lower()
        if (
            trailer > 8192
            or not re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\0-\x08\x0a-\x1f\x7f]*", line)
            or name in (b"content-length", b"transfer-encoding", b"host", b"authorization")
        ):
            return body, "bad"
        place = end + 2


def encode_one_chunk(data, upper, extension):
    size = (b"%X" if upper else b"%x") % len(data)
    return size + extension + b"\r\n" + data + b"\r\n"


CHUNK = st.builds(
    encode_one_chunk,
    st.binary(min_size=1, max_size=40),
    st.booleans(),
    st.sampled_from([b"", b"", b";a", b" ;a=\"b\"", b" "]),
)
CHUNKED = st.builds(
    lambda chunks, end, odd, behind: b"".join(chunks) + end + odd + behind,
    st.lists(CHUNK, max_size=5),
    st.sampled_from([
        b"0\r\n\r\n",
        b"0\r\nX: y\r\n\r\n",
        b"000;a\r\n\r\n",
        b"0\r\nContent-Length: 1\r\n\r\n",
        b"",
    ]),
    ODD | st.just(b""),
    st.binary(max_size=10),
)


def spoiled(data, odd):
    for place, what in odd:
        data = data[: place % (len(data) + 1)] + what + data[place % (len(data) + 1) + 1 :]
    return data


@BUDGET
@given(
    st.builds(spoiled, CHUNKED, st.lists(st.tuples(st.integers(0, 500), ODD), max_size=2))
    | st.binary(max_size=60),
    st.integers(),
)
def fuzz_chunks(data, seed):
    connection = Connection()
    reader = aiproxy.ChunkedBody(connection)
    body = b""
    state = "more"
    for piece in cut(data, seed):
        connection.buffer += piece
        try:
            body += reader.read()
        except aiproxy.ProtocolError:
            state = "bad"
            break
    if reader.failure:
        state = "bad"
    found = (body, state)
    if reader.done:
        found = (body, "done", connection.buffer)
    assert found == plain_chunks(data), (plain_chunks(data), found)


# ---- JSON

LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=10)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=15,
)
OBJECTS = st.dictionaries(
    st.sampled_from(["model", "Model", "messages", "n", "a"]) | st.text(max_size=6),
    VALUES,
    max_size=5,
)
JSON_BITS = st.sampled_from([
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"NaN", b"1e999", b"-",
    b"\xef\xbb\xbf", b"\xff", b"\\ud800", b'"model":1,', b"\xc2\xa0", b" ",
    b"9" * 5000, b"[" * 2000, b"\0", b"//", b"'",
]) | st.binary(max_size=2)
def encode_spoiled(value, form, odd):
    text = json.dumps(value, ensure_ascii=form, indent=2 if form else None)
    return spoiled(text.encode("utf-8", "surrogatepass"), odd)


BODIES = st.builds(
    encode_spoiled,
    OBJECTS,
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 300), JSON_BITS), max_size=2),
) | st.binary(max_size=30)


def same(one, other):
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@BUDGET
@given(BODIES)
def fuzz_json(body):
    try:
        values = aiproxy.parse_object(body)
    except aiproxy.ErrorResponse as refusal:
        assert refusal.status == 400
        return
    read = json.loads(body.decode("utf-8"))
    assert same(values, read)
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in read.values())
    for name in list(read)[:3] + ["a new one"]:  # an edit changes its member and no other
        assert json.loads(aiproxy.edit_members(body, {name: [7]})) == dict(read, **{name: [7]})


# ---- paths

RULES = aiproxy.parse_paths("POST /v1/chat/completions, GET /v1/models/*, * /v1/files/*/content")
PARTS = st.sampled_from([
    "/", "/", "/", "v1", "chat", "completions", "models", "files", "content", ".",
    "..", "%2e", "%2E", "%252e", "%2f", "%5c", "%00", "\\", ";", ";x", "%3b", "a", "~",
    "%20", "%c0%ae", "%ef%bc%8e", "//", "?", "#", "@", ":", "%", "%zz", "\u00e9",
])
ROUTES = st.lists(PARTS, max_size=9).map("".join).map(lambda text: "/" + text) | st.builds(
    lambda base, middle, end: base + "".join(middle) + end,
    st.sampled_from(["/v1/files/", "/v1/models/", "/v1/chat/"]),
    st.lists(PARTS, max_size=4),
    st.sampled_from(["", "/content", "completions"]),
)


def decode_wholly(path):
    while True:
        decoded = urllib.parse.unquote(path, "latin-1").replace("\\", "/")
        if decoded == path:
            return path
        path = decoded


@settings(BUDGET, max_examples=BUDGET.max_examples * 3)
@given(ROUTES)
def fuzz_paths(path):
    if not (aiproxy.is_plain_path(path) and aiproxy.allowed_methods(path, RULES)):
        return
    assert path == "/v1/chat/completions" or re.fullmatch(
        r"/v1/(?:models/.+|files/[^/]+/content)", path
    )
    for part in re.split(r"[/;]", decode_wholly(path)):
        assert part not in (".", ".."), path
    assert not re.search(r"[\0-\x1f\x7f?#]", decode_wholly(path)), path


# ---- all of it, through a socket


def fuzz_everything(relay, upstream, faults):
    line = st.sampled_from([
        b"GET / HTTP/1.1",
        b"POST /v1/chat/completions HTTP/1.1",
        b"GET http://x/v1 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"HEAD /health HTTP/1.0",
    ])
    field = st.sampled_from([
        b"Host: x",
        b"Content-Length: 3",
        b"Transfer-Encoding: chunked",
        b"Connection: close",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"Connection: upgrade",
        b"Authorization: Bearer ck-alice",
        b"Origin: http://x",
        b"Content-Type: a/b",
    ])
    data = st.builds(
        lambda first, fields, body, odd: spoiled(
            b"\r\n".join([first] + fields) + b"\r\n\r\n" + body, odd
        ),
        line,
        st.lists(field, max_size=6),
        CHUNKED | BODIES,
        st.lists(st.tuples(st.integers(0, 300), ODD), max_size=3),
    )

    @FEWER
    @given(data)
    def send(data):
        with relay.client() as client:
            client.send(data)
            client.sock.shutdown(1)
            try:
                while client.more():
                    pass
            except ConnectionError:
                pass
        assert client.data == b"" or client.data.startswith(b"HTTP/1.1 "), client.data
        assert not faults and not upstream.errors

    send()


if __name__ == "__main__":
    checks = Checks()
    for fuzz in (fuzz_heads, fuzz_chunks, fuzz_json, fuzz_paths):
        with checks("%s, %d examples at most" % (fuzz.__name__, BUDGET.max_examples)):
            fuzz()
    for name, given_settings in (
        ("transparent", {}),
        ("hidden", {"KEY": "sk-hidden-key", "CLIENT_KEYS": "ck-alice", "MODELS": "m"}),
    ):
        with checks("fuzz_everything, %s" % name), Upstream() as fake:
            running = Relay(UPSTREAM=fake.url, **given_settings)
            faults = []

            def note_fault(error):
                faults.append(aiproxy.format_traceback(error))

            running.server.report_fault = note_fault
            fuzz_everything(running, fake, faults)
            running.close()
    checks.end()
