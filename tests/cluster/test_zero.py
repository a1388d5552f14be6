"""DeepSpeed ZeRO on two processes trains what plain torch trains on one, on every stage."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reelway.cluster.zero import STATE, ZeroSettings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from zero_ranks import SAVED_AFTER, STAGES, UPDATES, plain_distillation  # noqa: E402
from zero_recipe import RATE, Plain, make_network  # noqa: E402

FLOAT = {"rtol": 1e-5, "atol": 1e-6}
Results = dict[str, Any]


def run_ranks(scenario: str, size: int, folder: Path) -> Any:
    """The results of a scenario of zero_ranks.py on `size` processes."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "PYTHONWARNINGS": "ignore",
    }
    script, python = str(HERE / "zero_ranks.py"), sys.executable
    command = [[python, script, scenario, str(rank), str(size), str(folder)] for rank in range(size)]
    ranks = [subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for line in command]
    try:
        errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(error[-2000:] for error in errors)
    return torch.load(folder / f"{scenario}.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Results:
    """All that two processes do, in one start."""
    return run_ranks("pair", 2, folder)


@pytest.fixture(scope="module")
def alone(pair: Results, folder: Path) -> Results:
    """What one process does with the checkpoints of two."""
    shutil.copytree(folder / "stage-2", folder / "torn")
    (folder / "torn" / "rank-00001-of-00002.safetensors").unlink()
    return run_ranks("alone", 1, folder)


@pytest.fixture(scope="module")
def plain() -> Results:
    """Torch alone, the gradients of the two halves averaged as two ranks do."""
    reference = Plain(clip_norm=1e9)
    losses = [loss for loss, _ in reference.run(UPDATES)]
    weights = {name: value.detach() for name, value in reference.network.state_dict().items()}
    return {"losses": losses, "weights": weights, "average": reference.average}


def assert_same(found: Results, expected: Results, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    for kind in ("weights", "average"):
        torch.testing.assert_close(found[kind], dict(expected[kind]), **tolerance)
    assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], rel=tolerance["rtol"], abs=0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_plain_torch_bit_by_bit(pair: Results, plain: Results, stage: int) -> None:
    """Sums of two have one order, and nothing is clipped: losses, weights and average are equal in every bit."""
    assert_same(pair[f"exact-{stage}"], plain)


@pytest.mark.parametrize("stage", STAGES)
def test_several_backward_passes_and_clipping_are_the_whole_batch(pair: Results, stage: int) -> None:
    reference = Plain(clip_norm=0.3, parts=1)
    steps = list(reference.run(UPDATES))
    assert min(norm for _, norm in steps) > 0.3, "the test must clip"
    weights = {name: value.detach() for name, value in reference.network.state_dict().items()}
    expected = {"losses": [loss for loss, _ in steps], "weights": weights, "average": reference.average}
    assert_same(pair[f"accumulated-{stage}"], expected, **FLOAT)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_changes_nothing_on_any_rank(pair: Results, plain: Results, stage: int) -> None:
    result = pair[f"poisoned-{stage}"]
    assert all("update 0" in message and "gradient norm" in message for message in result["messages"])
    torch.testing.assert_close(result["after"], result["before"], rtol=0, atol=0)
    assert_same(result, plain)


@pytest.mark.parametrize("stage", STAGES)
def test_another_stage_goes_on_from_a_checkpoint_bit_by_bit(pair: Results, plain: Results, stage: int) -> None:
    assert_same(pair[f"resumed-{stage}"], plain)
    assert len(pair[f"resumed-{stage}"]["losses"]) == UPDATES - SAVED_AFTER


@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_processes_goes_on_from_a_checkpoint(alone: Results, plain: Results, stage: int) -> None:
    assert_same(alone[f"resumed-{stage}"], plain, **FLOAT)


@pytest.mark.parametrize("stage", STAGES)
def test_student_critic_and_teacher_live_in_one_process(pair: Results, stage: int) -> None:
    """The video transformer with checkpointed activations, in the patterns that distillation has."""
    assert pair[f"distilled-{stage}"]["losses"] == pytest.approx(plain_distillation(), rel=1e-4)


def test_a_network_that_was_never_whole_trains_the_same_bit_by_bit(pair: Results, plain: Results) -> None:
    assert_same(pair["exact-divided"], plain)
    assert_same(pair["bf16-divided"], pair["bf16-3"])
    assert pair["distilled-divided"]["losses"] == pair["distilled-3"]["losses"]


def test_a_divided_network_lies_on_each_rank_in_part(pair: Results) -> None:
    sizes = {name: value.numel() for name, value in make_network().named_parameters()}
    for rank in pair["held"]:
        assert rank == {name: (0, -(-size // 2)) for name, size in sizes.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_nothing(pair: Results, plain: Results, stage: int) -> None:
    assert_same(pair[f"offloaded-{stage}"], plain, **FLOAT)


@pytest.mark.parametrize("name", ["autocast-1", "autocast-3", "bf16-2", "bf16-3"])
def test_low_precision_trains_masters_in_fp32(pair: Results, plain: Results, name: str) -> None:
    """Near the fp32 run, and not equal to it; the weights that come out have more bits than bfloat16."""
    result = pair[name]
    assert result["losses"] == pytest.approx(plain["losses"], rel=0.02)
    assert result["losses"] != plain["losses"]
    weight = result["weights"]["0.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_nothing_is_compiled(pair: Results, folder: Path) -> None:
    """DeepSpeed builds C++ code at first use where it can; training needs none."""
    assert not (folder / "extensions").exists()


def test_load_says_what_does_not_fit(alone: Results) -> None:
    nothing, other, torn = alone["refusals"]
    assert nothing == f"checkpoint: no {STATE} in FOLDER/nothing"
    assert other == f"FOLDER/stage-2/{STATE}: 0.bias: the network has [9], the checkpoint [17]"
    assert torn == "checkpoint FOLDER/torn: 1 of 2 files are missing, first rank-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("stage", {"stage": 4}),
        ("precision", {"precision": "bf16", "stage": 1}),
        ("offload_optimizer", {"offload_optimizer": "cpu", "stage": 0}),
        ("offload_parameters", {"offload_parameters": "cpu", "stage": 2}),
        ("clip_norm", {"clip_norm": 0.0}),
        ("ema_decay", {"ema_decay": 1.0}),
    ],
)
def test_settings_name_the_field_that_does_not_fit(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        ZeroSettings(rate=lambda step: RATE, **changes)
