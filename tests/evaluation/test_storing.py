"""Tests `score --output`: what it stores, that it goes on after a stop, and what it refuses.

One tiny model scores all; transformers is the reference.
"""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM

from distill import score
from distill.evaluation import scoring, storing
from distill.runtime import paths, run_files
from distill.teachers import stored_files
from distill.teachers.stored import StoredScorer
from tests.support.paths import TOKENIZER
from tests.support.tiny_models import tiny_qwen3
from tests.support.verbs import call, read, write

V, E = 512, 32
PAIRS = [([5, 7], [9, 3, 90, 4]), ([5, 7], [8]), ([11], list(range(40, 59))), ([1, 2, 3], [6, 6])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    path = tmp_path_factory.mktemp("models") / "chatty"
    fields = {"vocab_size": V, "hidden_size": E, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return path, tiny_qwen3(path, tokenizer=TOKENIZER, **fields, **heads)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs as `generate` writes them, with one sample that comes twice."""
    samples = [[PAIRS[0][1], PAIRS[1][1], PAIRS[0][1]], [PAIRS[2][1]], [PAIRS[3][1]]]
    prompts = [PAIRS[0][0], PAIRS[2][0], PAIRS[3][0]]
    return write(
        tmp_path_factory.mktemp("rows") / "samples.jsonl",
        [
            {
                "tokens": prompt,
                "prompt_tokens": prompt,
                "samples": [{"tokens": ids, "finish_reason": "length"} for ids in group],
            }
            for prompt, group in zip(prompts, samples, strict=True)
        ],
    )


def store(model: tuple[Path, object], rows: Path, out: Path, *flags: str) -> int:
    shared = (f"--model={model[0]}", f"--tokens={rows}", f"--out={out}", "--batch_size=2")
    return call(score, *shared, "--dtype=float32", *flags)


@pytest.fixture(scope="module")
def hidden(model, rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "hidden"
    assert store(model, rows, out, "--output=hidden") == 0
    return out


def find_logp(network: Qwen3ForCausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Returns transformers' log-probabilities [n, V] of what follows the prompt."""
    with torch.no_grad():
        logits = network(torch.tensor([prompt + response])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def read_all(scorer: StoredScorer) -> list:
    return [scorer.submit(*pair, "here").result() for pair in PAIRS]


def test_stored_hidden_states_give_the_distribution_of_transformers(model, hidden):
    network = model[1]
    scorer = StoredScorer(str(hidden), "hidden")
    assert scorer.head_VE is not None
    with torch.no_grad():
        np.testing.assert_array_equal(scorer.head_VE, network.lm_head.weight.numpy())
    assert scorer.info.hidden_size == E and scorer.info.hidden_dtype == "float32"
    for (prompt, response), output in zip(PAIRS, read_all(scorer), strict=True):
        assert output.hidden is not None and output.hidden.shape == (len(response), E)
        logp_nV = jax.nn.log_softmax(output.hidden @ scorer.head_VE.T)
        np.testing.assert_allclose(logp_nV, find_logp(network, prompt, response), atol=1e-4)
    manifest = stored_files.read_manifest(hidden)
    assert manifest.settings.responses == len(PAIRS)  # the one that comes twice is stored once
    assert manifest.settings.tokens == sum(len(response) for _, response in PAIRS)
    assert manifest.is_complete
    scorer.close()


@pytest.mark.parametrize("output", ["top", "token"])
def test_stored_probabilities_are_those_of_transformers(model, rows, hidden, output, tmp_path):
    network = model[1]
    flags = ["--top_k=5"] if output == "top" else []
    assert store(model, rows, tmp_path / output, f"--output={output}", *flags) == 0
    scorer = StoredScorer(str(tmp_path / output), output, 5 if output == "top" else 0)
    assert scorer.head_VE is None
    token_scorers = [StoredScorer(str(x), "token") for x in (tmp_path / output, hidden)]
    for (prompt, response), x in zip(PAIRS, read_all(scorer), strict=True):
        expected = find_logp(network, prompt, response)
        if output == "top":
            theirs = expected.topk(5)
            assert x.get_fields()["top_ids"].tolist() == theirs.indices.tolist()
            np.testing.assert_allclose(x.get_fields()["top_logp"], theirs.values, atol=1e-4)
        own = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        for token_scorer in token_scorers:
            logp = token_scorer.submit(prompt, response).result().get_fields()["logp"]
            np.testing.assert_allclose(logp, own, atol=1e-4)
    limited = scorer.submit(*PAIRS[0], limit=2).result()
    assert limited.num_tokens == 2


def test_the_files_have_the_bytes_that_are_foretold(model, rows, hidden, tmp_path):
    """docs/ has a table by the same formula."""
    assert store(model, rows, tmp_path / "top", "--output=top", "--top_k=3") == 0
    assert store(model, rows, tmp_path / "token", "--output=token") == 0
    for out, per_token, fields in (
        (hidden, 4 + 4 * E, 2),
        (tmp_path / "top", 4 + 8 * 3, 3),
        (tmp_path / "token", 4, 1),
    ):
        manifest = stored_files.read_manifest(out)
        assert stored_files.count_bytes_per_token(manifest.settings) == per_token
        (shard,) = manifest.shards
        data = (out / shard.file).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        assert len(data) == shard.bytes
        assert len(data) - header == shard.tokens * per_token + shard.responses * (20 + 4 * fields)


def list_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_job_that_is_stopped_anywhere_goes_on(model, rows, tmp_path, monkeypatch):
    """Whatever write is the last, the same call then leaves the files of an undisturbed job."""
    monkeypatch.setattr(storing, "SHARD_BYTES", 6 * (4 + 4 * E))
    whole = tmp_path / "whole"
    assert store(model, rows, whole, "--output=hidden") == 0
    expected = list_bytes(whole)
    assert sum(name.startswith("shard") for name in expected) == 3
    reals = {name: getattr(paths, name) for name in ("write_bytes", "write_text")}
    last, count = 0, 0

    def write_or_stop(name: str, path: epath.Path, data: bytes | str) -> None:
        nonlocal count
        count += 1
        if count > last:
            (path.parent / (path.name + ".tmp")).write_text("half")
            raise OSError(28, "No space left on device", str(path))
        reals[name](path, data)

    is_done = False
    while not is_done:
        out, count = tmp_path / f"cut{last}", 0
        with monkeypatch.context() as patch:
            patch.setattr(paths, "write_bytes", functools.partial(write_or_stop, "write_bytes"))
            patch.setattr(run_files, "write_text", functools.partial(write_or_stop, "write_text"))
            code = store(model, rows, out, "--output=hidden")
        is_done = count <= last
        assert code == (0 if is_done else 2)
        assert store(model, rows, out, "--output=hidden") == 0
        found = {k: v for k, v in list_bytes(out).items() if not k.endswith(".tmp")}
        assert found == expected
        last += 1
    assert last > 8  # head, tokenizer, and twice for each shard


def test_a_shard_that_is_lost_is_written_again(model, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storing, "SHARD_BYTES", 6 * (4 + 4 * E))
    out = tmp_path / "scores"
    assert store(model, rows, out, "--output=hidden") == 0
    expected = list_bytes(out)
    for name, message in (
        ("head.safetensors", "head.safetensors: cannot be read"),
        ("shard-00001.safetensors", "shard-00001.safetensors: no such file"),
        ("tokenizer/tokenizer.json", "tokenizer: was altered since it was written"),
    ):
        (out / name).unlink()
        assert store(model, rows, out, "--output=hidden") == 0
        assert message in capsys.readouterr().err
    assert list_bytes(out) == expected
    monkeypatch.setattr(scoring, "score_responses", None)  # nothing is left to score
    assert store(model, rows, out, "--output=hidden") == 0


def test_another_work_is_refused_by_name(model, rows, hidden, tmp_path, capsys):
    out = tmp_path / "scores"
    shutil.copytree(hidden, out)
    other = write(tmp_path / "other.jsonl", read(rows)[:2])
    for source, flags, message in (
        (other, ("--output=hidden",), "the responses was"),
        (rows, ("--output=token",), "output was 'hidden', now 'token'"),
        (rows, ("--output=hidden", "--dtype=bfloat16"), "dtype was 'float32'"),
    ):
        assert store(model, source, out, *flags) == 2
        assert message in capsys.readouterr().err
    changed = tmp_path / "model"
    shutil.copytree(model[0], changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, changed / "model.safetensors")
    assert store((changed, None), rows, out, "--output=hidden") == 2
    assert f"the model ({model[0]}) was" in capsys.readouterr().err
    assert list_bytes(out) == list_bytes(hidden)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output=top",), "--top_k=0: --output=top needs it above 0"),
        (("--output=hidden", "--top_k=3"), "--top_k=3"),
        (("--output=top", "--top_k=513"), "vocabulary has 512 tokens"),
        (("--stage=x", "--output=token"), "--stage=x: is read with --config only"),
    ],
)
def test_flags_that_contradict_are_refused(model, rows, flags, message, tmp_path, capsys):
    assert store(model, rows, tmp_path / "scores", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_rows_that_cannot_be_scored_are_named(model, tmp_path, capsys):
    for row, message in (
        ({"question": "1+1?", "response": "2"}, "rows.jsonl:2: neither samples nor tokens"),
        ({"tokens": [1], "response_tokens": [V]}, f"rows.jsonl:2: token id {V} is outside"),
        ({"tokens": [1], "response_tokens": []}, "rows.jsonl:2: the response is empty"),
        ({"tokens": [1], "response_tokens": [3] * 128}, "rows.jsonl:2: 129 tokens exceed"),
    ):
        good = {"tokens": [1], "response_tokens": [2]}
        rows = write(tmp_path / "rows.jsonl", [good, row])
        assert store(model, rows, tmp_path / "scores", "--output=token") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "scores").exists()


def test_a_directory_of_other_files_is_left_alone(model, rows, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert store(model, rows, tmp_path, "--output=token") == 2
    assert "holds notes.txt and no scores.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_without_room_is_refused_before_the_work(model, rows, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda path: usage)
    assert store(model, rows, tmp_path / "scores", "--output=hidden") == 2
    assert "has 0.00 GiB free" in capsys.readouterr().err
    assert not (tmp_path / "scores" / "scores.json").exists()
