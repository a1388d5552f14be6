"""Block edges: whether the places show where a video's blocks were joined."""

from functools import partial

import numpy as np
import torch

from reelway.actors.judge import Blocks
from reelway.actors.pretraining import to_pixels, to_video
from reelway.kernels.clips import Pixels
from reelway.kernels.metrics.seams import seam
from reelway.kernels.metrics.series import measure
from reelway.kernels.metrics.statistics import paired_difference

from .common import Bench, Figure, Result, Row, Shown, finite, mean_of, plain, singles, told, write_video

SEAM_BLOCKS = 14  # of a video whose block edges are looked at


def seams(bench: Bench) -> Result:
    """Is there more change into the first frame of a block than into the first frames of latents inside it?"""
    ledger = bench.ledger("seams", blocks=SEAM_BLOCKS)
    shown = singles(bench, bench.cases)
    rows = [ledger.row(f"case-{at:03d}", partial(_seam, bench, at, each)) for at, each in enumerate(shown)]
    rows = [row for row in rows if row["student"] is not None and row["vae"] is not None]
    student, vae = ([row[name] for row in rows] for name in ("student", "vae"))
    ratio = mean_of(student)
    gap = paired_difference(np.array(vae)[:, None], np.array(student)[:, None])
    within = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    figures = [
        Figure(
            f"change at block edges over change inside blocks, {len(rows)} videos of {SEAM_BLOCKS} blocks",
            told(ratio),
            "1 within noise",
            ratio.low <= 1 <= ratio.high,
        ),
        Figure(
            "the same less that of renderings through the VAE alone",
            within,
            "0 within noise",
            not gap.seen,
        ),
    ]
    return Result(figures, {"student": plain(ratio), "vae": plain(mean_of(vae)), "cases": rows})


def _seam(bench: Bench, index: int, shown: Shown) -> Row:
    with bench.model.open(shown.caption, bench.seed, height=bench.size, width=bench.size) as stream:
        sizes = [stream.next_size, *[stream.generator.settings.block] * (SEAM_BLOCKS - 1)]
        made = np.concatenate([stream.next_chunk() for _ in range(SEAM_BLOCKS)])
    blocks = Blocks.of(sizes, bench.model.vae.temporal_factor)
    return {
        "caption": shown.caption,
        "student": finite(seam(measure(made).change, blocks.edges, blocks.inside).ratio),
        "vae": finite(seam(measure(_through_vae(bench, shown, len(made))).change, blocks.edges, blocks.inside).ratio),
        "video": write_video(bench, "seams", f"case-{index:03d}", made),
    }


def _through_vae(bench: Bench, shown: Shown, frames: int) -> Pixels:
    """A rendering, encoded and decoded."""
    vae = bench.model.vae
    with torch.no_grad():
        latents, _ = vae.encode(to_pixels(torch.from_numpy(shown.rendered(frames, bench))[None]))
        pixels, _ = vae.decode(latents)
    return to_video(pixels[0]).numpy()
