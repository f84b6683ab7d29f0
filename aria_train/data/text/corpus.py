"""Text corpora as windows of packed documents."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aria_train.config import ModelConfig, RunConfig, SourceConfig
from aria_train.data.packing import PLAN_VERSION, PackingPlan, cached_plan, plan_documents
from aria_train.data.text.indexed import IndexedCorpus, read_metadata, strip_suffix
from aria_train.data.views import chosen
from aria_train.data.window import Source, Window
from aria_train.data.work import forward_flops
from aria_train.errors import DataError


def open_source(source: SourceConfig, config: RunConfig) -> Source:
    """Opens a corpus of the configuration, text or multimodal by what lies at its path.

    Packing plans go beside the corpus or, where that is read-only, into the run directory.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    if len(paths) == 1 and (Path(paths[0]) / "meta.json").is_file():
        from aria_train.data.multimodal.corpus import MultimodalSource

        return MultimodalSource(source, config)
    if source.concatenate is not None:
        raise DataError(
            f"source {source.name!r}: {paths[0]}: `concatenate` joins captioned images, and this is no multimodal "
            "corpus. Prepare one with `aria-train data prepare --format captions`."
        )
    try:
        return TextSource(
            source.name,
            find_prefixes(paths),
            context_length=config.train.context_length,
            seed=config.train.seed,
            model=config.model,
            fallback=Path(config.train.run_dir) / "packing",
            min_tokens=source.min_tokens,
            max_tokens=source.max_tokens,
        )
    except DataError as error:
        raise DataError(f"source {source.name!r}: {error}") from None


def find_prefixes(paths: Sequence[str | Path]) -> list[str]:
    """Prefixes of the corpora at `paths`, each a prefix or a folder of pairs; folders in order of name."""
    prefixes = []
    for path in paths:
        if Path(path).is_dir():
            found = sorted(str(index)[:-4] for index in Path(path).glob("*.idx"))
            if not found:
                raise DataError(
                    f"{path}: this folder holds no corpus. A text corpus is a pair PREFIX.bin and PREFIX.idx, a "
                    "multimodal one a folder with meta.json; make either with `aria-train data prepare`."
                )
            prefixes += found
        else:
            prefixes.append(strip_suffix(path))
    if len(set(prefixes)) < len(prefixes):
        twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
        raise DataError(f"the corpus {twice[0]} is given twice. List each once; weights belong to sources.")
    return prefixes


class TextSource:
    """One or more `.bin/.idx` corpora, packed together into windows. See `Source`."""

    def __init__(
        self,
        name: str,
        prefixes: Sequence[str | Path],
        context_length: int,
        seed: int,
        model: ModelConfig,
        fallback: Path | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.name, self._context_length, self._model = name, context_length, model
        self._bounds = min_tokens, max_tokens
        self.corpora = [IndexedCorpus(prefix) for prefix in prefixes]
        self._first_document = np.cumsum([0, *(corpus.num_documents for corpus in self.corpora)]).tolist()
        for corpus in self.corpora:
            check_fits(corpus, model)
        first = self.corpora[0]
        folders = [Path(first.prefix + ".packing"), *([fallback] if fallback else [])]
        self.plan = cached_plan(folders, self._plan_key(seed), lambda: self._build_plan(seed))
        self.num_windows = len(self.plan.starts) - 1
        if not self.num_windows:
            raise DataError(
                f"{first.prefix}: holds {self.plan.stats.documents:,} documents, none of them with two tokens or more"
                f"{self._describe_bounds()}, so there is nothing to train on. Check what the corpus was prepared from."
            )

    def _plan_key(self, seed: int) -> str:
        """Names the plan after all it depends on: another corpus, length or seed is another plan."""
        parts: list[object] = [PLAN_VERSION, self._context_length, seed]
        parts += [list(self._bounds)] if any(self._bounds) else []
        for corpus in self.corpora:
            index, tokens = corpus.idx_path.stat(), corpus.bin_path.stat()
            parts.append([corpus.idx_path.name, index.st_size, index.st_mtime_ns, tokens.st_size])
        return f"{self._context_length}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def _build_plan(self, seed: int) -> PackingPlan:
        for corpus in self.corpora:
            corpus.verify()
        lengths = np.concatenate([corpus.document_lengths() for corpus in self.corpora])
        # A document that is not chosen is packed like one without tokens: not at all.
        lengths[~chosen(lengths, *self._bounds)] = 0
        return plan_documents(lengths, self._context_length, seed)

    def _describe_bounds(self) -> str:
        given = zip(("min_tokens", "max_tokens"), self._bounds)
        return "".join(f" and {name} {bound:,}" for name, bound in given if bound is not None)

    @property
    def fingerprint(self) -> str:
        """See `Source`. The order of the corpora counts: windows follow it."""
        return hashlib.sha256(" ".join(corpus.fingerprint() for corpus in self.corpora).encode()).hexdigest()

    def read(self, position: int) -> Window:
        assert 0 <= position < self.num_windows, f"window {position} of {self.num_windows}"
        pieces = slice(int(self.plan.starts[position]), int(self.plan.starts[position + 1]))
        documents = self.plan.documents[pieces].tolist()
        starts = (self.plan.pieces[pieces] * self._context_length).tolist()
        read = [self._read_piece(document, start) for document, start in zip(documents, starts, strict=True)]
        return Window(
            token_ids=np.concatenate([tokens[:-1] for tokens in read]),
            labels=np.concatenate([tokens[1:] for tokens in read]),
            document_lengths=np.array([len(tokens) - 1 for tokens in read], np.int32),
        )

    def work(self, position: int) -> float:
        pieces = slice(int(self.plan.starts[position]), int(self.plan.starts[position + 1]))
        documents = self.plan.documents[pieces]
        which = np.searchsorted(self._first_document, documents, side="right") - 1
        tokens = np.empty(len(documents), np.int64)
        for number in np.unique(which).tolist():
            mine = which == number
            tokens[mine] = self.corpora[number].lengths_of(documents[mine] - self._first_document[number])
        left = tokens - 1 - self.plan.pieces[pieces].astype(np.int64) * self._context_length
        lengths = np.minimum(left, self._context_length)
        return forward_flops(lengths, [], self._model)

    def _read_piece(self, document: int, start: int) -> NDArray[np.int32]:
        """int32: up to context_length + 1 tokens; each but the last an input, each but the first a target."""
        which = bisect.bisect_right(self._first_document, document) - 1
        corpus, local = self.corpora[which], document - self._first_document[which]
        tokens = corpus.read(local, start, start + self._context_length + 1)
        if tokens.max() >= self._model.vocab_size or tokens.min() < 0:
            wrong = tokens[(tokens >= self._model.vocab_size) | (tokens < 0)][0]
            raise DataError(
                f"{corpus.prefix}: document {local} holds token id {wrong}, but the model's vocabulary is 0 to "
                f"{self._model.vocab_size - 1}. The corpus was made with another tokenizer than the model is for: "
                "prepare it with the right one, or set model.vocab_size."
            )
        if self._model.vision is not None and (tokens == self._model.image_token_id).any():
            raise DataError(
                f"{corpus.prefix}: document {local} holds the image placeholder, token id "
                f"{self._model.image_token_id}, but a text corpus has no images to put there. Prepare the corpus with "
                "a tokenizer that reserves this id, or set model.image_token_id to one that it does."
            )
        return tokens.astype(np.int32)


def check_fits(corpus: IndexedCorpus, model: ModelConfig) -> None:
    """What can be known of a corpus and the model before reading tokens."""
    if corpus.dtype.kind not in "iu":
        raise DataError(
            f"{corpus.prefix}: holds {corpus.dtype.name} values, not token ids. A text corpus holds integers: "
            "prepare it with `aria-train data prepare`."
        )
    try:
        vocabulary = int(read_metadata(corpus.prefix)["vocabulary_size"])
    except (ValueError, KeyError, TypeError):
        return  # Not ours: another tool's file beside a corpus of the same name.
    if vocabulary > model.vocab_size:
        raise DataError(
            f"{corpus.prefix}: was prepared with a tokenizer of {vocabulary:,} tokens, more than model.vocab_size "
            f"{model.vocab_size:,}. Set model.vocab_size to {vocabulary} or more, or prepare the corpus with the "
            "model's tokenizer."
        )
