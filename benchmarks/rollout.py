"""python -m benchmarks.rollout [--dtype=bfloat16] [--tunix_python=PATH]: samplers side by side.

This project's sampler, Hugging Face's `generate` (growing and static cache) and google-tunix's, on
the same random Qwen3-0.6B, prompts, lengths and dtype, all greedy, each in a process of its own,
taking turns: A B C A B C. Medians of the rounds after a warm-up. Prompts alone are timed too (one
new token), so that prefill and decoding are told apart. Writes a table (.md), all numbers (.json)
and a plot (.svg) to --out, with the machine named.

tunix wants a venv of its own: python3.11 -m venv T && T/bin/pip install google-tunix, and then
--tunix_python=T/bin/python. A sampler that is not installed is said to be absent.
"""

import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from absl import flags

from distill import cli
from models.errors import UserError

ROOT = Path(__file__).parent.parent
OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", "", "Model directory; default: a random Qwen3-0.6B, made in runs/.", OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of weights and cache.", flag_values=OPTIONS
)
BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows decoded together.", OPTIONS)
PROMPT = flags.DEFINE_integer(
    "prompt_tokens", 16, "In every prompt.", lower_bound=1, flag_values=OPTIONS
)
NEW = flags.DEFINE_integer(
    "new_tokens", 64, "In every response.", lower_bound=2, flag_values=OPTIONS
)
CACHE = flags.DEFINE_integer(
    "cache", 512, "Slots of those caches that have a fixed size.", flag_values=OPTIONS
)
ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Measured, after one to warm up.", lower_bound=1, flag_values=OPTIONS
)
CASES = flags.DEFINE_multi_enum(
    "case", ["decode", "tail", "group"], ["decode", "tail", "group"], "Which.", flag_values=OPTIONS
)
CAP = flags.DEFINE_integer("cap", 128, "tail: the longest response.", flag_values=OPTIONS)
SLOTS = flags.DEFINE_integer("slots", 8, "tail: rows decoded together.", flag_values=OPTIONS)
HF_PYTHON = flags.DEFINE_string(
    "hf_python", sys.executable, "Interpreter with torch and transformers.", OPTIONS
)
TUNIX_PYTHON = flags.DEFINE_string(
    "tunix_python", sys.executable, "Interpreter with google-tunix.", OPTIONS
)
OUT = flags.DEFINE_string("out", "benchmarks/results", "Directory of the results.", OPTIONS)

# name → (worker, its mode)
SAMPLERS = {
    "ours": ("ours", ""),
    "transformers": ("transformers", "dynamic"),
    "transformers, static cache": ("transformers", "static"),
    "tunix": ("tunix", ""),
}

Row = dict[str, Any]


class Worker:
    """One sampler in its process; `absent` says why there is none."""

    def __init__(self, name: str, python: str, model: Path) -> None:
        command = [python, "-m", "benchmarks.workers", name, str(model), DTYPE.value]
        self.absent = ""
        self.versions: dict[str, str] = {}
        try:
            self._process = subprocess.Popen(
                [*command, str(CACHE.value)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        except OSError as error:
            self.absent = f"not installed ({python}: {error.strerror})"
            return
        self._hear()

    def _hear(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: Row = json.loads(line) if line else {"absent": f"ended ({self._process.wait()})"}
        self.absent = answer.get("absent", "")
        self.versions.update(answer.get("versions", {}))
        return answer

    def ask(self, **job: Any) -> Row | None:
        """Its answer; None if it has ended, as where memory ran out."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return None
        answer = self._hear()
        return None if self.absent else answer

    def close(self) -> None:
        if not self.absent:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def random_model() -> Path:
    """A Qwen3-0.6B with random weights in Hugging Face format, written once for each dtype."""
    path = ROOT / "runs" / f"random-qwen3-0.6b-{DTYPE.value}"
    if not (path / "config.json").exists():
        # In a process that ends, with its memory.
        code = (
            "import jax, pathlib, sys; from models.qwen3 import config, model, weights;"
            "c = config.SIZES['0.6b']; p = jax.jit(lambda k: model.init(c, k))(jax.random.key(0));"
            "weights.save(p, c, pathlib.Path(sys.argv[1]), jax.numpy.dtype(sys.argv[2]))"
        )
        part = path.with_name(path.name + ".part")
        subprocess.run([sys.executable, "-c", code, part, DTYPE.value], cwd=ROOT, check=True)
        part.rename(path)
    return path


def prompts(count: int, vocabulary: int, length: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]


def decode(workers: dict[str, Worker], fields: Row, bandwidth: Row) -> list[Row]:
    """Every sampler at every batch: prefill seconds, decoded tokens and bytes a second."""
    rows = []
    for batch in map(int, BATCHES.value):
        asked = prompts(batch, fields["vocab_size"], PROMPT.value)
        seconds: dict[tuple[str, int], list[float]] = {}
        written: dict[str, list] = {}
        for _ in range(1 + ROUNDS.value):
            for name, (worker, mode) in SAMPLERS.items():
                for new in (1, NEW.value):
                    if workers[worker].absent:
                        continue
                    answer = workers[worker].ask(prompts=asked, new=new, mode=mode)
                    if answer is not None:
                        seconds.setdefault((name, new), []).append(answer["seconds"])
                        written[name] = answer["tokens"]
        for name, (worker, _) in SAMPLERS.items():
            row: Row = {"sampler": name, "batch": batch}
            times = seconds.get((name, NEW.value), [])
            if len(times) < 1 + ROUNDS.value:
                rows.append({**row, "absent": workers[worker].absent})
                continue
            assert all(len(tokens) == NEW.value for tokens in written[name]), name
            prefill = statistics.median(seconds[name, 1][1:])
            whole = statistics.median(times[1:])
            if whole <= prefill:
                rows.append(
                    {**row, "absent": "not measured: too few new tokens, or others at work"}
                )
                continue
            steps = NEW.value - 1
            rate = steps / (whole - prefill)
            read = rate * step_bytes(fields, batch, PROMPT.value + steps / 2)
            row |= {
                "prefill_seconds": prefill,
                "seconds": whole,
                "all_seconds": times[1:],
                "tokens_per_second": batch * NEW.value / whole,
                "decode_tokens_per_second": batch * rate,
                "bytes_per_second": read,
                "of_read_bandwidth": read / bandwidth["read"],
                "first_call_seconds": sum(seconds[name, new][0] for new in (1, NEW.value)),
                "agrees_with_ours": agreement(written["ours"], written[name]),
            }
            rows.append(row)
            print(f"{name}, batch {batch}: {batch * rate:.1f} tokens/s", file=sys.stderr)
    return rows


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of greedy tokens that are the same, up to the first of a row that is not."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return same / sum(map(len, ours))


def step_bytes(fields: Row, batch: int, filled: float) -> float:
    """Bytes that one decoding step cannot but read: all weights, and the filled cache once."""
    layers, D, F = (fields[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    N, K, H = (fields[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    weights = layers * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + fields["vocab_size"] * D
    cached = batch * filled * layers * 2 * K * H
    return (weights + cached) * (4 if DTYPE.value == "float32" else 2)


def tail(worker: Worker, fields: Row) -> Row:
    """Log-normal lengths with a mean of an eighth of the cap: useful tokens a second."""
    slots, rng = SLOTS.value, random.Random(0)
    count = 16 * slots
    # Of a log-normal variable, mean = exp(mu + sigma²/2).
    mu = math.log(CAP.value / 8) - 0.5
    lengths = [min(CAP.value, max(1, round(rng.lognormvariate(mu, 1)))) for _ in range(count)]
    asked = prompts(count, fields["vocab_size"], PROMPT.value)
    longest = [max(lengths[at : at + slots]) for at in range(0, count, slots)]
    found: Row = {
        "rows": count,
        "slots": slots,
        "cap": CAP.value,
        "mean_length": statistics.mean(lengths),
        "static_utilisation": sum(lengths) / (slots * sum(longest)),
    }
    for mode in ("static", "continuous"):
        job = {"prompts": asked, "lengths": lengths, "rows": slots, "mode": mode}
        worker.ask(**job)  # to compile
        answer = worker.ask(**job)
        if answer is not None:
            assert [len(tokens) for tokens in answer["tokens"]] == lengths
            counts = answer["counts"]
            found[f"{mode}_tokens_per_second"] = sum(lengths) / answer["seconds"]
            if mode == "continuous":
                waiting = counts["queued_tokens"] / max(1, counts.get("queued_slot_steps", 0))
                found |= {
                    "utilisation": counts["tokens"] / counts["slot_steps"],
                    "utilisation_while_rows_wait": waiting,
                }
    return found


def group(worker: Worker, fields: Row) -> Row:
    """Prefill of eight samples of one prompt of 512 tokens against that of one sample."""
    asked = prompts(1, fields["vocab_size"], 512)
    found: Row = {"prompt_tokens": 512}
    for samples in (1, 8):
        answers = [worker.ask(prompts=asked, new=1, samples=samples) for _ in range(3)]
        times = [answer["seconds"] for answer in answers[1:] if answer is not None]
        found |= {f"seconds_{samples}": min(times)} if times else {}
    return found


def machine(workers: dict[str, Worker]) -> Row:
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
        "versions": {name: worker.versions for name, worker in workers.items() if worker.versions},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(results: Row) -> str:
    """The results as markdown."""
    host, width = results["machine"], results["bandwidth"]
    shape, versions = results["shape"], host["versions"]
    lines = [
        f"# Samplers side by side, {shape['dtype']}",
        "",
        f"{host['time']}, {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB,"
        f" load {host['load_before']:.1f} before; on {width['devices']} memory reads"
        f" {width['read'] / 1e9:.1f} GB/s,"
        f" copies {width['copy'] / 1e9:.1f} GB/s (read + written), measured in the same run.",
        f"{shape['model']}; prompts of {shape['prompt_tokens']} tokens, {shape['new_tokens']} new"
        f" ones, greedy; caches of fixed size have {shape['cache']} slots; medians of"
        f" {shape['rounds']} rounds, taking turns.",
        "; ".join(
            f"{name}: " + ", ".join(f"{k} {v}" for k, v in used.items())
            for name, used in versions.items()
        )
        + ".",
        "",
        "| sampler | batch | decode, tokens/s | ours over it | GB/s | of read bandwidth |"
        " prefill, s | first calls, s | same tokens as ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {r["batch"]: r for r in results["decode"] if r["sampler"] == "ours"}
    for row in results["decode"]:
        start = f"| {row['sampler']} | {row['batch']} | "
        if "absent" in row:
            lines.append(start + f"{row['absent']} | | | | | | |")
            continue
        rate = row["decode_tokens_per_second"]
        ratio = ours[row["batch"]].get("decode_tokens_per_second", math.nan) / rate
        lines.append(
            f"{start}{rate:.1f} | {ratio:.2f} | {row['bytes_per_second'] / 1e9:.1f}"
            f" | {100 * row['of_read_bandwidth']:.0f}% | {row['prefill_seconds']:.2f}"
            f" | {row['first_call_seconds']:.1f} | {100 * row['agrees_with_ours']:.0f}% |"
        )
    for name in ("tail", "group"):
        if results.get(name):
            lines += ["", f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in results[name].items())]
    return "\n".join(lines) + "\n"


def plot(results: Row, path: Path) -> None:
    """Decoded tokens a second as bars, a group for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = [int(b) for b in BATCHES.value]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for i, name in enumerate(SAMPLERS):
        rates = {
            row["batch"]: row.get("decode_tokens_per_second", 0.0)
            for row in results["decode"]
            if row["sampler"] == name
        }
        places = [at + 0.2 * i - 0.3 for at in range(len(batches))]
        bars = axes.bar(places, [rates[b] for b in batches], 0.2, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(batches)), [f"batch {b}" for b in batches])
    axes.set_ylabel("decoded tokens/s")
    host = results["machine"]
    axes.set_title(
        f"{results['shape']['model']}, {DTYPE.value}, {host['processor']}, {host['cores']} cores,"
        f" {results['bandwidth']['devices']}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    if not all(b.isdecimal() and int(b) for b in BATCHES.value):
        raise UserError(f"--batches={','.join(BATCHES.value)}: not numbers of rows")
    if PROMPT.value + NEW.value > CACHE.value:
        raise UserError(f"--cache={CACHE.value}: prompt and response have more tokens")
    out = cli.output(f"{OUT.value}/rollout-{DTYPE.value}.json")
    model = Path(MODEL.value).absolute() if MODEL.value else random_model()
    fields = json.loads((model / "config.json").read_text())
    pythons = {"ours": sys.executable, "transformers": HF_PYTHON.value, "tunix": TUNIX_PYTHON.value}
    workers = {name: Worker(name, python, model) for name, python in pythons.items()}
    ours = workers["ours"]
    bandwidth = ours.ask(mode="bandwidth")
    if bandwidth is None:
        raise UserError(f"--model={model}: {ours.absent}")
    results: Row = {
        "machine": machine(workers),
        "shape": {
            "model": MODEL.value or "random Qwen3-0.6B",
            "dtype": DTYPE.value,
            "prompt_tokens": PROMPT.value,
            "new_tokens": NEW.value,
            "cache": CACHE.value,
            "rounds": ROUNDS.value,
        },
        "bandwidth": bandwidth,
        "decode": decode(workers, fields, bandwidth) if "decode" in CASES.value else [],
        "tail": tail(ours, fields) if "tail" in CASES.value else {},
        "group": group(ours, fields) if "group" in CASES.value else {},
    }
    for worker in workers.values():
        worker.close()
    out.write_text(json.dumps(results, indent=2) + "\n")
    out.with_suffix(".md").write_text(table(results))
    if results["decode"]:
        plot(results, out.with_suffix(".svg"))
    print(table(results))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
