"""The place where workers meet: who waits for whom, and who is named when one is lost. No MindSpore, real sockets and processes."""

import queue
import socket
import subprocess
import sys
import threading
import time

import pytest

from mindtune.distributed import rendezvous


@pytest.fixture
def hall():
    """hall(count): a running server, with `port`, `line(number)` to join it, `lost` (what lines were told) and `ended` (what run gave)."""
    opened = []

    class Hall:
        def __init__(self, count):
            self.server = rendezvous.Meeting("127.0.0.1", 0, count)
            self.port = self.server.server.getsockname()[1]
            self.lost, self.ended = queue.Queue(), queue.Queue()
            threading.Thread(target=lambda: self.ended.put(self.server.run()), daemon=True).start()

        def line(self, number):
            opened.append(rendezvous.Line("127.0.0.1", self.port, number, lambda who: self.lost.put((number, who))))
            return opened[-1]

    yield Hall
    for line in opened:
        line.closed = True
        line.socket.close()


def together(lines, values):
    """What each line gathers, called in threads as processes would."""
    found = [None] * len(lines)

    def gather(number):
        found[number] = lines[number].gather(values[number])

    threads = [threading.Thread(target=gather, args=(number,)) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_everybody_gets_everybodys_value_in_the_workers_order(hall):
    room = hall(3)
    lines = [room.line(number) for number in (2, 0, 1)]
    for round_ in range(20):
        values = [{"worker": number, "round": round_, "loss": [0.1, float("inf")]} for number in (2, 0, 1)]
        assert together(lines, values) == [[values[1], values[2], values[0]]] * 3
    large = ["x" * 300_000] * 3  # more than one packet
    assert together(lines, large) == [large] * 3


def test_nobody_goes_on_before_the_last_has_come(hall):
    room = hall(2)
    first, second = room.line(0), room.line(1)
    early = threading.Thread(target=first.gather, args=(None,))
    early.start()
    early.join(0.3)
    assert early.is_alive()
    assert second.gather("late") == [None, "late"]
    early.join(10)
    assert not early.is_alive()


def test_a_worker_that_is_gone_without_goodbye_is_named_to_all_others(hall):
    room = hall(3)
    lines = [room.line(number) for number in range(3)]
    lines[1].closed = True  # its own listener shall say nothing
    lines[1].socket.shutdown(socket.SHUT_RDWR)
    assert "worker 1 of 3 (process " in room.ended.get(timeout=10)
    told = dict(room.lost.get(timeout=10) for _ in range(2))
    assert set(told) == {0, 2} and all("worker 1 of 3" in who for who in told.values())


def test_the_server_ends_in_peace_when_all_have_said_goodbye(hall):
    room = hall(2)
    for line in [room.line(0), room.line(1)]:
        line.close()
    assert room.ended.get(timeout=10) == "" and room.lost.empty()


def test_a_stranger_changes_nothing(hall):
    room = hall(2)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"say": 1}\n', b"[]\n", b""):
        with socket.create_connection(("127.0.0.1", room.port)) as stranger:
            stranger.sendall(words)
    assert together([room.line(0), room.line(1)], [1, 2]) == [[1, 2]] * 2 and room.ended.empty()


def test_a_line_notices_that_another_server_answers_or_none(monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError):
        rendezvous.Line("127.0.0.1", silent.getsockname()[1], 0, print)
    with pytest.raises(OSError):
        rendezvous.Line("127.0.0.1", silent.getsockname()[1], 0, print)


def test_the_server_ends_the_process_that_started_it_and_says_why(tmp_path):
    """As the scheduler starts it. Half a minute after a worker's end MindSpore's scheduler would still wait for it."""
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]]); time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with open(tmp_path / "log", "w") as log:
        scheduler = subprocess.Popen(
            [sys.executable, "-c", parent, rendezvous.__file__, "127.0.0.1", str(port), "2"], stdout=log
        )
    line = rendezvous.Line("127.0.0.1", port, 1, print)
    line.closed = True
    since = time.monotonic()
    line.socket.shutdown(socket.SHUT_RDWR)
    assert scheduler.wait(timeout=10) == -9 and time.monotonic() - since < 5
    assert (tmp_path / "log").read_text().startswith("Error: worker 1 of 2 (process ")
