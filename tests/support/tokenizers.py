"""Copies tokenizers without some of their tokens."""

import json
from pathlib import Path


def copy_tokenizer_without(directory: Path, tokens: tuple[str, ...], target: Path) -> Path:
    """Writes a copy of a tokenizer without some of its added tokens, like those of Base models."""
    target.mkdir()
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in tokens]
    for token in tokens:
        content["model"]["vocab"].pop(token, None)
    (target / "tokenizer.json").write_text(json.dumps(content))
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    if added := fields.get("added_tokens_decoder"):
        kept = {i: t for i, t in added.items() if t["content"] not in tokens}
        fields["added_tokens_decoder"] = kept
    fields["eos_token"] = "<|endoftext|>"
    (target / "tokenizer_config.json").write_text(json.dumps(fields))
    return target
