"""The recipe: what a user asks for, checked once at the border; the only place that knows YAML.

A `Recipe` is plain values. Below it nothing sees pydantic or YAML: `build` translates it into the objects that
work. Importing this module loads neither torch nor transformers, so help and bad input answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from prunus.errors import RecipeError
from prunus.presets import preset
from prunus.recipe_errors import explain
from prunus.recipe_yaml import beside, dump_yaml, read_yaml

if TYPE_CHECKING:
    from prunus.allocations import Allocation
    from prunus.methods.elementwise import Elementwise
    from prunus.methods.shape import Shape

# Sparsities written with a few digits, such as 0.333 for 2:3, mean the pattern's own.
PATTERN_TOLERANCE = 1e-3

Bos = Literal["auto", "always", "never"]


def _number(value: Any) -> Any:
    # pydantic reads true as 1; in a recipe that is a slip of the pen.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number")
    return value


def _listed(value: Any) -> Any:
    # As on the command line: arc_easy,hellaswag.
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _settings(value: Any) -> Any:
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(item, str | int | float):
            raise PydanticCustomError(
                "sentence", "{key} must be one number, word or true/false", {"key": f"settings.{key}"}
            )
    return value


Count = Annotated[int, BeforeValidator(_number)]
Share = Annotated[float, BeforeValidator(_number)]
Setting = str | int | float | bool
Settings = Annotated[dict[str, Setting], BeforeValidator(_settings)]
Name = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class CalibrationPart(_Part):
    """The text that shows each matrix its usual inputs."""

    source: Name = Field(
        default="wikitext2",
        description="an embedded text (wikitext2), a file (.txt, .jsonl, .parquet, each also .gz; .npy of token ids "
        "[samples, length]) or the name of a data set on the hub, such as c4",
    )
    samples: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="sequences drawn from the text; 128, or all rows of a file of ids"
    )
    length: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=2, description="tokens in each sequence; 512, or as long as the rows of a file of ids"
    )
    seed: Count = Field(default=0, ge=0, lt=2**63, description="seed of the draw; the same seed gives the same tokens")
    bos: Bos = Field(
        default="auto", description="begin each sequence with the BOS token; auto: where the tokenizer does so"
    )


def pattern_sparsity(pattern: str) -> float | None:
    """`1 - N/M` for N:M, None for a pattern that leaves the sparsity free.

    Raises:
        PydanticCustomError: N is not between 1 and M - 1.
    """
    match = re.fullmatch(r"\s*(-?\d+)\s*:\s*(-?\d+)\s*", pattern)
    if not match:
        return None
    kept, group = int(match[1]), int(match[2])
    if not 0 < kept < group:
        raise PydanticCustomError(
            "sentence",
            "pattern {pattern} cannot be: N:M keeps N of every M weights, so N must be at least 1 and below M, as "
            "in 2:4",
            {"pattern": pattern},
        )
    return 1 - kept / group


def _completed(data: Any) -> Any:
    """What a preset leaves to be said; the resolved recipe holds it all and names the preset."""
    if not isinstance(data, Mapping) or not isinstance(data.get("preset"), str):
        return data
    try:
        return preset(data["preset"]).fill(data["preset"], data)
    except RecipeError as refusal:
        raise PydanticCustomError("sentence", "{text}", {"text": str(refusal).removesuffix(".")}) from None


def check_cap(pattern: str, sparsity: float) -> None:
    """See that a cap leaves as many weights as the sparsity keeps.

    Raises:
        PydanticCustomError: capped:K/M with 1 - K/M above the sparsity.
    """
    match = re.fullmatch(r"\s*capped:(\d+)/(\d+)\s*", pattern)
    if match and int(match[2]) and sparsity < 1 - int(match[1]) / int(match[2]) - 1e-9:
        raise PydanticCustomError(
            "sentence",
            "pattern {pattern} removes at least {least} of the weights, and sparsity {sparsity} is less; raise the "
            "sparsity, or K",
            {"pattern": pattern, "least": f"{1 - int(match[1]) / int(match[2]):.4g}", "sparsity": f"{sparsity:g}"},
        )


class PrunePart(_Part):
    """What is removed: metric x pattern x update, divided over the blocks by an allocation."""

    preset: Name | None = Field(
        default=None, description="fast, balanced or best: a method, an allocation and settings as one choice"
    )
    method: Name = Field(default="wanda", description="a row of `prunus methods` of kind method")
    metric: Name | None = Field(default=None, description="scores weights by this metric instead of the method's own")
    update: Name | None = Field(
        default=None, description="corrects the kept weights by this update instead of the method's own"
    )
    pattern: Name = Field(
        default="unstructured",
        description="unstructured; N:M: N kept of every M consecutive inputs (2:4); capped:K/M: at most K of them",
    )
    sparsity: Share = Field(
        default=0.5, ge=0, lt=1, allow_inf_nan=False, description="share of the weights to remove; N:M fixes it"
    )
    params: str | None = Field(
        default=None, description="parameters that the result shall have, such as 100M, instead of a sparsity"
    )
    size: str | None = Field(
        default=None, description="bytes of weights that the result shall have, such as 80MB, instead of a sparsity"
    )
    speedup: Annotated[float | None, BeforeValidator(_number)] = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="how many times as fast as the dense model to decode on this machine (transformers), instead of a "
        "sparsity",
    )
    portable: bool = Field(
        default=False, description="all blocks of one shape that a stock class of transformers holds, or a refusal"
    )
    round_to: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="keep neurons in multiples of this, which kernels like"
    )
    allocation: Annotated[Name, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})] = Field(
        default="uniform", description="divides the sparsity over the blocks; a name, or {name: owl, span: 0.08}"
    )
    settings: Settings = Field(
        default_factory=dict, description="hyper-parameters as part.field: value, such as update.damp: 0.01"
    )
    ignore: list[Name] = Field(default_factory=list, description="globs of matrix names to leave alone")
    blocks: Name | None = Field(
        default=None, description="path of the list of blocks, where they are not found by themselves"
    )
    compat: Literal["exact", "reference"] = Field(
        default="exact", description="exact counts, or the published code's own rounding to match published numbers"
    )

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, data: Any) -> Any:
        """`allocation: {name: owl, span: 0.08}` is `allocation: owl` with the setting `allocation.span`."""
        if not isinstance(data, Mapping) or not isinstance(data.get("allocation"), Mapping):
            return _completed(data)
        spread = {f"allocation.{key}": value for key, value in data["allocation"].items() if key != "name"}
        settings = data.get("settings") or {}
        if "name" not in data["allocation"]:
            raise PydanticCustomError("sentence", "allocation must have a name, such as {name: owl, span: 0.08}")
        twice = sorted(spread.keys() & settings.keys()) if isinstance(settings, Mapping) else ()
        if twice:
            raise PydanticCustomError("sentence", "{key} is given twice; remove one", {"key": twice[0]})
        return _completed({**data, "allocation": data["allocation"]["name"], "settings": {**settings, **spread}})

    @model_validator(mode="after")
    def _pattern_fixes_sparsity(self) -> PrunePart:
        check_cap(self.pattern, self.sparsity)
        fixed = pattern_sparsity(self.pattern)
        if fixed is None:
            return self
        if "sparsity" in self.model_fields_set and abs(self.sparsity - fixed) > PATTERN_TOLERANCE:
            raise PydanticCustomError(
                "sentence",
                "pattern {pattern} removes {fixed} of the weights and contradicts sparsity {sparsity}; leave sparsity "
                "out or choose another pattern",
                {"pattern": self.pattern, "fixed": f"{fixed:.4g}", "sparsity": f"{self.sparsity:g}"},
            )
        object.__setattr__(self, "sparsity", fixed)  # frozen for everyone else
        return self


class RecoverPart(_Part):
    """Retraining that keeps the zeros: method x objective, and the text that it learns from."""

    method: Name = Field(default="reconstruct", description="a row of `prunus methods` of kind recovery")
    objective: Name = Field(
        default="text", description="what is minimised: a row of `prunus methods` of kind objective"
    )
    settings: Settings = Field(
        default_factory=dict,
        description="hyper-parameters, such as rank: 32 or masklora.rank: 32 or objective.top_k: 64",
    )
    text: Name = Field(
        default="wikitext2",
        description="what is learnt from: an embedded text (wikitext2: its validation split), a file, or a data set of "
        "the hub",
    )
    data: Literal["text", "instructions", "samples"] = Field(
        default="text",
        description="text: packed, EOS kept; instructions: rows of prompt and response, only the response counts; "
        "samples: the dense model writes the text itself",
    )
    dense: Name | None = Field(
        default=None, description="the dense model, where one is needed; the one that prunus.json names unless given"
    )
    steps: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="optimizer steps; 1000 unless steps or minutes are given"
    )
    minutes: Annotated[float | None, BeforeValidator(_number)] = Field(
        default=None, gt=0, description="time to train; becomes a number of steps once the pace is measured"
    )
    lr: Annotated[float | None, BeforeValidator(lambda value: None if value == "auto" else _number(value))] = Field(
        default=None, gt=0, description="peak learning rate; the method's own unless given"
    )
    probe: bool = Field(default=False, description="try a few learning rates first and take the best (lr: auto)")
    samples: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="sequences of the text that are used at most; 128 for local methods, else all"
    )
    length: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=8, description="tokens in each sequence; 512, or as many as the model has positions"
    )
    batch: Count = Field(
        default=0, ge=0, description="sequences in one step, over all processes; 0: 8, or a local method's own number"
    )
    heldout: Count = Field(default=16, ge=1, description="sequences kept apart to judge by")
    patience: Count = Field(
        default=0, ge=0, description="stop after so many judgements in a row without a better one; 0: never"
    )
    seed: Count = Field(default=0, ge=0, lt=2**63, description="seed of the order of the text and of new parameters")
    bos: Bos = Field(
        default="auto", description="begin each sequence with the BOS token; auto: where the tokenizer does so"
    )
    allow_dense: bool = Field(default=False, description="go on with a model in which nothing is pruned")

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, data: Any) -> Any:
        """`lr: auto` asks for the probe."""
        return {**data, "probe": True} if isinstance(data, Mapping) and data.get("lr") == "auto" else data

    @model_validator(mode="after")
    def _one_length(self) -> RecoverPart:
        if self.steps is not None and self.minutes is not None:
            raise PydanticCustomError("sentence", "steps and minutes both say how long to train; give one of them")
        return self


class EvaluatePart(_Part):
    """Perplexity of the result, with the dense model beside it."""

    text: Name = Field(default="wikitext2", description="a text by name, or a file")
    length: Count = Field(
        default=1024, ge=2, description="tokens in each window; perplexities compare only at equal length"
    )
    windows: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="how many windows from the start of the text; all of them unless given"
    )
    bos: Bos = Field(
        default="auto", description="begin each window with the BOS token; auto: where the tokenizer does so"
    )
    baseline: bool = Field(default=True, description="evaluate the dense model too")
    sample: Name | None = Field(default=None, description="also continue this prompt by one sentence")
    tasks: Annotated[list[Name], BeforeValidator(_listed)] = Field(
        default_factory=list, description="benchmark tasks of lm-eval by name, or owl7; none unless given"
    )
    task_data: Name | None = Field(
        default=None, description="folder with TASK.jsonl files, for machines without a network"
    )
    limit: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, description="how many items from the start of each task; all of them unless given"
    )
    batch: Count = Field(default=1, ge=1, description="requests of tasks in one forward pass")
    max_ppl_ratio: Annotated[float | None, BeforeValidator(_number)] = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="publish nothing if the perplexity is more than so many times the dense model's",
    )

    @model_validator(mode="after")
    def _tasks_have_limits(self) -> EvaluatePart:
        given = {"limit": self.limit is not None, "task_data": self.task_data is not None, "batch": self.batch != 1}
        idle = [name for name in given if given[name] and not self.tasks]
        if idle:
            raise PydanticCustomError(
                "sentence",
                "{name} is about benchmark tasks and there are none; name tasks, or leave it out. Of the text, windows "
                "limits how much is read",
                {"name": idle[0]},
            )
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> EvaluatePart:
        if self.text == "none" and not self.tasks:
            raise PydanticCustomError(
                "sentence", "With the text 'none' there is nothing to measure; name tasks, or a text"
            )
        if self.text == "none" and self.windows is not None:
            raise PydanticCustomError("sentence", "With the text 'none' there are no windows; leave windows out")
        return self

    def asked(self) -> dict[str, Any]:
        """The arguments of `evaluation.perplexity.evaluate` that stand here."""
        return self.model_dump(exclude={"baseline", "max_ppl_ratio"})


class Recipe(_Part):
    """All that is needed to repeat a run: the model, the text, what to remove, how to judge it."""

    model: Name = Field(description="a folder, a hub id, a .gguf file or an alias such as smollm2")
    out: Name | None = Field(default=None, description="folder for the pruned checkpoint")
    calibration: CalibrationPart = Field(default_factory=CalibrationPart)
    prune: PrunePart = Field(default_factory=PrunePart)
    recover: RecoverPart | None = Field(default=None, description="retrain what is left; leave out to skip")
    evaluate: EvaluatePart | None = Field(default=None, description="judge the result; leave out to skip")
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = Field(
        default="cpu",
        description="where blocks are computed",
        json_schema_extra={"expected": "cpu, cuda or cuda:1"},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="number format of the forward passes; the checkpoint keeps its own"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that the model's folder brings along")

    def resolved(self) -> dict[str, Any]:
        """Every value with the defaults written out; `Recipe(**recipe.resolved()) == recipe`."""
        return self.model_dump(mode="json")

    def build(self) -> tuple[Elementwise | Shape, Allocation]:
        """The method and the allocation as objects.

        Raises:
            RecipeError: a name is unknown, a setting is not one of its part or out of range; the message has the
                nearest names.
        """
        from prunus.methods.compose import compose

        prune = self.prune
        return compose(
            prune.method,
            metric=prune.metric,
            update=prune.update,
            pattern=prune.pattern,
            allocation=prune.allocation,
            settings=dict(prune.settings) | ({} if prune.round_to is None else {"method.round_to": prune.round_to}),
            compat=prune.compat,
            portable=prune.portable,
        )


def recipe(data: Mapping[str, Any], *, source: str = "", names: Mapping[str, str] | None = None) -> Recipe:
    """Check a mapping and make it a recipe.

    Args:
        data: nested, as YAML gives it.
        source: named in front of each complaint, such as the file.
        names: for places that the user wrote under another name, that name (`prune.sparsity` -> `--sparsity`).

    Raises:
        RecipeError: one sentence for each thing that is wrong.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe.model_json_schema(), source, names or {})) from None


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe; relative paths in it are relative to the file.

    Raises:
        RecipeError: the file is missing, is not YAML, or says something that a recipe cannot.
    """
    return recipe(read_recipe(Path(path)), source=str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping of a recipe file, not yet checked, with its paths made relative to the file."""
    data = read_yaml(path)
    # A part that is written but empty (`prune:`) means its defaults.
    for part in ("calibration", "prune", "recover", "evaluate"):
        if part in data and data[part] is None:
            data[part] = {}
    beside(data, path.parent)
    return data


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back to an equal recipe."""
    # A part that is written but empty would mean its defaults, see `read_recipe`.
    return dump_yaml({key: value for key, value in recipe.resolved().items() if value is not None})


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
