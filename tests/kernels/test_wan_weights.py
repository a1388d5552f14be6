"""Checkpoint formats, against diffusers' own reader, writer and converter."""

import json
import os
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from reelway.kernels.wan import weights
from reelway.kernels.wan.config import CONFIGS, TransformerConfig
from reelway.kernels.wan.tensors import check_shapes, config_name, expected_shapes, infer_config
from reelway.kernels.wan.transformer import VideoTransformer
from reelway.kernels.wan.weights import (
    from_original,
    list_networks,
    load_into,
    read_checkpoint,
    read_transformer,
    to_original,
    write_checkpoint,
    write_transformer,
)

CONFIG = TransformerConfig(
    num_attention_heads=1, attention_head_dim=128, ffn_dim=40, num_layers=2, text_dim=24, freq_dim=16
)
# Names of one block in the checkpoints that Wan's authors publish.
ORIGINAL_BLOCK = {
    "modulation",
    "norm3.weight",
    "norm3.bias",
    *(
        f"{attention}.{part}"
        for attention in ("self_attn", "cross_attn")
        for part in (
            *("q.weight", "k.weight", "v.weight", "o.weight", "q.bias", "k.bias", "v.bias", "o.bias"),
            *("norm_q.weight", "norm_k.weight"),
        )
    ),
    *("ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"),
}
ORIGINAL_ROOT = {
    *("patch_embedding.weight", "patch_embedding.bias", "time_projection.1.weight", "time_projection.1.bias"),
    *("time_embedding.0.weight", "time_embedding.0.bias", "time_embedding.2.weight", "time_embedding.2.bias"),
    *("text_embedding.0.weight", "text_embedding.0.bias", "text_embedding.2.weight", "text_embedding.2.bias"),
    *("head.head.weight", "head.head.bias", "head.modulation"),
}


def random_state(config: TransformerConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(s, generator=generator) for name, s in expected_shapes(config).items()}


def diffusers_model(config: TransformerConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_config(config.to_diffusers())


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def left_over(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Names and shapes.


@pytest.mark.parametrize("name", [*CONFIGS, "other"])
def test_expected_shapes_are_those_of_diffusers(name: str) -> None:
    config = CONFIGS.get(name, CONFIG)
    with torch.device("meta"):
        reference = diffusers_model(config).state_dict()
    assert expected_shapes(config) == {key: tensor.shape for key, tensor in reference.items()}
    assert list(expected_shapes(config)) == list(reference)


def test_original_names_are_those_of_the_published_files(state: dict[str, Tensor]) -> None:
    blocks = {f"blocks.{index}.{name}" for index in range(2) for name in ORIGINAL_BLOCK}
    assert set(to_original(state)) == ORIGINAL_ROOT | blocks


def test_the_name_map_agrees_with_diffusers_converter(state: dict[str, Tensor]) -> None:
    original = to_original(state)
    converted = convert_wan_transformer_to_diffusers(dict(original))
    assert set(converted) == set(state)
    for name, tensor in from_original(original).items():
        assert tensor is converted[name]
        assert tensor is state[name]


@pytest.mark.parametrize("direction", [from_original, to_original])
@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.norm1.weight",
        "blocks.x.modulation",
        "blocks.0.head.head.weight",
        "patch_embedding.scale",
        "q",
    ],
)
def test_a_name_that_wan_does_not_have_is_refused(direction, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^tensor {name}: "):
        direction({name: torch.zeros(1)})


@pytest.mark.parametrize("name", CONFIGS)
def test_known_configurations_are_inferred_from_shapes(name: str) -> None:
    shapes = {key: torch.empty(shape, device="meta") for key, shape in expected_shapes(CONFIGS[name]).items()}
    assert infer_config(shapes) == CONFIGS[name]
    assert config_name(infer_config(shapes)) == name


def test_head_size_is_128_unless_told(state: dict[str, Tensor]) -> None:
    assert infer_config(state) == CONFIG
    assert infer_config(state, head_dim=32).num_attention_heads == 4
    with pytest.raises(ValueError, match=r"head_dim: must divide the transformer's 128 channels, got 48"):
        infer_config(state, head_dim=48)
    nearly_tiny = random_state(replace(CONFIGS["tiny"], num_layers=1, ffn_dim=8))
    assert infer_config(nearly_tiny, head_dim=64).num_layers == 1
    with pytest.raises(ValueError, match=r"head_dim: must divide the transformer's 192 channels, got 128"):
        infer_config(nearly_tiny)


def test_each_kind_of_misfit_is_named(state: dict[str, Tensor]) -> None:
    expected = expected_shapes(CONFIG)
    name = "blocks.1.attn2.to_k.bias"
    without = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=rf"^tensor {name}: missing, expected shape \[128\]$"):
        check_shapes(expected, without)
    with pytest.raises(ValueError, match=rf"^tensor {name}: expected shape \[128\], found \[127\]$"):
        check_shapes(expected, {**state, name: torch.zeros(127)})
    with pytest.raises(ValueError, match=rf"^tensor {name}: expected floating-point numbers, found torch.int8$"):
        check_shapes(expected, {**state, name: torch.zeros(128, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"^tensor extra: unknown, found shape \[3\]"):
        check_shapes(expected, {**state, "extra": torch.zeros(3)})


@pytest.mark.parametrize("network", [diffusers_model, VideoTransformer])
def test_load_into_is_strict_and_all_or_nothing(network, state: dict[str, Tensor]) -> None:
    model = network(CONFIG)
    load_into(model, state)
    assert_same(model.state_dict(), state)
    other = random_state(seed=1)
    other["proj_out.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"tensor proj_out.bias: expected shape \[64\], found \[3\]"):
        load_into(model, other)
    assert_same(model.state_dict(), state)


# Files of other code bases.

PREFIXES = {
    "plain": "",
    "holder": "model.",
    "fsdp": "model._fsdp_wrapped_module.",
    "ddp": "module.model.",
    "compiled": "_orig_mod.",
    "comfy": "model.diffusion_model.",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_wrapper_prefixes_and_both_namings_are_read(tmp_path, state, prefix: str, naming: str) -> None:
    named = to_original(state) if naming == "original" else state
    infix = "_fsdp_wrapped_module." if "fsdp" in prefix else ""
    stored = {prefix + name.replace("blocks.1.", f"blocks.1.{infix}"): tensor for name, tensor in named.items()}
    torch.save(stored, tmp_path / "flat.pt")
    save_file(stored, tmp_path / "flat.safetensors")
    for file in ("flat.pt", "flat.safetensors"):
        config, found = read_checkpoint(tmp_path / file)
        assert config == CONFIG
        assert_same(found, state)
        assert [network.naming for network in list_networks(tmp_path / file)] == [naming]


def test_the_moving_average_comes_first_and_any_network_can_be_chosen(tmp_path) -> None:
    networks = {
        "generator": random_state(seed=1),
        "generator_ema": random_state(seed=2),
        "critic": random_state(seed=3),
    }
    file = tmp_path / "self_forcing.pt"
    stored = {key: {f"model.{name}": t for name, t in to_original(s).items()} for key, s in networks.items()}
    torch.save({**stored, "step": 600}, file)
    assert_same(read_checkpoint(file)[1], networks["generator_ema"])
    for key, expected in networks.items():
        assert_same(read_checkpoint(file, prefer=(key,))[1], expected)
    assert {network.key for network in list_networks(file)} == set(networks)
    torch.save({"critic": stored["critic"]}, file)
    with pytest.raises(ValueError, match=r"no network under generator_ema or generator, found critic$"):
        read_checkpoint(file)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, state) -> None:
    file = tmp_path / "malice.pt"
    torch.save({"generator": to_original(state), "extra": Malice(tmp_path / "pwned")}, file)
    with pytest.raises(ValueError, match=r"malice.pt: refused, only tensors are read from a pickle") as error:
        read_checkpoint(file)
    assert "mkdir" in str(error.value)
    file.write_bytes(pickle.dumps(Malice(tmp_path / "pwned")))
    with pytest.raises(ValueError, match=r"malice.pt: truncated, or not a PyTorch checkpoint"):
        read_checkpoint(file)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, state, suffix: str) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    write_checkpoint(whole, state)
    content = whole.read_bytes()
    for length in (0, 1, 7, 8, 100, len(content) // 3, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^\S+cut\.{suffix}: [^\n]*(truncated|damaged)[^\n]*$"):
            read_checkpoint(cut)


def test_misfits_in_a_file_name_file_and_tensor(tmp_path, state) -> None:
    file = tmp_path / "model.pt"
    cases = {
        "tensor blocks.1.ffn.net.2.weight: missing": {"blocks.1.ffn.net.2.weight": None},
        "tensor patch_embedding.weight: missing": {"patch_embedding.weight": None},
        r"tensor blocks.0.attn1.to_q.weight: expected shape \[128, 128\], found \[128, 64\]": {
            "blocks.0.attn1.to_q.weight": torch.zeros(128, 64)
        },
        "tensor proj_out.weight: expected 64 rows": {"proj_out.weight": torch.zeros(32, 128)},
        "tensor blocks.1.vace.weight: unknown": {"blocks.1.vace.weight": torch.zeros(2)},
        "tensor step: not a tensor but int": {"step": 3},
        "tensor condition_embedder.image_embedder.norm1.weight: an image-to-video variant": {
            "condition_embedder.image_embedder.norm1.weight": torch.zeros(2)
        },
        "tensor blocks.0.cross_attn.k_img.weight: an image-to-video variant": {
            "blocks.0.cross_attn.k_img.weight": torch.zeros(2)
        },
    }
    for message, change in cases.items():
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        torch.save({"generator": changed}, file)
        with pytest.raises(ValueError, match=rf"^\S+model.pt: {message}[^\n]*$"):
            read_checkpoint(file)
    torch.save({"generator": {**state, "model.proj_out.bias": torch.zeros(64)}}, file)
    with pytest.raises(ValueError, match=r"tensor proj_out.bias: occurs twice"):
        read_checkpoint(file)


@pytest.mark.parametrize("content", [[1, 2], {"lora": {"a": torch.zeros(1)}}, {}])
def test_a_checkpoint_without_networks_is_refused(tmp_path, content) -> None:
    torch.save(content, tmp_path / "other.pt")
    for read in (read_checkpoint, list_networks):
        with pytest.raises(ValueError, match=r"^\S+other.pt: (no network under|expected a state dict)"):
            read(tmp_path / "other.pt")


def test_missing_files_and_foreign_endings(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file"):
        read_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"ends in"):
        read_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"ends in"):
        write_checkpoint(tmp_path / "model.bin", {})
    assert left_over(tmp_path) == ["model.ckpt"]


def test_exported_pt_is_what_self_forcing_loads(tmp_path, state) -> None:
    write_checkpoint(tmp_path / "a.pt", state)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == ["generator"]
    assert_same(content["generator"], {f"model.{name}": tensor for name, tensor in to_original(state).items()})
    write_checkpoint(tmp_path / "b.pt", state)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_views_of_one_buffer_are_written_without_the_buffer(tmp_path, state) -> None:
    sizes = [tensor.numel() for tensor in state.values()]
    unused = torch.zeros(sum(sizes))
    parts = torch.cat([*(tensor.flatten() for tensor in state.values()), unused]).split([*sizes, sum(sizes)])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts[:-1], strict=True)}
    for suffix in ("pt", "safetensors"):
        write_checkpoint(tmp_path / f"a.{suffix}", views)
        assert_same(read_checkpoint(tmp_path / f"a.{suffix}")[1], state)
        assert (tmp_path / f"a.{suffix}").stat().st_size < 1.1 * unused.nbytes


# diffusers' folder.


@pytest.mark.parametrize("max_shard_bytes", [10**9, 400_000, 1])
def test_diffusers_loads_what_is_written(tmp_path, state, max_shard_bytes: int) -> None:
    mixed = {name: t.bfloat16() if "attn" in name else t for name, t in state.items()}
    target = write_transformer(tmp_path / "model", CONFIG, mixed, max_shard_bytes)
    config, found = read_transformer(tmp_path / "model")
    assert config == CONFIG
    assert_same(found, mixed)
    loaded = WanTransformer3DModel.from_pretrained(target)
    assert_same(loaded.state_dict(), {name: tensor.float() for name, tensor in mixed.items()})
    sizes = [file.stat().st_size for file in target.glob("*.safetensors")]
    total = sum(tensor.nbytes for tensor in mixed.values())
    if max_shard_bytes == 1:  # a tensor is never split
        assert len(sizes) == len(state)
        return
    headers = 20_000
    assert max(sizes) <= max_shard_bytes + headers
    assert total / max_shard_bytes <= len(sizes) <= 1 + 2 * total / max_shard_bytes


@pytest.mark.parametrize("size", ["10GB", "300KB"])
def test_what_diffusers_writes_is_read(tmp_path, state, size: str) -> None:
    model = diffusers_model(CONFIG)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "transformer", max_shard_size=size)
    assert (tmp_path / "transformer" / weights.INDEX_FILE).exists() == (size == "300KB")
    for folder in (tmp_path, tmp_path / "transformer"):
        config, found = read_transformer(folder)
        assert config == CONFIG
        assert_same(found, state)


def test_damage_in_a_folder_is_named(tmp_path, state) -> None:
    folder = write_transformer(tmp_path, CONFIG, state, 300_000)
    config = json.loads((folder / "config.json").read_text())
    for field, value in {
        "image_dim": 1280,
        "num_layers": "2",
        "_class_name": "WanVACETransformer3DModel",
    }.items():
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=rf"config.json: {field}: .*{value}"):
            read_transformer(tmp_path)
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ValueError, match=r"tensor blocks.2.scale_shift_table: missing"):
        read_transformer(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        read_transformer(tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    shard = max(folder.glob("*.safetensors"))
    shard.rename(folder / "aside")
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_transformer(tmp_path)
    index = json.loads((folder / weights.INDEX_FILE).read_text())
    index["weight_map"]["proj_out.bias"] = "../elsewhere.safetensors"
    (folder / weights.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map must give file names of the same folder"):
        read_transformer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not a model in diffusers' layout"):
        read_transformer(tmp_path / "absent")


def test_an_interrupted_write_leaves_nothing_and_spoils_nothing(tmp_path, state, monkeypatch) -> None:
    real, calls = weights.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        if len(calls) % 2 == 0:
            raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match=r"no space left"):
        write_transformer(tmp_path / "deep" / "new", CONFIG, state, 300_000)
    assert left_over(tmp_path) == []
    monkeypatch.undo()
    write_transformer(tmp_path / "old", CONFIG, state)
    write_checkpoint(tmp_path / "old.safetensors", state)
    before = left_over(tmp_path)
    monkeypatch.setattr(weights, "save_file", full_disk)
    calls.clear()
    with pytest.raises(OSError, match=r"no space left"):
        write_transformer(tmp_path / "old", CONFIG, random_state(seed=1), 300_000)
    calls.append(None)
    with pytest.raises(OSError, match=r"no space left"):
        write_checkpoint(tmp_path / "old.safetensors", random_state(seed=1))
    assert left_over(tmp_path) == before
    assert_same(read_transformer(tmp_path / "old")[1], state)
    assert_same(read_checkpoint(tmp_path / "old.safetensors")[1], state)


def test_a_whole_folder_is_replaced(tmp_path, state) -> None:
    write_transformer(tmp_path, CONFIG, state, 300_000)
    other = random_state(seed=1)
    write_transformer(tmp_path, CONFIG, other)
    assert_same(read_transformer(tmp_path)[1], other)
    assert left_over(tmp_path) == [
        "transformer",
        "transformer/config.json",
        f"transformer/{weights.WEIGHTS_FILE}",
    ]


def test_written_files_are_as_readable_as_the_umask_allows(tmp_path, state) -> None:
    old = os.umask(0o027)
    try:
        write_transformer(tmp_path, CONFIG, state)
        write_checkpoint(tmp_path / "a.safetensors", state)
    finally:
        os.umask(old)
    for file in (tmp_path / "a.safetensors", *(tmp_path / "transformer").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
