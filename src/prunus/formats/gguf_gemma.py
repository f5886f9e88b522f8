"""What Gemma 3 has in a GGUF file that Llama has not: norms around every part, two kinds of positions, windows."""

from __future__ import annotations

from typing import Any

from prunus.errors import RecipeError
from prunus.shapes.folder import Shapes

# Name inside a block -> name in the file.
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORM_OFFSET = 1.0  # transformers multiplies by 1 + weight, llama.cpp by the weight
LARGEST = 62  # blocks of the 27B model, for which llama.cpp scales queries in another way


def positions(shapes: Shapes, notes: list[str]) -> dict[str, Any]:
    """Windows, rotary angles and the scale of queries.

    Raises:
        RecipeError: the model has some that llama.cpp computes in another way.
    """
    config = shapes.config
    head, depth = shapes.fitter.config.head_dim, config.num_hidden_layers
    scale = config.hidden_size / config.num_attention_heads if depth == LARGEST else head
    if config.query_pre_attn_scalar != scale:
        raise RecipeError(
            f"llama.cpp divides the queries of this model by the root of {scale:g}, and the model by that of "
            f"{config.query_pre_attn_scalar}; --format hf carries it."
        )
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise RecipeError("llama.cpp's gemma3 caps no logits, and this model does; --format hf carries it.")
    whole, local = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    kinds = {whole.get("rope_type", "default"), local.get("rope_type", "default")}
    if local.get("rope_type", "default") != "default" or not kinds <= {"default", "linear"}:
        raise RecipeError(f"Rotary positions of the kind {max(kinds)!r} are not written to GGUF; --format hf does.")
    keys = {
        "{arch}.attention.sliding_window": config.sliding_window,
        "{arch}.attention.sliding_window_pattern": _period([kind != "full_attention" for kind in config.layer_types]),
        "{arch}.rope.freq_base": float(whole["rope_theta"]),
        "{arch}.rope.freq_base_swa": float(local["rope_theta"]),
    }
    if whole.get("rope_type") == "linear":
        keys |= {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": float(whole["factor"])}
    return keys


def _period(windows: list[bool]) -> int:
    """After so many blocks one without a window comes, always again; larger than their number if none does.

    Raises:
        RecipeError: there is no such period, as after blocks were dropped.
    """
    for period in range(1, len(windows) + 2):
        if windows == [place % period < period - 1 for place in range(len(windows))]:
            return period
    whole = [place for place, window in enumerate(windows) if not window]
    raise RecipeError(
        f"llama.cpp's gemma3 wants a block without a window at equal distances, and here they are {whole} of "
        f"{len(windows)}: blocks were dropped between them. --format hf carries the model."
    )
