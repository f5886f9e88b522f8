"""What a recovery of the whole model can train: sets of its own parameters, and adapters put around its matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from prunus.recovery.student import Student

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Part(Protocol):
    """One thing that is trained; a frozen dataclass whose fields are its hyper-parameters.

    A part that never trains all of its parameters at a time says so by `resting(student)`, the bytes of gradients and
    moments that it spares, and `begun(student)`, a context in which only what is trained first has gradients. One that
    is not merged where there are zeros has `kept_apart` and `save`.

    Attributes:
        name: under which its settings are given, as in `masklora.rank`.
    """

    name: ClassVar[str]

    def attach(self, student: Student) -> None:
        """Choose or create parameters and have them trained (`student.train`); nothing else may change.

        Raises:
            PrunusError: the model does not allow it.
        """
        ...

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """What has to happen between optimizer steps."""
        ...

    def merge(self, student: Student) -> None:
        """Write what was learnt into the model's own weights, and name those in `student.merged`."""
        ...
