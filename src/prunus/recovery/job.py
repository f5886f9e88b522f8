"""Everything about a recovery that can be checked or refused before the work begins, in one plain value."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunus.data.tokens import folder_positions
from prunus.distributed import Processes, local_device
from prunus.errors import ModelError, RecipeError, near
from prunus.evaluation.loading import check_device
from prunus.job import PROBE_TOKENS, check_out, dtype_of
from prunus.memory import available
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks
from prunus.models.fitted import as_stored
from prunus.models.skeleton import parameter_count
from prunus.models.source import dense_name, locate
from prunus.models.weights import Weights
from prunus.output import Output
from prunus.recipe import Recipe, RecoverPart
from prunus.recovery.masks import Masks
from prunus.recovery.pruned import masks_or_refusal, read_record
from prunus.recovery.recovery import Recovery
from prunus.recovery.rows import Lessons, lessons
from prunus.recovery.samples import written
from prunus.sites import Block
from prunus.stream import Batch, Stream
from prunus.versions import decisive, versions
from prunus.work import Work

# Sequences in one step, unless the user or the recovery says how many.
BATCH = 8


@dataclass
class RecoveryJob:
    """A recovery that passed all checks.

    Attributes:
        recipe: what was asked; its `recover` part is `part`.
        part: the settings of the recovery that all methods share.
        recovery: the method with its hyper-parameters.
        folder: the pruned model.
        out: where the result goes.
        overwrite: whether it may replace what is there.
        work: the unfinished state beside it; `work.training` is the recovery's own.
        checkpoint: the pruned model's files.
        stream: the pruned model, its parameters on meta, and its blocks.
        masks: which weights are kept.
        lessons: what is learnt from and judged by.
        device: where is computed.
        processes: this process among its peers.
        warnings: what the user should know.
        record: `prunus.json` of the pruned folder; empty for a foreign one.
    """

    recipe: Recipe
    part: RecoverPart
    recovery: Recovery
    folder: Path
    out: Path
    overwrite: bool
    work: Work
    checkpoint: Checkpoint
    stream: Stream
    masks: Masks
    lessons: Lessons
    device: torch.device
    processes: Processes
    warnings: list[str]
    record: dict[str, Any]

    @property
    def model(self) -> PreTrainedModel:
        """The pruned model; its parameters are on meta unless a recovery has loaded them."""
        return self.stream.model

    @property
    def blocks(self) -> list[Block]:
        """All blocks with their matrices."""
        return self.stream.blocks

    @property
    def output(self) -> Output:
        """Writes shards into the work folder."""
        return Output(self)

    @property
    def probe(self) -> Batch:
        """The few tokens whose logits are compared after reloading."""
        return Batch({"input_ids": self.lessons.heldout.ids[:1, :PROBE_TOKENS].clone()}, 0)

    @property
    def dtype_name(self) -> str:
        """Dtype that the forward passes are computed in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def parameters(self) -> int:
        """Number of the model's weights, tied ones once."""
        return parameter_count(self.model)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of all that has a say in the numbers."""
        return versions()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the result to the last bit; an unfinished run is only continued under the same."""
        recipe = {name: value for name, value in self.recipe.resolved().items() if name not in ("out", "evaluate")}
        return {
            "recipe": json.loads(json.dumps(recipe)),
            **inputs(self.recipe, self.part, self.recovery, self.folder, self.lessons),
            "versions": decisive(),
            "device": self.device.type, "threads": torch.get_num_threads(), "processes": self.processes.world,
        }  # fmt: skip

    def dense_folder(self) -> Path:
        """The dense model's folder, for methods that look at it.

        Raises:
            RecipeError: it is not named, and prunus.json does not name it either.
        """
        return _dense_folder(self.part, self.record, self.recipe.trust_remote_code)

    def begin(self, restart: bool) -> None:
        """Take the work folder and see that the disk is large enough.

        Raises:
            RecipeError: the disk is too small, the folder is taken, or it holds another unfinished run.
        """
        continued = self.work.begin(self.fingerprint, restart)
        need, free = int(self.checkpoint.bytes * 1.05), shutil.disk_usage(self.work.folder).free
        if need > free and not continued:
            self.work.close(remove=True)
            raise RecipeError(f"{self.out.parent} has {free / 1e9:.1f} GB free and this run needs {need / 1e9:.1f} GB.")

    def require_memory(self, terms: dict[str, int], cure: str) -> dict[str, int]:
        """See that so many bytes are there; returns the terms with their sum.

        Args:
            terms: name → bytes that will be needed besides what the process holds now.
            cure: what would need less.

        Raises:
            RecipeError: there is less.
        """
        total = sum(terms.values())
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available()
        if total > free:
            shown = " + ".join(f"{name} {size / 1e9:.2f} GB" for name, size in terms.items() if size)
            raise RecipeError(
                f"This recovery needs {total / 1e9:.2f} GB ({shown}), and {free / 1e9:.2f} GB are free. {cure}"
            )
        return {**terms, "total": total}


def _dense_folder(part: RecoverPart, record: dict[str, Any], trust_remote_code: bool) -> Path:
    name = part.dense or dense_name(record)
    if not name:
        raise RecipeError("This recovery needs the dense model, and nothing says which that is; name it with --dense.")
    return locate(name, trust_remote_code=trust_remote_code)


def inputs(recipe: Recipe, part: RecoverPart, recovery: Recovery, folder: Path, found: Lessons) -> dict[str, Any]:
    """Hashes of what a recipe only names: the pruned model, the dense one where it is looked at, text, an adapter.

    Args:
        recipe: says whether code of the dense model is trusted.
        part: what was asked.
        recovery: says what it looks at.
        folder: the pruned model.
        found: what is learnt from and judged by.
    """
    hashes: dict[str, Any] = {
        "model": Checkpoint.open(folder).identity, "text": found.train.sha256, "heldout": found.heldout.sha256,
    }  # fmt: skip
    if recovery.needs_dense(part):
        hashes["dense"] = Checkpoint.open(_dense_folder(part, read_record(folder), recipe.trust_remote_code)).identity
    return hashes | recovery.reads()


def settled(part: RecoverPart, recovery: Recovery) -> RecoverPart:
    """The settings with the recovery's own numbers where the user gave none."""
    own = {"batch": part.batch or getattr(recovery, "batch", BATCH), "samples": part.samples or recovery.samples}
    return part.model_copy(update=own)


def text_of(
    recipe: Recipe, part: RecoverPart, folder: Path, *, vocabulary: int | None, processes: Processes
) -> Lessons:
    """What is learnt from and judged by; the dense model writes it if that was asked.

    Raises:
        PrunusError: as `rows.lessons` and `samples.written`.
    """
    if part.data == "samples":
        dense = _dense_folder(part, read_record(folder), recipe.trust_remote_code)
        device = check_device(str(local_device(recipe.device)))
        file = processes.on_first(lambda: str(written(dense, part, device, recipe.dtype, recipe.trust_remote_code)))
        part = part.model_copy(update={"text": file})
    return lessons(part, folder, vocabulary=vocabulary, limit=folder_positions(folder))


def choose(part: RecoverPart) -> Recovery:
    """The recovery that a recipe names, with its settings.

    Raises:
        RecipeError: an unknown name or setting.
    """
    from prunus.recovery import RECOVERIES
    from prunus.recovery.settings import configure

    if part.method not in RECOVERIES:
        raise RecipeError(f"There is no recovery {part.method!r}.{near(part.method, RECOVERIES)}")
    settings = {key: value for key, value in part.settings.items() if not key.startswith("objective.")}
    return configure(RECOVERIES[part.method], settings)


def prepare(
    recipe: Recipe,
    out: Path,
    *,
    recovery: Recovery | None = None,
    overwrite: bool,
    processes: Processes,
    warnings: list[str],
) -> RecoveryJob:
    """Check everything that can be checked before anything is trained.

    Args:
        recipe: what was asked.
        out: absolute path of the folder to make.
        recovery: instead of the one that the recipe names.
        overwrite: whether it may replace another.
        processes: this process among its peers.
        warnings: receives what the user should know.

    Raises:
        PrunusError: something about the recipe, the model, the text or the output does not do.
    """
    part = recipe.recover or RecoverPart()
    recovery = recovery or choose(part)
    part = settled(part, recovery)
    device = check_device(str(local_device(recipe.device)))
    folder = locate(recipe.model, trust_remote_code=recipe.trust_remote_code)
    work = Work(out)
    check_out(out, folder, overwrite or work.published)
    checkpoint = Checkpoint.open(folder)
    model = as_stored(checkpoint, dtype_of(recipe.dtype, device, checkpoint), recipe.trust_remote_code)
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; recovery learns from the next token.")
    stream = Stream(model, Weights(model, checkpoint, device), find_blocks(model), processes)
    record = read_record(folder)
    masks = masks_or_refusal(folder, stream, record, part, warnings)
    if recipe.evaluate is not None and recipe.evaluate.max_ppl_ratio is not None:
        _dense_folder(part, record, recipe.trust_remote_code)
    vocabulary = model.config.get_text_config().vocab_size
    found = text_of(recipe, part, folder, vocabulary=vocabulary, processes=processes)
    job = RecoveryJob(
        recipe, part, recovery, folder, out, overwrite, work, checkpoint, stream, masks, found, device, processes,
        warnings, record,
    )  # fmt: skip
    recovery.check(job)
    return job
