"""python -m benchmarks.rollout [--dtype=bfloat16] [--tunix_python=PATH]: samplers side by side.

Compares this project's sampler, Hugging Face's `generate` (growing and static cache) and
google-tunix's, on the same random Qwen3-0.6B, prompts, lengths and dtype. All are greedy, each in a
process of its own, and they take turns: A B C A B C. Reports medians of the rounds after a warm-up.
Calls with one new token are timed as well, to separate prefill from decoding. This project's
prefill includes the conversion of the weights for decoding, which dominates for few rows. Writes a
table (.md), all numbers (.json) and a plot (.svg) to --out, with the machine named.

tunix needs a venv of its own: python3.11 -m venv T && T/bin/pip install google-tunix, then
--tunix_python=T/bin/python. A sampler that is not installed is reported as absent.
"""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks import contest
from benchmarks.contest import ROOT, JsonDict, Worker
from distill.runtime import cli, paths
from models.errors import UserError

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
}


def make_random_model() -> Path:
    """Writes a Qwen3-0.6B with random weights in Hugging Face format, once per dtype."""
    path = ROOT / "runs" / f"random-qwen3-0.6b-{OPTIONS.dtype}"
    if not (path / "config.json").exists():
        # In a process of its own, so that its memory is freed.
        code = (
            "import jax, pathlib, sys; from models import families, weights;"
            "c = families.find_released('Qwen/Qwen3-0.6B');"
            "p = jax.jit(lambda k: families.init_params(c, k))(jax.random.key(0));"
            "weights.save(p, c, pathlib.Path(sys.argv[1]), jax.numpy.dtype(sys.argv[2]))"
        )
        part = path.with_name(path.name + ".part")
        subprocess.run([sys.executable, "-c", code, part, OPTIONS.dtype], cwd=ROOT, check=True)
        part.rename(path)
    return path


def make_prompts(count: int, vocabulary: int, length: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(count)]


def measure_decode(
    workers: dict[str, Worker], fields: JsonDict, bandwidth: JsonDict
) -> list[JsonDict]:
    """Measures every sampler at every batch: prefill seconds, decoded tokens/s and bytes/s."""
    rows = []
    for batch in map(int, BATCHES.value):
        prompts = make_prompts(batch, fields["vocab_size"], PROMPT_TOKENS.value)
        seconds: dict[tuple[str, int], list[float]] = {}
        written: dict[str, list] = {}
        for _ in range(1 + OPTIONS.rounds):
            for name, (worker, mode) in SAMPLERS.items():
                for new in (1, NEW_TOKENS.value):
                    if workers[worker].absent:
                        continue
                    answer = workers[worker].send_job(prompts=prompts, new=new, mode=mode)
                    if answer is not None:
                        seconds.setdefault((name, new), []).append(answer["seconds"])
                        written[name] = answer["tokens"]
        for name, (worker, _) in SAMPLERS.items():
            row: JsonDict = {"sampler": name, "batch": batch}
            times = seconds.get((name, NEW_TOKENS.value), [])
            if len(times) < 1 + OPTIONS.rounds:
                rows.append({**row, "absent": workers[worker].absent})
                continue
            assert all(len(tokens) == NEW_TOKENS.value for tokens in written[name]), name
            prefill = statistics.median(seconds[name, 1][1:])
            total = statistics.median(times[1:])
            if total <= prefill:
                rows.append(
                    {**row, "absent": "not measured: too few new tokens, or others at work"}
                )
                continue
            steps = NEW_TOKENS.value - 1
            rate = steps / (total - prefill)
            byte_rate = rate * count_step_bytes(fields, batch, PROMPT_TOKENS.value + steps / 2)
            row |= {
                "prefill_seconds": prefill,
                "seconds": total,
                "all_seconds": times[1:],
                "tokens_per_second": batch * NEW_TOKENS.value / total,
                "decode_tokens_per_second": batch * rate,
                "bytes_per_second": byte_rate,
                "of_read_bandwidth": byte_rate / bandwidth["read"],
                "first_call_seconds": sum(seconds[name, new][0] for new in (1, NEW_TOKENS.value)),
                "agrees_with_ours": measure_agreement(written["ours"], written[name]),
            }
            rows.append(row)
            print(f"{name}, batch {batch}: {batch * rate:.1f} tokens/s", file=sys.stderr)
    return rows


def measure_agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Returns the share of greedy tokens that agree, up to the first difference in each row."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    )
    return same / sum(map(len, ours))


def count_step_bytes(fields: JsonDict, batch: int, filled: float) -> float:
    """Counts the least bytes that a decoding step reads: all weights and the filled cache, once."""
    layers, D, F = (fields[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    N, K, H = (fields[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    weights = layers * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + fields["vocab_size"] * D
    cached = batch * filled * layers * 2 * K * H
    return (weights + cached) * (4 if OPTIONS.dtype == "float32" else 2)


def measure_tail(worker: Worker, fields: JsonDict) -> JsonDict:
    """Measures useful tokens/s for log-normal lengths with a mean of an eighth of the cap."""
    slots, rng = SLOTS.value, random.Random(0)
    count = 16 * slots
    # The mean of a log-normal variable is exp(mu + sigma²/2).
    mu = math.log(CAP.value / 8) - 0.5
    lengths = [min(CAP.value, max(1, round(rng.lognormvariate(mu, 1)))) for _ in range(count)]
    prompts = make_prompts(count, fields["vocab_size"], PROMPT_TOKENS.value)
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


def measure_group(worker: Worker, fields: JsonDict) -> JsonDict:
    """Measures the prefill of one and of eight samples of one prompt of 512 tokens."""
    prompts = make_prompts(1, fields["vocab_size"], 512)
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
    model = Path(MODEL.value).absolute() if MODEL.value else make_random_model()
    fields = json.loads((model / "config.json").read_text())
    pythons = contest.get_interpreters(OPTIONS)
    workers = {
        name: Worker(
            pythons[name],
            *("benchmarks.workers", name, str(model), OPTIONS.dtype, str(CACHE.value)),
        )
        for name in ("ours", "transformers", "tunix")
    }
    ours = workers["ours"]
    if ours.absent:
        raise UserError(f"--model={model}: {ours.absent}")
    bandwidth = contest.measure_limits()
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
        "decode": measure_decode(workers, fields, bandwidth) if "decode" in CASES.value else [],
        "tail": measure_tail(ours, fields) if "tail" in CASES.value else {},
        "group": measure_group(ours, fields) if "group" in CASES.value else {},
    }
    for worker in workers.values():
        worker.close()
    rates: dict[str, dict[str, float]] = {f"batch {b}": {} for b in BATCHES.value}
    for row in results["decode"]:
        rates[f"batch {row['batch']}"][row["sampler"]] = row.get("decode_tokens_per_second", 0.0)
    contest.write_results(out, results, render_table(results), "decoded tokens/s", rates)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
