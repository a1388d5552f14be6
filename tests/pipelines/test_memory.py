"""What a training says it will hold, against closed forms, against autograd, and against a process that trains."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelway.cluster.zero_settings import Division, bucket_elements, live_elements
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.pipelines.memory import TrainedClips, TrainedNetwork, TrainingMemory, division_of, memory_lines
from reelway.pipelines.recipe import ZeroRecipe

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "zero_memory.py"


def network(name: str, model: str = "wan2.1-1.3b", **more: bool) -> TrainedNetwork:
    return TrainedNetwork(name, CONFIGS[model], **more)


# --- Weights and states -----------------------------------------------------------------------------------------------

# Bytes per parameter that every process holds whole, and those that r of them divide (arXiv 1910.02054, figure 1, with
# gradients in fp32): weights, gradients, fp32 masters, two moments; then those of the average.
PER_PARAMETER = {
    (None, "autocast"): (16, 0, 4, 0),
    (0, "autocast"): (16, 0, 4, 0),
    (1, "autocast"): (8, 12, 0, 4),
    (2, "autocast"): (4, 16, 0, 4),
    (3, "autocast"): (0, 16, 0, 4),
    (2, "bf16"): (2, 16, 0, 4),
    (3, "bf16"): (0, 18, 0, 4),
}


@pytest.mark.parametrize("model", ["wan2.1-1.3b", "wan2.1-14b"])
@pytest.mark.parametrize(("stage", "precision"), PER_PARAMETER)
def test_weights_and_states_are_those_of_the_closed_form(stage: int | None, precision: str, model: str) -> None:
    billions = {"wan2.1-1.3b": 1.418996800, "wan2.1-14b": 14.288491584}[model]
    whole, divided, average, divided_average = PER_PARAMETER[stage, precision]
    for ranks in (1, 8, 64):
        division = Division(stage, ranks, precision)
        for averages in (False, True):
            held = network("student", model, averages=averages).held(division, torch.bfloat16)
            expected = whole + divided / ranks + averages * (average + divided_average / ranks)
            assert sum(held.values()) == pytest.approx(1e9 * billions * expected, rel=1e-6)


def test_a_frozen_teacher_is_whole_until_stage_3() -> None:
    teacher = network("teacher", "wan2.1-14b", trained=False)
    parameters = sum(teacher.sizes)
    found = {stage: teacher.held(Division(stage, 8, "autocast"), torch.bfloat16)["weights"] for stage in (0, 1, 2, 3)}
    assert found[0] == found[1] == found[2] == pytest.approx(2 * parameters, rel=0.02)  # norms, tables and time in fp32
    assert found[3] == pytest.approx(4 * parameters / 8, rel=1e-6)
    assert teacher.held(Division(3, 8, "bf16"), torch.bfloat16)["weights"] == pytest.approx(
        2 * parameters / 8, rel=1e-6
    )
    assert teacher.held(Division(precision="fp32"), torch.float32)["weights"] == 4 * parameters


def test_what_is_moved_to_the_host_is_not_on_the_device() -> None:
    memory = TrainingMemory([network("student", averages=True)], TrainedClips(1, 21, 1560, True))
    parameters = sum(network("student").sizes)
    here, moved = Division(3, 8, "bf16"), Division(3, 8, "bf16", "cpu", "cpu")
    assert sum(memory.host(here).values()) == 0
    assert sum(memory.host(moved).values()) == pytest.approx((2 + 4 + 8 + 4) * parameters / 8, rel=1e-6)
    difference = sum(memory.device(here).values()) - sum(memory.device(moved).values())
    assert difference == sum(memory.host(moved).values())


def test_buffers_are_bounded() -> None:
    small, large = [100, 300, 200], [100_000_000] * 143
    assert bucket_elements(small) == live_elements(small) == 300
    assert bucket_elements(large) == 200_000_000
    assert live_elements(large) == 1_000_000_000
    assert Division(2, 1).working(large) == Division(None, 1).working(large) == 0
    assert Division(3, 8, "bf16").working(large) == 2 * 4 * 200_000_000 + 2 * 1_000_000_000


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_every_stage_that_fits() -> None:
    networks = [network("student"), network("critic"), network("teacher", "wan2.1-14b", trained=False)]
    memory = TrainingMemory(networks, TrainedClips(1, 21, 1560, True, 21), {"VAE": 2**30})
    lines = memory_lines(memory, division_of(ZeroRecipe(stage=2), 8, "cuda"))
    heads, *rows = lines
    assert heads.split() == ["ZeRO", "0", "ZeRO", "1", "ZeRO", "2", "*", "ZeRO", "3"]
    cells = {row[:36].strip() or row: row for row in rows}
    assert len({len(row) for row in lines}) == 1, cells
    table = {row.rsplit(maxsplit=4)[0].strip(): row.rsplit(maxsplit=4)[1:] for row in rows}
    weights = 4 * sum(networks[0].sizes) / 2**30
    assert [float(cell) for cell in table["student: weights"]] == pytest.approx([weights] * 3 + [weights / 8], abs=1e-3)
    assert table["student: masters"][0] == table["student: masters"][3] == "-"
    total = next(cells for name, cells in table.items() if name.startswith("in all"))
    assert float(total[2]) == pytest.approx(sum(memory.device(Division(2, 8, "autocast")).values()) / 2**30, abs=1e-3)
    bf16 = memory_lines(memory, division_of(ZeroRecipe(stage=3, precision="bf16"), 8, "cuda"))
    assert bf16[0].split() == ["ZeRO", "2", "ZeRO", "3", "*"]
    offloaded = ZeroRecipe(stage=3, precision="bf16", offload_optimizer=True)
    assert any(line.startswith("in host memory") for line in memory_lines(memory, division_of(offloaded, 8, "cuda")))
    assert not any(line.startswith("in host memory") for line in lines)


# --- Activations ------------------------------------------------------------------------------------------------------


def kept_by_autograd(
    model: VideoTransformer, latents: Tensor, *, ignore: set[int]
) -> dict[int, tuple[torch.dtype, int]]:
    """Storages that a forward pass leaves for the backward pass: dtype and bytes."""
    text = TextContext.fold([torch.randn(4, model.config.text_dim)])
    kept: dict[int, tuple[torch.dtype, int]] = {}
    held = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignore:
            kept[storage.data_ptr()] = (tensor.dtype, storage.nbytes())
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(latents, torch.full(latents.shape[:2], 500.0), text)
    assert out.requires_grad
    return kept


@pytest.mark.parametrize("layers", [1, 3])
def test_estimated_activations_are_those_that_autograd_keeps(layers: int) -> None:
    """Within a fifth, on the tiny model, weights aside."""
    config = replace(CONFIGS["tiny"], num_layers=layers)
    model = VideoTransformer(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = kept_by_autograd(model, torch.randn(2, 6, 16, 8, 8), ignore=weights)
    clips = TrainedClips(2, 6, config.tokens_per_frame(8, 8), checkpointing=False)
    found = sum(size for _, size in kept.values())
    assert clips.activations(config, torch.float32) == pytest.approx(found, rel=0.2)


def test_autocast_keeps_a_cast_of_every_weight() -> None:
    """With one token, what is kept in bfloat16 is almost nothing but them."""
    config = replace(CONFIGS["tiny"], num_layers=3)
    model = VideoTransformer(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_by_autograd(model, torch.randn(1, 1, 16, 2, 2), ignore=weights)
    casts = sum(size for dtype, size in kept.values() if dtype == torch.bfloat16)
    one = TrainingMemory([TrainedNetwork("student", config)], TrainedClips(1, 1, 1, False))
    counted = one.device(division_of(None, 1, "cuda"))["weights cast to bfloat16"]
    assert casts <= counted <= 1.2 * casts  # what takes the data themselves needs no weights in its backward pass


# --- A process that trains --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_holds_what_is_counted_and_little_more() -> None:
    """Two processes, every stage: the peak of the resident set against the closed form."""
    command = [sys.executable, str(BENCHMARK), "--layers", "6", "--heads", "8"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout
    rows = {row["way"]: row for row in json.loads(out.strip().splitlines()[-1])["memory"]}
    for row in rows.values():
        assert row["peak"] > 0.9 * row["needed"], row
        assert row["peak"] < 1.15 * (row["needed"] + row["buffers"] + row["gradients"]), row
    peaks = [rows[f"ZeRO {stage}"]["peak"] for stage in (0, 1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    assert rows["ZeRO 3"]["build"] < 0.75 * rows["plain torch"]["build"], "no process builds the whole network"
