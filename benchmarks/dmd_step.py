"""What a DMD step costs on one device: `python benchmarks/dmd_step.py --config wan2.1-1.3b --device cuda`.

CausVid's step (arXiv 2412.07772, section 4.2) by the plain engine; weights and latents are random, on which speed does
not depend. Student and critic are trained with AdamW in fp32 under bf16 autocast, the teacher is held in bf16, and
activations are kept for one block at a time. Timed are a step that trains the critic alone and one that trains the
student too, each the median of `--repeats` after one that warms up. FLOPs are those of matrix products in closed form;
`model` leaves out what is computed a second time for the gradient. Prints JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reelway.actors.bench_device import DTYPES, MemoryMeter, describe_device, find_device, measure_peaks, versions
from reelway.actors.bench_network import cut
from reelway.actors.engine import OptimizerSettings, TorchEngine, computed_dtype
from reelway.actors.learning.batch import Batch, PromptContexts
from reelway.actors.learning.distillation import DmdLearner, DmdSettings
from reelway.actors.learning.sources import NoisedClips
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.wan.config import CONFIGS, TransformerConfig
from reelway.kernels.wan.context import TextContext
from reelway.kernels.wan.cost import ForwardShape, forward_flops, text_flops
from reelway.kernels.wan.transformer import VideoTransformer

PROMPT_TOKENS = 128
PIXELS_PER_LATENT = 8  # along height and width; the transformer's patch doubles it
CRITIC_UPDATES = 5  # a student's update in so many steps
OPTIMIZER = OptimizerSettings(learning_rate=1e-6, total_steps=100, betas=(0.0, 0.999))


def main(options: argparse.Namespace) -> dict[str, Any]:
    device = find_device(options.device)
    config = CONFIGS[options.config]
    if options.layers is not None:
        config, _ = cut(config, None, options.layers)
    for flag, side in (("--height", options.height), ("--width", options.width)):
        if side < 2 * PIXELS_PER_LATENT or side % (2 * PIXELS_PER_LATENT):
            raise ValueError(f"{flag}: must be a multiple of {2 * PIXELS_PER_LATENT} pixels, got {side}")
    student = StudentSettings(window=options.frames, sink=3)
    student.blocks(options.frames)
    meter = MemoryMeter(device)
    learner = make_learner(config, student, device)
    meter.start()
    batch = make_batch(options, config)
    seconds: dict[str, list[float]] = {"critic": [], "student and critic": []}
    for repeat in range(options.repeats + 1):
        for name, updates in (("critic", 1), ("student and critic", CRITIC_UPDATES)):
            learner.critic.updates = updates  # whose turn it is follows from the critic's updates
            taken = timed(learner, batch, device)
            if repeat:
                seconds[name].append(taken)
    peak = meter.peak()
    del learner
    reached = measure_peaks(device, DTYPES["bf16" if device.type == "cuda" else "fp32"])
    steps = {
        name: report(statistics.median(times), flops(config, student, options, name), reached.matmul)
        for name, times in seconds.items()
    }
    whole = (CRITIC_UPDATES - 1) * steps["critic"]["seconds"] + steps["student and critic"]["seconds"]
    return {
        "options": vars(options) | {"json": None},
        "device": describe_device(device),
        "versions": versions(),
        "matmul_peak": reached.matmul,
        "memory_peak": peak,
        "steps": steps,
        "seconds_per_student_update": whole,
    }


def make_learner(config: TransformerConfig, student: StudentSettings, device: torch.device) -> DmdLearner:
    networks = []
    for _ in range(3):
        with torch.device(device):
            networks.append(VideoTransformer(config))
        networks[-1].gradient_checkpointing = True
    engines = [TorchEngine(network, OPTIMIZER, device) for network in networks[:2]]
    teacher = networks[2].to_precision(computed_dtype(engines[1]))
    contexts = PromptContexts(lambda prompts: random_context(prompts, config), device)
    source = NoisedClips(engines[0], contexts, student, seed=0)
    return DmdLearner(*engines, teacher, contexts, source, DmdSettings(critic_updates=CRITIC_UPDATES))


def random_context(prompts: Sequence[str], config: TransformerConfig) -> TextContext:
    return TextContext.fold([torch.randn(PROMPT_TOKENS, config.text_dim) for _ in prompts])


def make_batch(options: argparse.Namespace, config: TransformerConfig) -> Batch:
    height, width = options.height // PIXELS_PER_LATENT, options.width // PIXELS_PER_LATENT
    latents = torch.randn(options.batch, options.frames, config.in_channels, height, width)
    names = tuple(f"sample {index}" for index in range(options.batch))
    return Batch(0, options.batch, range(options.batch), names, names, latents)


def timed(learner: DmdLearner, batch: Batch, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    learner.step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def flops(
    config: TransformerConfig, student: StudentSettings, options: argparse.Namespace, name: str
) -> tuple[float, float]:
    """Of a step: the model's, and all that are computed."""
    tokens = config.tokens_per_frame(options.height // PIXELS_PER_LATENT, options.width // PIXELS_PER_LATENT)
    rows, text = PROMPT_TOKENS + 1, text_flops(config, PROMPT_TOKENS + 1)

    def of(frames: int, context: int = 0) -> int:
        return forward_flops(config, ForwardShape(frames, tokens, rows, context)).total

    whole = of(options.frames) + text
    sizes = student.blocks(options.frames)
    causal = sum(of(size, sum(sizes[:index])) for index, size in enumerate(sizes)) + text
    if name == "critic":  # the student's clip; the critic, with twice its cost for the gradient
        model, again = causal + 3 * whole, whole
    else:  # the student with its gradient; the teacher twice and the critic once for the scores; the critic's update
        model, again = 3 * causal + 3 * whole + 3 * whole, causal + whole
    return options.batch * model, options.batch * (model + again)


def report(seconds: float, work: tuple[float, float], peak: float) -> dict[str, float]:
    model, computed = work
    return {
        "seconds": seconds,
        "model_tflop": model / 1e12,
        "computed_tflop": computed / 1e12,
        "model_tflops_per_second": model / seconds / 1e12,
        "computed_tflops_per_second": computed / seconds / 1e12,
        "model_share_of_peak": model / seconds / peak,
        "computed_share_of_peak": computed / seconds / peak,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="wan2.1-1.3b", choices=sorted(CONFIGS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="cut the networks to their first blocks")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report here too")
    given = parser.parse_args()
    try:
        result = json.dumps(main(given), indent=2, default=str)
    except ValueError as error:
        parser.error(str(error))
    print(result)
    if given.json:
        given.json.write_text(result + "\n")
