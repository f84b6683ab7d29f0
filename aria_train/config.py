"""Typed configuration: one YAML file per stage, one class per section.

`load_config(path, overrides)` reads the file, fills in the model preset, applies `section.key=value` overrides,
and checks everything that can be checked before anything is allocated. Errors name the file and line, the key,
what was given, what is allowed, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from aria_train.errors import ConfigError

_TOKEN_SUFFIX = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _parse_tokens(value: Any) -> Any:
    """`6.4T`, `33B`, `2e9` and `1_000` all name a number of tokens."""
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        scale = _TOKEN_SUFFIX.get(text[-1:].upper(), 1)
        try:
            value = float(text[:-1] if scale > 1 else text) * scale
        except ValueError:
            raise ValueError("a number of tokens, such as 500M, 33B, 6.4T or 1_000_000") from None
        return round(value) if abs(value) < 2**63 else value
    return value


def _parse_float(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; people mean a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
        return float(value.replace("_", ""))
    return value


Tokens = Annotated[int, BeforeValidator(_parse_tokens), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_parse_float), Field(allow_inf_nan=False)]
AboveZero = Annotated[Number, Field(gt=0)]
Part = Literal["decoder", "vision", "projector"]
"""A part of the model that a stage may start from elsewhere, freeze, or give a learning rate of its own."""
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True, strict=False)


class VisionConfig(Section):
    """The vision encoder (SigLIP-type ViT at native resolution) and the projector behind it."""

    hidden_size: Positive = 1152
    num_layers: Positive = 27
    num_heads: Positive = 16
    mlp_size: Positive = 4304
    patch_size: Positive = 14
    position_grid: Positive = 70
    """Side of the square grid of learned positions; patch positions of any aspect ratio are bucketed into it."""
    norm_eps: AboveZero = 1e-6
    image_sizes: dict[Positive, Positive] = {490: 128, 980: 256}
    """Longer edge in pixels of each size class -> visual tokens (projector queries) an image of the class becomes."""
    min_image_size: Positive = 336
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
    vocab_size: Positive = 100352
    hidden_size: Positive = 2560
    num_layers: Positive = 28
    num_heads: Positive = 20
    num_kv_heads: Positive = 20
    head_dim: Positive = 128
    num_experts: Positive = 64
    top_k: Positive = 6
    expert_size: Positive = 1664
    """Width of one expert's SwiGLU."""
    num_shared_experts: NonNegative = 2
    """Experts every token passes through, computed as one SwiGLU of `num_shared_experts * expert_size`."""
    norm_eps: AboveZero = 1e-6
    rope_base: AboveZero = 100_000.0
    max_positions: Positive = 65536
    init_std: AboveZero = 0.02
    balance_group_size: Positive = 8
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
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class DataConfig(Section):
    """What is read. A blend draws windows from its sources in proportion to their weights."""

    tokenizer: str | None = None
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
    init_from: str | None = None
    """Folder with `adapter_model.safetensors` that the adapters start from; null = afresh, changing nothing yet."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class TrainConfig(Section):
    """The loop."""

    context_length: Positive = 8192
    """Tokens per window."""
    global_batch_size: Positive = 1
    """Windows per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Positive = 1
    """Windows per forward and backward pass on one rank."""
    max_tokens: Tokens | None = None
    """Stop after this many tokens (window positions: steps x global_batch_size x context_length)."""
    max_steps: Positive | None = None
    """Stop after this many steps; with `max_tokens` too, whichever comes first."""
    seed: NonNegative = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 computes in bfloat16; master weights, reductions and optimizer state are fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none; all but the dear ones (GEMMs, attention); whole layers."""
    run_dir: str = "runs/default"
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
    init_vision_from: str | None = None
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
    spike_window: Annotated[int, Field(ge=2)] = 100
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
    """Seconds before the time limit at which the run is asked to stop: longer than a step and a save."""
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
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "aria_train"


class NeedleConfig(Section):
    """A grid of haystacks, lengths by depths, with one needle each. Text: facts in a corpus."""

    haystack: str | None = None
    """Corpus to hide needles in; null = the first source of `data.validation` that can."""
    questions: str | None = None
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
    answers: str | None = None
    """Prepared corpus of conversations, or a file of them: share of last questions answered word for word."""
    experts: bool = False
    """Which experts see and which read, over `train.eval_windows` windows of each source of `data.validation`."""


class RunConfig(Section):
    """One stage, resolved. See `load_config`."""

    stage: str
    """Name of the stage; reported with every metric."""
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Window positions per optimizer step."""
        return self.train.global_batch_size * self.train.context_length

    @property
    def total_steps(self) -> int:
        """Steps after which the run is complete."""
        limits = []
        if self.train.max_steps is not None:
            limits.append(self.train.max_steps)
        if self.train.max_tokens is not None:
            limits.append(-(-self.train.max_tokens // self.tokens_per_step))
        return min(limits)

    def rope_base_at(self, tokens: int) -> float:
        """RoPE base of the step that begins after `tokens` tokens of this run."""
        base, start = self.model.rope_base, self.schedule.rope_from
        if start is None or tokens >= self.schedule.rope_tokens:
            return base
        return start * (base / start) ** (tokens / self.schedule.rope_tokens)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        train, model = self.train, self.model
        if train.max_tokens is None and train.max_steps is None:
            raise ValueError("train.max_tokens or train.max_steps must say how long to train")
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not divisible by "
                f"train.micro_batch_size {train.micro_batch_size}"
            )
        if train.context_length > model.max_positions:
            raise ValueError(
                f"train.context_length {train.context_length} exceeds model.max_positions {model.max_positions}"
            )
        # Rows of the grouped matrix products are read 16 bytes at a time.
        multiple = 8 if train.precision == "bf16" else 4
        for key in ("hidden_size", "expert_size"):
            if getattr(model, key) % multiple:
                raise ValueError(
                    f"model.{key} {getattr(model, key)} must be a multiple of {multiple} with train.precision "
                    f"{train.precision}, such as {_nearest_multiple(getattr(model, key), multiple)}"
                )
        experts, ranks = model.num_experts, self.parallel.expert_parallel_size
        if experts % ranks:
            raise ValueError(
                f"model.num_experts {experts} is not divisible by parallel.expert_parallel_size {ranks}; "
                f"allowed: {_divisors(experts)}"
            )
        if model.vision is None:
            named = {*train.freeze, *self.optimizer.lr_scale, *self.checkpoint.init_fresh} - {"decoder"}
            if named or self.checkpoint.init_vision_from:
                raise ValueError(f"model.vision is null, but the configuration speaks of its parts: {sorted(named)}")
        if set(train.freeze) >= ({"decoder", "vision", "projector"} if model.vision else {"decoder"}):
            raise ValueError("train.freeze names every part of the model: nothing is left to train")
        if train.lora is not None and train.freeze:
            raise ValueError("train.lora freezes all weights; take train.freeze out")
        if train.lora is not None and (self.checkpoint.init_fresh or self.checkpoint.init_vision_from):
            raise ValueError(
                "train.lora trains adapters on checkpoint.init_from as it is; checkpoint.init_fresh and "
                "checkpoint.init_vision_from would change it"
            )
        if train.lora is not None and "experts" in train.lora.targets and train.lora.rank % multiple:
            raise ValueError(
                f"train.lora.rank {train.lora.rank} must be a multiple of {multiple} with adapters on experts and "
                f"train.precision {train.precision}"
            )
        if self.evaluation.visual_needle is not None and self.evaluation.visual_needle.questions is None:
            raise ValueError("evaluation.visual_needle needs questions: a prepared corpus of questions about images")
        if self.schedule.kind == "wsd" and not self.schedule.decay_tokens:
            raise ValueError("schedule.kind wsd needs schedule.decay_tokens above 0")
        _refuse_secrets(self.model_dump(mode="json"))
        return self


_CREDENTIALS = re.compile(r"://[^/\s]*@")
_ASSIGNED_SECRET = re.compile(r"(key|_token|secret|password)=[\"']?[^\s$\"']", re.IGNORECASE)


def _refuse_secrets(value: Any, at: str = "") -> None:
    """The configuration is written into run directories, checkpoints and job scripts, where no secret belongs. The
    message does not repeat it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_secrets(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _refuse_secrets(inner, f"{at}.{number}")
    elif isinstance(value, str) and _CREDENTIALS.search(value):
        raise ValueError(
            f"{at}: the URL holds a user name or a password, which would end up in checkpoints and logs. Give them "
            "the way the storage's own tools take them: environment variables or their configuration files"
        )
    elif isinstance(value, str) and at.startswith("launch.setup") and _ASSIGNED_SECRET.search(value):
        raise ValueError(
            f"{at}: sets a key, token or password, which would end up in checkpoints and logs. Put the line into a "
            "file that only you can read, and let launch.setup source it"
        )


def check_world(config: RunConfig, world_size: int) -> None:
    """Refuses a number of ranks that the configuration cannot be laid out on, saying which numbers can."""
    expert = config.parallel.expert_parallel_size
    group = config.parallel.zero_group_size or world_size
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if world_size % expert:
        raise ConfigError(
            f"parallel.expert_parallel_size {expert} does not fit {world_size} rank(s): the number of ranks must be a "
            f"multiple of it. Start {_nearest_multiple(world_size, expert)} ranks, or set "
            f"parallel.expert_parallel_size to one of {_common_divisors(world_size, config.model.num_experts)}."
        )
    if world_size % group or group % expert:
        raise ConfigError(
            f"parallel.zero_group_size {group} does not fit {world_size} rank(s) with parallel.expert_parallel_size "
            f"{expert}: it must divide the number of ranks and be a multiple of the expert ranks."
        )
    if batch % (world_size * micro):
        raise ConfigError(
            f"train.global_batch_size {batch} is not divisible by {world_size} rank(s) x train.micro_batch_size "
            f"{micro} = {world_size * micro}: every rank must run the same number of whole micro-batches. Set "
            f"train.global_batch_size to a multiple of {world_size * micro}, such as "
            f"{_nearest_multiple(batch, world_size * micro)}, or change the number of ranks."
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a stage's YAML, applies `section.key=value` overrides, and validates the whole.

    Raises ConfigError naming file, line, key, value and what is allowed.
    """
    path = Path(path)
    raw, lines = read_yaml(path)
    for override in overrides:
        _apply_override(raw, lines, override)
    model = raw.get("model")
    if isinstance(model, dict) and model.get("preset") is not None:
        raw["model"] = _merge(_read_preset(str(model["preset"]), path), model)
    try:
        return RunConfig.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, path, lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same value."""
    data = config.model_dump(mode="json")
    data["model"]["preset"] = None
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

Lines = dict[tuple[str, ...], str]
"""Key path -> where it was given: `configs/x.yaml, line 12`, or `command line`."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML mapping with safe loading, no duplicate keys, and the place of every key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error}.") from None
    except Exception as error:  # PyYAML raises anything at values that are not of the type their tag says.
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, dict) or not isinstance(node, yaml.MappingNode):
        given = reprlib.repr(raw)
        raise ConfigError(f"{path}: a configuration is a mapping of sections (model:, train:, ...), not {given:.80}.")
    lines: Lines = {}
    _collect_lines(node, (), path, lines)
    return raw, lines


_MOST_LINES, _DEEPEST = 20_000, 30


def _collect_lines(node: yaml.Node, at: tuple[str, ...], path: Path, lines: Lines) -> None:
    # A few aliases of aliases are as good as endless.
    if len(lines) > _MOST_LINES or len(at) > _DEEPEST:
        raise ConfigError(f"{path}: has more than {_MOST_LINES:,} keys, or nests them deeper than {_DEEPEST}.")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:
                raise ConfigError(
                    f"{path}, line {key.start_mark.line + 1}: {'.'.join(here)} is given twice "
                    f"(first at {lines[here]}). Keep one."
                )
            lines[here] = f"{path}, line {key.start_mark.line + 1}"
            _collect_lines(value, here, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, str(index))] = f"{path}, line {value.start_mark.line + 1}"
            _collect_lines(value, (*at, str(index)), path, lines)


def _apply_override(raw: dict[str, Any], lines: Lines, override: str) -> None:
    key, separator, text = override.partition("=")
    at = tuple(key.strip().split("."))
    if not separator or not all(at):
        raise ConfigError(f"command line: {override!r} is not an override; write section.key=value.")
    try:
        value = yaml.safe_load(text)
    except Exception:  # as in read_yaml
        raise ConfigError(f"command line: {override}: the value is not valid YAML.") from None
    target: Any = raw
    for part in at[:-1]:
        if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
            target = target[int(part)]
            continue
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"command line: {override}: {part} is not a section.")
    if isinstance(target, list):
        if not at[-1].isdecimal() or int(at[-1]) >= len(target):
            raise ConfigError(f"command line: {override}: {'.'.join(at[:-1])} has entries 0 to {len(target) - 1}.")
        target[int(at[-1])] = value
    else:
        target[at[-1]] = value
    lines[at] = "command line"


def _read_preset(name: str, config_path: Path) -> dict[str, Any]:
    """Finds `models/NAME.yaml` beside the configuration, in a folder above it, or among those shipped."""
    package = Path(__file__).resolve().parent
    folders = [parent / "models" for parent in config_path.resolve().parents]
    folders += [package / "configs" / "models", package.parent / "configs" / "models"]
    candidates = [folder / f"{name}.yaml" for folder in folders]
    if name.endswith((".yaml", ".yml")):
        candidates = [Path(name), config_path.parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return read_yaml(candidate)[0]
    known = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"{config_path}: model.preset: no preset {name!r}{_did_you_mean(name, known)}. Presets are "
        f"files in configs/models/: {', '.join(known) or 'none found'}."
    )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins key by key; sections merge, except that null removes one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Explaining

_NOT_BUILT = {
    "tensor_parallel": "tensor parallelism is not built: Aria trains with expert parallelism and ZeRO-1 alone "
    "(fine-grained experts are too narrow to split further). Use parallel.expert_parallel_size",
    "pipeline_parallel": "pipeline parallelism is not built: Aria trains with expert parallelism and ZeRO-1 alone, "
    "which needs no stages or bubbles. Use parallel.expert_parallel_size and parallel.zero_group_size",
}


def _explain(error: pydantic.ValidationError, path: Path, lines: Lines) -> str:
    return "\n".join(_explain_one(dict(issue), path, lines) for issue in error.errors())


def _explain_one(issue: dict[str, Any], path: Path, lines: Lines) -> str:
    at = tuple(str(part) for part in issue["loc"])
    place = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), str(path))
    key = ".".join(at)
    if issue["type"] == "extra_forbidden":
        for word, reason in _NOT_BUILT.items():
            if at[-1].startswith(word):
                return f"{place}: {key}: {reason}."
        known = sorted(_keys_of(at[:-1]))
        allowed = ", ".join(known)
        return f"{place}: {key}: unknown key{_did_you_mean(at[-1], known)}. Allowed here: {allowed}."
    if issue["type"] == "missing":
        return f"{place}: {key}: is required and not given."
    reason = str(issue["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if issue["type"] == "value_error" and isinstance(issue["input"], (dict, BaseModel)):
        return f"{place}: {key}: {reason}." if key else f"{place}: {reason}."
    return f"{place}: {key}: {reprlib.repr(issue['input']):.80} given; {reason}."


def _keys_of(at: tuple[str, ...]) -> set[str]:
    """Field names of the section at a key path."""
    section: Any = RunConfig
    for part in at:
        if part.isdecimal():
            continue
        field = section.model_fields.get(part)
        section = _section_in(field.annotation) if field else None
        if section is None:
            return set()
    return set(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _common_divisors(a: int, b: int) -> list[int]:
    return [d for d in _divisors(a) if b % d == 0]


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
