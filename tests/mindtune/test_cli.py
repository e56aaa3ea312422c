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
        cli.run_script(fail)
    assert caught.value.code == 2 and "error: the disk is full" in capsys.readouterr().err


def test_other_errors_are_not_reported_as_a_full_disk(own_signals):
    def fail():
        raise SafetensorError("header too large")

    with pytest.raises(SafetensorError):
        cli.run_script(fail)


def test_the_first_signal_sets_the_exit_code_and_the_second_stops_at_once(own_signals):
    """MindSpore passes SIGINT on as SIGTERM while it computes, so either may come first or second."""
    stop = cli.StopRequest()
    assert stop.exit_code is None
    signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- flags and messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, images, expected",
    [
        (["x", "y"], ["a", "b"], [("x", "a"), ("y", "b")]),
        (["x", "y"], ["a"], [("x", "a"), ("y", "a")]),
        (["x"], ["a", "b"], [("x", "a"), ("x", "b")]),
        ([], [], []),
    ],
)
def test_prompts_are_matched_with_images(prompts, images, expected):
    assert cli.matched(prompts, images, "--prompt", "--image") == expected


@pytest.mark.parametrize("prompts, images", [(["x"], []), ([], ["a"]), (["x", "y"], ["a", "b", "c"])])
def test_numbers_of_prompts_and_images_that_differ_are_refused(prompts, images):
    with pytest.raises(cli.UserError, match=f"^--prompt has {len(prompts)} and --image {len(images)}: "):
        cli.matched(prompts, images, "--prompt", "--image")


def test_lists_are_shortened():
    names = [f"{n}.png" for n in range(7)]
    assert cli.short_list(names[:3]) == "0.png, 1.png, 2.png"
    assert cli.short_list(names) == "0.png, 1.png, 2.png and 4 more"
    assert cli.indented_list(names[:2]) == "  0.png\n  1.png"
    assert cli.indented_list(names, limit=2) == "  0.png\n  1.png\n  and 5 more"


def test_names_become_printable():
    assert cli.printable("a cat.png") == "a cat.png" and cli.printable("猫.png") == "猫.png"
    assert cli.printable("caf\udce9.png") == "caf\\xe9.png" and cli.printable("a\nb\x1b") == "a\\nb\\x1b"
    long = cli.printable("x" * 1000 + ".png")
    assert len(long) < 330 and "... (1004 characters) ..." in long and long.endswith(".png")
