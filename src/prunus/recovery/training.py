"""The training loop: transformers' Trainer, told what is trained, what is minimised, when to judge and when to save."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunus.errors import ModelError
from prunus.progress import Progress
from prunus.recovery.rows import Rows
from prunus.recovery.student import Student, heldout_loss

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob

STATE = "trained.safetensors"
# Logits of a forward pass in float32, at most; with the softmax and the gradient it is three times that.
LOGIT_BYTES = 1 << 29
TOKENS = 2048
# Seconds of work that an interruption may cost.
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Course:
    """How long and how fast: fixed before the first step, so that a resumed run follows the same.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: share of the steps in which the rate rises from 0.
        schedule: what follows: "linear" or "cosine" to 0, or "constant".
        decay: AdamW's weight decay.
        clip: largest norm of the gradient; 0: any.
        judge: steps between two looks at the held-out rows.
        save: steps between two saved states.
    """

    steps: int
    lr: float
    warmup: float
    schedule: str
    decay: float
    clip: float
    judge: int
    save: int


class Drawn(Dataset):
    """Training rows in the order in which they are learnt."""

    def __init__(self, rows: Rows, order: Tensor):
        """`order`: numbers of rows, int64 `[steps · batch]`."""
        self.rows, self.order = rows, order.flatten()

    def __len__(self) -> int:
        """Number of rows over all steps."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row."""
        row = self.order[index]
        return {"input_ids": self.rows.ids[row], "labels": self.rows.labels[row], "row": row}


class Loop(Trainer):
    """The Trainer with our loss, our order of rows, and checkpoints that hold only what is trained."""

    def __init__(self, student: Student, loss: Any, **kwargs: Any):
        """`loss(model, inputs, count)`: see `objectives`."""
        super().__init__(model=student.model, **kwargs)
        self.student, self.loss = student, loss
        self.loss_is_scaled_for_ga = True  # divided by the labels of the whole step already

    def compute_loss(  # noqa: D102 - the Trainer's own
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Processes average their gradients; the loss is a share of the whole sum.
        return self.loss(model, inputs, num_items_in_batch) * self.accelerator.num_processes

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Tensor:
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples)
        counted = torch.as_tensor(count, device=device)
        if self.accelerator.num_processes == 1:
            return counted
        everywhere: Any = self.accelerator.gather(counted)
        return everywhere.sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        if not self.args.should_save:  # of several processes each is asked, and all hold the same
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_state(self.student, Path(output_dir) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.student.restore(load_file(Path(resume_from_checkpoint) / STATE))


def save_state(student: Student, path: Path) -> None:
    """Write what is trained, whole or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    save_file({name: value.cpu().contiguous() for name, value in student.state().items()}, beside)
    beside.replace(path)


@dataclass
class Watch(TrainerCallback):
    """Judges, logs, saves, keeps the best state, and stops when there is a reason.

    Attributes:
        job: for the work folder and the held-out rows.
        student: what is trained.
        course: how long.
        progress: told about every step.
        before: held-out loss at the beginning.
        micro: tokens of one forward pass.
    """

    job: RecoveryJob
    student: Student
    course: Course
    progress: Progress
    before: float
    micro: int
    best: dict[str, Any] = field(default_factory=dict)
    worse: int = 0
    stopped: str = ""
    failed: int | None = None
    active: int = 0
    spent: float = 0.0
    started: float = 0.0

    @property
    def warm(self) -> int:
        """Steps in which the learning rate rises."""
        return math.ceil(self.course.warmup * self.course.steps)

    @property
    def log(self) -> Path:
        """One JSON object a line: step, seconds, loss, lr, heldout."""
        return self.job.work.training / "log.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what an interrupted run wrote after the state that is resumed."""
        self.started = time.monotonic()
        self.active = self.student.active()
        lines = read_log(self.log)[: state.global_step]
        self.spent = lines[-1]["seconds"] if lines else 0.0
        judged = [(line["heldout"], line["step"]) for line in lines if line["heldout"] is not None]
        loss, step = min([(self.before, 0), *judged])
        self.best = {"loss": loss, "step": step}
        self.worse = sum(1 for _, when in judged if when > max(step, self.warm))
        if state.is_world_process_zero:
            self.log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            if step == 0:
                save_state(self.student, self.job.work.training / "best.safetensors")
        self.progress.stage("recover", self.course.steps)
        for line in lines:
            self.progress.advance(f"step {line['step']} done before")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removed weights are +0.0 after every step, whatever the optimizer did."""
        self.student.enforce()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save in time."""
        control.should_save = state.global_step % self.course.save == 0 and state.global_step < self.course.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After every step: look at the loss, judge if it is time, write a line."""
        if not logs or "loss" not in logs:
            return
        loss, step, heldout = float(logs["loss"]), state.global_step, None
        if not math.isfinite(loss):
            self.failed, self.stopped = step, f"stopped: the loss of step {step} was not finite"
            control.should_training_stop, control.should_save = True, False
            return
        if step % self.course.judge == 0 or step == self.course.steps:
            heldout = self._judge(step, control)
        line = {
            "step": step, "seconds": self.spent + time.monotonic() - self.started, "loss": loss,
            "lr": float(logs["learning_rate"]), "heldout": heldout,
        }  # fmt: skip
        if state.is_world_process_zero:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        pace = step / max(line["seconds"], 1e-9) * self.job.part.batch * self.job.lessons.train.ids.shape[1]
        note = f"loss {loss:.4f}  {pace:,.0f} tokens/s"
        self.progress.advance(note + (f"  held-out {heldout:.4f}" if heldout is not None else ""))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Only now the saved state is whole; a broken one is never looked at."""
        if state.is_world_process_zero:
            self.job.work.write("training/last.json", {"step": state.global_step})

    def _judge(self, step: int, control: Any) -> float | None:
        loss = judged(self.job, self.student, self.micro)
        if not math.isfinite(loss):
            self.failed, self.stopped = step, f"stopped: the held-out loss was not finite after step {step}"
            control.should_training_stop, control.should_save = True, False
            return None
        if loss < self.best["loss"]:
            self.best, self.worse = {"loss": loss, "step": step}, 0
            if self.job.processes.rank == 0:
                save_state(self.student, self.job.work.training / "best.safetensors")
        elif step > self.warm:  # before, the rate still rises, and nothing is to be expected
            self.worse += 1
        if 0 < self.job.part.patience <= self.worse:
            self.stopped = f"stopped after step {step}: {self.worse} judgements in a row without a better one"
            control.should_training_stop = True
        return loss


def judged(job: RecoveryJob, student: Student, micro: int) -> float:
    """Mean held-out loss over the labels, nats; the processes share the rows."""
    mine = job.lessons.heldout.take(slice(job.processes.rank, None, job.processes.world))
    total, count = heldout_loss(student.model, mine, micro) if len(mine) else (0.0, 0)
    sums = torch.tensor([total, count], dtype=torch.float64)
    job.processes.add_up([sums])
    return float(sums[0] / sums[1])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that was cut off by a kill; one line for every step, in order."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] != len(found) + 1:
            break
        found.append(row)
    return found


def micro_rows(job: RecoveryJob) -> int:
    """Rows in one forward pass of one process: as many as logits and tokens allow, and dividing the batch."""
    share = job.part.batch // job.processes.world
    vocabulary = job.model.config.get_text_config().vocab_size
    tokens = max(1, min(TOKENS, LOGIT_BYTES // (4 * vocabulary)))
    most = max(1, tokens // job.lessons.train.ids.shape[1])
    return max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= most)


def train(job: RecoveryJob, student: Student, course: Course, loss: Any, watch: Watch, extra: list[Any]) -> None:
    """Train from the last saved state, or from the beginning; `student` then holds the best state.

    Raises:
        ModelError: the loss was not finite, or never better than at the beginning; the last good state is kept.
    """
    rows = micro_rows(job)
    folder = job.work.training
    last = job.processes.agree(job.work.read("training/last.json"))
    resume = folder / f"checkpoint-{last['step']}" if last else None
    if job.processes.rank == 0:
        for path in folder.glob("checkpoint-*"):
            if path != resume:
                shutil.rmtree(path)
    order = job.lessons.order(course.steps, job.part.batch, job.part.seed)
    arguments = _arguments(job, course, rows, find_unused=bool(extra))
    loop = Loop(student, loss, args=arguments, train_dataset=Drawn(job.lessons.train, order), callbacks=[*extra, watch])
    _quiet(loop)
    loop.train(resume_from_checkpoint=None if resume is None else str(resume))
    loop.accelerator.free_memory()
    _finish(job, student, watch)


def _finish(job: RecoveryJob, student: Student, watch: Watch) -> None:
    """Take the best state, or refuse if there is none better than the beginning."""
    if job.processes.world > 1:
        torch.distributed.barrier()
    if watch.best["step"] == 0:
        why = watch.stopped or "the held-out loss never fell below that of the beginning"
        raise ModelError(
            f"Training made nothing better ({why}; {watch.before:.4f} at the beginning). Nothing was written; the "
            f"log is {watch.log}. Give a smaller --lr (or --lr auto), more text, or other settings, with --restart."
        )
    student.restore(load_file(job.work.training / "best.safetensors"))
    student.enforce()


def _arguments(job: RecoveryJob, course: Course, rows: int, find_unused: bool) -> TrainingArguments:
    share = job.part.batch // job.processes.world
    return TrainingArguments(
        output_dir=str(job.work.training), max_steps=course.steps, per_device_train_batch_size=rows,
        gradient_accumulation_steps=share // rows, learning_rate=course.lr, weight_decay=course.decay,
        lr_scheduler_type={"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}[course.schedule],
        warmup_steps=math.ceil(course.warmup * course.steps), max_grad_norm=course.clip, optim="adamw_torch",
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", save_total_limit=2, report_to=[],
        disable_tqdm=True, seed=job.part.seed % 2**32, use_cpu=job.device.type == "cpu", remove_unused_columns=False,
        dataloader_pin_memory=False, ddp_find_unused_parameters=find_unused, ddp_broadcast_buffers=False,
        bf16=job.dtype_name == "bfloat16", fp16=job.dtype_name == "float16",
    )  # fmt: skip


def _quiet(loop: Trainer) -> None:
    """The Trainer's own printing is not wanted beside our progress."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        loop.remove_callback(kind)


def planned(job: RecoveryJob) -> dict[str, Any]:
    """What was fixed before the first step: steps, learning rate, and how both were found."""
    found = job.processes.agree(job.work.read("training/plan.json"))
    assert found is not None, "planned() before the plan was made"
    return found
