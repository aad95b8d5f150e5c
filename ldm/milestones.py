"""What is due after a step of a training, and what a stop left of it to the next start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ldm.run_log import RunLog


class Save(Protocol):
    """Who puts steps on disk."""

    def __call__(self, step: int, val_loss: float | None, *, last: bool) -> None:
        """Save the step, and what it was validated to; the ``last`` one before returning."""


@dataclass(frozen=True)
class Every:
    """Steps from one to the next, of each kind; None: never."""

    log: int
    save: int
    validate: int | None
    draw: int | None


@dataclass(frozen=True)
class Milestones:
    """What is due when in a training of so many ``steps``, and who does it.

    ``validate`` returns a line of the log with ``val_loss``, or None if it was asked to stop
    meanwhile; ``draw`` says whether it was; ``drawn`` whether there are samples of a step.
    """

    steps: int
    every: Every
    log: RunLog
    validate: Callable[[int], dict[str, Any] | None]
    save: Save
    draw: Callable[[int], bool]
    drawn: Callable[[int], bool]

    def logs(self, step: int) -> bool:
        """Whether the figures of a step are due in the log; the last step's are."""
        return step == self.steps or step % self.every.log == 0

    def conclude(self, step: int, *, stopping: bool) -> bool:
        """Do what is due after a step, no more than save it if that is asked to stop.

        True if it was asked to stop: then the step is on disk, and what was broken off is left to
        the next start.
        """
        validated = {} if stopping or not self._validates_at(step) else self.validate(step)
        if stopping or validated is None:
            self.save(step, None, last=True)
            return True
        saves = validated or step == self.steps or step % self.every.save == 0
        if saves:
            self.save(step, validated.get("val_loss"), last=step == self.steps)
        if validated:
            # Behind the checkpoint, which so has its loss wherever the log has this line.
            self.log.write({"step": step, **validated})
        stopping = self._draws_at(step) and self.draw(step)
        if stopping and not saves:
            self.save(step, None, last=True)
        return stopping

    def catch_up(self, step: int) -> bool:
        """Do what a stop left undone at the step that was resumed from; True if asked to stop."""
        validated = any(one["step"] == step and "val_loss" in one for one in self.log.kept)
        if self._validates_at(step) and not validated:
            return self.conclude(step, stopping=False)
        return self._draws_at(step) and not self.drawn(step) and self.draw(step)

    def _validates_at(self, step: int) -> bool:
        every = self.every.validate
        return every is not None and (step == self.steps or step % every == 0)

    def _draws_at(self, step: int) -> bool:
        every = self.every.draw
        return every is not None and step % every == 0
