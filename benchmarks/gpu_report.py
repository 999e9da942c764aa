"""The tables of `benchmarks.gpu`: rates, shares of the device's limits, and targets."""

import statistics
from typing import Any

from benchmarks import contest, costs
from benchmarks.contest import JsonDict
from distill.planning import gpus
from models.qwen3.config import Config

GIB = 2**30
# Share of the peak in training and scoring, share of the bandwidth in decoding, and how many times
# as fast as transformers' `generate`.
TARGETS = {"train": 0.45, "score": 0.55, "decode": 0.70, "generate": 5.0}

NOTES = """
FLOPs and bytes are the least that a call needs. A pass forward takes 2 FLOPs for each weight and
token and 4 x heads x their width for each pair of tokens and layer (on average a token attends to
half of its row); training takes three passes of the student and one of the teacher. What is
computed twice to save memory does not count, nor does a share of bandwidth count what is read
twice. MFU is FLOP/s over the data sheet's, or, where that is not known here, over the measured
products. Bandwidth is that of the copy, read + written. The loss's share is the time of the loss
alone, with hidden states of the same shapes. "Scoring" in a step is timed alone, "update" is the
rest of scoring and update together. Seconds are medians of calls after one that compiles.
"""

Row = tuple[str, ...]


def get_name(sizes: str) -> str:
    """Returns the name of the report's files, without what they end in."""
    return "gpu" if sizes == "real" else f"gpu-{sizes}"


def find_peak(device: str) -> float | None:
    """Returns the data sheet's FLOP/s in bfloat16 of the device of this name; None if unknown."""
    known = {gpu.name: gpu.bf16_tflops * 1e12 for gpu in gpus.GPUS.values()}
    return known.get(device)


def get_results(report: JsonDict, *names: str) -> dict[str, tuple[JsonDict, JsonDict]]:
    """Returns stage -> (its settings, its result) of the measured stages whose names begin so."""
    return {
        name: (entry["key"]["settings"], entry["result"])
        for name, entry in report["stages"].items()
        if name.startswith(names) and "result" in entry
    }


def compute_step_rates(job: JsonDict, result: JsonDict) -> JsonDict:
    """Returns the seconds, tokens, FLOPs and bytes of a call of train or score.

    A contender may have taken fewer rows than it was asked to.
    """
    student, teacher = (Config.from_hf(job[name]) for name in ("student", "teacher"))
    shape = result.get("rows", job["rows"]), job["tokens"], job["dtype"]
    if job["what"] == "reverse_kl":
        counted = costs.count_train(job["what"], student, teacher, *shape)
    else:
        counted = costs.count_score(job["what"], student, *shape)
    return {**counted, "seconds": statistics.median(result["seconds"])}


def compute_decode_rates(job: JsonDict, result: JsonDict) -> JsonDict:
    """Returns the seconds of a decoding step, tokens/s, and the bytes/s that it needs at least."""
    seconds = statistics.median(result["seconds"]) / result["steps"]
    config, rows = Config.from_hf(job["student"]), result["rows"]
    filled = job["filled"] + (result["steps"] + 1) / 2  # the newest token is read, too
    moved = costs.count_decode_bytes(config, rows, filled, job["dtype"])
    return {"seconds": seconds, "tokens": rows / seconds, "bytes": moved / seconds}


def list_targets(report: JsonDict) -> list[tuple[str, float, str, float]]:
    """Lists (what, the value, how it is shown, the target) of every measured target."""
    limits, rows = get_results(report, "limits").get("limits"), []
    for name, (job, result) in get_results(report, "train", "score").items():
        if limits and name in TARGETS:
            rates = compute_step_rates(job, result)
            peak = find_peak(report["device"]) or limits[1][job["dtype"]]
            mfu = rates["flop"] / rates["seconds"] / peak
            rows.append((f"{name}: MFU", mfu, f"{mfu:.1%}", TARGETS[name]))
    for name, (job, result) in get_results(report, "decode").items():
        if limits:
            share = compute_decode_rates(job, result)["bytes"] / limits[1]["copy"]
            rows.append((f"{name}: of bandwidth", share, f"{share:.1%}", TARGETS["decode"]))
    samplers = list_samplers(report)
    rates = {row["sampler"]: row.get("decode_tokens_per_second", 0.0) for row in samplers}
    theirs = max((rate for x, rate in rates.items() if x.startswith("transformers")), default=0.0)
    if theirs and rates.get("ours"):
        ratio = rates["ours"] / theirs
        rows.append(
            ("generate: times transformers' decoding", ratio, f"{ratio:.1f}", TARGETS["generate"])
        )
    return rows


def render_cells(*rows: Row) -> list[str]:
    """Renders a table in Markdown; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def render_steps(report: JsonDict, limits: JsonDict) -> list[str]:
    """Renders training and scoring, this project's and others'."""
    peak, rows = find_peak(report["device"]), []
    for name, (job, result) in get_results(report, "train", "score").items():
        parts = {name: result}
        if "logp" in result:
            parts = {f"{name}, hidden states": result, f"{name}, logp": result["logp"]}
        for part, answer in parts.items():
            what = "logp" if part.endswith("logp") else job["what"]
            rates = compute_step_rates({**job, "what": what}, answer)
            rate, measured = rates["flop"] / rates["seconds"], limits.get(job["dtype"])
            loss = statistics.median(answer.get("loss_seconds", [0.0])) / rates["seconds"]
            rows.append(
                (
                    f"{part}{', ' + job['contender'] if 'contender' in job else ''}",
                    f"{answer.get('rows', job['rows'])} x {job['tokens']}",
                    f"{rates['seconds']:.4g}",
                    f"{rates['tokens'] / rates['seconds']:.4g}",
                    f"{rate / 1e12:.3g}",
                    f"{rate / peak:.1%}" if peak else "",
                    f"{rate / measured:.1%}" if measured else "",
                    f"{loss:.0%}" if loss else "",
                    f"{answer['peak_bytes'] / GIB:.2f}",
                    f"{answer['first_call_seconds']:.1f}",
                )
            )
    if not rows:
        return []
    head = ("", "rows x tokens", "s", "tokens/s", "TFLOP/s", "MFU", "of measured products")
    head += ("the loss's share", "peak GiB", "first call, s")
    return ["## Training and scoring", "", *render_cells(head, *rows)]


def render_decoding(report: JsonDict, limits: JsonDict) -> list[str]:
    rows = []
    for job, result in get_results(report, "decode").values():
        rates, asked = compute_decode_rates(job, result), ""
        if result["rows"] < job["rows"]:
            asked = f" (the cache of {job['rows']} does not fit)"
        rows.append(
            (
                f"{result['rows']}{asked}",
                str(job["filled"]),
                f"{1e3 * rates['seconds']:.3f}",
                f"{rates['tokens']:.4g}",
                f"{rates['bytes'] / 1e9:.4g}",
                f"{rates['bytes'] / limits['copy']:.1%}" if limits else "",
                f"{result['peak_bytes'] / GIB:.2f}",
            )
        )
    if not rows:
        return []
    head = ("rows", "tokens in the cache of each", "ms a step", "tokens/s", "GB/s")
    head += ("of measured bandwidth", "peak GiB")
    return ["## Decoding", "", *render_cells(head, *rows)]


def list_samplers(report: JsonDict) -> list[JsonDict]:
    """Lists the rows of rollout.measure_decode of all stages that compare samplers."""
    results = get_results(report, "generate").values()
    return [row for _, result in results for row in result["samplers"]]


def render_generate(report: JsonDict) -> list[str]:
    rows: list[Row] = []
    samplers = list_samplers(report)
    ours = next((x for x in samplers if x["sampler"] == "ours"), {})
    for row in samplers:
        if "absent" in row:
            rows.append((row["sampler"], row["absent"], "", "", "", ""))
            continue
        rate, seconds = row["decode_tokens_per_second"], row["seconds"]
        rows.append(
            (
                row["sampler"],
                f"{rate:.4g}",
                f"{ours['decode_tokens_per_second'] / rate:.2f}" if ours else "",
                f"{row['prefill_seconds']:.3g}",
                f"{seconds:.3g}",
                f"{seconds / ours['seconds']:.2f}" if ours else "",
            )
        )
    if not rows:
        return []
    job = next(iter(get_results(report, "generate").values()))[0]
    shape = f"{job['rows']} prompts of {job['prompt_tokens']} tokens, {job['new_tokens']} new ones"
    head = ("", "decode, tokens/s", "ours over it", "prompts, s", "all, s", "ours over it")
    return ["## Samplers", "", f"{shape}, greedy.", "", *render_cells(head, *rows)]


def render_whole_step(report: JsonDict) -> list[str]:
    lines = []
    for job, result in get_results(report, "step").values():
        seconds, parts = statistics.median(result["seconds"]), result["parts"]
        total = sum(parts.values())
        rows = [(part, f"{x:.4g}", f"{x / total:.0%}") for part, x in parts.items()]
        lines += [
            "## A whole step",
            "",
            f"On-policy, {job['rows']} prompts of {job['prompt_tokens']} tokens and responses of"
            f" {job['new_tokens']}: {seconds:.4g} s, {result['trained_tokens'] / seconds:.4g}"
            f" response tokens/s; {result['micro_batches']} micro-batches;"
            f" peak {result['peak_bytes'] / GIB:.2f} GiB; the first step, with what it compiles,"
            f" {result['first_call_seconds']:.1f} s.",
            "",
            *render_cells(("part", "s", "share"), *rows),
            f"![Where the time goes]({get_figure_name(report)})",
            "",
        ]
    return lines


def get_figure_name(report: JsonDict) -> str:
    """Returns the name of the figure of the whole step, in the folder of the report."""
    return f"{get_name(report['sizes'])}-step.svg"


def render_numerics(report: JsonDict) -> list[str]:
    lines = []
    for _, result in get_results(report, "numerics").values():
        texts = {name: x for name, x in result.items() if isinstance(x, str)}
        lines += ["## Numerics", "", *(f"- {name}: {text}" for name, text in texts.items()), ""]
    return lines


def render_report(report: JsonDict) -> list[str]:
    """Renders what has been measured so far as lines of Markdown."""
    entries, host = report["stages"], report["machine"]
    limits: Any = get_results(report, "limits").get("limits", (None, {}))[1]
    title = f"One device: {report['device']}, {report['sizes']} sizes"
    lines = [f"# {title}", ""]
    if limits:
        lines = contest.render_heading(title, host, limits)
    if peak := find_peak(report["device"]):
        lines.append(f"Its data sheet says {peak / 1e12:.0f} TFLOP/s in bfloat16.")
    revisions = {entry["key"]["revision"] for entry in entries.values()}
    lines += [f"Random models; checksum of the source: {', '.join(sorted(revisions))}.", ""]
    if targets := list_targets(report):
        rows = [
            (what, shown, f"{target:g}" if target > 1 else f"{target:.0%}",
             "reached" if value >= target else "not reached")
            for what, value, shown, target in targets
        ]  # fmt: skip
        lines += ["## Targets", "", *render_cells(("", "measured", "target", ""), *rows)]
    lines += render_steps(report, limits) + render_decoding(report, limits)
    lines += render_whole_step(report) + render_generate(report) + render_numerics(report)
    failed = {name: entry["failed"] for name, entry in entries.items() if "failed" in entry}
    if failed:
        rows = list(failed.items())
        lines += ["## Not measured", "", *render_cells(("stage", "why"), *rows)]
    return [*lines, NOTES.strip()]
