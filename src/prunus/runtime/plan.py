"""What a transformers model of the Llama kind consists of, read from its configuration and its module tree.

The modules are built without weights. Numbers come from their attributes, or from running a module on a few inputs (the
kind of activation, the offset in a norm), never from the model's name. `probe.py` then checks a small model of the
same configuration against transformers, so what is misread here is refused and not computed wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunus.errors import ModelError
from prunus.models.quiet import quiet

# Their numbers are those of `enum Activation` in csrc/kernels.h.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    lambda x: functional.gelu(x, approximate="tanh"),
    functional.gelu,
    functional.relu,
    lambda x: functional.relu(x).square(),
)
PROJECTIONS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
# Rotary frequencies that depend on the length of the text cannot be put into one table.
CHANGING = ("dynamic", "longrope")


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x / sqrt(mean(x²) + eps) * (offset + weight).

    Attributes:
        name: of its weight.
        eps: added to the mean square.
        offset: added to the weight.
    """

    name: str
    eps: float
    offset: float


@dataclass(frozen=True)
class Block:
    """One transformer layer.

    Attributes:
        matrices: full names of the modules, by the keys of `PROJECTIONS`.
        norms: by the names of `native.NORMS`; absent ones are left out.
        head_dim: of queries, keys and values.
        scale: queries times keys are multiplied by it.
        softcap: of attention scores; 0 = none.
        window: positions that a token sees, itself included; 0 = all.
        rotary: which table of `Architecture.rotary`.
        activation: index into `ACTIVATIONS`.
    """

    matrices: dict[str, str]
    norms: dict[str, Norm]
    head_dim: int
    scale: float
    softcap: float
    window: int
    rotary: str
    activation: int


@dataclass(frozen=True)
class Architecture:
    """All that the engine must know beside the weights.

    Attributes:
        blocks: in order.
        norm: of the last hidden state.
        embedding: name of the embedding module.
        size: its rows, the vocabulary, and its columns, the width of hidden states.
        head: name of the head's module; the embedding's if they share the weight.
        embedding_scale: what embeddings are multiplied by.
        logit_softcap: 0 = none.
        longest: positions that the model was made for.
        rotary: cosine and sine tables as functions of the number of positions: float32 [positions, rotated dims].
    """

    blocks: list[Block]
    norm: Norm
    embedding: str
    size: tuple[int, int]
    head: str
    embedding_scale: float
    logit_softcap: float
    longest: int
    rotary: dict[str, Callable[[int], tuple[Tensor, Tensor]]]


class NotCovered(ModelError):
    """The engine cannot run this architecture; the message says why."""


def read(config: PreTrainedConfig) -> Architecture:
    """The architecture that a configuration describes.

    Raises:
        NotCovered: it has a part that the engine lacks.
    """
    model = _build(config)
    body, layers = _body(model)
    where = {id(module): name for name, module in model.named_modules()}
    text = config.get_text_config()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise NotCovered(f"{type(model).__name__} has no linear head.")
    embedding = model.get_input_embeddings()
    return Architecture(
        blocks=[_block(text, layer, where[id(layer)], index) for index, layer in enumerate(layers)],
        norm=_norm(body.norm, where[id(body.norm)], "the last norm"),
        embedding=where[id(embedding)],
        size=tuple(embedding.weight.shape),  # type: ignore[union-attr,arg-type]
        head=where[id(embedding if _tied(model) else head)],
        embedding_scale=_embedding_scale(embedding),
        logit_softcap=float(getattr(text, "final_logit_softcapping", None) or 0),
        longest=int(text.max_position_embeddings),
        rotary=_rotary(body.rotary_emb, text),
    )


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with quiet(), init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as problem:  # any: what a configuration says is taken at its word until something falls over it
        raise NotCovered(f"transformers cannot build it: {str(problem)[:200]}") from None
    return model.eval()


def _body(model: PreTrainedModel) -> tuple[Any, Any]:
    """The part with the layers, and the layers, of a model that has the parts of a Llama and no others."""
    body: Any = model.base_model
    body = getattr(body, "language_model", body)
    wanted = {"embed_tokens", "layers", "norm", "rotary_emb"}
    found = {name for name, _ in body.named_children()}
    if found != wanted:
        odd = ", ".join(sorted(found ^ wanted))
        raise NotCovered(f"{type(body).__name__} is not built like a Llama (it differs in: {odd}).")
    return body, body.layers


def _tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _embedding_scale(embedding: nn.Module) -> float:
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(scale)


def _block(config: PreTrainedConfig, layer: Any, name: str, index: int) -> Block:
    """One layer.

    Raises:
        NotCovered: it has other parts than attention, a gated MLP and norms around them.
    """
    known = {"self_attn", "mlp", *_norm_names(layer)}
    odd = sorted({part for part, _ in layer.named_children()} - known)
    if odd or not hasattr(layer, "self_attn") or not hasattr(layer, "mlp"):
        raise NotCovered(
            f"{name} ({type(layer).__name__}) has parts that the engine lacks: {', '.join(odd) or 'none'}."
        )
    attention, mlp = layer.self_attn, layer.mlp
    _only(attention, name, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
    _only(mlp, name, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    norms = {
        ours: _norm(getattr(layer, theirs), f"{name}.{theirs}", name) for theirs, ours in _norm_names(layer).items()
    }
    for part in ("q_norm", "k_norm"):
        if getattr(attention, part, None) is not None:
            norms[part] = _norm(getattr(attention, part), f"{name}.self_attn.{part}", name)
    if {"attention_norm", "mlp_norm"} - norms.keys():
        raise NotCovered(f"{name} has no norm before its attention or its MLP.")
    kind = (getattr(config, "layer_types", None) or {index: ""})[index] or _only_kind(config)
    return Block(
        matrices={ours: f"{name}.{theirs}" for ours, theirs in PROJECTIONS.items()},
        norms=norms,
        head_dim=int(attention.head_dim),
        scale=float(attention.scaling),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
        window=int(config.sliding_window) if kind == "sliding_attention" else 0,
        rotary=kind if hasattr(attention, "layer_type") and _per_kind(config) else "",
        activation=_activation(mlp.act_fn, name),
    )


def _only(module: Any, name: str, known: set[str]) -> None:
    odd = sorted({part for part, _ in module.named_children()} - known)
    missing = sorted(part for part in known if part.endswith(("_proj", "act_fn")) and not hasattr(module, part))
    if odd or missing:
        parts = ", ".join(odd + missing)
        raise NotCovered(f"{name} ({type(module).__name__}) is not built like a Llama's (it differs in: {parts}).")


def _norm_names(layer: Any) -> dict[str, str]:
    """Which norm does what. With a norm before the MLP, the one after attention is of attention's own output."""
    names = {"input_layernorm": "attention_norm"}
    if hasattr(layer, "pre_feedforward_layernorm"):
        names["post_attention_layernorm"] = "post_attention_norm"
        names["pre_feedforward_layernorm"] = "mlp_norm"
        names["post_feedforward_layernorm"] = "post_mlp_norm"
    else:
        names["post_attention_layernorm"] = "mlp_norm"
    return {theirs: ours for theirs, ours in names.items() if hasattr(layer, theirs)}


def _only_kind(config: PreTrainedConfig) -> str:
    """Where layers are not told apart, a window holds for all of them, unless the model can switch it off."""
    used = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return "sliding_attention" if used else "full_attention"


def _per_kind(config: PreTrainedConfig) -> bool:
    """Rotary parameters are given for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return bool(parameters) and all(isinstance(value, dict) or value is None for value in parameters.values())


def _norm(module: Any, name: str, where: str) -> Norm:
    """A norm, its epsilon from its attributes and its offset from what it does with weights of zero."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if eps is None or not isinstance(weight, Tensor) or getattr(module, "bias", None) is not None:
        raise NotCovered(f"{where}: {type(module).__name__} is not an RMS norm.")
    x = torch.linspace(-1, 2, weight.shape[0])
    plain = x * torch.rsqrt(x.square().mean() + eps)
    none, one = (torch.func.functional_call(module, {"weight": value}, (x,)) for value in (x * 0, x * 0 + 1))
    offset = float((none / plain)[-1])
    if not (torch.allclose(none, plain * offset) and torch.allclose(one, plain * (1 + offset))):
        raise NotCovered(f"{where}: {type(module).__name__} is not an RMS norm.")
    return Norm(f"{name}.weight", float(eps), round(offset, 6))


def _activation(function: Callable[[Tensor], Tensor], where: str) -> int:
    """Which of `ACTIVATIONS` gives the same numbers."""
    x = torch.linspace(-6, 6, 97)
    for index, known in enumerate(ACTIVATIONS):
        if torch.allclose(function(x), known(x), atol=1e-6):
            return index
    raise NotCovered(f"{where}: the engine lacks the activation {type(function).__name__}.")


def _rotary(module: Any, config: PreTrainedConfig) -> dict[str, Callable[[int], tuple[Tensor, Tensor]]]:
    """Tables that ask the model's own rotary module, one for each kind of layer if it tells them apart.

    Raises:
        NotCovered: the frequencies depend on the length of the text.
    """
    types = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for kind in types.values():
        if kind in CHANGING:
            raise NotCovered(f"Its rotary embedding ({kind}) changes with the length of the text.")

    def table(kind: str) -> Callable[[int], tuple[Tensor, Tensor]]:
        def make(positions: int) -> tuple[Tensor, Tensor]:
            numbers = torch.arange(positions).unsqueeze(0)
            with torch.no_grad():
                found = module(torch.zeros(1), numbers, *([kind] if kind else []))
            cos, sin = (part[0].float().contiguous() for part in found)
            return cos, sin

        return make

    return {kind: table(kind) for kind in types}
