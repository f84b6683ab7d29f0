"""Generation with a key-value cache says what the model says without one, whatever else is packed beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from aria_train.data.multimodal import images
from aria_train.eval.generate import answer_batch, choose, generate, next_tokens, opening
from aria_train.eval.prompts import Picture, Prompt, pack_prompts
from aria_train.eval.terminal import decode_stream
from aria_train.model import AriaModel
from aria_train.model.cache import Cache
from tests.distributed import run_distributed
from tests.eval.small import picture, random_ids, small_model, small_tokenizer

IMAGE = 9


def prompt_of(model: AriaModel, before: int, behind: int, *pictures: bytes, seed: int = 0) -> Prompt:
    """Random text, images, random text."""
    ids, placed = random_ids(before, seed), []
    for data in pictures:
        layout = images.layout_of(*images.read_size(data), model.config.vision)
        ids += [39, *[IMAGE] * layout.num_tokens, 41]
        placed.append(Picture(data, layout))
    return Prompt(ids + random_ids(behind, seed + 1), placed)


def some_prompts(model: AriaModel) -> list[Prompt]:
    return [
        prompt_of(model, 5, 0, seed=1),
        prompt_of(model, 3, 9, picture(20, 30, 1), seed=2),
        prompt_of(model, 1, 0, seed=3),
        prompt_of(model, 0, 2, picture(8, 8, 2), picture(60, 10, 3), seed=4),
        prompt_of(model, 40, 0, seed=5),
    ]


@torch.no_grad()
def without_cache(model: AriaModel, prompt: Prompt, count: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest continuation, the whole document computed anew for every token, and each step's logits."""
    tokens: list[int] = []
    rows = []
    for _ in range(count):
        longer = dataclasses.replace(prompt, token_ids=prompt.token_ids + tokens)
        rows.append(model.target_logits(opening([longer], model))[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def test_the_cache_changes_no_token_with_and_without_images():
    model = small_model()
    for prompt in some_prompts(model):
        expected, _ = without_cache(model, prompt, 24)
        assert list(generate(model, prompt, max_new_tokens=24)) == expected


@torch.no_grad()
def test_the_cache_changes_no_logit():
    model = small_model()
    for prompt in some_prompts(model):
        tokens, expected = without_cache(model, prompt, 12)
        cache, batch = Cache(1), opening([prompt], model)
        rows = []
        for token in tokens:
            rows.append(model.target_logits(batch, cache)[0])
            batch = next_tokens(torch.tensor([token]))
        torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-4, atol=1e-5)


def test_answers_of_many_prompts_at_once_are_those_of_each_alone():
    model = small_model()
    prompts = some_prompts(model)
    alone = [list(generate(model, prompt, max_new_tokens=20)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts), "the prompts must lead to different answers"
    assert answer_batch(model, prompts, 20) == alone
    assert answer_batch(model, prompts[::-1], 20) == alone[::-1]


@torch.no_grad()
def test_documents_packed_around_a_prompt_change_nothing():
    model = small_model()
    prompts = [dataclasses.replace(prompt, answer=random_ids(4, 9)) for prompt in some_prompts(model)]
    alone = [model.target_logits(pack_prompts([prompt], model.config.vision)) for prompt in prompts]
    packed = model.target_logits(pack_prompts(prompts, model.config.vision))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_stop_token_ends_an_answer_but_not_its_neighbours():
    model = small_model()
    prompts = some_prompts(model)
    whole = answer_batch(model, prompts, 12)
    stop = whole[1][3]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
    assert answer_batch(model, prompts, 12, stop={stop}) == expected
    assert list(generate(model, prompts[1], max_new_tokens=12, stop={stop})) == [*expected[1], stop]


def test_nothing_is_generated_beyond_the_last_position():
    model = small_model(max_positions=48)
    long, short = prompt_of(model, 45, 0), prompt_of(model, 4, 0)
    assert len(list(generate(model, long, max_new_tokens=10))) == 3
    assert [len(answer) for answer in answer_batch(model, [long, short], 10)] == [3, 10]


def test_no_prompts_have_no_answers():
    assert answer_batch(small_model(), [], 5) == []


def test_a_seed_fixes_the_sample_and_top_p_shuts_out_the_unlikely():
    model = small_model()
    prompt = some_prompts(model)[1]
    sampled = [list(generate(model, prompt, 20, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = list(generate(model, prompt, 20))
    assert list(generate(model, prompt, 20, temperature=1.5, top_p=1e-9)) == greedy
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    assert {int(choose(logits, 1.0, 0.7, generator)) for _ in range(200)} == {1, 2}
    assert {int(choose(logits, 1.0, 1.0, generator)) for _ in range(200)} == {0, 1, 2, 3}
    assert {int(choose(logits, 1e-320, 1.0, generator)) for _ in range(20)} == {1}, "next to no temperature"


def test_characters_of_several_tokens_are_shown_whole(tmp_path: Path):
    from aria_train.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(small_tokenizer(tmp_path))
    text = "a fox: 狐 🦊!"
    pieces = list(decode_stream(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = tokenizer.encode("狐", add_special_tokens=False).ids[:-1]
    assert "".join(decode_stream(tokenizer, cut)), "what ends amid a character is shown as it is"


@pytest.mark.distributed
def test_experts_on_other_ranks_change_no_answer():
    model = small_model()
    prompts = some_prompts(model)
    expected = answer_batch(model, prompts, 10)
    spread = run_distributed(answer_on_rank, 2)
    assert spread[0][0] + spread[1][0] == expected
    assert spread[0][1] == spread[1][1] == list(generate(model, prompts[1], 10))


def answer_on_rank() -> tuple[list[list[int]], list[int]]:
    """Rank 0 answers the first two prompts, rank 1 the rest; both continue the second together."""
    import torch.distributed as dist

    from aria_train.config import ParallelConfig
    from aria_train.model.init import initialise
    from aria_train.parallel.mesh import build_meshes
    from aria_train.parallel.shard import parallelize

    whole = small_model()
    with torch.device("meta"):
        model = AriaModel(whole.config)
    meshes = build_meshes(ParallelConfig(expert_parallel_size=2), torch.device("cpu"))
    parallelize(model, meshes, "fp32").to_empty(device="cpu")
    initialise(model, whole.config.init_std, 0)
    prompts = some_prompts(model)
    mine = prompts[:2] if dist.get_rank() == 0 else prompts[2:]
    return answer_batch(model, mine, 10), list(generate(model, prompts[1], 10))
