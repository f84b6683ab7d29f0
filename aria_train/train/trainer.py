"""The training loop of one stage.

    trainer = Trainer(config)     model, data, optimizer; goes on from the run directory's newest checkpoint
    trainer.run()                 for every step:
                                      micro-batches -> forward -> objective -> backward   (gradients stay local)
                                      last micro-batch's backward reduces gradients       (one reduce-scatter)
                                      clip -> AdamW on shards, unless the guard objects
                                      metrics -> evaluation -> checkpoint

A step depends on its number and the configuration alone: which windows it reads, its learning rate, its random state.
So a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aria_train import kernels
from aria_train.batch import MicroBatch
from aria_train.config import RunConfig, check_world, dump_config
from aria_train.data.loader import Loader
from aria_train.errors import ConfigError, Stopped
from aria_train.eval.loss import evaluate_loss
from aria_train.eval.probes import Probes
from aria_train.kernels.compiled import compile_chains
from aria_train.model import AriaModel
from aria_train.model.aria import part_of
from aria_train.model.lora import add_adapters, is_adapter
from aria_train.moe.experts import use_fp8
from aria_train.parallel import checkpoint
from aria_train.parallel.checkpoint import Entry, Saver
from aria_train.parallel.collectives import broadcast_object, sum_over_ranks
from aria_train.parallel.mesh import build_meshes, init_process_group, pick_device, set_patience
from aria_train.parallel.shard import parallelize, set_last_micro_batch
from aria_train.train.adapters import base_mark, base_of, load_whole, write_adapter_folder
from aria_train.train.claim import RunLock, check_fresh_start, check_storage, make_run_dir, not_writable
from aria_train.train.console import Console, peak_memory_gib
from aria_train.train.guard import Guard
from aria_train.train.initial import fill_weights
from aria_train.train.metrics import MetricsWriter
from aria_train.train.objective import StepSums, Totals, objective, step_metrics
from aria_train.train.optimizer import build_optimizer, clip_gradients, learning_rate
from aria_train.train.profile import Profile, part
from aria_train.train.pulse import Pulse
from aria_train.train.rollback import roll_back
from aria_train.train.state import TrainState, check_resumable, rate_changes
from aria_train.train.watchdog import Watchdog, folder_of_reports


class Trainer:
    def __init__(self, config: RunConfig, replay_step: int | None = None) -> None:
        """With `replay_step`, on the way to a step that was taken before: nothing is written."""
        self.config = config
        self.run_dir = Path(config.train.run_dir)
        self.lock = RunLock(self.run_dir)
        try:
            self._start(replay_step)
        except BaseException:
            self.lock.release()
            raise

    def _start(self, replay_step: int | None) -> None:
        config = self.config
        if replay_step is None:
            make_run_dir(self.run_dir)
        self.device = pick_device(config.train.device)
        set_patience(config.guard.hang_minutes)
        init_process_group(self.device)
        check_world(config, dist.get_world_size())
        self.meshes = build_meshes(config.parallel, self.device)
        self.is_main = self.meshes.rank == 0
        self.console = Console(config.total_steps, enabled=self.is_main)
        self.home = checkpoint.home_of(config)
        if replay_step is None:
            broadcast_object(lambda: self.lock.acquire(self.console.message))
        newest, self.passed = checkpoint.newest_intact(self.home, before=replay_step)
        if replay_step is None:
            broadcast_object(lambda: self._check_start(newest))
        start_step = newest.step if newest is not None else 0
        self.loader = Loader(config, self.meshes.rank, self.meshes.world_size, start_step)
        self.state = self._build_state()
        self.state.fingerprints = broadcast_object(lambda: {s.name: s.fingerprint for s in self.loader.sources})
        self._fill_state(newest)
        self.guard = Guard(config.guard, self.state.guard)
        self.pulse = Pulse(self.meshes, config.checkpoint.interval_minutes)
        self.saver = Saver(config.checkpoint.asynchronous, self.console.message)
        hangs = folder_of_reports(self.run_dir)
        self.watchdog = Watchdog(config.guard.hang_minutes * 60, self.meshes.rank, self.meshes.world_size, hangs)
        self.probes = Probes(config, self.meshes)
        watched = config.train.profile if replay_step is None else 0
        self.profile = Profile(watched, self.run_dir, self.meshes.rank, self.state.model, self.console.message)
        self.writer: MetricsWriter | None = None
        if replay_step is None:
            broadcast_object(lambda: self._open_record(start_step))

    def _check_start(self, newest: Entry[checkpoint.Folder] | None) -> None:
        if newest is None:
            check_fresh_start(self.config, self.passed)
        check_storage(self.config)

    def _open_record(self, start_step: int) -> None:
        """On the first rank: `config.yaml`, and the metrics."""
        config = self.config
        try:
            # At once, or the next start could not tell what this one ran with.
            aside = self.run_dir / "config.yaml.new"
            aside.write_text(dump_config(config), encoding="utf-8")
            os.replace(aside, self.run_dir / "config.yaml")
            values = config.model_dump(mode="json")
            self.writer = MetricsWriter(self.run_dir, config.logging, values, start_step, self.console.message)
        except OSError as error:
            raise not_writable(self.run_dir, error) from None

    def run(self) -> None:
        """Trains to the last step; saves and evaluates on the way and at the end.

        Raises Stopped, when all is saved, if a rank is asked to stop before.
        """
        config, state = self.config, self.state
        try:
            if state.step >= config.total_steps:
                self.console.message(f"already complete: {state.step} of {config.total_steps} steps")
            else:
                self.console.start(state.step)
                self.watchdog.start(state.step)
            self._make_up_evaluation()
            while state.step < config.total_steps and not self.pulse.stop_asked:
                with self.profile.step():
                    with part("data"):
                        batches = self.pulse.next_batches(self.loader)
                    self.advance(batches)
                last = state.step == config.total_steps
                # Whoever asks to stop may not wait for more than the save.
                if not self.pulse.stop_asked:
                    self._evaluate(last)
                if last or self.pulse.stop_asked or self._save_is_due():
                    self._save()
            self.saver.finish()
            if state.step < config.total_steps:
                raise Stopped(f"stopped on request and saved after step {state.step} of {config.total_steps}")
            self._make_up_evaluation()
        finally:
            self.close()

    def advance(self, batches: list[MicroBatch]) -> dict[str, Any]:
        """One step and its report, and the rollback that it may call for. Returns its metrics."""
        metrics = self._step(batches)
        self._report(metrics)
        if self.guard.wants_rollback:
            self._roll_back()
        return metrics

    def _step(self, batches: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step on the global batch; returns its metrics, the same on every rank."""
        config, state, began = self.config, self.state, time.perf_counter()
        torch.manual_seed(hash((config.train.seed, state.step, self.meshes.rank)) % 2**63)
        totals = self._totals(batches)
        sums = StepSums(len(config.data.train))
        state.model.train()
        state.model.rope_base = config.rope_base_at(state.step * config.tokens_per_step)
        for index, batch in enumerate(batches):
            set_last_micro_batch(state.model, index == len(batches) - 1)
            batch = batch.to(self.device)
            output = state.model(batch)
            objective(output, totals, state.expert_counts, config.model).backward()
            sums.add(output, batch.source_of_target())
        reduced = sum_over_ranks({**sums.sums, "pulse": self.pulse.beat()}, self.device)
        self.pulse.hear(reduced.pop("pulse"))
        losses = step_metrics(reduced, totals, config.model, [source.name for source in config.data.train])
        with part("optimizer"):
            grad_norm = self._clip()
        lr = learning_rate(config, state.step * config.tokens_per_step)
        skipped = self.guard.judge(losses["loss"], grad_norm)
        if skipped is None:
            with part("optimizer"):
                self._update(lr)
            state.expert_counts.copy_(reduced["counts"])
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.watchdog.beat(state.step, "training")
        seconds = time.perf_counter() - began
        return {
            "stage": config.stage,
            "step": state.step,
            "tokens": state.step * config.tokens_per_step,
            **losses,
            **({} if config.model.vision is None else {"images": totals.images}),
            **self.loader.epochs(state.step),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": config.tokens_per_step / seconds,
            "step_seconds": seconds,
            "memory_gib": peak_memory_gib(),
            **({} if skipped is None else {"skipped": skipped}),
            **self.pulse.straggler(seconds),
        }

    def _clip(self) -> float:
        """Clips the gradients; returns their norm before."""
        parameters = [p for group in self.state.optimizer.param_groups for p in group["params"]]
        return clip_gradients(parameters, self.config.optimizer.clip_norm, self.meshes.num_replicas).item()

    def _update(self, lr: float) -> None:
        """Moves the weights."""
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()

    def _totals(self, batches: list[MicroBatch]) -> Totals:
        """Targets, tokens and images of the global batch."""
        mine = torch.tensor([[b.num_targets, b.num_tokens, b.num_images] for b in batches]).sum(0)
        targets, tokens, images = sum_over_ranks({"mine": mine}, self.device)["mine"].tolist()
        return Totals(targets, tokens, int(images))

    def _build_state(self) -> TrainState:
        """The sharded model without weights yet, and its optimizer."""
        config = self.config
        with torch.device("meta"):
            model = AriaModel(config.model)
        model.set_recompute(config.train.recompute)
        compile_chains(config.train.compile, self.device)
        if config.train.compile:
            self.console.message("train.compile: the first step compiles too, which may take a minute")
        if config.train.precision == "bf16" and self.device.type == "cpu" and not kernels.multiplies_bf16():
            self.console.message(
                "train.precision is bf16, which this CPU has no instructions for: products take many times as long as "
                "in float32. train.precision=fp32 is faster here."
            )
        for name, parameter in model.named_parameters():
            if part_of(name) in config.train.freeze:
                parameter.requires_grad_(False)
        if config.train.lora is not None:
            frozen_dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
            add_adapters(model, config.train.lora, frozen_dtype)
        if config.train.fp8_experts:
            use_fp8(model, self.device)
        parallelize(model, self.meshes, config.train.precision)
        model.to_empty(device=self.device)
        counts = torch.zeros(config.model.num_layers, config.model.num_experts, dtype=torch.float64, device=self.device)
        optimizer = build_optimizer(model, config.optimizer)
        windows = {source.name: source.num_windows for source in self.loader.sources}
        return TrainState(model, optimizer, counts, sources=windows)

    def _fill_state(self, newest: Entry[checkpoint.Folder] | None) -> None:
        """Goes on from the newest complete checkpoint of the run directory; else starts from weights or from noise."""
        config = self.config
        for entry in self.passed:
            self.console.message(entry.remark)
        if newest is not None:
            check_resumable(config, self.state.sources, self.state.fingerprints, newest)
            if (change := rate_changes(config, newest)) is not None:
                self.console.message(change)
            if config.train.lora is not None:
                self._lay_base(base_of(newest.folder), fill=True)
            self.state.load(newest)
            self.console.message(f"resumed from {newest.folder}")
            return
        if config.train.lora is not None:
            if config.checkpoint.init_from is None:
                raise ConfigError("train.lora adapts a trained model; checkpoint.init_from must name its checkpoint.")
            self._lay_base(_resolve(config.checkpoint.init_from), fill=False)
        for line in fill_weights(self.state.model, config):
            self.console.message(line)
        if config.checkpoint.init_optimizer:
            if config.checkpoint.init_from is None:
                raise ConfigError("checkpoint.init_optimizer is true, but checkpoint.init_from names no checkpoint.")
            self.console.message(self.state.take_over_moments(_resolve(config.checkpoint.init_from)))

    def _lay_base(self, base: checkpoint.Folder | None, fill: bool) -> None:
        """Settles which checkpoint is beneath the adapters; with `fill`, its weights come in too."""
        assert base is not None
        self.config.checkpoint.init_from = str(base.absolute() if isinstance(base, Path) else base)
        self.state.base = base_mark(base)
        if fill:
            weights = {f"model.{n}": p.detach() for n, p in self.state.model.named_parameters() if not is_adapter(n)}
            load_whole(base, weights)

    def _report(self, metrics: dict[str, Any]) -> None:
        self.console.update(metrics)
        if self.writer is not None:
            self.writer.log_step(metrics)
        if "skipped" in metrics:
            self._log_skip(metrics, metrics["step"] - 1, metrics["skipped"])

    def _log_skip(self, metrics: dict[str, Any], first_step: int, reason: str) -> None:
        """Says on the console and in `skipped.jsonl` why nothing is left of the steps from `first_step` (from 0) on."""
        step, batch = self.state.step, self.config.train.global_batch_size
        self.console.message(f"step {step}: skipped: {reason}")
        if self.writer is not None:
            record = {"stage": self.config.stage, "step": step, "reason": reason}
            windows = {"windows": [first_step * batch, step * batch]}
            self.writer.log_skip({**record, **windows, **{key: metrics.get(key) for key in ("loss", "grad_norm")}})

    def _roll_back(self) -> None:
        self.saver.wait()
        to_step, folder = roll_back(self.state, self.guard, self.home)
        self._log_skip({}, to_step, f"rolled back to the weights of {folder}")

    def _make_up_evaluation(self) -> None:
        """The evaluation of the state as it is, unless the record has it: before the first step, and what a request to
        stop left out."""
        stage, step = self.config.stage, self.state.step
        if not broadcast_object(lambda: self.writer is not None and self.writer.has_evaluation(stage, step)):
            self._evaluate(last=step >= self.config.total_steps)

    def _evaluate(self, last: bool = False) -> None:
        """Held-out loss, and what the `evaluation` section asks for, where this step is one for them."""
        config, state = self.config, self.state
        probing = _falls_on(state.step, config.evaluation.interval_steps, last)
        if not probing and not _falls_on(state.step, config.train.eval_interval_steps, last):
            return

        def beat(_more: int = 0) -> None:
            self.watchdog.beat(state.step, "evaluating")

        beat()
        state.model.rope_base = config.rope_base_at(state.step * config.tokens_per_step)
        figures = {}
        if config.data.validation:
            figures = evaluate_loss(state.model, config, self.meshes, beat, self.probes.sources)
        if probing:
            figures |= self.probes.run(state.model, state.step, beat)
        if figures:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.console.message(f"step {state.step}: held-out {shown}")
        if self.writer is not None:
            tokens = state.step * config.tokens_per_step
            self.writer.log_evaluation({"stage": config.stage, "step": state.step, "tokens": tokens, **figures})
        self.watchdog.beat(state.step, "training")

    def _save_is_due(self) -> bool:
        """By steps or by the clock; but a state that was just refused an update is one that is saved already."""
        due = self.pulse.save_due or _falls_on(self.state.step, self.config.checkpoint.interval_steps)
        return due and not self.state.guard.streak

    def _save(self) -> None:
        """Starts to save; the files are written while training goes on."""
        self.pulse.saved()
        target = checkpoint.folder_of_step(self.home, self.state.step)
        manifest = self.state.manifest(self.config)
        self.saver.save(target, self.state.tensors(), manifest, after=lambda: self._saved(target))
        self.watchdog.beat(self.state.step, "training")

    def _saved(self, folder: checkpoint.Folder) -> None:
        """Follows every checkpoint that was published."""
        if self.is_main:
            if self.config.train.lora is not None:
                write_adapter_folder(folder, self.run_dir / "adapter")
            try:
                checkpoint.prune(self.home, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every_steps)
            except Exception as error:  # Old checkpoints that stay are no reason to end; stores may raise anything.
                self.console.message(f"older checkpoints could not be removed: {error!s:.300}")

    def close(self) -> None:
        """Lets go of threads and files."""
        self.watchdog.stop()
        self.profile.close()
        self.saver.close()
        self.loader.close()
        self.console.stop()
        if self.writer is not None:
            self.writer.close()
        self.lock.release()


def _resolve(path: str) -> checkpoint.Folder:
    """The checkpoint that the first rank finds."""
    return broadcast_object(lambda: checkpoint.resolve(path))


def _falls_on(step: int, interval: int, last: bool = False) -> bool:
    """Whether something that happens every `interval` steps (0: never), and at the last, happens after this one."""
    return interval > 0 and (last or step % interval == 0)


def train(config: RunConfig) -> None:
    """Trains one stage, or goes on with it, on the ranks torchrun started or on this process alone."""
    Trainer(config).run()
