"""The loss of the whole model with some of its blocks passed by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from prunus.capture import in_form, replaced
from prunus.methods.shape import Blocks


class Bypassed:
    """A context in which the dense model is in memory and blocks can be passed by."""

    def __init__(self, survey: Blocks, samples: int):
        """Name the model and how many calibration samples its losses are of."""
        self.survey = survey
        self.samples = samples
        self._stack = ExitStack()
        self._forms: dict[type, Any] = {}

    def __enter__(self) -> Bypassed:
        """Load the model."""
        _, self._losses = self._stack.enter_context(self.survey.whole(self.samples))
        self.blocks = {block.name: block.module for block in self.survey.blocks}
        return self

    def __exit__(self, *problem: object) -> None:
        """Drop it."""
        self._stack.close()

    def loss(self, without: set[str]) -> float:
        """Mean loss of the samples with these blocks passed by."""
        forwards = {self.blocks[name]: self._pass(self.blocks[name]) for name in without}
        with replaced(forwards):
            return float(self._losses().mean())

    def _pass(self, module: Any) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            kind = type(module)
            if kind not in self._forms:
                self._forms[kind] = kind.forward(module, *args, **kwargs)
            return in_form(self._forms[kind], hidden)

        return forward
