"""The decoding loop: one forward pass for each token, on a cache, for any number of left-padded sequences.

It is called by transformers' own `generate`, which prepares cache, processors and stopping criteria, so everything that
`generate` knows about a model holds here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class Step(NamedTuple):
    """What one forward pass gave.

    Attributes:
        tokens: the chosen ids, int64 [sequences]; padding where a sequence had ended.
        scores: what they were chosen by, float32 [sequences, vocabulary].
        ids: prompt and all that was chosen, int64 [sequences, tokens].
        layers: the premature layer of each sequence, int64 [sequences]; None where there is none.
    """

    tokens: Tensor
    scores: Tensor
    ids: Tensor
    layers: Tensor | None


class Reader(Protocol):
    """Makes scores of what the model's forward returned."""

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores float32 [sequences, vocabulary], and premature layers [sequences] or None."""
        ...


def plain(logits: Tensor) -> tuple[Tensor, None]:
    """The model's own logits at the last position."""
    return logits[:, -1].float(), None


@torch.inference_mode()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    read: Reader = plain,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Iterator[Step]:
    """Steps until every sequence has ended.

    Args:
        model: of transformers; its `generate` calls this.
        input_ids: int64 [sequences, tokens].
        logits_processor: applied to the scores.
        stopping_criteria: say which sequences have ended.
        generation_config: with the ids of end and padding.
        read: makes scores of logits.
        generator: draws where `do_sample`; None: PyTorch's own.
        **model_kwargs: attention mask, cache and all else that `generate` prepared.
    """
    padding = getattr(generation_config, "_pad_token_tensor", None)
    open_ = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores, layers = read(outputs.logits)
        scores = logits_processor(input_ids, scores.to(input_ids.device))
        tokens = _choose(scores, generator, sample=generation_config.do_sample)
        if padding is not None:
            tokens = torch.where(open_, tokens, padding)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        yield Step(tokens, scores, input_ids, layers)
        open_ = open_ & ~stopping_criteria(input_ids, scores)  # pyright: ignore[reportArgumentType]
        if not bool(open_.any()):
            return
        fresh = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=fresh, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


def _choose(scores: Tensor, generator: torch.Generator | None, *, sample: bool) -> Tensor:
    """The likeliest ids (the smallest of equals), or drawn ones."""
    if not sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0]
