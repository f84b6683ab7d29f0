"""Needles: hidden where they should be, in haystacks of the asked length, and found exactly when the model says so."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aria_train.batch import MicroBatch
from aria_train.config import NeedleConfig, ParallelConfig
from aria_train.data.text.needles import (
    ADJECTIVES,
    NOUNS,
    Haystack,
    draw_facts,
    training_documents,
    write_training_data,
)
from aria_train.data.text.tokenizer import load_tokenizer
from aria_train.errors import ConfigError, DataError
from aria_train.eval.answers import read_questions, read_samples
from aria_train.eval.needle import Grid, Needles, TextNeedles, VisualNeedles, default_lengths, even_depths, run_needles
from aria_train.eval.probes import grid_of, open_text_needles, open_visual_needles
from aria_train.eval.prompts import Picture, PromptWriter
from aria_train.eval.scoring import deal
from aria_train.model import AriaModel
from aria_train.parallel.mesh import Meshes, build_meshes
from tests.distributed import run_distributed
from tests.eval.small import VOCABULARY, chat_corpus, small_config, small_model, small_tokenizer, text_corpus

FACT = re.compile(r"The key of the (\w+ \w+) is (\d+)\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text corpus, and two corpora of questions about images."""
    home = tmp_path_factory.mktemp("needles")
    tokenizer = small_tokenizer(home)
    text_corpus(home, tokenizer)
    chat_corpus(home, tokenizer, "questions", 6)
    chat_corpus(home, tokenizer, "pictures", 9, seed=100)
    return home


@pytest.fixture(scope="module")
def haystack(folder: Path) -> Haystack:
    return Haystack(folder / "text", folder / "tokenizer")


def alone() -> Meshes:
    """One process without a process group."""
    return Meshes(torch.device("cpu"), 0, 1, *[None] * 3, num_replicas=1, axes=None)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Text needles


def test_names_used_for_evaluation_never_occur_in_training():
    random = np.random.default_rng(0)
    held_out = {fact.name for _ in range(300) for fact in draw_facts(random, 5, held_out=True)}
    trained = {fact.name for _ in range(300) for fact in draw_facts(random, 5, held_out=False)}
    assert not held_out & trained
    assert len(held_out) > 0.1 * len(ADJECTIVES) * len(NOUNS)
    words = [{name.split()[place] for name in held_out} for place in (0, 1)]
    assert words == [{name.split()[place] for name in trained} for place in (0, 1)], "every word is met in training"


def test_facts_of_one_draw_share_no_word():
    for seed in range(20):
        names = [fact.name.split() for fact in draw_facts(np.random.default_rng(seed), 16, held_out=bool(seed % 2))]
        assert all(len(set(column)) == 16 for column in zip(*names))


@pytest.mark.parametrize("length", [130, 200, 333])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_haystack_has_exactly_the_asked_length_and_one_needle(haystack: Haystack, length: int, depth: float):
    prompt = TextNeedles(haystack).write(length, depth, 0)
    assert prompt.num_tokens == length
    text = haystack.tokenizer.decode(prompt.token_ids)
    answer = haystack.tokenizer.decode(prompt.answer).strip()
    ((name, value),) = FACT.findall(text)
    assert value == answer
    assert text.endswith(f"\nThe key of the {name} is")


def test_a_needle_stands_behind_the_last_sentence_that_ends_before_its_depth(haystack: Haystack):
    fact = draw_facts(np.random.default_rng(1), 1, held_out=True)[0]
    statement = haystack.encode(fact.statement)
    for depth in (0.0, 0.1, 0.5, 0.9, 1.0):
        hidden = haystack.hide(300, [(fact, depth)], np.random.default_rng(2))
        assert len(hidden) == 300
        at = next(i for i in range(300) if hidden[i : i + len(statement)] == statement)
        rest = hidden[:at] + hidden[at + len(statement) :]
        wanted = int(len(rest) * depth)
        before = haystack.tokenizer.decode(rest[:at])
        if depth in (0.0, 1.0):
            assert at == wanted
        else:
            assert before.endswith((".", "\n")), f"it must not break a sentence: {before[-20:]!r}"
            skipped = haystack.tokenizer.decode(rest[at:wanted])
            assert "." not in skipped, f"a later sentence ends before the depth: {skipped!r}"


def test_cells_differ_and_a_cell_is_always_the_same(haystack: Haystack):
    needles = TextNeedles(haystack)
    cells = list(itertools.product((150, 200), (0.0, 0.5), (0, 1)))
    prompts = [tuple(needles.write(*cell).token_ids) for cell in cells]
    assert len(set(prompts)) == len(cells)
    assert prompts == [tuple(needles.write(*cell).token_ids) for cell in cells]


def test_a_length_too_short_for_a_needle_is_refused(haystack: Haystack):
    with pytest.raises(ConfigError, match=r"have \d+ tokens, more than a haystack of length 20"):
        TextNeedles(haystack).write(20, 0.5, 0)


def test_the_default_grid_is_the_published_one():
    assert default_lengths(65536) == [1024 * k for k in (1, 2, 4, 8, 16, 32, 48, 64)]
    assert default_lengths(2048) == [128, 256, 512, 1024, 1536, 2048]
    assert [round(100 * depth) for depth in even_depths(11)] == list(range(0, 101, 10))


@pytest.mark.parametrize(
    ("said", "right"),
    [(" 4821", True), (" 4821.\nQuestion", True), ("4821", True), (" 48215", False), (" 482", False), ("", False),
     (" is 4821", False)],
)  # fmt: skip
def test_the_first_number_said_must_be_the_one(haystack: Haystack, said: str, right: bool):
    assert TextNeedles(haystack).is_right(haystack.encode(said), haystack.encode(" 4821")) is right


# ---------------------------------------------------------------------------------------------------------------------
# A model that finds needles by looking them up, in the second half of the text only


class LooksUp(AriaModel):
    """Answers with the value of the fact that the question names, where it stands in the second half."""

    def __init__(self, folder: Path) -> None:
        torch.nn.Module.__init__(self)
        self.config = small_config(folder).model
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.documents: dict[Any, list[list[int]]] = {}

    def target_logits(self, batch: MicroBatch, cache: Any = None) -> Tensor:
        parts = [part.tolist() for part in batch.token_ids.split(batch.starts.diff().tolist())]
        if cache is not None:
            parts = [old + new for old, new in zip(self.documents.get(cache, [[]] * len(parts)), parts)]
            self.documents[cache] = parts
            positions = list(enumerate(len(part) - 1 for part in parts))
        else:
            rows = torch.repeat_interleave(torch.arange(len(parts)), batch.starts.diff())
            offsets = batch.position_ids()
            positions = [(int(rows[at]), int(offsets[at])) for at in batch.target_positions.tolist()]
        logits = torch.zeros(len(positions), VOCABULARY)
        for row, (document, position) in enumerate(positions):
            logits[row, self.next_token(parts[document][: position + 1])] = 1
        return logits

    def next_token(self, ids: list[int]) -> int:
        text = self.tokenizer.decode(ids)
        before, _, asked = text.rpartition("\nThe key of the ")
        facts = {m[1]: m for m in FACT.finditer(before)}
        name, _, so_far = asked.partition(" is")
        found = facts.get(name)
        if found is None or found.start() < len(before) / 2:
            return 2
        whole = self.tokenizer.encode(f" is {found[2]}.", add_special_tokens=False).ids
        done = len(self.tokenizer.encode(f" is{so_far}", add_special_tokens=False).ids)
        return whole[done] if done < len(whole) else 2


@pytest.mark.parametrize("batch_tokens", [1, 500, 10_000])
def test_the_grid_shows_where_needles_are_found(haystack: Haystack, folder: Path, batch_tokens: int):
    grid = Grid([260, 330, 400], [0.0, 0.2, 0.9, 1.0], trials=2)
    result = run_needles(LooksUp(folder), alone(), TextNeedles(haystack), grid, batch_tokens, stop={2})
    assert result.teacher_forced == [[0, 0, 1, 1]] * 3
    assert result.greedy == result.teacher_forced
    assert (result.accuracy, result.cells_found) == (0.5, 0.5)


def test_what_is_found_teacher_forced_is_found_greedily(haystack: Haystack):
    """By induction over the answer's tokens the two scores agree, but for what is said after the answer."""
    model = small_model()
    needles = TextNeedles(haystack)
    prompts = [needles.write(150, depth, 0) for depth in (0.0, 0.5)]
    forced = dataclasses.replace(prompts[0], answer=[])
    from aria_train.eval.generate import answer_batch

    answer = answer_batch(model, [forced], 3)[0]

    class Known(TextNeedles):
        def write(self, length: int, depth: float, trial: int):
            return dataclasses.replace(prompts[int(depth > 0)], answer=answer)

        def is_right(self, said: list[int], expected: list[int]) -> bool:
            return said[: len(expected)] == expected

    result = run_needles(model, alone(), Known(haystack), Grid([150], [0.0, 0.5], 1), 999, stop=())
    assert result.teacher_forced == result.greedy == [[1.0, 0.0]]


def test_a_length_without_positions_is_refused(haystack: Haystack):
    grid = Grid([600], [0.5], 1)
    with pytest.raises(ConfigError, match="beyond model.max_positions 512"):
        run_needles(small_model(), alone(), TextNeedles(haystack), grid, 999)
    with pytest.raises(ConfigError, match="max_positions"):
        grid_of(NeedleConfig(lengths=[600]), small_config(Path("x")))


def test_every_question_is_dealt_once_and_all_ranks_get_as_many_batches():
    random = np.random.default_rng(0)
    for ranks in (1, 2, 3):
        lengths = random.integers(10, 300, 37).tolist()
        rounds = list(deal(lengths, ranks, 400))
        assert all(len(shares) == ranks for shares in rounds)
        batches = [batch for shares in rounds for batch in shares]
        assert sorted(itertools.chain(*batches)) == list(range(37))
        assert all(sum(lengths[number] for number in batch) <= 400 for batch in batches)
    assert list(deal([900], 2, 400)) == [[[0], []]]


# ---------------------------------------------------------------------------------------------------------------------
# Visual needles


@pytest.fixture(scope="module")
def visual(folder: Path) -> VisualNeedles:
    writer = PromptWriter(folder / "tokenizer", small_config(folder).model)
    pictures = [
        Picture(data, place.layout)
        for sample in read_samples(folder / "pictures", writer.model)
        for data, place in zip(sample.images, sample.placements)
    ]
    return VisualNeedles(read_questions(folder / "questions", writer), pictures, writer)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_asked_image_stands_at_its_depth_among_others(visual: VisualNeedles, depth: float):
    prompt = visual.write(200, depth, 0)
    own = {picture.data for question in visual.questions for picture in question.pictures}
    places = [index for index, picture in enumerate(prompt.pictures) if picture.data in own]
    others = len(prompt.pictures) - 1
    assert places == [int(depth * others)]
    assert others > 5
    smallest = min(len(visual.writer.image_ids(picture)) for picture in visual.haystack)
    assert 200 - max(len(visual.writer.image_ids(picture)) for picture in visual.haystack) < prompt.num_tokens <= 200
    assert smallest > 0
    assert prompt.token_ids.count(9) == sum(picture.layout.num_tokens for picture in prompt.pictures)


def test_visual_needles_run_through_the_model(visual: VisualNeedles):
    result = run_needles(small_model(), alone(), visual, Grid([100, 200], even_depths(3), 2), 400, stop={2, 7})
    values = [value for row in result.loss for value in row]
    assert np.isfinite(values).all()
    assert np.shape(result.teacher_forced) == np.shape(result.greedy) == (2, 3)


def test_a_run_finds_its_corpora(folder: Path):
    sources = [{"name": name, "path": str(folder / name)} for name in ("text", "questions", "pictures")]
    data = {"tokenizer": str(folder / "tokenizer"), "validation": sources}
    config = small_config(folder, data=data)
    assert open_text_needles(NeedleConfig(), config).haystack.stretch(50, np.random.default_rng(0)).shape == (50,)
    opened = open_visual_needles(NeedleConfig(questions=str(folder / "questions")), config)
    assert (len(opened.questions), len(opened.haystack)) == (6, 9)
    without = small_config(folder, data={**data, "validation": sources[1:2]})
    with pytest.raises(ConfigError, match="no source of text"):
        open_text_needles(NeedleConfig(), without)
    with pytest.raises(ConfigError, match="no source of images"):
        open_visual_needles(NeedleConfig(questions=str(folder / "questions")), without)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.distributed
def test_ranks_and_experts_on_other_ranks_change_nothing(folder: Path):
    expected = grid_on_rank(str(folder), 1)
    for result in run_distributed(grid_on_rank, 2, str(folder), 2):
        assert result["teacher_forced"] == expected["teacher_forced"]
        assert result["greedy"] == expected["greedy"]
        np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-5)


def grid_on_rank(folder: str, expert_ranks: int) -> dict[str, Any]:
    """A grid of five needles, which two ranks cannot share evenly."""
    from aria_train.model.init import initialise
    from aria_train.parallel.shard import parallelize

    model = small_model()
    meshes = alone()
    if expert_ranks > 1:
        whole = model
        with torch.device("meta"):
            model = AriaModel(whole.config)
        meshes = build_meshes(ParallelConfig(expert_parallel_size=expert_ranks), torch.device("cpu"))
        parallelize(model, meshes, "fp32").to_empty(device="cpu")
        initialise(model, whole.config.init_std, 0)
    needles: Needles = TextNeedles(Haystack(f"{folder}/text", f"{folder}/tokenizer"))
    result = run_needles(model, meshes, needles, Grid([140], even_depths(5), 1), 150, stop={2})
    return result.as_json()


# ---------------------------------------------------------------------------------------------------------------------
# Training data


def test_training_documents_state_facts_then_ask_for_each_while_there_is_room(haystack: Haystack):
    lengths, hidden, most = [], 0, 0
    for text, tokens in training_documents(haystack, 40, 64, 500, seed=3):
        assert len(haystack.encode(text)) + 1 == tokens <= 500
        mentioned = FACT.findall(text)
        facts = dict(mentioned)
        stated, asked = mentioned[: len(facts)], mentioned[len(facts) :]
        assert dict(stated) == facts == dict(asked), "each is stated once, first, and asked for"
        assert set(stated) == set(mentioned), "with one value"
        lengths.append(tokens)
        is_hidden = len(FACT.sub("", text).strip("\n.")) > 0
        hidden += is_hidden
        most = max(most, len(facts))
    assert min(lengths) < 100
    assert max(lengths) > 350
    assert 4 < hidden < 30
    assert most == 3


def test_the_digits_of_a_value_differ():
    random = np.random.default_rng(0)
    values = [fact.value for _ in range(200) for fact in draw_facts(random, 5, held_out=False)]
    assert all(len(set(value)) == len(value) == 4 and value[0] != "0" for value in values)
    assert {value[0] for value in values} == set("123456789")


def test_training_data_is_json_lines_for_data_prepare(haystack: Haystack, folder: Path, tmp_path: Path):
    from aria_train.cli import main
    from aria_train.data.text.indexed import IndexedCorpus

    output = tmp_path / "made" / "needles.jsonl"
    total = write_training_data(output, haystack, 10, 128, 300, seed=1)
    again = tmp_path / "again.jsonl"
    write_training_data(again, haystack, 10, 128, 300, seed=1)
    assert output.read_bytes() == again.read_bytes()
    assert len({json.loads(line)["text"] for line in output.read_text().splitlines()}) == 10
    prepared = tmp_path / "needles"
    assert main(["data", "prepare", str(prepared), str(output), f"--tokenizer={folder / 'tokenizer'}"]) == 0
    corpus = IndexedCorpus(prepared)
    assert (corpus.num_documents, corpus.num_tokens) == (10, total)


def test_the_command_replaces_nothing_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from aria_train.cli import main

    (tmp_path / "notes.jsonl").write_text('{"text": 1, "mine": 2}')
    (tmp_path / "folder").mkdir()

    def needles(name: str, *options: str) -> int:
        made = [str(tmp_path / name), str(folder / "text"), f"--tokenizer={folder / 'tokenizer'}", "--max-tokens=300"]
        return main(["data", "needles", *made, "--documents=2", *options])

    for name in ("notes.jsonl", "folder"):
        assert needles(name) == needles(name, "--overwrite") == 2
        told = capsys.readouterr().err.splitlines()
        assert "exists already" in told[0]
        assert "is no file of documents" in told[1]
    assert (tmp_path / "notes.jsonl").read_text() == '{"text": 1, "mine": 2}'
    assert needles("made.jsonl") == needles("made.jsonl", "--overwrite") == 0
    assert needles("new.jsonl", "--documents=-3") == needles("new.jsonl", "--seed=-1") == 2
    assert "--documents must be 1 or more, and --seed 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl").exists()


def test_documents_too_short_for_a_fact_are_refused(haystack: Haystack, tmp_path: Path):
    with pytest.raises(DataError, match="documents of 50 to 300 tokens"):
        write_training_data(tmp_path / "x.jsonl", haystack, 10, 50, 300)
    assert not list(tmp_path.iterdir())
