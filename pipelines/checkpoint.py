"""Checkpoints on the command line: look into them, import foreign ones, export for other code bases."""

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..kernels.wan.tensors import config_name
from ..kernels.wan.weights import (
    NETWORK_KEYS,
    StoredNetwork,
    list_networks,
    read_checkpoint,
    read_transformer,
    write_checkpoint,
    write_transformer,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Inspect, import and export checkpoints of video transformers.",
)


class Names(enum.StrEnum):
    original = "original"
    diffusers = "diffusers"


HeadDim = Annotated[
    int | None,
    typer.Option(help="Channels of an attention head; by default that of the known model of this shape, or 128."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file, or a model folder.")],
    head_dim: HeadDim = None,
) -> None:
    """Show the networks that a checkpoint holds."""
    networks = list_networks(path, head_dim)
    table = Table("network", "config", "sizes", "parameters", "dtype", "tensors", "names", title=str(path))
    for network in networks:
        table.add_row(*_row(network))
    Console().print(table)


def _row(network: StoredNetwork) -> list[str]:
    config, tensors = network.config, network.state.values()
    sizes = f"{config.num_layers} layers, {config.num_attention_heads} x {config.attention_head_dim} channels"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return [
        network.key,
        config_name(config) or "-",
        sizes,
        f"{sum(tensor.numel() for tensor in tensors):,}",
        " ".join(dtypes),
        str(len(tensors)),
        network.naming,
    ]


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write transformer/ in.")],
    key: Annotated[
        str | None,
        typer.Option(help=f"Network to take: {', '.join(NETWORK_KEYS)}; by default the first of them."),
    ] = None,
    head_dim: HeadDim = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint file of CausVid, Self-Forcing, LongLive or Wan to diffusers' folder layout."""
    _refuse_existing(out / "transformer", overwrite)
    config, state = read_checkpoint(path, (key,) if key else NETWORK_KEYS[:2], head_dim)
    typer.echo(write_transformer(out, config, state))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model folder in diffusers' layout.")],
    out: Annotated[Path, typer.Argument(help="The .pt, .pth or .safetensors file to write.")],
    names: Annotated[Names, typer.Option(help="Tensor names: Wan's or diffusers'.")] = Names.original,
    overwrite: Overwrite = False,
) -> None:
    """Write a model's transformer as one file, for other code bases."""
    _refuse_existing(out, overwrite)
    _, state = read_transformer(model)
    write_checkpoint(out, state, names.value)
    typer.echo(out)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ValueError(f"{target}: exists already; give --overwrite to replace it")
