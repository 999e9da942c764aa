"""The rows of metrics.jsonl, and the transcripts beside them."""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.objectives.divergences import TOP_STATS
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.runtime.progress import Progress
from distill.training import run_summary, trainer
from distill.training.alerts import Alerts
from distill.training.setup import StageSetup

REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes of no whole character


@dataclasses.dataclass
class MetricsLogger:
    """Writes and displays the metrics of each step once the next one has started, so that the host
    does not wait for the device."""

    stage: StageSetup
    writer: run_files.Writer
    progress_bar: Progress
    alerts: Alerts
    mesh: Mesh
    student: Policy
    update_seconds: concurrent.futures.Future[float] | None = None  # of the newest step
    pending: tuple[int, float, dict, dict, concurrent.futures.Future[float] | None] | None = None
    pending_stats: trainer.KeptStats = dataclasses.field(default_factory=list)
    accuracy: float | None = None  # of the last evaluation
    has_skipped: bool = False  # True once the batch of a skipped update is written: one suffices

    def time_update(self, start_time: float, device_metrics: dict[str, jax.Array]) -> None:
        """Measures the time/update of the step: the seconds from `start_time`, when its scoring
        began, until the update's results are on the device.

        A thread waits for them, since the host goes on when it has started the update.
        """
        waiting = concurrent.futures.ThreadPoolExecutor(1, "update")
        self.update_seconds = waiting.submit(_wait_for, start_time, dict(device_metrics))
        waiting.shutdown(wait=False)

    def add_step(
        self,
        step: int,
        start_time: float,
        host_metrics: dict,
        device_metrics: dict[str, jax.Array],
        kept_stats: trainer.KeptStats,
    ) -> None:
        """Writes the pending row, if any, and makes the step's row the pending one."""
        self.write(start_time)
        self.pending = (step, start_time, host_metrics, device_metrics, self.update_seconds)
        self.pending_stats = [] if self.has_skipped else kept_stats

    def fetch_pending(self, end_time: float | None = None) -> None:
        """Completes the pending row with its device metrics. The step ended at `end_time`, when the
        next one started; by default now, once the device is done."""
        if self.pending and "time/step" not in self.pending[2]:
            step, start_time, host_metrics, device_metrics, update_seconds = self.pending
            fetched = jax.device_get(device_metrics)
            if update_seconds:
                host_metrics["time/update"] = update_seconds.result()
            compiling = {k: host_metrics.pop(k) for k in ("time/compile",) if k in host_metrics}
            host_metrics |= {f"train/{name}": float(x) for name, x in fetched.items()}
            host_metrics["time/step"] = (end_time or time.perf_counter()) - start_time
            host_metrics |= compiling
            if host_metrics["train/skipped_updates"] and not self.has_skipped:
                self.has_skipped = True
                count = self.stage.c.batch_size
                rows = make_transcripts(self.pending_stats, self.mesh, self.student, count)
                self.writer.write_skipped(step, rows)
            self.pending_stats = []

    def write(self, end_time: float | None = None) -> None:
        """Writes the pending row, if any; for `end_time` see `fetch_pending`."""
        if self.pending is None:
            return
        self.fetch_pending(end_time)
        (step, _, row, *_), self.pending = self.pending, None
        write_row(self.writer, self.alerts, step, self.stage.name, row)
        self.accuracy = row.get("eval/accuracy", self.accuracy)
        figures = run_summary.format_figures(
            {**row, "eval/accuracy": self.accuracy}, run_summary.find_hidden_figures(self.stage)
        )
        self.progress_bar.update(step + 1 - self.stage.first_step, figures)

    def write_transcripts(self, step: int, log: ConfigDict, kept_stats: trainer.KeptStats) -> None:
        """Writes the transcripts of a step that `log` asks for, and prints the first of them."""
        count = count_transcripts(log, step)
        rows = make_transcripts(kept_stats, self.mesh, self.student, count)
        if log.transcripts and step % log.transcripts_every == 0:
            self.writer.write_rollouts(step, rows[: log.transcripts])
        if _is_printed(log, step) and rows:
            run_files.log_line(run_summary.render_transcript(step, rows[0]))


def _wait_for(start_time: float, arrays: dict[str, jax.Array]) -> float:
    """Returns the seconds from `start_time` until arrays are ready."""
    jax.block_until_ready(arrays)
    return time.perf_counter() - start_time


def count_transcripts(log: ConfigDict, step: int) -> int:
    """Returns how many transcripts of a step are wanted, to write or to print."""
    written = log.transcripts if step % log.transcripts_every == 0 else 0
    return max(written, int(_is_printed(log, step)))


def _is_printed(log: ConfigDict, step: int) -> bool:
    return log.print_every > 0 and step % log.print_every == 0


def write_row(
    writer: run_files.Writer, alerts: Alerts, step: int, stage_name: str, row: dict
) -> None:
    """Writes a step's row, and warns of the alerts that fire at it."""
    writer.write(step, stage_name, row)
    if run_files.is_primary():
        file_row = json.loads(run_files.to_json(row))  # as a resumed run will read it
        for alert in alerts.add_row({"step": step, "stage": stage_name, **file_row}):
            run_files.log_line(f"warning: step {alert.step}: {alert.message}")


def make_transcripts(
    kept_stats: trainer.KeptStats, mesh: Mesh, student: Policy, count: int
) -> list[dict[str, object]]:
    """Makes the rows of rollouts/*.jsonl for the first `count` sequences of a step.

    A row has the text and tokens of a sequence, the part of the text that each response token
    writes, and each statistic as a list of one number per response token. Where the update compared
    the likeliest tokens, it has these too, per response token as lists of [id, log-probability],
    and the texts of their ids.
    """
    rows: dict[int, dict[str, object]] = {}
    decode = student.tokenizer.decode if student.tokenizer else lambda ids: None
    for micro, stats in kept_stats:
        if not trainer.has_transcript(micro, count):
            continue
        batch = micro.to_device(mesh)
        arrays = (batch.tokens_BT, batch.mask_BT, batch.segments_BT, batch.finished_BT)
        arrays = (*arrays, batch.thinking_BT, stats)
        arrays = jax.tree.map(np.asarray, mesh_lib.gather_first_rows(arrays, len(micro.rows)))
        tokens, mask, segments, finished, thinking, stats_arrays = arrays
        for i, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                if number >= count:
                    continue
                in_segment = segments[i] == segment
                in_response = in_segment & mask[i]
                prompt, response = tokens[i][in_segment & ~mask[i]], tokens[i][in_response]
                numbers_by_name = {name: x[i][in_response] for name, x in stats_arrays.items()}
                tops = {
                    name: numbers_by_name.pop(name) for name in set(TOP_STATS) & stats_arrays.keys()
                }
                row = rows[number] = {
                    "prompt": decode(prompt.tolist()),
                    "response": decode(response.tolist()),
                    "prompt_tokens": prompt.tolist(),
                    "tokens": response.tolist(),
                    **{name: x.tolist() for name, x in numbers_by_name.items()},
                    **list_tops(tops, student.tokenizer),
                }
                if student.tokenizer:
                    row["token_texts"] = split_text(student.tokenizer, response.tolist())
                if finished is not None:
                    row["finish_reason"] = "stop" if finished[i][in_segment].any() else "length"
                if thinking is not None:
                    row["thinking"] = bool(thinking[i][in_segment].any())
                if number in micro.rewards:
                    row["reward"] = micro.rewards[number]
    return [rows[number] for number in sorted(rows)]


def split_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token. Of tokens that share a character, the first has it, and the
    others have none."""
    texts: list[str] = []
    start = 0
    while start < len(ids):
        # A character of UTF-8 has at most four bytes, and a token at least one.
        for end in range(start + 1, min(len(ids), start + 4) + 1):
            text = tokenizer.decode(ids[start:end])
            if REPLACEMENT not in text:
                break
        else:  # bytes of no character, or that character itself
            end, text = start + 1, tokenizer.decode(ids[start : start + 1])
        texts += [text, *[""] * (end - start - 1)]
        start = end
    return texts


def list_tops(tops: Mapping[str, np.ndarray], tokenizer: Any) -> dict[str, Any]:
    """Returns the likeliest tokens of student and teacher, given the divergences.TOP_STATS of a
    response [tokens, K], and their texts."""
    found: dict[str, Any] = {}
    for side in ("student", "teacher"):
        if f"{side}_top_ids" in tops:
            ids, logp = tops[f"{side}_top_ids"].tolist(), tops[f"{side}_top_logp"].tolist()
            found[f"{side}_top"] = [
                [[x, round(y, 5)] for x, y in zip(*pair, strict=True)]
                for pair in zip(ids, logp, strict=True)
            ]
    if found and tokenizer:
        used = sorted({x for name in found for top in found[name] for x, _ in top})
        found["top_texts"] = {str(x): tokenizer.decode([x]) for x in used}
    return found
