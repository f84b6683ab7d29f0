"""The sections of a stage's YAML, one class each: every key, what it means, and its default."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from aria_train.config.fields import (
    AboveZero,
    AdamKernel,
    Decay,
    LocalPath,
    NonNegative,
    Number,
    Part,
    Positive,
    Section,
    Share,
    Size,
    Tokens,
    WandbMode,
)

MAX_CONTEXT = 1 << 24
"""Tokens of a window at most: packing keeps a list for every room that a window may have left."""


class VisionConfig(Section):
    """The vision encoder (SigLIP-type ViT at native resolution) and the projector behind it."""

    hidden_size: Size = 1152
    num_layers: Size = 27
    num_heads: Size = 16
    mlp_size: Size = 4304
    patch_size: Size = 14
    position_grid: Size = 70
    """Side of the square grid of learned positions; patch positions of any aspect ratio are bucketed into it."""
    norm_eps: AboveZero = 1e-6
    image_sizes: dict[Size, Size] = {490: 128, 980: 256}
    """Longer edge in pixels of each size class -> visual tokens (projector queries) an image of the class becomes."""
    min_image_size: Size = 336
    """Pixels the shorter edge is never resized below."""

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        if not self.image_sizes:
            raise ValueError("image_sizes needs at least one size class, such as {490: 128}")
        for size in self.image_sizes:
            if size % self.patch_size:
                raise ValueError(f"image size {size} is not a multiple of patch_size {self.patch_size}")
            if size < self.min_image_size:
                raise ValueError(f"image size {size} is below min_image_size {self.min_image_size}")
        return self


class ModelConfig(Section):
    """The architecture. Defaults are Aria's own (arXiv 2410.05993 and the released configuration)."""

    preset: str | None = None
    """Name of a file in `configs/models/` (without `.yaml`), or a path to one; keys given beside it win."""
    vocab_size: Size = 100352
    hidden_size: Size = 2560
    num_layers: Size = 28
    num_heads: Size = 20
    num_kv_heads: Size = 20
    head_dim: Size = 128
    num_experts: Size = 64
    top_k: Size = 6
    expert_size: Size = 1664
    """Width of one expert's SwiGLU."""
    num_shared_experts: NonNegative = 2
    """Experts every token passes through, computed as one SwiGLU of `num_shared_experts * expert_size`."""
    norm_eps: AboveZero = 1e-6
    rope_base: AboveZero = 100_000.0
    max_positions: Size = 65536
    init_std: AboveZero = 0.02
    balance_group_size: Size = 8
    """Experts per group of the load-balancing loss; 1 balances single experts (Switch)."""
    balance_coefficient: Number = 1e-3
    expert_balance_coefficient: Number = 0.0
    """Coefficient of a second, expert-level balance loss beside the grouped one."""
    z_coefficient: Number = 1e-5
    pad_token_id: NonNegative = 2
    bos_token_id: NonNegative = 1
    eos_token_id: NonNegative = 2
    image_token_id: NonNegative = 9
    vision: VisionConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.num_experts % self.balance_group_size:
            raise ValueError(
                f"num_experts {self.num_experts} is not divisible by balance_group_size {self.balance_group_size}"
            )
        for key in ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id"):
            if getattr(self, key) >= self.vocab_size:
                raise ValueError(f"{key} {getattr(self, key)} is outside the vocabulary of {self.vocab_size}")
        return self


class ParallelConfig(Section):
    """How the model is spread: expert parallelism and ZeRO-1. World = expert ranks x the rest."""

    expert_parallel_size: Positive = 1
    """Consecutive ranks that share one set of experts; tokens move among them by all-to-all."""
    zero_group_size: Positive | None = None
    """Consecutive ranks that shard master weights and optimizer state among them; null = all ranks.
    With less than the world, groups hold replicas of each other (hybrid sharding)."""


class SourceConfig(Section):
    """One corpus of a blend."""

    name: str
    path: str | list[str]
    """Text: path prefix of a `.bin`/`.idx` pair (or a list, or a folder of pairs). Multimodal: a prepared folder."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share of windows, relative to the other sources of the blend."""
    min_tokens: Positive | None = None
    """Only documents or samples of at least so many tokens are read."""
    max_tokens: Positive | None = None
    """Only documents or samples of at most so many tokens are read."""
    concatenate: Positive | Literal["window"] | None = None
    """Captioned images only: so many of them, or as many as fit a window, become one long sequence, first all images
    and then all captions."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        paths = [self.path] if isinstance(self.path, str) else self.path
        if not all(paths) or not paths:
            raise ValueError(f"path {self.path!r} names no corpus")
        if any("://" in path for path in paths):
            raise ValueError("path must be one of this machine, not a URL")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class DataConfig(Section):
    """What is read. A blend draws windows from its sources in proportion to their weights."""

    tokenizer: LocalPath | None = None
    """Tokenizer folder, for samples of text in reports; training itself reads token ids."""
    train: list[SourceConfig] = []
    validation: list[SourceConfig] = []
    workers: Positive = 2
    """Threads per rank that read, decode and pack windows ahead of the step."""
    prefetch_batches: Positive = 4
    """Micro-batches held ready per rank."""
    balance_work: bool = False
    """Deal each step's windows out by the work in them, so that ranks wait less for each other; for long contexts,
    where windows differ. The windows of a step stay the same, which rank has which changes."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for key in ("train", "validation"):
            names = [source.name for source in getattr(self, key)]
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: source names must differ, got {names}")
        return self


class OptimizerConfig(Section):
    """AdamW. Norm gains, biases and other vectors are not decayed."""

    kernel: AdamKernel = "torch"
    """Whose fused kernel computes the update: PyTorch's; or that of apex or Transformer Engine, if installed."""
    lr: Annotated[Number, Field(gt=0)] = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    clip_norm: Annotated[Number, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    lr_scale: dict[Part, Annotated[Number, Field(gt=0)]] = {}
    """Learning rate of a part of the model relative to `lr`, such as {vision: 0.1}; parts not named take `lr`."""


class ScheduleConfig(Section):
    """Learning rate over tokens: linear warm-up, then the named decay, ending at `min_lr_ratio * lr`."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_tokens: Tokens = 0
    total_tokens: Tokens | None = None
    """Tokens at which the decay ends; null = the run's own length."""
    decay_tokens: Tokens = 0
    """Warm-up-stable-decay: length of the final linear decay."""
    min_lr_ratio: Share = 0.1
    rope_from: Annotated[Number, Field(gt=1)] | None = None
    """RoPE base that the run begins with, if it is to change gradually to `model.rope_base`; null = no change."""
    rope_tokens: Tokens = 0
    """Tokens over which the RoPE base goes from `rope_from` to `model.rope_base`, geometrically."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if (self.rope_from is None) != (self.rope_tokens == 0):
            raise ValueError("rope_from and rope_tokens go together: the base to begin with, and how long to change it")
        return self


class LoraConfig(Section):
    """Low-rank adapters: they alone are trained and saved, everything else stays as `checkpoint.init_from` has it."""

    rank: Positive = 16
    alpha: AboveZero = 32.0
    """Adapters count alpha / rank times."""
    targets: Annotated[list[Literal["attention", "experts"]], Field(min_length=1)] = ["attention", "experts"]
    """What gets adapters: the projections of the attention, the weights of the routed experts."""
    init_from: LocalPath | None = None
    """Folder with `adapter_model.safetensors` that the adapters start from; null = afresh, changing nothing yet."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class TrainConfig(Section):
    """The loop."""

    context_length: Annotated[Size, Field(le=MAX_CONTEXT)] = 8192
    """Tokens per window."""
    global_batch_size: Size = 1
    """Windows per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Size = 1
    """Windows per forward and backward pass on one rank."""
    max_tokens: Annotated[Tokens, Field(gt=0)] | None = None
    """Stop after this many tokens (window positions: steps x global_batch_size x context_length)."""
    max_steps: Positive | None = None
    """Stop after this many steps; with `max_tokens` too, whichever comes first."""
    seed: NonNegative = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 computes in bfloat16; master weights, reductions and optimizer state are fp32 in both."""
    fp8_experts: bool = False
    """Multiply the routed experts in FP8 (E4M3, scaled by row and column), but for gradients of weights; with precision
    bf16, on an H100 or H200."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none; all but the dear ones (GEMMs, attention); whole layers."""
    compile: bool = False
    """Fuse what lies between products and attention (norms, rotations, SwiGLU, routing, the loss) with torch.compile,
    in the course of the first step: for GPUs. On a CPU it needs a C++ compiler, and little is gained."""
    profile: Annotated[NonNegative, Field(le=100)] = 0
    """Steps, after two that warm up, of which `profile/` in the run directory gets a trace and a table of where the
    time goes; 0 = none."""
    run_dir: LocalPath = "runs/default"
    eval_interval_steps: NonNegative = 0
    """Held-out loss every so many steps, and before the first and after the last; 0 = never."""
    eval_windows: Positive = 64
    """Held-out windows per evaluation, the same ones each time."""
    freeze: list[Part] = []
    """Parts of the model whose weights stay as they are."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class CheckpointConfig(Section):
    """When to save, what to keep, where to start."""

    interval_steps: NonNegative = 1000
    """Save every so many steps; the last step is always saved. 0 = only the last."""
    interval_minutes: Annotated[Number, Field(ge=0)] = 0.0
    """Save also whenever so many minutes have passed since the last save; 0 = never by the clock."""
    keep_last: Positive = 3
    """Newest checkpoints to keep."""
    keep_every_steps: NonNegative = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0 = none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; false needs no copy, and waits for the disk."""
    storage: str | None = None
    """Path or fsspec URL (such as s3://bucket/run) under which `checkpoints/` lies; null = train.run_dir."""
    init_from: str | None = None
    """Checkpoint (or run directory) whose weights a new run starts from; optimizer and position start afresh."""
    init_vision_from: LocalPath | None = None
    """Hugging Face folder of a SigLIP vision encoder that a new run's vision encoder starts from."""
    init_fresh: list[Part] = []
    """Parts that start from random weights although `init_from` is given: named, so that none does by accident."""
    init_optimizer: bool = False
    """Whether a new run takes over the Adam moments of `init_from` too; the position in the data starts afresh."""


class GuardConfig(Section):
    """What a run does about bad batches and about hangs."""

    spike_sigmas: Annotated[Number, Field(ge=0)] = 0.0
    """Skip the update of a step whose gradient norm is so many standard deviations above the mean of the last
    `spike_window`; 0 = skip only what is not finite, which is always skipped."""
    spike_window: Annotated[Positive, Field(ge=2)] = 100
    """Updates whose gradient norms are remembered; none is judged before there are so many."""
    rollback_after: Positive = 5
    """Steps skipped in a row after which the run goes back to the weights of the last good checkpoint."""
    hang_minutes: Annotated[Number, Field(ge=0)] = 30.0
    """Minutes without a finished step, evaluation or save after which the job reports where every rank is, and ends
    with a status that says to start it again; 0 = never."""


class LaunchConfig(Section):
    """What `aria-train launch` asks SLURM for."""

    nodes: Positive = 1
    ranks_per_node: Positive = 8
    """Processes per node; unless train.device is cpu, as many GPUs."""
    time_limit: str = "24:00:00"
    """Of one try. Before it ends the run saves, stops, and queues again."""
    warning_seconds: Positive = 300
    """Seconds before the time limit at which the run is asked to stop: longer than a step, a save, and an evaluation
    that may be under way."""
    max_restarts: NonNegative = 3
    """Times that failed ranks start again within the job."""
    python: str = "python"
    """The interpreter on the nodes."""
    setup: list[str] = []
    """Lines of shell that every node runs first, such as `module load cuda` or `source .venv/bin/activate`."""
    sbatch: dict[str, str | int] = {}
    """Further options of sbatch, such as {partition: gpu, account: lab, exclusive: ""}."""

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        for key, value in self.sbatch.items():
            if not re.fullmatch(r"[a-z][a-z-]*", key) or "\n" in str(value):
                raise ValueError(f"sbatch: {key!r}: an option of sbatch without its dashes, such as partition: gpu")
            if key == "array":
                raise ValueError("sbatch: array: job arrays would train the same run several times at once")
        return self


class LoggingConfig(Section):
    """Where metrics go, beside the console and `metrics.jsonl`."""

    interval_steps: Positive = 1
    """Console, TensorBoard and wandb every so many steps; `metrics.jsonl` has every step."""
    tensorboard: bool = False
    wandb: WandbMode = "off"
    wandb_project: str = "aria_train"


class NeedleConfig(Section):
    """A grid of haystacks, lengths by depths, with one needle each. Text: facts in a corpus."""

    haystack: LocalPath | None = None
    """Corpus to hide needles in; null = the first source of `data.validation` that can."""
    questions: LocalPath | None = None
    """Visual needles: prepared corpus of conversations, each about an image to be found among the haystack's."""
    lengths: list[Positive] = []
    """Tokens; empty = eight lengths up to train.context_length, those published for 64K."""
    depths: Positive = 11
    """Places of the needle, evenly from the beginning to the end."""
    trials: Positive = 1
    """Needles per cell of the grid."""


class EvaluationConfig(Section):
    """Evaluations beside the held-out loss; figures go to `evaluations.jsonl`, pictures to `report/`."""

    interval_steps: NonNegative = 0
    """Every so many steps, and before the first and after the last; 0 = never."""
    needle: NeedleConfig | None = None
    """Facts in long text."""
    visual_needle: NeedleConfig | None = None
    """Images among many."""
    answers: LocalPath | None = None
    """Prepared corpus of conversations, or a file of them: share of last questions answered word for word."""
    experts: bool = False
    """Which experts see and which read, over `train.eval_windows` windows of each source of `data.validation`."""
