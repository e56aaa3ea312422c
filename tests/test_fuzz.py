"""Damaged files at every door: a sentence or an orderly way on, never another exception, and nothing written.

Every case is drawn from a seed. A pipeline's files are checked as the scripts check them before anything large loads.
"""

import json
import struct

import numpy as np
import pytest
from conftest import load_script
from PIL import Image
from safetensors.numpy import save_file

from mindtune import check_data
from mindtune.cli import UserError
from mindtune.data import checks, folders
from mindtune.data.columns import Source
from mindtune.data.pair_checks import preflight_pairs
from mindtune.data.pairs import load_pairs
from mindtune.encode import cache
from mindtune.models import loading, lora_files, pipelines, tokenization
from mindtune.models.precision import resolve_precision
from mindtune.run import checkpoint

PRECISION = resolve_precision("no")


def snapshot(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def orderly(function, *arguments, **more):
    """The sentence of a UserError, or None if there was nothing to say. Any other exception is the test's failure."""
    try:
        function(*arguments, **more)
    except UserError as error:
        assert (len(str(error)) > 20 and str(error).strip()[-1] in ".)]'\"") or "\n" in str(error), str(error)
        return str(error)
    return None


# ---- damage --------------------------------------------------------------------------------------


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, tensors):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def damaged_safetensors(content, random):
    """name -> bytes of a file that is no longer what it was."""
    header, tensors = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[random.integers(len(names))]

    def changed(**values):
        return with_header({**header, name: {**header[name], **values}}, tensors)

    begin, end = header[name]["data_offsets"]
    flipped = bytearray(content)
    for place in random.integers(8, min(len(content), 4000), 40):
        flipped[place] ^= 1 << random.integers(8)
    return {
        "empty": b"",
        "a few bytes": content[:5],
        "cut in the header": content[:60],
        "cut in the tensors": content[: -random.integers(1, max(2, len(tensors)))],
        "more bytes": content + b"xyz",
        "a header beyond the file": struct.pack("<Q", 1 << 40) + content[8:],
        "a header that is a list": with_header([1, 2], tensors),
        "a header that is a number": with_header(7, tensors),
        "a header that is no text": with_header(bytes(range(128, 256)), tensors),
        "a deep header": with_header(b"[" * 100_000, tensors),
        "an entry that is text": with_header({**header, name: "x"}, tensors),
        "no offsets": with_header({**header, name: {"dtype": "F32", "shape": [1]}}, tensors),
        "offsets of text": changed(data_offsets=["a", "b"]),
        "offsets beyond": changed(data_offsets=[begin, end + (1 << 40)]),
        "offsets backwards": changed(data_offsets=[end, begin]),
        "negative offsets": changed(data_offsets=[-8, end]),
        "an unknown type": changed(dtype="F12"),
        "another type": changed(dtype="U8"),
        "a shape that does not fit": changed(shape=[*header[name]["shape"], 3]),
        "a negative shape": changed(shape=[-1]),
        "a shape of text": changed(shape="many"),
        "metadata that is a list": with_header({**header, "__metadata__": [1]}, tensors),
        "flipped bits": bytes(flipped),
        "a pickle": b"\x80\x04\x95" + random.bytes(200),
        "noise": random.bytes(3000),
        "zeros": bytes(3000),
    }


def damaged_json(content, random):
    keys = list(json.loads(content))
    key = keys[random.integers(len(keys))]
    values = [None, -1, 10**30, 1.5, "x", [], {}, [[]], True, "\ud800", ["a", None]]
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "noise": random.bytes(400),
        "a list": b"[1, 2]",
        "a number": b"12",
        "deep": b'{"a":' * 100_000,
        "not UTF-8": content[:-2] + b'\xff"}',
        "a byte-order mark": b"\xef\xbb\xbf" + content,
        **{f"{key} is {value!r}": json.dumps({**json.loads(content), key: value}).encode() for value in values},
    }


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny_flux, tmp_path):
    """A copy whose weight files are links: what is damaged is written anew."""
    for path in tiny_flux.rglob("*"):
        target = tmp_path / "flux" / path.relative_to(tiny_flux)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "flux"


def resolve(root):
    return pipelines.resolve_pipeline(str(root), None, None, None, pipelines.FLUX_COMPONENTS)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_weights_are_named_before_anything_loads(pipeline, seed):
    random = np.random.default_rng(seed)
    files = sorted(pipeline.rglob("*.safetensors"))
    path = files[random.integers(len(files))]
    whole = path.read_bytes()
    for name, content in damaged_safetensors(whole, random).items():
        path.write_bytes(content)
        before = snapshot(pipeline)
        sentence = orderly(resolve, pipeline)
        if sentence is None:  # a whole file of something else: then the fit to the model is what refuses it
            sentence = orderly(loading.load_model, pipeline, path.parent.name, PRECISION)
        assert sentence is None or path.name in sentence or path.parent.name in sentence, name
        assert sentence or name in ("flipped bits",), name
        assert snapshot(pipeline) == before, name
    path.write_bytes(whole)
    assert orderly(resolve, pipeline) is None


CONFIGS = [
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json",
]


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configs_end_in_a_sentence(pipeline, name):
    """Checked; if nothing is found, the component is built, whose weights are then compared."""
    random, path = np.random.default_rng(len(name)), pipeline / name
    for case, content in damaged_json(path.read_bytes(), random).items():
        path.write_bytes(content)
        before = snapshot(pipeline)
        if orderly(resolve, pipeline) is None:
            part = path.parent.name
            if part.startswith("tokenizer"):
                orderly(tokenization.load_tokenizer, path.parent)
            elif part == "scheduler":
                orderly(loading.load_scheduler, pipeline)
            elif path.parent != pipeline:
                orderly(loading.load_model, pipeline, part, PRECISION)
        assert snapshot(pipeline) == before, case


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickled_weights_are_refused_by_name(pipeline, suffix):
    path = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(suffix))
    sentence = orderly(resolve, pipeline)
    assert f"diffusion_pytorch_model{suffix}" in sentence and "safetensors" in sentence and "run code" in sentence


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", 7, None, "a/../../x.safetensors"])
def test_an_index_names_no_file_outside_its_folder(pipeline, shard):
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": shard}}
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "diffusion_pytorch_model.safetensors.index.json" in orderly(resolve, pipeline)


# ---- adapters, checkpoints, the cache ------------------------------------------------------------


def small_lora(path):
    values = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{end}.weight": np.ones(shape, np.float32)
        for end, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(values, path, metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})})


@pytest.mark.parametrize("seed", range(3))
def test_damaged_loras(tmp_path, seed):
    path, random = tmp_path / "lora.safetensors", np.random.default_rng(seed)
    small_lora(path)
    whole = path.read_bytes()
    for name, content in damaged_safetensors(whole, random).items():
        path.write_bytes(content)
        sentence = orderly(lora_files.read_adapters, path, "--lora")
        assert sentence is None or str(path) in sentence, name
        assert path.read_bytes() == content
    odd = ['"x"', "null", "[]"]
    settings = ["[]", "7", "{", "[" * 100_000, *(f'{{"transformer.lora_alpha": {value}}}' for value in odd)]
    settings += [f'{{"transformer.alpha_pattern": {value}}}' for value in ("3", '{"[": 1}', '{"to_q": []}')]
    for text in settings:
        header, tensors = header_of(whole)
        path.write_bytes(with_header({**header, "__metadata__": {"lora_adapter_metadata": text}}, tensors))
        orderly(lora_files.read_adapters, path, "--lora")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_a_pickled_lora_is_refused_by_name(tmp_path, suffix):
    (tmp_path / f"lora{suffix}").write_bytes(b"\x80\x04")
    assert "run code" in orderly(lora_files.find_lora, str(tmp_path / f"lora{suffix}"), "--lora")


def test_damaged_checkpoints_and_manifests(tmp_path):
    def write(folder):
        save_file({"a": np.ones(4, np.float32)}, folder / "training_state.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "seed": 1}))

    checkpoint.save_checkpoint(tmp_path, 3, write, None)
    folder = tmp_path / "checkpoint-3"
    random = np.random.default_rng(0)
    for path in (folder / checkpoint.MANIFEST, folder / "trainer_state.json", folder / "training_state.safetensors"):
        whole = path.read_bytes()
        damage = damaged_safetensors(whole, random) if path.suffix == ".safetensors" else damaged_json(whole, random)
        for name, content in damage.items():
            path.write_bytes(content)
            for which in ("latest", "checkpoint-3"):
                sentence = orderly(checkpoint.find_checkpoint, tmp_path, which)
                assert sentence or content == whole or path.name == checkpoint.MANIFEST, name
        path.write_bytes(whole)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == folder


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_cache_entry_is_no_entry(tmp_path, seed):
    kept, random = cache.Cache(tmp_path), np.random.default_rng(seed)
    kept.put("k", {"moments": np.ones((4, 3, 3), np.float32)})
    whole = kept.path("k").read_bytes()
    for name, content in damaged_safetensors(whole, random).items():
        kept.path("k").write_bytes(content)
        assert kept.get("k") is None, name
    kept.path("k").write_bytes(whole)
    assert kept.get("k") is not None


# ---- pictures and captions -----------------------------------------------------------------------


def damaged_pictures(folder, random):
    """Forty files that want to be pictures."""
    pixels = random.integers(0, 256, (48, 40, 3), dtype=np.uint8)
    for number in range(40):
        path = folder / f"{number:02d}.{('png', 'jpg', 'webp', 'tiff', 'gif', 'bmp')[number % 6]}"
        Image.fromarray(pixels).save(path)
        content = bytearray(path.read_bytes())
        what = number % 5
        if what == 0:
            content = content[: random.integers(0, len(content))]
        elif what == 1:
            content = random.bytes(random.integers(0, 500))
        elif what == 2:
            content = b""
        else:
            for place in random.integers(0, len(content), 1 + 10 * (what == 4)):
                content[place] ^= 1 << random.integers(8)
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("seed", range(3))
def test_damaged_pictures_are_listed(tmp_path, seed):
    damaged_pictures(tmp_path, np.random.default_rng(seed))
    before = snapshot(tmp_path)
    samples = folders.samples_in_folder(str(tmp_path), "--instance_data_dir")
    sentence = orderly(checks.preflight, samples, 32, "--instance_data_dir", False)
    assert sentence.count("\n") >= 20 and snapshot(tmp_path) == before
    assert check_data.main(["--instance_data_dir", str(tmp_path), "--resolution", "32", "--instance_prompt", "x"]) == 1
    assert snapshot(tmp_path) == before


def test_a_picture_of_too_many_pixels_is_a_listed_problem(tmp_path):
    """A PNG of 60,000 bytes that says it is 30,000 x 30,000 and would take 2.7 GB."""
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 200_000
    samples = folders.samples_in_folder(str(tmp_path), "--instance_data_dir")
    sentence = orderly(checks.preflight, samples, 32, "--instance_data_dir", False)
    assert "bomb.png: too many pixels" in sentence and "900000000" in sentence


CAPTIONS = {
    "not UTF-8": b"caf\xe9 \xff\xfe",
    "a lone surrogate": "a \ud800 cat".encode("utf-8", "surrogatepass"),
    "zeros": b"a\x00cat\x00",
    "a megabyte": b"cat " * 250_000,
    "nothing": b"",
    "control characters": bytes(range(32)),
    "combining": "e\u0301\u202e\u200b\U0001f408".encode(),
}


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_odd_captions_are_refused_or_become_tokens(tmp_path, tiny_flux, caption):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(caption)
    before = snapshot(tmp_path)
    flags = [
        "--instance_data_dir",
        str(tmp_path),
        "--resolution",
        "32",
        "--instance_prompt",
        "x",
        "--max_sequence_length",
        "16",
    ]
    sentence = orderly(check_data.main, [*flags, "--pretrained_model_name_or_path", str(tiny_flux)])
    assert sentence is None or "a.txt" in sentence
    assert snapshot(tmp_path) == before


LINES = {
    "not JSON": "{",
    "a list": "[1]",
    "a number": "3",
    "deep": "[" * 100_000,
    "no file": '{"text": "x"}',
    "a number for a file": '{"file_name": 3, "text": "x"}',
    "a list for a caption": '{"file_name": "a.png", "text": ["x"]}',
    "a lone surrogate": '{"file_name": "a.png", "text": "a \\ud800 cat"}',
    "a surrogate in a name": '{"file_name": "\\ud800.png", "text": "x"}',
    "a zero in a name": '{"file_name": "a\\u0000.png", "text": "x"}',
    "up and away": '{"file_name": "../a.png", "text": "x"}',
    "in and out": '{"file_name": "b/../../a.png", "text": "x"}',
    "absolute": '{"file_name": "/etc/hostname", "text": "x"}',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_odd_lines_of_metadata_are_refused(tmp_path, line):
    """Of pictures and of pairs; what lies outside the folder is not opened, though it is there."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "a.png", tmp_path / "a.png"):
        Image.new("RGB", (40, 40)).save(path)
    (folder / "metadata.jsonl").write_text(line)
    assert "metadata.jsonl" in orderly(folders.samples_in_folder, str(folder), "--instance_data_dir")
    pair = line.replace('"text"', '"conditioning_image_file_name": "a.png", "text"')
    (folder / "metadata.jsonl").write_text(pair)
    before = snapshot(tmp_path)
    source = Source(train_data_dir=str(folder), cache_dir=str(tmp_path.parent / f"{tmp_path.name} cache"))
    sentence = orderly(lambda: preflight_pairs(load_pairs(source), 32, "--train_data_dir", False))
    assert "metadata.jsonl" in sentence or "--image_column" in sentence
    assert snapshot(tmp_path) == before


def test_the_export_script_refuses_what_is_no_lora(tmp_path):
    script, random = load_script("flux_lora/export_flux_lora.py"), np.random.default_rng(0)
    small_lora(tmp_path / "lora.safetensors")
    whole = (tmp_path / "lora.safetensors").read_bytes()
    for name, content in damaged_safetensors(whole, random).items():
        (tmp_path / "lora.safetensors").write_bytes(content)
        sentence = orderly(
            script.main,
            [
                "--lora",
                str(tmp_path / "lora.safetensors"),
                "--output",
                str(tmp_path / "out.safetensors"),
                "--format",
                "kohya",
            ],
        )
        assert sentence or name in ("flipped bits", "another type"), name
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
