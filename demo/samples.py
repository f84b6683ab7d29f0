"""What the model says after each stage: the same prompts, from the final checkpoint of every run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from aria_train.eval.generate import generate
from aria_train.eval.loading import Loaded, load_for_eval, tokenizer_folder
from aria_train.eval.prompts import PromptWriter
from aria_train.eval.terminal import decode_stream
from aria_train.parallel.job import orderly_end

PROMPTS = (
    '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self):
''',
    """def test_read_empty_file(self):
""",
)
MOST_TOKENS, TEMPERATURE, TOP_P = 160, 0.7, 0.9


def write_samples(run_dirs: list[Path]) -> None:
    """Leaves `report/samples.json` (pairs of prompt and continuation) in every run directory that has none."""
    with orderly_end():
        for run_dir in run_dirs:
            path = run_dir / "report" / "samples.json"
            if path.exists():
                continue
            loaded = load_for_eval(run_dir)
            samples = [(prompt, _continue(loaded, prompt)) for prompt in PROMPTS]
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
            os.replace(aside, path)


def read_samples(run_dir: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) of every prompt."""
    return [(prompt, said) for prompt, said in json.loads((run_dir / "report" / "samples.json").read_text("utf-8"))]


def _continue(loaded: Loaded, text: str) -> str:
    writer = PromptWriter(tokenizer_folder(None, loaded.config), loaded.config.model)
    stop = {loaded.config.model.eos_token_id}
    tokens = generate(loaded.model, writer.continuation(text, []), MOST_TOKENS, TEMPERATURE, TOP_P, stop)
    return "".join(decode_stream(writer.tokenizer, tokens))
