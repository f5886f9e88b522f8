"""Which tensors and keys a model becomes in a GGUF file, and which models no architecture of llama.cpp carries.

What llama.cpp loads was read in its sources: `llama` takes one size throughout, with all biases; `deci` takes sizes per
block. Both turn neighbouring pairs of rows by the rotary angle, where transformers turns halves, so the rows of q and k
change places. `qwen3`, its mixture and `gemma3` turn halves as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunus.errors import FormatError, RecipeError, near
from prunus.formats import gguf_gemma
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks
from prunus.shapes.fit import BlockFit
from prunus.shapes.folder import Shapes


class Family(NamedTuple):
    """How a model type of transformers is written.

    Attributes:
        uniform: architecture for one size throughout.
        unequal: architecture for sizes per block; None if llama.cpp has none.
        pairs: whether the architecture turns neighbouring rows of q and k.
        experts: pattern of an expert's matrix on disk -> tensor of all experts in the file; empty without experts.
        block: name inside a block -> name in the file.
        activation: the one that llama.cpp computes.
        offset: what it does not add to the weights of norms, and transformers does.
        positions: metadata of positions and windows; notes what gets lost.
    """

    uniform: str
    unequal: str | None
    pairs: bool
    experts: dict[str, str]
    block: dict[str, str]
    activation: str
    offset: float
    positions: Callable[[Shapes, list[str]], dict[str, Any]]


MIXTRAL = {"block_sparse_moe.experts.{}.w1": "ffn_gate_exps", "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
           "block_sparse_moe.experts.{}.w3": "ffn_up_exps"}  # fmt: skip
QWEN = {"mlp.experts.{}.gate_proj": "ffn_gate_exps", "mlp.experts.{}.down_proj": "ffn_down_exps",
        "mlp.experts.{}.up_proj": "ffn_up_exps"}  # fmt: skip
# Name inside a block -> name in the file.
BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}  # fmt: skip
# Biases that an architecture reads; llama.cpp refuses a file with others.
BIASES = {
    "llama": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "deci": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
}


def _plain_positions(shapes: Shapes, notes: list[str]) -> dict[str, Any]:
    """One rotary base for all blocks; a window ends the context."""
    config = shapes.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    keys = {"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"])}
    if window and window < config.max_position_embeddings:
        notes.append(f"The sliding window of {window} tokens has no place in the file; its context ends there instead.")
        keys["{arch}.context_length"] = window
    return keys


def _like_llama(uniform: str, unequal: str | None, pairs: bool, experts: dict[str, str]) -> Family:
    return Family(uniform, unequal, pairs, experts, BLOCK, "silu", 0.0, _plain_positions)


FAMILIES = {
    "llama": _like_llama("llama", "deci", True, {}),
    "mistral": _like_llama("llama", "deci", True, {}),
    "qwen2": _like_llama("llama", "deci", True, {}),
    "mixtral": _like_llama("llama", None, True, MIXTRAL),
    "qwen3": _like_llama("qwen3", None, False, {}),
    "qwen3_moe": _like_llama("qwen3moe", None, False, QWEN),
    "gemma3_text": Family(
        "gemma3", None, False, {}, gguf_gemma.BLOCK, "gelu_pytorch_tanh", gguf_gemma.NORM_OFFSET, gguf_gemma.positions
    ),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name, its shape as PyTorch writes it, and how it is had."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Layout:
    """What a file consists of.

    Attributes:
        arch: llama.cpp's name of the architecture.
        keys: metadata; `{arch}` stands for the architecture.
        tensors: in the order of the file.
        stored: dtype of most weights in the source.
        notes: what the user should know.
    """

    arch: str
    keys: dict[str, Any]
    tensors: list[Entry]
    stored: torch.dtype
    notes: list[str]


def lay_out(shapes: Shapes) -> Layout:
    """Plan the file.

    Raises:
        RecipeError: no architecture carries this model; the sentence says what could.
        FormatError: a tensor has no place in the file.
    """
    kind = str(shapes.written["model_type"])
    if shapes.ranks:
        raise RecipeError(
            f"No architecture of llama.cpp takes a matrix as a product of two, as {next(iter(shapes.ranks))} is here. "
            "--format hf carries it as it is; --format hf --portable multiplies the factors back, and that folder can "
            "be exported to gguf, at the dense model's size."
        )
    if kind not in FAMILIES:
        raise RecipeError(
            f"--format gguf does not know the model type {kind!r}.{near(kind, FAMILIES)} llama.cpp's own converter may "
            "know it if the folder is of a stock class: prunus export MODEL OUT --format hf --portable."
        )
    family = FAMILIES[kind]
    arch = family.uniform if shapes.uniform else family.unequal
    if arch is None:
        varied = sorted({key for fit in shapes.fits for key in fit.widths})
        raise RecipeError(
            f"No architecture of llama.cpp takes a {kind} model whose blocks differ in {', '.join(varied)}. "
            "--format hf carries it as it is, --format hf --portable fills it up to one width, whose folder can then "
            "be exported to gguf; or prune again to equal widths."
        )
    checkpoint = Checkpoint.open(shapes.folder)
    planner = _Planner(shapes, family, arch, checkpoint)
    notes: list[str] = []
    keys = _keys(shapes, family, notes)
    factors = _rope(shapes) if family.positions is _plain_positions else []
    tensors = [*_outside(shapes, checkpoint, family), *factors, *planner.blocks()]
    weight = checkpoint.tensors[shapes.disk["model.embed_tokens.weight"]]
    return Layout(arch, keys, tensors, weight.dtype, notes)


def _keys(shapes: Shapes, family: Family, notes: list[str]) -> dict[str, Any]:
    """The metadata of the architecture.

    Raises:
        RecipeError: the model does something that the architecture does not.
    """
    config = shapes.config
    used = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or family.activation
    if used != family.activation:
        raise RecipeError(f"llama.cpp's {family.uniform} is fixed to {family.activation}, and this model uses {used}.")
    widths = [shapes.fitter.width(fit.widths) for fit in shapes.fits]
    head = shapes.fitter.config.head_dim
    inner = [one.get("moe_intermediate_size", one["intermediate_size"]) for one in widths]
    keys = {
        "{arch}.block_count": len(widths),
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": _one([one["intermediate_size"] for one in widths]),
        "{arch}.attention.head_count": _one([one["num_attention_heads"] for one in widths]),
        "{arch}.attention.head_count_kv": _one([one["num_key_value_heads"] for one in widths]),
        "{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "{arch}.attention.key_length": head,
        "{arch}.attention.value_length": head,
        "{arch}.rope.dimension_count": head,
        "{arch}.vocab_size": config.vocab_size,
        **family.positions(shapes, notes),
    }
    if family.experts:
        count = {one.get("num_local_experts", one.get("num_experts", 0)) for one in widths}
        keys["{arch}.expert_count"] = count.pop()
        keys["{arch}.expert_used_count"] = config.num_experts_per_tok
        keys["{arch}.expert_feed_forward_length"] = inner[0]
        if not getattr(config, "norm_topk_prob", True):
            raise RecipeError(
                "llama.cpp's architecture rescales the chosen experts' weights, which this model does not."
            )
    return keys


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _outside(shapes: Shapes, checkpoint: Checkpoint, family: Family) -> list[Entry]:
    entries = []
    for name, stored in shapes.disk.items():
        if name.startswith(f"{shapes.blocks}."):
            continue
        if name not in OUTSIDE:
            raise FormatError(f"{name} has no place in a GGUF file of this architecture; nothing was written.")
        if name == "lm_head.weight" and shapes.config.tie_word_embeddings:
            continue
        offset = family.offset if "norm" in name else 0.0
        read = partial(_read, checkpoint, [stored], offset=offset)
        entries.append(Entry(OUTSIDE[name], checkpoint.tensors[stored].shape, read))
    return entries


def _rope(shapes: Shapes) -> list[Entry]:
    """Factors by which rotary frequencies differ from the plain ones, if they do.

    Raises:
        RecipeError: they change with the length of the text, or queries are rescaled.
    """
    part: Any = next(module for module in shapes.model.modules() if hasattr(module, "inv_freq"))
    kind = shapes.config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or getattr(part, "attention_scaling", 1.0) != 1.0:
        raise RecipeError(
            f"Rotary positions of the kind {kind!r} are not written to GGUF yet; --format hf carries them."
        )
    size = 2 * len(part.inv_freq)
    plain = shapes.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
    factors = plain / part.inv_freq.float()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4):
        return []
    return [Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors)]


class _Planner:
    """Finds the tensors of all blocks."""

    def __init__(self, shapes: Shapes, family: Family, arch: str, checkpoint: Checkpoint):
        """Bind the parts."""
        self.shapes = shapes
        self.family = family
        self.arch = arch
        self.checkpoint = checkpoint

    def blocks(self) -> list[Entry]:
        """The tensors of all blocks, in order."""
        entries = []
        for block, fit in zip(find_blocks(self.shapes.model), self.shapes.fits, strict=True):
            entries += self._block(block.name, block.index, fit)
        return entries

    def _block(self, name: str, index: int, fit: BlockFit) -> list[Entry]:
        prefix = f"{name}."
        stored = [disk for disk in self.checkpoint.tensors if disk.startswith(prefix)]
        entries = self._experts(prefix, index, stored) if self.family.experts else []
        widths = self.shapes.fitter.width(fit.widths)
        heads = {"attn_q": widths["num_attention_heads"], "attn_k": widths["num_key_value_heads"]}
        for disk in stored:
            if ".experts." in disk:
                continue
            module, _, last = disk.removeprefix(prefix).rpartition(".")
            part = self.family.block.get(module)
            known = part and (last == "weight" or part in BIASES.get(self.arch, ()))
            if not known or (self.family.experts and last == "bias"):
                raise RecipeError(
                    f"llama.cpp's architecture {self.arch} has no place for {disk} and would drop it. --format hf "
                    "carries it; a bias goes away if the model is pruned without bias compensation."
                )
            turn = heads.get(str(part)) if self.family.pairs else None
            offset = self.family.offset if "norm" in str(part) else 0.0
            read = partial(_read, self.checkpoint, [disk], turn, offset)
            entries.append(Entry(f"blk.{index}.{part}.{last}", self.checkpoint.tensors[disk].shape, read))
        return entries

    def _experts(self, prefix: str, index: int, stored: list[str]) -> list[Entry]:
        entries = []
        for pattern, part in self.family.experts.items():
            names = [f"{prefix}{pattern.format(number)}.weight" for number in range(len(stored))]
            names = [name for name in names if name in self.checkpoint.tensors]
            if not names:
                raise RecipeError(f"{prefix}: a block without experts in a mixture cannot be written to GGUF yet.")
            shape = (len(names), *self.checkpoint.tensors[names[0]].shape)
            entries.append(Entry(f"blk.{index}.{part}.weight", shape, partial(_read, self.checkpoint, names)))
        return entries


def _read(checkpoint: Checkpoint, names: list[str], turn: int | None = None, offset: float = 0.0) -> Tensor:
    """A tensor, or those of all experts stacked; `turn` heads have their rows put in pairs; `offset` is added."""
    values = [value for _, value in checkpoint.read(names)]
    value = values[0] if len(values) == 1 and ".experts." not in names[0] else torch.stack(values)
    value = value.float() + offset if offset else value
    return paired(value, turn) if turn else value


def paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, `[heads · size, …]`: within a head, row i and row i + size/2 become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
