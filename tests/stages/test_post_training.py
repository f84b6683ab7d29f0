"""Chat data: loss where the assistant speaks and nowhere else, and packing that no sample notices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aria_train.batch import IGNORE_LABEL, MicroBatch
from aria_train.config import RunConfig
from aria_train.data.loader import pack_windows
from aria_train.data.multimodal.formats import Recipe
from aria_train.data.prepare.multimodal import prepare_multimodal
from aria_train.data.text.corpus import open_source
from aria_train.data.text.tokenizer import load_tokenizer, train_tokenizer
from aria_train.data.window import Source, Window
from aria_train.model import AriaModel
from tests.stages.recipe import VISION, png
from tests.tiny import tiny_config

SYSTEM, QUESTIONS = "Answer in a word.", ("Which colour?", "How many rings are there?", "And now?")
ANSWERS = ("green", "nine rings, I think", "none")
ROLES = ("system", "user", "assistant")


@pytest.fixture(scope="module", params=[True, False], ids=["with images", "text alone"])
def chats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any]:
    """A corpus of conversations prepared from JSON lines, its configuration and its tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    said = [SYSTEM, *QUESTIONS, *ANSWERS, *ROLES]
    train_tokenizer([f"{role}\n{text}\n" for role in ROLES for text in said] * 4, 320, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    vision = {"vision": VISION} if request.param else {"vision": None}
    config = tiny_config(folder / "run", [{"name": "chat", "path": str(folder / "chat")}],
                         model={"vocab_size": size, **vision}, train={"context_length": 400})  # fmt: skip
    with (folder / "chat.jsonl").open("w") as file:
        for number in range(24):
            file.write(json.dumps(conversation(number, folder if request.param else None)) + "\n")
    recipe = Recipe(str(folder / "tokenizer"), config.model, "chat", "assistant")
    prepare_multimodal(folder / "chat", [str(folder / "chat.jsonl")], recipe)
    return config, tokenizer


def conversation(number: int, folder: Path | None) -> dict[str, Any]:
    """One to three turns, with a system message and a picture now and then."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}] if number % 3 == 0 else []
    for turn in range(1 + number % 3):
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[turn]}]
        if folder is not None and (number + turn) % 2:
            (folder / f"{number}-{turn}.png").write_bytes(png(number, 14, 7 + 7 * turn))
            content.insert(0, {"type": "image", "image": f"{number}-{turn}.png"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": ANSWERS[turn]})
    return {"messages": messages}


def windows(config: RunConfig) -> tuple[Source, list[Window]]:
    source = open_source(config.data.train[0], config)
    return source, [source.read(position) for position in range(source.num_windows)]


def model_of(config: RunConfig) -> AriaModel:
    return AriaModel(config.model).eval()


def spoken_by_assistant(token_ids: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens of a document the assistant says, closing tag and its line end included: by reading it along."""
    start, end = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    prefix = tokenizer.encode("assistant\n", add_special_tokens=False).ids
    spoken: list[bool] = []
    speaking = False
    for at, token in enumerate(token_ids):
        if token == start:
            speaking = False
        spoken.append(speaking)
        if token_ids[max(0, at - len(prefix)) : at + 1] == [start, *prefix]:
            speaking = True
    assert token_ids.count(end) == token_ids.count(start)
    return spoken


def test_what_is_learned_is_what_the_assistant_says(chats: tuple[RunConfig, Any]) -> None:
    config, tokenizer = chats
    learned: set[str] = set()
    for window in windows(config)[1]:
        at = 0
        for length in window.document_lengths:
            labels = window.labels[at : at + length]
            text = tokenizer.decode(labels[labels != IGNORE_LABEL].tolist(), skip_special_tokens=False)
            learned.add(text)
            at += length
    assert learned == {"".join(f"{answer}<|im_end|>\n" for answer in ANSWERS[:turns]) for turns in (1, 2, 3)}


def test_only_the_assistants_labels_matter(chats: tuple[RunConfig, Any]) -> None:
    """Against every next-token loss, found one by one: those of the user's turns may be anything."""
    config, tokenizer = chats
    window = windows(config)[1][0]
    batch = pack_windows([window], [0])
    model = model_of(config)
    loss, gradients = loss_and_gradients(model, batch)
    mask, labels = [], []
    for ids in batch.token_ids.split(batch.starts.diff().tolist()):
        document = [*ids.tolist(), -1]
        spoken = spoken_by_assistant(document[:-1], tokenizer)
        # The last token of a document is not among the inputs: it is the line end behind the closing tag.
        mask += [*spoken[1:], True]
        labels += [*document[1:-1], tokenizer.encode("\n", add_special_tokens=False).ids[0]]
    assert [label != IGNORE_LABEL for label in batch.labels.tolist()] == mask
    noise = torch.randint(config.model.vocab_size, (len(labels),), generator=torch.Generator().manual_seed(0))
    perturbed = torch.where(torch.tensor(mask), torch.tensor(labels), noise)
    logits = plain_logits(model, batch)
    each = F.cross_entropy(logits.double(), perturbed, reduction="none")
    plain = (each * torch.tensor(mask)).sum()
    torch.testing.assert_close(loss.double(), plain.detach(), rtol=1e-5, atol=1e-5)
    parameters = [parameter for name, parameter in model.named_parameters() if name in gradients]
    for name, gradient in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=1e-3, atol=1e-5)


def test_the_closing_tag_is_trained(chats: tuple[RunConfig, Any]) -> None:
    config, tokenizer = chats
    batch = pack_windows(windows(config)[1][:1], [0])
    end = tokenizer.token_to_id("<|im_end|>")
    closing = (batch.labels == end).nonzero().flatten()
    assert len(closing) >= len(batch.starts) - 1
    model = model_of(config)
    loss, _ = loss_and_gradients(model, batch)
    labels = batch.labels.clone()
    labels[closing[0]] = (end + 1) % config.model.vocab_size
    changed, _ = loss_and_gradients(model, MicroBatch(**{**vars(batch), "labels": labels}))
    assert changed != loss


def test_packing_changes_no_samples_loss(chats: tuple[RunConfig, Any]) -> None:
    """Every conversation packed with others, against itself in a window of its own; float32."""
    config, _ = chats
    source, packed = windows(config)
    assert max(len(window.document_lengths) for window in packed) > 3
    model = model_of(config)
    together: list[Tensor] = []
    alone: list[Tensor] = []
    for window in packed:
        batch = pack_windows([window], [0])
        together += losses_by_document(model, batch)
        for single in split(window):
            alone += losses_by_document(model, pack_windows([single], [0]))
    assert len(together) == len(alone) == 24
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=1e-5, atol=1e-5)
    # The documents, that is, their order within windows and windows within micro-batches, do not matter either.
    across = losses_by_document(model, pack_windows(packed[::-1], [0] * len(packed)))
    found, wanted = (torch.stack(losses).sort().values for losses in (across, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert source.num_windows < 24


def split(window: Window) -> list[Window]:
    """The documents of a window, each as a window."""
    singles = []
    at, left = 0, list(window.images)
    for length in window.document_lengths.tolist():
        tokens = window.token_ids[at : at + length]
        images = []
        while sum(image.num_queries for image in images) < (tokens == 9).sum():
            images.append(left.pop(0))
        singles.append(Window(tokens, window.labels[at : at + length], np.array([length], np.int32), images))
        at += length
    return singles


def losses_by_document(model: AriaModel, batch: MicroBatch) -> list[Tensor]:
    with torch.no_grad():
        token_losses = model(batch).token_losses
    targets = (batch.labels != IGNORE_LABEL).split(batch.starts.diff().tolist())
    return [part.sum() for part in token_losses.split([int(target.sum()) for target in targets])]


def loss_and_gradients(model: AriaModel, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_logits(model: AriaModel, batch: MicroBatch) -> Tensor:
    """Logits of every position, [T, V]."""
    hidden, _ = model.hidden_states(batch)
    return F.linear(hidden, model.head.weight)
