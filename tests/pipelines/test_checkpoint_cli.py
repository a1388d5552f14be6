"""`reelway checkpoint`, from the command line's arguments to the files, against diffusers' loader."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from reelway import __version__
from reelway.kernels.wan.config import CONFIGS
from reelway.kernels.wan.tensors import to_original
from reelway.kernels.wan.weights import list_networks
from reelway.pipelines.cli import main

HOLDER = "model._fsdp_wrapped_module."


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel.from_config(CONFIGS["tiny"].to_diffusers())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.bfloat16()


@pytest.fixture(scope="module")
def foreign(model: WanTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Self-Forcing leaves it: the average with FSDP's prefixes, another generator, and a critic."""
    names = to_original(model.state_dict())
    average = {HOLDER + name: tensor for name, tensor in names.items()}
    generator = {f"model.{name}": tensor + 1 for name, tensor in names.items()}
    path = tmp_path_factory.mktemp("foreign") / "self_forcing_dmd.pt"
    torch.save({"generator": generator, "generator_ema": average, "critic": generator}, path)
    return path


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def reelway(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["reelway", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


def assert_refused(outcome: Outcome, *needed: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("reelway: ")
    for text in needed:
        assert text in outcome.err


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_import_gives_a_folder_that_diffusers_loads(reelway, foreign: Path, model, tmp_path: Path) -> None:
    outcome = reelway("checkpoint", "import", foreign, tmp_path / "student")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip() == str(tmp_path / "student" / "transformer")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "student" / "transformer", torch_dtype=torch.bfloat16)
    fp32 = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    expected = {name: tensor.float() if name in fp32 else tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.attention_head_dim == 64


def test_import_takes_the_network_that_is_asked_for(reelway, foreign: Path, model, tmp_path: Path) -> None:
    assert reelway("checkpoint", "import", foreign, tmp_path, "--key", "generator").code == 0
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert torch.equal(loaded["proj_out.bias"], (model.state_dict()["proj_out.bias"] + 1).float())


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_round_trip_keeps_every_bit(reelway, foreign: Path, tmp_path: Path, suffix: str, names: str) -> None:
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / f"out.{suffix}"
    assert reelway("checkpoint", "import", foreign, first).code == 0
    assert reelway("checkpoint", "export", first, file, "--names", names).code == 0
    assert [network.naming for network in list_networks(file)] == [names]
    assert reelway("checkpoint", "import", file, second).code == 0
    assert reelway("checkpoint", "export", second, tmp_path / "again.pt").code == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)["generator"]
    before = torch.load(foreign, weights_only=True)["generator_ema"]
    assert_same(again, {name.replace(HOLDER, "model."): tensor for name, tensor in before.items()})
    for file in (first / "transformer").iterdir():
        assert (second / "transformer" / file.name).read_bytes() == file.read_bytes()


def test_inspect_shows_the_networks_of_a_file_and_of_a_folder(reelway, foreign: Path, model, tmp_path: Path) -> None:
    outcome = reelway("checkpoint", "inspect", foreign)
    assert outcome.code == 0
    parameters = f"{sum(tensor.numel() for tensor in model.parameters()):,}"
    for key in ("generator", "generator_ema", "critic"):
        row = next(line for line in outcome.out.splitlines() if f"│ {key} " in line)
        for text in ("tiny", parameters, "bfloat16", "original", "3 x 64"):
            assert text in row
    reelway("checkpoint", "import", foreign, tmp_path)
    row = next(line for line in reelway("checkpoint", "inspect", tmp_path).out.splitlines() if "│ transformer " in line)
    assert "diffusers" in row
    assert "tiny" in row


def test_what_exists_is_replaced_only_on_request(reelway, foreign: Path, tmp_path: Path) -> None:
    reelway("checkpoint", "import", foreign, tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    refused = reelway("checkpoint", "import", foreign, tmp_path, "--key", "generator")
    assert_refused(refused, str(tmp_path / "transformer"), "--overwrite")
    assert weights.read_bytes() == before
    assert reelway("checkpoint", "import", foreign, tmp_path, "--key", "generator", "--overwrite").code == 0
    assert weights.read_bytes() != before
    out = tmp_path / "out.pt"
    out.write_text("precious")
    assert_refused(reelway("checkpoint", "export", tmp_path, out), "out.pt", "--overwrite")
    assert out.read_text() == "precious"
    assert reelway("checkpoint", "export", tmp_path, out, "--overwrite").code == 0
    assert "generator" in torch.load(out, weights_only=True)


def _broken_files(foreign: Path, folder: Path) -> dict[Path, str]:
    content = torch.load(foreign, weights_only=True)["generator"]
    cases = {
        "missing.pt": {name: t for name, t in content.items() if "time_projection.1.bias" not in name},
        "misshapen.pt": {**content, "model.blocks.0.self_attn.q.bias": torch.zeros(5)},
        "unknown.pt": {**content, "model.blocks.0.gate": torch.zeros(5)},
        "image.pt": {**content, "model.img_emb.proj.0.weight": torch.zeros(5)},
    }
    for name, state in cases.items():
        torch.save({"generator": state}, folder / name)
    (folder / "truncated.pt").write_bytes(foreign.read_bytes()[:-5000])
    (folder / "noise.safetensors").write_bytes(b"\x10" * 64)
    return {
        folder / "missing.pt": "tensor condition_embedder.time_proj.bias: missing, expected shape [1152]",
        folder / "misshapen.pt": "tensor blocks.0.attn1.to_q.bias: expected shape [192], found [5]",
        folder / "unknown.pt": "tensor blocks.0.gate: ",
        folder / "image.pt": "image-to-video",
        folder / "truncated.pt": "truncated",
        folder / "noise.safetensors": "damaged",
        folder / "absent.pt": "no such checkpoint file",
        folder: "no such",
    }


def test_broken_files_give_one_line_and_leave_nothing(reelway, foreign: Path, tmp_path: Path) -> None:
    sources, target = tmp_path / "sources", tmp_path / "target"
    sources.mkdir()
    for path, message in _broken_files(foreign, sources).items():
        assert_refused(reelway("checkpoint", "import", path, target / "student"), str(path), message)
        assert_refused(reelway("checkpoint", "inspect", path), str(path), message.removesuffix(" checkpoint file"))
        assert not target.exists()
    assert_refused(reelway("checkpoint", "export", sources, target / "out.pt"), str(sources))
    assert not target.exists()


def test_help_is_light_and_the_version_is_printed(reelway) -> None:
    assert reelway("--version").out.strip() == __version__
    code = (
        "import sys; from reelway.pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True, timeout=240
    )
    assert "checkpoint" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_of_a_sub_command_is_its_own(reelway) -> None:
    assert "inspect" in reelway("checkpoint", "--help").out
    assert "--head-dim" in reelway("checkpoint", "import", "--help").out
    assert reelway("nonsense").code == 2
