"""Where the workers of a job meet: a small server beside msrun's scheduler, and the line that each worker has to it.

MindSpore's collectives carry gradients; what the workers say to one another (a loss, "stop", "I am here") goes this way, for two
reasons. A collective on the CPU gives up after 30 seconds, and worker 0 may draw pictures for longer. And a worker that is killed closes
its line, so that the job ends at once with its number: msrun kills the others and names the wrong one half a minute later.
Nothing here imports MindSpore, so the server starts fast and costs little.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable

CONNECT_SECONDS = 60


class Meeting:
    """The server's side: answers when all `count` workers have spoken, and ends when all have left or one is lost."""

    def __init__(self, host: str, port: int, count: int) -> None:
        self.server = socket.create_server((host, port), backlog=count)
        self.count, self.lock = count, threading.Lock()
        self.files: dict[int, Any] = {}
        self.said: dict[int, Any] = {}
        self.left: set[int] = set()
        self.over: queue.SimpleQueue = queue.SimpleQueue()

    def run(self) -> str:
        """Serves until the end; returns "" or which worker was lost."""
        threading.Thread(target=self._accept, daemon=True).start()
        lost = self.over.get()
        if lost:
            with self.lock:
                self._tell({"lost": lost})
        return lost

    def _accept(self) -> None:
        while True:
            connection, _ = self.server.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is switched off says nothing
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        file, hello = connection.makefile("rw"), None
        try:
            hello = json.loads(file.readline())
            number = hello["worker"]
            self.files[number] = file
            for line in file:
                message = json.loads(line)
                if "bye" in message:
                    self.left.add(number)
                    break
                with self.lock:
                    self.said[number] = message["say"]
                    if len(self.said) == self.count:
                        everything = [self.said[n] for n in range(self.count)]
                        self.said.clear()
                        self._tell({"all": everything})
        except (OSError, ValueError, KeyError, TypeError):
            if not isinstance(hello, dict) or "worker" not in hello:
                return  # a stranger
        if number not in self.left:
            self.over.put(f"worker {number} of {self.count} (process {hello['process']} on {hello['host']})")
        elif len(self.left) == self.count:
            self.over.put("")

    def _tell(self, message: dict) -> None:
        text = json.dumps(message) + "\n"
        for number, file in self.files.items():
            if number not in self.left:
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    pass  # its own listener notices


class Line:
    """A worker's side. `lost` is called, in a thread of its own, with a text when another worker or the server is gone."""

    def __init__(self, host: str, port: int, worker: int, lost: Callable[[str], None]) -> None:
        self.socket = self._connect(host, port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file, self.lost, self.closed = self.socket.makefile("rw"), lost, False
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self._send({"worker": worker, "process": os.getpid(), "host": socket.gethostname()})
        threading.Thread(target=self._listen, daemon=True).start()

    def _connect(self, host: str, port: int) -> socket.socket:
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return socket.create_connection((host, port))
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
                    self.lost(message["lost"])
                self.answers.put(message["all"])
        except (OSError, ValueError, KeyError):
            pass
        if not self.closed:
            self.lost("the scheduler of msrun")

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
        lost = f"the port after msrun's --master_port, {port}, cannot be used ({error}); give another --master_port"
    else:
        lost = meeting.run()
        if lost:
            lost += " ended before the job was done; what it said last is in its log"
    if lost:
        # msrun shows the lines of the scheduler's log that have Error in them once the scheduler is gone.
        print(f"Error: {lost}. The job ends. Go on with the same command and --resume_from_checkpoint latest.", flush=True)
        if os.getppid() == scheduler:
            os.kill(scheduler, signal.SIGKILL)  # else it would wait half a minute for the dead


if __name__ == "__main__":
    main()
