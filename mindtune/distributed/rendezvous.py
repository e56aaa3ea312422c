"""Where the workers of a job meet: a small server beside msrun's scheduler, and the line that each worker has to it.

MindSpore's collectives carry gradients; what the workers say to one another (a loss, "stop", "I am here") goes this way, for two
reasons. A collective on the CPU gives up after 30 seconds, and worker 0 may draw pictures for longer. And a worker that is killed closes
its line, so that the job ends at once with its number: msrun kills the others and names the wrong one half a minute later.
Nothing here imports MindSpore, so the server starts fast and costs little.
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
from typing import Any, Callable

CONNECT_SECONDS = 60


class Guest:
    """A connection to the server: what has come of the next line, and who it is (None: has not said)."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.begun, self.hello = connection, b"", None


class Meeting:
    """The server's side: answers when all `count` workers have spoken, and ends when all have left or one is lost.

    One thread, so that of two workers that end one after the other the first is named.
    """

    def __init__(self, host: str, port: int, count: int) -> None:
        self.count, self.selector = count, selectors.DefaultSelector()
        self.server = socket.create_server((host, port), backlog=count)
        self.selector.register(self.server, selectors.EVENT_READ)
        self.here: dict[int, Guest] = {}
        self.said: dict[int, Any] = {}
        self.left = 0

    def run(self) -> str:
        """Serves until the end; returns "" or which worker was lost, after telling the others."""
        while self.left < self.count:
            for key, _ in self.selector.select():
                if key.fileobj is self.server:
                    self._welcome()
                elif lost := self._hear(key.data):
                    self._tell({"lost": lost})
                    return lost
        return ""

    def _welcome(self) -> None:
        connection, _ = self.server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is switched off says nothing
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(connection, selectors.EVENT_READ, Guest(connection))

    def _hear(self, guest: Guest) -> str:
        """What a guest has said; returns who is lost, if it is this one."""
        try:
            received = guest.connection.recv(1 << 16)
            *lines, guest.begun = (guest.begun + received).split(b"\n")
            gone = not received
            for line in lines:
                self._answer(guest, json.loads(line))
        except (OSError, ValueError, KeyError, TypeError):
            gone = True
        if not gone:
            return ""
        self.selector.unregister(guest.connection)
        guest.connection.close()
        if guest.hello is None or guest.hello["worker"] not in self.here:
            return ""  # a stranger, or one that has taken its leave
        del self.here[guest.hello["worker"]]
        return "worker {worker} of {count} (process {process} on {host})".format(count=self.count, **guest.hello)

    def _answer(self, guest: Guest, message: dict) -> None:
        if guest.hello is None:
            guest.hello = {key: message[key] for key in ("worker", "process", "host")}
            self.here[message["worker"]] = guest
            guest.connection.sendall(b'{"welcome": true}\n')
        elif "bye" in message:
            del self.here[guest.hello["worker"]]
            self.left += 1
        else:
            self.said[guest.hello["worker"]] = message["say"]
            if len(self.said) == self.count:
                self._tell({"all": [self.said[number] for number in range(self.count)]})
                self.said.clear()

    def _tell(self, message: dict) -> None:
        text = json.dumps(message).encode() + b"\n"
        for guest in self.here.values():
            with contextlib.suppress(OSError):  # gone too: seen when it is its turn
                guest.connection.sendall(text)


class Line:
    """A worker's side. `lost` is called, in a thread of its own, with a text when another worker or the server is gone.

    Raises OSError if no server answers at `host` and `port` within CONNECT_SECONDS.
    """

    def __init__(self, host: str, port: int, worker: int, lost: Callable[[str], None]) -> None:
        self.socket = self._connect(host, port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file, self.lost, self.closed = self.socket.makefile("rw"), lost, False
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self._send({"worker": worker, "process": os.getpid(), "host": socket.gethostname()})
        if self.file.readline() != '{"welcome": true}\n':
            raise ConnectionError("somebody else's server answers there")
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
        try:
            for line in self.file:
                message = json.loads(line)
                if "lost" in message:
                    return self.lost(message["lost"])
                self.answers.put(message["all"])
        except (OSError, ValueError, KeyError):
            pass
        return None if self.closed else self.lost("the scheduler of msrun")

    def gather(self, value: Any) -> list:
        """Everybody's value in the workers' order, once all have given theirs; waits as long as it takes."""
        self._send({"say": value})
        return self.answers.get()

    def close(self) -> None:
        self.closed = True
        self._send({"bye": True})
        self.socket.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """The server as a child of the scheduler: host, port and number of workers are its arguments."""
    host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = os.getppid()
    try:
        meeting = Meeting(host, port, count)
    except OSError as error:
        print(
            f"Error: no worker can meet the others at {host}:{port}, the port after msrun's --master_port: {error}",
            flush=True,
        )
        return
    if lost := meeting.run():
        # msrun shows the lines of the scheduler's log that have Error in them once the scheduler is gone.
        print(
            f"Error: {lost} ended before the job was done; what it said last is in its log. The job ends. "
            "Go on with the same command and --resume_from_checkpoint latest.",
            flush=True,
        )
        if os.getppid() == scheduler:
            os.kill(scheduler, signal.SIGKILL)  # else it would wait half a minute for the dead


if __name__ == "__main__":
    main()
