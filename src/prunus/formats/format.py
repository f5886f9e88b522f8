"""The contract of an export format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Settings:
    """What the user asked of a format; a format is only given what it says it takes.

    Attributes:
        portable: only what stock tools load, without any code in the folder.
        type: number format of the weights in the file; None: as they are stored.
        trust_remote_code: run Python code that the source folder brings along.
    """

    portable: bool = False
    type: str | None = None
    trust_remote_code: bool = False


class Format(Protocol):
    """Turns a model folder into another form, and proves that the result computes the same."""

    @property
    def line(self) -> str:
        """What it is, in one line, for the documents."""
        ...

    @property
    def suffix(self) -> str | None:
        """The ending of the file if the result is one, such as ".gguf"; None if it is a folder."""
        ...

    @property
    def types(self) -> tuple[str, ...]:
        """The values of `--type` that it can write; empty if it keeps what is stored."""
        ...

    @property
    def portable(self) -> bool:
        """Whether `--portable` means anything to it."""
        ...

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """Write the model of `source` to `out`, a new path that is renamed afterwards, and check it by reloading.

        Args:
            source: a local model folder, checked by `models.source.locate`.
            out: a file or a folder that does not exist yet, beside its final place.
            settings: what the user asked for.

        Returns:
            JSON values for the report; `check` holds what the reload compared, `notes` sentences for the user.

        Raises:
            PrunusError: the format cannot carry this model (the sentence says what could), or the reload differs.
        """
        ...
