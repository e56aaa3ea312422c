"""The parser of the training scripts: bounds, read-only values, and what is recorded, fixed or selected of them."""

from typing import NamedTuple

import pytest
from conftest import TRAINING_SCRIPTS, load_script

from mindtune.cli import UserError
from mindtune.flags import data_flags, image_flags, optimizer_flags, output_flags, training_flags
from mindtune.flags.parser import NO_EFFECT, Parser, boolean

REQUIRED = {
    "flux_lora/train_dreambooth_lora_flux.py": ["--instance_data_dir=x", "--instance_prompt=x"],
    "flux_controlnet/train_controlnet_flux.py": ["--train_data_dir=x"],
    "examples/controlnet/train_controlnet.py": ["--train_data_dir=x"],
    "examples/controlnet/train_controlnet_sdxl.py": ["--train_data_dir=x"],
    "examples/flux_kontext/train_lora_flux_kontext.py": ["--train_data_dir=x"],
    "examples/flux_control/train_control_lora_flux.py": ["--train_data_dir=x"],
}


@pytest.fixture
def parser():
    parser = Parser("Does a job.\n\nMore.")
    parser.add("rank", "r", type=int, default=4, minimum=1, help="Rank.")
    parser.add("alpha", type=float, above=0, help="Alpha.")
    parser.add("dropout", type=float, default=0.0, minimum=0, below=1, may_change=True, help="Dropout.")
    parser.add("model_name_or_path", help="Model.")
    parser.add("hub_token", may_change=True, help="Token.")
    parser.add("fast", default=False, help="Fast.")
    return parser


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rank", "0"], r"^--rank 0: must be at least 1\.$"),
        (["--r", "0"], r"^--rank 0: must be at least 1\.$"),
        (["--alpha", "0"], r"^--alpha 0\.0: must be above 0\.$"),
        (["--dropout", "1"], r"^--dropout 1\.0: must be below 1\.$"),
        (["--dropout", "-0.1"], r"^--dropout -0\.1: must be at least 0\.$"),
        (["--dropout", "nan"], r"^--dropout nan: must be at least 0\.$"),
        (["--alpha", "nan"], r"^--alpha nan: must be above 0\.$"),
        (["--model_name_or_path", ""], r"^--model_name_or_path: is empty; was a shell variable not set\?"),
    ],
)
def test_a_value_out_of_bounds_is_refused(parser, words, message):
    with pytest.raises(UserError, match=message):
        parser.parse_args(words)


def test_values_within_bounds_and_defaults(parser):
    args = parser.parse_args(["--r", "1", "--alpha", "0.5", "--fast"])
    assert (args.rank, args.alpha, args.dropout, args.model_name_or_path, args.fast) == (1, 0.5, 0.0, None, True)
    assert parser.parse_args([]).fast is False
    with pytest.raises(SystemExit):
        parser.parse_args(["--alph", "1"])  # no abbreviations


def test_values_are_read_only(parser):
    args = parser.parse_args([])
    with pytest.raises(AttributeError, match="args.rank: flags are never changed"):
        args.rank = 8
    assert args.rank == 4


def test_recorded_fixed_and_selected_values(parser):
    class Settings(NamedTuple):
        root: str
        rank: int
        alpha: float = 9.0
        other: int = 7

    args = parser.parse_args(["--hub_token", "hf_secret", "--rank", "2"])
    everything = {
        "rank": 2,
        "alpha": None,
        "dropout": 0.0,
        "model_name_or_path": None,
        "hub_token": None,
        "fast": False,
    }
    assert args.recorded() == everything
    assert args.fixed() == {"rank": 2, "alpha": None, "model_name_or_path": None, "fast": False}
    assert args.select(Settings, root="here") == Settings("here", 2, None)
    assert args.select(Settings, root="here", rank=5).rank == 5


def test_checks_of_several_flags_and_sections(parser, capsys):
    def refuse(args):
        if args.fast and args.rank > 4:
            raise UserError("--fast with --rank above 4.")

    parser.section("more")
    parser.add("allow_tf32", default=False, help="No effect.")
    parser.checks.append(refuse)
    parser.parse_args(["--rank", "5", "--allow_tf32"])
    assert capsys.readouterr().out == f"--allow_tf32: {NO_EFFECT['allow_tf32']}\n"
    with pytest.raises(UserError, match="--fast with --rank above 4"):
        parser.parse_args(["--rank", "5", "--fast"])
    help_text = parser.format_help()
    assert "Does a job." in help_text and help_text.index("--fast") < help_text.index("more:")


def test_help_states_the_default_of_a_flag_unless_its_line_describes_it(parser):
    parser.add("shift", default="1", help="Shift. Default: one.")
    text = " ".join(parser.format_help().split())
    assert "Rank. Default: 4. --alpha ALPHA Alpha. --dropout DROPOUT Dropout. Default: 0.0. --model" in text
    assert text.endswith("--fast Fast. --shift SHIFT Shift. Default: one.")


def test_booleans():
    assert [boolean(word) for word in ("true", "No", "1", "FALSE", "yes", "0")] == [
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(Exception, match="perhaps is neither true nor false"):
        boolean("perhaps")


def test_every_shared_flag_is_declared_in_one_group():
    """Adding all groups to one parser would fail at a flag that two of them declare."""
    parser = Parser("All groups.")
    training_flags.model(parser, pipeline="x")
    training_flags.controlnet(parser, copied="x")
    training_flags.flux(parser, weighting_scheme="none")
    training_flags.step(parser, sample="image")
    optimizer_flags.optimizer(parser, learning_rate=1e-4, adam_weight_decay=0.0)
    optimizer_flags.schedule(parser)
    optimizer_flags.ema(parser)
    image_flags.images(parser, sample="image", multiple=8, smallest=8)
    data_flags.pairs(parser)
    data_flags.prior_preservation(parser)
    output_flags.output(parser, output_dir="x")
    output_flags.controlnet_validation(parser, num_inference_steps=20)
    output_flags.saved_dtype(parser)
    output_flags.no_effect(parser, *NO_EFFECT)
    assert len(parser.declared) > 80


@pytest.fixture(params=TRAINING_SCRIPTS)
def script(request):
    """parse(*words) of a training script, with what it requires."""
    module = load_script(request.param)
    required = ["--pretrained_model_name_or_path=x", *REQUIRED[request.param]]
    return lambda *words: module.parse_args([*required, *words])


def test_every_bound_of_every_flag_is_checked(script):
    declared = script()._declared
    bounds = 0
    for name, flag in declared.items():
        for bound, bad, message in (
            (flag.minimum, lambda bound: bound - 1, "at least"),
            (flag.above, lambda bound: bound, "above"),
            (flag.below, lambda bound: bound, "below"),
        ):
            if bound is not None:
                bounds += 1
                with pytest.raises(UserError, match=f"^--{name} .*: must be {message} {bound}"):
                    script(f"--{name}={bad(bound)}")
    assert bounds > 20


@pytest.mark.parametrize("value", ["nan", "-1"])
def test_rates_and_shares_are_numbers_of_at_least_0(script, value):
    for name in ("learning_rate", "max_grad_norm", "validation_split", "adam_beta1", "adam_beta2"):
        with pytest.raises(UserError, match=f"^--{name} {value}.*: must be at least 0"):
            script(f"--{name}={value}")


def test_flags_without_effect_print_why(script, capsys):
    names = [name for name in NO_EFFECT if name in script()._declared]
    assert len(names) >= 3
    capsys.readouterr()
    script(*(f"--{name}" for name in names))
    assert capsys.readouterr().out.splitlines() == [f"--{name}: {NO_EFFECT[name]}" for name in names]


def test_combinations_that_training_scripts_refuse(script):
    for words, message in (
        (["--gradient_checkpointing_blocks", "3"], "^--gradient_checkpointing_blocks 3: .* add it"),
        (["--gradient_checkpointing_blocks", "3", "--fit"], "^--gradient_checkpointing_blocks 3: --fit chooses"),
        (["--use_8bit_adam", "--optimizer=prodigy"], "--use_8bit_adam with --optimizer prodigy"),
        (["--offload_optimizer", "--mindspore_mode=1"], "--offload_optimizer with --mindspore_mode 1"),
        (["--distributed", "--zero_stage=2"], "--zero_stage 2: .* Use --zero_stage 1"),
        (["--zero_stage=1"], "--zero_stage 1: .* Add --distributed"),
        (["--distributed", "--zero_stage=1", "--optimizer=prodigy"], "--zero_stage 1 with --optimizer prodigy"),
        (["--resolution=100"], "--resolution 100: must be divisible by"),
    ):
        with pytest.raises(UserError, match=message):
            script(*words)


@pytest.mark.parametrize("path", [path for path in TRAINING_SCRIPTS if "flux" in path])
def test_flags_of_flux(path):
    parse = load_script(path).parse_args
    required = ["--pretrained_model_name_or_path=x", *REQUIRED[path]]
    for value in ("some", "-1", "0", "inf", "nan"):
        with pytest.raises(UserError, match=f"--timestep_shift {value}: give a positive number or auto"):
            parse([*required, f"--timestep_shift={value}"])
    with pytest.raises(UserError, match="--max_sequence_length 600: .* use 512 or less"):
        parse([*required, "--max_sequence_length=600"])
    for value in ("auto", "1.15"):
        assert parse([*required, f"--timestep_shift={value}"]).timestep_shift == value
