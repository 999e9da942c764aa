"""Tests that stored scores are read back as written, and that no damage goes unnoticed."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from distill.data import retry
from distill.teachers import stored_files, wire
from distill.teachers.outputs import ResponseOutput
from distill.teachers.stored import StoredScorer
from distill.teachers.stored_files import Manifest, Settings
from models import families
from models.errors import SourceFailure, UserError

V, E, K = 17, 6, 3
PAIRS = [([1, 2], [3, 4, 5]), ([1, 2], [3]), ([1], [2, 3, 4]), ([9, 8], [7] * 5), ([0], [16])]
HEAD_VE = np.random.default_rng(1).normal(size=(V, E)).astype(ml_dtypes.bfloat16)


def make_output(response: list[int], output: str) -> ResponseOutput:
    rng = np.random.default_rng(response)
    n = len(response)
    fields: dict[str, np.ndarray] = {"logp": -rng.random(n).astype(np.float32)}
    if output == "hidden":
        fields["hidden"] = rng.normal(size=(n, E)).astype(ml_dtypes.bfloat16)
    if output == "top":
        fields["top_ids"] = np.stack([rng.permutation(V)[:K] for _ in range(n)]).astype(np.int32)
        fields["top_logp"] = -np.sort(rng.random((n, K)) + 1.5, axis=1).astype(np.float32)
    return ResponseOutput(**fields)


def write_scores(folder: Path, output: str, shard_sizes: tuple[int, ...] = (2, 3)) -> Path:
    directory = epath.Path(folder)
    settings = Settings(
        model="teacher",
        model_hash="abc",
        tokenizer_hash="",
        step=-1,
        rows="rows.jsonl",
        rows_hash="def",
        output=output,
        top_k=K if output == "top" else 0,
        dtype="bfloat16",
        param_dtype="bfloat16",
        vocab_size=V,
        hidden_size=E,
        responses=len(PAIRS),
        tokens=sum(len(response) for _, response in PAIRS),
    )
    manifest = Manifest(settings, wire.hash_head(HEAD_VE) if output == "hidden" else "")
    if output == "hidden":
        stored_files.write_head(directory, HEAD_VE)
    first = 0
    for number, size in enumerate(shard_sizes):
        pairs = PAIRS[first : first + size]
        shard = stored_files.write_shard(
            directory,
            number,
            [stored_files.hash_response(*pair) for pair in pairs],
            [make_output(response, output) for _, response in pairs],
        )
        manifest = dataclasses.replace(manifest, shards=(*manifest.shards, shard))
        first += size
    stored_files.write_manifest(directory, manifest)
    return folder


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> Path:
    return write_scores(tmp_path_factory.mktemp("scores") / "hidden", "hidden")


@pytest.mark.parametrize("output", ["hidden", "top", "token"])
def test_outputs_are_read_as_they_were_written(output, tmp_path):
    folder = str(write_scores(tmp_path / "scores", output))
    scorer = StoredScorer(folder, output, K if output == "top" else 0)
    if output == "hidden":
        assert scorer.head_VE is not None and scorer.head_VE.tobytes() == HEAD_VE.tobytes()
    for prompt, response in reversed(PAIRS):
        written = make_output(response, output).get_fields()
        found = scorer.submit(prompt, response, "here").result().get_fields()
        names = {"token": ["logp"], "top": ["top_ids", "top_logp"], "hidden": ["hidden"]}[output]
        assert sorted(found) == names
        for name in names:
            assert found[name].dtype == written[name].dtype
            assert found[name].tobytes() == written[name].tobytes()
    limited = scorer.submit(*PAIRS[3], "here", 2).result().get_fields()
    whole = make_output(PAIRS[3][1], output).get_fields()
    assert all(x.tobytes() == whole[name][:2].tobytes() for name, x in limited.items())
    scorer.close()


def test_documented_sizes():
    """The bytes of a token, and of 100,000 responses of 4,000 tokens, that docs/teachers.md has."""
    settings: dict[str, Any] = {
        field.name: "" if field.type is str else 0 for field in dataclasses.fields(Settings)
    }
    for size, hidden_bytes, terabytes, head_gigabytes in (
        ("8b", 8196, 3.28, 1.24),
        ("32b", 10244, 4.10, 1.56),
        ("235b-a22b", 8196, 3.28, 1.24),
    ):
        released = families.find_released(f"Qwen/Qwen3-{size}")
        assert released is not None
        E = released.hidden_size
        settings |= {"hidden_size": E, "dtype": "bfloat16"}
        for output, top_k, nbytes, total in (
            ("hidden", 0, hidden_bytes, terabytes * 1e12),
            ("top", 64, 516, 206e9),
            ("top", 20, 164, 66e9),
            ("token", 0, 4, 1.6e9),
        ):
            job = Settings(**settings | {"output": output, "top_k": top_k})
            assert stored_files.count_bytes_per_token(job) == nbytes
            assert 100_000 * 4_000 * nbytes == pytest.approx(total, rel=0.01)
        assert released.vocab_size * E * 2 == pytest.approx(head_gigabytes * 1e9, rel=0.01)


def test_a_response_that_is_not_stored_is_named(hidden):
    scorer = StoredScorer(str(hidden), "hidden")
    for prompt, response in (([1, 2], [3, 4]), ([1], [2, 3, 4, 5]), ([1, 2, 3], [4, 5]), ([], [1])):
        for check in (scorer.submit, scorer.require_response):
            with pytest.raises(UserError, match=r"^rows.jsonl:7: .*not among the 5 responses"):
                check(prompt, response, "rows.jsonl:7")
    scorer.require_response(*PAIRS[0], "here")


def test_no_flipped_bit_goes_unnoticed(hidden, tmp_path):
    """A bit of any byte of any file; the texts of scores.json that are read by people alone, and
    log-probabilities, which are not read here, do not count."""
    outputs = [make_output(response, "hidden") for _, response in PAIRS]
    expected = [x.get_fields()["hidden"].tobytes() for x in outputs]
    folder = tmp_path / "scores"
    shutil.copytree(hidden, folder)

    def read_all() -> list[bytes]:
        scorer = StoredScorer(str(folder), "hidden")
        outputs = [scorer.submit(*pair, "here").result() for pair in PAIRS]
        scorer.close()
        assert scorer.head_VE is not None and scorer.head_VE.tobytes() == HEAD_VE.tobytes()
        return [x.get_fields()["hidden"].tobytes() for x in outputs]

    assert read_all() == expected
    unnoticed = []
    for name in ("shard-00000.safetensors", "head.safetensors"):
        data = (folder / name).read_bytes()
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1 << place % 8
            (folder / name).write_bytes(changed)
            try:
                assert read_all() == expected, (name, place)
                unnoticed.append((name, place))
            except UserError as error:
                assert str(folder / name) in str(error)
        (folder / name).write_bytes(data)
    header = 8 + int.from_bytes((folder / "shard-00000.safetensors").read_bytes()[:8], "little")
    begin, end = json.loads((folder / "shard-00000.safetensors").read_bytes()[8:header])["logp"][
        "data_offsets"
    ]
    logp = {("shard-00000.safetensors", header + i) for i in range(begin, end)}
    assert set(unnoticed) <= logp | {("head.safetensors", i) for i in range(8 + 88)}


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(content | fields))


def drop_shard(folder: Path) -> None:
    content = json.loads((folder / "scores.json").read_text())
    change(folder, shards=content["shards"][:1])


def swap_shards(folder: Path) -> None:
    a, b = (folder / f"shard-0000{i}.safetensors" for i in range(2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def write_other_head(folder: Path) -> None:
    stored_files.write_head(epath.Path(folder), np.negative(HEAD_VE))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f, "shard-00001.safetensors"), "shard-00001.safetensors: has .* bytes"),
        (lambda f: cut(f, "head.safetensors"), "head.safetensors: not safetensors, or cut short"),
        (lambda f: cut(f, "scores.json") or cut(f, "scores.json"), "scores.json: not a list of"),
        (lambda f: (f / "shard-00000.safetensors").unlink(), "shard-00000.safetensors: no such"),
        (lambda f: (f / "head.safetensors").unlink(), "head.safetensors: cannot be read"),
        (lambda f: (f / "scores.json").unlink(), "scores.json: cannot be read"),
        (drop_shard, "holds 2 of 5 responses; the same call of score goes on"),
        (swap_shards, "shard-00000.safetensors: has .* bytes"),
        (write_other_head, "head.safetensors: head_VE is another head"),
        (lambda f: change(f, vocab_size=V + 1), r"head_VE has the shape \[17, 6\], not \[18, 6\]"),
        (lambda f: change(f, format=2), "has the format 2, this version reads 1"),
        (lambda f: change(f, responses="5"), "scores.json: not a list of stored scores"),
        (lambda f: change(f, shards=[{"file": "../x"}]), "scores.json: not a list of stored"),
    ],
)
def test_damage_is_found_when_scores_are_opened(
    hidden, damage: Callable[[Path], object], message, tmp_path
):
    folder = tmp_path / "scores"
    shutil.copytree(hidden, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        StoredScorer(str(folder), "hidden")
    assert "\n" not in str(error.value)


def test_scores_of_another_form_are_refused(hidden, tmp_path):
    top = str(write_scores(tmp_path / "top", "top"))
    for folder, output, k, message in (
        (str(hidden), "top", K, "holds hidden and token, but top is asked for"),
        (top, "hidden", 0, "holds top and token, but hidden is asked for"),
        (top, "top", K + 1, "holds the 3 likeliest tokens, but 4 are asked for"),
    ):
        with pytest.raises(UserError, match=message):
            StoredScorer(folder, output, k)


def test_a_file_that_is_lost_while_it_is_read_stops_the_run(hidden, tmp_path, monkeypatch):
    """As a network disk may fail: the loop then stops at a checkpoint."""
    monkeypatch.setattr(retry, "WAIT_SECONDS", (0.0,))
    folder = tmp_path / "scores"
    shutil.copytree(hidden, folder)
    scorer = StoredScorer(str(folder), "hidden")
    (folder / "shard-00001.safetensors").unlink()
    scorer.submit(*PAIRS[0]).result()
    with pytest.raises(SourceFailure, match=r"shard-00001\.safetensors"):
        scorer.submit(*PAIRS[4]).result()
