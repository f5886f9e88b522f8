"""Does the engine understand an architecture? A small random model of the same configuration, run by both, tells."""

from __future__ import annotations

import copy
import functools
import json

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunus.errors import PrunusError
from prunus.models.quiet import quiet
from prunus.runtime import plan
from prunus.runtime.native import open_native
from prunus.runtime.plan import NotCovered

TOKENS = 24
BEGUN = 3  # of them, read as a prompt before single steps
VOCABULARY = 160
WINDOW = 7  # shorter than the text, so that windows are tried
TOLERANCE = 1e-4  # of the largest logit; both are float32


def check(config: PreTrainedConfig) -> None:
    """See that the engine computes what transformers does.

    Raises:
        NotCovered: it does not, or the architecture has a part that the engine lacks.
    """
    problem = _probe(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))
    if problem:
        raise NotCovered(problem)


@functools.cache
def _probe(kind: type[PreTrainedConfig], text: str) -> str:
    """What is wrong; empty if nothing is. The text is that of the configuration."""
    from prunus.runtime.engine import Engine

    config = kind.from_dict(json.loads(text)).get_text_config()
    try:
        plan.read(config)
        model = _small(config)
        ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits[0]
        engine = Engine(model.config, dict(model.state_dict()), native=open_native("", 1), context=TOKENS, verify=False)
        ours = {"a prompt": engine.prefill(ids, every=True)}
        # One by one, behind a short prompt: other kernels, and windows that move with every token.
        engine.reset()
        first = engine.prefill(ids[:, :BEGUN], every=True)
        ours["single tokens"] = torch.cat([first, *(engine.step(token)[None] for token in ids[0, BEGUN:].tolist())])
    except PrunusError as problem:  # also what the library finds wrong with its matrices: then they are built otherwise
        return str(problem)
    except Exception as problem:  # any: modules are taken at their word until something falls over them
        return f"A small model of its configuration cannot be tried ({type(problem).__name__}: {str(problem)[:200]})."
    for what, logits in ours.items():
        error = float((logits - theirs).abs().max() / theirs.abs().max())
        if not error < TOLERANCE:
            return (
                f"The engine computes other logits than transformers for {config.model_type} (off by {error:.1%}, "
                f"reading {what})."
            )
    return ""


def _small(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture with few layers (one of each kind), a small vocabulary, short windows and random weights."""
    config = copy.deepcopy(config)
    kinds = list(getattr(config, "layer_types", None) or [])
    for name, value in config.to_dict().items():
        each = isinstance(value, list) and len(value) == config.num_hidden_layers and name != "layer_types"
        if each and any(one != value[0] for one in value):
            raise NotCovered(f"{config.model_type} has layers that differ in {name}.")
    kept = sorted({kinds.index(kind) for kind in kinds}) or list(range(min(2, config.num_hidden_layers)))
    kept = kept if len(kept) > 1 else list(range(min(2, config.num_hidden_layers)))
    if kinds:
        config.layer_types = [kinds[index] for index in kept]
    config.num_hidden_layers = len(kept)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    config.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    noise = torch.Generator().manual_seed(0)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter += torch.randn(parameter.shape, generator=noise) * spread
    return model
