"""Parsers of scripts, caught without running them, and command lines made of values."""

import argparse
import shlex

import pytest
from conftest import ROOT, TRAINING_SCRIPTS

from mindtune.cli import UserError
from mindtune.data.buckets import parse_resolution
from mindtune.flags.parser import Parser
from mindtune.flags.script_parser import command_words, raise_errors, read_values, script_parser


@pytest.fixture
def parser():
    parser = Parser("Does a job.")
    parser.add("steps", "n", type=int, default=4, minimum=1, help="Steps.")
    parser.add("mean", type=float, default=0.0, help="Mean.")
    parser.add("prompt", help="Prompt.")
    parser.add("prompts", nargs="+", default=[], help="Prompts.")
    parser.add("mode", choices=["a", "b"], default="a", help="Mode.")
    parser.add("fast", default=False, help="Fast.")
    parser.add("resolution", type=parse_resolution, default=512, help="One or several.")
    raise_errors(parser)
    return parser


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_the_parser_of_a_script_has_its_flags(script):
    original = argparse.ArgumentParser.parse_args
    parser = script_parser(ROOT / script)
    assert argparse.ArgumentParser.parse_args is original
    assert {"pretrained_model_name_or_path", "output_dir", "learning_rate"} < parser.declared.keys()
    assert parser.get_default("learning_rate") > 0


def test_a_script_that_does_not_parse_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def parse_args(argv=None):\n    return 1\n")
    with pytest.raises(ValueError, match="script.py: parse_args does not parse"):
        script_parser(script)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--steps 3 --mean=-0.5 --mode b --fast",
        "--prompts 'a cat' \"it's\" 'é; $HOME' --steps 9",
        "--prompt='--fast'",
        "--prompt=-",
        "--prompt ''",
        "--steps 3 --prompts one",
        "--resolution 512,768",
        "--resolution 64",
    ],
)
def test_values_of_a_command_line_give_the_same_values_again(parser, line):
    values = read_values(parser, shlex.split(line))
    words = command_words(parser, values)
    assert vars(argparse.ArgumentParser.parse_args(parser, words)) == values
    assert shlex.split(shlex.join(words)) == words


def test_defaults_are_left_out(parser):
    assert command_words(parser, read_values(parser, ["--n", "4", "--mode", "a", "--fast", "--prompt=x"])) == [
        *("--prompt", "x"),
        "--fast",
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--steps many", "argument --steps/--n: invalid int value: 'many'"),
        ("--step 3", "unrecognized arguments: --step 3"),  # no abbreviations
        ("--mode c", "argument --mode: invalid choice: 'c'"),
        ("word", "unrecognized arguments: word"),
        ("--help", "--help: only on a command line"),
    ],
)
def test_errors_of_argparse_do_not_end_the_process(parser, line, message):
    with pytest.raises(UserError) as caught:
        read_values(parser, shlex.split(line))
    assert str(caught.value).startswith(message)


def test_bounds_are_checked_when_a_command_line_is_made(parser):
    values = read_values(parser, ["--steps", "0"])
    with pytest.raises(UserError, match="--steps 0: must be at least 1"):
        command_words(parser, values)


@pytest.mark.parametrize("values", [["--fast"], ["a", "--prompt=x"], ["--", "--fast"], ["-x"]])
def test_a_value_of_a_list_cannot_become_a_flag(parser, values):
    with pytest.raises(UserError, match="--prompt"):
        command_words(parser, {**read_values(parser, []), "prompts": values})
