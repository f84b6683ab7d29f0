"""The decoder against a plain computation; documents that do not see each other; batches without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aria_train.batch import IGNORE_LABEL, MicroBatch
from aria_train.config import ModelConfig
from aria_train.eval.loss import empty_batch
from aria_train.model import AriaModel
from aria_train.model.attention import document_attention
from aria_train.model.rope import apply_rope, rope_tables
from tests.reference import forward_document
from tests.tiny import MODEL, VOCABULARY


def model_config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, **changes})


@pytest.fixture(scope="module")
def model() -> AriaModel:
    return AriaModel(model_config())


def document(length: int, seed: int, low: int = 0, high: int = VOCABULARY) -> Tensor:
    return torch.randint(low, high, (length,), generator=torch.Generator().manual_seed(seed))


def pack(documents: Sequence[Tensor], masked: Sequence[int] = ()) -> MicroBatch:
    """Every document predicts its next token; its last position, and the positions `masked`, predict nothing."""
    tokens = torch.cat(list(documents))
    labels = torch.cat([torch.cat([d[1:], torch.tensor([IGNORE_LABEL])]) for d in documents])
    labels[list(masked)] = IGNORE_LABEL
    starts = torch.tensor([0, *itertools.accumulate(len(d) for d in documents)], dtype=torch.int32)
    return MicroBatch(tokens, labels, starts, max(len(d) for d in documents), torch.zeros(len(documents)).long())


LENGTHS = (7, 1, 12, 2, 9)
DOCUMENTS = [document(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 4}, {"num_kv_heads": 1, "num_shared_experts": 0}, {"num_shared_experts": 3, "top_k": 8}],
    ids=["grouped heads", "a key head per head", "one key head, no shared expert", "three shared experts, all chosen"],
)
def test_losses_and_gradients_equal_the_plain_computation(changes: dict[str, object]) -> None:
    config = model_config(**changes)
    model = AriaModel(config)
    batch = pack(DOCUMENTS, masked=(3, 4, 15))
    output = model(batch)
    (output.loss_sum + 0.1 * output.router.z_sum.sum() + output.router.prob_sums[:, 0].sum()).backward()

    weights = {name: w.detach().double().requires_grad_() for name, w in model.named_parameters()}
    losses, objective = [], torch.zeros((), dtype=torch.float64)
    for tokens, labels in zip(DOCUMENTS, batch.labels.split(LENGTHS), strict=True):
        scores, routers = forward_document(weights, tokens, config)
        losses += [-scores[at].log_softmax(-1)[label] for at, label in enumerate(labels.tolist()) if label >= 0]
        for logits in routers:
            objective = objective + 0.1 * (logits.logsumexp(-1) ** 2).sum() + logits.softmax(-1)[:, 0].sum()
    plain = torch.stack(losses)
    (objective + plain.sum()).backward()

    torch.testing.assert_close(output.token_losses.double(), plain.detach(), rtol=1e-5, atol=1e-6)
    assert output.loss_sum.item() == pytest.approx(plain.sum().item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None
        assert wanted is not None
        assert (parameter.grad - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


def test_logits_equal_the_plain_computation(model: AriaModel) -> None:
    rows = torch.stack([document(11, 20), document(11, 21)])
    logits = model.logits(rows)
    assert logits.shape == (2, 11, VOCABULARY)
    assert logits.dtype == torch.float32
    weights = {name: w.detach().double() for name, w in model.named_parameters()}
    for row, found in zip(rows, logits, strict=True):
        wanted, _ = forward_document(weights, row, model.config)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_document_changes_nothing_in_another(changed: int, model: AriaModel) -> None:
    others = [*DOCUMENTS[:changed], document(LENGTHS[changed], 99), *DOCUMENTS[changed + 1 :]]
    before, _ = model.hidden_states(pack(DOCUMENTS))
    after, _ = model.hidden_states(pack(others))
    for index, (a, b) in enumerate(zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)):
        if index == changed:
            assert (a - b).abs().max() > 0.1
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_no_gradient_flows_from_one_document_to_another(model: AriaModel) -> None:
    """Each document has token ids of its own, so rows of the embedding's gradient tell who influenced whom."""
    documents = [document(length, n, low=n * 15, high=(n + 1) * 15) for n, length in enumerate(LENGTHS)]
    hidden, _ = model.hidden_states(pack(documents))
    for index, part in enumerate(hidden.split(LENGTHS)):
        (gradient,) = torch.autograd.grad(part.square().sum(), model.embed.weight, retain_graph=True)
        for other, rows in enumerate(gradient[: 15 * len(LENGTHS)].split(15)):
            # Exactly zero, not nearly.
            assert rows.any() == (other == index), (index, other)


def test_a_position_sees_itself_and_what_comes_before(model: AriaModel) -> None:
    tokens = document(9, 5)
    hidden, _ = model.hidden_states(pack([tokens]))
    changed = tokens.clone()
    changed[6] = (changed[6] + 1) % VOCABULARY
    after, _ = model.hidden_states(pack([changed]))
    torch.testing.assert_close(hidden[:6], after[:6], rtol=0, atol=2e-6)
    assert ((hidden - after).abs().amax(1)[6:] > 1e-4).all()


def test_documents_give_the_same_losses_packed_or_alone(model: AriaModel) -> None:
    whole = model(pack(DOCUMENTS))
    alone = [model(pack([d])) for d in DOCUMENTS]
    torch.testing.assert_close(whole.token_losses, torch.cat([o.token_losses for o in alone]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.router.counts, sum(o.router.counts for o in alone))
    torch.testing.assert_close(whole.router.prob_sums, sum(o.router.prob_sums for o in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_packed_documents(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 6]
    q = torch.randn(10, 4, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(10, 2, 8, generator=generator, requires_grad=True) for _ in range(2))
    out = document_attention(q, k, v, torch.tensor([0, 3, 4, 10], dtype=torch.int32), 6, causal)
    which = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    visible = which[:, None] == which
    if causal:
        visible &= torch.ones(10, 10, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 8**0.5
    shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, wanted)
    way = torch.randn(out.shape, generator=generator)
    found, expected = (torch.autograd.grad((x * way).sum(), (q, k, v)) for x in (out, wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def test_rotation_depends_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 16, generator=generator)

    def score(at_q: int, at_k: int) -> float:
        (q_turned, k_turned) = (
            apply_rope(x, *rope_tables(torch.tensor([at]), 16, 10_000.0)) for x, at in ((q, at_q), (k, at_k))
        )
        return float((q_turned * k_turned).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-3)


def test_a_larger_base_turns_more_slowly() -> None:
    for base in (100_000.0, 5_000_000.0):
        cos, sin = rope_tables(torch.tensor([0, 1, 1000]), 128, base)
        assert cos.shape == sin.shape == (3, 64)
        assert (cos[0] == 1).all()
        assert cos[1, 0].item() == pytest.approx(torch.tensor(1.0).cos().item())
        slowest = 1000 * base ** (-126 / 128)
        assert sin[2, -1].item() == pytest.approx(torch.tensor(slowest, dtype=torch.float64).sin().item(), rel=1e-4)


def test_positions_count_from_zero_in_every_document() -> None:
    assert pack([document(3, 0), document(1, 1), document(2, 2)]).position_ids().tolist() == [0, 1, 2, 0, 0, 1]


def test_the_base_of_the_configuration_is_used() -> None:
    batch = pack([document(12, 4)])
    small, large = (AriaModel(model_config(rope_base=base)) for base in (10.0, 1e6))
    assert not torch.allclose(small(batch).token_losses, large(batch).token_losses, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# No padding


def test_every_position_is_a_token(model: AriaModel) -> None:
    """What enters the layers is as long as the documents together, whatever the window: nothing is padded."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for layer in model.layers]
    output = model(pack(DOCUMENTS))
    for hook in hooks:
        hook.remove()
    assert seen == [sum(LENGTHS)] * model.config.num_layers
    assert output.router.counts.sum(1).tolist() == [sum(LENGTHS) * model.config.top_k] * model.config.num_layers
    assert len(output.token_losses) == sum(LENGTHS) - len(LENGTHS)


def test_masked_positions_are_not_targets_and_are_still_routed(model: AriaModel) -> None:
    everything, masked = model(pack(DOCUMENTS)), model(pack(DOCUMENTS, masked=range(7)))
    torch.testing.assert_close(masked.token_losses, everything.token_losses[6:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.router.counts, everything.router.counts)


def test_a_batch_without_targets_and_one_without_tokens(model: AriaModel) -> None:
    silent = model(pack(DOCUMENTS, masked=range(sum(LENGTHS))))
    empty = model(empty_batch())
    for output in (silent, empty):
        assert output.loss_sum.item() == 0
        assert output.token_losses.numel() == 0
        output.loss_sum.backward()
    assert empty.router.counts.sum() == 0
    assert empty.router.z_sum.sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Recomputation


def test_recomputation_changes_memory_and_nothing_else() -> None:
    batch = pack(DOCUMENTS)
    model = AriaModel(model_config())
    kept: dict[str, int] = {}
    results: dict[str, list[Tensor]] = {}
    for recompute in ("none", "selective", "full"):
        model.zero_grad()
        model.set_recompute(recompute)  # type: ignore[arg-type]
        size = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(batch)
        kept[recompute] = size
        (output.loss_sum + output.router.z_sum.sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results[recompute] = [output.loss_sum.detach(), output.router.counts, *gradients]
    for recompute in ("selective", "full"):
        for found, wanted in zip(results[recompute], results["none"], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert kept["full"] < kept["none"] / 3
