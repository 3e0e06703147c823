"""Which outputs compete for an example, where tasks have classes of their own."""

import torch
from torch import Tensor


class Heads:
    """Which outputs compete for an example, where every task has classes of its own.

    Args:
        classes: outputs in all. per_task: of each task, one task's after the other's.
        scenario: "task": when it is learnt, those of an example's task; "class": those of all tasks begun so far.

    `seen`, the number of tasks begun, is the only thing that changes.
    """

    #: The logit of an output that does not compete: its probability is exactly 0, and it is a finite number. Below
    #: icarl.NEVER: of a task without exemplars, its own classes are still better than others.
    OUT = -1e11

    def __init__(self, classes: int, per_task: int, scenario: str):
        self.per_task, self.scenario, self.seen = per_task, scenario, 0
        self._task_of_output = torch.arange(classes) // per_task

    def begin(self, t: int) -> None:
        """Task t is seen from now on, and all before it."""
        self.seen = max(self.seen, t + 1)

    def task_of(self, y: Tensor) -> Tensor:
        """The tasks that classes belong to."""
        return y // self.per_task

    def outputs(self, t: int) -> slice:
        """Those of the classes of task t."""
        return slice(t * self.per_task, (t + 1) * self.per_task)

    def to_learn(self, logits: Tensor, t: Tensor) -> Tensor:
        """Logits [replicas, batch, classes] of examples of tasks t [replicas, batch], those that do not compete OUT."""
        if self.scenario == "class":
            return self.to_predict(logits, None)
        return logits.masked_fill(self._tasks(logits) != t[:, :, None], self.OUT)

    def to_predict(self, logits: Tensor, t: int | None) -> Tensor:
        """The same for examples that are all of task t, or of any task seen so far."""
        tasks = self._tasks(logits)
        return logits.masked_fill(tasks >= self.seen if t is None else tasks != t, self.OUT)

    def _tasks(self, logits: Tensor) -> Tensor:
        self._task_of_output = self._task_of_output.to(logits.device)
        return self._task_of_output

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]
