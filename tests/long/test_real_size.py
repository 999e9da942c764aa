"""Qwen3-0.6B and 1.7B by their real shapes, random weights, the real tokenizer, real prompts.

Takes a quarter of an hour on two cores and 20 GB of disk. Each verb runs in a process of its own,
whose peak memory is read from the operating system.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.qwen3.config import SIZES
from tests.support.paths import ROOT

LIMIT_GIB = 20


def random_model(directory: Path, size: str, tokenizer: Path) -> Path:
    """A directory as the hub has it: bfloat16, tied, sharded as transformers likes, tokenizer."""
    fields = SIZES[size].to_hf()
    torch.manual_seed(int(float(size[:-1]) * 10))
    config = Qwen3Config(**fields, eos_token_id=151_645, dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen3ForCausalLM(config).save_pretrained(directory, max_shard_size="2GB")
    finally:
        torch.set_default_dtype(before)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="module")
def models(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = shared_data / "qwen3_tokenizer"
    yield tuple(random_model(root / size, size, tokenizer) for size in ("0.6b", "1.7b"))
    shutil.rmtree(root)


def verb(name: str, *args: str) -> tuple[float, float]:
    """Runs a verb to its end; (seconds, peak GiB of its process)."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", f"distill.{name}", *args], cwd=ROOT, env=environment
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 2**20
    print(f"{name}: exit {process.returncode}, {seconds:.0f} s, {peak:.1f} GiB")
    assert process.returncode == 0
    assert peak < LIMIT_GIB
    return seconds, peak


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_and_score(models, shared_data, tmp_path):
    """Sampled log-probs of the 0.6B equal the scorer's, and the scorer's equal transformers'."""
    prompts = tmp_path / "prompts.jsonl"
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:4]
    messages = [[{"role": "user", "content": json.loads(x)["question"]}] for x in lines]
    prompts.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    out = tmp_path / "samples.jsonl"
    verb(
        "generate",
        f"--model={models[0]}",
        f"--prompts={prompts}",
        f"--out={out}",
        "--max_new_tokens=24",
        "--samples=2",
    )
    sampled = rows(out)
    sequences = [row["prompt_tokens"] + s["tokens"] for row in sampled for s in row["samples"]]
    logprobs = [s["logprobs"] for row in sampled for s in row["samples"]]
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"tokens": t}) + "\n" for t in sequences))
    scores = tmp_path / "scores.jsonl"
    verb("score", f"--model={models[0]}", f"--tokens={tokens}", f"--out={scores}", "--top_k=5")
    for ours, recorded in zip(rows(scores), logprobs, strict=True):
        np.testing.assert_allclose(ours["logprobs"][-len(recorded) :], recorded, atol=1e-3)

    network = Qwen3ForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    ids = torch.tensor([sequences[0]])
    with torch.no_grad():
        logp = torch.log_softmax(network(ids).logits[0, :-1].float(), -1)
    expected = logp.gather(1, ids[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(rows(scores)[0]["logprobs"][1:], expected, atol=1e-3)


def test_two_steps_of_on_policy_distillation(models, shared_data, tmp_path):
    """0.6B from 1.7B, exact reverse KL on GSM8K prompts, 2 x 256 tokens, under 20 GiB."""
    run = tmp_path / "run"
    seconds, peak = verb(
        "train",
        "--config=configs/base.py",
        f"--workdir={run}",
        f"--config.student.path={models[0]}",
        f"--config.teacher.path={models[1]}",
        f"--config.opd.data.source={shared_data / 'gsm8k' / 'train.jsonl'}",
        "--config.opd.data.max_rows=100",
        "--config.opd.steps=2",
        "--config.opd.batch_size=2",
        "--config.opd.max_prompt_tokens=192",
        "--config.opd.max_response_tokens=64",
        "--config.log.transcripts_every=1",
    )
    measured = rows(run / "metrics.jsonl")
    assert [row["step"] for row in measured] == [0, 1]
    for row in measured:
        print({k: v for k, v in row.items() if isinstance(v, float)})
        assert row["train/loss"] == row["train/reverse_kl"] > 0
        assert row["train/sampler_delta"] < 0.05
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, {peak:.1f} GiB (largest child {usage:.1f} GiB)")
