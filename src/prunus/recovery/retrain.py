"""Recoveries that train something of the whole model by its gradients: which something is a row of a table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from prunus.errors import RecipeError, near
from prunus.models.discover import find_blocks
from prunus.models.fitted import as_stored
from prunus.models.skeleton import parameter_count
from prunus.recovery.objectives import OBJECTIVES, Objective
from prunus.recovery.part import Part
from prunus.recovery.recovery import Outcome
from prunus.recovery.settings import configure
from prunus.recovery.student import Student, loaded, probe_logits
from prunus.recovery.training import Course, Watch, judged, micro_rows, read_log, train

if TYPE_CHECKING:
    from prunus.progress import Progress
    from prunus.recipe import RecoverPart
    from prunus.recovery.job import RecoveryJob

STEPS = 1000
# Rates that `lr: auto` tries, as multiples of the method's own, and steps for each.
PROBED = (0.1, 0.3, 1.0, 3.0)
PROBE_STEPS = 6


@dataclass(frozen=True)
class Retrain:
    """Train parts of the model on a text with AdamW, keep the best state on held-out text, and merge.

    Attributes:
        parts: what is trained; see `part.Part`.
        lr: peak learning rate, which fits the parts.
        warmup: share of the steps in which the rate rises; 0.1 as in PERP.
        schedule: linear or cosine to zero, or constant.
        decay: weight decay.
        clip: largest norm of the gradient; 0: any.
        judgements: how often the held-out rows are looked at, in the whole run.
        checkpointing: compute blocks twice instead of keeping their activations.
        paper: where it was published.
    """

    parts: tuple[Part, ...]
    lr: float = 5e-4
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    decay: float = 0.0
    clip: float = 1.0
    judgements: int = 10
    checkpointing: bool = False
    paper: str = ""

    name: ClassVar[str] = "training"
    samples: ClassVar[int | None] = None

    def check(self, job: RecoveryJob) -> None:
        """Count what is trained on the meta device, and refuse what cannot be.

        Raises:
            RecipeError: nothing is trained, settings or memory do not allow it.
        """
        world, batch = job.processes.world, job.part.batch
        if batch % world:
            raise RecipeError(f"A batch of {batch} sequences cannot be divided among {world} processes.")
        if job.device.type == "cuda" and job.device.index and "LOCAL_RANK" not in _environment():
            raise RecipeError("Training uses the first GPU that is visible; choose it with CUDA_VISIBLE_DEVICES.")
        objective = objective_of(job.part)
        trainable, resting = self.count(job)
        if not trainable:
            raise RecipeError(f"{job.part.method} finds nothing to train in this model; choose another method.")
        job.require_memory(
            self.memory(job, trainable, resting) | {"dense model": objective.memory(job)},
            "Train fewer parameters (norms, masklora with a small rank), shorter sequences (--length), or with "
            "--set checkpointing=true.",
        )

    def needs_dense(self, part: RecoverPart) -> bool:
        """If it is taught by it."""
        return objective_of(part).taught

    def reads(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def count(self, job: RecoveryJob) -> tuple[int, int]:
        """Number of values that are trained, and bytes that resting ones spare, from the configuration alone."""
        model = as_stored(job.checkpoint, job.model.dtype, job.recipe.trust_remote_code)
        student = Student(model, find_blocks(model), job.masks)
        self.attach(student)
        spared = sum(getattr(part, "resting", _nothing)(student) for part in self.parts)
        return sum(value.numel() for value in student.chosen), spared

    def attach(self, student: Student) -> None:
        """All parts, in order."""
        for part in self.parts:
            part.attach(student)

    def memory(self, job: RecoveryJob, trainable: int, resting: int) -> dict[str, int]:
        """Bytes that training will take besides what the process holds now.

        Args:
            job: the model and the text.
            trainable: number of values.
            resting: bytes of their gradients and moments that are never there.
        """
        model, length = job.model, job.lessons.train.ids.shape[1]
        config = model.config.get_text_config()
        tokens = micro_rows(job) * length
        values = sum(sum(info.shape) for info in job.blocks[0].infos)
        blocks = 1 if self.checkpointing else len(job.blocks)
        largest = max(info.size for block in job.blocks for info in block.infos)
        return {
            "weights": parameter_count(model) * model.dtype.itemsize,
            # Value, gradient and two moments, and the best state on its way to the disk.
            "trained": trainable * 4 * 4 - resting,
            "activations": 2 * tokens * values * blocks * model.dtype.itemsize,
            "logits": 3 * tokens * config.vocab_size * 4,
            "largest matrix": 3 * largest * 4,
        }

    def recover(self, job: RecoveryJob, progress: Progress) -> Outcome:
        """Train, merge, write."""
        with loaded(job.stream.weights):
            student = Student(job.model, job.blocks, job.masks, job.stream.weights, job.part.seed)
            before = judged(job, student, micro_rows(job) * job.lessons.train.ids.shape[1])
            self.attach(student)
            job.warnings.extend(student.notes)
            facts, active = self.trained(job, student, before, progress)
            return self.written(job, student, before, facts, active)

    def trained(
        self, job: RecoveryJob, student: Student, before: float, progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Train the attached parts to their best state; returns what to report, and how many values were active."""
        if self.checkpointing:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            student.model.enable_input_require_grads()
        micro = micro_rows(job) * job.lessons.train.ids.shape[1]
        loss, plan = self.planned(job, student, progress)
        course = self.course(plan["steps"], plan["lr"], plan["step_seconds"])
        watch = Watch(job, student, course, progress, before, micro)
        extra = [callback for part in self.parts for callback in part.callbacks(student)]
        train(job, student, course, loss, watch, extra)
        if watch.stopped:
            job.warnings.append(watch.stopped[0].upper() + watch.stopped[1:] + ".")
        log = read_log(watch.log)
        facts = {
            "steps": log[-1]["step"] if log else 0, "planned_steps": course.steps, "lr": course.lr,
            "probed": plan["probed"], "best_step": watch.best["step"], "stopped": watch.stopped or None,
            "seconds": log[-1]["seconds"] if log else 0.0, "micro_batch": micro_rows(job),
        }  # fmt: skip
        return facts, watch.active

    def written(self, job: RecoveryJob, student: Student, before: float, facts: dict[str, Any], active: int) -> Outcome:
        """Merge, round to the dtype on disk, judge what a reader will see, and write it."""
        inputs = job.probe.inputs
        adapted = probe_logits(student.model, inputs)
        micro = micro_rows(job) * job.lessons.train.ids.shape[1]
        apart = [part for part in self.parts if getattr(part, "kept_apart", False) and job.masks.removed]
        after = judged(job, student, micro) if apart else None
        for part in apart:
            job.processes.on_first(
                lambda part=part: part.save(student, job.work.checkpoint / "adapter", job.out.name)  # type: ignore
            )
        for part in self.parts:
            part.merge(student)
        student.unwrap()
        if apart:
            ids = {id(value) for value in student.chosen}
            student.chosen = [value for value in student.model.parameters() if id(value) in ids]
        changed = student.settle()
        logits = probe_logits(student.model, inputs)
        facts["apart"] = "adapter" if apart else None
        facts["merge_gap"] = None if apart else float((logits - adapted).abs().max() / adapted.abs().max())
        if apart:
            job.warnings.append("A merge would fill the zeros: the adapter was saved apart, in OUT/adapter.")
        after = judged(job, student, micro) if after is None else after
        job.processes.on_first(lambda: write(job, student, changed))
        return Outcome(active, before, after, logits, facts)

    def course(self, steps: int, lr: float, step_seconds: float) -> Course:
        """The settings with what was found out about this run."""
        judge = max(1, math.ceil(steps / self.judgements))
        save = max(1, min(judge, math.ceil(60 / max(step_seconds, 1e-3))))
        return Course(steps, lr, self.warmup, self.schedule, self.decay, self.clip, judge, save)

    def planned(self, job: RecoveryJob, student: Student, progress: Progress) -> tuple[Any, dict[str, Any]]:
        """The loss, and the steps and rate, found once and written down, so that a resumed run takes the same."""
        found = job.processes.agree(job.work.read("training/plan.json"))
        if found is None:
            found = self._plan(job, student, progress)
            job.processes.on_first(lambda: job.work.write("training/plan.json", found))
        return objective_of(job.part).ready(job), found

    def _plan(self, job: RecoveryJob, student: Student, progress: Progress) -> dict[str, Any]:
        part = job.part
        with self._begun(student):
            seconds, judge_seconds = job.processes.agree(_pace(job, student))
        if objective_of(job.part).memory(job):
            seconds *= 4 / 3  # the dense model's forward pass beside the student's, which counts three
        rate, probed = part.lr or self.lr, None
        steps = part.steps or STEPS
        if part.minutes is not None:
            spare = part.minutes * 60 - (self.judgements + 1) * judge_seconds
            if part.probe:
                spare -= len(PROBED) * (PROBE_STEPS * seconds + judge_seconds)
            steps = max(1, int(spare / seconds))
        if part.probe:
            with self._begun(student):
                rate, probed = self._probe(job, student, progress)
        return {"steps": steps, "lr": rate, "probed": probed, "step_seconds": seconds}

    @contextmanager
    def _begun(self, student: Student) -> Iterator[None]:
        """Inside the context what the first step does not train has no gradients, as in that step."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(getattr(part, "begun", nullcontext)(student))
            yield

    def _probe(self, job: RecoveryJob, student: Student, progress: Progress) -> tuple[float, list[dict[str, float]]]:
        """A few steps of plain AdamW at each of a few rates, from the same beginning; the best held-out loss wins."""
        begin = {name: value.clone() for name, value in student.state().items()}
        micro = micro_rows(job) * job.lessons.train.ids.shape[1]
        results = []
        progress.stage("learning rate", len(PROBED))
        for factor in PROBED:
            rate = self.lr * factor
            finite = _few_steps(job, student, rate)
            loss = judged(job, student, micro) if finite else math.inf
            results.append({"lr": rate, "heldout": loss if math.isfinite(loss) else 1e308})
            student.restore(begin)
            progress.advance(f"{rate:g}: held-out {loss:.4f}")
        best = min(results, key=lambda result: result["heldout"])
        return best["lr"], results


def _nothing(student: Student) -> int:
    """Bytes that a part spares which trains all that it ever trains at a time."""
    return 0


def _few_steps(job: RecoveryJob, student: Student, rate: float) -> bool:
    """Whether a few steps at a constant rate, on the first rows of the run, stayed finite."""
    optimizer = torch.optim.AdamW(student.chosen, lr=rate, weight_decay=0.0)
    order = job.lessons.order(PROBE_STEPS, job.part.batch, job.part.seed)
    finite = True
    for rows in order:
        finite = finite and math.isfinite(_accumulate(job, student, rows))
        torch.nn.utils.clip_grad_norm_(student.chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        student.enforce()
    return finite


def _accumulate(job: RecoveryJob, student: Student, rows: torch.Tensor) -> float:
    """Gradients of one step on the text's own loss, summed over processes; returns the loss of this process's share."""
    loss_of, total = OBJECTIVES["text"].ready(job), 0.0
    mine = job.processes.mine(list(rows.split(micro_rows(job))))
    part = job.lessons.train.take(rows)
    count = (part.labels[:, 1:] != -100).sum().to(job.device)
    student.model.train()
    for few in mine:
        taken = job.lessons.train.take(few)
        inputs = {"input_ids": taken.ids.to(job.device), "labels": taken.labels.to(job.device), "row": few}
        with torch.autocast(job.device.type, job.model.dtype, enabled=job.dtype_name != "float32"):
            loss = loss_of(student.model, inputs, count)
        loss.backward()
        total += float(loss.detach())
    job.processes.add_up([value.grad for value in student.chosen if value.grad is not None])
    return total


def _pace(job: RecoveryJob, student: Student) -> tuple[float, float]:
    """Seconds of one step and of one judgement, from one of each; nothing is changed."""
    micro = micro_rows(job) * job.lessons.train.ids.shape[1]
    rows = job.lessons.order(1, job.part.batch, job.part.seed)[0]
    begun = time.monotonic()
    _accumulate(job, student, rows)
    student.model.zero_grad(set_to_none=True)
    step = time.monotonic() - begun
    begun = time.monotonic()
    judged(job, student, micro)
    return step, time.monotonic() - begun


def write(job: RecoveryJob, student: Student, changed: set[str]) -> None:
    """Write all blocks and what lies outside of them, the changed configuration and the log of the training."""
    import json
    import shutil

    for block in job.blocks:
        own = {name for name in changed if name.startswith(f"{block.name}.") and name not in student.added}
        job.output.block(block, {"name": block.name, "changed": len(own)}, own)
    outside = {name for name in changed if not any(name.startswith(f"{block.name}.") for block in job.blocks)}
    job.output.outside(outside - student.added.keys(), student.added)
    if student.config:
        path = job.work.checkpoint / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.update(student.config)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    log = job.work.training / "log.jsonl"
    if log.is_file():
        shutil.copyfile(log, job.work.checkpoint / "recovery.jsonl")


def objective_of(part: RecoverPart) -> Objective:
    """The objective that the recipe names, with its settings.

    Raises:
        RecipeError: an unknown name or setting.
    """
    name = part.objective
    if name not in OBJECTIVES:
        raise RecipeError(f"There is no objective {name!r}.{near(name, OBJECTIVES)}")
    given = {key: value for key, value in part.settings.items() if key.startswith("objective.")}
    return configure(OBJECTIVES[name], {key.removeprefix("objective."): value for key, value in given.items()})


def _environment() -> Any:
    import os

    return os.environ
