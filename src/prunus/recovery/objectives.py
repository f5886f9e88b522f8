"""What is minimised: the loss of the text, or the distance to the dense model's predictions and hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus.errors import ModelError, RecipeError
from prunus.evaluation.loading import load_model
from prunus.recovery.student import row_losses

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob

# `loss(model, inputs, count)`: inputs are `input_ids`, `labels` and `row` (numbers of the training rows); the sum over
# the labels of the micro-batch, divided by `count`, the number of labels in the whole step.
Loss = Any


class Objective(Protocol):
    """A frozen dataclass; its fields are its hyper-parameters, set as `objective.field`.

    Attributes:
        taught: whether the dense model says what is right.
    """

    name: ClassVar[str]
    taught: ClassVar[bool]

    def memory(self, job: RecoveryJob) -> int:
        """Bytes that it needs besides the student while training."""
        ...

    def ready(self, job: RecoveryJob) -> Loss:
        """Load or compute what it needs; returns the loss function.

        Raises:
            PrunusError: the dense model is missing or does not fit.
        """
        ...


@dataclass(frozen=True)
class Text:
    """Cross-entropy of the next token."""

    name: ClassVar[str] = "objective"
    taught: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def memory(self, job: RecoveryJob) -> int:
        """Nothing."""
        return 0

    def ready(self, job: RecoveryJob) -> Loss:
        """The loss."""

        def loss(model: nn.Module, inputs: dict[str, Tensor], count: Tensor) -> Tensor:
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            return row_losses(logits, inputs["labels"]).sum() / count

        return loss


@dataclass(frozen=True)
class Logits:
    """share·T²·KL(dense ‖ student) + (1 - share)·cross-entropy, over the tokens that are learnt.

    As for Minitron (Muralidharan et al. 2024, arXiv:2407.14679), with T = 1 and the divergence alone.

    Attributes:
        share: of the divergence, in (0, 1].
        temperature: T, by which both models' logits are divided; T² keeps the size of the gradients.
        top_k: 0: the dense model is in memory beside the student. k: its k largest probabilities for every token are
            computed once and kept on disk, all others count as one, and the two models never share the memory.
    """

    share: float = 1.0
    temperature: float = 1.0
    top_k: int = 0

    name: ClassVar[str] = "objective"
    taught: ClassVar[bool] = True
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: naming the fields.
        """
        if not (0 < self.share <= 1 and self.temperature > 0 and self.top_k >= 0):
            raise RecipeError("Distillation needs share in (0, 1], temperature above 0 and top_k of at least 0.")

    def memory(self, job: RecoveryJob) -> int:
        """The dense model, unless its predictions lie on disk."""
        return 0 if self.top_k else _bytes(job)

    def ready(self, job: RecoveryJob) -> Loss:
        """The loss, with the dense model in memory or its predictions on disk."""
        predicted = self._online(job) if self.top_k == 0 else self._cached(job)

        def loss(model: nn.Module, inputs: dict[str, Tensor], count: Tensor) -> Tensor:
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            return self.distance(logits, inputs["labels"], predicted(inputs)) / count

        return loss

    def distance(self, logits: Tensor, labels: Tensor, dense: tuple[Tensor, Tensor | None]) -> Tensor:
        """The sum over all labels.

        Args:
            logits: of the student, `[rows, length, vocabulary]`.
            labels: `[rows, length]`.
            dense: log-probabilities of the dense model at this temperature `[rows, length, k]`, and which tokens they
                are of `[rows, length, k]`; None for all, in order.
        """
        learnt = labels[:, 1:] != -100
        own = (logits[:, :-1][learnt].float() / self.temperature).log_softmax(-1)
        log_p, which = (None if part is None else part[:, :-1][learnt] for part in dense)
        assert log_p is not None
        divergence = kullback_leibler(log_p, own if which is None else own.gather(-1, which.long()), which is not None)
        total = self.share * self.temperature**2 * divergence
        return total if self.share == 1 else total + (1 - self.share) * row_losses(logits, labels).sum()

    def _online(self, job: RecoveryJob) -> Any:
        dense = teacher(job)

        @torch.no_grad()
        def predicted(inputs: dict[str, Tensor]) -> tuple[Tensor, None]:
            logits = dense(input_ids=inputs["input_ids"], use_cache=False).logits
            return (logits.float() / self.temperature).log_softmax(-1), None

        return predicted

    def _cached(self, job: RecoveryJob) -> Any:
        folder, rows = job.work.training / "dense", _used(job)  # asked by all processes: they agree on the plan
        job.processes.on_first(lambda: self._fill(job, folder, rows))

        def predicted(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            rows = [load_file(folder / f"{int(row):07d}.safetensors") for row in inputs["row"]]
            device = inputs["input_ids"].device
            return (
                torch.stack([row["log_p"] for row in rows]).to(device),
                torch.stack([row["token"] for row in rows]).to(device),
            )

        return predicted

    @torch.no_grad()
    def _fill(self, job: RecoveryJob, folder: Path, rows: list[int]) -> None:
        """Write the predictions for every row that will be learnt from; those that are there are kept."""
        folder.mkdir(exist_ok=True)
        missing = [row for row in rows if not (folder / f"{row:07d}.safetensors").is_file()]
        if not missing:
            return
        dense = teacher(job)
        for row in missing:
            ids = job.lessons.train.ids[row : row + 1].to(dense.device)
            log_p = (dense(input_ids=ids, use_cache=False).logits[0].float() / self.temperature).log_softmax(-1)
            best, token = log_p.topk(min(self.top_k, log_p.shape[-1]), dim=-1)
            beside = folder / f"{row:07d}.partial"
            save_file({"log_p": best.cpu().contiguous(), "token": token.int().cpu().contiguous()}, beside)
            beside.replace(folder / f"{row:07d}.safetensors")


def kullback_leibler(log_p: Tensor, log_q: Tensor, partial: bool) -> Tensor:
    """Σ p·(log p - log q) over `[tokens, k]`; if `partial`, what is not listed counts as one token more."""
    total = (log_p.exp() * (log_p - log_q)).sum()
    if not partial:
        return total
    rest_p, rest_q = ((1 - part.exp().sum(-1)).clamp_min(0.0) for part in (log_p, log_q))
    left = rest_p > 1e-6  # below, nothing but rounding is left
    # clamped: a student that is sure of the listed tokens has no mass left, and its logarithm no gradient
    return total + (rest_p[left] * (rest_p[left].log() - rest_q[left].clamp_min(1e-12).log())).sum()


@dataclass(frozen=True)
class Hidden:
    """Distillation of logits and of hidden states: that of `Logits` + weight·relative squared error.

    The states are compared where blocks were cut (the seams) and behind the last block; in a model of full depth behind
    every `every`-th. Which dense block a student's block comes from is seen from its norms, which pruning leaves as
    they are.

    Attributes:
        weight: of ‖h - h_dense‖² / ‖h_dense‖², summed over the places.
        every: blocks between two places in a model of full depth.
        share: as of `Logits`.
        temperature: as of `Logits`.
    """

    weight: float = 1.0
    every: int = 4
    share: float = 1.0
    temperature: float = 1.0

    name: ClassVar[str] = "objective"
    taught: ClassVar[bool] = True
    paper: ClassVar[str] = "Muralidharan et al. 2024, arXiv:2407.14679"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: naming the fields.
        """
        if not (self.weight >= 0 and self.every >= 1 and 0 < self.share <= 1 and self.temperature > 0):
            raise RecipeError("Hidden states need weight of at least 0, every of at least 1, share in (0, 1].")

    def memory(self, job: RecoveryJob) -> int:
        """The dense model."""
        return _bytes(job)

    def ready(self, job: RecoveryJob) -> Loss:
        """The loss, with the dense model in memory."""
        dense = teacher(job)
        places = list(seams(job.model, dense, [block.name for block in job.blocks], self.every))
        logits_part = Logits(self.share, self.temperature)

        def loss(model: nn.Module, inputs: dict[str, Tensor], count: Tensor) -> Tensor:
            own = model(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                other = dense(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=True)
                log_p = (other.logits.float() / self.temperature).log_softmax(-1)
            total = logits_part.distance(own.logits, inputs["labels"], (log_p, None))
            learnt = inputs["labels"] != -100
            for mine, theirs in places:
                total = total + self.weight * relative_error(
                    own.hidden_states[mine][learnt], other.hidden_states[theirs][learnt]
                )
            return total / count

        return loss


def relative_error(hidden: Tensor, dense: Tensor) -> Tensor:
    """Σ over tokens of ‖h - h_dense‖² / ‖h_dense‖², float32."""
    gap = (hidden.float() - dense.float()).square().sum(-1)
    return (gap / dense.float().square().sum(-1).clamp_min(1e-12)).sum()


def seams(student: PreTrainedModel, dense: PreTrainedModel, blocks: list[str], every: int) -> Iterator[tuple[int, int]]:
    """Places at which hidden states are compared: the number of blocks in front, in the student and in the dense model.

    Raises:
        ModelError: a block of the student is none of the dense model's.
    """
    path = blocks[0].rpartition(".")[0]
    theirs = list(dense.get_submodule(path))  # type: ignore[arg-type]
    mine = list(student.get_submodule(path))  # type: ignore[arg-type]
    if len(mine) == len(theirs):
        last = len(mine)
        yield from ((number, number) for number in range(1, last + 1) if number % every == 0 or number == last)
        return
    origin, start = [], 0
    for number, block in enumerate(mine):
        found = next((index for index in range(start, len(theirs)) if _same_norms(block, theirs[index])), None)
        if found is None:
            raise ModelError(
                f"Block {number} of the pruned model is none of the dense model's; use --objective logits."
            )
        origin.append(found)
        start = found + 1
    cuts = [number for number in range(1, len(origin)) if origin[number] != origin[number - 1] + 1]
    yield from ((number, origin[number]) for number in cuts)
    yield len(mine), len(theirs)


def _same_norms(block: nn.Module, other: nn.Module) -> bool:
    own = {name: value for name, value in block.named_parameters() if value.ndim == 1}
    theirs = dict(other.named_parameters())
    return bool(own) and all(
        name in theirs and theirs[name].shape == value.shape and torch.allclose(theirs[name].float(), value.float())
        for name, value in own.items()
    )


def teacher(job: RecoveryJob) -> PreTrainedModel:
    """The dense model in memory, frozen.

    Raises:
        RecipeError: it has another vocabulary.
    """
    folder = job.dense_folder()
    dense = load_model(
        folder, device=str(job.device), dtype=job.dtype_name, trust_remote_code=job.recipe.trust_remote_code
    )
    own = job.model.config.get_text_config().vocab_size
    if dense.config.get_text_config().vocab_size != own:
        raise RecipeError(
            f"The dense model {folder.name} has another vocabulary than the pruned one; it cannot teach it."
        )
    return dense.requires_grad_(False)


def _bytes(job: RecoveryJob) -> int:
    from prunus.models.checkpoint import Checkpoint

    stored = Checkpoint.open(job.dense_folder())
    values = sum(tensor.bytes // tensor.dtype.itemsize for tensor in stored.tensors.values())
    return values * job.model.dtype.itemsize


def _used(job: RecoveryJob) -> list[int]:
    """Numbers of the rows that the run draws."""
    from prunus.recovery.training import planned

    return sorted(set(job.lessons.order(planned(job)["steps"], job.part.batch, job.part.seed).flatten().tolist()))


OBJECTIVES: dict[str, Objective] = {"text": Text(), "logits": Logits(), "hidden": Hidden()}
