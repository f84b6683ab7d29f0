"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.batch import ImageBatch, MicroBatch
from aria_train.model import AriaModel
from aria_train.model.decoder import Cache


@torch.no_grad()
def generate(
    model: AriaModel,
    prompt: Tensor,
    images: ImageBatch | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt, int64 [S]; image tokens in it are replaced by `images`. Yields token ids as they come.

    temperature 0 takes the likeliest token; above, samples from the smallest set of tokens that holds `top_p` of the
    probability. Ends after a token of `stop`, which is yielded too, or at `max_new_tokens` or `model.max_positions`.
    """
    model.eval()
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    generator = torch.Generator(device).manual_seed(seed)
    cache = Cache.empty(model.config, device, dtype)
    room = model.config.max_positions - prompt.shape[0]
    tokens = prompt.to(device)
    for _ in range(min(max_new_tokens, room)):
        logits = next_logits(model, tokens, cache, images)
        token = choose(logits, temperature, top_p, generator)
        yield token
        if token in stop:
            return
        tokens, images = torch.tensor([token], device=device), None


def next_logits(model: AriaModel, tokens: Tensor, cache: Cache, images: ImageBatch | None = None) -> Tensor:
    """Feeds tokens, int64 [S], that follow what the cache holds; returns the last position's logits, float32 [V]."""
    starts = torch.tensor([0, tokens.shape[0]], dtype=torch.int32, device=tokens.device)
    batch = MicroBatch(tokens, torch.full_like(tokens, -100), starts, tokens.shape[0], starts[:1].long(), images)
    hidden, _ = model.hidden_states(batch, cache)
    return F.linear(hidden[-1], model.head.weight).float()


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [V]."""
    if temperature <= 0:
        return int(logits.argmax())
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    # A token stays while the ones before it have not filled top_p; the likeliest always stays.
    probs = probs * (probs.cumsum(-1) - probs < top_p)
    return int(order[torch.multinomial(probs, 1, generator=generator)])
