"""A model in the compiled runtime: prefill, decode and generation without PyTorch in between."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prunus.errors import RecipeError
from prunus.runtime import plan
from prunus.runtime.assembly import Parts, Weight, assemble
from prunus.runtime.choice import draw, likeliest
from prunus.runtime.native import Native, absence, available, require
from prunus.runtime.plan import NotCovered

# Longer contexts must be asked for: memory for keys and values is set aside for all of it.
CONTEXT = 8192


def covers(model: PreTrainedConfig | PreTrainedModel) -> str | None:
    """Why the engine cannot run a model; None if it can.

    A small random model of the same configuration is run by the engine and by transformers, once per configuration and
    process; the logits must agree.
    """
    from prunus.runtime.probe import check

    config = model.config if isinstance(model, PreTrainedModel) else model
    try:
        if available() is None:
            return f"the compiled kernels are not available: {absence()}."
        check(config)
    except NotCovered as problem:
        return str(problem)
    return None


class Engine:
    """One model with its keys and values so far, which are those of one text: another one begins with `reset`.

    Threads take turns. Who says which text a token is for (`of`) is told when another text was begun in between.

    Args:
        config: of the model.
        weights: by the names of transformers' parameters. Matrices: packed, quantised, or dense tensors that are used
            as they are (float32 or bfloat16). If the head shares the embedding's weight, `lm_head.weight` may still
            be given, for a head in another precision.
        native: the library; by default `require()`.
        context: positions to set memory aside for; by default what the model was made for, at most 8192.
        rounded: int8 and int4 matrices meet activations rounded to int8; False keeps activations as floats.
        layout: as in `kernels.Linear`.
        verify: first compare a small random model of this configuration with transformers.

    Raises:
        NotCovered: the architecture has a part that the engine lacks.
        ModelError: weights are missing or do not fit together.
        FormatError: a packed matrix is damaged.
        PrunusError: the library is not there, or there is not enough memory.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        weights: Mapping[str, Weight],
        *,
        native: Native | None = None,
        context: int | None = None,
        rounded: bool = True,
        layout: str | None = None,
        verify: bool = True,
    ) -> None:
        if verify:
            from prunus.runtime.probe import check

            check(config)
        self._native = native or require()
        self._architecture = architecture = plan.read(config)
        self.context = _context(context, architecture.longest)
        self._kept: list[object] = []  # tensors and matrices whose addresses the library holds
        parts = Parts(self._native, weights, rounded, layout, self._kept)
        self._struct = assemble(architecture, parts, self.context)
        self.vocabulary = self._struct.vocabulary
        self._turn, self._text = threading.RLock(), 0
        pointer = ctypes.c_void_p()
        library = self._native.library
        status = library.prunus_model(self._native.handle, ctypes.byref(self._struct), ctypes.byref(pointer))
        self._native.check(status, "The model")
        assert pointer.value is not None
        self._pointer = pointer.value
        weakref.finalize(self, _free, library, self._pointer, self._kept)

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self._native.library.prunus_position(self._pointer)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one step reads; keys and values come on top."""
        return self._native.library.prunus_bytes_per_token(self._pointer)

    def reset(self, position: int = 0) -> int:
        """Forget all tokens but the first `position`; returns the number of the text that begins (see `step`).

        Raises:
            RecipeError: there are not that many.
        """
        with self._turn:
            if not 0 <= position <= self.position:
                raise RecipeError(f"There are {self.position} tokens; the engine cannot go back to {position}.")
            self._native.check(self._native.library.prunus_rewind(self._pointer, position), "Going back")
            self._text += 1
            return self._text

    def step(self, token: int, *, of: int | None = None) -> Tensor:
        """Logits float32 [vocabulary] behind one more token.

        Args:
            token: its id.
            of: the text that it belongs to, as `reset` numbered it; None: whichever is there.

        Raises:
            RecipeError: no token of the vocabulary, the context is full, or another text was begun since.
        """
        with self._turn:
            self._check([token], of=of)
            logits = torch.empty(self.vocabulary)
            self._native.check(self._native.library.prunus_step(self._pointer, token, logits.data_ptr()), "A step")
            return logits

    def prefill(self, ids: Sequence[int] | Tensor, *, every: bool = False, of: int | None = None) -> Tensor:
        """Logits float32 [vocabulary] behind the last of some tokens; `every`: behind each, [tokens, vocabulary].

        Raises:
            RecipeError: no tokens, one that is not of the vocabulary, more than the context holds, or as `step`.
        """
        tokens = _tokens(ids)
        with self._turn:
            self._check(tokens, of=of)
            logits = torch.empty(len(tokens) if every else 1, self.vocabulary)
            given = torch.tensor(tokens, dtype=torch.int64)
            status = self._native.library.prunus_prefill(
                self._pointer, given.data_ptr(), len(tokens), logits.data_ptr(), int(every)
            )
            self._native.check(status, "The prompt")
            return logits if every else logits[0]

    def generate(
        self,
        ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """New tokens as they come, behind `ids`; what the engine held before is forgotten.

        Args:
            ids: the prompt.
            max_new_tokens: at most this many; fewer if a token of `stop` comes, which is the last one given.
            temperature: 0 takes the likeliest token, else logits are divided by it and a token is drawn.
            seed: of the draws.
            stop: tokens that end the text.

        Raises:
            RecipeError: no prompt, prompt and new tokens do not fit the context, or a temperature that is no finite
                number from 0 on. Raised by the call, before the first token. Later: another text was begun.
        """
        tokens = _tokens(ids)
        if max_new_tokens < 0 or not 0 <= temperature < math.inf:
            raise RecipeError(
                f"{max_new_tokens} new tokens at temperature {temperature}: both are finite and neither is negative."
            )
        self._check(tokens, start=0, more=max_new_tokens)
        return self._generate(tokens, max_new_tokens, _chooser(temperature, seed), stop)

    def _generate(
        self, tokens: list[int], count: int, choose: Callable[[Tensor], int], stop: Collection[int]
    ) -> Iterator[int]:
        text = self.reset()
        logits = self.prefill(tokens, of=text)
        for number in range(count):
            token = choose(logits)
            yield token
            if token in stop or number == count - 1:
                return
            logits = self.step(token, of=text)

    def _check(self, tokens: list[int], start: int | None = None, more: int = 0, of: int | None = None) -> None:
        self._native.check_process()
        if of is not None and of != self._text:
            raise RecipeError(
                "The engine holds one text, and another was begun before this one was done. Finish one first, or load "
                "the model once for each."
            )
        if not tokens:
            raise RecipeError("There are no tokens: the prompt is empty.")
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise RecipeError(
                f"Token {wrong} is not in the vocabulary of {self.vocabulary}; use the model's tokenizer."
            )
        before = self.position if start is None else start
        # The last new token is given but not read.
        if before + len(tokens) + max(0, more - 1) > self.context:
            longest = self._architecture.longest
            cure = f"the model was made for {longest}" + (
                ", so a larger context can be asked for" if longest > self.context else ""
            )
            raise RecipeError(
                f"{before + len(tokens)} tokens and {more} new ones do not fit the context of {self.context} ({cure}). "
                "Shorten the prompt or ask for fewer new tokens."
            )


def _free(library: ctypes.CDLL, pointer: int, kept: list[object]) -> None:
    """The model first, then what it points to."""
    library.prunus_model_free(pointer)
    kept.clear()


def _context(asked: int | None, longest: int) -> int:
    if asked is None:
        return min(longest, CONTEXT)
    if not 1 <= asked <= longest:
        raise RecipeError(f"A context of {asked} tokens: the model was made for 1 to {longest}.")
    return asked


def _tokens(ids: Sequence[int] | Tensor) -> list[int]:
    if isinstance(ids, Tensor):
        if ids.ndim > 1 and ids.shape[:-1].numel() != 1:
            raise RecipeError(f"The engine runs one text at a time, not {tuple(ids.shape[:-1])}.")
        return [int(token) for token in ids.flatten().tolist()]
    return [int(token) for token in ids]


def _chooser(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """How a token is taken from logits."""
    if temperature == 0:
        return likeliest
    noise = torch.Generator().manual_seed(seed)
    return lambda logits: draw(logits / temperature, noise)
