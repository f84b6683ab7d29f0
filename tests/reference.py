"""The whole training step again, the plain way: one process, float64, no packing, no fusion, no sharding.

Shares nothing with the package but configuration and batches. Attention holds its full mask, every token visits its
experts one by one, logits exist all at once, AdamW and clipping are written out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig, RunConfig

Weights = dict[str, Tensor]


class Reference:
    """Trains on global batches; `step` returns the metrics of one and moves `weights`, which are float64."""

    def __init__(self, config: RunConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: weight.detach().double().clone() for name, weight in weights.items()}
        self.first_moment = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second_moment = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        model = config.model
        # Before the first step no load has been seen, and every expert counts as equally loaded.
        self.load = torch.full((model.num_layers, model.num_experts), 1 / model.num_experts, dtype=torch.float64)
        self.steps = 0

    def step(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step on the windows of a global batch, whatever micro-batches they come in."""
        weights = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        documents = [document for batch in batches for document in split_documents(batch)]
        losses: list[Tensor] = []
        by_source: dict[int, list[float]] = {}
        logits: list[list[Tensor]] = [[] for _ in range(self.config.model.num_layers)]
        for tokens, labels, source in documents:
            scores, router_logits = forward_document(weights, tokens, self.config.model)
            own = [-scores[at].log_softmax(-1)[label] for at, label in enumerate(labels.tolist()) if label >= 0]
            losses += own
            by_source.setdefault(source, []).extend(loss.item() for loss in own)
            for layer, of_layer in enumerate(router_logits):
                logits[layer].append(of_layer)
        loss = torch.stack(losses).mean()
        objective, metrics = loss, {"loss": loss.item()}
        for source, values in by_source.items():
            metrics[f"loss/{self.config.data.train[source].name}"] = sum(values) / len(values)
        loads = []
        for layer, parts in enumerate(logits):
            extra, figures, load = self._router_losses(torch.cat(parts), self.load[layer])
            objective = objective + extra
            loads.append(load)
            for name, value in figures.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(logits)
        gradients = dict(zip(weights, torch.autograd.grad(objective, list(weights.values())), strict=True))
        self.load = torch.stack(loads)
        metrics["grad_norm"] = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        metrics["objective"] = objective.item()
        self._update(gradients, metrics["grad_norm"])
        return metrics

    def _router_losses(self, logits: Tensor, load: Tensor) -> tuple[Tensor, dict[str, float], Tensor]:
        """What a layer adds to the objective under the given load; its losses under its own load; its own load."""
        model = self.config.model
        probabilities = logits.softmax(-1)
        chosen = [set(row.topk(model.top_k).indices.tolist()) for row in logits]
        own = torch.tensor([sum(expert in row for row in chosen) for expert in range(model.num_experts)])
        own = own.double() / (model.top_k * len(chosen))
        z_loss = (logits.exp().sum(-1).log() ** 2).mean()
        extra = (
            model.balance_coefficient * balance(probabilities, load, model.balance_group_size)
            + model.expert_balance_coefficient * balance(probabilities, load, 1)
            + model.z_coefficient * z_loss
        )
        of_groups = own.view(-1, model.balance_group_size).sum(1)
        figures = {
            "balance_loss": balance(probabilities, own, model.balance_group_size),
            "z_loss": z_loss,
            "expert_load_max": own.max() / own.mean(),
            "group_load_max": of_groups.max() / of_groups.mean(),
            "router_entropy": -(probabilities * probabilities.log()).sum(-1).mean(),
        }
        return extra, {name: float(value) for name, value in figures.items()}, own

    def _update(self, gradients: Weights, norm: float) -> None:
        options = self.config.optimizer
        lr = scheduled_rate(self.config, self.steps)
        scale = min(1.0, options.clip_norm / norm) if options.clip_norm else 1.0
        self.steps += 1
        beta1, beta2 = options.betas
        for name, weight in self.weights.items():
            gradient = gradients[name] * scale
            self.first_moment[name] = beta1 * self.first_moment[name] + (1 - beta1) * gradient
            self.second_moment[name] = beta2 * self.second_moment[name] + (1 - beta2) * gradient**2
            mean = self.first_moment[name] / (1 - beta1**self.steps)
            variance = self.second_moment[name] / (1 - beta2**self.steps)
            decay = options.weight_decay if weight.ndim > 1 else 0.0
            self.weights[name] = weight * (1 - lr * decay) - lr * mean / (variance.sqrt() + options.eps)


def scheduled_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a step (from 0) under linear warm-up and cosine decay by tokens."""
    schedule, peak = config.schedule, config.optimizer.lr
    assert schedule.kind == "cosine"
    assert schedule.total_tokens is not None
    tokens = (step + 1) * config.train.global_batch_size * config.train.context_length
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    share = min(1.0, (tokens - schedule.warmup_tokens) / (schedule.total_tokens - schedule.warmup_tokens))
    low = schedule.min_lr_ratio
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


def balance(probabilities: Tensor, load: Tensor, group_size: int) -> Tensor:
    """G * sum over groups of (share of assignments) * (mean probability)."""
    total = probabilities.new_zeros(())
    num_groups = len(load) // group_size
    for group in range(num_groups):
        members = range(group * group_size, (group + 1) * group_size)
        share = sum(load[expert] for expert in members)
        total = total + share * sum(probabilities[:, expert].mean() for expert in members)
    return num_groups * total


def split_documents(batch: MicroBatch) -> list[tuple[Tensor, Tensor, int]]:
    """(token ids, labels, source) of every document."""
    spans = zip(itertools.pairwise(batch.starts.tolist()), batch.source_ids.tolist(), strict=True)
    return [(batch.token_ids[a:b], batch.labels[a:b], source) for (a, b), source in spans]


def forward_document(weights: Weights, tokens: Tensor, config: ModelConfig) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, V] of one document by itself, and the router's logits [T, E] of every layer."""
    x = weights["embed.weight"][tokens]
    router_logits = []
    for layer in range(config.num_layers):
        own = {name.removeprefix(f"layers.{layer}."): w for name, w in weights.items() if f"layers.{layer}." in name}
        x = x + attention(own, normalised(x, own["attention_norm.weight"], config), config)
        mixed, logits = mixture(own, normalised(x, own["moe_norm.weight"], config), config)
        x = x + mixed
        router_logits.append(logits)
    return normalised(x, weights["norm.weight"], config) @ weights["head.weight"].T, router_logits


def normalised(x: Tensor, gain: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain


def attention(weights: Weights, x: Tensor, config: ModelConfig) -> Tensor:
    length, width = len(x), config.head_dim
    query, key, value = ((x @ weights[f"attention.{name}.weight"].T).view(length, -1, width) for name in "qkv")
    query, key = rotated(query, config), rotated(key, config)
    visible = torch.tensor([[source <= target for source in range(length)] for target in range(length)])
    heads = []
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        scores = query[:, head] @ key[:, shared].T / math.sqrt(width)
        heads.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ value[:, shared])
    return torch.cat(heads, -1) @ weights["attention.o.weight"].T


def rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """Rotary embedding as a multiplication of complex numbers; element i pairs with element i + width / 2."""
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def mixture(weights: Weights, x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The experts' outputs, token by token, and the router's logits."""
    logits = x @ weights["moe.router.weight"].T
    rows = []
    for token, scores in zip(x, logits, strict=True):
        best = scores.topk(config.top_k)
        shares = best.values.softmax(-1)
        row = torch.zeros_like(token)
        for share, expert in zip(shares, best.indices.tolist(), strict=True):
            gate, up = (token @ weights["moe.experts.gate_up"][expert]).chunk(2)
            row = row + share * ((gate * gate.sigmoid() * up) @ weights["moe.experts.down"][expert])
        rows.append(row)
    out = torch.stack(rows)
    if config.num_shared_experts:
        gate, up = (x @ weights[f"moe.shared.{name}.weight"].T for name in ("gate", "up"))
        out = out + (gate * gate.sigmoid() * up) @ weights["moe.shared.down.weight"].T
    return out, logits
