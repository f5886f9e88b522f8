"""A prompt and its continuation, piece by piece as it is made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunus.data.tokens import folder_positions, load_tokenizer
from prunus.decoding import Contrasting, Engine, find_engine
from prunus.decoding.dola.options import Dola
from prunus.decoding.packed import suits
from prunus.decoding.sampling import Sampling
from prunus.errors import RecipeError
from prunus.models.source import find, is_packed


def generate(  # noqa: PLR0913 - the options of the command
    model: str | Path,
    prompt: str,
    how: Sampling | None = None,
    *,
    dola: Dola | None = None,
    engine: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue `prompt`.

    Args:
        model: a folder, a hub id, a .gguf file or an alias.
        prompt: not empty; it gets the special tokens that the tokenizer puts by itself.
        how: the choice of tokens; greedy, 64 of them, unless given.
        dola: contrast layers so; None: the model's own logits.
        engine: a row of `ENGINES`; auto: packed for a packed folder and for a sparse one that the kernels can run
            (`packed.suits`), without DoLa; else transformers.
        device: such as cpu or cuda:0.
        dtype: auto, float32, bfloat16 or float16.
        trust_remote_code: as in `locate`.
        tell: is given each piece of text as soon as it is whole, and "" at the end.

    Returns:
        A JSON object: model, engine, prompt, text (the continuation), ids, tokens, prompt_tokens, ended ("end": an
        end-of-text token; "length": max_new_tokens), sampling, dola (None, or its settings and how often each
        layer was chosen), seconds {load, first, rest} and tokens_per_second (after
        the first; None for one token).

    Raises:
        RecipeError: an unknown engine, a prompt that is empty or no text, or more tokens than the model has positions
            for.
        PrunusError: the model or its tokenizer cannot be used.
    """
    how = how or Sampling()
    if engine != "auto":
        find_engine(engine)
    if not prompt.strip():
        raise RecipeError("The prompt is empty; give a few words to continue.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what Python makes of bytes that it cannot read
        raise RecipeError("The prompt is not text: it has bytes that are no UTF-8. Save it as UTF-8, or type it anew.")
    folder = find(model, trust_remote_code=trust_remote_code)
    if engine == "auto":
        packed = is_packed(folder) or (dola is None and suits(folder, device=device, dtype=dtype))
        engine = "packed" if packed else "transformers"
    module = find_engine(engine)
    module.check(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder)
    ids = list(tokenizer(prompt)["input_ids"])
    _check_positions(folder, len(ids), how.max_new_tokens)
    begun = time.perf_counter()
    ready = module.load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    times = [time.perf_counter()]
    new: list[int] = []
    written = []
    layers: Counter[int] = Counter()
    stream = ready.stream(ids, how) if dola is None else _contrasted(ready, ids, how, dola, engine, layers)
    for piece in pieces(tokenizer, ids, _timed(stream, new, times)):
        written.append(piece)
        if tell:
            tell(piece)
    if tell:
        tell("")
    rest = times[-1] - times[1] if len(times) > 2 else None
    return {
        "model": str(model), "engine": engine, "prompt": prompt, "text": "".join(written), "ids": new,
        "tokens": len(new), "prompt_tokens": len(ids), "ended": "length" if len(new) == how.max_new_tokens else "end",
        "sampling": asdict(how),
        "dola": dola and asdict(dola) | {"chosen": {str(layer): layers[layer] for layer in sorted(layers)}},
        "seconds": {"load": times[0] - begun, "first": times[1] - times[0] if new else None, "rest": rest},
        "tokens_per_second": (len(new) - 1) / rest if rest else None,
    }  # fmt: skip


def _contrasted(
    engine: Engine, ids: list[int], how: Sampling, dola: Dola, name: str, layers: Counter[int]
) -> Iterator[int]:
    """The ids of DoLa; the layers are counted."""
    if not isinstance(engine, Contrasting):
        raise RecipeError(f"The engine {name} cannot contrast layers (DoLa); use the engine transformers.")
    for token, layer in engine.contrast(ids, how, dola):
        layers[layer] += 1
        yield token


def pieces(tokenizer: Any, prompt: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` behind `prompt`, in pieces that are whole characters; joined they are the whole.

    Prompt and new ids are decoded together, since some tokenizers drop the blank before the first piece.
    """
    # A window of the end is enough, and keeps long texts from costing the square of their length.
    known = prompt[-8:]
    shown = _decode(tokenizer, known)
    for index in ids:
        known.append(index)
        now = _decode(tokenizer, known)
        # A character of several bytes is not whole before its last token; until then it shows as U+FFFD.
        if now.endswith("\ufffd") or not now.startswith(shown):
            continue
        if len(now) > len(shown):
            yield now[len(shown) :]
        known = known[-8:] if len(known) > 64 else known
        shown = _decode(tokenizer, known)
    now = _decode(tokenizer, known)
    if len(now) > len(shown):
        yield now[len(shown) :]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _timed(ids: Iterable[int], kept: list[int], times: list[float]) -> Iterator[int]:
    """`ids`, each noted with the time at which it came."""
    for index in ids:
        kept.append(index)
        times.append(time.perf_counter())
        yield index


def _check_positions(folder: Path, prompt: int, new: int) -> None:
    limit = folder_positions(folder) if (folder / "config.json").is_file() else None
    if limit is not None and prompt + new > limit:
        raise RecipeError(
            f"The prompt has {prompt} tokens, and with {new} new ones that is more than the model's {limit} positions; "
            f"ask for at most {limit - prompt} new tokens or shorten the prompt."
            if prompt < limit
            else f"The prompt has {prompt} tokens, the model {limit} positions; shorten the prompt."
        )
