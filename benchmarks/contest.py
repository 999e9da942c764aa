"""Shared parts of the side-by-side benchmarks: worker processes, hardware limits and reports.

A contender answers jobs, one JSON object a line (`benchmarks.workers.serve_jobs`). Contenders take
turns, A B C A B C, so that a slowdown of the machine affects all of them.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import trainers
from distill.runtime import paths
from models.qwen3.config import SIZES, Config

ROOT = Path(__file__).parent.parent
CLOSE_SECONDS = 60.0  # in which a worker without work must end

JsonDict = dict[str, Any]

flags.disclaim_key_flags()  # so that --help of a benchmark lists these flags as its own


def define_flags(rounds: int) -> flags.FlagValues:
    """Defines the flags of every side-by-side benchmark; `rounds` is a default."""
    options = flags.FlagValues()
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation.", options
    )
    flags.DEFINE_integer(
        "rounds", rounds, "Turns of each contender.", lower_bound=1, flag_values=options
    )
    flags.DEFINE_string("hf_python", sys.executable, "Interpreter with torch and TRL.", options)
    flags.DEFINE_string("tunix_python", sys.executable, "Interpreter with google-tunix.", options)
    flags.DEFINE_string("out", "benchmarks/results", "Directory for the results.", options)
    return options


def define_model_flags(options: flags.FlagValues, rows: int, tokens: int) -> None:
    """Adds the flags of benchmarks of random models, whose workers are in benchmarks.trainers."""
    flags.DEFINE_enum("student", "0.6b", list(SIZES), "Its released size.", flag_values=options)
    flags.DEFINE_enum("teacher", "1.7b", list(SIZES), "Its released size.", flag_values=options)
    flags.DEFINE_integer("layers", 0, "Of both; 0: as released.", flag_values=options)
    flags.DEFINE_integer("vocabulary", 0, "Of both; 0: as released.", flag_values=options)
    flags.DEFINE_integer("rows", rows, "Rows per call.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("tokens", tokens, "Tokens per row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("steps", 2, "Calls per turn after the first.", 1, flag_values=options)


def make_config(options: Any, name: str) -> Config:
    """Returns the config of "student" or "teacher" by the flags of `define_model_flags`."""
    cut = {"num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    return dataclasses.replace(SIZES[options[name].value], **{k: n for k, n in cut.items() if n})


def get_interpreters(options: Any) -> dict[str, str]:
    """Returns each contender's interpreter by the flags; this project runs in the current one."""
    torch: dict[str, str] = dict.fromkeys(("transformers", "trl"), options.hf_python)
    return {"ours": sys.executable, "tunix": options.tunix_python, **torch}


class Worker:
    """One contender in a process `python -m MODULE ARGS`; `absent` says why it cannot run.

    deadline: of time.monotonic(), when it is killed with all processes that it has started.
    """

    def __init__(self, python: str, module: str, *args: str, deadline: float = math.inf) -> None:
        self.absent = ""
        self.versions: dict[str, str] = {}
        self._deadline = deadline
        # By default, jax preallocates three quarters of a GPU's memory.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
                process_group=0,
            )
        except OSError as error:
            self.absent = f"not installed ({python}: {error.strerror})"
            return
        self._read_answer()

    def _read_answer(self) -> JsonDict:
        assert self._process.stdout is not None
        # A positive wait, as 0 would let an answer win that is there by chance.
        seconds = min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX)
        is_late = threading.Event()
        timer = threading.Timer(max(0.001, seconds), lambda: (is_late.set(), self.kill()))
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        except BaseException:  # an interruption, which a group of its own does not get
            self.kill()
            raise
        finally:
            timer.cancel()
        if is_late.is_set():
            answer: JsonDict = {"absent": "took too long, and was killed"}
        else:
            answer = json.loads(line) if line else {"absent": f"ended ({self._process.wait()})"}
        self.absent = answer.get("absent", "")
        self.versions.update(answer.get("versions", {}))
        return answer

    def send_job(self, **job: Any) -> JsonDict | None:
        """Returns the answer to a job; None if there is none, for example if memory ran out."""
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

    def kill(self) -> None:
        """Kills the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process; kills it if it does not end."""
        if hasattr(self, "_process"):
            with contextlib.suppress(BrokenPipeError):
                try:
                    self._process.communicate(timeout=CLOSE_SECONDS)
                except subprocess.TimeoutExpired:
                    self.kill()
                    self._process.communicate()


def list_contenders(options: Any, case: str) -> dict[str, Callable[[], Worker]]:
    """Lists the workers of benchmarks/trainers.py that can do `case` in the flags' dtype.

    Returns name → a function that starts the worker's process.
    """
    interpreters = get_interpreters(options)
    return {
        name: functools.partial(
            Worker, interpreters[name.split(",")[0]], "benchmarks.trainers", name
        )
        for name, tasks in trainers.WORKERS.items()
        if case in tasks and ("autocast" not in name or options.dtype == "bfloat16")
    }


def measure_limits() -> JsonDict:
    """Measures the limits of this project's devices in a process of its own: bytes/s read, bytes/s
    copied in place (read + written), and FLOP/s of a matrix product by dtype.
    """
    worker = Worker(sys.executable, "benchmarks.limits")
    answer = worker.send_job()
    worker.close()
    assert answer is not None, worker.absent
    return answer


def run_turns(
    contenders: Mapping[str, Callable[[], Worker]], rounds: int, job: JsonDict
) -> tuple[dict[str, JsonDict], dict[str, dict[str, str]]]:
    """Runs a job on every contender, in turns; returns their results and package versions by name.

    Each turn is a process of its own, so that contenders do not share memory and the peak is the
    job's. Results are medians over all turns: "seconds" over the calls of all turns, while figures
    that begin with "peak" are maxima.
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
    """Describes the machine of the results: processor, memory, load, versions and time."""
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
    """Renders the lines above a table: the machine, the time, the limits and the versions."""
    used = (
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in packages.items())
        for name, packages in host["versions"].items()
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
    """Renders rows of {"case", "name", "tokens", "flop", "bytes", ...} as a table.

    Rates are shown relative to this project's and to the machine's limits; `flop` and `bytes` are
    the least that the job needs.
    """
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
        seconds, our_seconds = row["seconds"], ours.get(row["case"])
        flop_rate, byte_rate = row["flop"] / seconds, row["bytes"] / seconds
        lines.append(
            f"{start}{row['tokens'] / seconds:.4g}"
            f" | {f'{seconds / our_seconds:.2f}' if our_seconds else ''}"
            f" | {seconds:.4g} | {flop_rate / 1e12:.3g} | {flop_rate / limits[dtype]:.0%}"
            f" | {byte_rate / 1e9:.3g} | {byte_rate / limits['copy']:.0%}"
            f" | {row['peak_bytes'] / 2**30:.2f} | {row['first_call_seconds']:.1f} |"
        )
    return lines


def name_results(benchmark: str, known: list[str], cases: Mapping[str, JsonDict]) -> str:
    """Names a benchmark's result files; a run of some cases does not overwrite a run of all."""
    return benchmark if len(cases) == len(known) else "-".join([benchmark, *cases])


def run_benchmark(
    name: str, title: str, options: Any, cases: dict[str, JsonDict], remarks: list[str]
) -> None:
    """Runs a whole benchmark with the flags of `define_model_flags`, and writes its results.

    cases: case → {"tokens", "flop", "bytes"} of a call, and further fields of its job.
    """
    out = paths.check_output(f"{options.out}/{name}-{options.dtype}.json")
    limits, load = measure_limits(), os.getloadavg()[0]
    names = ("student", "teacher", "layers", "vocabulary", "rows", "tokens", "steps", "dtype")
    shape = {flag: options[flag].value for flag in names} | {"rounds": options.rounds}
    rows: list[JsonDict] = []
    used: dict[str, dict[str, str]] = {}
    for case, costs in cases.items():
        job = {**shape, **costs, "what": case}
        job |= {name: make_config(options, name).to_hf() for name in ("student", "teacher")}
        contenders = list_contenders(options, case)
        results_by_name, versions = run_turns(contenders, options.rounds, job)
        used |= versions
        rows += [{"case": case, "name": who, **costs, **results_by_name[who]} for who in contenders]
    host = {**describe_machine(used), "load_before": load}
    lines = render_heading(f"{title}, {options.dtype}", host, limits)
    depth = f"{options.layers} layers" if options.layers else "all layers"
    lines += [
        f"Widths of {options.student} (teacher: {options.teacher}), {depth}, random weights;"
        f" {options.rows} x {options.tokens} tokens; medians of {options.rounds} turns of"
        f" {options.steps} calls.",
        *remarks,
        "",
        *render_table(rows, limits, options.dtype),
    ]
    rates: dict[str, dict[str, float]] = {case: {} for case in cases}
    for row in rows:
        rates[row["case"]][row["name"]] = row["tokens"] / row.get("seconds", float("inf"))
    results = {"machine": host, "shape": shape, "limits": limits, "rows": rows}
    write_results(out, results, lines, "tokens/s", rates)


def write_results(
    out: Path, results: JsonDict, lines: list[str], unit: str, rates: dict[str, dict[str, float]]
) -> None:
    """Writes all numbers to `out` (.json), and beside it the table (.md) and a bar chart of `rates`
    (.svg), group → name → height, if there are any. Prints the table too."""
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
    bar_width = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for i, name in enumerate(names):
        places = [group + bar_width * (i + 0.5) - 0.4 for group in range(len(rates))]
        heights = [group.get(name, 0.0) for group in rates.values()]
        bars = axes.bar(places, heights, bar_width, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(rates)), list(rates))
    axes.set_ylabel(unit)
    axes.set_title(f"{title}; {host['processor']}, {host['cores']} cores", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path)
