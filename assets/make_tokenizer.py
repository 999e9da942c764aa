"""Makes the tokenizer and configs of the tiny teacher and student: all of them but the weights.

    python assets/make_tokenizer.py --template_from=DIR      (a directory with a Qwen3 tokenizer)

The tokenizer is a small version of Qwen3's: the same normaliser, split pattern, chat template and
added tokens in the same order, over a byte-level vocabulary whose merges are the words of the
generated arithmetic. As in Qwen3, the embedding has more rows than the tokenizer has tokens.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from distill.data import arithmetic  # noqa: E402

VOCABULARY = 512
CONTEXT = 512
SIZES = {
    "teacher": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
    },
    "student": {
        "num_hidden_layers": 4,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 144,
    },
}
# Qwen2's pattern: each digit is split off, a word takes the one space before it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(added: list[AddedToken]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on the arithmetic, with `added` after its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_corpus(), trainer)
    tokenizer.add_tokens(added)
    return tokenizer


def make_corpus() -> list[str]:
    """Makes text in which all words of the task and of the chat template are frequent."""
    questions = [arithmetic.make_problem(0, i, "train", (3, 5)).question for i in range(2000)]
    return questions + ["user", "assistant", "system", "\n\n"] * 1000


def write_model_files(
    directory: Path, size: dict[str, int], tokenizer: Tokenizer, tokenizer_config: dict
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, config.json and generation_config.json."""
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **size,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": size["num_hidden_layers"],
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    generation = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Writes both directories, with the added tokens and the template of a Qwen3 tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--template_from", type=Path, required=True)
    source = parser.parse_args().template_from
    published = json.loads((source / "tokenizer_config.json").read_text())
    flags = ("content", "special", "normalized", "single_word", "lstrip", "rstrip")
    added = [
        AddedToken(**{flag: token[flag] for flag in flags})
        for _, token in sorted(
            published.pop("added_tokens_decoder").items(), key=lambda item: int(item[0])
        )
    ]
    tokenizer = make_tokenizer(added)
    for name, size in SIZES.items():
        write_model_files(ASSETS / name, size, tokenizer, published | {"model_max_length": CONTEXT})
    print(f"{tokenizer.get_vocab_size()} tokens, of which {len(added)} added")


if __name__ == "__main__":
    main()
