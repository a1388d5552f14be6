"""What the transformer's cross-attention reads: a batch of prompts' text embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TEXT_LENGTH


@dataclass(frozen=True)
class TextContext:
    """Text embeddings of a batch of prompts, with Wan's zero padding folded into one row.

    Wan attends to all 512 rows, the zero ones too, without a mask. Those rows are equal, so attention over
    n of them is attention over one whose score is raised by log n: the same function, with the few rows of
    the longest prompt instead of 512.

    rows: [B, L, D], zero from each prompt's length on.
    score_bias: [B, L] fp32, added to the attention scores: 0 for the prompt's rows, log n for the row that
        stands for n zero rows, -inf for rows that stand for nothing.
    """

    rows: Tensor
    score_bias: Tensor

    @classmethod
    def fold(cls, prompts: Sequence[Tensor], text_length: int = TEXT_LENGTH) -> "TextContext":
        """From each prompt's embeddings [n_i, D], as if padded with zero rows to `text_length`."""
        longest = max(len(prompt) for prompt in prompts)
        if longest > text_length:
            raise ValueError(f"prompt embeddings: at most {text_length} rows, got {longest}")
        length = min(longest + 1, text_length)
        rows = prompts[0].new_zeros(len(prompts), length, prompts[0].shape[-1])
        bias = torch.full((len(prompts), length), -torch.inf, dtype=torch.float32, device=rows.device)
        for index, prompt in enumerate(prompts):
            rows[index, : len(prompt)] = prompt
            bias[index, : len(prompt)] = 0.0
            if len(prompt) < text_length:
                bias[index, len(prompt)] = torch.tensor(float(text_length - len(prompt))).log()
        return cls(rows, bias)

    @classmethod
    def dense(cls, rows: Tensor) -> "TextContext":
        """From padded embeddings [B, L, D], every row attended to as it is."""
        return cls(rows, torch.zeros(rows.shape[:2], dtype=torch.float32, device=rows.device))

    def __getitem__(self, index: slice | Tensor) -> "TextContext":
        return TextContext(self.rows[index], self.score_bias[index])

    def expand(self, batch: int) -> "TextContext":
        """One prompt for a whole batch; a context that already has `batch` prompts is unchanged."""
        return TextContext(self.rows.expand(batch, -1, -1), self.score_bias.expand(batch, -1))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextContext":
        """Move to `device`; `dtype` applies to the rows, the bias stays fp32."""
        return TextContext(self.rows.to(device=device, dtype=dtype), self.score_bias.to(device=device))

    @classmethod
    def concatenate(cls, contexts: Sequence["TextContext"]) -> "TextContext":
        """Join batches (for example conditional and unconditional) of different row counts."""
        length = max(context.rows.shape[1] for context in contexts)

        def padded(context: "TextContext") -> tuple[Tensor, Tensor]:
            missing = length - context.rows.shape[1]
            rows = torch.nn.functional.pad(context.rows, (0, 0, 0, missing))
            return rows, torch.nn.functional.pad(context.score_bias, (0, missing), value=-torch.inf)

        rows, biases = zip(*map(padded, contexts), strict=True)
        return cls(torch.cat(rows), torch.cat(biases))
