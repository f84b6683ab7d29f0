"""The mixture-of-experts layer alone against those of transformers, megatron-core and torchtitan, same weights."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aria_train.config import ModelConfig
from aria_train.model.decoder import DecoderLayer
from aria_train.moe.layer import MoELayer
from benchmarks.measure import DTYPES, compare
from benchmarks.peers import aria, transformers_aria
from benchmarks.table import Row

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=512, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64, num_experts=64, top_k=6,
    expert_size=256, num_shared_experts=2, vision=None,
)  # fmt: skip
TOKENS = 4096
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Of the largest output; sums are taken in different orders, and bf16 rounds."""

Layer = Callable[[Tensor], Tensor]
"""[T, H] -> [T, H]"""


def rows(turns: int, ceilings: dict[str, float]) -> list[Row]:
    """Forward and backward. A peer that is not installed is left out, and said to be."""
    found = []
    for name, ceiling in ceilings.items():
        dtype = DTYPES[name]
        model = aria(CONFIG, dtype)
        layer = cast(DecoderLayer, model.layers[0]).moe
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(3)  # so that routing is not a matter of rounding
        x_TH = torch.randn(TOKENS, CONFIG.hidden_size).to(dtype)
        for peer, build in PEERS.items():
            try:
                with quiet():
                    found.append(against(peer, build(model), layer, x_TH, name, turns, ceiling))
            except ImportError as error:
                print(f"  {peer}: left out: {error}", flush=True)
            else:
                print(f"  {name}, {peer}: {found[-1].comparison.ratio:.2f}x", flush=True)
    return found


def against(peer: str, theirs: Layer, layer: MoELayer, x_TH: Tensor, precision: str, turns: int, ceiling: float) -> Row:
    def ours(x_TH: Tensor) -> Tensor:
        return layer(x_TH)[0]

    agree(ours, theirs, x_TH)
    comparison = compare(lambda: step(ours, x_TH), lambda: step(theirs, x_TH), turns)
    share = flops() / comparison.seconds[0] / ceiling
    shape = f"{precision}, {TOKENS} tokens, 64 experts of {CONFIG.expert_size}, top 6, width {CONFIG.hidden_size}"
    return Row("MoE layer", peer, comparison, shape, share)


def step(layer: Layer, x_TH: Tensor) -> None:
    layer(x_TH.detach().requires_grad_()).sum().backward()


@torch.no_grad()
def agree(ours: Layer, theirs: Layer, x_TH: Tensor) -> None:
    """Both sides compute the same thing, but for a token here and there whose routing hangs on a rounding."""
    mine, other = ours(x_TH).float(), theirs(x_TH).float()
    apart = ((mine - other).abs().amax(-1) > TOLERANCE[x_TH.dtype] * mine.abs().max()).float().mean().item()
    assert apart < 0.02, f"{apart:.1%} of the tokens come out different"


def flops() -> float:
    """Forward and backward, by the parameters that a token activates."""
    width, experts = CONFIG.expert_size, CONFIG.top_k + CONFIG.num_shared_experts
    return 6.0 * TOKENS * CONFIG.hidden_size * (3 * width * experts + CONFIG.num_experts)


def from_transformers(model: Any) -> Layer:
    layer = transformers_aria(model).model.layers[0].mlp
    return lambda x_TH: layer(x_TH.unsqueeze(0)).squeeze(0)


def from_megatron(model: Any) -> Layer:
    """SequentialMLP experts, the ones that need no CUDA, with the all-gather dispatcher on one rank."""
    with mock.patch("torch.cuda.current_device", return_value="cpu"):
        import megatron.core.transformer.moe.moe_utils as utils
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        # 0.16.1 reads this name without Transformer Engine, which alone defines it.
        vars(utils).setdefault("te_general_gemm", None)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
        dtype = model.embed.weight.dtype
        config = TransformerConfig(
            num_layers=1,
            hidden_size=CONFIG.hidden_size,
            num_attention_heads=CONFIG.num_heads,
            num_moe_experts=CONFIG.num_experts,
            moe_router_topk=CONFIG.top_k,
            ffn_hidden_size=CONFIG.expert_size,
            moe_ffn_hidden_size=CONFIG.expert_size,
            moe_shared_expert_intermediate_size=CONFIG.num_shared_experts * CONFIG.expert_size,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            use_cpu_initialization=True,
            moe_token_dispatcher_type="allgather",
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        )
        spec = get_moe_module_spec(use_te=False, num_experts=CONFIG.num_experts, moe_grouped_gemm=False)
        layer: nn.Module = build_module(spec, config=config).to(dtype)
    moe = model.layers[0].moe
    weights = {
        "router.weight": moe.router.weight,
        "shared_experts.linear_fc1.weight": torch.cat([moe.shared.gate.weight, moe.shared.up.weight]),
        "shared_experts.linear_fc2.weight": moe.shared.down.weight,
    }
    for index in range(CONFIG.num_experts):
        weights[f"experts.local_experts.{index}.linear_fc1.weight"] = moe.experts.gate_up[index].T
        weights[f"experts.local_experts.{index}.linear_fc2.weight"] = moe.experts.down[index].T
    fill(layer, weights)

    def run(x_TH: Tensor) -> Tensor:
        with mock.patch("torch.cuda.current_device", return_value="cpu"):
            out: Tensor = layer(x_TH.unsqueeze(1))[0]
        return out.squeeze(1)

    return run


def from_torchtitan(model: Any) -> Layer:
    """Its grouped GEMM computes in bf16 whatever comes in; in fp32 its loop over the experts runs.

    What it has for GPUs alone is replaced: histc of integers by bincount, and the Triton kernel that pads rows for the
    GPU's grouped GEMM by nothing.
    """
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("triton", "triton.language")}):
        from torchtitan.models.moe import moe as theirs
    theirs.indices_padding_wrapper = lambda run_experts: run_experts

    dtype = model.embed.weight.dtype
    arguments = theirs.MoEArgs(
        num_experts=CONFIG.num_experts,
        num_shared_experts=CONFIG.num_shared_experts,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
        top_k=CONFIG.top_k,
        use_grouped_mm=dtype == torch.bfloat16,
        load_balance_coeff=None,
    )
    layer = theirs.MoE(arguments, dim=CONFIG.hidden_size, hidden_dim=CONFIG.expert_size).to(dtype)
    layer.tokens_per_expert = layer.tokens_per_expert.float()
    moe = model.layers[0].moe
    gate_EHF, up_EHF = moe.experts.gate_up.chunk(2, dim=-1)
    weights = {
        "router.gate.weight": moe.router.weight,
        "experts.w1": gate_EHF.transpose(1, 2),
        "experts.w2": moe.experts.down.transpose(1, 2),
        "experts.w3": up_EHF.transpose(1, 2),
        "shared_experts.w1.weight": moe.shared.gate.weight,
        "shared_experts.w2.weight": moe.shared.down.weight,
        "shared_experts.w3.weight": moe.shared.up.weight,
    }
    fill(layer, weights)

    def run(x_TH: Tensor) -> Tensor:
        with mock.patch("torch.histc", lambda ids, bins, **_: torch.bincount(ids, minlength=bins)):
            out: Tensor = layer(x_TH.unsqueeze(0)).squeeze(0)
        return out

    return run


PEERS: dict[str, Callable[[Any], Layer]] = {
    "transformers": from_transformers,
    "megatron-core, sequential experts": from_megatron,
    "torchtitan": from_torchtitan,
}


@torch.no_grad()
def fill(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every parameter by name; none may be missing or too many."""
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers have much to say about what they could do on other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
