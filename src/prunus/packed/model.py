"""A packed folder as a model of transformers: for every architecture, on every device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prunus.errors import ModelError
from prunus.evaluation.loading import DTYPES, check_device, check_dtype
from prunus.models.checkpoint import Stored
from prunus.models.quiet import quiet
from prunus.models.skeleton import skeleton
from prunus.models.weights import Weights
from prunus.packed.folder import PLAIN, PackedFolder

LOGGER = logging.getLogger("prunus")


@dataclass(frozen=True)
class Restored:
    """A packed folder with the face of a `Checkpoint`: its tensors as they were, made when they are read."""

    packed: PackedFolder

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.packed.folder

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Dtype and shape in the Hugging Face folder."""
        return {
            name: Stored(self.folder, PLAIN[entry.dtype], entry.shape, 0) for name, entry in self.packed.entries.items()
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, one at a time."""
        for name in names:
            yield name, self.packed.dense(name)


def load_dense(folder: Path, *, device: str = "cpu", dtype: str = "auto", keep: Iterable[str] = ()) -> PreTrainedModel:
    """The model with all weights unpacked, in evaluation mode.

    Args:
        folder: a packed folder.
        device: where it shall run.
        dtype: float32, bfloat16, float16 or auto (float32 on a CPU, else that of the largest part of the files).
        keep: names on disk of tensors to leave on the meta device.

    Raises:
        FormatError: the folder is damaged.
        ModelError: its config.json is of another model.
        RecipeError: unusable device or dtype.
    """
    packed = PackedFolder.open(folder)
    place = check_device(device)
    kind = check_dtype(dtype, place)
    kind = DTYPES[main_dtype(packed)] if isinstance(kind, str) else kind
    model = skeleton(folder, kind)
    with quiet():
        weights = Weights(model, Restored(packed), place)  # type: ignore[arg-type]
        known, left = weights.known(packed.entries), set(keep)
        check_places(packed, known)
        weights.load(name for name in known if name not in left)
        model.tie_weights()
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = True
    model.generation_config = generation_config(folder) or model.generation_config
    return model.eval()


def check_places(packed: PackedFolder, known: Collection[str]) -> None:
    """See that the configuration has a place for every packed matrix: what it has none for is left out unsaid.

    Args:
        packed: the folder.
        known: names of tensors that become part of the model.

    Raises:
        ModelError: it has not, as where it counts fewer blocks.
    """
    lost = next((name for name, entry in packed.entries.items() if entry.form == "packed" and name not in known), None)
    if lost is not None:
        raise ModelError(
            f"{packed.folder}: the configuration has no place for {lost}. Its config.json does not belong to its "
            "weights."
        )


def generation_config(folder: Path) -> GenerationConfig | None:
    """What the folder says of generating; None if it says nothing.

    Raises:
        ModelError: the file is damaged.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as problem:  # any: a damaged file fails in whatever way it comes to
        raise ModelError(
            f"{folder / 'generation_config.json'} cannot be read ({str(problem)[:200]}). Copy it again, or remove it."
        ) from None


def main_dtype(packed: PackedFolder) -> str:
    """The dtype of most weights of the folder that was packed."""
    size: dict[str, int] = {}
    for entry in packed.entries.values():
        if entry.dtype in DTYPES:
            size[entry.dtype] = size.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return max(size, key=lambda name: size[name], default="float32")


def load(folder: Path, *, device: str = "cpu", dtype: str = "auto") -> Any:
    """The loader of packed folders for `prunus.load`: the fastest way that this machine and the architecture allow.

    Returns:
        A `running.PackedModel` (the compiled engine); else a transformers model, with `SparseLinear`s where there are
        kernels, unpacked where there are none. A warning says which it is, if it is not the engine.

    Raises:
        PrunusError: the folder is damaged, or device or dtype cannot be used.
    """
    from prunus.packed.running import open_model, uncovered
    from prunus.runtime.native import absence, available

    native = available()
    if native is None or device != "cpu" or dtype not in ("auto", "float32"):
        why = absence() or f"the kernels run on the CPU in float32, not on {device} in {dtype}"
        LOGGER.warning(
            "%s is run by PyTorch with its weights unpacked, no faster than a dense model: %s.", folder.name, why
        )
        return load_dense(folder, device=device, dtype=dtype)
    problem = uncovered(folder)
    if problem is None:
        return open_model(folder)
    from prunus.packed.linear import load_sparse

    LOGGER.warning(
        "%s is run by transformers with sparse matrices, slower than the engine could: %s", folder.name, problem
    )
    return load_sparse(folder, native)
