"""Rules that watch the metrics of a run, and say once when it begins to go wrong.

A rule reads the rows of metrics.jsonl, so a resumed run, which reads the old rows first, neither
repeats a warning nor forgets one. Each warns once in a stage; those in `stop_on` also stop the run
at a checkpoint. Where a schedule of response lengths takes its next step, rules compare with what
follows it.

  loss: the loss or the gradient's norm is `loss_spike` standard deviations above its mean over the
    last 128 steps, as OLMo-core's and levanter's SkipStep judge it.
  length: responses are shorter than `length_drop` of those at the stage's start, as after
    mismatched stop tokens.
  truncation: truncated responses come to dominate, as in the length inflation of arXiv 2604.08527;
    or all are truncated, in five steps in a row, from the start on or later.
  groups: in five steps in a row each group had equal rewards, so no response had an advantage.
  entropy: it is below `entropy_drop` of that at the start (arXiv 2505.22617): exploration ends.
  overlap: the share of likeliest tokens common to teacher and student fell by `overlap_drop`
    (arXiv 2604.13016); needs log.overlap_top_k.
  accuracy: evaluation is `accuracy_drop` below its best, whatever the reward does.
  skipped: `max_skipped_steps` in a row had something that is not finite: this always stops the run.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from models import checks
from models.checks import Range
from models.errors import UserError, suggest

SPIKE_WINDOW = 128  # steps
MIN_SPIKE_STEPS = SPIKE_WINDOW // 2  # of a stage before a spike is one
START_STEPS = 10  # of a stage that later ones are compared with
RECENT_STEPS = 5  # whose mean is compared

FIELDS = {
    "max_skipped_steps": Range(off="never"),
    "hang_seconds": Range(off="off"),
    "hang_exits": (True, False),
    "loss_spike": Range(off="off"),
    "length_drop": Range(0, 1, off="off"),
    "truncation": Range(0, 1, off="off"),
    "entropy_drop": Range(0, 1, off="off"),
    "overlap_drop": Range(0, 1, off="off"),
    "accuracy_drop": Range(0, 1, off="off"),
}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Alert:
    """A rule that fired at a step."""

    rule: str
    step: int
    message: str
    stops: bool


class Alerts:
    """The rules of a run, with what they remember of the current stage's rows.

    Raises UserError for a bad `config.alerts`, naming the field.
    """

    def __init__(self, c: ConfigDict) -> None:
        checks.check_fields(c, FIELDS, "config.alerts.")
        self._c = c
        self._rules: dict[str, Callable[[Row], str]] = {
            "loss": self._check_loss,
            "length": self._check_length,
            "truncation": self._check_truncation,
            "groups": self._check_groups,
            "entropy": self._check_entropy,
            "overlap": self._check_overlap,
            "accuracy": self._check_accuracy,
        }
        for name in c.stop_on:
            if name not in self._rules:
                raise UserError(
                    f"config.alerts.stop_on: {name!r} is none of {', '.join(self._rules)}"
                    f"{suggest(name, self._rules)}"
                )
        self.stop: Alert | None = None  # the first alert that stops the run
        self._start_stage("")

    def _start_stage(self, name: str) -> None:
        self._stage, self._fired = name, set[str]()
        self._num_skipped = 0  # steps in a row
        self._best_accuracy = -math.inf
        self._start_comparing(None)

    def _start_comparing(self, limit: float | None) -> None:
        """Forgets the rows so far: `limit`, the most tokens of a response, is now another."""
        self._limit = limit
        self._recent: dict[str, collections.deque[float]] = {}
        self._last: dict[str, collections.deque[float]] = {}
        self._start: dict[str, list[float]] = {}

    def read_rows(self, rows: Iterable[Row]) -> None:
        """Reads the rows that an earlier process of this run wrote, which had their alerts."""
        for row in rows:
            self.add_row(row)
        self.stop = None

    def add_row(self, row: Row) -> list[Alert]:
        """Returns the alerts that fire at the next row of metrics.jsonl."""
        if row["stage"] != self._stage:
            self._start_stage(row["stage"])
        if row.get("rollout/response_limit") != self._limit:
            self._start_comparing(row.get("rollout/response_limit"))
        alerts = []
        for name, check in self._rules.items():
            message = check(row)
            if message and name not in self._fired:
                self._fired.add(name)
                stops = name in self._c.stop_on
                alerts.append(Alert(name, row["step"], message, stops))
        if message := self._check_skipped(row):
            alerts.append(Alert("skipped", row["step"], message, stops=True))
        self.stop = self.stop or next((alert for alert in alerts if alert.stops), None)
        return alerts

    def _check_skipped(self, row: Row) -> str:
        skipped = row.get("train/skipped_updates") or row.get("rollout/failed")
        self._num_skipped = self._num_skipped + 1 if skipped else 0
        limit = self._c.max_skipped_steps
        if not limit or self._num_skipped < limit:
            return ""
        self._num_skipped = 0  # a resumed run gets as many steps again
        return (
            f"a loss, gradient or sample was not finite in {limit} step(s) in a row "
            "(config.alerts.max_skipped_steps)"
        )

    def _check_loss(self, row: Row) -> str:
        found = ""
        for name in ("train/loss", "train/grad_norm"):
            x = row.get(name)
            if x is None or not row.get("train/trained_tokens"):
                continue
            recent = self._recent.setdefault(name, collections.deque(maxlen=SPIKE_WINDOW))
            if self._c.loss_spike and len(recent) >= MIN_SPIKE_STEPS:
                mean = sum(recent) / len(recent)
                deviation = math.sqrt(sum((y - mean) ** 2 for y in recent) / len(recent))
                if x > mean + self._c.loss_spike * deviation > mean:
                    found = (
                        f"{name} is {x:.4g}, {(x - mean) / deviation:.1f} standard deviations "
                        f"above its mean {mean:.4g} of {len(recent)} steps"
                    )
            recent.append(x)
        return found

    def _is_always_whole(self, row: Row, name: str) -> bool:
        """Returns True if a share was 1 in each of the last RECENT_STEPS steps that have it."""
        if row.get(name) is None or row.get("rollout/ended") == 0:
            return False
        recent = self._last.setdefault(name, collections.deque(maxlen=RECENT_STEPS))
        recent.append(row[name])
        return len(recent) == RECENT_STEPS and min(recent) == 1

    def _compare(self, row: Row, name: str) -> tuple[float, float] | None:
        """Returns a metric's mean at the stage's start and now, once there are enough rows."""
        x = row.get(name)
        if x is None or (name.startswith("rollout/") and row.get("rollout/ended") == 0):
            return None
        start = self._start.setdefault(name, [])
        if len(start) < START_STEPS:
            start.append(x)
            return None
        recent = self._recent.setdefault(name, collections.deque(maxlen=RECENT_STEPS))
        recent.append(x)
        if len(recent) < RECENT_STEPS:
            return None
        return sum(start) / len(start), sum(recent) / len(recent)

    def _check_length(self, row: Row) -> str:
        pair = self._compare(row, "rollout/mean_length")
        if not pair or not pair[1] < self._c.length_drop * pair[0]:
            return ""
        return (
            f"responses have {pair[1]:.0f} tokens, {pair[0]:.0f} at the stage's start: compare the "
            "stop tokens of student and teacher"
        )

    def _check_truncation(self, row: Row) -> str:
        if self._is_always_whole(row, "rollout/truncated") and self._c.truncation:
            return (
                f"every response of {RECENT_STEPS} steps was cut at "
                f"config.{self._stage}.max_response_tokens: raise it, or see in rollouts/ why none "
                "ends (a thinking model needs thousands of tokens; one that repeats itself, others)"
            )
        pair = self._compare(row, "rollout/truncated")
        if not pair or not self._c.truncation or not pair[1] > max(self._c.truncation, 2 * pair[0]):
            return ""
        return (
            f"{pair[1]:.0%} of the responses are truncated, {pair[0]:.0%} at the stage's start: "
            "they grow, or repeat themselves (rollout/repetition)"
        )

    def _check_groups(self, row: Row) -> str:
        if not self._is_always_whole(row, "reward/zero_variance_groups"):
            return ""
        return (
            f"in {RECENT_STEPS} steps the responses to each prompt all had the same reward (mean "
            f"{row.get('reward/mean', math.nan):.3g}), so the rewards teach nothing: use prompts "
            f"that are solved now and then, more samples, or another config.{self._stage}.reward"
        )

    def _check_entropy(self, row: Row) -> str:
        pair = self._compare(row, "train/entropy")
        if not pair or not pair[1] < self._c.entropy_drop * pair[0]:
            return ""
        return f"the entropy is {pair[1]:.3g} nats a token, {pair[0]:.3g} at the stage's start"

    def _check_overlap(self, row: Row) -> str:
        pair = self._compare(row, "train/top_overlap")
        if not pair or not self._c.overlap_drop or not pair[1] < pair[0] - self._c.overlap_drop:
            return ""
        return (
            f"teacher and student share {pair[1]:.0%} of their likeliest tokens, {pair[0]:.0%} at "
            "the stage's start"
        )

    def _check_accuracy(self, row: Row) -> str:
        reward = self._compare(row, "reward/mean")
        x = row.get("eval/accuracy")
        if x is None:
            return ""
        before, self._best_accuracy = self._best_accuracy, max(self._best_accuracy, x)
        if not self._c.accuracy_drop or x >= before - self._c.accuracy_drop:
            return ""
        message = f"eval/accuracy is {x:.1%}, after {before:.1%} at its best"
        if reward and reward[1] > reward[0]:
            message += f", while the reward rose from {reward[0]:.3g} to {reward[1]:.3g}"
        return message
