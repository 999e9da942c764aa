"""Makes the directories of the studies' models: a tokenizer and the ladder of sizes, no weights.

The tokenizer is the embedded one's, trained again on text of the studies' tasks.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from models.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "teacher"
VOCABULARY = 512
# Layers, hidden size, size of a head, feed-forward size: a student, and teachers of three sizes.
SIZES = {
    "small": (3, 64, 16, 128),
    "medium": (4, 96, 24, 192),
    "large": (4, 128, 32, 256),
}


def write_model_directory(directory: Path, size: str, corpus: Iterable[str]) -> None:
    """Writes a config and a tokenizer to `directory`, from which a run starts at random weights.

    Raises:
      UserError: if `size` is unknown.
    """
    if size not in SIZES:
        raise UserError(f"model size {size!r}: known are {', '.join(SIZES)}")
    layers, hidden, head, feed_forward = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    embedded = AutoTokenizer.from_pretrained(ASSETS)
    embedded.train_new_from_iterator(corpus, VOCABULARY - len(embedded.added_tokens_decoder), show_progress=False).save_pretrained(directory)
    config = json.loads((ASSETS / "config.json").read_text()) | {
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "hidden_size": hidden,
        "head_dim": head,
        "intermediate_size": feed_forward,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_bytes((ASSETS / "generation_config.json").read_bytes())
