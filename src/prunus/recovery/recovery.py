"""What every recovery promises: it fills the work folder with a checkpoint whose pruned weights are still zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from prunus.progress import Progress
    from prunus.recipe import RecoverPart
    from prunus.recovery.job import RecoveryJob


@dataclass
class Outcome:
    """What a recovery has done, after its blocks and what lies outside of them are written.

    Attributes:
        trainable: number of values that were trained (of a local method: in all blocks together).
        before: held-out loss of the pruned model, nats a token.
        after: held-out loss of the recovered model as it was written.
        logits: of `job.probe`, computed from the weights as written; float32 on the CPU.
        facts: JSON values for the report: steps, learning rate, errors by block.
    """

    trainable: int
    before: float
    after: float
    logits: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


class Recovery(Protocol):
    """A way back to quality that keeps the zeros; a frozen dataclass whose fields are its hyper-parameters.

    `recover` trains, writes every block with `job.output.block`, what lies outside with `job.output.outside`, and
    leaves the rest (masks, index, description, verification, publishing) to `run.recover`. It must be able to go on
    from whatever it has put into `job.work` when it was killed. It must write +0.0 wherever `job.masks` is False.

    Attributes:
        samples: sequences that are learnt from unless the user says how many; None: all that there are.
    """

    samples: ClassVar[int | None]

    @property
    def paper(self) -> str:
        """Title or authors, year and arXiv number; empty if there is none."""
        ...

    def needs_dense(self, part: RecoverPart) -> bool:
        """Whether it looks at the dense model; another one then gives another result."""
        ...

    def reads(self) -> dict[str, Any]:
        """Hashes of files of its own that decide the result; JSON values, empty if there are none."""
        ...

    def check(self, job: RecoveryJob) -> None:
        """Refuse, before any work, what can be refused.

        Raises:
            PrunusError: the model, the settings or the memory do not allow this recovery.
        """
        ...

    def recover(self, job: RecoveryJob, progress: Progress) -> Outcome:
        """Do it.

        Raises:
            PrunusError: the training failed in a way that is the user's to mend.
        """
        ...
