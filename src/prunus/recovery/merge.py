"""Merging a LoRA adapter into a pruned model without losing a zero, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prunus.errors import FormatError, ModelError
from prunus.recipe import RecoverPart, recipe
from prunus.recovery.peft_parts import add_masked, layers, load_peft
from prunus.recovery.recovery import Outcome
from prunus.recovery.retrain import write
from prunus.recovery.student import Student, loaded, probe_logits
from prunus.recovery.training import judged, micro_rows

# What peft's own form of an adapter consists of.
FILES = ("adapter_config.json", "adapter_model.safetensors")

# Settings of a LoRA adapter that change more than W + B·A.
MORE_THAN_LORA = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")

if TYPE_CHECKING:
    from prunus.progress import Progress
    from prunus.recovery.job import RecoveryJob


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    verify: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge a LoRA adapter into the pruned `model` under its masks, into the new folder `out`.

    Args:
        model: the pruned folder.
        adapter: folder of the adapter.
        out: the folder to make.
        verify: as of `Merge`.
        restart: forget unfinished work of whatever else was to become `out`.
        overwrite: replace an existing `out`.
        progress: told when it is done.

    Returns:
        What `prunus merge --json` prints: as of `prunus recover`, with `training.merge_gap`.

    Raises:
        PrunusError: the model or the adapter cannot be read, or they do not fit.
    """
    from prunus.recovery.run import recover

    asked = recipe({"model": str(model), "out": str(out), "recover": {"method": "merge", "batch": 1, "heldout": 8}})
    work = Merge(str(adapter), verify)
    return recover(asked, Path(out), recovery=work, restart=restart, overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class Merge:
    """W + P∘ΔW for every matrix that the adapter changes; what ΔW does at removed weights is lost, and reported.

    Attributes:
        adapter: folder of a peft LoRA adapter (adapter_config.json and adapter_model.safetensors).
        verify: also measure how far the merge moves the logits, and what a plain merge would have left of the zeros.
        paper: none.
    """

    adapter: str
    verify: bool = False
    paper: str = ""

    samples: ClassVar[int | None] = None

    def check(self, job: RecoveryJob) -> None:
        """See that the folder is a LoRA adapter in safetensors form.

        Raises:
            ModelError: it is not.
        """
        folder = Path(self.adapter)
        for name in FILES:
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder} is no LoRA adapter that can be read: {name} is missing. Pickled adapters are not "
                    "opened; save it as safetensors."
                )
        self._config()

    def needs_dense(self, part: RecoverPart) -> bool:
        """Never."""
        return False

    def reads(self) -> dict[str, Any]:
        """The adapter."""
        files = [Path(self.adapter) / name for name in FILES]
        return {"adapter": {file.name: sha256(file.read_bytes()).hexdigest() for file in files}}

    def recover(self, job: RecoveryJob, progress: Progress) -> Outcome:
        """Merge and write; held-out losses are those of the pruned and of the merged model."""
        progress.stage("merge", 1)
        micro, inputs = micro_rows(job) * job.lessons.train.ids.shape[1], job.probe.inputs
        with loaded(job.stream.weights):
            student = Student(job.model, job.blocks, job.masks, job.stream.weights)
            before = judged(job, student, micro)
            self._put_on(student)
            adapted = probe_logits(student.model, inputs) if self.verify else None
            facts, trainable = self._merge(student)
            changed = student.settle()
            logits = probe_logits(student.model, inputs)
            if adapted is not None:
                facts["merge_gap"] = float((logits - adapted).abs().max() / adapted.abs().max())
            after = judged(job, student, micro)
            job.processes.on_first(lambda: write(job, student, changed))
        progress.advance("merged")
        return Outcome(trainable, before, after, logits, facts)

    @torch.no_grad()
    def _merge(self, student: Student) -> tuple[dict[str, Any], int]:
        """Write every update into its matrix; returns facts, and the number of values in the adapter."""
        values, filled, found = 0, 0, layers(student)
        for slot, layer in found:
            delta = layer.get_delta_weight("default")
            gone = ~student.masks.keep(slot.info.name, delta.device)
            filled += int(slot.view(delta)[gone].count_nonzero())
            add_masked(student, slot, delta)
            values += sum(part.numel() for name, part in layer.named_parameters() if "base_layer." not in name)
        student.unwrap()
        total, removed = sum(map(student.masks.size, student.masks.packed)), student.masks.removed
        facts: dict[str, Any] = {"adapter": Path(self.adapter).name, "matrices": len(found)}
        if self.verify:
            facts |= {"sparsity_before": removed / total, "sparsity_of_plain_merge": (removed - filled) / total}
        return facts, values

    def _config(self) -> Any:
        peft = load_peft()
        try:
            config = peft.PeftConfig.from_pretrained(self.adapter)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise FormatError(f"{self.adapter}/adapter_config.json cannot be read: {str(error)[:200]}.") from None
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ModelError(f"{self.adapter} is an adapter of kind {config.peft_type}; only LoRA is merged so.")
        more = [name for name in MORE_THAN_LORA if getattr(config, name, None) not in (None, False, "none", [], {})]
        if more:
            raise ModelError(f"{self.adapter} sets {more[0]}, which is more than two factors and is not merged so.")
        return config

    def _put_on(self, student: Student) -> None:
        """Put the adapter around the model.

        Raises:
            ModelError: it fits no matrix, or changes something that is not a matrix of a block.
        """
        peft = load_peft()
        before = dict(student.model.named_modules())
        try:
            peft.inject_adapter_in_model(self._config(), student.model)
        except ValueError as error:
            raise ModelError(f"{self.adapter} does not fit this model: {str(error)[:300]}") from None
        known = {slot.info.name for slot, _ in layers(student)}
        changed = {name for name, module in student.model.named_modules() if hasattr(module, "get_delta_weight")}
        if changed - known:
            raise ModelError(f"{self.adapter} changes {min(changed - known)}, which is no matrix of a block.")
        state = peft.load_peft_weights(self.adapter, device=str(student.model.device))
        named = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        try:
            report = peft.set_peft_model_state_dict(student.model, named)
        except RuntimeError as error:
            raise ModelError(f"{self.adapter} does not fit this model: {str(error)[:300]}") from None
        if report.unexpected_keys:
            raise ModelError(f"{self.adapter} does not fit this model: it has {report.unexpected_keys[0]}.")
        student.wrapped |= {name: before[name] for name in known}
        student.model.requires_grad_(False)
