"""The plain engine: optimisers, schedule, average, refusal of what is not finite."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from reelway.actors.engine import Engine, OneRank, OptimizerSettings, Ranks, TorchEngine


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Conv1d(24, 8, 3, padding=1))


def loss_of(model: nn.Module) -> torch.Tensor:
    embedding, linear, norm, conv = model
    return conv(norm(linear(embedding(torch.arange(10)))).T[None]).square().mean()


def evenness(matrix: torch.Tensor) -> float:
    """Mean singular value over the largest: 1 for an orthogonal matrix."""
    values = torch.linalg.svdvals(matrix)
    return float(values.mean() / values.max())


def test_rate_warms_up_and_falls_to_its_share() -> None:
    settings = OptimizerSettings(1.0, total_steps=110, warmup_steps=10, final_share=0.1)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(9) == settings.rate(10) == 1.0
    assert settings.rate(60) == pytest.approx(0.55)
    assert settings.rate(110) == settings.rate(500) == pytest.approx(0.1)


def test_adamw_is_torchs_adamw() -> None:
    model, reference = network(), network()
    engine = TorchEngine(model, OptimizerSettings(1e-2, 10, weight_decay=0.1, clip_norm=1e9))
    optimizer = torch.optim.AdamW(reference.parameters(), 1e-2, (0.9, 0.999), weight_decay=0.1)
    for _ in range(3):
        engine.update(loss_of(model))
        optimizer.zero_grad()
        loss_of(reference).backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_muon_moves_matrices_along_orthogonal_directions() -> None:
    """A first update spreads over directions that the gradient hardly has; kernels count as matrices."""
    model = network()
    loss_of(model).backward()
    gradients = {name: model.get_parameter(name).grad.flatten(1) for name in ("1.weight", "3.weight")}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    engine = TorchEngine(model, OptimizerSettings(1e-2, 10, weight_decay=0.0, muon=True))
    engine.update(loss_of(model))
    for name, gradient in gradients.items():
        change = (model.get_parameter(name) - before[name]).detach().flatten(1)
        assert evenness(change) > 1.5 * evenness(gradient)
        assert change.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.4)  # the size of AdamW's updates
    rows = (model.get_parameter("0.weight") - before["0.weight"]).detach()
    assert rows.abs().max() == pytest.approx(1e-2, rel=1e-2)  # an embedding is AdamW's


def test_average_follows_the_weights() -> None:
    model = network()
    engine = TorchEngine(model, OptimizerSettings(1e-2, 100, ema_decay=0.9))
    expected = [weight.detach().clone() for weight in model.parameters()]
    for step in range(1, 21):
        engine.update(loss_of(model))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.parameters(), strict=True)]
    for found, value in zip(engine.average.parameters(), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_restored_engine_goes_on_bit_for_bit() -> None:
    settings = OptimizerSettings(1e-2, 20, ema_decay=0.9, muon=True)
    first, second = TorchEngine(network(), settings), TorchEngine(network(), settings)
    for _ in range(3):
        first.update(loss_of(first.network))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for engine in (first, second):
        for _ in range(3):
            engine.update(loss_of(engine.network))
    for found, expected in zip(second.average.parameters(), first.average.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_what_is_not_finite_changes_nothing() -> None:
    model = network()
    engine = TorchEngine(model, OptimizerSettings(1e-2, 10))
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(FloatingPointError, match="update 0: loss nan"):
        engine.update(loss_of(model) * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_accumulated_gradients_are_those_of_the_sum() -> None:
    whole, split = (TorchEngine(network(), OptimizerSettings(1e-2, 10)) for _ in range(2))
    metrics = whole.update(loss_of(whole.network))
    for share in (0.25, 0.75):
        split.backward(loss_of(split.network) * share)
    assert split.step() == pytest.approx({name: metrics[name] for name in ("gradient_norm", "learning_rate")})
    for found, expected in zip(split.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    again = copy.deepcopy(split.network)
    loss_of(again).backward()
    expected_norm = torch.stack([weight.grad.norm() for weight in again.parameters()]).norm()
    split.backward(loss_of(split.network))
    assert split.step()["gradient_norm"] == pytest.approx(float(expected_norm), rel=1e-5)  # nothing was left over
    assert split.updates == 2


def test_a_bad_micro_batch_spoils_the_update_and_nothing_else() -> None:
    engine = TorchEngine(network(), OptimizerSettings(1e-2, 10))
    before = engine.weights()
    engine.backward(loss_of(engine.network))
    engine.backward(loss_of(engine.network) + float("inf"))  # whose gradients are finite
    with pytest.raises(FloatingPointError, match="update 0: loss inf"):
        engine.step()
    assert all(torch.equal(value, before[name]) for name, value in engine.weights().items())
    engine.update(loss_of(engine.network))
    assert engine.updates == 1


def test_saved_engine_goes_on_from_its_file(tmp_path: Path) -> None:
    settings = OptimizerSettings(1e-2, 20, ema_decay=0.9)
    first, second = (TorchEngine(network(), settings) for _ in range(2))
    first.update(loss_of(first.network))
    first.save(tmp_path / "engine")
    second.load(tmp_path / "engine")
    for engine in (first, second):
        engine.update(loss_of(engine.network))
    for one, other in ((first.weights(), second.weights()), (first.averaged_weights(), second.averaged_weights())):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert second.updates == 2
    with pytest.raises(FileNotFoundError, match=r"engine\.pt: no such file"):
        first.load(tmp_path)


def test_weights_are_copies_in_fp32() -> None:
    engine = TorchEngine(network().to(torch.bfloat16), OptimizerSettings(1e-2, 20, ema_decay=0.9))
    weights, average = engine.weights(), engine.averaged_weights()
    assert weights.keys() == average.keys() == engine.network.state_dict().keys()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    weights["1.weight"].zero_()
    assert engine.network[1].weight.abs().sum() > 0


def test_without_decay_the_average_is_the_network() -> None:
    engine = TorchEngine(network(), OptimizerSettings(1e-2, 20))
    engine.update(loss_of(engine.network))
    assert all(torch.equal(value, engine.weights()[name]) for name, value in engine.averaged_weights().items())
    assert engine.state_dict()["average"] == {}


def test_precision_of_a_forward_pass() -> None:
    for precision in (torch.bfloat16, torch.float32):
        engine = TorchEngine(nn.Linear(4, 4), OptimizerSettings(1e-2, 20), precision=precision)
        with engine.autocast():
            assert engine.network(torch.ones(1, 4)).dtype == precision


def test_plain_versions_are_what_the_protocols_say() -> None:
    engine: Engine = TorchEngine(network(), OptimizerSettings(1e-2, 20))
    ranks: Ranks = OneRank()
    ranks.barrier()
    assert (ranks.rank, ranks.size, ranks.broadcast(3), ranks.mean({"a": 0.5})) == (0, 1, 3, {"a": 0.5})
    assert engine.updates == 0
