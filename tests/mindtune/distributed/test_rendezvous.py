"""Messages between ranks: who waits for whom, and which rank is named when one is lost. Real sockets, no MindSpore."""

import queue
import socket
import subprocess
import sys
import threading
import time

import pytest

from mindtune.distributed import rendezvous


@pytest.fixture
def serve():
    """serve(world_size): a running server. `lost` has what ranks were told, `ended` the result of `Server.run`."""
    connections = []

    class Running:
        def __init__(self, world_size):
            self.server = rendezvous.Server("127.0.0.1", 0, world_size)
            self.port = self.server.socket.getsockname()[1]
            self.lost, self.ended = queue.Queue(), queue.Queue()
            threading.Thread(target=lambda: self.ended.put(self.server.run()), daemon=True).start()

        def connect(self, rank):
            connection = rendezvous.Connection("127.0.0.1", self.port, rank, lambda lost: self.lost.put((rank, lost)))
            connections.append(connection)
            return connection

    yield Running
    for connection in connections:
        connection.closed = True
        connection.socket.close()


def all_gather(connections, values):
    """What every connection gathers, called in threads as separate processes would."""
    found = [None] * len(connections)

    def gather(index):
        found[index] = connections[index].all_gather(values[index])

    threads = [threading.Thread(target=gather, args=(index,)) for index in range(len(connections))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_every_rank_gets_all_values_in_the_order_of_ranks(serve):
    server = serve(3)
    connections = [server.connect(rank) for rank in (2, 0, 1)]
    for round_ in range(20):
        values = [{"rank": rank, "round": round_, "loss": [0.1, float("inf")]} for rank in (2, 0, 1)]
        assert all_gather(connections, values) == [[values[1], values[2], values[0]]] * 3
    large = ["x" * 300_000] * 3  # more than one packet
    assert all_gather(connections, large) == [large] * 3


def test_a_rank_waits_for_the_last_one(serve):
    server = serve(2)
    first, second = server.connect(0), server.connect(1)
    early = threading.Thread(target=first.all_gather, args=(None,))
    early.start()
    early.join(0.3)
    assert early.is_alive()
    assert second.all_gather("late") == [None, "late"]
    early.join(10)
    assert not early.is_alive()


def test_a_rank_that_disconnects_without_leaving_is_named_to_all_others(serve):
    server = serve(3)
    connections = [server.connect(rank) for rank in range(3)]
    connections[1].closed = True  # so that its own thread does not report the server's loss
    connections[1].socket.shutdown(socket.SHUT_RDWR)
    assert "rank 1 of 3 (process " in server.ended.get(timeout=10)
    told = dict(server.lost.get(timeout=10) for _ in range(2))
    assert set(told) == {0, 2} and all("rank 1 of 3" in lost for lost in told.values())


def test_the_server_ends_without_a_loss_when_all_ranks_have_left(serve):
    server = serve(2)
    for connection in [server.connect(0), server.connect(1)]:
        connection.close()
    assert server.ended.get(timeout=10) == "" and server.lost.empty()


def test_connections_that_are_no_ranks_change_nothing(serve):
    server = serve(2)
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b'{"value": 1}\n', b"[]\n", b""):
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(sent)
    assert all_gather([server.connect(0), server.connect(1)], [1, 2]) == [[1, 2]] * 2 and server.ended.empty()


def test_no_answer_or_another_programs_answer_raises_an_error(monkeypatch):
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError):
        rendezvous.Connection("127.0.0.1", silent.getsockname()[1], 0, print)
    with pytest.raises(OSError):
        rendezvous.Connection("127.0.0.1", silent.getsockname()[1], 0, print)


def test_the_server_kills_the_scheduler_and_prints_why(tmp_path):
    """The server runs as a child of the scheduler, which would otherwise wait half a minute for the lost rank."""
    scheduler_code = "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]]); time.sleep(60)"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", scheduler_code, rendezvous.__file__, "127.0.0.1", str(port), "2"]
    with open(tmp_path / "log", "w") as log:
        scheduler = subprocess.Popen(command, stdout=log)
    connection = rendezvous.Connection("127.0.0.1", port, 1, print)
    connection.closed = True
    since = time.monotonic()
    connection.socket.shutdown(socket.SHUT_RDWR)
    assert scheduler.wait(timeout=10) == -9 and time.monotonic() - since < 5
    assert (tmp_path / "log").read_text().startswith("Error: rank 1 of 2 (process ")
