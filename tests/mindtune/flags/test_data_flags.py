"""Flags of the data of a script."""

import pytest

from mindtune.data.columns import Source
from mindtune.flags import data_flags, image_flags
from mindtune.flags.parser import Parser


@pytest.fixture
def parser():
    """parser(**options): the flags of pairs."""

    def make(**options):
        found = Parser("Trains.")
        data_flags.pairs(found, **options)
        found.add("max_train_steps", type=int, help="Updates.")
        image_flags.images(found, sample="pair", multiple=16, smallest=16)
        return found

    return make


def help_of(parser, name):
    return next(action.help for action in parser._actions if action.dest == name)


def test_the_help_names_what_a_script_calls_a_condition(parser):
    column = "conditioning_image_column"
    assert help_of(parser(), column) == "Column of the condition images. Default: the first that starts with condition."
    found = parser(conditions="sources", without="a pair without one is text-to-image", aliases=("cond_image_column",))
    assert help_of(found, column) == (
        "Column of the sources; a pair without one is text-to-image. Default: the first that starts with condition."
    )
    assert help_of(found, "jsonl_for_train").endswith("whose lines have image, text and perhaps conditioning_image.")


def test_an_alias_sets_the_same_flag(parser):
    found = parser(aliases=("cond_image_column",))
    args = found.parse_args(["--train_data_dir", "x", "--cond_image_column", "source"])
    assert args.conditioning_image_column == "source"
    assert args.select(Source, condition_optional=True) == Source(
        train_data_dir="x", conditioning_image_column="source", condition_optional=True
    )
