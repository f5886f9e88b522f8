"""The checkpoint that a run leaves: an ordinary Hugging Face folder under the original names and dtypes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunus.capture import Inputs
from prunus.card import model_card
from prunus.job import Job
from prunus.models.checkpoint import INDEX, Checkpoint
from prunus.models.source import PICKLES
from prunus.sites import Block

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob

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

    def report(self, block: Block) -> dict[str, Any] | None:
        """What was reported about a finished block, or None."""
        return self.work.read(self._report_name(block))

    def shard(self, block: Block) -> Checkpoint:
        """The finished shard of a block."""
        return Checkpoint.of_shard(self.work.checkpoint / self._file(self.blocks[block.name]))

    def block(self, block: Block, report: Mapping[str, Any], changed: Iterable[str] | None = None) -> None:
        """Write a changed block's shard, and after it its report, which makes it finished.

        Args:
            block: loaded.
            report: JSON values.
            changed: dotted paths of its parameters that differ from the checkpoint; its matrices unless given.
        """
        changed = {slot.parameter for slot in block.slots} if changed is None else changed
        tensors = self.weights.export(block.name, changed)
        self.work.write_tensors(f"checkpoint/{self._file(self.blocks[block.name])}", tensors)
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
            if self.report(block) is None:
                tensors = dict(self.weights.checkpoint.read(self.weights.sources(block.name)))
                self.work.write_tensors(f"checkpoint/{self._file(self.blocks[block.name])}", tensors)
        self._index()
        self._copy_files()

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

    def _index(self) -> None:
        stored = [Checkpoint.of_shard(self.work.checkpoint / self._file(number)) for number in range(self.count)]
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

    def _report_name(self, block: Block) -> str:
        return f"done/{self.blocks[block.name]:05d}.json"
