"""Names of tensors, ours and published. Every tensor maps one to one: renamed, never fused, split or transposed.

Aria's weights are published under several namings that differ in prefixes and in a few module names. `canonical` turns
any of them into one, the names that transformers' `save_pretrained` writes; the table below maps those to ours.
"""

from __future__ import annotations

import re

_PREFIXES = (
    # ours, published; a name is a prefix and what follows it (".weight", ".bias"), {i} is a layer's number
    ("embed", "language_model.model.embed_tokens"),
    ("norm", "language_model.model.norm"),
    ("head", "language_model.lm_head"),
    ("layers.{i}.attention_norm", "language_model.model.layers.{i}.input_layernorm"),
    ("layers.{i}.attention.q", "language_model.model.layers.{i}.self_attn.q_proj"),
    ("layers.{i}.attention.k", "language_model.model.layers.{i}.self_attn.k_proj"),
    ("layers.{i}.attention.v", "language_model.model.layers.{i}.self_attn.v_proj"),
    ("layers.{i}.attention.o", "language_model.model.layers.{i}.self_attn.o_proj"),
    ("layers.{i}.moe_norm", "language_model.model.layers.{i}.post_attention_layernorm"),
    ("layers.{i}.moe.router", "language_model.model.layers.{i}.mlp.router"),
    ("layers.{i}.moe.experts.gate_up", "language_model.model.layers.{i}.mlp.experts.fc1.weight"),
    ("layers.{i}.moe.experts.down", "language_model.model.layers.{i}.mlp.experts.fc2.weight"),
    ("layers.{i}.moe.shared.gate", "language_model.model.layers.{i}.mlp.shared_experts.gate_proj"),
    ("layers.{i}.moe.shared.up", "language_model.model.layers.{i}.mlp.shared_experts.up_proj"),
    ("layers.{i}.moe.shared.down", "language_model.model.layers.{i}.mlp.shared_experts.down_proj"),
    ("vision.patch_embedding", "vision_tower.embeddings.patch_embedding"),
    ("vision.position_embedding", "vision_tower.embeddings.position_embedding"),
    ("vision.layers.{i}.norm1", "vision_tower.encoder.layers.{i}.layer_norm1"),
    ("vision.layers.{i}.norm2", "vision_tower.encoder.layers.{i}.layer_norm2"),
    ("vision.layers.{i}.attention.q", "vision_tower.encoder.layers.{i}.self_attn.q_proj"),
    ("vision.layers.{i}.attention.k", "vision_tower.encoder.layers.{i}.self_attn.k_proj"),
    ("vision.layers.{i}.attention.v", "vision_tower.encoder.layers.{i}.self_attn.v_proj"),
    ("vision.layers.{i}.attention.out", "vision_tower.encoder.layers.{i}.self_attn.out_proj"),
    ("vision.layers.{i}.mlp.fc1", "vision_tower.encoder.layers.{i}.mlp.fc1"),
    ("vision.layers.{i}.mlp.fc2", "vision_tower.encoder.layers.{i}.mlp.fc2"),
    ("vision.post_norm", "vision_tower.post_layernorm"),
    ("projector.query", "multi_modal_projector.query"),
    ("projector.attention_norm", "multi_modal_projector.cross_attn.layer_norm"),
    ("projector.kv_norm", "multi_modal_projector.cross_attn.layer_norm_kv"),
    ("projector.q", "multi_modal_projector.cross_attn.q_proj"),
    ("projector.k", "multi_modal_projector.cross_attn.k_proj"),
    ("projector.v", "multi_modal_projector.cross_attn.v_proj"),
    ("projector.in_proj_weight", "multi_modal_projector.cross_attn.multihead_attn.in_proj_weight"),
    ("projector.in_proj_bias", "multi_modal_projector.cross_attn.multihead_attn.in_proj_bias"),
    ("projector.out_proj", "multi_modal_projector.cross_attn.multihead_attn.out_proj"),
    ("projector.linear", "multi_modal_projector.cross_attn.linear"),
    ("projector.output_norm", "multi_modal_projector.layer_norm"),
    ("projector.linear_in", "multi_modal_projector.feed_forward.linear_in"),
    ("projector.linear_out", "multi_modal_projector.feed_forward.linear_out"),
)

_PUBLISHED = dict(_PREFIXES)

_CANONICAL = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # transformers 5.x in memory, and what it keeps in memory of an Aria text model alone
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"\.mlp\.experts\.gate_up_proj$", ".mlp.experts.fc1.weight"),
        (r"\.mlp\.experts\.down_proj$", ".mlp.experts.fc2.weight"),
        # the first releases
        (r"^vision_tower\.vision_model\.", "vision_tower."),
        (r"^multi_modal_projector\.ln_ffn\.", "multi_modal_projector.layer_norm."),
        (r"^multi_modal_projector\.ffn\.", "multi_modal_projector.feed_forward."),
        (r"^multi_modal_projector\.cross_attn\.ln_kv\.", "multi_modal_projector.cross_attn.layer_norm_kv."),
    )
)


def published_name(our_name: str) -> str:
    """`layers.3.attention.q.weight` -> `language_model.model.layers.3.self_attn.q_proj.weight`."""
    index = re.search(r"\.(\d+)\.", our_name)
    pattern = our_name if index is None else our_name.replace(index[0], ".{i}.", 1)
    prefix, suffix = (pattern, "") if pattern in _PUBLISHED else pattern.rsplit(".", 1)
    published = _PUBLISHED[prefix] + (f".{suffix}" if suffix else "")
    return published if index is None else published.replace("{i}", index[1])


def canonical(name: str) -> str:
    """Any published name of a tensor -> the one that transformers' `save_pretrained` writes. Others are unchanged."""
    for pattern, replacement in _CANONICAL:
        name = pattern.sub(replacement, name)
    return name


def text_only(canonical_name: str) -> str:
    """The canonical name of a decoder's tensor in a checkpoint of the decoder alone (AriaTextForCausalLM)."""
    return canonical_name.removeprefix("language_model.")
