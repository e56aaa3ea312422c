"""Messages between the ranks of a job: a small server beside msrun's scheduler, and each rank's connection to it.

MindSpore's collectives carry gradients. What the ranks tell each other otherwise (a loss, a stop request, "ready")
goes over this server, for two reasons. Collectives on the CPU give up after 30 seconds, and validation on rank 0 may
take longer. And the connection of a rank that is killed closes, so that the job ends at once with that rank's number;
msrun alone ends it half a minute later and names another rank. Nothing here imports MindSpore, so the server starts
fast and needs little memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable, Optional

CONNECT_SECONDS = 60


class _Client:
    """The server's side of a connection: the start of an unfinished line, and the identity that the rank has sent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unfinished = b""
        self.identity: Optional[dict] = None


class Server:
    """Answers when all `world_size` ranks have sent a value; ends when all ranks have left, or one is lost.

    It has one thread, so that of two ranks that end shortly after each other the first is named.
    """

    def __init__(self, host: str, port: int, world_size: int) -> None:
        self.world_size = world_size
        self.selector = selectors.DefaultSelector()
        self.socket = socket.create_server((host, port), backlog=world_size)
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.connected: dict[int, _Client] = {}
        self.values: dict[int, Any] = {}
        self.left = 0

    def run(self) -> str:
        """Serves until the job ends. Returns "", or the rank that was lost after the other ranks have been told."""
        while self.left < self.world_size:
            for key, _ in self.selector.select():
                if key.fileobj is self.socket:
                    self._accept()
                elif lost := self._receive(key.data):
                    self._send_to_all({"lost": lost})
                    return lost
        return ""

    def _accept(self) -> None:
        connection, _ = self.socket.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects a machine that is switched off
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(connection, selectors.EVENT_READ, _Client(connection))

    def _receive(self, client: _Client) -> str:
        """Reads what a client has sent. Returns the description of its rank if that rank is lost, else ""."""
        try:
            received = client.connection.recv(1 << 16)
            *lines, client.unfinished = (client.unfinished + received).split(b"\n")
            closed = not received
            for line in lines:
                self._handle(client, json.loads(line))
        except (OSError, ValueError, KeyError, TypeError):
            closed = True
        if not closed:
            return ""
        self.selector.unregister(client.connection)
        client.connection.close()
        if client.identity is None or client.identity["rank"] not in self.connected:
            return ""  # not a rank of this job, or one that has left
        del self.connected[client.identity["rank"]]
        return "rank {rank} of {world_size} (process {process} on {host})".format(
            world_size=self.world_size, **client.identity
        )

    def _handle(self, client: _Client, message: dict) -> None:
        if client.identity is None:
            client.identity = {key: message[key] for key in ("rank", "process", "host")}
            self.connected[message["rank"]] = client
            client.connection.sendall(b'{"connected": true}\n')
        elif "leave" in message:
            del self.connected[client.identity["rank"]]
            self.left += 1
        else:
            self.values[client.identity["rank"]] = message["value"]
            if len(self.values) == self.world_size:
                self._send_to_all({"values": [self.values[rank] for rank in range(self.world_size)]})
                self.values.clear()

    def _send_to_all(self, message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        for client in self.connected.values():
            with contextlib.suppress(OSError):  # lost as well: noticed when its socket is read
                client.connection.sendall(line)


class Connection:
    """A rank's connection to the server.

    `on_lost` is called in another thread, with a description, when a rank or the server is lost. Raises OSError if no
    server answers at `host` and `port` within CONNECT_SECONDS.
    """

    def __init__(self, host: str, port: int, rank: int, on_lost: Callable[[str], None]) -> None:
        self.socket = self._connect(host, port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rw")
        self.on_lost = on_lost
        self.closed = False
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self._send({"rank": rank, "process": os.getpid(), "host": socket.gethostname()})
        if self.file.readline() != '{"connected": true}\n':
            raise ConnectionError("another program's server answers there")
        self.socket.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()

    def _connect(self, host: str, port: int) -> socket.socket:
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _send(self, message: dict) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            for line in self.file:
                message = json.loads(line)
                if "lost" in message:
                    self.on_lost(message["lost"])
                    return
                self.answers.put(message["values"])
        if not self.closed:
            self.on_lost("msrun's scheduler")

    def all_gather(self, value: Any) -> list:
        """The value of every rank, by rank, when all have sent theirs; waits without a time limit."""
        self._send({"value": value})
        return self.answers.get()

    def close(self) -> None:
        self.closed = True
        self._send({"leave": True})
        self.socket.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Runs the server as a child process of msrun's scheduler. Arguments: host, port, number of ranks."""
    host, port, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = os.getppid()
    # msrun prints the lines of the scheduler's log that contain "Error" when the scheduler has ended.
    try:
        server = Server(host, port, world_size)
    except OSError as error:
        print(
            f"Error: ranks cannot exchange messages at {host}:{port}, the port after msrun's --master_port: {error}",
            flush=True,
        )
        return
    if lost := server.run():
        print(
            f"Error: {lost} ended before the job was done; its last message is in its log. The job ends. "
            "Resume with the same command and --resume_from_checkpoint latest.",
            flush=True,
        )
        if os.getppid() == scheduler:
            os.kill(scheduler, signal.SIGKILL)  # it would wait half a minute for the lost rank


if __name__ == "__main__":
    main()
