"""Fixtures for tests of training runs."""

import pytest

from tests.support.runs import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)
