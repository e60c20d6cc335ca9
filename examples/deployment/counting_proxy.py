"""A TCP proxy that counts bytes: what really crosses the sockets, HTTP and TLS included."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes from the nodes to the SuperLink (up) and back (down)."""

    up_bytes: int
    down_bytes: int


class CountingProxy(socketserver.ThreadingTCPServer):
    """Passes TCP connections on to ``target`` unchanged and counts their bytes.

    Args:
        host: The address that it listens on, at a free port.
        target: Host and port that it connects to.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, target: tuple[str, int]) -> None:
        super().__init__((host, 0), _Relay)
        self.target = target
        self.traffic = Traffic(0, 0)
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def count(self, up_bytes: int, down_bytes: int) -> None:
        """Adds bytes that went by."""
        with self._lock:
            so_far = self.traffic
            self.traffic = Traffic(so_far.up_bytes + up_bytes, so_far.down_bytes + down_bytes)

    def reset(self) -> None:
        """Starts the count again at zero."""
        with self._lock:
            self.traffic = Traffic(0, 0)

    def close(self) -> None:
        """Takes no more connections."""
        self.shutdown()
        self.server_close()


class _Relay(socketserver.BaseRequestHandler):
    """One connection, passed on in both directions."""

    server: CountingProxy

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as link:
            down = threading.Thread(
                target=self._pump, args=(link, self.request, 0, 1), daemon=True
            )
            down.start()
            self._pump(self.request, link, 1, 0)
            down.join()

    def _pump(self, source: socket.socket, sink: socket.socket, up: int, down: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.server.count(up * len(data), down * len(data))
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
