"""What workers do together, alone in one process; and, with two real ones, MindSpore's side of it (worker_checks.py)."""

import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data import pair_data, pair_stream, pairs
from mindtune.distributed import ranks
from mindtune.encode import encoder_stage


@pytest.fixture
def as_worker(monkeypatch):
    """as_worker(number, count): this process takes that worker's part; it hears only itself."""

    def become(number, count):
        monkeypatch.setattr(ranks, "_worker", number)
        monkeypatch.setattr(ranks, "_count", count)

    return become


def test_a_lone_worker_is_the_first_and_waits_for_nobody():
    assert (ranks.rank(), ranks.world_size(), ranks.is_main_process()) == (0, 1, True)
    assert (
        ranks.all_gather("said") == ["said"]
        and ranks.on_main_process(max, 1, 2) == 2
        and ranks.shard([1, 2, 3]) == [1, 2, 3]
    )
    ranks.set_up(False)
    ranks.require_same("anything", "--flag")
    ranks.finish()


def test_msrun_and_the_flag_come_together(monkeypatch):
    monkeypatch.delenv("MS_ROLE", raising=False)
    monkeypatch.setattr("sys.argv", ["train.py", "--prompt", "a cat", "--distributed"])
    with pytest.raises(UserError, match="--join=True --log_dir=workers train.py --prompt 'a cat' --distributed"):
        ranks.set_up(True)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    with pytest.raises(UserError, match="msrun started this without --distributed"):
        ranks.set_up(False)


def test_workers_that_see_other_files_say_so(monkeypatch):
    monkeypatch.setattr(ranks, "all_gather", lambda value: [value, None])
    with pytest.raises(UserError, match="--output_dir: worker 0 finds here, worker 1 None"):
        ranks.require_same("here", "--output_dir")


def uses(data, first, last):
    """[(pair, sample id, use), ...] of each batch, with its size."""
    return list(
        data.iterate(first, last, lambda batch, size: ([(pair.caption, *rest) for pair, *rest in batch], size), 1)
    )


def test_the_shares_of_all_workers_are_the_batches_of_one(as_worker, shapes_of_two_sizes):
    """In order and without gap, of buckets and of a stream, whatever the number of workers; 7 pairs are divided by none of these."""
    source, buckets = shapes_of_two_sizes
    for streaming in (False, True):
        found = pair_stream.PairStream(source, 0, 3) if streaming else pairs.load_pairs(source)
        data = pair_data.PairData(found, [], buckets[:1] if streaming else buckets, 0, 2)
        alone = uses(data, 6, 18)
        for count in (2, 3):
            shares = []
            for number in range(count):
                as_worker(number, count)
                shares.append(uses(data, 6, 18))
            as_worker(0, 1)
            assert [batch for turn in zip(*shares) for batch in turn] == alone


@pytest.fixture
def shapes_of_two_sizes(tmp_path):
    """A source of seven pairs, wide and tall by turns, and their two buckets."""
    from PIL import Image

    lines = []
    for number in range(7):
        Image.new("RGB", (48, 32) if number % 2 else (32, 48), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f'{{"image": "{number}.png", "conditioning_image": "{number}.png", "text": "pair {number}"}}')
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = pairs.Source(jsonl_for_train=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    return source, [(32, 48), (48, 32)]


def test_what_the_cache_lacks_is_shared_out_and_made_once(as_worker, monkeypatch, tiny_flux, photos, tmp_path):
    from mindtune.data.image_sample import Sample

    stage = encoder_stage.EncoderStage(tiny_flux, None, "no", tmp_path / "cache", 16)
    samples = [Sample(path.name, path) for path in sorted(photos.glob("*.png"))]
    images = [(sample, 32, flip) for sample in samples for flip in (False, True)]
    keys = {stage.image_key(*job) for job in images}
    there = sorted(keys)[3]
    stage.cache.put(there, {"moments": np.zeros(3, np.float32)})
    captions = ["a", "b", "c", "a", "d", "e"]
    shares = []
    monkeypatch.setattr(encoder_stage, "_in_child", shares.append)
    monkeypatch.setattr(stage, "_require", lambda *made: None)
    for number in range(3):
        as_worker(number, 3)
        assert stage.prepare(captions, images) == 5 + 9
    texts, made = [set(share[1]) for share in shares], [share[4] for share in shares]
    for parts, everything in ((texts, set(captions)), (made, keys - {there})):
        assert set.union(*parts) == everything and sum(map(len, parts)) == len(everything)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_cache_that_another_machine_does_not_show_is_said(as_worker, monkeypatch, tiny_flux, tmp_path):
    stage = encoder_stage.EncoderStage(tiny_flux, None, "no", tmp_path / "cache", 16)
    as_worker(0, 2)
    slept = []
    monkeypatch.setattr(encoder_stage.time, "sleep", slept.append)
    monkeypatch.setattr(encoder_stage.time, "monotonic", lambda: len(slept))
    with pytest.raises(
        UserError, match="another worker made it and it is not here. Give a --cache_dir that all machines share"
    ):
        stage._require(["a"], [])
    assert len(slept) == 61
    stage.cache.put("here", {"moments": np.zeros(3, np.float32)})
    stage._require([], ["here"])


def test_two_real_workers(job, tmp_path):
    done = job("tests/mindtune/distributed/rank_checks.py", 2, tmp_path / "checks", [])
    assert done.wait() == 0, done.said()[-6000:]
    assert done.said().count("all checks passed") == 2
