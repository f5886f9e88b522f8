"""Folders with blocks of unequal widths, cut by hand from a whole model; nothing of the cutting is prunus' own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STORIES = Path(__file__).parent / "assets" / "stories260k"


def cut(
    dense: Path, out: Path, groups: Sequence[int], neurons: Sequence[int], biases: Mapping[str, float] | None = None
) -> Path:
    """A copy of a Llama-like folder whose block i keeps its first `groups[i]` KV groups and `neurons[i]` neurons.

    Args:
        dense: the whole model, in one file.
        out: the folder to make; config.json stays the dense one.
        groups: KV groups per block.
        neurons: FFN neurons per block.
        biases: module inside a block -> scale of a random bias that it is given (there as in FLAP's compensation).
    """
    config = json.loads((dense / "config.json").read_text())
    size = config["head_dim"]
    each = config["num_attention_heads"] // config["num_key_value_heads"]
    shutil.copytree(dense, out)
    tensors = load_file(dense / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for index, (kept, width) in enumerate(zip(groups, neurons, strict=True)):
        prefix = f"model.layers.{index}"
        rows = {"q_proj": kept * each * size, "k_proj": kept * size, "v_proj": kept * size}
        for name, length in rows.items():
            for part in ("weight", "bias"):
                if (key := f"{prefix}.self_attn.{name}.{part}") in tensors:
                    tensors[key] = tensors[key][:length].clone()
        key = f"{prefix}.self_attn.o_proj.weight"
        tensors[key] = tensors[key][:, : kept * each * size].clone()
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.mlp.{name}.weight"] = tensors[f"{prefix}.mlp.{name}.weight"][:width].clone()
        tensors[f"{prefix}.mlp.down_proj.weight"] = tensors[f"{prefix}.mlp.down_proj.weight"][:, :width].clone()
        for name, scale in (biases or {}).items():
            weight = tensors[f"{prefix}.{name}.weight"]
            tensors[f"{prefix}.{name}.bias"] = scale * torch.randn(len(weight), generator=generator).to(weight.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits_by_hand(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a Llama-like folder in plain loops from its tensors alone, whatever shapes they have; float64."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    t = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    size, eps = config["head_dim"], config["rms_norm_eps"]
    angles = torch.arange(tokens.shape[1])[:, None] * config["rope_parameters"]["rope_theta"] ** (
        -torch.arange(0, size, 2).double() / size
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * t[name]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = size // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    hidden = t["model.embed_tokens.weight"][tokens[0]]
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    each = config["num_attention_heads"] // config["num_key_value_heads"]
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}"
        x = norm(hidden, f"{name}.input_layernorm.weight")
        q, k, v = (linear(x, f"{name}.self_attn.{part}_proj").unflatten(1, (-1, size)) for part in "qkv")
        heads = []
        for head in range(q.shape[1]):
            scores = turn(q[:, head]) @ turn(k[:, head // each]).T / size**0.5
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, head // each])
        hidden = hidden + linear(torch.cat(heads, -1), f"{name}.self_attn.o_proj")
        x = norm(hidden, f"{name}.post_attention_layernorm.weight")
        inner = torch.nn.functional.silu(linear(x, f"{name}.mlp.gate_proj")) * linear(x, f"{name}.mlp.up_proj")
        hidden = hidden + linear(inner, f"{name}.mlp.down_proj")
    return norm(hidden, "model.norm.weight") @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T
