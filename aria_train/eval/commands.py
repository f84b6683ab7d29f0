"""The commands that look at a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import tokenizers
import torch

from aria_train.data.tokenizer import load_tokenizer
from aria_train.errors import ConfigError
from aria_train.eval.generate import generate
from aria_train.train.state import load_model


def run_generate(args: argparse.Namespace) -> None:
    """`aria-train generate`: prints the continuation as it comes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, config = load_model(args.checkpoint, device, dtype)
    folder = args.tokenizer or config.data.tokenizer
    if folder is None:
        raise ConfigError("the checkpoint's run names no tokenizer; give one with --tokenizer FOLDER.")
    tokenizer = load_tokenizer(folder)
    prompt = torch.tensor(tokenizer.encode(args.prompt, add_special_tokens=False).ids)
    if not prompt.numel():
        raise ConfigError("--prompt is empty; give at least one character to continue.")
    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    stop = {config.model.eos_token_id}
    tokens = generate(model, prompt, max_new_tokens=args.max_new_tokens, stop=stop, **options)
    for text in decode_stream(tokenizer, tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def decode_stream(tokenizer: tokenizers.Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as tokens come; a character spread over several tokens is held back until it is whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
