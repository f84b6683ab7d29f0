"""Text from a model, token by token, with a key-value cache: one prompt as a stream, or many at once.

With experts spread over ranks all of them call together, since a forward pass needs every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.errors import CheckpointError
from aria_train.eval.prompts import Prompt, pack_prompts
from aria_train.model import AriaModel
from aria_train.model.cache import Cache
from aria_train.parallel.collectives import all_ranks


@torch.no_grad()
def generate(
    model: AriaModel,
    prompt: Prompt,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt; yields token ids as they come. All ranks, if there are several, yield the same.

    temperature 0 takes the likeliest token; above, samples from the smallest set of tokens that holds `top_p` of the
    probability. Ends after a token of `stop`, which is yielded too, or at `max_new_tokens` or `model.max_positions`.
    """
    model.eval()
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(seed)
    cache = Cache(1)
    room = model.config.max_positions - len(prompt.token_ids)
    batch = opening([prompt], model)
    for _ in range(min(max_new_tokens, room)):
        logits = model.target_logits(batch.to(device), cache)
        token = _same_on_all_ranks(choose(logits[0], temperature, top_p, generator))
        yield int(token)
        if int(token) in stop:
            return
        batch = next_tokens(token[None])


@torch.no_grad()
def answer_batch(
    model: AriaModel, prompts: Sequence[Prompt], max_new_tokens: int, stop: Collection[int] = ()
) -> list[list[int]]:
    """The likeliest continuation of every prompt: one packed forward pass over all of them, then one per token.

    Answers end before a token of `stop`, or at `max_new_tokens` or `model.max_positions`. Collective: every rank brings
    its own prompts, maybe none.
    """
    model.eval()
    device = device_of(model)
    cache = Cache(len(prompts))
    batch = opening(prompts, model)
    answers: list[list[int]] = [[] for _ in prompts]
    rooms = [min(max_new_tokens, model.config.max_positions - len(prompt.token_ids)) for prompt in prompts]
    open_ones = {index for index, room in enumerate(rooms) if room > 0}
    while not everywhere(not open_ones, device):
        tokens = model.target_logits(batch.to(device), cache).argmax(-1)
        for index, token in enumerate(tokens.tolist()):
            if index in open_ones and token not in stop:
                answers[index].append(token)
            if token in stop or len(answers[index]) >= rooms[index]:
                open_ones.discard(index)
        batch = next_tokens(tokens)
    return answers


def opening(prompts: Sequence[Prompt], model: AriaModel) -> MicroBatch:
    """The prompts without their answers, whose last positions predict what comes."""
    if not prompts:
        return next_tokens(torch.zeros(0, dtype=torch.int64))
    batch = pack_prompts([dataclasses.replace(prompt, answer=[]) for prompt in prompts], model.config.vision)
    return dataclasses.replace(batch, target_positions=batch.starts[1:].long() - 1)


def next_tokens(tokens: Tensor) -> MicroBatch:
    """One token more, int64 [B], of each of B documents."""
    positions = torch.arange(tokens.shape[0] + 1, device=tokens.device)
    nothing = torch.full_like(tokens, -100)
    return MicroBatch(tokens, nothing, positions.int(), 1, torch.zeros_like(tokens), target_positions=positions[:-1])


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token, int64 [], from logits [V]. Raises CheckpointError for logits that are not finite."""
    if not logits.isfinite().all():
        raise CheckpointError(
            "what the model says is not finite: the training that wrote this checkpoint diverged before. Use an "
            "earlier checkpoint."
        )
    if temperature <= 0:
        return logits.argmax()
    # The likeliest is set to 0 before the division, so that no temperature makes anything but the others infinite.
    scaled = (logits - logits.max()) / max(temperature, torch.finfo(logits.dtype).tiny)
    probs, order = scaled.softmax(-1).sort(descending=True)
    # A token stays while the ones before it have not filled top_p; the likeliest always stays.
    stays = probs.cumsum(-1) - probs < top_p
    stays[0] = True
    return order[torch.multinomial(probs * stays, 1, generator=generator)[0]]


def device_of(model: AriaModel) -> torch.device:
    return next(model.parameters()).device


def everywhere(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every rank, of however many there are."""
    return all_ranks(condition, device) if dist.is_initialized() else condition


def _same_on_all_ranks(token: Tensor) -> Tensor:
    """Rank 0's choice: kernels may round differently elsewhere, and a rank that went its own way would stall all."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(token, 0)
    return token
