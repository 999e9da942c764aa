"""What must not reach a terminal or a file: control characters, and secrets."""

import pytest

from distill.runtime import environment, paths
from models.errors import UserError


def test_control_characters_are_shown_escaped() -> None:
    text = "\x1b[2J\x1b]0;title\x07 é\n\ta\u202eb\r"
    assert paths.escape_controls(text) == "\\x1b[2J\\x1b]0;title\\x07 é\n\ta\\u202eb\\r"


def test_a_password_in_a_path_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError, match=r"^--data: has a password") as raised:
        paths.refuse_credentials("https://me:hunter2@host/rows.jsonl", "--data")
    assert "hunter2" not in str(raised.value)
    paths.refuse_credentials("gs://bucket/a:b@c", "--data")


def test_secrets_are_hidden_in_the_recorded_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "train --a=0123456789abcdef --b=hf_abcdefghijklmnopqrst --c=s3://me:pw@host/x --seed=1"
    hidden = "train --a=*** --b=*** --c=s3://me:***@host/x --seed=1"
    assert environment.hide_secrets(text) == hidden
