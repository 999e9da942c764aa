"""What several tests build on: tiny models that transformers itself writes."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
