"""The unfinished state of a run, kept beside its output so that a killed run goes on where it stopped.

`OUT` appears only when it is whole, by one rename. Until then all lies in `.OUT.prunus` next to it:

    run.json        what is being done (the fingerprint)
    survey/         what an allocation has measured, block by block
    reverse/        gradients of the loss, block by block
    training/       a recovery's own state: checkpoints, the log, what was probed
    budget.json     the sparsity that the allocation gave every site
    published.json  written just before OUT appears
    done/           one report per finished block, written after its shard
    checkpoint/     what becomes OUT
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.errors import RecipeError

# Hashes in fingerprints, of which nobody wants to read more than that they differ.
HASHED = ("model.", "calibration", "dense.", "adapter.", "text", "heldout")


class Work:
    """A folder of unfinished work; one process at a time owns it.

    Attributes:
        out: where the finished checkpoint will be.
        folder: the unfinished work.
        checkpoint: what becomes `out`.
        reverse: gradients, and what the walk to them keeps.
        training: a recovery's own state.
    """

    def __init__(self, out: Path):
        """Name the folders; nothing is read or written."""
        self.out = out
        self.folder = out.parent / f".{out.name}.prunus"
        self.checkpoint = self.folder / "checkpoint"
        self.reverse = self.folder / "reverse"
        self.training = self.folder / "training"
        self._lock: Any = None

    @property
    def published(self) -> bool:
        """True if an earlier run was killed after OUT appeared and before its work folder was removed."""
        return self.out.exists() and self.read("published.json") is not None and not self.checkpoint.exists()

    def begin(self, fingerprint: Mapping[str, Any], restart: bool) -> bool:
        """Take the folder, new or as an earlier run left it.

        Args:
            fingerprint: JSON values that decide the result; an unfinished run with others is not continued.
            restart: forget an unfinished run.

        Returns:
            True if there is unfinished work to continue.

        Raises:
            RecipeError: another process owns the folder, or the unfinished run was of something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        replaced = self.folder / "replaced"
        if replaced.exists() and not self.out.exists():
            replaced.replace(self.out)  # an earlier run was killed while it put the new folder in the old one's place
        if restart:
            self._clear()
        before = self.read("run.json")
        if before is None:
            self._clear()  # what a folder without its description holds belongs to nobody
        if before is not None and before != dict(fingerprint):
            raise RecipeError(
                f"{self.folder} holds an unfinished run of something else ({_differences(before, fingerprint)}). "
                "Run the command that began it to continue, or add --restart to forget it."
            )
        for name in ("survey", "reverse", "training", "done", "checkpoint"):
            (self.folder / name).mkdir(exist_ok=True)
        self.write("run.json", dict(fingerprint))
        return before is not None

    def write(self, name: str, value: Any) -> None:
        """Write JSON beside and rename, so that a file is whole or absent."""
        self._replace(self.folder / name, json.dumps(value, indent=1, allow_nan=False).encode())

    def read(self, name: str) -> Any:
        """The JSON written under this name, or None."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file beside and rename; it is on disk when this returns."""
        path = self.folder / name
        beside = path.with_name(f"{path.name}.partial")
        save_file(dict(tensors), beside, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; the lock has the mode that the user's umask gives.
        beside.chmod(S_IMODE((self.folder / "lock").stat().st_mode))
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
        _sync(path.parent)

    def has(self, name: str) -> bool:
        """Whether a file of this name is there, and so whole."""
        return (self.folder / name).is_file()

    def remove(self, name: str) -> None:
        """Delete a file that is no longer needed."""
        (self.folder / name).unlink(missing_ok=True)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors written under this name, or None."""
        path = self.folder / name
        return load_file(path) if path.is_file() else None

    def publish(self, overwrite: bool) -> None:
        """Make the checkpoint appear as OUT; an old OUT is removed only once the new one stands in its place.

        Raises:
            RecipeError: OUT appeared meanwhile and may not be replaced; the finished work stays.
        """
        if self.out.exists() and not overwrite:
            raise RecipeError(
                f"OUT {self.out} appeared while this run was working. The finished result waits in {self.checkpoint}; "
                "move OUT away, or give the same command with --overwrite."
            )
        self.write("published.json", self.read("run.json"))
        if self.out.exists():
            self.out.replace(self.folder / "replaced")
        self.checkpoint.replace(self.out)
        _sync(self.out.parent)
        self.close(remove=True)

    def close(self, remove: bool = False) -> None:
        """Give the folder free; with `remove`, delete it."""
        if remove:
            # First the descriptions: what is left if this is killed half-way is known to be nobody's.
            for name in ("run.json", "published.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close_refused(self) -> None:
        """Remove the folder if this run took it and did nothing in it yet: a refusal is not worth continuing."""
        parts = (self.folder / name for name in ("survey", "reverse", "training", "done", "checkpoint"))
        if self._lock is not None and not any(file for part in parts for file in part.glob("*")):
            self.close(remove=True)

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("w")
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise RecipeError(
                f"Another prunus process is writing {self.out}. Wait for it, or choose another OUT."
            ) from None

    def _clear(self) -> None:
        for name in ("run.json", "published.json"):
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _replace(self, path: Path, content: bytes) -> None:
        beside = path.with_name(f"{path.name}.partial")
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Put the names in a folder on disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed between two fingerprints, in words; what the user wrote comes first, hashes are not shown."""
    one, other = _flat(before), _flat(now)
    names = sorted((name for name in one | other if one.get(name) != other.get(name)), key=lambda n: "recipe" not in n)
    words = [
        f"{name} changed" if name.startswith(HASHED) else f"{name}: {one.get(name)} → {other.get(name)}"
        for name in names
    ]
    return "; ".join(words[:4]) + ("; …" if len(words) > 4 else "") or "begun by another version of prunus"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat
