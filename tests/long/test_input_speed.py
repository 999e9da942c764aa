"""Rows become packed batches much faster than a tiny model trains on them."""

import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base, tiny_teacher
from distill.data import chat, collate, dataset, packing
from distill.objectives import losses
from distill.policy import policy
from distill.runtime import mesh
from distill.training import optim, update
from tests.support.paths import ROOT


def test_input_is_twenty_times_as_fast_as_a_tiny_step(shared_data: Path) -> None:
    """One thread turns GSM8K and DeepSeek-R1's traces from text into packed rows of 4,096, with
    the real tokenizer; the step is that of configs/tiny_teacher.py on one device."""
    tokenizer = chat.load_tokenizer(shared_data / "qwen3_tokenizer")
    gsm8k, traces = shared_data / "gsm8k/train.jsonl", shared_data / "traces/deepseek_r1_math.jsonl"
    figures = {}
    for name, mixture in {
        "gsm8k": ((str(gsm8k), 1.0),),
        "gsm8k and traces": ((str(gsm8k), 0.9), (str(traces), 0.1)),
    }.items():
        c = base.make_stage("sft").data
        c.mixture, c.check_rows = mixture, 100
        source = dataset.load_source(c, tokenizer, 0, True)
        packer = packing.Packer(source, 0, 8, 4096, 3584)
        start, tokens = time.perf_counter(), 0
        for step in range(32):
            batch = collate.collate_rows(
                packer.get_step_rows(step), collate.BatchLayout(4096, 3584)
            )
            tokens += int((np.asarray(batch.segments_BT) > 0).sum())
        figures[name] = tokens / (time.perf_counter() - start)

    s = tiny_teacher.get_config().sft
    device_mesh = mesh.make_mesh(1, 1, 1)
    model = policy.make_abstract(str(ROOT / "assets/teacher"), "float32", False, device_mesh)
    with policy.use(model):
        model = policy.init_random_policy(model, jax.random.key(0))
        state = update.init_train_state(optim.make_optimizer(s.optim, s.steps), model.params, 0)
        source = dataset.load_source(s.data, model.tokenizer, 0, True)
        optimizer = optim.make_optimizer(s.optim, s.steps)
        programs = update.make_update(
            model.model, optimizer, losses.OBJECTIVES["sft"], update.UpdateOptions(1, 128.0), state
        )
        batch = collate.collate_padded(
            dataset.get_step_examples(source, 0, s.batch_size, 0), 60, 52
        )
        tokens = int((np.asarray(batch.segments_BT) > 0).sum())
        for repeat in range(12):
            if repeat == 2:  # compiled, and warm
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, _, _ = programs.run_update(state, [batch], single_microbatch=True)
        jax.block_until_ready(state)
        figures["training step"] = 10 * tokens / (time.perf_counter() - start)
    print({name: f"{figure:,.0f} tokens/s" for name, figure in figures.items()})
    slowest = min(figures["gsm8k"], figures["gsm8k and traces"])
    if slowest < 20 * figures["training step"]:
        pytest.fail(f"only {slowest / figures['training step']:.1f} times the step's tokens")
