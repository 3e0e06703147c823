"""Which replicas stopped being finite numbers, where, and what they were when all was last well."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Fault:
    """How one replica diverged.

    what: "loss", "outputs", or the name of a parameter (see Learner.named_parameters). step: batches observed when it
    was first not finite; for parameters and outputs, which are looked at now and then, when that was first seen.
    phase: of that step. last_loss: the last finite loss, of last_loss_step; None if there was none. parameters_of_step:
    the step of the last look at which every parameter was finite, which is what `Divergence.parameters` returns; None
    if there was none.
    """

    what: str
    step: int
    phase: int
    last_loss: float | None
    last_loss_step: int | None
    parameters_of_step: int | None


class Divergence:
    """Watches the losses, outputs and parameters of every replica; a replica that diverged once stays so.

    Losses are noted at every step and examined when something is looked at, because an examination waits for the
    device. What is found does not depend on when losses are examined.
    """

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.faults: dict[int, Fault] = {}
        self._noted: list[tuple[int, int, Tensor]] = []
        self._last_loss: list[tuple[float, int] | tuple[None, None]] = [(None, None)] * replicas
        self._good: dict[str, Tensor] = {}
        self._good_step: list[int | None] = [None] * replicas

    @property
    def all(self) -> bool:
        """Whether every replica is known to have diverged."""
        return len(self.faults) == self.replicas

    def note(self, step: int, phase: int, loss: Tensor) -> None:
        """A step's losses [replicas]; they are examined later."""
        self._noted.append((step, phase, loss))

    def examine(self) -> None:
        """Looks at the losses noted so far."""
        if not self._noted:
            return
        losses = torch.stack([loss for _, _, loss in self._noted]).cpu()
        for replica in self.sound():
            column = losses[:, replica]
            bad = (~column.isfinite()).nonzero()
            end = int(bad[0]) if len(bad) else len(column)
            if end:
                self._last_loss[replica] = float(column[end - 1]), self._noted[end - 1][0]
            if len(bad):
                step, phase, _ = self._noted[end]
                self._add(replica, "loss", step, phase)
        self._noted = []

    def look(self, step: int, phase: int, parameters: dict[str, Tensor]) -> None:
        """Examines losses and parameters (name -> [replicas, ...]); keeps a copy of the parameters that are finite."""
        self.examine()
        finite = {name: values.isfinite().flatten(1).all(dim=1).cpu() for name, values in parameters.items()}
        for replica in self.sound():
            bad = [name for name, well in finite.items() if not well[replica]]
            if bad:
                self._add(replica, bad[0], step, phase)
            else:
                self._good_step[replica] = step
        if not self._good:
            self._good = {name: values.detach().cpu().clone() for name, values in parameters.items()}
        sound = self.sound()
        for name, values in parameters.items():
            self._good[name][sound] = values[sound].cpu()

    def note_outputs(self, step: int, phase: int, finite: Tensor) -> None:
        """Whether the outputs in an evaluation were all finite, [replicas]."""
        for replica in self.sound():
            if not finite[replica]:
                self._add(replica, "outputs", step, phase)

    def sound(self) -> list[int]:
        """The replicas that are not known to have diverged."""
        return [replica for replica in range(self.replicas) if replica not in self.faults]

    def parameters(self, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """`now`, but for replicas that diverged those of their last sound look, if there was one."""
        replicas = [replica for replica in self.faults if self._good_step[replica] is not None]
        if not replicas:
            return now
        kept = {name: values.clone() for name, values in now.items()}
        for name, values in kept.items():
            values[replicas] = self._good[name][replicas].to(values)
        return kept

    def _add(self, replica: int, what: str, step: int, phase: int) -> None:
        self.faults[replica] = Fault(what, step, phase, *self._last_loss[replica], self._good_step[replica])

    def state_dict(self) -> dict:
        self.examine()
        return {
            "faults": {replica: dataclasses.asdict(fault) for replica, fault in self.faults.items()},
            "last_loss": list(self._last_loss),
            "good": {name: values.clone() for name, values in self._good.items()},
            "good_step": list(self._good_step),
        }

    def load_state_dict(self, state: dict) -> None:
        self.faults = {replica: Fault(**fault) for replica, fault in state["faults"].items()}
        self._last_loss, self._good_step = list(state["last_loss"]), list(state["good_step"])
        self._good, self._noted = dict(state["good"]), []
