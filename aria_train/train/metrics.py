"""Where metrics go: `metrics.jsonl` and `evaluations.jsonl` in the run directory; TensorBoard and wandb where asked.

The two files are the record. They survive a kill at any moment, and a resumed run takes back what it had written past
its checkpoint, so that in the end they read as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from aria_train.config import LoggingConfig
from aria_train.errors import ConfigError

Metrics = Mapping[str, Any]
"""Name -> int, float, str or None. `step` is always there."""


class MetricsWriter:
    """Records one run; rank 0 has the only one.

    `config` is the resolved configuration, for wandb. `resume_step` is the last step the run keeps: lines beyond it
    are dropped, as is what a kill or a full disk left unreadable. With 0 the run starts afresh and so do its files.

    Raises ConfigError when TensorBoard or wandb is asked for and cannot be used, OSError where there can be no files.
    Once it is made, what cannot be written is no reason to end: `say` is told.
    """

    def __init__(
        self,
        run_dir: str | Path,
        logging: LoggingConfig,
        config: Mapping[str, Any],
        resume_step: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._interval, self._say = logging.interval_steps, say
        self._tensorboard = _open_tensorboard(run_dir, resume_step) if logging.tensorboard else None
        self._wandb = _open_wandb(run_dir, logging, config, resume_step) if logging.wandb != "off" else None
        evaluations = _rewind(run_dir / "evaluations.jsonl", resume_step)
        _rewind(run_dir / "metrics.jsonl", resume_step)
        _rewind(run_dir / "skipped.jsonl", resume_step)
        self._evaluated = {(line["stage"], line["step"]) for line in evaluations}
        self._steps = _Record(run_dir / "metrics.jsonl", say)
        self._evaluations = _Record(run_dir / "evaluations.jsonl", say)
        self._skips = _Record(run_dir / "skipped.jsonl", say)
        for record in (self._steps, self._evaluations):
            record.open()

    def log_step(self, metrics: Metrics) -> None:
        """One line of `metrics.jsonl`; TensorBoard and wandb every `logging.interval_steps`."""
        self._steps.append(metrics)
        if metrics["step"] % self._interval == 0:
            self._forward("train", metrics)

    def log_evaluation(self, metrics: Metrics) -> None:
        """One line of `evaluations.jsonl`: `stage`, `step`, `tokens`, `loss`, `loss/<source>`.

        An evaluation that the file holds already, from before an interruption, is not repeated.
        """
        key = (metrics["stage"], metrics["step"])
        if key not in self._evaluated:
            self._evaluated.add(key)
            self._evaluations.append(metrics)
            self._forward("evaluation", metrics)

    def has_evaluation(self, stage: str, step: int) -> bool:
        """Whether the record holds the evaluation after this step."""
        return (stage, step) in self._evaluated

    def log_skip(self, record: Metrics) -> None:
        """One line of `skipped.jsonl`: `stage`, `step`, `reason`, `windows` [first, end), `loss`, `grad_norm`."""
        self._skips.append(record)

    def close(self) -> None:
        """Flushes TensorBoard and wandb. The files are complete at any time."""
        for record in (self._steps, self._evaluations, self._skips):
            record.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _forward(self, group: str, metrics: Metrics) -> None:
        numbers = {
            f"{group}/{name}": value
            for name, value in metrics.items()
            if name != "step" and isinstance(value, (int, float))
        }
        if self._tensorboard is not None:
            try:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, metrics["step"])
            except OSError as error:
                self._say(f"TensorBoard gets no more of this run: {error}. Training goes on.")
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=metrics["step"])


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics file, which a run may be writing to: an unfinished last line is left out."""
    path = Path(path)
    return [line for _, line in _lines(path)] if path.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# Files


class _Record:
    """A file that grows by lines. What cannot be written, as on a full disk, is kept and comes with the next line."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file: IO[bytes] | None = None
        self._pending = b""
        self._failing = False

    def open(self) -> IO[bytes]:
        """Raises OSError."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        return self._file

    def append(self, metrics: Metrics) -> None:
        self._pending += _line(metrics)
        try:
            while self._pending:
                self._pending = self._pending[self.open().write(self._pending) :]
        except OSError as error:
            self.close()  # What it was may be gone; the next line opens it anew.
            if not self._failing:
                self._say(f"{self._path} cannot be written: {error.strerror or error}. Training goes on; free space.")
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} can be written again; nothing is missing in it")
            self._failing = False

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _line(metrics: Metrics) -> bytes:
    """Floats keep every digit. JSON has no NaN or infinity: they become null, so that any reader can read on."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line as (its bytes, the object). A kill tears the last one; a machine that dies may spoil more."""
    with path.open("rb") as file:
        for raw in file:
            try:
                value = json.loads(raw)
            except ValueError:
                continue
            if raw.endswith(b"\n") and isinstance(value, dict) and "step" in value:
                yield raw, value


def _rewind(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Drops the lines beyond a step in one atomic replacement; returns those that stay."""
    if not path.exists():
        return []
    kept = [(raw, line) for raw, line in _lines(path) if 0 < resume_step >= line["step"]]
    if sum(len(raw) for raw, _ in kept) < path.stat().st_size:
        aside = path.with_suffix(".jsonl.new")
        with aside.open("wb") as file:
            file.writelines(raw for raw, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return [line for _, line in kept]


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard and wandb: imported only when asked for, as both take seconds


def _open_tensorboard(run_dir: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"logging.tensorboard is true, but TensorBoard cannot be imported ({error}). Install it with "
            "pip install 'aria_train[tensorboard]', or set logging.tensorboard=false; metrics.jsonl is written anyway."
        ) from None
    folder = run_dir / "logs" / "tensorboard"
    _number_events(folder)
    # Events that an interrupted run wrote past its checkpoint are hidden by the purge.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)


def _number_events(folder: Path) -> None:
    """TensorBoard reads event files by name, and names them after the time, which may since have been set back. So the
    files of earlier starts are named after their number: whatever the time is, the next one comes behind them."""
    for number, file in enumerate(sorted(folder.glob(f"{_EVENTS}*"))):
        _, _, origin = file.name.removeprefix(_EVENTS).partition(".")
        file.rename(folder / f"{_EVENTS}{number:010d}.{origin}")


_EVENTS = "events.out.tfevents."


def _open_wandb(run_dir: Path, logging: LoggingConfig, config: Mapping[str, Any], resume_step: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb is {logging.wandb}, but wandb cannot be imported ({error}). Install it with "
            "pip install 'aria_train[wandb]', or set logging.wandb=off; metrics.jsonl is written anyway."
        ) from None
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    online = logging.wandb == "online"
    try:
        return wandb.init(
            project=logging.wandb_project,
            name=run_dir.name,
            id=_wandb_id(logs / "wandb_id", resume_step),
            # Steps that an interrupted run had sent already are the same steps: wandb keeps the first.
            resume="allow" if online and resume_step else None,
            mode="online" if online else "offline",
            dir=str(logs),
            config=dict(config),
            # Capturing the terminal would garble the progress bar.
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"logging.wandb is {logging.wandb}, but wandb cannot start: {reason}. Log in with `wandb login` or "
            "WANDB_API_KEY, or set logging.wandb=offline (no account or network needed; `wandb sync` sends it later), "
            "or logging.wandb=off."
        ) from None


def _wandb_id(path: Path, resume_step: int) -> str:
    """The run's name at wandb: one per run directory, a new one when it starts afresh."""
    if not resume_step or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
