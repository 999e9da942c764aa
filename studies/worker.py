"""One run of a study, in one process: trains as `distill.train` does, then measures the model.

    python -m studies.worker --workdir=DIR --config=configs/miniature.py:opd \
        --config.opd.steps=100 --measure=greedy:arithmetic:test.jsonl:0:60 \
        --measure=sampled:arithmetic:test.jsonl:16:60

Writes WORKDIR/measured.json. Without --config it measures --model. A measurement is
NAME:BENCHMARK:ROWS:SAMPLES:TOKENS: rows of a jsonl file, so many responses of at most so many
tokens to each, sampled at temperature 1, or with 0 samples one greedy response. At the end
`:judged` measures their distance from --teacher, too, and `:no_think` asks for no reasoning.
"""

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from distill.evaluation.tasks import BENCHMARKS
from distill.runtime import cli, run_files
from models.errors import UserError, suggest

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory to write.", OPTIONS, required=True)
MODEL = flags.DEFINE_string("model", "", "Without --config: the model to measure.", OPTIONS)
TEACHER = flags.DEFINE_string(
    "teacher", "", "Model whose distance samples are measured to.", OPTIONS
)
MEASURE = flags.DEFINE_multi_string("measure", [], "See above; repeatable.", flag_values=OPTIONS)
SEED = flags.DEFINE_integer("seed", 0, "Of the measurements' samples.", flag_values=OPTIONS)

KS = (1, 2, 4, 8, 16, 32, 64)
BATCH = 256  # responses sampled together
_PROMPTS = 500  # whose mean length counts as that of all


Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a --measure says."""

    name: str
    benchmark: str
    rows: str
    samples: int
    tokens: int
    is_judged: bool
    is_thinking: bool


def parse_measurement(text: str) -> Measurement:
    """Parses a --measure. Raises UserError naming one that has another form."""
    parts = text.split(":")
    parts, options = parts[:5], parts[5:]
    is_form = len(parts) == 5 and all(x.isdecimal() for x in parts[3:])
    if not is_form or options not in ([], ["judged"], ["no_think"], ["judged", "no_think"]):
        form = "NAME:BENCHMARK:ROWS:SAMPLES:TOKENS[:judged][:no_think]"
        raise UserError(f"--measure={text}: is no {form}")
    name, benchmark, rows, samples, tokens = parts
    is_judged, is_thinking = "judged" in options, "no_think" not in options
    return Measurement(name, benchmark, rows, int(samples), int(tokens), is_judged, is_thinking)


def check_flags() -> None:
    """Raises UserError naming a flag that does not fit, before a run that takes minutes."""
    if (CONFIG.value is None) == (not MODEL.value):
        raise UserError("--config or --model: name one of them")
    names: set[str] = set()
    for text in MEASURE.value:
        m = parse_measurement(text)
        if m.benchmark not in BENCHMARKS:
            hint = suggest(m.benchmark, BENCHMARKS)
            raise UserError(f"--measure={text}: {m.benchmark}: is no benchmark{hint}")
        if m.name in names:
            raise UserError(f"--measure={text}: another measurement is named {m.name}")
        if not Path(m.rows).is_file():
            raise UserError(f"--measure={text}: {m.rows}: no such file")
        if m.is_judged and not TEACHER.value:
            raise UserError(f"--measure={text}: judged, and no --teacher")
        names.add(m.name)


def measure(model: str, teacher: str, out: Path) -> Figures:
    """Runs all measurements; returns their figures by name.

    NAME is the accuracy, NAME/think_rate the share of responses with a think block if asked to
    think, or else without. Sampled measurements add NAME/pass@k, NAME/length, and, with a teacher,
    NAME/reverse_kl; those of a benchmark with further figures add these.
    """
    from distill import rollout
    from distill.evaluation import evaluator, problems
    from distill.evaluation.protocols import EvalSpec

    figures: Figures = {}
    for text in MEASURE.value:
        m = parse_measurement(text)
        name, samples = m.name, m.samples
        sampling = rollout.Sampling(1.0 if samples else 0.0)
        sample = rollout.SampleSpec(max(1, samples), m.tokens, sampling, SEED.value, BATCH)
        ks = tuple(k for k in KS if k <= max(1, samples))
        spec = EvalSpec(m.benchmark, sample, m.is_thinking, ks=ks)
        rows = problems.load_problems(m.benchmark, m.rows, 0)
        judge = teacher if m.is_judged else ""
        summary = evaluator.evaluate_model(
            model, rows, spec, epath.Path(out / name), "float32", judge
        )
        figures[name] = summary["accuracy"]
        for key in ("think_rate", "prompt_accuracy", "f1", "reverse_kl"):
            if isinstance(summary.get(key), float):
                figures[f"{name}/{key}"] = summary[key]
        contents = {str(row["id"]): row.get("contents", "") for _, row in rows}
        if any(contents.values()):
            figures |= measure_contents(out / name, contents, ks)
        if samples:
            figures |= {f"{name}/pass@{k}": summary[f"pass@{k}"] for k in ks}
            figures[f"{name}/length"] = summary["mean_length"]
    return figures


def measure_contents(folder: Path, contents: dict[str, str], ks: tuple[int, ...]) -> Figures:
    """Grades the working of stored responses: the contents of all boxes in its last line.

    Returns NAME/contents@k. One digit in ten is right by chance, so with many samples the answer
    alone says little.
    """
    from distill.evaluation import statistics as shares
    from distill.evaluation.example_rows import EXAMPLES_FILE

    right: dict[str, list[bool]] = {}
    for line in (folder / EXAMPLES_FILE).read_text().splitlines():
        row = json.loads(line)
        found = re.search(r"(\d+)\n</think>", row["response"])
        is_right = found is not None and found[1] == contents[str(row["id"])]
        right.setdefault(str(row["id"]), []).append(is_right)
    return {
        f"{folder.name}/contents@{k}": statistics.fmean(
            shares.pass_at_k(sum(group), len(group), k) for group in right.values()
        )
        for k in ks
    }


def measure_prompt(config: Any) -> float:
    """Returns the mean length of the last stage's prompts, in tokens."""
    from distill.data import chat, sources
    from distill.policy import policy

    tokenizer = chat.load_tokenizer(policy.resolve_model_dir(config.student.path))
    assert tokenizer is not None
    data, means = config[config.stages[-1]].data, []
    pairs = data.mixture or ((data.source, 1.0),)
    for source, _ in pairs:
        lengths = []
        for _, (_, row) in zip(range(_PROMPTS), sources.open_rows(source), strict=False):
            if "text" in row:  # a document, of which all but the first token is learned
                lengths.append(1)
                continue
            messages = row.get("messages") or [{"role": "user", "content": row["question"]}]
            thinking = row.get("thinking", data.thinking > 0)
            lengths.append(len(chat.render_messages(tokenizer, messages, thinking=thinking)))
        means.append(statistics.mean(lengths))
    return statistics.fmean(means, [weight for _, weight in pairs])


def main() -> None:
    check_flags()
    workdir, config = Path(WORKDIR.value), CONFIG.value
    measured: dict[str, Any] = {}
    if config is not None:
        from distill.training import loop

        loop.run(config, workdir)
        measured["prompt_tokens"] = measure_prompt(config)
    out = workdir / "measured"
    measured["figures"] = measure(MODEL.value or str(workdir), TEACHER.value, out)
    run_files.write_json(workdir / "measured.json", measured)
    print(json.dumps(measured["figures"]))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
