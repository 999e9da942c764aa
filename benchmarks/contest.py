"""What the side-by-side benchmarks share: contenders in processes of their own, what the machine
can do at most, and how results are written.

A contender answers jobs, one JSON object a line (`benchmarks.workers.serve`). Those of a benchmark
take turns, A B C A B C, so that a machine that slows down slows all of them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import trainers
from distill.runtime import cli
from models.qwen3.config import SIZES, Config

ROOT = Path(__file__).parent.parent

JsonDict = dict[str, Any]

flags.disclaim_key_flags()  # --help of a benchmark then lists these flags among its own


def define_flags(rounds: int) -> flags.FlagValues:
    """The flags that every benchmark has; `rounds` is a default."""
    options = flags.FlagValues()
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.", options)
    flags.DEFINE_integer("rounds", rounds, "Turns of each.", lower_bound=1, flag_values=options)
    flags.DEFINE_string("hf_python", sys.executable, "Interpreter with torch and its kin.", options)
    flags.DEFINE_string("tunix_python", sys.executable, "Interpreter with google-tunix.", options)
    flags.DEFINE_string("out", "benchmarks/results", "Directory of the results.", options)
    return options


def define_model_flags(options: flags.FlagValues, rows: int, tokens: int) -> None:
    """Adds the flags of benchmarks that compute with random models, as benchmarks/trainers.py."""
    flags.DEFINE_enum("student", "0.6b", list(SIZES), "Whose widths it has.", flag_values=options)
    flags.DEFINE_enum("teacher", "1.7b", list(SIZES), "Whose widths it has.", flag_values=options)
    flags.DEFINE_integer("layers", 0, "Of both; 0: as released.", flag_values=options)
    flags.DEFINE_integer("vocabulary", 0, "Of both; 0: as released.", flag_values=options)
    flags.DEFINE_integer("rows", rows, "Of a call.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("tokens", tokens, "Of each row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("steps", 2, "Calls in a turn, after the first.", 1, flag_values=options)


def make_config(options: Any, name: str) -> Config:
    """The config of "student" or "teacher", by the flags of `models`."""
    cut = {"num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    return dataclasses.replace(SIZES[options[name].value], **{k: n for k, n in cut.items() if n})


def get_interpreters(options: Any) -> dict[str, str]:
    """The interpreters by the flags of `options`; what is not named here runs in this one."""
    torch: dict[str, str] = dict.fromkeys(("transformers", "trl"), options.hf_python)
    return {"ours": sys.executable, "tunix": options.tunix_python, **torch}


class Worker:
    """One contender in its process: `python -m MODULE ARGS`; `absent` says why there is none."""

    def __init__(self, python: str, module: str, *args: str) -> None:
        self.absent = ""
        self.versions: dict[str, str] = {}
        # On a GPU, jax would else take three quarters of its memory whether it needs them or not.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        except OSError as error:
            self.absent = f"not installed ({python}: {error.strerror})"
            return
        self._read_answer()

    def _read_answer(self) -> JsonDict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: JsonDict = (
            json.loads(line) if line else {"absent": f"ended ({self._process.wait()})"}
        )
        self.absent = answer.get("absent", "")
        self.versions.update(answer.get("versions", {}))
        return answer

    def send_job(self, **job: Any) -> JsonDict | None:
        """Its answer; None if it has none, as where memory ran out."""
        if self.absent:
            return None
        assert self._process.stdin is not None
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.absent = f"ended ({self._process.wait()})"
            return None
        answer = self._read_answer()
        return None if self.absent else answer

    def close(self) -> None:
        if hasattr(self, "_process"):
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()


def list_contenders(options: Any, case: str) -> dict[str, Callable[[], Worker]]:
    """Who of benchmarks/trainers.py can do `what` in the dtype of the flags: name → a process."""
    interpreters = get_interpreters(options)
    return {
        name: functools.partial(
            Worker, interpreters[name.split(",")[0]], "benchmarks.trainers", name
        )
        for name, can in trainers.WORKERS.items()
        if case in can and ("autocast" not in name or options.dtype == "bfloat16")
    }


def measure_limits() -> JsonDict:
    """What this project's devices can do: bytes a second that are read, and copied in place (read +
    written); operations a second of a matrix product in each dtype; which devices they are."""
    worker = Worker(sys.executable, "benchmarks.limits")
    answer = worker.send_job()
    worker.close()
    assert answer is not None, worker.absent
    return answer


def run_turns(
    contenders: Mapping[str, Callable[[], Worker]], rounds: int, job: JsonDict
) -> tuple[dict[str, JsonDict], dict[str, dict[str, str]]]:
    """What each makes of the job, and their versions. Each turn is a process of its own, so that no
    contender's memory is in another's way, and its peak is that of the job.

    Of "seconds", a list, the median over all turns; of other figures the median, of peaks the
    largest.
    """
    answers: dict[str, list[JsonDict]] = {name: [] for name in contenders}
    results: dict[str, JsonDict] = {}
    versions: dict[str, dict[str, str]] = {}
    for _ in range(rounds):
        for name, start_worker in contenders.items():
            if "absent" in results.get(name, {}):
                continue
            worker = start_worker()
            answer = worker.send_job(**job)
            worker.close()
            if answer is None:
                results[name] = {"absent": worker.absent}
                continue
            versions[name] = worker.versions
            answers[name].append(answer)
            print(f"{name}: {statistics.median(answer['seconds']):.3f} s", file=sys.stderr)
    for name, contender_answers in answers.items():
        if name in results or not contender_answers:
            continue
        times = [x for answer in contender_answers for x in answer["seconds"]]
        results[name] = {"seconds": statistics.median(times), "all_seconds": times}
        for figure in contender_answers[0].keys() - {"seconds", "versions"}:
            reduce = max if figure.startswith("peak") else statistics.median
            results[name][figure] = reduce([answer[figure] for answer in contender_answers])
    return results, versions


def describe_machine(versions: dict[str, dict[str, str]]) -> JsonDict:
    """What the numbers belong to: processor, memory, versions."""
    name, memory = platform.processor() or platform.machine(), None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_gib": memory and round(memory, 1),
        "load_before": os.getloadavg()[0],
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def render_heading(title: str, host: JsonDict, limits: JsonDict) -> list[str]:
    """The lines above a table: where, when, with what, and what the machine gives at most."""
    used = (
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in of.items())
        for name, of in host["versions"].items()
    )
    return [
        f"# {title}",
        "",
        f"{host['time']}, {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB,"
        f" load {host['load_before']:.1f} before. On {limits['devices']}, measured in the same run:"
        f" memory reads {limits['read'] / 1e9:.1f} GB/s, copies {limits['copy'] / 1e9:.1f} GB/s"
        " (read + written); matrix products"
        f" {', '.join(f'{limits[d] / 1e12:.3g} TFLOP/s in {d}' for d in ('float32', 'bfloat16'))}.",
        "; ".join(used) + ".",
    ]


def render_table(rows: list[JsonDict], limits: JsonDict, dtype: str) -> list[str]:
    """Rows of {"case", "name", "tokens", "flop", "bytes", ...} beside this project's of the case,
    and beside what the machine gives: `flop` and `bytes` are what the job cannot do without."""
    ours = {r["case"]: r.get("seconds") for r in rows if r["name"] == "ours"}
    lines = [
        "| case | by | tokens/s | ours over it | s | TFLOP/s | of matmul peak | GB/s |"
        " of copy bandwidth | peak GiB | first call, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['case']} | {row['name']} | "
        if "absent" in row:
            lines.append(start + row["absent"].replace("|", "/") + " | | | | | | | | |")
            continue
        seconds, mine = row["seconds"], ours.get(row["case"])
        rate, width = row["flop"] / seconds, row["bytes"] / seconds
        lines.append(
            f"{start}{row['tokens'] / seconds:.4g} | {f'{seconds / mine:.2f}' if mine else ''}"
            f" | {seconds:.4g} | {rate / 1e12:.3g} | {rate / limits[dtype]:.0%}"
            f" | {width / 1e9:.3g} | {width / limits['copy']:.0%}"
            f" | {row['peak_bytes'] / 2**30:.2f} | {row['first_call_seconds']:.1f} |"
        )
    return lines


def name_results(benchmark: str, known: list[str], cases: Mapping[str, JsonDict]) -> str:
    """What its files are called: a part of the cases does not take the place of all of them."""
    return benchmark if len(cases) == len(known) else "-".join([benchmark, *cases])


def run_benchmark(
    name: str, title: str, options: Any, cases: dict[str, JsonDict], remarks: list[str]
) -> None:
    """A whole benchmark by the flags of `models`.

    cases: what → {"tokens", "flop", "bytes"} of a call, and what else its job says.
    """
    out = cli.check_output(f"{options.out}/{name}-{options.dtype}.json")
    measured, load = measure_limits(), os.getloadavg()[0]
    names = ("student", "teacher", "layers", "vocabulary", "rows", "tokens", "steps", "dtype")
    shape = {flag: options[flag].value for flag in names} | {"rounds": options.rounds}
    rows: list[JsonDict] = []
    used: dict[str, dict[str, str]] = {}
    for what, counts in cases.items():
        job = {**shape, **counts, "what": what}
        job |= {name: make_config(options, name).to_hf() for name in ("student", "teacher")}
        who = list_contenders(options, what)
        results_by_name, versions = run_turns(who, options.rounds, job)
        used |= versions
        rows += [{"case": what, "name": one, **counts, **results_by_name[one]} for one in who]
    host = {**describe_machine(used), "load_before": load}
    lines = render_heading(f"{title}, {options.dtype}", host, measured)
    depth = f"{options.layers} layers" if options.layers else "all layers"
    lines += [
        f"Widths of {options.student} (teacher: {options.teacher}), {depth}, random weights;"
        f" {options.rows} x {options.tokens} tokens; medians of {options.rounds} turns of"
        f" {options.steps} calls.",
        *remarks,
        "",
        *render_table(rows, measured, options.dtype),
    ]
    rates: dict[str, dict[str, float]] = {what: {} for what in cases}
    for row in rows:
        rates[row["case"]][row["name"]] = row["tokens"] / row.get("seconds", float("inf"))
    results = {"machine": host, "shape": shape, "limits": measured, "rows": rows}
    write_results(out, results, lines, "tokens/s", rates)


def write_results(
    out: Path, results: JsonDict, lines: list[str], unit: str, rates: dict[str, dict[str, float]]
) -> None:
    """All numbers as OUT (.json), the table beside it (.md) and on stdout, and `rates` as bars
    (.svg): group → name → height, where there are any."""
    out.write_text(json.dumps(results, indent=2) + "\n")
    text = "\n".join(lines) + "\n"
    out.with_suffix(".md").write_text(text)
    if any(rates.values()):
        _plot_bars(
            lines[0].removeprefix("# "), results["machine"], unit, rates, out.with_suffix(".svg")
        )
    print(text)


def _plot_bars(
    title: str, host: JsonDict, unit: str, rates: dict[str, dict[str, float]], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in rates.values() for name in group))
    wide = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for i, name in enumerate(names):
        places = [at + wide * (i + 0.5) - 0.4 for at in range(len(rates))]
        heights = [group.get(name, 0.0) for group in rates.values()]
        bars = axes.bar(places, heights, wide, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(rates)), list(rates))
    axes.set_ylabel(unit)
    axes.set_title(f"{title}; {host['processor']}, {host['cores']} cores", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path)
