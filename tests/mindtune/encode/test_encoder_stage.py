"""The encoder stage: cache keys, what is encoded by which rank, and how failures of the child process are reported."""

import hashlib
import io
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import encode_here
from safetensors.numpy import save_file

from mindtune.cli import UserError
from mindtune.data.image_sample import Sample
from mindtune.distributed import ranks
from mindtune.encode import encoder_stage, text_encoders
from mindtune.models import tokenization


@pytest.fixture
def stage(tiny_flux, tmp_path):
    """stage(**changes): a stage on the tiny pipeline, with changed settings."""

    def make(**changes):
        settings = {
            "root": tiny_flux,
            "variant": None,
            "precision": "no",
            "cache_dir": tmp_path / "cache",
            "max_sequence_length": 16,
        }
        return encoder_stage.EncoderStage(**{**settings, **changes})

    return make


# ---- cache keys ----------------------------------------------------------------------------------


def changed_copy(root, out, part, name):
    """A copy of the pipeline with one changed bit in one weight."""
    shutil.copytree(root, out)
    content = bytearray((out / part / name).read_bytes())
    content[-5] ^= 1
    (out / part / name).write_bytes(content)
    return out


@pytest.mark.parametrize("encoder, tokenizer", [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")])
def test_a_text_key_depends_on_everything_that_affects_the_embedding(stage, tiny_flux, tmp_path, encoder, tokenizer):
    def key(caption="a cat", **changes):
        return stage(**changes).text_key(encoder, caption)

    root = changed_copy(tiny_flux, tmp_path / "flux", encoder, "model.safetensors")
    config = Path(shutil.copytree(tiny_flux, tmp_path / "other")) / tokenizer / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    others = [key("a dog"), key(precision="fp16"), key(root=root), key(root=tmp_path / "other")]
    assert len({key(), *others}) == 5
    assert (key(max_sequence_length=8) == key()) == (encoder == "text_encoder")  # CLIP always reads 77 tokens
    assert key(cache_dir=tmp_path / "elsewhere", interpolation="nearest") == key()


def test_an_image_key_depends_on_the_bytes_and_the_preprocessing(stage, photos, tiny_flux, tmp_path):
    one, two = (Sample(path.name, path) for path in sorted(photos.glob("*.png"))[:2])
    root = changed_copy(tiny_flux, tmp_path / "vae", "vae", "diffusion_pytorch_model.safetensors")
    images = [(one, 32, False), (one, 32, True), (two, 32, False), (one, 64, False)]
    images += [(one, (32, 48), False), (one, (48, 32), False)]
    keys = [stage().image_key(*image) for image in images]
    stages = (stage(interpolation="nearest"), stage(precision="fp16"), stage(root=root))
    keys += [changed.image_key(one, 32, False) for changed in stages]
    assert len(set(keys)) == 9
    renamed = tmp_path / "renamed.png"
    renamed.write_bytes(one.read())
    assert stage().image_key(Sample("another name", renamed), 32, False) == keys[0]


def test_the_parts_of_a_text_key(stage, monkeypatch):
    """With any other parts, existing caches would be encoded again."""
    fixed = stage()
    fixed.fingerprints = {"text_encoder": "a", "text_encoder_2": "b", "vae": "c"}
    monkeypatch.setattr(encoder_stage, "MINDONE", "0")
    monkeypatch.setattr(encoder_stage.EncoderStage, "_made_by", lambda self, precision: ["made"])
    key_of = encoder_stage.key_of
    assert fixed.text_key("text_encoder", "cat") == key_of(
        kind="flux text_encoder", caption="cat", length=None, encoder="a", made_by=["made"]
    )
    assert fixed.text_key("text_encoder_2", "cat") == key_of(
        kind="flux text_encoder_2", caption="cat", length=16, encoder="b", made_by=["made", "exact buckets"]
    )


# ---- long captions -------------------------------------------------------------------------------


def test_long_captions_are_counted_once_each_by_the_tokenizer(stage, tiny_flux):
    long = " ".join(["circle"] * 40)
    tokens = len(tokenization.load_tokenizer(tiny_flux / "tokenizer_2")(long + " cat").input_ids)
    (message,) = stage().long_captions(["a cat", long, long, long + " cat"])
    assert message.startswith(f"2 captions are longer than T5 reads: 16 tokens, the longest has {tokens}.")
    assert "Raise --max_sequence_length" in message
    assert stage(max_sequence_length=tokens).long_captions([long, long + " cat"]) == []
    (message,) = stage(system="sd").long_captions([" ".join(["circle"] * 100)])
    assert message.startswith("1 caption is longer than CLIP reads: 77 tokens")
    assert "--max_sequence_length" not in message


def test_the_message_about_long_captions():
    message = text_encoders.long_captions_message
    assert message([3, 77, 20], 77, "CLIP") == []
    (text,) = message([78, 5, 120], 77, "CLIP")
    assert text.startswith("2 captions are longer than CLIP reads: 77 tokens, the longest has 120.")
    (text,) = message(iter([600]), 256, "T5", "--max_sequence_length")
    assert text.startswith("1 caption is longer than T5 reads") and "Raise --max_sequence_length" in text


# ---- several ranks -------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, world_size): makes this process that rank; `all_gather` returns only its own value."""

    def become(rank, world_size):
        monkeypatch.setattr(ranks, "_rank", rank)
        monkeypatch.setattr(ranks, "_world_size", world_size)

    return become


def test_ranks_encode_disjoint_shards_of_what_the_cache_lacks(as_rank, monkeypatch, stage, photos):
    encoder = stage()
    samples = [Sample(path.name, path) for path in sorted(photos.glob("*.png"))]
    images = [(sample, 32, flip) for sample in samples for flip in (False, True)]
    keys = {encoder.image_key(*image) for image in images}
    cached = sorted(keys)[3]
    encoder.cache.put(cached, {"moments": np.zeros(3, np.float32)})
    captions = ["a", "b", "c", "a", "d", "e"]
    shards = [[], []]

    def note(job):
        shards[1].append({encoder.image_key(*image) for image in job.images})
        shards[0].append(set(job.captions()))

    monkeypatch.setattr(encoder_stage, "run_in_child", note)
    monkeypatch.setattr(encoder, "_wait_for_entries", lambda *missing: None)
    for rank in range(3):
        as_rank(rank, 3)
        assert encoder.prepare(captions, images) == 5 + 9
    for parts, everything in zip(shards, (set(captions), keys - {cached})):
        assert set.union(*parts) == everything and sum(map(len, parts)) == len(everything)


def test_a_cache_that_other_machines_do_not_share_is_reported(as_rank, monkeypatch, stage):
    encoder = stage()
    as_rank(0, 2)
    slept = []
    monkeypatch.setattr(encoder_stage.time, "sleep", slept.append)
    monkeypatch.setattr(encoder_stage.time, "monotonic", lambda: len(slept))
    with pytest.raises(UserError, match="another rank wrote it, .* Give a --cache_dir that all machines share"):
        encoder._wait_for_entries(["a"], [])
    assert len(slept) == 61
    encoder.cache.put("here", {"moments": np.zeros(3, np.float32)})
    encoder._wait_for_entries([], ["here"])


def test_shards_do_not_depend_on_what_a_rank_finds(as_rank, monkeypatch, stage):
    """Another run may write into the same cache while the ranks list it: still each caption has one rank."""
    encoder = stage()
    shards = []

    def note(job):
        list(job.images)
        shards.append(set(job.captions()))

    monkeypatch.setattr(encoder_stage, "run_in_child", note)
    monkeypatch.setattr(encoder, "_wait_for_entries", lambda *missing: None)
    captions = [f"caption {number}" for number in range(40)]
    for rank in range(3):
        as_rank(rank, 3)
        encoder.prepare(captions, [])
        for name in ("text_encoder", "text_encoder_2"):
            encoder.cache.put(encoder.text_key(name, captions[rank]), {"x": np.zeros(1, np.float32)})
    assert sum(map(len, shards)) >= 38 and set.union(*shards) >= set(captions[2:])
    assert not shards[0] & shards[1] and not shards[1] & shards[2]


def test_entries_that_stay_are_kept_from_a_window(encoded, monkeypatch):
    """Of a run in windows before: a run that needs them to the end makes them permanent."""
    encoder, image = encoded
    key = encoder.image_key(*image)
    os.makedirs(encoder.cache.windows)
    os.replace(encoder.cache.path(key), encoder.cache.windows / f"{key}.safetensors")
    encoder.prepare(["a cat"], [image])
    encoder.cache.evict(0, keep=set())
    assert encoder.cache.get(key) is not None


def test_an_image_that_changes_after_the_check_is_refused(stage, photos, tmp_path, monkeypatch):
    """Its entry would have the name of the image that it was."""
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    paths = sorted(photos.glob("*.png"))[:2]
    sample = Sample("one", tmp_path / "one.png", known_digest=Sample("", paths[0]).digest)
    shutil.copy(paths[1], tmp_path / "one.png")
    with pytest.raises(UserError, match="one: has changed since it was checked"):
        stage().prepare([], [(sample, 32, False)])


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, message", [(-9, "killed by signal 9"), (1, "failed with exit code 1"), (2, "its message is above")]
)
def test_a_failed_child_process_raises_an_error(stage, monkeypatch, code, message):
    class Failed:
        stdin = io.BytesIO()

        def __init__(self, *_, **__):
            pass

        def wait(self):
            return code

    monkeypatch.setattr(subprocess, "Popen", Failed)
    with pytest.raises(UserError, match=f"the encoder stage .*{message}"):
        stage().prepare(["a cat"], [])


@pytest.fixture
def encoded(stage, photos, monkeypatch):
    """A stage with a caption and an image in its cache, and the image. The encoders run in this process."""
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    encoder = stage()
    path = sorted(photos.glob("*.png"))[0]
    image = (Sample(path.name, path), 32, False)
    assert encoder.prepare(["a cat"], [image]) == 2
    return encoder, image


@pytest.mark.parametrize("damage", ["deleted", "truncated", "one bit"])
def test_a_bad_entry_is_encoded_again_when_it_is_used(encoded, damage, capfd):
    encoder, image = encoded
    text, moments = encoder.text("a cat"), encoder.moments(*image)
    encoder_stage._read_entry.cache_clear()
    for key in (encoder.text_key("text_encoder_2", "a cat"), encoder.image_key(*image)):
        path = encoder.cache.path(key)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.unlink()
        if damage != "deleted":
            path.write_bytes(content[:-7] if damage == "truncated" else content)
    again = encoder.text("a cat")
    for name, value in text.items():
        np.testing.assert_array_equal(again[name], value)
    np.testing.assert_array_equal(encoder.moments(*image), moments)
    assert capfd.readouterr().out.count("damaged or deleted, so it is encoded again") == 2


def test_threads_that_need_the_same_bad_entry_encode_it_once(encoded, monkeypatch):
    encoder, _ = encoded
    encoder.cache.path(encoder.text_key("text_encoder_2", "a cat")).unlink()
    jobs = []

    def note(job):
        jobs.append(job)
        encode_here(job)

    monkeypatch.setattr(encoder_stage, "run_in_child", note)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.text, ["a cat"] * 4))
    assert len(jobs) == 1 and len(found) == 4


def test_an_entry_that_cannot_be_written_is_named(stage, monkeypatch):
    monkeypatch.setattr(encoder_stage, "run_in_child", lambda job: None)
    with pytest.raises(UserError, match=r"\.safetensors: was encoded again and cannot be read"):
        stage().text("never encoded")


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, stored", [("no", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_entries_have_the_dtype_of_use(stage, photos, monkeypatch, precision, stored):
    """And are read as float32 of the same values."""
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    encoder = stage(precision=precision)
    path = sorted(photos.glob("*.png"))[0]
    image = (Sample(path.name, path), 32, False)
    encoder.prepare(["a cat"], [image])
    keys = [encoder.text_key(name, "a cat") for name in ("text_encoder", "text_encoder_2")]
    values = [*encoder.text("a cat").values(), encoder.moments(*image)]
    for key, value in zip([*keys, encoder.image_key(*image)], values):
        (entry,) = encoder.cache.get(key).values()
        assert entry.dtype == stored and value.dtype == np.float32 and value.any()
        np.testing.assert_array_equal(entry.astype(np.float32), value)


def test_a_float32_entry_of_an_older_version_is_used_as_if_it_were_new(stage, monkeypatch):
    """Of version 0.1.0: with a SHA-256 checksum. Its values are rounded as those of a new entry."""
    monkeypatch.setattr(encoder_stage, "run_in_child", lambda job: pytest.fail("encoded again"))
    encoder = stage(precision="bf16", system="sd")
    old = {"prompt_embeds": np.random.default_rng(0).standard_normal((77, 32), dtype=np.float32)}
    digest = hashlib.sha256(f"prompt_embeds/float32/{(77, 32)}/".encode() + old["prompt_embeds"].tobytes())
    key = encoder.text_key("text_encoder", "a cat")
    encoder.cache.folder.mkdir(parents=True)
    save_file(old, encoder.cache.path(key), metadata={"key": key, "checksum": digest.hexdigest()})
    rounded = old["prompt_embeds"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(encoder.text("a cat")["prompt_embeds"], rounded)
