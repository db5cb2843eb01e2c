"""An upstream that the test plays itself, line by line.

For what happens between two halves of a request or a response.
"""

import socket

from support import PATIENCE, Client


class Peer(Client):
    """The upstream's end of one connection."""

    def __init__(self, sock):
        self.sock = sock
        self.data = b""
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_request_head(self):
        return self.read_until(b"\r\n\r\n")

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


class ByHand:
    """A listener on a free port; accept() waits for the relay's next connection."""

    def __init__(self):
        self.peers = []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.listener.settimeout(PATIENCE)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]

    def accept(self):
        self.peers.append(Peer(self.listener.accept()[0]))
        return self.peers[-1]

    def nobody_came(self):
        """True if there is no connection that has not been accepted."""
        self.listener.settimeout(0)
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return True
        finally:
            self.listener.settimeout(PATIENCE)
        return False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for one in [self.listener] + [peer.sock for peer in self.peers]:
            one.close()
