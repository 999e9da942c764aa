"""python -m studies.traces: puts sampled responses under other prompts.

    python -m studies.traces --samples=with_manual.jsonl --rows=questions.jsonl --out=traces.jsonl

Samples are rows as distill.generate writes them; a row with the same id says what their prompt is
to be. So a student learns, without a manual, what a teacher said that read it. Left out are samples
that were cut or say nothing, and those with a think block to a row that asks for none.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags

from distill.data import sources
from distill.runtime import cli, paths, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
SAMPLES = flags.DEFINE_string("samples", None, "Rows with samples.", OPTIONS, required=True)
ROWS = flags.DEFINE_string("rows", None, "Rows with the prompts.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "File of rows to write.", OPTIONS, required=True)


def pair_rows(
    samples: Iterable[tuple[str, dict]], rows: Iterable[tuple[str, dict]]
) -> list[dict[str, Any]]:
    """Returns the rows, each with a `response` of the samples of its id; once for each of them.

    Args:
      samples, rows: pairs of a row's location and the row.

    Raises:
      UserError: naming a row with samples whose id no row has.
    """
    prompts = {row["id"]: row for _, row in rows}
    pairs = []
    for where, sampled in samples:
        if sampled["id"] not in prompts:
            raise UserError(f"{where}: id {sampled['id']!r} is that of no row of --rows")
        pairs += [
            {**prompts[sampled["id"]], "response": sample["text"]}
            for sample in sampled["samples"]
            if _is_response(sample, prompts[sampled["id"]])
        ]
    return pairs


def _is_response(sample: dict[str, Any], row: dict[str, Any]) -> bool:
    """Returns True if training takes a sample as the row's response."""
    text = sample["text"]
    thinks = "<think>" in text or "</think>" in text
    is_refused = thinks and row.get("thinking") is False
    return sample["finish_reason"] == "stop" and bool(text.strip()) and not is_refused


def main() -> None:
    out = paths.check_output(OUT.value, SAMPLES.value)
    pairs = pair_rows(sources.open_rows(SAMPLES.value), sources.open_rows(ROWS.value))
    run_files.write_jsonl(out, pairs)
    print(f"{out}: {len(pairs):,} responses")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
