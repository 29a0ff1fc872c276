"""The training loop. Every tensor has the replicate axis first; no method and no task is known by name."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from topkbench.evaluate import evaluate
from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.gradients.truth import ROWS as TRUTH_ROWS
from topkbench.methods import Method
from topkbench.optimizers import Optimizer, Stepper, like, per_replicate
from topkbench.randomness import Normals
from topkbench.schedules import Constant, Schedule
from topkbench.step import WEIGHTS, Memory, at_temperature, gradients
from topkbench.tasks import Task
from topkbench.tasks._contract import others_of

EXPLODED = 1e6  # a loss this many times the first one (or 1, if that is smaller) will not come back


@dataclass(frozen=True)
class Training:
    """How long and how much at once.

    Attributes:
        steps: Optimizer steps, >= 0.
        batch: Rows of x in a mini-batch, >= 1.
        clip: The largest norm of a replicate's gradient (over all of its W), > 0; None for no limit.
    """

    steps: int = 2000
    batch: int = 32
    clip: float | None = None

    def __post_init__(self) -> None:
        _at_least(self, steps=0, batch=1)
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be > 0 and finite, or null for none, got {self.clip}")


@dataclass(frozen=True)
class Logging:
    """What is looked at on the way.

    Attributes:
        points: Log points, spread evenly from step 0 to the last, both included; >= 2.
        samples: Mini-batches for the gradient statistics at each log point, >= 2; 0 leaves them out.
        test_rows: Held-out rows for the metrics, >= 1.
        truth: The relative standard error wanted of the true gradient, to compare the method's with at each
            log point; > 0; None for no truth.
        truth_rows: Rows of x that a replicate's true gradient may take, >= 1; where they do not suffice it
            is less precise.
    """

    points: int = 41
    samples: int = 16
    test_rows: int = 1024
    truth: float | None = None
    truth_rows: int = TRUTH_ROWS

    def __post_init__(self) -> None:
        _at_least(self, points=2, test_rows=1, truth_rows=1)
        if self.samples < 2 and self.samples != 0:
            raise ValueError(f"samples must be >= 2, or 0 for none, got {self.samples}")
        if self.truth is not None and not 0 < self.truth < float("inf"):
            raise ValueError(f"truth must be > 0 and finite, or null for none, got {self.truth}")

    def steps(self, total: int) -> set[int]:
        """The steps that are logged: at most `points`, from 0 to the last."""
        return {round(i * total / (self.points - 1)) for i in range(self.points)}


@dataclass
class Result:
    """What training leaves.

    Attributes:
        seeds: One a replicate.
        W: `(R, n, d)`, where it ended; a diverged replicate's last finite W.
        points: The log points: step, seconds, and `(R,)` tensors on the CPU by column name.
        diverged_at: The step at which a replicate diverged, -1 where it did not: `(R,)`.
        interrupted: Whether it was stopped before its last step.
    """

    seeds: list[int]
    W: Tensor
    points: list[tuple[int, float, dict[str, Tensor]]] = field(default_factory=list)
    diverged_at: Tensor = field(default_factory=lambda: torch.empty(0))
    interrupted: bool = False


def train(
    method: Method,
    task: Task,
    optimizer: Optimizer,
    seeds: Sequence[int],
    training: Training | None = None,
    logging: Logging | None = None,
    *,
    schedule: Schedule | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: str | None = None,
) -> Result:
    """Learn W for every seed at once.

    A replicate depends on its own seed and settings alone. One whose loss or gradient is no longer finite,
    or whose loss is EXPLODED times its first, stays where it was, marked; the others go on. Ctrl-C ends
    training with what has been logged.

    Args:
        method: Its temperature may be a number or a tensor of R.
        task: What is learned.
        optimizer: Its lr may be a number or a tensor of R.
        seeds: One non-negative integer a replicate.
        training: How long and how much at once; the defaults if None.
        logging: What is looked at on the way; the defaults if None.
        schedule: A factor on the temperature; constant if None.
        device: Where.
        dtype: torch.float32 or torch.float64.
        progress: What to call a progress bar with the mean hard loss and the time left; None for no bar.

    Raises:
        ValueError: no seeds, or a learning rate or temperature that is neither one number nor R.
    """
    if not len(seeds):
        raise ValueError("seeds must hold at least one seed, got none")
    loop = _Loop(
        method,
        task,
        optimizer,
        schedule or Constant(),
        training or Training(),
        logging or Logging(),
        Normals(list(seeds), (), device, dtype),
    )
    return loop.run(progress)


def _at_least(settings: object, **least: int) -> None:
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise ValueError(f"{name} must be >= {bound}, got {getattr(settings, name)}")


class _Loop:
    """The state of training: W, what the optimizer keeps, and which replicates are still alive."""

    def __init__(
        self,
        method: Method,
        task: Task,
        optimizer: Optimizer,
        schedule: Schedule,
        training: Training,
        logging: Logging,
        normals: Normals,
    ) -> None:
        self.method, self.task, self.schedule = method, task, schedule
        self.training, self.logging = training, logging
        self.normals, self.batches, self.noise = normals, normals.child("train"), normals.child("method")
        self.teacher = task.teacher(normals.child("teacher"))
        self.test = task.sample(self.teacher, normals.child("test"), logging.test_rows, clean=True)
        W = task.start(normals.child("start"))
        others = others_of(task, self.teacher, normals.child("others"), W)
        self.learned = {WEIGHTS: W, **others}
        self.stepper = Stepper(optimizer, self.learned)
        self.temperature = (
            per_replicate("temperature", method.temperature, self.W)
            if hasattr(method, "temperature")
            else None
        )
        self.memory: Memory = {}  # what the method keeps from one step to the next
        replicates = len(self.W)
        self.diverged_at = torch.full((replicates,), -1, device=self.W.device)
        self.worst = self.W.new_full((replicates,), torch.inf)  # the loss at which a replicate is given up
        self.touched = torch.zeros(self.W.shape[:2], dtype=torch.bool, device=self.W.device)

    @property
    def W(self) -> Tensor:
        return self.learned[WEIGHTS]

    def run(self, progress: str | None) -> Result:
        result = Result(list(self.normals.seeds), self.W, [], self.diverged_at)
        logged = self.logging.steps(self.training.steps)
        seconds = 0.0
        with tqdm(total=self.training.steps, desc=progress, unit="step", disable=progress is None) as bar:
            try:
                for step in range(self.training.steps + 1):
                    if step in logged:
                        columns = {name: column.cpu() for name, column in self.observe(step).items()}
                        result.points.append((step, seconds, columns))
                        bar.set_postfix(loss=f"{columns['hard_loss'].nanmean():.3g}", refresh=False)
                        began = time.perf_counter()  # looking is not training
                    if step < self.training.steps:
                        self.update(step)
                        bar.update()
                        if step + 1 in logged:
                            self.wait()
                            seconds += time.perf_counter() - began
            except KeyboardInterrupt:
                result.interrupted = True
        result.W, result.diverged_at = self.W.cpu(), self.diverged_at.cpu()
        return result

    def update(self, step: int) -> None:
        """One step of every replicate that is still alive."""
        batch = self.task.sample(self.teacher, self.batches, self.training.batch)
        method = self.method_at(step)
        loss, grads = gradients(method, self.task, self.learned, batch, self.noise, self.memory)
        norm = torch.cat([grad.flatten(1) for grad in grads.values()], dim=1).norm(dim=1)
        if step == 0:
            self.worst = EXPLODED * loss.abs().clamp(min=1)
        alive = self.give_up(~(norm.isfinite() & (loss <= self.worst)), step)  # a NaN loss compares false
        if self.training.clip is not None:
            factor = self.training.clip / norm.clamp(min=self.training.clip)
            grads = {name: grad * like(factor, grad) for name, grad in grads.items()}
        self.touched |= (grads[WEIGHTS] != 0).flatten(2).any(-1) & alive[:, None]
        moved = self.stepper(self.learned, grads)
        self.learned = {
            name: torch.where(like(alive, value), moved[name], value) for name, value in self.learned.items()
        }

    def give_up(self, gone: Bool[Tensor, " R"], step: int) -> Bool[Tensor, " R"]:
        """Mark those that have just diverged; returns which are still alive."""
        self.diverged_at = torch.where((self.diverged_at < 0) & gone, step, self.diverged_at)
        return self.diverged_at < 0

    @torch.no_grad()
    def observe(self, step: int) -> dict[str, Tensor]:
        """Every metric column at the present W: `(R,)` each."""
        method = self.method_at(step)
        others = {name: value for name, value in self.learned.items() if name != WEIGHTS}
        test = dataclasses.replace(self.test, learned=others)
        noise = self.normals.child("evaluate", step)
        columns = evaluate(method, self.task, self.W, test, noise, self.memory)
        if step == self.training.steps:  # no further step would notice that the last one went wrong
            self.give_up(~(columns["relaxed_loss"] <= self.worst), step)
        columns["rows_with_gradient"] = self.touched.to(self.W.dtype).mean(-1)
        if self.logging.samples:
            draws = self.normals.child("gradients", step)
            truth = None
            if self.logging.truth is not None:
                wanted = (self.logging.truth, self.logging.truth_rows)
                truth = true_gradient(self.task, self.W, self.teacher, draws, *wanted, learned=others)
            columns |= measure(
                method,
                self.task,
                self.W,
                self.teacher,
                draws,
                Sampling(self.training.batch, self.logging.samples),
                truth=truth,
                memory=self.memory,
                learned=others,
            )
        return columns

    def method_at(self, step: int) -> Method:
        """The method at the temperature of this step."""
        if self.temperature is None:
            return self.method
        return at_temperature(
            self.method, self.temperature * self.schedule(step / max(self.training.steps, 1))
        )

    def wait(self) -> None:
        """Until an accelerator has done what it was given: it works ahead of the clock otherwise."""
        if self.W.device.type == "cuda":
            torch.cuda.synchronize(self.W.device)
