"""Sequences that outlive the step that asked for them: parked ones, and those sampled ahead."""

import base64
import dataclasses
from collections import abc
from typing import Any

import numpy as np

from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib


@dataclasses.dataclass
class PartialRollouts:
    """Rows that a step's budget of tokens left unfinished: they go on in the next step."""

    rows: list[Sequence] = dataclasses.field(default_factory=list)
    begun: int = 0  # rows that were begun, over all steps

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row["experts"] = [
                [x.shape, base64.b64encode(x.tobytes()).decode()] for x in row["experts"]
            ]
        return {"rows": rows, "begun": self.begun}

    def resume(self, position: dict[str, Any]) -> None:
        self.begun, self.rows = position["begun"], []
        for row in position["rows"]:
            experts = [
                np.frombuffer(base64.b64decode(x), np.int16).reshape(shape)
                for shape, x in row["experts"]
            ]
            self.rows.append(Sequence(**{**row, "key": tuple(row["key"]), "experts": experts}))


@dataclasses.dataclass
class AsyncRollouts:
    """The rows of the coming step, sampled while the one before it is trained."""

    step: int = -1  # whose rows they are; -1: none
    rows: list[Sequence] = dataclasses.field(default_factory=list)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    # Samples them: the weights are taken already.
    begun: abc.Callable[[], tuple[list[Sequence], dict[str, float]]] | None = None

    def sample(self, trained: Any) -> None:
        """Samples what was begun, while the device computes `trained`."""
        begun, self.begun = self.begun, None
        if begun is None:
            self.step, self.rows, self.measured = -1, [], {}
            return
        mesh_lib.settled(trained)
        self.step += 1
        self.rows, self.measured = begun()

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = PartialRollouts(self.rows).position()
        return {"step": self.step, "measured": self.measured, "sampled": rows}

    def resume(self, position: dict[str, Any]) -> None:
        kept = PartialRollouts()
        kept.resume(position["sampled"])
        self.step, self.rows, self.measured = position["step"], kept.rows, position["measured"]
