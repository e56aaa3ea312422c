"""Captions that change from use to use."""

from collections import Counter

import pytest

from mindtune.data.captions import Settings, reorder_tags, variants, with_trigger_word
from mindtune.data.draws import TrainingDraws

TAGS = "1girl, red hair,smile , outdoors"


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a cat", "sks, a cat"),
        ("a photo of sks cat", "a photo of sks cat"),
        ("sks, a cat", "sks, a cat"),
        ("asks a question", "sks, asks a question"),  # not a part of a word
        ("", "sks"),
        (None, "sks"),
    ],
)
def test_a_trigger_word_is_added_once(caption, expected):
    assert with_trigger_word(caption, "sks") == expected
    assert with_trigger_word(caption, None) == caption


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_tags_are_shuffled_but_the_first(keep):
    settings = Settings(shuffle_tags=True, keep_tags=keep)
    tags = [tag.strip() for tag in TAGS.split(",")]
    found = [reorder_tags(TAGS, settings, 0, order).split(", ") for order in range(200)]
    for each in found:
        assert each[:keep] == tags[:keep] and sorted(each) == sorted(tags)
    orders = {tuple(each) for each in found}
    assert len(orders) == {0: 24, 1: 6, 3: 1, 9: 1}[keep]


def test_the_trigger_word_stays_in_front():
    settings = Settings(shuffle_tags=True, keep_tags=1, trigger_word="sks")
    found = {reorder_tags("sks, a, b, c", settings, 0, order) for order in range(50)}
    assert found == {"sks, a, b, c", "sks, a, c, b"}


def test_a_trigger_of_two_tags_stays_in_front_and_so_does_a_tag_that_starts_with_it():
    settings = Settings(shuffle_tags=True, trigger_word="ohwx, man")
    found = {reorder_tags("ohwx, man, a, b", settings, 0, order) for order in range(50)}
    assert found == {"ohwx, man, a, b", "ohwx, man, b, a"}
    settings = Settings(shuffle_tags=True, trigger_word="sks")
    assert {reorder_tags("sks dog, a", settings, 0, order) for order in range(20)} == {"sks dog, a"}


def test_empty_tags_are_dropped():
    assert reorder_tags("a, , a,", Settings(shuffle_tags=True), 0, 1) == "a, a"


def test_uses_have_only_the_forms_that_are_encoded_and_all_of_them():
    """So the cache has at most --tag_orders entries per caption, and one for the empty caption."""
    settings = Settings(caption_dropout=0.25, shuffle_tags=True, tag_orders=4)
    encoded = variants(TAGS, settings, seed=3)
    assert len(encoded) <= 5 and encoded[-1] == ""
    uses = Counter(TrainingDraws(3, "instance", 7, use).caption(TAGS, settings) for use in range(2000))
    assert set(uses) == set(encoded)
    assert abs(uses[""] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert variants(TAGS, Settings(), seed=3) == [TAGS]


def test_draws_depend_on_seed_sample_and_use_alone():
    settings = Settings(caption_dropout=0.1, shuffle_tags=True)
    once, again = ([TrainingDraws(s, "instance", 1, use).caption(TAGS, settings) for use in range(40)] for s in (0, 0))
    assert once == again != [TrainingDraws(1, "instance", 1, use).caption(TAGS, settings) for use in range(40)]
