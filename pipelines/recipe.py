"""Recipes: one YAML file per model, validated, with every default in exactly one place (here)."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..cluster.zero_settings import Place
from ..cluster.zero_settings import check as check_zero
from ..kernels.causal.student import StudentSettings
from ..kernels.diffusion.schedule import TimestepLaw, warp

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A section of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldRecipe(Strict):
    """The sprites videos that a tiny model learns."""

    level: Annotated[int, Field(ge=0, le=3)] = 0
    size: Positive = 64
    frames: Positive = 81


class OptimizerRecipe(Strict):
    """Muon and AdamW, or AdamW alone; linear warm-up and cosine decay to `final_share` of the learning rate."""

    learning_rate: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    final_share: Share = 0.02
    clip_norm: Rate = 1.0
    ema_decay: Share = 0.998
    muon: bool = True


class ReconstructionRecipe(Strict):
    """Weights of the VAE's loss terms, see `kernels.objectives.reconstruction`."""

    absolute_weight: Share = 1.0
    square_weight: Annotated[float, Field(ge=0)] = 10.0
    edge_weight: Annotated[float, Field(ge=0)] = 1.0
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6


class VAEPhaseRecipe(Strict):
    """A stretch of the VAE's training, which begins with the averaged weights of the one before.

    Short clips teach quickly; a last phase on long ones is needed, or quality falls where the short ones ended.
    """

    steps: Positive
    batch: Positive
    clip_frames: Positive
    optimizer: OptimizerRecipe = OptimizerRecipe()


class VAERecipe(Strict):
    """`AutoencoderKLWan`'s shape and its training. Field names of `network` are diffusers'."""

    network: dict[str, Any]
    loss: ReconstructionRecipe = ReconstructionRecipe()
    phases: Annotated[list[VAEPhaseRecipe], Field(min_length=1)]


class TextRecipe(Strict):
    """The text encoder learns to tell what captions say, before the teacher reads it. It stays as it is then."""

    steps: Positive = 2000
    batch: Positive = 256
    optimizer: OptimizerRecipe = OptimizerRecipe()


class TurnRecipe(Strict):
    """The batch of one update: `clips` clips of `frames` latent frames.

    law, shift: of the timesteps it trains on; the teacher's shift, by default. Shapes are decided below a noise level
    of 0.7, where uniform levels under a shift of 3 put less than half of the samples; motion between 0.5 and 0.87,
    where logit-normal ones under a shift of 2.3 put more than half (`docs/performance.md`).
    """

    frames: Positive
    clips: Positive
    law: TimestepLaw = "uniform"
    shift: Rate | None = None


class TeacherPhaseRecipe(Strict):
    """A stretch of the teacher's training, which begins with the averaged weights of the one before.

    turns: the batches of its updates, one after the other and again from the first. Clips of one latent frame, a
    picture, teach what things look like for a twentieth of the arithmetic; the first latent frame of a video is one.
    """

    steps: Positive
    turns: Annotated[list[TurnRecipe], Field(min_length=1)]
    optimizer: OptimizerRecipe = OptimizerRecipe()


class TeacherRecipe(Strict):
    """Flow-matching training of the transformer.

    clips: how many are rendered and encoded, by their length in latent frames. map_weight: of the demand that the
    middle block knows what each token shows; 0 for none.
    """

    clips: Annotated[dict[Positive, Positive], Field(min_length=1)]
    shift: Rate = 3.0
    prompt_drop: Share = 0.1
    map_weight: Annotated[float, Field(ge=0)] = 0.5
    phases: Annotated[list[TeacherPhaseRecipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _must_have_the_clips(self) -> "TeacherRecipe":
        for frames in (turn.frames for phase in self.phases for turn in phase.turns):
            if frames not in self.clips:
                raise ValueError(f"phases: a turn of {frames} latent frames needs clips of that length, in `clips`")
        return self


class PretrainRecipe(Strict):
    """Everything that decides what `reelway pretrain` makes."""

    model: str = "tiny"
    seed: int = 0
    world: WorldRecipe = WorldRecipe()
    vae: VAERecipe
    text: TextRecipe = TextRecipe()
    teacher: TeacherRecipe


class ClipRecipe(Strict):
    """The clips that a model learns and makes. Height and width are pixels, frames are pixel frames."""

    height: Positive
    width: Positive
    frames: Positive = 81
    frame_rate: Rate = 16.0


class IngestRecipe(Strict):
    """How videos become latent shards.

    stride: frames from one clip's start to the next one's; a clip's length by default, so that none overlap.
    batch: clips that the VAE encodes at once; part of the data set's fingerprint.
    """

    stride: Positive | None = None
    batch: Positive = 4
    per_shard: Positive = 64
    smallest_side: Positive = 64
    least_motion: Annotated[float, Field(ge=0)] = 0.5
    least_brightness: Annotated[float, Field(ge=0)] = 4.0
    text_embeddings: bool = False


class TrajectoriesRecipe(Strict):
    """How a teacher's ODE trajectories are made (CausVid, arXiv 2412.07772, section 4.3).

    minimum_steps: Euler steps, at least; the grid is the shortest that holds the student's timesteps exactly.
    guidance: standard w. batch: clips of one teacher call; part of the data set's fingerprint.
    """

    seed: int = 0
    samples: Positive = 1
    minimum_steps: Positive = 48
    guidance: Rate = 6.0
    negative_prompt: str = ""
    batch: Positive = 8
    per_shard: Positive = 64
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    autocast: bool = True
    text_embeddings: bool = False


class StudentRecipe(Strict):
    """The causal student, in latent frames. `timesteps` are warped by `shift`: [1000, 750, ...] before it."""

    block: Positive = StudentSettings.block
    first_block: Positive | None = StudentSettings.first_block
    timesteps: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=1)] = [1000, 750, 500, 250]
    shift: Rate = StudentSettings.shift
    window: Positive = StudentSettings.window
    sink: Annotated[int, Field(ge=0)] = StudentSettings.sink

    @model_validator(mode="after")
    def _must_be_a_student(self) -> "StudentRecipe":
        self.settings()
        return self

    def settings(self) -> StudentSettings:
        """The student that this describes; ValueError where it describes none."""
        values = self.model_dump(exclude={"timesteps"})
        return StudentSettings(**values, timesteps=tuple(warp(self.timesteps, shift=self.shift)))


class TrainingOptimizerRecipe(Strict):
    """AdamW with linear warm-up, then a cosine to `final_share` of the rate; the same rate to the end by default."""

    learning_rate: Rate = 2e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_share: Share = 1.0
    clip_norm: Rate = 10.0
    ema_decay: Share = 0.0


class TrainingRecipe(Strict):
    """What every training stage has.

    batch: clips of one update, over all processes. lanes: streams of samples that a batch is dealt from; any number
    of processes that divides it sees the same batches. micro_batch: clips of one forward pass, by memory.
    diverged: a loss of so many times the median of the last ones stops the run.
    """

    seed: int = 0
    steps: Positive
    batch: Positive
    lanes: Positive = 1
    micro_batch: Positive | None = None
    checkpoint_every: Positive = 50
    keep: Positive = 2
    sheet_every: Positive = 100
    activation_checkpointing: bool = False
    poisoned: Literal["fatal", "skip"] = "fatal"
    diverged: Annotated[float, Field(gt=1)] = 100.0

    @model_validator(mode="after")
    def _must_divide(self) -> "TrainingRecipe":
        if self.batch % self.lanes:
            raise ValueError(f"batch: must be a multiple of lanes ({self.lanes}), got {self.batch}")
        return self


class FineTuneRecipe(Strict):
    """Flow-matching training of a given teacher on latent shards; the shift is the model's own."""

    seed: int = 0
    steps: Positive = 1000
    batch: Positive = 16
    prompt_drop: Share = 0.1
    optimizer: TrainingOptimizerRecipe = TrainingOptimizerRecipe(learning_rate=1e-5, clip_norm=1.0, ema_decay=0.99)


class InitializeRecipe(TrainingRecipe):
    """ODE initialisation (CausVid, arXiv 2412.07772, section 4.3): 3,000 steps of 128 at 2e-6 there.

    teacher_forcing: a block sees the clean ends of the blocks before it; for trajectories of a causal teacher.
    """

    steps: Positive = 3000
    batch: Positive = 128
    teacher_forcing: bool = False
    optimizer: TrainingOptimizerRecipe = TrainingOptimizerRecipe()


class CausalTeacherRecipe(TrainingRecipe):
    """A causal many-step model, tuned from the teacher by flow matching.

    context "noisy" is diffusion forcing (arXiv 2407.01392): each block at its own level, earlier blocks noisy;
    "clean" is teacher forcing: earlier blocks as they are.
    """

    steps: Positive = 2000
    batch: Positive = 64
    context: Literal["noisy", "clean"] = "noisy"
    prompt_drop: Share = 0.1
    optimizer: TrainingOptimizerRecipe = TrainingOptimizerRecipe()


class DistillRecipe(TrainingRecipe):
    """Distribution matching (CausVid, section 4.2; Self-Forcing, arXiv 2506.08009; LongLive, arXiv 2509.22622).

    steps: updates of the critic; the student has one in `critic_updates` of them.
    guidance: standard w of the real score: the references write s = w - 1.
    shift, smallest_timestep, largest_timestep: the distribution of the score networks' timestep.
    rollout_frames, switch: for `long`: latent frames of a rollout, and whether prompts change inside.
    """

    steps: Positive = 1000
    batch: Positive = 64
    guidance: Rate = 4.5
    shift: Rate = 5.0
    smallest_timestep: Annotated[float, Field(gt=0, lt=1000)] = 20.0
    largest_timestep: Annotated[float, Field(gt=0, le=1000)] = 980.0
    critic_updates: Positive = 5
    student: TrainingOptimizerRecipe = TrainingOptimizerRecipe()
    critic: TrainingOptimizerRecipe = TrainingOptimizerRecipe()
    rollout_frames: Positive | None = None
    switch: bool = True


class ZeroRecipe(Strict):
    """How `--engine zero` holds what is trained (ZeRO, arXiv 1910.02054).

    stage: 0 replicates all, 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too, and then the
    teacher's as well. precision: fp32; autocast, fp32 weights computed with in bfloat16; bf16, bfloat16 weights
    beside sharded fp32 masters (stages 2 and 3). patience: seconds without a step after which all processes are started
    again; after half of it the one that hangs is named.
    """

    stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "autocast", "bf16"] = "autocast"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    patience: Rate = 1800.0

    @model_validator(mode="after")
    def _must_fit(self) -> "ZeroRecipe":
        places: tuple[Place, ...] = ("none", "cpu")
        check_zero(self.stage, self.precision, places[self.offload_optimizer], places[self.offload_parameters])
        return self


class TelemetryRecipe(Strict):
    """Where the curves of `initialize` and `distill` go besides the run's own folder.

    trackers: of wandb and mlflow, which must be installed. project: their name for what belongs together. Everything
    else is theirs: WANDB_MODE, MLFLOW_TRACKING_URI, ...
    """

    trackers: list[Literal["wandb", "mlflow"]] = []
    project: str = "reelway"


class DistillMethods(Strict):
    """A section per method of `reelway distill`."""

    causvid: DistillRecipe = DistillRecipe()
    self_forcing: DistillRecipe = DistillRecipe()
    long: DistillRecipe = DistillRecipe()


class Recipe(Strict):
    """One file of `configs/`: a section per job. `pretrain` only where a model is trained from nothing."""

    pretrain: PretrainRecipe | None = None
    finetune: FineTuneRecipe = FineTuneRecipe()
    clip: ClipRecipe
    student: StudentRecipe = StudentRecipe()
    ingest: IngestRecipe = IngestRecipe()
    trajectories: TrajectoriesRecipe = TrajectoriesRecipe()
    causal_teacher: CausalTeacherRecipe = CausalTeacherRecipe()
    initialize: InitializeRecipe = InitializeRecipe()
    distill: DistillMethods = DistillMethods()
    zero: ZeroRecipe = ZeroRecipe()
    telemetry: TelemetryRecipe = TelemetryRecipe()


Section = TypeVar("Section", bound=Strict)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe; `overrides` are "a.b=value", the value in YAML. ValueError on the first mistake."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path}: must be a table of sections, got {type(content).__name__}")
    for override in overrides or []:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"recipe {path}: {field}: {first['msg']}, got {first['input']!r}") from None


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set: expected a.b=value, got {override!r}")
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: {parent} is not a section")
    table[last] = yaml.safe_load(value)


def fingerprint(section: BaseModel | dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ when any value of the section differs."""
    content = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
