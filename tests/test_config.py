"""Reading configurations: what is accepted, and that what is not is explained."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_train.config import RunConfig, check_world, dump_config, load_config
from aria_train.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

GOOD = """\
stage: test
model:
  vocab_size: 128
  hidden_size: 32
  num_layers: 1
  num_experts: 16
  top_k: 2
  expert_size: 16
train:
  context_length: 64
  global_batch_size: 8
  max_steps: 3
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "stage.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What is accepted


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("stage*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_stage_is_valid(path: Path) -> None:
    assert load_config(path).total_steps > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("stage*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_resolved_configuration_reads_back_the_same(path: Path, write: Any) -> None:
    config = load_config(path)
    again = load_config(write(dump_config(config)))
    assert again.model_copy(update={"model": config.model}) == config
    assert again.model.model_copy(update={"preset": config.model.preset}) == config.model


def test_overrides_win(write: Any) -> None:
    config = load_config(
        write(GOOD),
        ["train.max_steps=7", "optimizer.lr=1e-4", "train.precision=fp32", "data.train=[{name: a, path: b}]"],
    )
    assert (config.train.max_steps, config.optimizer.lr, config.train.precision) == (7, 1e-4, "fp32")
    assert config.data.train[0].path == "b"
    assert (
        load_config(write(GOOD), ["data.train=[{name: a, path: b}]", "data.train.0.path=c"]).data.train[0].path == "c"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("6.4T", 6_400_000_000_000), ("33B", 33 * 10**9), ("500k", 500_000), ("2e9", 2 * 10**9), ("1_000", 1000)],
)
def test_numbers_of_tokens(text: str, tokens: int, write: Any) -> None:
    assert load_config(write(GOOD), [f"train.max_tokens={text}"]).train.max_tokens == tokens


def test_a_warm_up_longer_than_the_run_is_said(write: Any) -> None:
    assert not [*load_config(write(GOOD)).doubts()]
    (doubt,) = load_config(write(GOOD), ["schedule.warmup_tokens=100T"]).doubts()
    assert "schedule.warmup_tokens 100,000,000,000,000 is more than the 1,536 tokens of the run" in doubt


def test_off_is_no_truth_value(write: Any) -> None:
    assert load_config(write(GOOD), ["logging.wandb=off"]).logging.wandb == "off"


def test_a_run_ends_at_whichever_limit_comes_first(write: Any) -> None:
    assert load_config(write(GOOD), ["train.max_tokens=513"]).total_steps == 2
    assert load_config(write(GOOD), ["train.max_tokens=1M"]).total_steps == 3


def test_keys_beside_a_preset_win_and_null_removes_a_section(write: Any) -> None:
    text = (
        "stage: test\nmodel: {preset: small, num_layers: 3, vision: null}\ntrain: {max_steps: 1, context_length: 64}\n"
    )
    config = load_config(write(text))
    assert (config.model.num_layers, config.model.num_experts, config.model.vision) == (3, 16, None)


# ---------------------------------------------------------------------------------------------------------------------
# What is not


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GOOD + "trian: {}\n", ["stage.yaml, line 13", "trian", "did you mean 'train'"]),
        (GOOD.replace("max_steps", "max_step"), ["line 12", "train.max_step", "did you mean 'max_steps'", "Allowed"]),
        (GOOD + "parallel: {tensor_parallel_size: 2}\n", ["line 13", "not built", "expert_parallel_size"]),
        (GOOD + "parallel: {pipeline_parallel: 2}\n", ["line 13", "not built", "zero_group_size"]),
        (GOOD.replace("num_layers: 1", "num_layers: many"), ["line 5", "model.num_layers", "'many' given", "integer"]),
        (GOOD.replace("max_steps: 3", "max_steps: 0"), ["line 12", "train.max_steps", "greater than 0"]),
        (GOOD + "optimizer: {lr: .nan}\n", ["line 13", "optimizer.lr", "finite"]),
        (GOOD + "optimizer: {betas: [0.9, 1.0]}\n", ["line 13", "optimizer.betas.1", "less than 1"]),
        (GOOD + "train: {}\n", ["line 13", "train is given twice", "line 9"]),
        (GOOD.replace("stage: test\n", ""), ["stage", "is required"]),
        (GOOD.replace("  max_steps: 3\n", ""), ["train.max_tokens or train.max_steps"]),
        (GOOD.replace("top_k: 2", "top_k: 17"), ["top_k 17 exceeds num_experts 16"]),
        (GOOD.replace("num_experts: 16", "num_experts: 12"), ["12 is not divisible by balance_group_size 8"]),
        (GOOD.replace("expert_size: 16", "expert_size: 12"), ["model.expert_size 12 must be a multiple of 8"]),
        (GOOD + "parallel: {expert_parallel_size: 3}\n", ["by parallel.expert_parallel_size 3", "1, 2, 4"]),
        (GOOD.replace("context", "micro_batch_size: 3\n  context"), ["global_batch_size 8 is not divisible by"]),
        (GOOD.replace("context_length: 64", "context_length: 100000"), ["exceeds model.max_positions 65536"]),
        (GOOD + "data: {train: [{name: a, path: b}, {name: a, path: c}]}\n", ["source names must differ"]),
        (GOOD + "data: {train: [{name: a, path: b, weight: 0}]}\n", ["data.train.0.weight", "greater than 0"]),
        (GOOD + "data: {train: [{name: a, path: []}]}\n", ["data.train.0", "path [] names no corpus"]),
        (GOOD + "data: {train: [{name: a, path: 's3://b/a'}]}\n", ["data.train.0", "path must be one of this machine"]),
        (GOOD + "  run_dir: s3://bucket/run\n", ["line 13", "train.run_dir", "not a URL", "checkpoint.storage"]),
        (GOOD + "  max_tokens: 0\n", ["train.max_tokens", "greater than 0"]),
        (GOOD.replace("max_steps: 3", "max_steps: true"), ["line 12", "train.max_steps", "True given; must be a num"]),
        (GOOD.replace("vocab_size: 128", "vocab_size: 1000000000000000000"), ["model.vocab_size", "less than 2147"]),
        (GOOD + "logging: {wandb: on}\n", ["logging.wandb", "'off', 'offline' or 'online'"]),
        (GOOD + "schedule: {kind: wsd}\n", ["schedule.decay_tokens"]),
        (GOOD + "schedule: {kind: linear}\n", ["line 13", "'linear' given", "'cosine'"]),
        (GOOD + "model: {preset: aria}\n", ["model is given twice"]),
        ("stage: [", ["not valid YAML"]),
        ("- a\n- b\n", ["a mapping of sections"]),
        ("", ["a mapping of sections"]),
        ("stage: test\n? [1, 2]\n: 3\n", ["not valid YAML"]),
        ("stage: test\n1: 2\n", ["1"]),
        ("stage: test\ntrain: 5\n", ["line 2", "train"]),
        ("stage: test\nmodel: {preset: smal}\n", ["no preset 'smal'", "did you mean 'small'", "aria"]),
    ],
)  # fmt: skip
def test_a_refusal_says_where_what_and_what_instead(text: str, parts: list[str], write: Any) -> None:
    message = refusal(write(text))
    for part in parts:
        assert part in message


def test_missing_unreadable_and_binary_files(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"stage: \x00")
    assert "not valid YAML" in refusal(tmp_path / "control.yaml")


@pytest.mark.parametrize(
    "override",
    ["train.max_steps", "=5", "train..max_steps=5", "stage.name=5", "train.max_steps.x=5", "data.train.x=1",
     "train.max_steps=[", "nothing=1", "train=5", "data.train=5"],
)  # fmt: skip
def test_overrides_that_cannot_be(override: str, write: Any) -> None:
    text = GOOD + "data: {train: [{name: a, path: b}]}\n"
    assert "command line" in refusal(write(text), override)
    assert "command line" in refusal(write(text), "data.train.²=1")


_WORDS = st.sampled_from(
    [
        "train",
        "model",
        "data",
        "optimizer",
        "stage",
        "max_steps",
        "vision",
        "image_sizes",
        "490",
        "0",
        "²",
        "betas",
        "",
        "preset",
    ]
)
_VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "null",
            "[]",
            "{}",
            ".inf",
            "-1",
            "1e400",
            "{a: b}",
            "[1, 2]",
            "yes",
            "2020-01-01",
            "!!python/none x",
            "&a [*a]",
        ]
    ),
)


@settings(max_examples=60, deadline=None)
@given(at=st.lists(_WORDS, min_size=1, max_size=4), value=_VALUES)
def test_any_override_is_taken_or_refused(at: list[str], value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(GOOD)
    with contextlib.suppress(ConfigError):
        load_config(path, [".".join(at) + "=" + value])


_TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(section=st.sampled_from(sorted(RunConfig.model_fields)), tree=_TREES)
def test_any_section_is_taken_or_refused(section: str, tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(GOOD), section: tree}, allow_unicode=True))
    with contextlib.suppress(ConfigError):
        load_config(path)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize(
    ("expert", "group", "batch", "micro", "world", "problem"),
    [
        (2, None, 6, 1, 3, "parallel.expert_parallel_size 2 does not fit 3 rank"),
        (4, None, 8, 1, 2, "parallel.expert_parallel_size 4 does not fit 2 rank"),
        (1, 3, 8, 1, 4, "parallel.zero_group_size 3 does not fit 4 rank"),
        (2, 1, 8, 1, 4, "multiple of the expert ranks"),
        (1, None, 8, 1, 3, "train.global_batch_size 8 is not divisible by 3 rank"),
        (1, None, 8, 4, 4, "train.global_batch_size to a multiple of 16"),
    ],
)
def test_worlds_that_do_not_fit(
    expert: int, group: int | None, batch: int, micro: int, world: int, problem: str, write: Any
) -> None:
    text = GOOD.replace("global_batch_size: 8", f"global_batch_size: {batch}\n  micro_batch_size: {micro}")
    groups = "" if group is None else f", zero_group_size: {group}"
    config = load_config(write(text + f"parallel: {{expert_parallel_size: {expert}{groups}}}\n"))
    with pytest.raises(ConfigError, match=problem):
        check_world(config, world)


@pytest.mark.parametrize(("expert", "group", "world"), [(1, None, 1), (2, None, 4), (4, None, 4), (2, 2, 8), (1, 4, 8)])
def test_worlds_that_fit(expert: int, group: int | None, world: int, write: Any) -> None:
    groups = "" if group is None else f", zero_group_size: {group}"
    check_world(load_config(write(GOOD + f"parallel: {{expert_parallel_size: {expert}{groups}}}\n")), world)
