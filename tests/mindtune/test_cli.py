"""Exit codes, interruption and the text of messages."""

import errno
import signal

import pytest
from safetensors import SafetensorError

from mindtune import cli


@pytest.fixture
def own_signals():
    """Restores the signal handlers of the test runner."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_reported_for_every_kind_of_error(capsys, own_signals, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(fail)
    assert caught.value.code == 2 and "error: the disk is full" in capsys.readouterr().err


def test_other_errors_are_not_reported_as_a_full_disk(own_signals):
    def fail():
        raise SafetensorError("header too large")

    with pytest.raises(SafetensorError):
        cli.run(fail)


def test_the_first_signal_sets_the_exit_code_and_the_second_stops_at_once(own_signals):
    """MindSpore passes SIGINT on as SIGTERM while it computes, so either may come first or second."""
    stop = cli.StopRequest()
    assert stop.exit_code is None
    signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
