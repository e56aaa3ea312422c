"""A short rehearsal on the simulated device, where there is a compiler. `make rehearse` has all of it."""

import importlib.util
import shutil
from pathlib import Path

import build_stand_ins
import pytest
import rehearse
from record import Record
from small_sd import make_pipeline

UPDATES = 5  # the first compiles, the last two save


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    if missing := build_stand_ins.missing_tools():
        pytest.skip(f"stand-ins for CANN's libraries need {', '.join(missing)}")
    out = tmp_path_factory.mktemp("ascend")
    build_stand_ins.build(out, Path(importlib.util.find_spec("mindspore").origin).parent)
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The rehearsal's inputs, with half of Stable Diffusion's UNet."""
    folder = tmp_path_factory.mktemp("rehearsal")
    rehearse.make_inputs(folder)
    shutil.rmtree(folder / "sd15")
    make_pipeline("sd15", folder / "sd15")
    return folder


def case(name):
    return next(case for case in rehearse.all_cases() if case.name == name)._replace(updates=UPDATES, validates=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora bf16 graph", "sd bf16 pynative"])
def test_a_script_trains_on_the_simulated_device(name, work, stand_ins):
    """No float64, no fallback to the CPU, no copies but the batch, flash attention, only the old operators we know."""
    result, found = rehearse.rehearse(case(name), work, stand_ins)
    assert not found, f"{found}\n{result.printed[-3000:]}"
    assert len(result.updates) == UPDATES + 1  # and what came after the last
    assert result.record.count(2)["kernels"] > 500


def test_a_record_is_read(tmp_path):
    path = tmp_path / "record"
    path.write_text(
        "copy1 u8[8]\naclnnCast f32[2,3] bf16[2,3]\nupdate\n"
        "aclnnCat ( f16[2] f16[2]) f16[4]\naclopAddN f32[1] f32[1] f32[1]\n"
        "aclnnFlashAttentionScoreGrad bf16[2]\nupdate\n"
    )
    record = Record(path)
    assert [len(update) for update in record.updates] == [1, 3, 0]
    assert record.names_with("f16", "f64") == ["aclnnCat"]
    assert record.old_operators() == {"AddN"}
    assert record.count(1) == {"kernels": 3, "casts": 0, "transposes": 0, "old": 1, "flash": 1}


def update(**changes):
    return {"inputs": 100, "to_device": 104, "to_host": 9, "memory": 1000, "trained": 50, **changes}


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, None),
        ({"to_device": 5000}, "4,900 bytes more than the batch go to the device"),
        ({"to_host": 5000}, "5,000 bytes come back"),
    ],
)
def test_copies_beside_the_batch_are_found(tmp_path, changes, problem):
    path = tmp_path / "record"
    path.write_text("aclnnFlashAttentionScore bf16[2]\nupdate\n" * 5)
    updates = [update(), update(), update(**changes), update(), update()]
    result = rehearse.Result(0, "", updates, Record(path), 0.0)
    found = rehearse.problems(case("lora bf16 graph"), result)
    assert found == [] if problem is None else problem in found[0]


def test_growing_memory_is_found(tmp_path):
    path = tmp_path / "record"
    path.write_text("aclnnFlashAttentionScore bf16[2]\nupdate\n" * 30)
    updates = [update(memory=1000 + number) for number in range(30)]
    found = rehearse.problems(case("lora bf16 graph"), rehearse.Result(0, "", updates, Record(path), 0.0))
    assert found == ["device memory grows by 16 bytes in 17 updates"]
