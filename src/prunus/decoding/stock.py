"""The engine `transformers`: stock PyTorch, any model, any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.data.tokens import check_vocabulary
from prunus.decoding.dola.generate import dola_steps
from prunus.decoding.dola.options import Dola
from prunus.decoding.loop import Step, decode
from prunus.decoding.sampling import Sampling
from prunus.evaluation.loading import load_model
from prunus.models.source import check_folder


@dataclass
class Stock:
    """A model of transformers in memory (its class has no `generate` that types know).

    Attributes:
        model: in evaluation mode, on its device.
    """

    model: Any

    def stream(self, ids: Sequence[int], how: Sampling) -> Iterator[int]:
        """See `Engine.stream`."""
        ends = end_tokens(self.model)
        for step in self.steps(ids, how, decode):
            token = int(step.tokens[0])
            if token in ends:
                return
            yield token

    def contrast(self, ids: Sequence[int], how: Sampling, dola: Dola) -> Iterator[tuple[int, int]]:
        """See `Contrasting.contrast`."""
        ends = end_tokens(self.model)
        for step in self.steps(ids, how, dola_steps, dola=dola):
            token = int(step.tokens[0])
            if token in ends:
                return
            assert step.layers is not None
            yield token, int(step.layers[0])

    def steps(
        self, ids: Sequence[int], how: Sampling, decoder: Callable[..., Iterator[Step]], **options: Any
    ) -> Iterator[Step]:
        """The steps of `decoder`, called by `generate`; `options` go to it."""
        prompt = torch.tensor([list(ids)])
        check_vocabulary(prompt.numpy(), self.model.config.get_text_config().vocab_size, "The prompt")
        prompt = prompt.to(self.model.device)
        generator = torch.Generator(self.model.device).manual_seed(how.seed)
        ends = sorted(end_tokens(self.model))
        return self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            custom_generate=decoder,
            generator=generator,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,  # one sequence is never padded, but `generate` warns without
            **generate_options(how),
            **options,
        )


def generate_options(how: Sampling) -> dict[str, Any]:
    """Keyword arguments of transformers' `generate`; nothing is left to a model's own generation_config.json."""
    options: dict[str, Any] = {
        "max_new_tokens": how.max_new_tokens,
        "repetition_penalty": how.repetition_penalty,
        "do_sample": how.temperature > 0,
        "num_beams": 1,
    }
    if how.temperature > 0:
        return options | {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k or 0}
    return options | {"temperature": None, "top_p": None, "top_k": None}


def end_tokens(model: Any) -> frozenset[int]:
    """Ids that end a text, by the model's generation config or else its config."""
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def check(folder: Path, *, trust_remote_code: bool) -> None:
    """See `EngineModule.check`."""
    check_folder(folder, trust_remote_code=trust_remote_code)


def load(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> Stock:
    """See `EngineModule.load`."""
    return Stock(load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code))
