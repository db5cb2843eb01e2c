"""A real WebSocket client and server (PyPI: websockets) through the relay.

Once transparent, once with a provider key configured.
"""

import asyncio
import os

from stand import Checks, check_calm, start
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

HIDDEN = {
    "KEY": "sk-hidden-key",
    "CLIENT_KEYS": "alice=ck-alice",
    "PATHS": "GET /v1/realtime",
    "MODELS": "gpt-realtime",
}
BEARER = {"additional_headers": {"Authorization": "Bearer ck-alice"}}
SUBPROTOCOL = {"subprotocols": ["realtime", "openai-insecure-api-key.ck-alice"]}
received = []  # the request of each handshake that the server saw


async def talk(socket):
    """Echo; or do what a message asks for."""
    received.append(socket.request)
    async for message in socket:
        if message == "close":
            return await socket.close(4001, "as you wish")
        elif message == "many":
            for number in range(1000):
                await socket.send("event %d" % number)
        else:
            await socket.send(message)


def select_realtime(socket, offered):
    return "realtime" if "realtime" in offered else None


async def refused(url, **how):
    try:
        async with connect(url, **how):
            return None
    except InvalidStatus as error:
        return error.response.status_code


async def exchange(checks, name, url, **how):
    async with connect(url, max_size=None, **how) as socket:
        with checks(name + ": text, binary, nothing"):
            for message in ("hello \u4f60\u597d", b"\0\xff" * 100, "", b""):
                await socket.send(message)
                assert await socket.recv() == message
        with checks(name + ": 8 MB in one message and in fragments"):
            large = os.urandom(8 << 20)
            for sent in (large, [large[:1], large[1:5000000], large[5000000:]]):
                receiving = asyncio.ensure_future(socket.recv())
                await socket.send(sent)
                assert await receiving == large
        with checks(name + ": 1000 events for one message"):
            await socket.send("many")
            sent = ["event %d" % number for number in range(1000)]
            assert [await socket.recv() for _ in range(1000)] == sent
        with checks(name + ": ping and pong"):
            await asyncio.wait_for(await socket.ping(), 20)
        with checks(name + ": the server's close and its code"):
            await socket.send("close")
            try:
                await socket.recv()
                raise AssertionError("still open")
            except ConnectionClosed as closed:
                assert closed.rcvd.code == 4001 and closed.rcvd.reason == "as you wish"


async def main(checks):
    options = {"max_size": None, "select_subprotocol": select_realtime}
    async with serve(talk, "127.0.0.1", 0, **options) as server:
        upstream = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        with start(upstream) as relay, start(upstream, **HIDDEN) as hidden:
            await exchange(checks, "transparent", relay.url.replace("http", "ws") + "/any/path?x=1")
            await exchange(
                checks,
                "transparent, not compressed",
                relay.url.replace("http", "ws") + "/other",
                compression=None,
            )
            url = hidden.url.replace("http", "ws") + "/v1/realtime?model=gpt-realtime"
            for name, how in (("Bearer", BEARER), ("subprotocol", SUBPROTOCOL)):
                received.clear()
                await exchange(checks, "hidden, " + name, url, **how)
                with checks("hidden, %s: only the hidden key went up" % name):
                    headers = received[0].headers
                    assert headers.get_all("Authorization") == ["Bearer sk-hidden-key"]
                    assert "ck-alice" not in str(headers)
            for name, status, bad_url, how in (
                ("no key", 401, url, {}),
                ("another path", 404, url.replace("realtime?", "other?"), BEARER),
                ("another model", 403, url.replace("=gpt-realtime", "=other"), BEARER),
            ):
                with checks("hidden, %s: %d" % (name, status)):
                    assert await refused(bad_url, **how) == status
            with checks("50 sockets at once"):
                sockets = [await connect(url, **BEARER) for _ in range(50)]
                for number, socket in enumerate(sockets):
                    await socket.send(str(number))
                sent = [str(number) for number in range(50)]
                assert [await socket.recv() for socket in sockets] == sent
                for socket in sockets:
                    await socket.close()
            with checks("no fault was printed"):
                check_calm(relay)
                check_calm(hidden)


if __name__ == "__main__":
    counted = Checks()
    asyncio.run(main(counted))
    counted.end()
