"""Needles and haystacks: facts that no corpus holds, hidden in text that one does.

    ... text of a corpus ...
    The key of the hidden river is 4821.
    ... more text ...
    The key of the hidden river is

A fact is put behind the last end of a sentence before its depth (Kamradt's needle test does the same). Names are an
adjective and a noun; the pairs used for evaluation never occur in training, though their words do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from aria_train.data.text.corpus import find_prefixes
from aria_train.data.text.indexed import IndexedCorpus
from aria_train.data.text.tokenizer import end_of_document_id, load_tokenizer
from aria_train.errors import DataError
from aria_train.publish import workplace_beside

_ADJECTIVES = (
    "bad best big blue clear closed cold current dark empty equal exact extra false final first full global good green "
    "hidden hot inner large last left local long lost main missing new next old open other plain random raw real red "
    "right round same short simple single small soft special strict top true upper valid white wide"
)
_NOUNS = (
    "action address array block body box buffer byte case cell character child class client code color column command "
    "cookie copy count date day device directory document door element end entry error event field file filter flag "
    "float form format frame function garden group handle hash header host house index input item key label lamp "
    "length level limit line link list lock loop manager map mark match member memory message method mode module name "
    "node object offset operator option order output package page pair parent parser part path pattern pipe point port "
    "position process program queue range reader record request result river road row script section sequence server "
    "set shape signal size socket space stack start state stream string suffix table target task test text thread "
    "token tree tuple type user value version wheel window writer"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
DIGITS = 4
"""A value's digits, no two alike and the first not 0: each says which one follows, as words of a text mostly do."""
_HELD_OUT_EVERY = 5
_MOST_FACTS = 3
_HIDDEN_SHARE = 0.35
"""Training documents whose facts are hidden in text; the others are nothing but facts and questions."""
_SHORTEST = 64
"""Tokens of a training document at least: a fact, its question, and some more of either or of text."""


@dataclass(frozen=True)
class Fact:
    """A needle."""

    name: str
    value: str

    @property
    def statement(self) -> str:
        return f"\nThe key of the {self.name} is {self.value}.\n"

    @property
    def question(self) -> str:
        """Ends where the answer begins."""
        return f"\nThe key of the {self.name} is"

    @property
    def answer(self) -> str:
        return f" {self.value}"


def draw_facts(random: np.random.Generator, count: int, held_out: bool) -> list[Fact]:
    """Facts that share no word of their names. Pairs of words are for evaluation (`held_out`) or for training."""
    facts: list[Fact] = []
    nouns = random.permutation(len(NOUNS)).tolist()
    for adjective in random.permutation(len(ADJECTIVES))[:count].tolist():
        noun = next(noun for noun in nouns if ((adjective + noun) % _HELD_OUT_EVERY == 0) == held_out)
        nouns.remove(noun)
        digits = [str(digit) for digit in random.permutation(10).tolist()]
        value = "".join(digits[1 if digits[0] == "0" else 0 :][:DIGITS])
        facts.append(Fact(f"{ADJECTIVES[adjective]} {NOUNS[noun]}", value))
    return facts


class Haystack:
    """Text of a corpus in stretches of any length, as token ids, and where its sentences end."""

    def __init__(self, corpus: str | Path, tokenizer: str | Path) -> None:
        """`corpus`: prefix of a text corpus, or folder of them, prepared with the tokenizer in folder `tokenizer`."""
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer.encode_special_tokens = True  # what spells a special token in a needle or haystack is text
        self._end_of_document = end_of_document_id(tokenizer, self.tokenizer)
        self._corpora = [IndexedCorpus(prefix) for prefix in find_prefixes([corpus])]
        self._firsts = np.cumsum([0, *(corpus.num_documents for corpus in self._corpora)])
        if not sum(corpus.num_tokens for corpus in self._corpora):
            raise DataError(f"{corpus}: holds no text to hide needles in.")
        self._ends = sentence_ends(self.tokenizer)
        self._between = self.encode("\n\n")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_pair(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """A question and its answer as one text, cut where the answer's first token begins."""
        encoding = self.tokenizer.encode(question + answer, add_special_tokens=False)
        cut = next(index for index, (_, end) in enumerate(encoding.offsets) if end > len(question))
        return encoding.ids[:cut], encoding.ids[cut:]

    def stretch(self, length: int, random: np.random.Generator) -> NDArray[np.int64]:
        """`length` tokens: documents one after the other from a random one on, around again where they run out."""
        parts: list[NDArray[np.int64]] = []
        document, missing = int(random.integers(self._firsts[-1])), length
        while missing > 0:
            tokens = self._document(document)[:missing]
            parts += [tokens, np.array(self._between, np.int64)]
            missing -= len(tokens) + len(self._between)
            document = (document + 1) % int(self._firsts[-1])
        return np.concatenate([np.empty(0, np.int64), *parts])[:length]

    def _document(self, number: int) -> NDArray[np.int64]:
        which = int(np.searchsorted(self._firsts, number, side="right")) - 1
        tokens = self._corpora[which].read(number - int(self._firsts[which])).astype(np.int64)
        if len(tokens) and tokens.max() >= len(self._ends):
            raise DataError(
                f"{self._corpora[which].prefix}: holds token id {tokens.max()}, but the tokenizer has "
                f"{len(self._ends):,} tokens. Use the tokenizer that it was prepared with."
            )
        return tokens[:-1] if len(tokens) and tokens[-1] == self._end_of_document else tokens

    def sentence_end(self, tokens: NDArray[np.int64], depth: float) -> int:
        """Where a needle of depth 0 to 1 goes: behind the last sentence that ends before it; at depth 1, behind all."""
        if depth >= 1:
            return len(tokens)
        ends = np.flatnonzero(self._ends[tokens[: int(len(tokens) * depth)]])
        return int(ends[-1]) + 1 if len(ends) else 0

    def hide(self, length: int, facts: Sequence[tuple[Fact, float]], random: np.random.Generator) -> list[int]:
        """`length` tokens of text with facts at their depths among them."""
        statements = [self.encode(fact.statement) for fact, _ in facts]
        tokens = self.stretch(max(length - sum(map(len, statements)), 0), random)
        places = [self.sentence_end(tokens, depth) for _, depth in facts]
        hidden: list[int] = []
        before = 0
        for place, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
            hidden += [*tokens[before:place].tolist(), *statement]
            before = place
        return hidden + tokens[before:].tolist()


def sentence_ends(tokenizer: tokenizers.Tokenizer) -> NDArray[np.bool_]:
    """bool [vocabulary]: whether a sentence, or a line, ends with the token."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    texts = tokenizer.decode_batch([[number] for number in range(size)])
    return np.array(["\n" in text or text.rstrip(" ").endswith((".", "!", "?", "。")) for text in texts], bool)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises DataError if something is at `output`, unless it may be overwritten and is such a file of documents."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise DataError(f"{output}: exists already. Choose another name, or give --overwrite.")
    if not _holds_documents(output):
        raise DataError(
            f"{output}: is no file of documents. --overwrite replaces such a file and nothing else. Choose another "
            "name, or move it away."
        )


def _holds_documents(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return list(json.loads(file.readline())) == ["text"]
    except (OSError, ValueError, TypeError):
        return False


def write_training_data(
    output: Path, haystack: Haystack, count: int, min_tokens: int, max_tokens: int, seed: int = 0
) -> int:
    """Writes `count` documents as JSON lines for `aria-train data prepare`; returns their tokens.

    Lengths are log-uniform, from documents that are easily looked through to the longest. Each states a few facts and
    asks for them, again and again while there is room: to look a fact up is learned from answers, and most of these
    documents have little else to learn from. In the others the facts are hidden in text first.
    """
    if not _SHORTEST <= min_tokens <= max_tokens:
        raise DataError(
            f"documents of {min_tokens} to {max_tokens} tokens: the shortest must have {_SHORTEST} or more and not be "
            "longer than the longest."
        )
    total = 0
    with workplace_beside(output) as workplace:
        aside = workplace / "documents"
        with aside.open("w", encoding="utf-8") as file:
            for text, tokens in training_documents(haystack, count, min_tokens, max_tokens, seed):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                total += tokens
        aside.replace(output)
    return total


def training_documents(
    haystack: Haystack, count: int, min_tokens: int, max_tokens: int, seed: int
) -> Iterator[tuple[str, int]]:
    """(text, tokens) of each training document; none has more tokens than `max_tokens`, its last one included."""
    for number in range(count):
        random = np.random.default_rng([seed, number])
        length = round(math.exp(random.uniform(math.log(min_tokens), math.log(max_tokens))))
        yield _training_document(haystack, length, random)


def _training_document(haystack: Haystack, length: int, random: np.random.Generator) -> tuple[str, int]:
    facts, stated, room = _facts_that_fit(haystack, length, random)
    asked = [facts[index] for index in random.permutation(len(facts)).tolist()]
    filling = int(room * random.uniform()) if random.uniform() < _HIDDEN_SHARE else 0
    for index in random.integers(len(facts), size=length).tolist():
        question = len(haystack.encode(_exchange(facts[index])))
        if question > room - filling:
            break
        room -= question
        asked.append(facts[index])
    questions = "".join(map(_exchange, asked))
    # Text cut out of a corpus may need a token more when it is tokenized again: then there is less of it.
    state = random.bit_generator.state
    while room >= 0:
        random.bit_generator.state = state
        depths = random.uniform(size=len(facts)).tolist()
        hidden = haystack.hide(stated + min(filling, room), list(zip(facts, depths, strict=True)), random)
        text = haystack.tokenizer.decode(hidden, skip_special_tokens=False) + questions
        tokens = len(haystack.encode(text)) + 1
        if tokens <= length:
            return text, tokens
        room = min(filling, room) - (tokens - length)
    raise DataError(
        f"{length} tokens do not hold {len(facts)} fact(s) and as many questions in this tokenizer's tokens. "
        "Let the shortest documents be longer."
    )


def _facts_that_fit(haystack: Haystack, length: int, random: np.random.Generator) -> tuple[list[Fact], int, int]:
    """One fact or more; the tokens of their statements; the tokens left once each is asked for (one alone may need more
    than there are)."""
    facts = draw_facts(random, int(random.integers(1, _MOST_FACTS + 1)), held_out=False)
    while True:
        stated = sum(len(haystack.encode(fact.statement)) for fact in facts)
        room = length - 1 - stated - sum(len(haystack.encode(_exchange(fact))) for fact in facts)
        if room >= 0 or len(facts) == 1:
            return facts, stated, room
        facts.pop()


def _exchange(fact: Fact) -> str:
    return f"{fact.question}{fact.answer}."
