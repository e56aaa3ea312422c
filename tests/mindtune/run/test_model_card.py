"""Model cards: metadata that a YAML parser reads, images with their prompts, and code that runs."""

import ast
import json
import shlex

import pytest
import yaml
from conftest import ROOT, load_script

from mindtune.run.model_card import kind_of, model_card

HARD = [
    'a "red": circle',
    "it's - {a} [b] # c, | d",
    "first line\nsecond line",
    "---\n一只猫 穿着红色的毛衣: 🐱",
    "yes",
]
GALLERY = [(prompt, f"samples/final-{number}.png") for number, prompt in enumerate(HARD, 1)]
CONFIGS = {
    "flux_controlnet": {"_class_name": "FluxControlNetModel"},
    "sd": {"_class_name": "ControlNetModel", "addition_embed_type": None},
    "sdxl": {"_class_name": "ControlNetModel", "addition_embed_type": "text_time"},
}


@pytest.fixture
def card(tmp_path):
    """card(config, base, gallery, hub, system, **flags): the card of a run, (metadata, text)."""

    def make(config=None, base="black-forest-labs/FLUX.1-dev", gallery=GALLERY, hub="huggingface", system="", **flags):
        out = tmp_path / "circles"
        out.mkdir(exist_ok=True)
        if config:
            (out / "config.json").write_text(json.dumps(CONFIGS[config]))
        record = {"flags": flags, "seed": 7, "versions": {"mindspore": "2.7.1"}, "updates": 3}
        record.update({"system": system} if system else {})  # older runs have none
        (out / "run.json").write_text(json.dumps(record))
        (out / "samples").mkdir(exist_ok=True)
        (out / "samples" / "final.png").touch()
        lines = model_card(out, "somebody/circles", str(base), gallery, hub).split("\n")
        end = lines.index("---", 1)  # the first line of dashes alone, as for the hubs
        assert lines[0] == "---"
        return yaml.safe_load("\n".join(lines[1:end])), "\n".join(lines[end + 1 :])

    return make


def block(body, language):
    """The first block of code in a language."""
    return body.split(f"```{language}\n")[1].split("\n```")[0]


def test_the_metadata_of_a_lora(card):
    metadata, body = card(instance_prompt='a photo: "sks" 狗', learning_rate=1e-5)
    assert metadata == {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "adapter",
        "instance_prompt": 'a photo: "sks" 狗',
        "library_name": "diffusers",
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "template:sd-lora", "flux", "mindspore", "mindone"],
        "widget": [{"text": prompt, "output": {"url": file}} for prompt, file in GALLERY],
    }
    assert "<Gallery />\n\n![Images of the last validation](samples/final.png)" in body
    assert "- first line second line\n" in body and "- yes\n" in body
    assert "Seed 7, 3 updates; mindspore 2.7.1." in body


@pytest.mark.parametrize(
    "config, tags",
    [
        ("flux_controlnet", ["controlnet", "flux"]),
        ("sd", ["controlnet", "stable-diffusion"]),
        ("sdxl", ["controlnet", "stable-diffusion-xl"]),
    ],
)
def test_the_metadata_of_a_controlnet(card, config, tags):
    metadata, _ = card(config, base="some/base")
    assert metadata["tags"] == ["text-to-image", "diffusers", *tags, "mindspore", "mindone"]
    assert metadata["base_model"] == "some/base"
    assert not {"base_model_relation", "instance_prompt"} & set(metadata)


@pytest.mark.parametrize(
    "base, licence",
    [
        ("black-forest-labs/FLUX.1-Krea-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("black-forest-labs/FLUX.1-Kontext-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("black-forest-labs/FLUX.1-Depth-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("black-forest-labs/FLUX.1-Canny-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("black-forest-labs/FLUX.1-Fill-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("AI-ModelScope/FLUX.1-dev", ["other", "flux-1-dev-non-commercial-license"]),
        ("black-forest-labs/FLUX.1-schnell", ["apache-2.0", None]),
        ("somebody/FLUX.1-dev", ["other", "as-the-base-model"]),
        ("some/base", ["other", "as-the-base-model"]),
    ],
)
def test_the_licence_is_that_of_a_known_base_model(card, base, licence):
    metadata, _ = card(base=base)
    assert [metadata.get(key) for key in ("license", "license_name")] == licence


def test_the_path_of_a_base_model_is_not_given_as_its_id(card, tmp_path):
    (tmp_path / "secret" / "FLUX.1-dev").mkdir(parents=True)
    metadata, body = card(base=tmp_path / "secret" / "FLUX.1-dev")
    assert "base_model" not in metadata and metadata["license_name"] == "as-the-base-model"
    assert "path/to/FLUX.1-dev" in block(body, "python") and "secret" not in body


def test_no_gallery_without_images(card):
    metadata, body = card(gallery=[])
    assert "widget" not in metadata and "Gallery" not in body and "![" not in body


def test_flags_are_cells_of_the_table(card):
    _, body = card(
        gallery=[], learning_rate=1e-5, seed=None, push_to_hub=True, resume=False, prompts=["a | b", "c\nd `e`"]
    )
    rows = [line for line in body.splitlines() if line.startswith("| `--")]
    assert rows == [
        "| `--learning_rate` | `1e-05` |",
        "| `--push_to_hub` | `True` |",
        "| `--prompts` | `` ['a \\| b', 'c\\nd `e`'] `` |",
    ]


@pytest.mark.parametrize("prompt", HARD)
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
@pytest.mark.parametrize("config", [None, *CONFIGS])
def test_the_code_for_diffusers(card, config, hub, prompt):
    """It parses, loads the result and the base model from the hub, and has the prompt as it was given."""
    _, body = card(config, gallery=[(prompt, "samples/final-1.png")], hub=hub)
    tree = ast.parse(block(body, "python"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert prompt in texts
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = ["'somebody/circles'", "'black-forest-labs/FLUX.1-dev'"]
    result, base = [f"snapshot_download({name})" for name in names] if hub == "modelscope" else names
    if config is None:
        loads = {"FluxPipeline.from_pretrained": base, "pipe.load_lora_weights": result}
    else:
        kind = {
            "flux_controlnet": ("FluxControlNetModel", "FluxControlNetPipeline"),
            "sd": ("ControlNetModel", "StableDiffusionControlNetPipeline"),
            "sdxl": ("ControlNetModel", "StableDiffusionXLControlNetPipeline"),
        }[config]
        loads = {f"{kind[0]}.from_pretrained": result, f"{kind[1]}.from_pretrained": base}
        arguments = {keyword.arg for keyword in calls["pipe"].keywords}
        assert arguments == {"prompt", "control_image" if config == "flux_controlnet" else "image"}
    assert {name: ast.unparse(calls[name].args[0]) for name in loads} == loads
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name.split(".")[0] for name in loads} - {"pipe"} <= imported
    assert ("snapshot_download" in imported) == (hub == "modelscope")


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
@pytest.mark.parametrize("config", [None, *CONFIGS])
def test_the_command_of_the_inference_script_has_flags_that_it_takes(card, config, hub, tmp_path):
    _, body = card(config, gallery=[(HARD[3], "samples/final-1.png")], hub=hub)
    *download, command = map(shlex.split, block(body, "bash").splitlines())
    assert command[0] == "python" and command[1] == kind_of(tmp_path / "circles").script
    args = load_script(ROOT / command[1]).parse_args(command[2:])
    assert args.prompt == [" ".join(HARD[3].split())] and args.hub == hub
    assert args.pretrained_model_name_or_path == "black-forest-labs/FLUX.1-dev"
    if config:
        assert download == [] and args.controlnet == "somebody/circles"
    else:
        start = {"huggingface": ["huggingface-cli", "download"], "modelscope": ["modelscope", "download", "--model"]}
        assert download[0][:-2] == [*start[hub], "somebody/circles"] and download[0][-1] == args.lora


SYSTEMS = {  # system, flags -> pipeline, its images, the script's flags for them, tags, and what the card calls it
    "kontext": (
        ("flux_kontext", {}),
        "FluxKontextPipeline",
        {"image": "source.png"},
        {"image": ["source.png"]},
        ["image-to-image", "diffusers", "lora", "template:sd-lora", "flux", "flux-kontext"],
        "A LoRA adapter",
    ),
    "control": (
        ("flux_control", {"fill": False}),
        "FluxControlPipeline",
        {"control_image": "condition.png"},
        {"control_image": ["condition.png"], "fill": False},
        ["text-to-image", "diffusers", "lora", "control-lora", "flux"],
        "A Control-LoRA adapter",
    ),
    "fill": (
        ("flux_control", {"fill": True}),
        "FluxFillPipeline",
        {"image": "source.png", "mask_image": "mask.png"},
        {"control_image": ["source.png"], "mask_image": ["mask.png"], "fill": True},
        ["text-to-image", "diffusers", "lora", "control-lora", "flux"],
        "A Control-LoRA adapter",
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_lora_of_a_system_with_images(card, name):
    """Its own pipeline and script, with images and with the guidance that was trained, which is not their default."""
    (system, flags), pipeline, images, given, tags, what = SYSTEMS[name]
    metadata, body = card(gallery=[], system=system, guidance_scale=3.25, lora_rank=4, **flags)
    assert metadata["tags"] == [*tags, "mindspore", "mindone"] and metadata["pipeline_tag"] == tags[0]
    assert metadata["base_model_relation"] == "adapter"
    assert f"{what} for `black-forest-labs/FLUX.1-dev`" in body
    tree = ast.parse(block(body, "python"))
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert ast.unparse(calls["pipe.load_lora_weights"].args[0]) == "'somebody/circles'"
    assert f"{pipeline}.from_pretrained" in calls
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in calls["pipe"].keywords}
    prompt = arguments.pop("prompt")  # by its name: the first argument of FluxKontextPipeline is the image
    assert ast.literal_eval(prompt) == "a photo of a cat" and not calls["pipe"].args
    assert arguments == {**{key: f"load_image('{file}')" for key, file in images.items()}, "guidance_scale": "3.25"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == {pipeline, "load_image"}
    _, command = map(shlex.split, block(body, "bash").splitlines())
    args = load_script(ROOT / command[1]).parse_args(command[2:])
    assert args.lora == "circles" and args.guidance_scale == 3.25
    assert {key: getattr(args, key) for key in given} == given


def test_a_run_of_the_lora_script_names_its_system_too(card):
    assert card(gallery=[], system="flux_lora", guidance_scale=3.25)[1] == card(gallery=[], guidance_scale=3.25)[1]


@pytest.mark.parametrize("adapter, name", [("dora", "DoRA"), ("lokr", "LoKr")])
def test_other_adapters_are_called_by_their_name(card, adapter, name):
    """diffusers cannot load a LoKr, so the card and its tags do not offer it."""
    metadata, body = card(adapter=adapter)
    assert f"A {name} adapter for" in body and adapter in metadata["tags"]
    assert "template:sd-lora" not in metadata["tags"]
    assert ("load_lora_weights" in body) == (adapter == "dora")


def test_the_directories_of_the_machine_are_not_shown(card, tmp_path):
    _, body = card(output_dir=str(tmp_path / "dog"), instance_data_dir="photos/dog")
    assert str(tmp_path) not in body and "| `--output_dir` | `dog` |" in body and "`photos/dog`" in body
