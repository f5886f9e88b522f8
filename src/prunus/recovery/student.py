"""The whole pruned model in memory while it is trained, and the way back to the tensors on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus.models.weights import Weights
from prunus.recovery.masks import Masks, clear, violations
from prunus.recovery.rows import Rows
from prunus.sites import Block, Slot
from prunus.stream import first_output


@dataclass
class Student:
    """A model with the parameters that are trained, and what was put around its modules for that.

    Attributes:
        model: in memory, or on meta where only the number of parameters is asked for.
        blocks: its blocks with their matrices.
        masks: which weights are kept.
        weights: knows the tensors on disk.
        seed: of new parameters.
        wrapped: path of a module in the model → the module that stood there before.
        merged: dotted paths of parameters that a merge has changed.
        chosen: everything that is ever trained.
        in_place: matrices that are trained themselves, whose zeros must be kept while they are.
        added: tensors that the checkpoint does not hold yet, by their names on disk.
        config: entries of config.json that change.
        notes: what the user should know.
    """

    model: PreTrainedModel
    blocks: list[Block]
    masks: Masks
    weights: Weights | None = None
    seed: int = 0
    wrapped: dict[str, nn.Module] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    chosen: list[nn.Parameter] = field(default_factory=list)
    in_place: list[Slot] = field(default_factory=list)
    added: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def linears(self) -> list[tuple[Block, Slot]]:
        """The matrices that are modules of their own, which adapters can be put around; stacked experts are not."""
        return [(block, slot) for block in self.blocks for slot in block.slots if slot.expert is None]

    def train(self, parameter: nn.Parameter) -> None:
        """Train a parameter, in float32 whatever the forward passes use: small updates would be lost in 16 bits."""
        if parameter.device.type != "meta":
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        if not any(parameter is known for known in self.chosen):
            self.chosen.append(parameter)

    def trained(self) -> dict[str, nn.Parameter]:
        """All that is ever trained, by its names in the model as it is now, each once."""
        ids = {id(value) for value in self.chosen}
        return {name: value for name, value in self.model.named_parameters() if id(value) in ids}

    def active(self) -> int:
        """Number of values that are trained at the moment; removed weights do not count."""
        values = sum(value.numel() for value in self.chosen if value.requires_grad)
        slots = [slot for slot in self.in_place if getattr(slot.module, slot.attribute).requires_grad]
        return values - sum(self.masks.gone(slot.info.name) for slot in slots)

    def state(self) -> dict[str, Tensor]:
        """What training changes: the trained parameters, and running norms of adapters."""
        norms = {name: value for name, value in self.model.named_buffers() if name.endswith(".norm")}
        return {name: value.detach() for name, value in (self.trained() | norms).items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        own = self.state()
        assert own.keys() == state.keys(), own.keys() ^ state.keys()
        for name, value in own.items():
            value.copy_(state[name])

    def wrap(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of another."""
        self.wrapped.setdefault(path, self.model.get_submodule(path))
        self._place(path, module)

    def unwrap(self) -> None:
        """Put every module back that was there before; what was put around them is dropped."""
        for path, module in reversed(self.wrapped.items()):
            self._place(path, module)
        self.wrapped.clear()

    def enforce(self) -> None:
        """Set every removed weight of the matrices that are trained in place to +0.0."""
        with torch.no_grad():
            for slot in self.in_place:
                if getattr(slot.module, slot.attribute).requires_grad:
                    clear(slot.matrix(), self.masks)

    @torch.no_grad()
    def settle(self) -> set[str]:
        """Round what was changed to the dtype on disk, zeros exact; the model then computes what a reader will.

        Returns:
            Dotted paths of the parameters that differ from the checkpoint, under every name they have.
        """
        assert self.weights is not None and not self.wrapped
        changed = self.merged | self.trained().keys()
        parameters = dict(self.model.named_parameters())
        self.model.requires_grad_(False)
        for name in changed & parameters.keys():
            value = parameters[name]
            stored = self.model.dtype if name in self.added else self.weights.dtype(name)
            value.data = value.data.to(stored).to(self.model.dtype)
        for slot in (slot for block in self.blocks for slot in block.slots):
            removed, zero = violations(slot.matrix(), self.masks)
            if removed != zero:  # foreign checkpoints have -0.0 too
                clear(slot.matrix(), self.masks)
                changed.add(slot.parameter)
        # A tied tensor has several names, and the checkpoint holds it under one of them or under both.
        ids = {id(parameters[name]) for name in changed if name in parameters}
        self.added = {name: parameters[name].detach().to(self._stored(name)) for name in self.added}
        return {name for name, value in self.model.named_parameters(remove_duplicate=False) if id(value) in ids}

    def _stored(self, name: str) -> torch.dtype:
        """Dtype for a tensor that the checkpoint lacks: that of the embeddings."""
        assert self.weights is not None
        names = {id(value): key for key, value in self.model.named_parameters()}
        return self.weights.dtype(names[id(self.model.get_input_embeddings().weight)])

    def _place(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent) if parent else self.model, name, module)


@contextmanager
def loaded(weights: Weights) -> Iterator[PreTrainedModel]:
    """Inside the context the whole model is in memory; its parameters are put back on meta afterwards."""
    weights.load(weights.known(weights.targets))
    weights.model.tie_weights()
    try:
        yield weights.model
    finally:
        weights.drop(weights.model)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, rows: Rows, tokens: int) -> tuple[float, int]:
    """Sum of the losses of all labels, float64, and their number.

    Args:
        model: in memory; its mode is kept.
        rows: what it is judged by.
        tokens: at most in one forward pass.
    """
    training = model.training
    model.eval()
    total, count, step = 0.0, 0, max(1, tokens // rows.ids.shape[1])
    for start in range(0, len(rows), step):
        part = rows.take(slice(start, start + step))
        output = model(input_ids=part.ids.to(model.device), use_cache=False)
        total += float(row_losses(output.logits, part.labels.to(model.device)).double().sum())
        count += int((part.labels != -100).sum())
    model.train(training)
    return total, count


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of every label, float32 `[rows · (length - 1)]`, 0 where nothing is learnt."""
    wanted = labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, reduction="none")


@torch.no_grad()
def probe_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's first output on named inputs, float32 on the CPU."""
    training = model.training
    model.eval()
    output = first_output(model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False))
    model.train(training)
    return output.float().cpu()
