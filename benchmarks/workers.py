"""Samplers compared by benchmarks/rollout.py, and the shared code of all contenders: answering jobs
(`serve_jobs`) and timing (`time_calls`).

    python -m benchmarks.workers NAME MODEL DTYPE CACHE

loads a model and then answers jobs, one JSON object a line: {"prompts", "new", "mode"?, ...} gives
{"seconds", "tokens"}, with the tokens of every response. All jobs are greedy and none stops early,
so that every sampler does the same work. The top of this file imports nothing from the project,
because other venvs run it too. Anything that a library prints goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Answer = dict[str, Any]

LEARNING_RATE, B1, B2, CLIP = 1e-5, 0.9, 0.95, 1.0  # of every contender's AdamW


def load_ours(model: str, dtype: str, cache: int) -> Callable[[Job], Answer]:
    """Loads this project's sampler, which also answers the jobs that only this project gets."""
    from collections import Counter

    from distill import rollout
    from distill.policy import policy
    from distill.rollout.sampling import Sampling

    subject = policy.make_abstract_for_inference(model, dtype)
    with policy.use(subject):
        subject = policy.load(subject, dtype)
    counts: Counter[str] = Counter()

    def complete_prompts(
        prompts: list[list[int]], limits: list[int], samples: int, rows: int
    ) -> list[list[int]]:
        with policy.use(subject):
            groups = rollout.complete(
                subject,
                prompts,
                rollout.SampleSpec(samples, sampling=Sampling(0), batch_size=rows),
                limits=limits,
                counts=counts,
            )
            return [c.tokens for group in groups for c in group]

    def run_static(job: Job) -> list[list[int]]:
        """Decodes rows of different lengths in fixed batches, each until its longest row ends."""
        done, rows = [], job["rows"]
        for start in range(0, len(job["prompts"]), rows):
            lengths = job["lengths"][start : start + rows]
            # Bucketed, as each length is compiled.
            longest = rollout.bucket_length(max(lengths))
            prompts = job["prompts"][start : start + rows]
            responses = complete_prompts(prompts, [longest] * len(lengths), 1, len(lengths))
            done += [tokens[:n] for tokens, n in zip(responses, lengths, strict=True)]
        return done

    def answer_job(job: Job) -> Answer:
        mode = job.get("mode")
        counts.clear()
        start = time.perf_counter()
        if mode == "static":
            tokens = run_static(job)
        elif mode == "continuous":
            tokens = complete_prompts(job["prompts"], job["lengths"], 1, job["rows"])
        else:
            samples, count = job.get("samples", 1), len(job["prompts"])
            tokens = complete_prompts(
                job["prompts"], [job["new"]] * count, samples, count * samples
            )
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "counts": counts}

    return answer_job


def load_transformers(model: str, dtype: str, cache: int) -> Callable[[Job], Answer]:
    """Loads Hugging Face's `generate`; its cache grows, except in mode "static"."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer_job(job: Job) -> Answer:
        ids = torch.tensor(job["prompts"], device=network.device)
        options: dict[str, Any] = {}
        start = time.perf_counter()
        if job["mode"] == "static":
            options["past_key_values"] = StaticCache(config=network.config, max_cache_len=cache)
            options["disable_compile"] = network.device.type == "cpu"  # compiling is slower there
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job["new"],
                min_new_tokens=job["new"],
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        tokens = out[:, ids.shape[1] :].tolist()  # waits for the device
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer_job


class _IdTokenizer:
    """The tokenizer that tunix needs: texts are ids; padding and end tokens do not occur."""

    def __init__(self, last: int) -> None:
        self._last = last

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(i) for i in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # stands for none; any other id is prepended to every prompt

    def eos_id(self) -> int:
        return self._last

    def pad_id(self) -> int:
        return self._last


def make_tunix_config(fields: dict, dtype: Any, **changes: Any) -> Any:
    """Makes google-tunix's config of a Qwen3 from the fields of its config.json."""
    from tunix.models.qwen3 import model as model_lib  # pyright: ignore[reportMissingImports]

    rope = fields.get("rope_parameters") or fields  # transformers 5, else 4
    options = {
        "num_layers": fields["num_hidden_layers"],
        "vocab_size": fields["vocab_size"],
        "embed_dim": fields["hidden_size"],
        "hidden_dim": fields["intermediate_size"],
        "num_heads": fields["num_attention_heads"],
        "head_dim": fields["head_dim"],
        "num_kv_heads": fields["num_key_value_heads"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": fields["rms_norm_eps"],
        "use_tied_embedding": fields["tie_word_embeddings"],
        "dtype": dtype,
        "param_dtype": dtype,
    }
    return model_lib.ModelConfig(**options | changes)


def load_tunix(model: str, dtype: str, cache: int) -> Callable[[Job], Answer]:
    """Loads google-tunix's sampler: one jitted loop over a cache of fixed size."""
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler as sampler_lib  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen3 import params  # pyright: ignore[reportMissingImports]

    config = make_tunix_config(
        json.loads((Path(model) / "config.json").read_text()), jnp.dtype(dtype)
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        network = params.create_model_from_safe_tensors(model, config, mesh, jnp.dtype(dtype))
    shape = sampler_lib.CacheConfig(cache, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = sampler_lib.Sampler(network, _IdTokenizer(config.vocab_size - 1), shape)

    def answer_job(job: Job) -> Answer:
        texts = [" ".join(map(str, prompt)) for prompt in job["prompts"]]
        start = time.perf_counter()
        with mesh:
            out = sampler(
                texts,
                max_generation_steps=job["new"],
                max_prompt_length=len(job["prompts"][0]),
                temperature=0.0,
            )
        tokens = [row.tolist() for row in out.tokens]
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer_job


def load_vllm(model: str, dtype: str, cache: int) -> Callable[[Job], Answer]:
    """Loads vLLM's engine, in half of the GPU's memory. Prompts are read anew in each job."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=cache,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
    )

    def answer_job(job: Job) -> Answer:
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        options = SamplingParams(
            temperature=0.0, max_tokens=job["new"], ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = engine.generate(prompts, options, use_tqdm=False)
        tokens = [list(row.outputs[0].token_ids) for row in outputs]
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer_job


WORKERS = {
    "ours": load_ours,
    "transformers": load_transformers,
    "tunix": load_tunix,
    "vllm": load_vllm,
}


def time_calls(call: Callable[[], Any], job: Job, peak: Callable[[], int], warm: int = 1) -> Answer:
    """Times `call`, which must wait for the device: `warm` calls to compile, then job["steps"]."""
    start = time.perf_counter()
    for _ in range(warm):
        call()
    first, seconds = time.perf_counter() - start, []
    # Reset Linux's peak, so that it does not include the initialisation of the weights.
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    for _ in range(job["steps"]):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "first_call_seconds": first, "peak_bytes": peak()}


def get_resident_peak() -> int:
    """Returns this process's peak RAM in bytes since `time_calls` began to measure."""
    import resource

    status = Path("/proc/self/status")
    if not status.exists():  # macOS, where ru_maxrss is in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def get_jax_peak() -> int:
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else get_resident_peak()


def serve_jobs(load_worker: Callable[[], Callable[[Job], Answer]]) -> None:
    """Calls `load_worker`, says so on stdout, then answers each job on stdin with its result.

    If a package is missing or a job fails, the answer is {"absent": why}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        work = load_worker()
    except ImportError as error:
        print(json.dumps({"absent": f"not installed ({error})"}), file=answers, flush=True)
        return
    reported_packages: set[str] = set()
    _send_answer({}, reported_packages, answers)
    for line in sys.stdin:
        try:
            answer = work(json.loads(line))
        except Exception as error:  # any error of any library, most often out of memory
            traceback.print_exc()
            reason = next(iter(str(error).splitlines()), "")
            answer = {"absent": f"{type(error).__name__}: {reason}"[:200]}
        _send_answer(answer, reported_packages, answers)


def _send_answer(answer: Answer, reported_packages: set[str], answers: Any) -> None:
    versions = {}
    for package in {
        "jax",
        "torch",
        "transformers",
        "trl",
        "tunix",
        "vllm",
    } & sys.modules.keys() - reported_packages:
        versions[package] = getattr(sys.modules[package], "__version__", "")
    reported_packages |= versions.keys()
    versions = {"versions": dict(sorted(versions.items()))} if versions else {}
    print(json.dumps({**answer, **versions}), file=answers, flush=True)


def main() -> None:
    name, model, dtype, cache = sys.argv[1:]
    serve_jobs(lambda: WORKERS[name](model, dtype, int(cache)))


if __name__ == "__main__":
    main()
