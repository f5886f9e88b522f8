"""DoLa as a decoding loop, for transformers' `generate(custom_generate=...)` and for the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from prunus.decoding.dola.contrast import next_scores
from prunus.decoding.dola.options import Dola, parse_layers
from prunus.decoding.dola.states import Layers, Streams
from prunus.decoding.loop import Step, decode
from prunus.errors import RecipeError

LOGGER = logging.getLogger("prunus")
PENALTY = 1.2  # of the paper, for all generation


@dataclass
class DolaOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` gives: `sequences`, and `scores` where `output_scores` is set.

    Attributes:
        premature_layers: int64 [new tokens, sequences], the layer that each token was contrasted with.
    """

    premature_layers: Tensor | None = None


def dola_steps(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    dola: Dola | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Iterator[Step]:
    """As `loop.decode`, with the scores of DoLa; `Step.layers` are layer numbers.

    Raises:
        ModelError: a model whose inner layers cannot be read.
        RecipeError: layers outside the model, or beams.
    """
    how = dola or Dola()
    if generation_config.num_beams not in (None, 1):
        raise RecipeError("DoLa chooses token by token; leave out num_beams, or give 1.")
    found = Layers(model)
    layers = how.candidates(len(found.blocks), tied=found.tied)
    numbers = torch.tensor(layers, device=input_ids.device)

    def read(logits: Tensor) -> tuple[Tensor, Tensor]:
        # Rows: mature, then each premature layer; the last position alone.
        both = logits[:, -1].unflatten(0, (1 + len(layers), -1))
        scores, chosen = next_scores(both[0], both[1:], how)
        return scores, numbers[chosen.to(numbers.device)]

    with Streams(found, layers, norm=how.norm):
        yield from decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config,
            read=read, generator=generator, **model_kwargs,
        )  # fmt: skip


def dola_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    dola_layers: str | Sequence[int] = "low",
    dola: Dola | None = None,
    **model_kwargs: Any,
) -> Tensor | DolaOutput:
    """`model.generate(..., custom_generate=prunus.dola_generate, dola_layers="high", repetition_penalty=1.2)`.

    Works offline, needs no remote code, and chooses the premature layer for each sequence of a batch by itself.

    Args:
        model: whose `generate` calls this.
        input_ids: int64 [sequences, tokens], left-padded.
        logits_processor: repetition penalty, temperature and so on, applied to the contrasted scores.
        stopping_criteria: when to end.
        generation_config: greedy or sampling; no beams.
        dola_layers: "low", "high", or numbers of layers.
        dola: all that can be chosen, in place of `dola_layers`.
        **model_kwargs: what `generate` prepared.

    Returns:
        Ids int64 [sequences, tokens], or a `DolaOutput` where `return_dict_in_generate` is set.

    Raises:
        ModelError: a model whose inner layers cannot be read.
        RecipeError: layers outside the model, or beams.
    """
    if dola is None:
        dola = Dola(parse_layers(dola_layers) if isinstance(dola_layers, str) else tuple(dola_layers))
    if (generation_config.repetition_penalty or 1.0) < PENALTY:
        LOGGER.warning("DoLa repeats itself easily; its authors use repetition_penalty=%s.", PENALTY)
    ids, scores, layers = input_ids, [], []
    steps = dola_steps(
        model, input_ids, logits_processor, stopping_criteria, generation_config, dola=dola, **model_kwargs
    )
    for step in steps:
        ids = step.ids
        layers.append(step.layers)
        if generation_config.output_scores:
            scores.append(step.scores)
    if not generation_config.return_dict_in_generate:
        return ids
    return DolaOutput(sequences=ids, scores=tuple(scores) or None, premature_layers=torch.stack(layers))  # pyright: ignore
