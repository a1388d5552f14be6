"""A causal model of many steps: the teacher's sampler under the student's attention, block by block."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.causal.many_step import ManyStepGenerator
from ..kernels.causal.student import StudentSettings
from ..kernels.clips import Pixels
from ..kernels.diffusion.noise import SampleKey
from ..kernels.precision import autocast as fast_autocast
from .pretraining import to_video
from .teacher import Teacher


class CausalTeacher:
    """Streams clips: guided Euler steps for each block, which is decoded as it comes.

    networks: text encoder, VAE and transformer, held as a teacher's are. autocast: in bfloat16, where it is fast.
    """

    def __init__(
        self, networks: Teacher, settings: StudentSettings, *, negative_prompt: str = "", autocast: bool = True
    ) -> None:
        self.transformer = networks.transformer
        self.encoder = networks.encoder
        self.vae = networks.vae
        self.shift = networks.shift
        self.device = networks.device
        self.settings = settings
        self._autocast = autocast
        self._negative = networks.encoder([negative_prompt])

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        negative_prompt: str = "",
        autocast: bool = True,
    ) -> "CausalTeacher":
        """Load the model folder of a causal teacher. FileNotFoundError or ValueError names what is missing or wrong."""
        settings = StudentSettings.read(folder)
        networks = Teacher.from_pretrained(folder, device, autocast=autocast)
        return cls(networks, settings, negative_prompt=negative_prompt, autocast=autocast)

    def stream(
        self, prompt: str, key: SampleKey, size: tuple[int, int], grid: Sequence[float], guidance: float
    ) -> Iterator[Pixels]:
        """An endless video, a block's frames at a time: uint8 [T, H, W, 3] on the CPU.

        size: latent height and width. grid: timesteps from 1000 down to 0. guidance: standard w.
        """
        with self._precision(), torch.no_grad():
            text = self.encoder([prompt])
            generator = ManyStepGenerator(
                self.transformer, self.settings, text, self._negative, [key], size, grid, guidance
            )
        state = None
        while True:
            with self._precision(), torch.no_grad():
                pixels, state = self.vae.decode(generator.next_block(), state)
            yield to_video(pixels)[0].cpu().numpy()

    def paths(
        self,
        prompts: Sequence[str],
        keys: Sequence[SampleKey],
        shape: tuple[int, int, int],
        grid: Sequence[float],
        record: Sequence[float],
        guidance: float,
    ) -> Tensor:
        """ODE states at the timesteps `record` of clips made block by block, each block on the clean ends before it.

        So a block's path is a function of its noise and of the past, as a causal student's is (Causal Forcing, arXiv
        2602.02214); a bidirectional teacher's is not. keys: one per prompt. shape: latent frames, height, width.
        Returns [K, B, F, C, H, W], float32, noise to clean.
        """
        frames, *size = shape
        with self._precision(), torch.no_grad():
            text = self.encoder(prompts)
            generator = ManyStepGenerator(
                self.transformer, self.settings, text, self._negative, keys, (size[0], size[1]), grid, guidance
            )
            return torch.cat([generator.next_path(record) for _ in self.settings.blocks(frames)], dim=2)

    def _precision(self) -> torch.autocast:
        return fast_autocast(self.device, enabled=self._autocast)
