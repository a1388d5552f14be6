"""What the two benchmarks of ZeRO have in common: a network, its update by plain torch and by every stage, a table."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = "plain torch"
RATE, DECAY = 1e-4, 0.99
Row = dict[str, Any]


def make_network(layers: int, heads: int) -> nn.Module:
    from reelway.kernels.wan.config import CONFIGS
    from reelway.kernels.wan.transformer import VideoTransformer

    torch.manual_seed(0)
    width = heads * CONFIGS["tiny"].attention_head_dim
    return VideoTransformer(replace(CONFIGS["tiny"], num_layers=layers, num_attention_heads=heads, ffn_dim=4 * width))


def flow_matching(network: Any, step: int, rank: int, device: torch.device) -> Tensor:
    from reelway.kernels.wan.context import TextContext

    generator = torch.Generator().manual_seed(1000 * rank + step)
    latents, noise = (torch.randn(1, 3, network.config.in_channels, 4, 4, generator=generator) for _ in range(2))
    text = TextContext.dense(torch.randn(1, 4, network.config.text_dim, generator=generator).to(device))
    noisy = (0.5 * latents + 0.5 * noise).to(device)
    predicted = network(noisy, torch.full((1, 3), 500.0, device=device), text)
    return (predicted - (noise - latents).to(device)).square().mean()


class PlainEngine:
    """The update of `ZeroEngine` in torch alone, everything on every rank."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device)
        self.parameters = list(network.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, RATE, fused=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)
        self.optimizer.zero_grad()


def make_engine(stage: int | None, network: nn.Module, device: torch.device) -> Any:
    if stage is None:
        return PlainEngine(network, device)
    from reelway.cluster.zero import ZeroEngine, ZeroSettings

    return ZeroEngine(network, ZeroSettings(lambda step: RATE, stage=stage, ema_decay=DECAY))


def update(engine: Any, step: int, rank: int, device: torch.device) -> None:
    engine.backward(flow_matching(engine.network, step, rank, device))
    engine.step()


def show(title: str, rows: list[Row], unit: str, scale: float) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=f"{title} ({unit})")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        scales = [1.0 if name == "ratio" else scale for name in columns]
        table.add_row(
            *(cell if isinstance(cell, str) else f"{cell * by:.3f}" for cell, by in zip(cells, scales, strict=True))
        )
    Console(width=130).print(table)
