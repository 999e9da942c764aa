"""Tiny models written by transformers, and their outputs in transformers."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_qwen3(
    directory: Path, *, tokenizer: Path | None = None, seed: int = 0, **fields: Any
) -> Any:
    """Writes a random Qwen3 of odd shape into `directory`, and returns it.

    `fields` are those of config.json; with num_experts it is a mixture of experts. The weights are
    larger than at initialisation, so that distributions are far from uniform and mistakes show; the
    scales of the norms are not all one.
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


def logprobs(network: Qwen3ForCausalLM, ids: list[int]) -> list[float]:
    """Returns transformers' log-probability of each token but the first."""
    with torch.no_grad():
        logp = network(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def greedy(network: Qwen3ForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Returns transformers' greedy continuation of `prompt`."""
    ids = torch.tensor([prompt])
    # Without a mask, it takes every 0 in a prompt for padding.
    out = network.generate(  # pyright: ignore[reportAttributeAccessIssue]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
