"""Functions for several ranks, in one process. tests/flux_lora/test_workers.py has two real ranks (rank_checks.py)."""

import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import pair_data, pair_stream, pairs
from mindtune.distributed import ranks


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, world_size): makes this process that rank; `all_gather` returns only its own value."""

    def become(rank, world_size):
        monkeypatch.setattr(ranks, "_rank", rank)
        monkeypatch.setattr(ranks, "_world_size", world_size)

    return become


def test_a_single_rank_is_the_main_process_and_waits_for_nobody():
    assert (ranks.rank(), ranks.world_size(), ranks.is_main_process()) == (0, 1, True)
    assert ranks.all_gather("value") == ["value"]
    assert ranks.on_main_process(max, 1, 2) == 2
    assert ranks.shard([1, 2, 3]) == [1, 2, 3]
    ranks.set_up(False)
    ranks.require_same("anything", "--flag")
    ranks.finish()


def test_msrun_and_distributed_need_each_other(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.setattr("sys.argv", ["train.py", "--prompt", "a cat", "--distributed"])
    with pytest.raises(UserError, match="--join=True --log_dir=workers train.py --prompt 'a cat' --distributed"):
        ranks.set_up(True)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    with pytest.raises(UserError, match="msrun started this script without --distributed"):
        ranks.set_up(False)


def test_ranks_that_find_different_files_raise_an_error(monkeypatch):
    monkeypatch.setattr(ranks, "all_gather", lambda value: [value, None])
    with pytest.raises(UserError, match="--output_dir: rank 0 finds here, rank 1 finds None"):
        ranks.require_same("here", "--output_dir")


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def pairs_of_two_sizes(tmp_path):
    """A source of seven pairs, alternately wide and tall, and their two buckets."""
    lines = []
    for number in range(7):
        Image.new("RGB", (48, 32) if number % 2 else (32, 48), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f'{{"image": "{number}.png", "conditioning_image": "{number}.png", "text": "pair {number}"}}')
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = pairs.Source(jsonl_for_train=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    return source, [(32, 48), (48, 32)]


def batches_of(data, first, last):
    """Per batch its [(caption, (sample id, use), size), ...]."""
    return list(data.iterate(first, last, lambda uses: [(use[0].caption, use[2].key, use[1]) for use in uses], 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_shards_of_all_ranks_are_the_batches_of_one_rank(as_rank, pairs_of_two_sizes, streaming):
    """In order and without a gap, for buckets and for a stream; no world size here divides the 7 pairs."""
    source, buckets = pairs_of_two_sizes
    found = pair_stream.PairStream(source, 0, 3) if streaming else pairs.load_pairs(source)
    sizes = buckets[:1] if streaming else buckets
    data = pair_data.PairData(found, [], sizes=sizes, seed=0, batch_size=2)
    expected = batches_of(data, 6, 18)
    for world_size in (2, 3):
        shards = []
        for rank in range(world_size):
            as_rank(rank, world_size)
            shards.append(batches_of(data, 6, 18))
        as_rank(0, 1)
        assert [batch for turn in zip(*shards) for batch in turn] == expected
