"""What several tests build on: tiny models that transformers itself writes, and one update."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from distill.runtime import mesh as mesh_lib

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "assets" / "teacher"  # its vocabulary has 512 ids


def tiny_qwen3(
    directory: Path, *, tokenizer: Path | None = None, seed: int = 0, **fields: Any
) -> Any:
    """Writes a random Qwen3 of odd shape into `directory`, and returns it.

    `fields` are those of config.json; with num_experts it is a mixture of experts. The
    weights are larger than an initialisation's, so that distributions are far from uniform and a
    mistake shows; the norms' scales are not all one.
    """
    shape = {
        "vocab_size": 131,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    if "num_experts" in fields:
        network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape | fields)).float().eval()
    else:
        network = Qwen3ForCausalLM(Qwen3Config(**shape | fields)).float().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    network.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        assert tokenizer is not None
        shutil.copyfile(tokenizer / name, directory / name)
    return network


def one_update(
    programs: Any,
    state: Any,
    batch: Any,
    heads: Any = None,
    frozen: Any = None,
    accumulate: int = 1,
):
    """An update by a whole batch in micro-batches, whose rows interleave: the state, the metrics,
    and the stats of the whole batch."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    hosted = jax.tree.map(np.asarray, batch)
    parts = [jax.tree.map(lambda x, k=k: x[k::accumulate], hosted) for k in range(accumulate)]
    micros = (jax.device_put(part, mesh_lib.make_row_sharding(mesh)) for part in parts)
    single = accumulate == 1
    state, measured, found = programs.once(state, micros, heads, frozen, single=single)
    each = [found[k] for k in range(accumulate)]
    stats = jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *each)
    return state, measured, stats


def sequences_of(work: Any, made: Any = lambda micro: micro.make_batch()) -> list[Any]:
    """What a step trains on, sequence by sequence in the order that they are numbered: batches of
    arrays [tokens, ...]. `made` gives a micro-batch's arrays."""
    found = {}
    for micro in (micro for part in work for micro in part):
        batch = dataclasses.replace(made(micro), teacher_inputs=None)
        batch = jax.tree.map(np.asarray, batch)
        for row, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                own = batch.segments_BT[row] == segment
                found[number] = jax.tree.map(lambda x, row=row, own=own: x[row][own], batch)
    return [found[number] for number in sorted(found)]
