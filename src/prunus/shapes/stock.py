"""Which class of transformers holds a model of one size throughout, with its biases and without any code."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from prunus.errors import FormatError, ModelError
from prunus.models.skeleton import config_of, skeleton_of
from prunus.shapes.fit import Fitter, Shape
from prunus.shapes.folder import Shapes

# Switches by which configurations give biases to the matrices of a block.
FLAGS = ("attention_bias", "mlp_bias")
# Types of one and the same function, where no sliding window is used: they differ in which biases and which numbers of
# heads they allow. The order is that of preference: Llama is what most tools know.
RELABELS = ("llama", "mistral", "qwen2")
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class Stock:
    """A stock configuration for a model.

    Attributes:
        config: config.json.
        zeros: biases that the class has and the model does not, by the model's names -> shape; zero gives the same.
        relabelled: the type that the model had, if it gets another.
    """

    config: dict[str, Any]
    zeros: Mapping[str, Shape]
    relabelled: str | None


def find_stock(shapes: Shapes, widths: Mapping[str, int]) -> Stock:
    """The stock class that holds all blocks at these widths.

    Args:
        shapes: the model.
        widths: keys of the configuration that hold for all blocks.

    Raises:
        FormatError: none does; the sentence says why, class by class.
    """
    if shapes.ranks:
        raise FormatError(f"no stock class holds a matrix as two factors, and {next(iter(shapes.ranks))} is one")
    reasons = []
    own = shapes.written["model_type"]
    for kind in (own, *(other for other in RELABELS if own in RELABELS and other != own)):
        try:
            return _try(shapes, kind, widths)
        except FormatError as reason:
            reasons.append(f"{kind}: {reason}")
    raise FormatError("; ".join(reasons))


def _try(shapes: Shapes, kind: str, widths: Mapping[str, int]) -> Stock:
    own = shapes.written["model_type"]
    written = _relabelled(shapes, kind) if kind != own else copy.deepcopy(shapes.written)
    sizes = written.setdefault(shapes.part, {}) if shapes.part else written
    sizes |= widths
    head = getattr(shapes.fitter.config, "head_dim", None)
    if any("heads" in key for key in widths) and isinstance(head, int):
        sizes["head_dim"] = head
    needed = {f"{name}.bias" for fit in shapes.fits for name in fit.biases}
    reason = "it has no place for these biases"
    for flags in _flags(sizes, shapes.config if kind == own else AutoConfig.for_model(kind)):
        config = copy.deepcopy(written)
        (config[shapes.part] if shapes.part else config).update(flags)
        try:
            fitter = _fitter(shapes, config)
        except (ModelError, ValueError, TypeError, RuntimeError, StrictDataclassError) as problem:
            reason = " ".join(str(problem).split()).rpartition("Error: ")[2].rstrip(".")[-200:]
            continue
        zeros = _zeros(shapes, fitter, needed)
        if zeros is not None:
            named = {f"{shapes.blocks}.{name}": shape for name, shape in zeros.items()}
            return Stock(config, named, own if kind != own else None)
    raise FormatError(reason)


def _flags(written: Mapping[str, Any], known: PreTrainedConfig) -> Iterator[dict[str, bool]]:
    """Ways to set the switches, fewest first; only those that the configuration's class knows."""
    switches = [flag for flag in FLAGS if hasattr(known, flag) and not written.get(flag)]
    for count in range(len(switches) + 1):
        for chosen in itertools.combinations(switches, count):
            yield dict.fromkeys(chosen, True)


def _fitter(shapes: Shapes, written: Mapping[str, Any]) -> Fitter:
    """Builds blocks of the configuration.

    Raises:
        ValueError: the class refuses the configuration.
    """
    config = config_of(written)
    blocks = skeleton_of(config, shapes.folder).get_submodule(shapes.blocks)
    return Fitter(type(next(blocks.children())), getattr(config, shapes.part) if shapes.part else config)


def _zeros(shapes: Shapes, fitter: Fitter, needed: set[str]) -> dict[str, Shape] | None:
    """Biases to fill with zeros, relative to the list of blocks; None if the class does not hold the model."""
    zeros: dict[str, Shape] = {}
    for index, fit in enumerate(shapes.fits):
        built = fitter.shapes(index, {})
        dense = shapes.fitter.shapes(index, fit.widths)
        have = {*dense, *(f"{name}.bias" for name in fit.biases)}
        more = set(built) - have
        if have - set(built) or any(not name.endswith(".bias") for name in more) or needed - set(built):
            return None
        zeros |= {f"{index}.{name}": built[name] for name in more}
    return zeros


def _relabelled(shapes: Shapes, kind: str) -> dict[str, Any]:
    """config.json under another type of the same function.

    Raises:
        FormatError: the function is not the same.
    """
    written = shapes.written
    config = shapes.config
    window = written.get("sliding_window") is not None and written.get("use_sliding_window", True)
    if window or "sliding_attention" in (written.get("layer_types") or ()):
        raise FormatError("it has no sliding window, which this model uses")
    if written.get("hidden_act", "silu") != "silu":
        raise FormatError("the activation differs")
    target = AutoConfig.for_model(kind)
    kept = {key: value for key, value in written.items() if key not in (*WINDOWS, "model_type", "architectures")}
    kept |= {"model_type": kind, "head_dim": shapes.fitter.config.head_dim}
    kept["num_key_value_heads"] = config.num_key_value_heads
    kept["tie_word_embeddings"] = config.tie_word_embeddings
    kept["rope_parameters"] = config.to_dict()["rope_parameters"]
    if hasattr(target, "sliding_window"):
        kept |= {"sliding_window": None}
    if written["model_type"] == "qwen2" and kind == "llama":
        kept["attention_bias"] = True  # q, k and v always have one there
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return {**kept, "architectures": [names[kind]]}
