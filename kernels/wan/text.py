"""Text conditioning of Wan2.1: a UMT5 encoder and its tokenizer, and a word tokenizer for tiny models."""

import html
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import ftfy
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from .config import TEXT_LENGTH
from .context import TextContext

logger = logging.getLogger(__name__)

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@lru_cache(maxsize=1 << 16)  # a training sees its captions over and over
def clean_prompt(prompt: str) -> str:
    """A prompt as Wan was trained on it: mended Unicode, no HTML entities (twice escaped ones either), and
    single spaces."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(mended.split())


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws progress bars on stderr, even for a model of a megabyte."""
    showed = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if showed:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class TextEncoder(nn.Module):
    """A UMT5 encoder with its tokenizer; calling it turns prompts into what cross-attention reads.

    model: the encoder (arXiv 2304.09151); its relative position biases differ from layer to layer.
    tokenizer: appends the end token and pads on the right.
    text_length: tokens kept of a prompt, the end token included; 512 for Wan2.1 (arXiv 2503.20314).
    """

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, text_length: int = TEXT_LENGTH
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_length = text_length
        self._warned = False

    @classmethod
    def from_pretrained(cls, model_folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> "TextEncoder":
        """Read `text_encoder/` and `tokenizer/` of a model folder, never from the network.

        dtype: of the parameters; None keeps that of the files. Raises FileNotFoundError, or ValueError that
        names the folder.
        """
        folder = Path(model_folder)
        for needed in (
            folder / "text_encoder" / "config.json",
            folder / "tokenizer" / "tokenizer_config.json",
        ):
            if not needed.is_file():
                raise FileNotFoundError(f"{needed}: no such file; a model needs text_encoder/ and tokenizer/")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            with _no_bars():
                model = UMT5EncoderModel.from_pretrained(
                    folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=dtype or "auto"
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: text_encoder/ or tokenizer/ cannot be read ({error})") from error
        return cls(model, tokenizer)

    def save_pretrained(self, model_folder: str | os.PathLike[str]) -> None:
        """Write `text_encoder/` and `tokenizer/` of a model folder in diffusers' layout."""
        folder = Path(model_folder) / "text_encoder"
        with _no_bars():
            self.model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors writes files that only their owner reads
            shutil.copymode(folder / "config.json", file)
        self.tokenizer.save_pretrained(Path(model_folder) / "tokenizer")

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Clean and tokenise prompts: ids [B, L] and mask [B, L] of 1 then 0, L that of the longest prompt.

        A prompt of more than `text_length` tokens loses its end; the first such prompt is logged.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: must be a list of at least one text, got {prompts!r}")
        texts = [clean_prompt(prompt) for prompt in prompts]
        longest = max(len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids)
        if longest > self.text_length and not self._warned:
            logger.warning("a prompt of %d tokens is cut to %d", longest, self.text_length)
            self._warned = True
        tokens = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.text_length, return_tensors="pt"
        )
        return tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)

    def embed(self, ids: Tensor, mask: Tensor) -> TextContext:
        """Encode token ids [B, L] with their mask [B, L] (1 then 0), with gradients to the encoder.

        Rows past a prompt's last token become Wan's zero rows, folded into one. ValueError for more than
        `text_length` rows.
        """
        rows = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        lengths = mask.sum(dim=1).tolist()
        return TextContext.fold([row[:length] for row, length in zip(rows, lengths, strict=True)], self.text_length)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts: rows [B, L, D] in the encoder's precision, without gradients."""
        return self.embed(*self.tokenize(prompts))


def build_word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words and single punctuation marks, which appends the end token.

    Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, then the vocabulary in its order. `save_pretrained` writes a
    `tokenizer/` folder that transformers' AutoTokenizer and diffusers' pipelines load.
    Raises ValueError for an entry that occurs twice or that no text can produce.
    """
    entries = [PAD, END, UNKNOWN, *vocabulary]
    ids = {entry: index for index, entry in enumerate(entries)}
    if len(ids) < len(entries):
        raise ValueError("vocabulary: every entry must occur once and be none of <pad>, </s>, <unk>")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    for entry in vocabulary:
        if tokenizer.encode(entry).tokens != [entry]:
            raise ValueError(f"vocabulary: an entry must be one lower-case word or one mark, got {entry!r}")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ids[END])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=TEXT_LENGTH,
    )


def tiny_text_config(vocab_size: int, dim: int = 128) -> UMT5Config:
    """A UMT5 of two layers, four heads and `dim` channels, without dropout, to train with a tiny model."""
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim // 4,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def tiny_text_encoder(vocabulary: Sequence[str], dim: int = 128) -> TextEncoder:
    """A text encoder with random weights over a vocabulary of words, to train along with a tiny model."""
    tokenizer = build_word_tokenizer(vocabulary)
    return TextEncoder(UMT5EncoderModel(tiny_text_config(len(tokenizer), dim)), tokenizer)
