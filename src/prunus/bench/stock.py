"""transformers' own `generate` and `forward`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from prunus.evaluation.loading import load_model


class _Clock:
    """A streamer that notes when each piece came; the first is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """A prompt or a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


class Stock:
    """The transformers model of a folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.model: Any = load_model(folder, dtype=dtype)
        parameters = {id(value): value for value in self.model.parameters()}
        self.file_bytes = sum(value.nbytes for value in parameters.values())
        ends = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        # Of an embedding that is not the head too, one row is read.
        self.bytes_per_token = self.file_bytes - (0 if ends[0] is ends[1] else ends[0].nbytes)

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        """See `Runner.prefill`."""
        given = torch.tensor([ids])
        begun = time.perf_counter()
        self.model(given, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def decode(self, ids: list[int], tokens: int) -> float:
        """See `Runner.decode`."""
        clock = _Clock()
        given = torch.tensor([ids])
        self.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, streamer=clock, pad_token_id=0,
            min_new_tokens=tokens + 1, max_new_tokens=tokens + 1, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        # times[0]: the prompt was taken; times[1]: the first token, which is the prefill's.
        return (clock.times[tokens + 1] - clock.times[1]) / tokens


def open(folder: Path, variant: str) -> Stock:
    """`variant`: float32 or bfloat16."""
    return Stock(folder, variant)
