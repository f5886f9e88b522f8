"""Weights between disk and model, one block at a time.

transformers 5 renames and converts tensors while it loads (Mixtral's 8 × 3 expert files become two tensors). That is
not imitated: the library's own functions are called with the tensors of one block. They are not a documented API, so
they are used in this file alone, and every block is checked: what was loaded, converted back, must be what was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from prunus.errors import ModelError
from prunus.memory import release
from prunus.models.checkpoint import Checkpoint

# Axis of a stored tensor, and the indices that were kept.
Cut = tuple[int, Tensor]


class Weights:
    """Loads, drops and exports the weights of a model whose parameters begin on the meta device.

    Attributes:
        model: the model, changed in place by `load` and `drop`.
        checkpoint: where its tensors lie.
        device: where loaded tensors go.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device):
        """Map every tensor on disk to the parameter or buffer that it becomes.

        Raises:
            ModelError: a parameter of the model is in no shard.
        """
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.mapping: Any = get_model_conversion_mapping(model)
        self.targets, self.converted = disk_targets(model, checkpoint.tensors, self.mapping)
        self._refuse_missing()

    def sources(self, prefix: str) -> list[str]:
        """Names on disk of all tensors that end below a dotted path of the model."""
        return [name for name, targets in self.targets.items() if _below(targets[0], prefix)]

    def outside(self, prefixes: Iterable[str]) -> list[str]:
        """Names on disk of all tensors that end below none of the dotted paths, unknown ones included."""
        prefixes = list(prefixes)
        return [name for name, targets in self.targets.items() if not any(_below(targets[0], p) for p in prefixes)]

    def known(self, names: Iterable[str]) -> list[str]:
        """Those tensors on disk that the model has a place for."""
        places = self.model.state_dict().keys()
        return [name for name in names if self.targets[name][0] in places]

    def load(self, names: Iterable[str], checkpoint: Checkpoint | None = None) -> None:
        """Read tensors and put them where they belong, converted as transformers would.

        Args:
            names: names on disk.
            checkpoint: read from here instead, for blocks that are already pruned.

        Raises:
            ModelError: a tensor has another shape than the model, holds NaN or infinity, or cannot be converted.
        """
        state = dict(_finite((checkpoint or self.checkpoint).read(names), self.model.dtype))
        config = LoadStateDictConfig(
            weight_mapping=self.mapping,
            device_map={"": self.device},
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
        )
        with _quiet_progress():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        self.model.requires_grad_(False)  # only a reverse walk wants gradients, and of a few matrices
        for name, found, expected in info.mismatched_keys:
            raise ModelError(f"{name}: the checkpoint has the shape {tuple(found)}, the config {tuple(expected)}.")
        for name, error in info.conversion_errors.items():
            raise ModelError(f"{name}: transformers could not convert it while loading: {error}")

    def is_converted(self, parameter: str) -> bool:
        """Whether a parameter is made of tensors on disk by more than a new name."""
        return any(parameter in self.targets[name] for name in self.converted)

    def drop(self, module: nn.Module) -> None:
        """Put the parameters of a module back on the meta device; buffers stay."""
        for child in module.modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None and parameter.device.type != "meta":
                    empty = torch.empty_like(parameter, device="meta")
                    child._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        release()

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which a parameter of the model lies on disk."""
        return next(self.checkpoint.tensors[name].dtype for name in self._members(parameter))

    def export(
        self,
        prefix: str,
        changed: Iterable[str],
        cuts: Mapping[str, Sequence[Cut]] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors below a dotted path as they shall lie on disk, under their original names and dtypes.

        Args:
            prefix: dotted path of a loaded block.
            changed: its parameters that differ from the checkpoint; all other tensors are copied as they lie there.
            cuts: parameter → what was cut from it, for those that have another shape than in the checkpoint.
            splits: parameter that was made → the one of the checkpoint in whose place it stands, alone on disk.

        Raises:
            ModelError: converting back does not give the tensors that were read; nothing can be saved safely then.
        """
        changed = set(changed)
        new = self._reverted(prefix, changed) if changed else {}
        cut = {name: cuts[target] for name in new if (target := self._target(name)) in cuts} if cuts else {}
        for name, value in new.items():
            stored = self.checkpoint.tensors.get(name)
            made = stored is None and name.endswith(".bias") and cuts is not None
            if not made and (stored is None or (stored.shape != tuple(value.shape) and name not in cut)):
                raise ModelError(
                    f"{prefix}: transformers' conversion gives {name}, which the checkpoint does not hold."
                )
        # What was changed in the dtype on disk need not be read again.
        gone = set((splits or {}).values())
        kept = [
            name
            for name in self.sources(prefix)
            if name not in new and not self._fewer(name, cuts) and self._target(name) not in gone
        ]
        known = self.checkpoint.tensors
        narrowed = [name for name, value in new.items() if name in known and value.dtype != known[name].dtype]
        tensors = {**dict(self.checkpoint.read(kept)), **{name: value.cpu() for name, value in new.items()}}
        for name, stored in self.checkpoint.read(narrowed):
            if self._fewer(name, cuts):
                tensors[name] = tensors[name].to(stored.dtype)  # an expert that stays, as it was
                continue
            for axis, index in cut.get(name, ()):
                stored = stored.index_select(axis, index.cpu())
            tensors[name] = _stored_or_new(stored, tensors[name])
        for name in tensors.keys() - known.keys():  # a bias that was made is stored as its matrix is
            tensors[name] = tensors[name].to(known[f"{name.removesuffix('bias')}weight"].dtype)
        tensors |= self._split(splits or {})
        return {name: value.contiguous() for name, value in tensors.items()}

    def _split(self, splits: Mapping[str, str]) -> dict[str, Tensor]:
        """Parameters that were made, under names and in dtypes that follow from those they stand for."""
        state = self.model.state_dict() if splits else {}
        tensors = {}
        for made, old in splits.items():
            (name,) = self._members(old)
            module, _, last = old.rpartition(".")
            path = name.removesuffix(last) + made.removeprefix(f"{module}.")
            tensors[path] = state[made].to("cpu", self.checkpoint.tensors[name].dtype)
        return tensors

    def export_outside(self, names: Iterable[str], changed: Iterable[str] = ()) -> dict[str, Tensor]:
        """Tensors outside of blocks as they shall lie on disk.

        Args:
            names: names on disk.
            changed: dotted paths of loaded parameters that differ from the checkpoint.

        Raises:
            ModelError: a changed parameter is made of several tensors on disk; that happens inside of blocks only.
        """
        changed, tensors = set(changed), dict(self.checkpoint.read(names))
        state = self.model.state_dict() if changed else {}
        for name in tensors:
            if changed.isdisjoint(self.targets[name]):
                continue
            if name in self.converted:
                raise ModelError(f"{name}: is converted while loading, so that it cannot be changed outside of blocks.")
            tensors[name] = _stored_or_new(tensors[name], state[self.targets[name][0]].cpu()).contiguous()
        return tensors

    def _fewer(self, name: str, cuts: Mapping[str, Sequence[Cut]] | None) -> bool:
        """Whether a tensor on disk is of an expert whose stack is smaller now: those that stay are numbered anew."""
        return bool(cuts) and name in self.converted and any(target in cuts for target in self.targets[name])

    def check_reversible(self, prefix: str) -> None:
        """See that a freshly loaded block, converted back, is what was read.

        Raises:
            ModelError: it is not; the model cannot be saved under its original names.
        """
        converted = [name for name in self.sources(prefix) if name in self.converted]
        if not converted:
            return
        reverted = self._reverted(prefix, {target for name in converted for target in self.targets[name]})
        for name, stored in self.checkpoint.read(reverted.keys() & self.checkpoint.tensors.keys()):
            value = reverted.pop(name).to(device="cpu", dtype=stored.dtype)
            if not torch.equal(value, stored):
                raise ModelError(f"{name}: cannot be saved under its name, transformers' conversion is not reversible.")
        if reverted:
            raise ModelError(f"{prefix}: transformers' conversion gives {min(reverted)}, which is not on disk.")

    def _reverted(self, prefix: str, parameters: set[str]) -> dict[str, Tensor]:
        """Parameters of a block under their names on disk, in the dtype of the model."""
        plain = {self.targets[name][0]: name for name in self.sources(prefix) if name not in self.converted}
        state = {name: value for name, value in self.model.state_dict().items() if _below(name, prefix)}
        # A bias that was made lies beside its matrix.
        for name in parameters - plain.keys():
            weight = f"{name.removesuffix('bias')}weight"
            if name.endswith(".bias") and weight in plain and name not in self._made_of:
                plain[name] = f"{plain[weight].removesuffix('weight')}bias"
        result = {plain[name]: state[name] for name in parameters if name in plain}
        fused = {name: value for name, value in state.items() if name not in plain and value.device.type != "meta"}
        if fused and not parameters <= plain.keys():
            result |= revert_weight_conversion(self.model, fused)
        return result

    @property
    def _made_of(self) -> set[str]:
        """Parameters that tensors on disk become."""
        return {target for targets in self.targets.values() for target in targets}

    def _target(self, name: str) -> str:
        """The parameter that a tensor on disk becomes, alone."""
        return self.targets[name][0] if name in self.targets else ""

    def _members(self, parameter: str) -> Iterator[str]:
        """Names on disk of the tensors that a parameter is made of."""
        return (name for name, targets in self.targets.items() if parameter in targets)

    def _refuse_missing(self) -> None:
        have = {target for targets in self.targets.values() for target in targets}
        for name, _ in self.model.named_parameters():
            if name not in have and name not in self.model.all_tied_weights_keys:
                raise ModelError(f"{self.checkpoint.folder}: no shard holds {name}, which the config promises.")


def disk_targets(
    model: PreTrainedModel, names: Iterable[str], mapping: list
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Name on disk → the parameters made of it, and the names that are converted, not only renamed."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parts = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    meta = model.state_dict()
    targets: dict[str, tuple[str, ...]] = {}
    converted = set()
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if target not in meta and name in meta:
            target, pattern = name, None
        targets[name] = (target,)
        if pattern is not None and target in meta:
            converted.add(name)
            targets[name] = tuple(target.replace(parts[pattern][0], part) for part in parts[pattern])
    return targets, converted


def _stored_or_new(stored: Tensor, value: Tensor) -> Tensor:
    """The new values in the stored dtype; those that were not changed keep all their bits.

    Blocks may be computed in a narrower dtype than the checkpoint's. A weight that still is what the stored one became
    there was not changed by the method, and stays as it was.
    """
    unchanged = (value == stored.to(value.dtype)) & (value != 0)
    return torch.where(unchanged, stored, value.to(stored.dtype))


def _finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        # The sum of finite floats overflows only where single values are absurd; then the slow test decides.
        suspicious = tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32))
        if suspicious and not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{name}: holds NaN or infinite weights. Mend or replace the checkpoint.")
        if dtype == torch.float16 and tensor.is_floating_point() and float(tensor.float().abs().max()) > 65504:
            raise ModelError(f"{name}: has weights beyond the range of float16. Use --dtype bfloat16 or float32.")
        yield name, tensor


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Silence the library's bar for every single block, and restore the user's choice after it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
