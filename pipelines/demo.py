"""`reelway demo`: the best main job that exists, on this machine, in a minute."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..actors.pretraining import to_video
from ..kernels.causal.generator import ChunkGenerator
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.noise import SampleKey
from ..kernels.wan.config import CONFIGS
from ..kernels.wan.context import TextContext
from ..kernels.wan.transformer import VideoTransformer
from ..kernels.wan.vae import StreamingVAE
from .pretraining.vae import vae_config
from .recipe import TINY, load_recipe
from .video import VideoWriter

FRAMES_PER_SECOND = 16

app = typer.Typer(add_completion=False, help="Stream a video and write it to demo/.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the video.")] = Path("demo"),
    blocks: Annotated[int, typer.Option(min=1, help="Blocks to stream; one is 0.75 s of video.")] = 7,
) -> None:
    """Stream a video from a tiny causal transformer with random weights."""
    console = Console()
    console.print(
        "[bold]Reelway[/bold]: a causal video transformer streams block by block. Its weights are random, so what "
        "you will see is noise; the machine around it is the real one: Wan2.1's network at tiny size, four denoising "
        "steps a block, a KV cache with sink and window, and a streaming VAE that decodes as the latents come."
    )
    recipe = load_recipe(TINY).pretrain
    torch.manual_seed(recipe.seed)
    config, settings = CONFIGS[recipe.model], StudentSettings(window=12, sink=3)
    side = recipe.world.size // 8
    text = TextContext.fold([torch.randn(8, config.text_dim)])
    model = VideoTransformer(config).requires_grad_(False)
    stream = ChunkGenerator(model, settings, text, [SampleKey(recipe.seed, "demo", 0)], (side, side))
    vae = StreamingVAE.from_config(vae_config(recipe)).requires_grad_(False)
    path = out / "random.mp4"
    _stream(stream, vae, blocks, path, console)
    console.print(f"Wrote [bold]{path}[/bold]: 64x64 pixels, H.264, {FRAMES_PER_SECOND} frames per second.")


def _stream(stream: ChunkGenerator, vae: StreamingVAE, blocks: int, path: Path, console: Console) -> None:
    state, frames, began, first = None, 0, time.perf_counter(), 0.0
    with VideoWriter(path, FRAMES_PER_SECOND) as writer, torch.no_grad():
        for index in range(blocks):
            pixels, state = vae.decode(stream.next_block(), state)
            writer.write(to_video(pixels[0]).numpy())
            frames += pixels.shape[1]
            seconds = time.perf_counter() - began
            first = first or seconds
            console.print(f"  block {index + 1}/{blocks}: {frames} frames after {seconds:.2f} s")
    console.print(f"First block after {first:.2f} s, {frames / seconds:.1f} frames per second, VAE included.")
