"""`aria-train generate`: a model's continuation of a prompt, on the terminal as it comes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator

import tokenizers

from aria_train.errors import ConfigError
from aria_train.eval.generate import generate
from aria_train.eval.loading import load_for_eval, tokenizer_folder
from aria_train.eval.prompts import Prompt, PromptWriter, read_picture
from aria_train.parallel.job import orderly_end


def run_generate(args: argparse.Namespace) -> None:
    """Loads the model and prints what it says. Under torchrun rank 0 prints."""
    _check(args)
    pictures = [read_picture(path) for path in args.image]
    with orderly_end():
        loaded = load_for_eval(args.checkpoint)
        writer = PromptWriter(tokenizer_folder(args.tokenizer, loaded.config), loaded.config.model, args.image_size)
        prompt = (writer.chat if args.chat else writer.continuation)(args.prompt, pictures)
        _check_length(prompt, loaded.config.model.max_positions)
        stop = {loaded.config.model.eos_token_id} | ({writer.token("<|im_end|>")} if args.chat else set())
        options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        tokens = generate(loaded.model, prompt, max_new_tokens=args.max_new_tokens, stop=stop, **options)
        for text in decode_stream(writer.tokenizer, tokens):
            if loaded.is_main:
                sys.stdout.write(text)
                sys.stdout.flush()
        if loaded.is_main:
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
    yield tokenizer.decode(ids)[len(shown) :]


def _check(args: argparse.Namespace) -> None:
    """Refuses options that cannot be meant, before a model is loaded."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more.")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature {args.temperature}: must be 0 (the likeliest token) or more.")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p}: must be above 0 and at most 1 (all tokens).")
    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed {args.seed}: must be 0 or more and below 2^63.")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not valid UTF-8 text; give it in that encoding.") from None


def _check_length(prompt: Prompt, max_positions: int) -> None:
    length = len(prompt.token_ids)
    if not length:
        raise ConfigError("--prompt is empty; give at least one character or image to continue.")
    if length >= max_positions:
        raise ConfigError(
            f"the prompt has {length:,} tokens, but the model reads at most {max_positions:,} (model.max_positions), "
            "and one at least must be left for the answer. Shorten it, or use fewer or smaller images."
        )
