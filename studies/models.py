"""python -m studies.models --size=small --out=DIR: a model's config and tokenizer, no weights.

The tokenizer is the embedded one's, trained again on text of the studies' tasks.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from transformers import AutoTokenizer

from distill.runtime import cli
from studies import tasks

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "teacher"
VOCABULARY = 512
# Layers, hidden size, size of a head, feed-forward size: a student, and teachers of three sizes.
SIZES = {
    "small": (3, 64, 16, 128),
    "medium": (4, 96, 24, 192),
    "large": (4, 128, 32, 256),
}


def write_model_directory(directory: Path, size: str, corpus: Iterable[str]) -> None:
    """Writes a config of one of SIZES and a tokenizer of the texts of `corpus` to `directory`, from
    which a run starts at random weights."""
    layers, hidden, head, feed_forward = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    embedded = AutoTokenizer.from_pretrained(ASSETS)
    embedded.train_new_from_iterator(
        corpus, VOCABULARY - len(embedded.added_tokens_decoder), show_progress=False
    ).save_pretrained(directory)
    config = json.loads((ASSETS / "config.json").read_text()) | {
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "hidden_size": hidden,
        "head_dim": head,
        "intermediate_size": feed_forward,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_bytes(
        (ASSETS / "generation_config.json").read_bytes()
    )


OPTIONS = flags.FlagValues()
SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "Size of the model.", flag_values=OPTIONS)
TASKS = flags.DEFINE_list(
    "tasks", ["graphs"], "Tasks whose text the tokenizer is made for.", flag_values=OPTIONS
)
OUT = flags.DEFINE_string("out", None, "Directory to write.", OPTIONS, required=True)


def main() -> None:
    write_model_directory(Path(OUT.value), SIZE.value, tasks.make_corpus(TASKS.value))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
