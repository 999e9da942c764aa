"""python -m benchmarks.rollout [--dtype=bfloat16] [--tunix_python=PATH]: samplers side by side.

Compares this project's sampler, Hugging Face's `generate` (growing and static cache),
google-tunix's and, on a GPU, vLLM's, on the same random Qwen3-0.6B, prompts, lengths and dtype. All
are greedy, each in a process of its own, and they take turns: A B C A B C. Reports medians of the
rounds after a warm-up. Calls with one new token are timed as well, to separate prefill from
decoding. This project's prefill includes the conversion of the weights for decoding, which
dominates for few rows. Writes a table (.md), all numbers (.json) and a plot (.svg) to --out, with
the machine named.

tunix needs a venv of its own: python3.11 -m venv T && T/bin/pip install google-tunix, then
--tunix_python=T/bin/python; vLLM likewise, with --vllm_python. A sampler that is not installed is
reported as absent.
"""

import dataclasses
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import contest, costs
from benchmarks.contest import ROOT, JsonDict, Worker
from distill.runtime import cli, paths
from models import families
from models.errors import UserError
from models.qwen3.config import SIZES, Config

OPTIONS = contest.define_flags(rounds=3)  # measured, after one warm-up round
MODEL = flags.DEFINE_string(
    "model", "", "Model directory; default: a random Qwen3-0.6B in runs/.", OPTIONS
)
BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows decoded together.", OPTIONS)
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 16, "Tokens in every prompt.", lower_bound=1, flag_values=OPTIONS
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 64, "New tokens in every response.", lower_bound=2, flag_values=OPTIONS
)
CACHE = flags.DEFINE_integer("cache", 512, "Length of caches of fixed size.", flag_values=OPTIONS)
VLLM_PYTHON = flags.DEFINE_string(
    "vllm_python", sys.executable, "Interpreter with vLLM.", flag_values=OPTIONS
)
CASES = flags.DEFINE_multi_enum(
    "case",
    ["decode", "tail", "group"],
    ["decode", "tail", "group"],
    "Cases to run.",
    flag_values=OPTIONS,
)
CAP = flags.DEFINE_integer("cap", 128, "tail: the longest response.", flag_values=OPTIONS)
SLOTS = flags.DEFINE_integer("slots", 8, "tail: rows decoded together.", flag_values=OPTIONS)
# name → (worker, its mode)
SAMPLERS = {
    "ours": ("ours", ""),
    "transformers": ("transformers", "dynamic"),
    "transformers, static cache": ("transformers", "static"),
    "tunix": ("tunix", ""),
    "vllm": ("vllm", ""),
}


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """What every sampler is asked for."""

    batches: Sequence[int]  # rows decoded together
    prompt_tokens: int
    new_tokens: int
    rounds: int  # measured, after one warm-up round
    dtype: str


def make_random_model(config: Config, dtype: str, path: Path) -> Path:
    """Writes a model with random weights in Hugging Face format, if `path` does not hold it yet."""
    if not (path / "config.json").exists():
        # In a process of its own, so that its memory is freed.
        code = (
            "import jax, json, pathlib, sys; from models import families, weights;"
            "c = families.parse_config(json.loads(sys.argv[3]), 'config');"
            "p = jax.jit(lambda k: families.init_params(c, k))(jax.random.key(0));"
            "weights.save(p, c, pathlib.Path(sys.argv[1]), jax.numpy.dtype(sys.argv[2]))"
        )
        part = path.with_name(path.name + ".part")
        fields = json.dumps(config.to_hf())
        subprocess.run([sys.executable, "-c", code, part, dtype, fields], cwd=ROOT, check=True)
        part.rename(path)
    return path


def make_prompts(count: int, vocabulary: int, length: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]


def measure_decode(
    workers: dict[str, Worker],
    config: Config,
    bandwidth: JsonDict,
    shape: DecodeShape,
    names: Sequence[str] = (*SAMPLERS,),
) -> list[JsonDict]:
    """Measures the samplers `names` at every batch: prefill seconds, decoded tokens/s, bytes/s."""
    samplers = {name: SAMPLERS[name] for name in names}
    rows = []
    for batch in shape.batches:
        prompts = make_prompts(batch, config.vocab_size, shape.prompt_tokens)
        seconds: dict[tuple[str, int], list[float]] = {}
        written: dict[str, list] = {}
        for _ in range(1 + shape.rounds):
            for name, (worker, mode) in samplers.items():
                for new in (1, shape.new_tokens):
                    if workers[worker].absent:
                        continue
                    answer = workers[worker].send_job(prompts=prompts, new=new, mode=mode)
                    if answer is not None:
                        seconds.setdefault((name, new), []).append(answer["seconds"])
                        written[name] = answer["tokens"]
        for name, (worker, _) in samplers.items():
            times = {new: seconds.get((name, new), []) for new in (1, shape.new_tokens)}
            row: JsonDict = {"sampler": name, "batch": batch}
            if len(times[shape.new_tokens]) < 1 + shape.rounds:
                rows.append({**row, "absent": workers[worker].absent})
                continue
            assert all(len(tokens) == shape.new_tokens for tokens in written[name]), name
            row |= compute_rates(times, config, bandwidth, shape, batch)
            if "ours" in written and "absent" not in row:
                row["agrees_with_ours"] = measure_agreement(written["ours"], written[name])
            rows.append(row)
            print(f"{name}, batch {batch}: {row.get('seconds', math.nan):.3f} s", file=sys.stderr)
    return rows


def compute_rates(
    times: dict[int, list[float]],
    config: Config,
    bandwidth: JsonDict,
    shape: DecodeShape,
    batch: int,
) -> JsonDict:
    """Computes a sampler's rates from the seconds of its calls, the first of which compiled.

    times: of calls with one new token, and of those with `shape.new_tokens`.
    """
    prefill, total = (statistics.median(calls[1:]) for calls in times.values())
    if total <= prefill:
        return {"absent": "not measured: too few new tokens, or others at work"}
    steps = shape.new_tokens - 1
    rate, filled = steps / (total - prefill), shape.prompt_tokens + steps / 2
    byte_rate = rate * costs.count_decode_bytes(config, batch, filled, shape.dtype)
    return {
        "prefill_seconds": prefill,
        "seconds": total,
        "all_seconds": times[shape.new_tokens][1:],
        "tokens_per_second": batch * shape.new_tokens / total,
        "decode_tokens_per_second": batch * rate,
        "bytes_per_second": byte_rate,
        "of_read_bandwidth": byte_rate / bandwidth["read"],
        "first_call_seconds": sum(calls[0] for calls in times.values()),
    }


def measure_agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Returns the share of greedy tokens that agree, up to the first difference in each row."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return same / sum(map(len, ours))


def measure_tail(worker: Worker, vocab_size: int) -> JsonDict:
    """Measures useful tokens/s for log-normal lengths with a mean of an eighth of the cap."""
    slots, rng = SLOTS.value, random.Random(0)
    count = 16 * slots
    # The mean of a log-normal variable is exp(mu + sigma²/2).
    mu = math.log(CAP.value / 8) - 0.5
    lengths = [min(CAP.value, max(1, round(rng.lognormvariate(mu, 1)))) for _ in range(count)]
    prompts = make_prompts(count, vocab_size, PROMPT_TOKENS.value)
    longest = [max(lengths[start : start + slots]) for start in range(0, count, slots)]
    result: JsonDict = {
        "rows": count,
        "slots": slots,
        "cap": CAP.value,
        "mean_length": statistics.mean(lengths),
        "static_utilisation": sum(lengths) / (slots * sum(longest)),
    }
    for mode in ("static", "continuous"):
        job = {"prompts": prompts, "lengths": lengths, "rows": slots, "mode": mode}
        worker.send_job(**job)  # to compile
        answer = worker.send_job(**job)
        if answer is not None:
            assert [len(tokens) for tokens in answer["tokens"]] == lengths
            counts = answer["counts"]
            result[f"{mode}_tokens_per_second"] = sum(lengths) / answer["seconds"]
            if mode == "continuous":
                queued = counts["queued_tokens"] / max(1, counts.get("queued_slot_steps", 0))
                result |= {
                    "utilisation": counts["tokens"] / counts["slot_steps"],
                    "utilisation_while_rows_wait": queued,
                }
    return result


def measure_group(worker: Worker, vocab_size: int) -> JsonDict:
    """Measures the prefill of one and of eight samples of one prompt of 512 tokens."""
    prompts = make_prompts(1, vocab_size, 512)
    result: JsonDict = {"prompt_tokens": 512}
    for samples in (1, 8):
        answers = [worker.send_job(prompts=prompts, new=1, samples=samples) for _ in range(3)]
        times = [answer["seconds"] for answer in answers[1:] if answer is not None]
        result |= {f"seconds_{samples}": min(times)} if times else {}
    return result


def render_table(results: JsonDict) -> list[str]:
    """Renders the results as lines of Markdown."""
    shape = results["shape"]
    lines = [
        *contest.render_heading(
            f"Samplers side by side, {shape['dtype']}", results["machine"], results["bandwidth"]
        ),
        f"{shape['model']}; prompts of {shape['prompt_tokens']} tokens, {shape['new_tokens']} new"
        f" ones, greedy; caches of fixed size have {shape['cache']} slots; medians of"
        f" {shape['rounds']} rounds, taking turns.",
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
    return lines


def main() -> None:
    if not all(b.isdecimal() and int(b) for b in BATCHES.value):
        raise UserError(f"--batches={','.join(BATCHES.value)}: not numbers of rows")
    if PROMPT_TOKENS.value + NEW_TOKENS.value > CACHE.value:
        raise UserError(f"--cache={CACHE.value}: prompt and response have more tokens")
    out = paths.check_output(f"{OPTIONS.out}/rollout-{OPTIONS.dtype}.json")
    random_path = ROOT / "runs" / f"random-qwen3-0.6b-{OPTIONS.dtype}"
    model = (
        Path(MODEL.value).absolute()
        if MODEL.value
        else make_random_model(SIZES["0.6b"], OPTIONS.dtype, random_path)
    )
    config: Any = families.read_config(model)
    pythons = contest.get_interpreters(OPTIONS) | {"vllm": VLLM_PYTHON.value}
    arguments = str(model), OPTIONS.dtype, str(CACHE.value)
    workers = {
        name: Worker(pythons[name], "benchmarks.workers", name, *arguments)
        for name in ("ours", "transformers", "tunix", "vllm")
    }
    ours = workers["ours"]
    if ours.absent:
        raise UserError(f"--model={model}: {ours.absent}")
    bandwidth, batches = contest.measure_limits(), [int(b) for b in BATCHES.value]
    shape = DecodeShape(
        batches, PROMPT_TOKENS.value, NEW_TOKENS.value, OPTIONS.rounds, OPTIONS.dtype
    )
    wanted, V = CASES.value, config.vocab_size
    results: JsonDict = {
        "machine": contest.describe_machine(
            {name: worker.versions for name, worker in workers.items() if worker.versions}
        ),
        "shape": {
            "model": MODEL.value or "random Qwen3-0.6B",
            "dtype": OPTIONS.dtype,
            "prompt_tokens": PROMPT_TOKENS.value,
            "new_tokens": NEW_TOKENS.value,
            "cache": CACHE.value,
            "rounds": OPTIONS.rounds,
        },
        "bandwidth": bandwidth,
        "decode": measure_decode(workers, config, bandwidth, shape) if "decode" in wanted else [],
        "tail": measure_tail(ours, V) if "tail" in wanted else {},
        "group": measure_group(ours, V) if "group" in wanted else {},
    }
    for worker in workers.values():
        worker.close()
    rates: dict[str, dict[str, float]] = {f"batch {b}": {} for b in BATCHES.value}
    for row in results["decode"]:
        rates[f"batch {row['batch']}"][row["sampler"]] = row.get("decode_tokens_per_second", 0.0)
    contest.write_results(out, results, render_table(results), "decoded tokens/s", rates)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
