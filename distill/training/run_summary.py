"""What a run says of itself on the terminal: where it begins, a step's figures, and its end."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from distill.runtime import console, run_files
from distill.training.setup import StageSetup

# Metric -> its name on the terminal, and how it is written. A stage shows those that it has.
FIGURES = {
    "reward/mean": ("reward", "{:.3f}"),
    "train/loss": ("loss", "{:.4f}"),
    "train/reverse_kl": ("reverse KL", "{:.4f}"),
    "train/sampled_reverse_kl": ("sampled reverse KL", "{:.4f}"),
    "rollout/mean_length": ("length", "{:,.0f}"),
    "rollout/truncated": ("cut", "{:.0%}"),
    "eval/accuracy": ("accuracy", "{:.1%}"),
}
NUM_AVERAGED = 10  # steps at either end of a stage, at most, whose means the table at the end shows
_MAX_TEXT = 1000  # characters of a transcript's prompt and response that are printed

Row = Mapping[str, Any]


def find_hidden_figures(stage: StageSetup) -> set[str]:
    """Returns the metrics that say nothing in this stage: the loss of a policy gradient is about 0
    by construction, and that of exact reverse KL is the reverse KL."""
    loss = stage.loss
    hidden = set()
    if loss.reward and not (loss.sft or loss.teacher):
        hidden.add("train/loss")
    is_exact = loss.divergence == "reverse" and loss.estimator == "exact"
    others = loss.sft or loss.reward or loss.reference or loss.weighs_tokens
    if loss.teacher and is_exact and not others:
        hidden.add("train/loss")
    if not loss.teacher:
        hidden.add("train/reverse_kl")
    return hidden


def format_figures(row: Row, hidden: set[str]) -> str:
    """Formats the figures of a step that matter: those of FIGURES, tokens/s and its seconds.

    Seconds of compiling and of evaluation are not the step's own.
    """
    texts = [
        f"{name} {form.format(row[metric])}"
        for metric, (name, form) in FIGURES.items()
        if metric not in hidden and _is_known(row.get(metric))
        # Nothing is cut in most steps.
        if metric != "rollout/truncated" or row[metric]
    ]
    seconds = row["time/step"] - row.get("time/compile", 0.0) - row.get("time/eval", 0.0)
    tokens = row.get("train/trained_tokens") or 0
    if seconds > 0 and not row.get("time/compile"):
        texts.append(f"{tokens / seconds:,.0f} tokens/s, {seconds:.3g} s/step")
    return ", ".join(texts)


def _is_known(value: Any) -> bool:
    return value is not None and value == value  # null in files, NaN before


def print_start(
    c: ConfigDict, stages: Sequence[StageSetup], workdir: epath.Path, steps_done: int
) -> None:
    """Prints where a run begins, what it is to do, and where it writes."""
    for line in _describe_start(c, stages, workdir, steps_done):
        run_files.log_line(line)


def _describe_start(
    c: ConfigDict, stages: Sequence[StageSetup], workdir: epath.Path, steps_done: int
) -> Iterator[str]:
    total = stages[-1].end_step
    names = " then ".join(f"{stage.name} ({stage.c.steps:,} steps)" for stage in stages)
    if not steps_done:
        yield f"run {workdir}: {names}"
    elif steps_done >= total:
        yield f"run {workdir}: all of its {total:,} steps are done"
        return
    else:
        stage = next(stage for stage in stages if stage.end_step > steps_done)
        place = f", in {stage.name}" if len(stages) > 1 else ""
        yield f"run {workdir}: goes on from step {steps_done:,} of {total:,}{place}"
    minutes = c.checkpoint.every_minutes
    also = f" or {minutes:g} min" if minutes else ""
    yield (
        f"files: metrics.jsonl (each step), rollouts/ (every "
        f"{c.log.transcripts_every:,} steps), checkpoints/ (every {c.checkpoint.every:,} steps"
        f"{also})" + (f", eval/ (every {c.eval.every:,} steps)" if c.eval.every else "")
    )


def render_stages(stages: Sequence[StageSetup], rows: Sequence[Row]) -> str:
    """Renders a line for each stage: its steps, its time, and figures at its start and its end."""
    lines, used = [], []
    for stage in stages:
        own = [row for row in rows if row.get("stage") == stage.name]
        hidden = find_hidden_figures(stage)
        cells = {
            "stage": stage.name,
            "steps": f"{len(own):,}",
            "time": _format_time(own),
        }
        for metric, (name, form) in FIGURES.items():
            values = [row[metric] for row in own if _is_known(row.get(metric))]
            if values and metric not in hidden:
                # A few steps are not averaged: first and last would be of the same ones.
                count = max(1, min(NUM_AVERAGED, len(values) // 4))
                if metric.startswith("eval/"):
                    count = 1
                ends = float(np.mean(values[:count])), float(np.mean(values[-count:]))
                texts = [form.format(x) for x in ends]
                if metric != "rollout/truncated" or texts != ["0%", "0%"]:
                    cells[name] = " → ".join(texts)
        lines.append(cells)
    titles = ["stage", "steps", "time", *(name for name, _ in FIGURES.values())]
    used = [title for title in titles if any(title in cells for cells in lines)]
    return console.render_table([used, *([cells.get(x, "") for x in used] for cells in lines)])


def _format_time(rows: Sequence[Row]) -> str:
    """Returns the time of steps, and how much of it was compiling where that counts."""
    seconds, compiling = (
        sum(row.get(name) or 0.0 for row in rows) for name in ("time/step", "time/compile")
    )
    text = console.format_duration(seconds)
    if compiling > max(1.0, 0.05 * seconds):
        text += f", {console.format_duration(compiling)} compiling"
    return text


def print_end(
    c: ConfigDict, stages: Sequence[StageSetup], workdir: epath.Path, says_next: bool = True
) -> None:
    """Prints the table of a finished run, where its files are, and the commands that follow."""
    if not run_files.is_primary():
        return
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    made = [
        *render_stages(stages, rows).splitlines(),
        f"wrote {workdir}: metrics.jsonl, rollouts/, checkpoints/"
        + (", eval/" if c.eval.every else ""),
    ]
    commands = [*_list_next_commands(c, stages[-1], str(workdir))] if says_next else []
    console.print_end(made, commands)


def _list_next_commands(c: ConfigDict, last: StageSetup, workdir: str) -> Iterator[str]:
    data, source = last.c.data, last.c.data.source
    # As the run was trained: in another form it would be asked what it never learned to answer.
    form = {
        "template": data.template if data.template != "{question}" else "",
        "thinking": "" if data.thinking else "off",
    }
    out = f"{workdir}/evaluation"
    if c.eval.every:
        yield console.format_command(
            "evaluate",
            model=workdir,
            benchmark=c.eval.benchmark,
            data=c.eval.data,
            protocol=c.eval.protocol,
            samples=c.eval.samples or None,
            max_new_tokens=c.eval.max_new_tokens or None,
            out=out,
        )
    elif source == "arithmetic" and not data.mixture:
        yield console.format_command("evaluate", model=workdir, benchmark=source, **form, out=out)
    else:
        prompts = data.mixture[0][0] if data.mixture else source
        yield console.format_command(
            "generate",
            model=workdir,
            prompts=prompts,
            **form,
            max_new_tokens=last.c.max_response_tokens,
            out=f"{workdir}/samples.jsonl",
        )
    yield console.format_command("export", run=workdir, out=f"{workdir}/export")
    yield console.format_command("report", workdir, out=f"{workdir}/report.html")
    if "tensorboard" in c.log.to:
        yield f"tensorboard --logdir={shlex.quote(f'{workdir}/tensorboard')}"


def render_transcript(step: int, row: Row) -> str:
    """Renders a row of rollouts/ for reading: the prompt, the response, and how it ended."""
    response_tokens = len(row["tokens"])
    about = [f"{response_tokens:,} tokens", f"finish_reason {row.get('finish_reason', 'stop')}"]
    if "reverse_kl" in row and response_tokens:
        about.append(f"reverse KL {np.mean(row['reverse_kl']):.4f} a token")
    texts = [
        _cut(str(row[field] if row[field] is not None else row[ids]))
        for field, ids in (("prompt", "prompt_tokens"), ("response", "tokens"))
    ]
    return (
        f"--- step {step}, one of its responses ({', '.join(about)})\n{texts[0]}>>>{texts[1]}\n---"
    )


def _cut(text: str) -> str:
    """Cuts the middle out of a long text."""
    more = len(text) - _MAX_TEXT
    half = _MAX_TEXT // 2
    return text if more <= 0 else f"{text[:half]} … {more:,} more characters … {text[-half:]}"
