"""A TCP proxy that delays, holds back, swallows and cuts what goes through it."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

CHUNK_BYTES = 16_384


@dataclass
class Way:
    """What happens to the bytes in one of the two directions."""

    delay_seconds: float = 0.0
    """Before each chunk is passed on: a slow line, of CHUNK_BYTES / delay."""
    held: bool = False
    """Nothing is read, so that the sender comes to stand."""
    swallows: bool = False
    """Read and thrown away: the answer that never came."""


@dataclass(eq=False)
class Link:
    """One connection: the client's side and the server's side of it."""

    client: socket.socket
    server: socket.socket
    client_port: int
    held: bool = False
    closed: threading.Event = field(default_factory=threading.Event)

    def cut(self):
        self.closed.set()
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            side.close()


class Proxy:
    """Listens on `port` of 127.0.0.1 and connects each client to `server`: (host, port), or the path of a socket."""

    def __init__(self, server):
        self.server = server
        self.to_server, self.to_client = Way(), Way()
        self._links = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """End every connection, in the middle of whatever it was doing. New ones are let in."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            link.cut()

    def hold(self, client_ports):
        """Hold what the server sends to these clients, for good: only `cut()` and `let_go()` end that."""
        for link in self._some(client_ports):
            link.held = True

    def let_go(self, client_ports):
        for link in self._some(client_ports):
            link.held = False

    def _some(self, client_ports):
        with self._lock:
            return [link for link in self._links if link.client_port in client_ports]

    def heal(self):
        """Pass everything on again. A stream that lacks something is of no use: its connection is cut."""
        swallowed = self.to_server.swallows or self.to_client.swallows
        if swallowed:
            self.cut()
        for way in (self.to_server, self.to_client):
            way.delay_seconds, way.held, way.swallows = 0.0, False, False
        with self._lock:
            for link in self._links:
                link.held = False

    def close(self):
        self._listener.close()
        self.cut()

    def _accept(self):
        while True:
            try:
                client, (_, client_port) = self._listener.accept()
            except OSError:
                return  # closed
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            link = Link(client, server, client_port)
            with self._lock:
                self._links.add(link)
            for source, target, way in ((client, server, self.to_server), (server, client, self.to_client)):
                threading.Thread(target=self._pump, args=[link, source, target, way], daemon=True).start()

    def _connect(self):
        if isinstance(self.server, tuple):
            server = socket.create_connection(self.server)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return server
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self.server)
        except OSError:
            server.close()
            raise
        return server

    def _pump(self, link, source, target, way):
        with contextlib.suppress(OSError):
            if target is link.client:
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(CHUNK_BYTES):
                if way.delay_seconds:
                    time.sleep(way.delay_seconds)
                while (way.held or (link.held and target is link.client)) and not link.closed.wait(0.02):
                    pass
                if link.closed.is_set():
                    break  # what was on its way is lost with the connection
                if not way.swallows:
                    target.sendall(data)
        link.cut()
        with self._lock:
            self._links.discard(link)
