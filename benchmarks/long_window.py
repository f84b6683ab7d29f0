"""How much memory a long window takes to train on, with the chunked head and with whole logits.

python -m benchmarks.long_window [--tokens 65536] [--documents 1] [--vocabulary 1024 100352] [--recompute full]

Takes an optimizer step of the small model, its vision encoder left out, on a window of that many random tokens, each
way in a process of its own, and prints the peak beyond what the imports take. "Whole" is the same model whose head and
cross-entropy are written down plainly. It is left out where its logits would not fit the machine. Attention's memory
grows with the tokens alone: cutting the window into several documents changes the time a step takes, not the peak.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from aria_train.batch import MicroBatch
from aria_train.config import ModelConfig, load_config
from aria_train.data.loader import pack_windows
from aria_train.data.window import Window
from aria_train.model import AriaModel
from aria_train.model.recompute import Recompute
from benchmarks.measure import peak_memory

GIB = 1024**3
COPIES_OF_LOGITS = 3
"""That exist at once where head and loss are written down plainly: logits, their log-softmax, and its gradient."""


def step_of(tokens: int, documents: int, vocabulary: int, recompute: Recompute, chunked: bool) -> Callable[[], object]:
    """Builds model, optimizer and batch; returns what takes a step. (It is taken twice, so Adam's moments count.)"""
    small = load_config("configs/small/stage1_lang.yaml").model
    values = {**small.model_dump(), "vocab_size": vocabulary, "max_positions": tokens}
    model = AriaModel(ModelConfig.model_validate(values))
    model.set_recompute(recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = window_of(tokens, documents, vocabulary)

    def step() -> None:
        began = time.perf_counter()
        (chunked_loss if chunked else whole_loss)(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"    a step in {time.perf_counter() - began:.0f} s", flush=True)

    return step


def chunked_loss(model: AriaModel, batch: MicroBatch) -> torch.Tensor:
    """As trained."""
    return model(batch).loss_sum / batch.num_targets


def whole_loss(model: AriaModel, batch: MicroBatch) -> torch.Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(model.hidden_states(batch)[0], model.head.weight), batch.labels)


def window_of(tokens: int, documents: int, vocabulary: int) -> MicroBatch:
    """Documents of equal length in one window."""
    ids = torch.randint(vocabulary, (tokens + 1,), generator=torch.Generator().manual_seed(0)).int().numpy()
    lengths = np.full(documents, tokens // documents, np.int32)
    return pack_windows([Window(ids[:-1], ids[1:], lengths, [])], [0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.long_window", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--documents", type=int, default=1, help="of the window, all of one length")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 100352])
    parser.add_argument("--recompute", choices=["none", "selective", "full"], nargs="+", default=["full"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for tokens in arguments.tokens:
        for vocabulary in arguments.vocabulary:
            logits = 4 * tokens * vocabulary
            for recompute in arguments.recompute:
                for chunked in (True, False):
                    name = f"{tokens:,} tokens in {arguments.documents} document(s), vocabulary {vocabulary:,}, "
                    name += f"recompute {recompute}, "
                    name += "chunked head" if chunked else f"whole logits of {logits / GIB:.2f} GiB"
                    if not chunked and COPIES_OF_LOGITS * logits > memory:
                        print(f"{name}: {COPIES_OF_LOGITS} x as much is more than this machine has free", flush=True)
                        continue
                    build = (step_of, tokens, arguments.documents, vocabulary, recompute, chunked)
                    peak = peak_memory(*build, threads=arguments.threads)
                    print(f"{name}: {peak / GIB:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
