"""A model in the compiled engine, called like one of transformers: `forward` gives logits, `generate` continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

from prunus.decoding.sampling import Sampling
from prunus.errors import RecipeError, near
from prunus.models.skeleton import read_config
from prunus.packed.weights import engine_weights
from prunus.runtime.engine import Engine

# Arguments of `generate` that it takes as transformers does; those below have one value that means "as it is".
TAKEN = (
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"),
    *("suppress_tokens", "eos_token_id", "pad_token_id", "streamer", "generator"),
)
FIXED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}


class PackedModel:
    """A causal language model in the compiled engine. One text at a time, on the CPU.

    Attributes:
        engine: what computes.
        config: of the model.
        generation_config: with the ids of beginning, end and padding.
        device: the CPU.
        dtype: of the logits.
    """

    def __init__(self, engine: Engine, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        self.engine, self.config, self.generation_config = engine, config, generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    def eval(self) -> PackedModel:
        """Itself: it cannot be trained."""
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **fixed: Any
    ) -> CausalLMOutput:
        """Logits float32 `[texts, tokens, vocabulary]`, each text for itself; with labels, the mean loss too.

        Args:
            input_ids: int64 `[texts, tokens]`.
            attention_mask: ones; nothing can be left out.
            labels: int64 like `input_ids`, -100 where nothing is predicted.
            **fixed: `use_cache` and `return_dict`, whatever their values: they change nothing here.

        Raises:
            RecipeError: a mask with zeros, more tokens than the context, or an argument that is not known.
        """
        _refuse_unknown(fixed, ("use_cache", "return_dict"))
        _refuse_masked(attention_mask)
        rows = []
        for row in input_ids:
            self.engine.reset()
            rows.append(self.engine.prefill(row, every=True))
        logits = torch.stack(rows)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompts and their continuations, int64 `[texts, tokens]`, padded on the right, as transformers does.

        Args:
            input_ids: int64 `[texts, tokens]`, without padding.
            attention_mask: ones.
            **options: of `TAKEN`; the rest comes from the model's generation config.

        Raises:
            RecipeError: an argument that this engine lacks, or more tokens than the context holds.
        """
        _refuse_masked(attention_mask)
        _refuse_unknown({key: value for key, value in options.items() if FIXED.get(key, ...) != value}, TAKEN)
        given = self.generation_config.to_dict() | {key: value for key, value in options.items() if key in TAKEN}
        prompt = input_ids.shape[1]
        length = given.get("max_new_tokens") or (given.get("max_length") or prompt + 20) - prompt
        generator = given.get("generator")
        choose = processors(given)
        ends = _ends(given.get("eos_token_id"))
        rows = []
        for row in input_ids:
            ids = row.tolist()
            for token in self._tokens(ids, int(length), choose, bool(given.get("do_sample")), generator):
                ids.append(token)
                if options.get("streamer") is not None:
                    options["streamer"].put(torch.tensor([token]))
                if token in ends:
                    break
            rows.append(ids)
        if options.get("streamer") is not None:
            options["streamer"].end()
        pad = given.get("pad_token_id")
        fill = min(ends, default=0) if pad is None else int(pad)
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    def stream(self, ids: Sequence[int], how: Sampling) -> Iterator[int]:
        """See `decoding.Engine.stream`."""
        options = {"repetition_penalty": how.repetition_penalty}
        if how.temperature:
            options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k or 0, "do_sample": True}
        ends = _ends(self.generation_config.eos_token_id or self.config.get_text_config().eos_token_id)
        generator = torch.Generator().manual_seed(how.seed)
        choose = processors(options)
        for token in self._tokens(list(ids), how.max_new_tokens, choose, how.temperature > 0, generator):
            if token in ends:
                return
            yield token

    def _tokens(
        self, ids: list[int], count: int, choose: LogitsProcessorList, draw: bool, generator: torch.Generator | None
    ) -> Iterator[int]:
        """New ids, one by one."""
        if len(ids) + count - 1 > self.engine.context:
            raise RecipeError(
                f"The prompt has {len(ids)} tokens, and with {count} new ones that is more than the engine's context "
                f"of {self.engine.context}; ask for fewer new tokens or shorten the prompt."
            )
        self.engine.reset()
        seen = list(ids)
        logits = self.engine.prefill(seen)
        for number in range(count):
            scores = choose(torch.tensor([seen]), logits[None])[0]  # type: ignore[arg-type]
            token = _pick(scores, draw, generator)
            seen.append(token)
            yield token
            if number < count - 1:
                logits = self.engine.step(token)


def _pick(scores: Tensor, draw: bool, generator: torch.Generator | None) -> int:
    if not draw:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def processors(options: dict[str, Any]) -> LogitsProcessorList:
    """What is done to the scores before a token is chosen, in transformers' order, by transformers' own parts."""
    found = LogitsProcessorList()
    if (options.get("repetition_penalty") or 1.0) != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(float(options["repetition_penalty"])))
    if options.get("suppress_tokens"):
        found.append(SuppressTokensLogitsProcessor(options["suppress_tokens"]))
    if options.get("do_sample"):
        if (options.get("temperature") or 1.0) != 1.0:
            found.append(TemperatureLogitsWarper(float(options["temperature"])))
        if options.get("top_k"):
            found.append(TopKLogitsWarper(int(options["top_k"])))
        if (options.get("top_p") or 1.0) < 1.0:
            found.append(TopPLogitsWarper(float(options["top_p"])))
    return found


def open_model(folder: Path, values: str = "lossless", context: int | None = None) -> PackedModel:
    """The model of a packed or ordinary folder in the engine.

    Raises:
        PrunusError: the folder is damaged, or the engine does not cover the architecture.
    """
    config = read_config(folder)
    engine = Engine(config.get_text_config(), engine_weights(folder, values), context=context)
    generation = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    return PackedModel(engine, config, generation)


def _refuse_unknown(given: dict[str, Any], known: Sequence[str]) -> None:
    odd = [key for key, value in given.items() if key not in known and value is not None]
    if odd:
        raise RecipeError(f"The packed engine does not take {odd[0]}={given[odd[0]]!r}.{near(odd[0], known)}")


def _refuse_masked(mask: Tensor | None) -> None:
    if mask is not None and not bool((mask == 1).all()):
        raise RecipeError("The packed engine reads every token: give texts of one length, without padding.")


def _ends(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
