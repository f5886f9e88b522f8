"""A model in the compiled engine, called like one of transformers: `forward` gives logits, `generate` continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutput

from prunus.decoding.sampling import Sampling
from prunus.errors import RecipeError, near
from prunus.models.modelling import ours
from prunus.models.skeleton import read_config
from prunus.packed.choosing import processors
from prunus.packed.model import generation_config
from prunus.packed.weights import engine_weights
from prunus.runtime.choice import draw, likeliest
from prunus.runtime.engine import Engine, covers
from prunus.runtime.plan import NotCovered

# Arguments of `generate` that it takes as transformers does; those below have one value that means "as it is".
TAKEN = (
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("suppress_tokens", "eos_token_id", "pad_token_id", "streamer", "generator"),
)
FIXED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}
# Of a generation config: what no token of a single greedy or drawn text depends on, such as the settings of beams.
IDLE = (
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "cache_implementation"),
    *("cache_config", "compile_config", "disable_compile", "length_penalty", "early_stopping", "diversity_penalty"),
    *("num_beam_groups",),
)
ONE = ("typical_p", "encoder_repetition_penalty")  # that do nothing where they are 1; the rest where they are 0 or none


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
            RecipeError: no tokens, a mask with zeros, more tokens than the context, or an argument that is not known.
        """
        _refuse_unknown(fixed, ("use_cache", "return_dict"))
        _refuse_shapeless(input_ids)
        _refuse_masked(attention_mask)
        rows = [self.engine.prefill(row, every=True, of=self.engine.reset()) for row in input_ids]
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
            **options: of `TAKEN`; the rest comes from the model's generation config. A `streamer` is given the prompt
                first, then token by token, and takes a single text.

        Raises:
            RecipeError: an argument or a setting of the generation config that this engine lacks or that is out of
                range, no tokens, no new token asked for, more tokens than the context holds, or another text was begun
                with this model while this one was made.
        """
        _refuse_shapeless(input_ids)
        _refuse_masked(attention_mask)
        _refuse_unknown({key: value for key, value in options.items() if FIXED.get(key, ...) != value}, TAKEN)
        given = self._settings(options)
        length = _length(given, options, input_ids.shape[1])
        generator, streamer, choose = given.get("generator"), given.get("streamer"), processors(given)
        if streamer is not None:
            if len(input_ids) > 1:
                raise RecipeError(f"A streamer shows one text, and there are {len(input_ids)}; give them one by one.")
            streamer.put(input_ids.cpu())
        ends = _ends(given.get("eos_token_id"))
        rows = []
        for row in input_ids:
            ids = row.tolist()
            for token in self._tokens(ids, length, choose, bool(given.get("do_sample")), generator):
                ids.append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
                if token in ends:
                    break
            rows.append(ids)
        if streamer is not None:
            streamer.end()
        pad = given.get("pad_token_id")
        # As transformers does: the first of the ids that end a text.
        fill = (ends[0] if ends else 0) if pad is None else int(pad)
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """The generation config under what was given to the call.

        Raises:
            RecipeError: the config asks for something that this engine lacks and the call does not take it back.
        """
        given = {name: value for name, value in self.generation_config.to_dict().items() if value is not None} | options
        for key, value in given.items():
            nothing = not value or value == FIXED.get(key, 1.0 if key in ONE else None)
            if not (nothing or key in TAKEN or key in IDLE or key.startswith("_")):
                raise RecipeError(
                    f"The model's generation_config.json asks for {key}={value!r}, which the packed engine does not "
                    f"do. Take {key} out of the file, or generate with transformers."
                )
        return given

    def stream(self, ids: Sequence[int], how: Sampling) -> Iterator[int]:
        """See `decoding.Engine.stream`."""
        options = {"repetition_penalty": how.repetition_penalty}
        if how.temperature:
            options |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k or 0, "do_sample": True}
        ends = _ends(self.generation_config.eos_token_id)
        if self.generation_config.eos_token_id is None:
            ends = _ends(self.config.get_text_config().eos_token_id)
        generator = torch.Generator().manual_seed(how.seed)
        choose = processors(options)
        for token in self._tokens(list(ids), how.max_new_tokens, choose, how.temperature > 0, generator):
            if token in ends:
                return
            yield token

    def _tokens(
        self, ids: list[int], count: int, choose: LogitsProcessorList, sample: bool, generator: torch.Generator | None
    ) -> Iterator[int]:
        """New ids, one by one."""
        if len(ids) + count - 1 > self.engine.context:
            raise RecipeError(
                f"The prompt has {len(ids)} tokens, and with {count} new ones that is more than the engine's context "
                f"of {self.engine.context}; ask for fewer new tokens or shorten the prompt."
            )
        text = self.engine.reset()
        seen = list(ids)
        logits = self.engine.prefill(seen, of=text)
        for number in range(count):
            scores = choose(torch.tensor([seen]), logits[None])[0]  # type: ignore[arg-type]
            token = draw(scores, generator) if sample else likeliest(scores)
            seen.append(token)
            yield token
            if number < count - 1:
                logits = self.engine.step(token, of=text)


def _length(given: dict[str, Any], options: dict[str, Any], prompt: int) -> int:
    """New tokens at most: what the call says before what the config says; 20 where neither does, as transformers.

    Raises:
        RecipeError: none.
    """
    own = options if options.get("max_new_tokens") is not None or options.get("max_length") is not None else given
    name = "max_new_tokens" if own.get("max_new_tokens") is not None else "max_length"
    if own.get(name) is None:
        return 20
    length = int(own[name]) - (0 if name == "max_new_tokens" else prompt)
    if length < 1:
        raise RecipeError(
            f"{name}={own[name]} leaves no new token behind a prompt of {prompt} tokens; ask for at least 1, by "
            "max_new_tokens."
        )
    return length


def uncovered(folder: Path) -> str | None:
    """Why the engine cannot run a folder's model, as a sentence; None if it can."""
    # The engine knows stock classes; to ask it about another would ask the user whether to run our own file.
    if ours(folder):
        return "its blocks are built by the modelling file in the folder."
    config = read_config(folder)
    if config.get_text_config() is not config:
        return f"the language model of {config.model_type} is one part of a larger one."
    return covers(config)


def open_model(folder: Path, values: str = "lossless", context: int | None = None) -> PackedModel:
    """The model of a packed or ordinary folder in the engine.

    Raises:
        NotCovered: the engine does not cover the architecture.
        PrunusError: the folder is damaged.
    """
    problem = uncovered(folder)
    if problem:
        raise NotCovered(f"The packed engine does not cover {folder.name}: {problem} Run it by transformers.")
    config = read_config(folder)
    engine = Engine(config, engine_weights(folder, values), context=context, verify=False)
    return PackedModel(engine, config, generation_config(folder) or GenerationConfig.from_model_config(config))


def _refuse_unknown(given: dict[str, Any], known: Sequence[str]) -> None:
    odd = [key for key, value in given.items() if key not in known and value is not None]
    if odd:
        raise RecipeError(f"The packed engine does not take {odd[0]}={given[odd[0]]!r}.{near(odd[0], known)}")


def _refuse_shapeless(ids: Tensor) -> None:
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise RecipeError(
            f"The packed engine reads token ids of the shape [texts, tokens], at least one of each, not {ids.dtype} of "
            f"the shape {list(ids.shape)}. Is the prompt empty?"
        )


def _refuse_masked(mask: Tensor | None) -> None:
    if mask is not None and not bool((mask == 1).all()):
        raise RecipeError("The packed engine reads every token: give texts of one length, without padding.")


def _ends(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
