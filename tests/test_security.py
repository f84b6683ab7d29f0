"""What comes from outside is data: whatever the bytes, a clear refusal or something usable; no code runs, no secret
spreads, no small input asks for much memory."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import aria_train
from aria_train.cli import main
from aria_train.config import load_config
from aria_train.data.multimodal.images import BadImage, decode, read_size
from aria_train.errors import ConfigError
from tests.distributed import run_distributed
from tests.ops.faults import run
from tests.tiny import tiny_config, unequal_corpora

GOOD = """
stage: tiny
train: {context_length: 32, global_batch_size: 4, max_steps: 5}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "stage.yaml"


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

_PIECES = st.sampled_from(
    ["stage: x\n", "train:\n", "  max_steps: ", "5", "1e400", "-", "- ", "[", "]", "{", "}", ": ", "&a ", "*a", "<<: ",
     "!!python/name:os.system ", "!!binary ", "!!timestamp ", "2001-99-99", "? ", "|\n", "'", '"', "\t", "\n", "  ",
     "0x", "1_", "1:1:1", "~", "%YAML 9\n", "---\n", "...\n", "\x00", "\u2028", "é"]
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(text=st.lists(_PIECES | st.text(max_size=4), max_size=25).map("".join), good=st.booleans())
def test_any_text_is_a_configuration_or_refused(text: str, good: bool, path: Path) -> None:
    path.write_text((GOOD if good else "") + text, encoding="utf-8", errors="replace")
    with contextlib.suppress(ConfigError):
        load_config(path)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        load_config(path)


@settings(max_examples=150, deadline=None)
@given(value=st.lists(_PIECES, max_size=12).map("".join))
def test_any_override_is_taken_or_refused(value: str, path: Path) -> None:
    path.write_text(GOOD)
    with contextlib.suppress(ConfigError):
        load_config(path, [f"train.max_steps={value}"])


def test_aliases_of_aliases_and_endless_ones_are_refused(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for text in (GOOD + "\n".join(lines), "- " + "\n- ".join(line.partition(": ")[2] for line in lines)):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_config(path)
    for endless in ("model: &a {vision: *a}", "launch: {setup: &a [*a]}", "[" * 5000):
        path.write_text(GOOD + endless)
        with pytest.raises(ConfigError):
            load_config(path)


def test_yaml_runs_nothing(path: Path, tmp_path: Path) -> None:
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system"):
        path.write_text(f"{GOOD}logging: {tag} ['touch {tmp_path}/executed']\n")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(path)
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(path.with_name("stage.yaml"), [f"train.seed={tag} ['touch {tmp_path}/executed']"])
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Images


def encoded(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


IMAGES = [encoded(format) for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]


@settings(max_examples=300, deadline=None)
@given(
    image=st.sampled_from(IMAGES),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 3000),
    rest=st.binary(max_size=20),
)
def test_any_damaged_image_is_an_image_or_refused(
    image: bytes, changes: list[tuple[int, int]], cut: int | None, rest: bytes
) -> None:
    content = bytearray(image)
    for at, value in changes:
        content[at % len(content)] = value
    damaged = bytes(content[:cut]) + rest
    for read in (read_size, decode):
        with contextlib.suppress(BadImage):
            read(damaged)


@settings(max_examples=150, deadline=None)
@given(
    magic=st.sampled_from([image[:12] for image in IMAGES] + [b"%!PS-Adobe", b"\x00\x00\x00\x0cjP  ", b""]),
    content=st.binary(max_size=120),
)
def test_any_bytes_are_an_image_or_refused(magic: bytes, content: bytes) -> None:
    for read in (read_size, decode):
        with contextlib.suppress(BadImage):
            read(magic + content)


# ---------------------------------------------------------------------------------------------------------------------
# Code and secrets


def test_nothing_is_unpickled_but_the_index_of_a_checkpoint() -> None:
    """And that by a reader that builds an index and nothing else, which `tests/ops/test_checkpoints.py` attacks."""
    unsafe = re.compile(
        r"pickle\.loads?\(|Unpickler|torch\.load\(|allow_pickle\s*=\s*True|joblib|marshal|yaml\.(load|unsafe_load|full_load)\("
        r"|trust_remote_code\s*=\s*True|\beval\(|\bexec\(|shell=True"
    )
    root = Path(aria_train.__file__).parent
    found = {
        (str(file.relative_to(root)), line.strip())
        for file in root.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if unsafe.search(line.replace(".eval()", "").replace("model.eval(", ""))
    }
    assert {file for file, _ in found} == {"parallel/checkpoint/reading.py"}, found


SECRET = "hunter2"


@pytest.mark.parametrize(
    "override",
    [
        f"checkpoint.storage=s3://me:{SECRET}@bucket/run",
        f"checkpoint.init_from=https://{SECRET}@host/run",
        f"checkpoint.storage=abfs://me:{SECRET}@account.dfs.core.windows.net/run",
        f"launch.setup=['export WANDB_API_KEY={SECRET}']",
        f"launch.setup=['module load cuda', 'HF_TOKEN={SECRET}']",
    ],
)
def test_secrets_are_refused_and_not_repeated(
    override: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(GOOD)
    for command in ("train", "launch"):
        assert main([command, str(path), override, f"train.run_dir={tmp_path}/run"]) == 2
    told = capsys.readouterr()
    assert "would end up in checkpoints and logs" in told.err
    assert SECRET not in told.err + told.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    [
        f"data.train=[{{name: a, path: 'https://me:{SECRET}@host/a'}}]",
        f"train.run_dir=s3://me:{SECRET}@bucket/run",
        f"train.max_steps=s3://me:{SECRET}@bucket",
    ],
)
def test_what_is_refused_for_something_else_repeats_no_secret(override: str, path: Path) -> None:
    path.write_text(GOOD)
    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])
    assert SECRET not in str(refused.value)


def test_what_is_no_secret_passes(path: Path) -> None:
    path.write_text(GOOD)
    setup = ["export TOKENIZERS_PARALLELISM=false", "source ~/keys.sh", 'export KEY="$OTHER"', "export KEY=$OTHER"]
    config = load_config(path, [f"launch.setup={yaml.safe_dump(setup)}", "checkpoint.storage=s3://bucket/run@2"])
    assert config.launch.setup == setup
    for storage in ("abfs://container@account.dfs.core.windows.net/run", "sftp://me@host:2222/run"):
        assert load_config(path, [f"checkpoint.storage={storage}"]).checkpoint.storage == storage


@pytest.mark.distributed
def test_the_environment_reaches_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "run", unequal_corpora(tmp_path / "corpora"), train={"max_steps": 2})
    run_distributed(run_with_key, 1, config)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 4
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def run_with_key(config: Any) -> None:
    import os

    os.environ["WANDB_API_KEY"] = SECRET
    run(config)
