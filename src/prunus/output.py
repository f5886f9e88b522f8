"""The checkpoint that a run leaves: an ordinary Hugging Face folder under the original names and dtypes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.capture import Inputs
from prunus.card import model_card
from prunus.errors import ModelError, PrunusError, RecipeError
from prunus.job import Job
from prunus.models.checkpoint import INDEX, Checkpoint
from prunus.models.fitted import is_fitted
from prunus.models.modelling import ours
from prunus.models.source import PICKLES
from prunus.models.weights import Cut
from prunus.shapes import settle
from prunus.shapes.depth import without
from prunus.sites import Block

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob

# The orders of columns of a pattern with `permute`, by name of the matrix; packing reads them.
ORDERS = "column-order.safetensors"

# Not carried over: weights in any form, and what is written anew.
DROPPED = (
    *PICKLES,
    *("*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json"),
    *("README.md", "prunus.json", "evaluation.json", "prunus.masks"),
)


class Output:
    """Writes shards into the work folder: one per block, then what lies outside of blocks."""

    def __init__(self, job: Job | RecoveryJob):
        """Decide which tensor goes into which shard."""
        self.job = job
        self.work = job.work
        self.weights = job.stream.weights
        self.blocks = {block.name: number for number, block in enumerate(job.stream.blocks)}
        self.rest = self._groups(self.weights.outside(self.blocks))
        self.count = len(self.blocks) + len(self.rest)
        self.dropped: frozenset[str] = frozenset()
        folder = self.job.checkpoint.folder
        self.loads = "prunus" if is_fitted(folder) else "code" if ours(folder) else "transformers"

    def leave_out(self, dropped: frozenset[str]) -> None:
        """Blocks that are not written; the others are numbered anew."""
        kept = [block for block in self.job.stream.blocks if block.name not in dropped]
        self.blocks = {block.name: number for number, block in enumerate(kept)}
        self.count = len(self.blocks) + len(self.rest)
        self.dropped = dropped

    def report(self, block: Block) -> dict[str, Any] | None:
        """What was reported about a finished block, or None."""
        return self.work.read(self._report_name(block))

    def shard(self, block: Block) -> Checkpoint:
        """The finished shard of a block."""
        return Checkpoint.of_shard(self.work.checkpoint / self._file(self.blocks[block.name]))

    def block(
        self,
        block: Block,
        report: Mapping[str, Any],
        changed: Iterable[str] | None = None,
        cuts: Mapping[str, Sequence[Cut]] | None = None,
        orders: Mapping[str, Tensor] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        """Write a changed block's shard and orders of columns, and after them its report, which makes it finished.

        Args:
            block: loaded.
            report: what was done to it.
            changed: dotted paths of its parameters that differ from the checkpoint; its matrices unless given.
            cuts: what was cut from them, if they are smaller now.
            orders: parameter -> order of its columns, where the pattern made one.
            splits: parameter that was made -> the one in whose place it stands.
        """
        changed = {slot.parameter for slot in block.slots} if changed is None else changed
        tensors = self._renamed(block, self.weights.export(block.name, changed, cuts, splits))
        self.work.write_tensors(f"checkpoint/{self._file(self.blocks[block.name])}", tensors)
        stored = {name: order.to("cpu", torch.int32) for name, order in self._on_disk(orders or {}).items()}
        if stored:
            self.work.write_tensors(self._orders_name(block), stored)
        self.work.write(self._report_name(block), report)

    def outside(self, changed: Iterable[str] = (), added: Mapping[str, Tensor] | None = None) -> None:
        """Write what lies outside of blocks, and blocks that the calibration never reached, as it was.

        Args:
            changed: dotted paths of loaded parameters outside of blocks that differ from the checkpoint.
            added: tensors that the checkpoint did not hold (an untied head), by their names on disk.
        """
        for number, names in enumerate(self.rest, start=len(self.blocks)):
            tensors = self.weights.export_outside(names, changed)
            tensors |= dict(added or {}) if number == self.count - 1 else {}
            self.work.write_tensors(f"checkpoint/{self._file(number)}", tensors)
        for block in self.job.stream.blocks:
            if block.name not in self.dropped and self.report(block) is None:
                tensors = self._renamed(block, dict(self.weights.checkpoint.read(self.weights.sources(block.name))))
                self.work.write_tensors(f"checkpoint/{self._file(self.blocks[block.name])}", tensors)
        self._index()
        self._copy_files()
        kept = [block for block in self.job.stream.blocks if block.name not in self.dropped]
        found = [self.work.read_tensors(self._orders_name(block)) for block in kept]
        if orders := {name: order for part in found for name, order in (part or {}).items()}:
            self.work.write_tensors(f"checkpoint/{ORDERS}", orders)
        self._configure()

    def _configure(self) -> None:
        """Bring config.json in step with the shapes that were written."""
        reports = [self.report(block) or {} for block in self.job.stream.blocks if block.name not in self.dropped]
        reshaped = any(report.get("kept") or report.get("ranks") for report in reports)
        if not self.dropped and not reshaped:
            return
        gone: dict[str, set[int]] = {}
        for block in self.job.stream.blocks:
            if block.name in self.dropped:
                gone.setdefault(block.tower, set()).add(block.index)
        dense = self.job.checkpoint.folder
        self.work.write("checkpoint/config.json", without(dense, gone, self.job.recipe.trust_remote_code))
        if reshaped or self.loads != "transformers":
            self.loads = self._settled(self.work.checkpoint)
        if self.job.recipe.prune.portable and self.loads != "transformers":
            raise RecipeError(
                "--portable: the blocks of the result differ, and no stock class holds them. Prune the dense model, or "
                "leave --portable out: prunus export --portable can then fill narrower blocks up with zeros."
            )

    def _settled(self, folder: Path) -> str:
        """Describe blocks that may differ; where even the modelling file does not fit, prunus alone loads them."""
        try:
            settled = settle(folder)
        except PrunusError as problem:
            self.job.warnings.append(f"Only prunus loads the result: {problem}")
            return "prunus"
        if settled["relabelled"]:
            name, former = settled["class"], settled["relabelled"]
            self.job.warnings.append(f"config.json names {name}, which computes the same and fits; it was {former}.")
        return "transformers" if settled["stock"] else "code"

    def _renamed(self, block: Block, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block under its new number, where blocks before it were dropped."""
        before = sum(
            other.tower == block.tower and other.index < block.index
            for other in self.job.stream.blocks
            if other.name in self.dropped
        )
        if not before:
            return tensors
        last = block.tower.rpartition(".")[2]
        old, new = f"{last}.{block.index}.", f"{last}.{block.index - before}."
        odd = next((name for name in tensors if name.count(old) != 1), None)
        if odd is not None:
            raise ModelError(f"{odd}: the number of its block cannot be told from the name; no block can be dropped.")
        return {name.replace(old, new): value for name, value in tensors.items()}

    def parameters(self) -> int:
        """Number of weights that were written."""
        return sum(math.prod(stored.shape) for stored in Checkpoint.open(self.work.checkpoint).tensors.values())

    def probe(self, inputs: Inputs, logits: Tensor) -> Path:
        """Write what the fresh process compares with; returns the file."""
        tensors = {f"input.{name}": value.contiguous() for name, value in inputs.items()}
        self.work.write_tensors("probe.safetensors", {**tensors, "logits": logits.contiguous()})
        return self.work.folder / "probe.safetensors"

    def describe(self, result: Mapping[str, Any]) -> None:
        """Write `prunus.json` and the model card."""
        record = {
            "format": 1,
            "recipe": self.job.recipe.resolved(),
            "fingerprint": self.job.fingerprint,
            "budget": self.work.read("budget.json"),
            "result": result,
        }
        self.work.write("checkpoint/prunus.json", record)
        (self.work.checkpoint / "README.md").write_text(
            model_card(dict(result), self.job.recipe.resolved()), encoding="utf-8"
        )

    def _index(self, *more: Path) -> None:
        files = [self.work.checkpoint / self._file(number) for number in range(self.count)]
        stored = [Checkpoint.of_shard(file) for file in (*files, *more)]
        where = {name: tensor.file.name for shard in stored for name, tensor in shard.tensors.items()}
        total = sum(shard.bytes for shard in stored)
        self.work.write(f"checkpoint/{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})

    def _copy_files(self) -> None:
        folder = self.job.checkpoint.folder
        for path in sorted(folder.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in DROPPED) and not path.name.startswith("."):
                shutil.copyfile(path, self.work.checkpoint / path.name)
        if (folder / "additional_chat_templates").is_dir():
            target = self.work.checkpoint / "additional_chat_templates"
            shutil.copytree(folder / "additional_chat_templates", target, dirs_exist_ok=True)

    def _groups(self, names: list[str]) -> list[list[str]]:
        """Tensors outside of blocks in shards no larger than the largest tensor or block, so that memory stays flat."""
        size = {name: self.weights.checkpoint.tensors[name].bytes for name in names}
        per_block = [
            sum(self.weights.checkpoint.tensors[n].bytes for n in self.weights.sources(b)) for b in self.blocks
        ]
        limit = max([*size.values(), *per_block])
        groups: list[list[str]] = []
        for name in names:
            if not groups or sum(size[member] for member in groups[-1]) + size[name] > limit:
                groups.append([])
            groups[-1].append(name)
        return groups

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.count:05d}.safetensors"

    def _on_disk(self, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Orders by names on disk, of parameters that are one tensor there."""
        names = {targets: name for name, targets in self.weights.targets.items() if name not in self.weights.converted}
        return {names[(parameter,)]: order for parameter, order in orders.items() if (parameter,) in names}

    def _orders_name(self, block: Block) -> str:
        return f"done/{self.blocks[block.name]:05d}.safetensors"

    def _report_name(self, block: Block) -> str:
        return f"done/{self.blocks[block.name]:05d}.json"
