"""python -m distill.evaluate --model=DIR --benchmark=NAME --out=DIR: accuracy, with its interval.

OUT gets examples.jsonl, one row a response, written as they come: the same command goes on where
it was stopped. When all are there, summary.json says what they amount to. With --responses the
responses are read from a file and no model is needed.
"""

import contextlib
import hashlib
import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distill import benchmarks, cli, data, generate, losses, metrics, policy, rewards, rollout
from distill import mesh as mesh_lib
from distill.policy import Policy
from models.errors import UserError
from models.qwen3 import model
from models.qwen3.config import Config

Row = benchmarks.Row


def _repeats(text: str) -> bool:
    """Whether a text loops: most of its runs of eight words have been said before."""
    words = text.split()
    runs = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    return len(runs) >= 8 and len(set(runs)) < len(runs) / 2


def graded(grader: rewards.Grader, benchmark: str, rows: list[Row]) -> list[Row]:
    """Rows with `response` and `answer`, plus outcome, correct, formatted and repeats."""
    texts = [str(row["response"]) for row in rows]
    outcomes = grader.grade(benchmark, texts, [str(row["answer"]) for row in rows])
    return [
        {
            **row,
            "correct": outcome == "correct",
            "outcome": outcome,
            "formatted": rewards.final_text(text) is not None and outcome != "no_answer",
            "repeats": _repeats(text),
        }
        for row, text, outcome in zip(rows, texts, outcomes, strict=True)
    ]


def respond(
    subject: Policy,
    rows: list[tuple[str, Row]],
    prompts: list[list[int]],
    *,
    first: int,
    samples: int,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    seed: int,
    batch_size: int,
) -> Iterator[list[Row]]:
    """The sampled responses of each problem from number `first` on, `samples` rows a problem."""
    assert subject.tokenizer is not None
    done = rollout.complete(
        subject,
        prompts[first:],
        samples=samples,
        key=jax.random.key(seed),
        limits=[max_new_tokens] * (len(prompts) - first),
        sampling=sampling,
        batch_size=batch_size,
        first=first,
    )
    for (where, row), prompt, completions in zip(rows[first:], prompts[first:], done, strict=True):
        if any(c.reason == "error" for c in completions):
            raise UserError(f"{where}: the model's logits are NaN")
        yield [
            {
                "id": row["id"],
                "sample": number,
                "answer": row["answer"],
                "response": subject.tokenizer.decode(c.tokens, skip_special_tokens=True),
                "length": len(c.tokens),
                "finish_reason": c.reason,
                "prompt_tokens": prompt,
                "tokens": c.tokens,
            }
            for number, c in enumerate(completions)
        ]


def reverse_kl(subject: Policy, teacher: Policy, rows: Iterable[Row], batch_size: int) -> float:
    """Mean exact KL(subject‖teacher) in nats a token, over the tokens that `rows` hold.

    On the subject's own samples at temperature 1 this is what on-policy distillation lowers.
    """
    examples = [data.Example(r["prompt_tokens"], r["tokens"], "", str(r["id"])) for r in rows]  # type: ignore[arg-type]
    width = rollout.bucket(max(len(e.prompt) + len(e.response) for e in examples))
    mesh = policy.mesh_of(subject)
    batch_size = -(-batch_size // mesh.size) * mesh.size

    @jax.jit
    def measure(params, teacher_params, batch):
        stats = losses.token_stats(
            policy.hidden(subject.model, params, batch),
            model.head(params),
            losses.shift(batch.tokens_BT),
            policy.hidden(teacher.model, teacher_params, batch),
            model.head(teacher_params),
            logits_mib=128.0 * mesh.size,
            split=mesh_lib.split_vocabulary,
        )
        mask_BT = losses.shift(batch.mask_BT).astype(jnp.float32)
        return jnp.sum(stats["reverse_kl"] * mask_BT), jnp.sum(mask_BT)

    total = count = 0.0
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        blank = data.Example([], [], "", "padding")
        batch = data.trace_batch(chunk + [blank] * (batch_size - len(chunk)), 0, width)
        batch = jax.device_put(batch, mesh_lib.rows(mesh))
        kl, tokens = measure(subject.params, teacher.params, batch)
        total, count = total + float(kl), count + float(tokens)
    return total / count


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of arXiv 2107.03374, eq. 1."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def accuracy(hits: list[list[bool]]) -> tuple[float, tuple[float, float]]:
    """Mean over problems of the share of correct samples, and its 95% interval.

    Wilson's interval for one sample a problem; for more, the normal one clustered by problem,
    since samples of one problem are no independent witnesses.
    """
    shares = np.array([np.mean(h) for h in hits])
    if all(len(h) == 1 for h in hits):
        return float(shares.mean()), metrics.wilson(int(shares.sum()), len(shares))
    half = 1.959964 * shares.std(ddof=1) / math.sqrt(len(shares)) if len(shares) > 1 else 1.0
    mean = float(shares.mean())
    return mean, (max(0.0, mean - float(half)), min(1.0, mean + float(half)))


def summarise(rows: list[Row], ks: list[int]) -> dict[str, object]:
    """What graded rows amount to: accuracy, pass@k, rates and lengths."""
    groups: dict[str, list[bool]] = {}
    for row in rows:
        groups.setdefault(str(row["id"]), []).append(bool(row["correct"]))
    mean, interval = accuracy(list(groups.values()))

    def rate(name: str) -> float:
        return float(np.mean([bool(row[name]) for row in rows]))

    summary = {
        "problems": len(groups),
        "responses": len(rows),
        "accuracy": mean,
        "interval": interval,
        "outcomes": dict(Counter(str(row["outcome"]) for row in rows)),
        "format_rate": rate("formatted"),
        "repetition_rate": rate("repeats"),
    }
    for k in ks:
        if all(len(hits) >= k for hits in groups.values()):
            estimates = [pass_at_k(sum(hits), len(hits), k) for hits in groups.values()]
            summary[f"pass@{k}"] = float(np.mean(estimates))
    if all("length" in row for row in rows):
        summary["mean_length"] = float(np.mean([row["length"] for row in rows]))  # type: ignore[misc]
        summary["truncation_rate"] = float(np.mean([r["finish_reason"] == "length" for r in rows]))
    return summary


def memory() -> dict[str, float]:
    """Peak memory in GiB: of this process, and of the first device where that is known."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30}
    stats = jax.devices()[0].memory_stats()
    if stats:
        peak["device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return peak


def _resume(out: Path, protocol: Row, samples: int) -> list[Row]:
    """Rows of complete problems in OUT/examples.jsonl, which keeps just these."""
    path, said = out / "examples.jsonl", out / "protocol.json"
    if said.is_file() and (before := json.loads(said.read_text())) != protocol:
        changed = next(k for k in protocol | before if before.get(k) != protocol.get(k))
        raise UserError(
            f"{out} holds another evaluation: {changed} was {before.get(changed)!r}, "
            f"now {protocol.get(changed)!r}"
        )
    if path.is_file() and not said.is_file():
        raise UserError(f"{out} holds stored responses that were graded, not this evaluation")
    out.mkdir(parents=True, exist_ok=True)
    metrics.write_json(said, protocol)
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a killed run may leave half a last line
                rows.append(json.loads(line))
    rows = rows[: len(rows) // samples * samples]
    metrics.write_jsonl(path, rows)
    return rows


def evaluate(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Row]],
    out: Path,
    *,
    samples: int,
    ks: list[int],
    thinking: bool,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    seed: int,
    batch_size: int,
    teacher: Policy | None = None,
) -> dict[str, object]:
    """Samples, grades and sums up; writes examples.jsonl and summary.json, returns the summary."""
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")
    prompts = generate.prompts(subject, rows, thinking, max_new_tokens)
    protocol: Row = {
        "model": subject.path,
        "step": policy.newest_step(subject.path),
        "benchmark": benchmark,
        "problems": len(rows),
        "problems_sha256": hashlib.sha256(metrics.dumps([r for _, r in rows]).encode()).hexdigest(),
        "samples": samples,
        "thinking": thinking,
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": seed,
        "dtype": jnp.dtype(subject.model.dtype).name,
    }
    kept = _resume(out, protocol, samples)
    start, tokens = time.perf_counter(), 0
    left = len(rows) - len(kept) // samples
    with (
        rewards.Grader() as grader,
        (out / "examples.jsonl").open("a") as file,
        metrics.progress(len(rows), len(rows) - left, benchmark) as bar,
    ):
        responses = respond(
            subject,
            rows,
            prompts,
            first=len(rows) - left,
            samples=samples,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        for number, group in enumerate(responses if left else (), start=len(rows) - left + 1):
            done = graded(grader, benchmark, group)
            file.writelines(metrics.dumps(row) + "\n" for row in done)
            file.flush()
            kept += done
            tokens += sum(int(row["length"]) for row in group)  # type: ignore[call-overload]
            bar.update(number, {})
    seconds = time.perf_counter() - start
    summary = summarise(kept, ks)
    pace = tokens / seconds if tokens else None  # nothing was left to sample: not measured
    summary |= {"seconds": seconds, "tokens_per_second": pace, "memory": memory()}
    if teacher:
        summary["reverse_kl"] = reverse_kl(subject, teacher, kept, batch_size)
    summary["protocol"] = protocol
    metrics.write_json(out / "summary.json", summary)
    return summary


OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", "", "Model directory, hub id or run directory.", flag_values=OPTIONS
)
BENCHMARK = flags.DEFINE_string(
    "benchmark", None, "gsm8k or arithmetic.", required=True, flag_values=OPTIONS
)
DATA = flags.DEFINE_string(
    "data", "", "jsonl of question and answer; arithmetic makes its own.", flag_values=OPTIONS
)
OUT = flags.DEFINE_string(
    "out", None, "Directory of examples.jsonl, summary.json.", required=True, flag_values=OPTIONS
)
SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Responses to each problem.", lower_bound=1, flag_values=OPTIONS
)
KS = flags.DEFINE_list("k", ["1"], "pass@k for these, at most --samples.", flag_values=OPTIONS)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Only the first problems; 0: all.", lower_bound=0, flag_values=OPTIONS
)
THINKING = flags.DEFINE_enum(
    "thinking", "on", ["on", "off"], "The chat template's switch.", flag_values=OPTIONS
)
RESPONSES = flags.DEFINE_string(
    "responses", "", "jsonl of stored responses to grade, without a model.", flag_values=OPTIONS
)
TEACHER = flags.DEFINE_string(
    "teacher", "", "Measure the reverse KL to this model too.", flag_values=OPTIONS
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 1024, "Longest response, in tokens.", lower_bound=1, flag_values=OPTIONS
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0: greedy.", lower_bound=0.0, flag_values=OPTIONS
)
TOP_K = flags.DEFINE_integer("top_k", 0, "0: off.", lower_bound=0, flag_values=OPTIONS)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "1: off.", lower_bound=1e-6, upper_bound=1.0, flag_values=OPTIONS
)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, flag_values=OPTIONS)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Responses sampled together.", lower_bound=1, flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16"], "Of the computation.", flag_values=OPTIONS
)


def main() -> None:
    ks = [int(k) for k in KS.value if k.isdecimal() and int(k) > 0]
    if len(ks) < len(KS.value) or (not RESPONSES.value and max(ks, default=0) > SAMPLES.value):
        raise UserError(f"--k={','.join(KS.value)}: each must be 1 to --samples={SAMPLES.value}")
    if not TEMPERATURE.value < float("inf") or not TOP_P.value > 0:  # nan passes a flag's bounds
        raise UserError("--temperature, --top_p: not finite numbers")
    out = Path(OUT.value)
    if RESPONSES.value:
        known = benchmarks.problems(BENCHMARK.value, DATA.value, 0) if DATA.value else []
        rows = benchmarks.stored(RESPONSES.value, known)[: LIMIT.value or None]
        cli.output(f"{OUT.value}/summary.json")
        if (out / "protocol.json").exists():
            raise UserError(f"--out={out}: holds the evaluation of a model")
        with rewards.Grader() as grader:
            rows = graded(grader, BENCHMARK.value, rows)
        metrics.write_jsonl(out / "examples.jsonl", rows)
        metrics.write_json(out / "summary.json", summarise(rows, ks))
        return
    rows = benchmarks.problems(BENCHMARK.value, DATA.value, LIMIT.value)
    if not MODEL.value:
        raise UserError("--model: name a model directory, or give --responses")
    paths = [path for path in (MODEL.value, TEACHER.value) if path]
    mesh = mesh_lib.spread(*(Config.from_directory(policy.resolve(path)) for path in paths))
    dtype = DTYPE.value or policy.default_dtype()
    described = [policy.describe(path, dtype, False, mesh) for path in paths]
    policy.require_same_vocabulary(described[0], described[-1])
    cli.output(f"{OUT.value}/summary.json")
    with policy.use(described[0]):
        subject, *teachers = [policy.load(p, p.model.dtype.name) for p in described]
        evaluate(
            subject,
            BENCHMARK.value,
            rows,
            out,
            samples=SAMPLES.value,
            ks=ks,
            thinking=THINKING.value == "on",
            max_new_tokens=MAX_NEW_TOKENS.value,
            sampling=rollout.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value),
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            teacher=teachers[0] if teachers else None,
        )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
