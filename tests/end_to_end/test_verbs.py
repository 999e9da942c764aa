"""Tests generate, score and export as they are called: against transformers, each other and bad
input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from configs import base
from distill import export, generate, score, verify
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.runtime.checkpoint import Checkpoints
from distill.training import loop, optim, update
from models.errors import UserError
from tests.support.paths import ROOT, TOKENIZER
from tests.support.templates import THINKING_ONLY
from tests.support.tiny_models import greedy, logprobs, tiny_qwen3
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")

PROMPTS = [[5], [7, 3, 90], list(range(40, 59)), [11, 12, 13, 14, 130, 0, 1]]
STEPS = (3, 7)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    """A model without tokenizer and stop ids, of a shape that no two devices divide."""
    path = tmp_path_factory.mktemp("models") / "bare"
    return path, tiny_qwen3(path)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with a tokenizer, of a shape that eight devices divide."""
    path = tmp_path_factory.mktemp("models") / "chatty"
    fields = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tiny_qwen3(path, tokenizer=TOKENIZER, tie_word_embeddings=True, **fields, **heads)
    return path


@pytest.fixture(scope="module")
def run(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of two steps, whose student is `chatty`."""
    workdir = tmp_path_factory.mktemp("runs") / "x"
    c = base.get_config()
    c.student.path = str(chatty)
    run_files.write_text(workdir / "config.json", c.to_json_best_effort())
    student = policy.make_abstract(str(chatty), "float32", False, mesh_lib.make_mesh(1, -1, 1))
    with Checkpoints(
        workdir / "checkpoints", save_interval_steps=1, max_to_keep=None
    ) as checkpoints:
        for step in STEPS:
            params = policy.init_random_policy(student, jax.random.key(step)).params
            state = update.init_train_state(optim.make_optimizer(c.opd.optim, 10), params, step)
            checkpoints.save(step, state, {"stage": "opd"})
    return workdir


def test_greedy_continuations_equal_those_of_transformers(bare, tmp_path: Path) -> None:
    path, network = bare
    rows = write(tmp_path / "in.jsonl", [{"tokens": p, "id": i} for i, p in enumerate(PROMPTS)])
    out = tmp_path / "new" / "out.jsonl"
    flags = ("--temperature=0", "--max_new_tokens=64", "--dtype=float32")
    assert call(generate, f"--model={path}", f"--prompts={rows}", f"--out={out}", *flags) == 0
    rows_out = read(out)
    assert [row["id"] for row in rows_out] == list(range(len(PROMPTS)))
    for row, prompt in zip(rows_out, PROMPTS, strict=True):
        (sample,) = row["samples"]
        assert row["prompt_tokens"] == prompt
        assert sample["tokens"] == greedy(network, prompt, 64)
        assert (sample["finish_reason"], sample["text"]) == ("length", None)
    # The same with one of these tokens as a stop token.
    stop = rows_out[0]["samples"][0]["tokens"][20]
    stopping = tmp_path / "stopping"
    shutil.copytree(path, stopping)
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    out.unlink()
    assert call(generate, f"--model={stopping}", f"--prompts={rows}", f"--out={out}", *flags) == 0
    reasons = set()
    for row, whole in zip(read(out), rows_out, strict=True):
        (sample,), tokens = row["samples"], whole["samples"][0]["tokens"]
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert sample["tokens"] == tokens[:end]
        assert len(sample["logprobs"]) == end
        assert sample["finish_reason"] == ("stop" if stop in tokens else "length")
        reasons.add(sample["finish_reason"])
    assert "stop" in reasons


def test_samples_are_reproducible_and_score_the_same(bare, tmp_path: Path) -> None:
    path, network = bare
    rows = write(tmp_path / "in.jsonl", [{"tokens": p} for p in PROMPTS])

    def sampled(name: str, *flags: str) -> list[dict]:
        out = tmp_path / name
        shared = (f"--model={path}", f"--prompts={rows}", f"--out={out}", "--max_new_tokens=24")
        assert call(generate, *shared, "--samples=3", *flags) == 0
        return read(out)

    # With seed 1, one token is a tie but for rounding on processors without AVX-512.
    samples = sampled("a.jsonl", "--seed=3")
    tokens = [[s["tokens"] for s in row["samples"]] for row in samples]
    assert len({str(t) for group in tokens for t in group}) == 12
    again = sampled("b.jsonl", "--seed=3", "--batch_size=5")
    assert [[s["tokens"] for s in row["samples"]] for row in again] == tokens
    other = sampled("c.jsonl", "--seed=2")
    assert [[s["tokens"] for s in row["samples"]] for row in other] != tokens

    pairs = [(row["prompt_tokens"], s) for row in samples for s in row["samples"]]
    whole = write(tmp_path / "whole.jsonl", [{"tokens": p + s["tokens"], "n": 1} for p, s in pairs])
    out = tmp_path / "scores.jsonl"
    shared = (f"--model={path}", f"--tokens={whole}", f"--out={out}", "--top_k=5")
    assert call(score, *shared) == 0
    for row, (prompt, sample) in zip(read(out), pairs, strict=True):
        assert row["n"] == 1
        np.testing.assert_allclose(row["logprobs"][len(prompt) :], sample["logprobs"], atol=1e-4)
        with torch.no_grad():
            logp = network(torch.tensor([row["tokens"]])).logits[0].log_softmax(-1)[:-1]
        targets = torch.tensor(row["tokens"][1:])[:, None]
        assert row["logprobs"][0] is None and row["top"][0] is None
        np.testing.assert_allclose(row["logprobs"][1:], logp.gather(1, targets)[:, 0], atol=1e-4)
        theirs = logp.topk(5)
        assert [[i for i, _ in place] for place in row["top"][1:]] == theirs.indices.tolist()
        ours = [[x for _, x in place] for place in row["top"][1:]]
        np.testing.assert_allclose(ours, theirs.values, atol=1e-4)


def test_top_p_sampling_keeps_only_the_most_likely_token(bare, tmp_path: Path) -> None:
    path, network = bare
    rows = write(tmp_path / "in.jsonl", [{"tokens": p} for p in PROMPTS])
    out = tmp_path / "out.jsonl"
    shared = (f"--model={path}", f"--prompts={rows}", f"--out={out}", "--max_new_tokens=8")
    assert call(generate, *shared, "--top_k=3", "--top_p=0.0001") == 0
    for row, prompt in zip(read(out), PROMPTS, strict=True):
        (sample,) = row["samples"]
        assert sample["tokens"] == greedy(network, prompt, 8)
        assert max(map(abs, sample["logprobs"])) == 0  # the only token allowed


def test_top_logprobs_equal_those_of_score(bare, tmp_path: Path) -> None:
    """They are the model's own at any temperature and truncation."""
    rows = write(tmp_path / "in.jsonl", [{"tokens": p} for p in PROMPTS])
    out, scores = tmp_path / "out.jsonl", tmp_path / "scores.jsonl"
    flags = ("--max_new_tokens=8", "--temperature=0.7", "--min_p=0.05", "--presence_penalty=1.5")
    shared = (f"--model={bare[0]}", f"--prompts={rows}", f"--out={out}", *flags)
    assert call(generate, *shared, "--top_logprobs=4") == 0
    samples = [(row["prompt_tokens"], row["samples"][0]) for row in read(out)]
    whole = write(tmp_path / "whole.jsonl", [{"tokens": p + s["tokens"]} for p, s in samples])
    shared = (f"--model={bare[0]}", f"--tokens={whole}", f"--out={scores}", "--top_k=4")
    assert call(score, *shared) == 0
    for (prompt, sample), scored in zip(samples, read(scores), strict=True):
        own, top = scored["logprobs"][len(prompt) :], scored["top"][len(prompt) :]
        np.testing.assert_allclose(sample["model_logprobs"], own, atol=1e-4)
        np.testing.assert_allclose(sample["top_logprobs"], top, atol=1e-4)
        assert not np.allclose(sample["logprobs"], own, atol=1e-2)


def test_rows_may_set_their_own_token_limits(bare, tmp_path: Path) -> None:
    path, network = bare
    own = [{"tokens": p, "max_new_tokens": n} for p, n in zip(PROMPTS, (3, 9, 1), strict=False)]
    rows = write(tmp_path / "in.jsonl", [*own, {"tokens": PROMPTS[3]}])
    out = tmp_path / "out.jsonl"
    shared = (f"--model={path}", f"--prompts={rows}", f"--out={out}", "--temperature=0")
    assert call(generate, *shared, "--max_new_tokens=5") == 0
    for row, prompt, limit in zip(read(out), PROMPTS, (3, 9, 1, 5), strict=True):
        (sample,) = row["samples"]
        assert sample["tokens"] == greedy(network, prompt, limit)
        assert (len(sample["logprobs"]), sample["finish_reason"]) == (limit, "length")


def test_stop_strings_end_a_response(chatty: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", [{"prompt": t} for t in ("2 + 3 =", "So", "x")])
    out = tmp_path / "out.jsonl"
    shared = (f"--model={chatty}", f"--prompts={rows}", f"--out={out}", "--temperature=0")
    assert call(generate, *shared, "--max_new_tokens=32") == 0
    whole = [row["samples"][0] for row in read(out)]
    stop = whole[0]["text"].strip("\ufffd")[5:8]
    out.unlink()
    assert call(generate, *shared, "--max_new_tokens=32", "--stop=@@@@", f"--stop={stop}") == 0
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    for row, before in zip(read(out), whole, strict=True):
        (sample,), text = row["samples"], before["text"]
        count = len(sample["tokens"])
        assert sample["tokens"] == before["tokens"][:count]
        assert len(sample["logprobs"]) == count
        assert sample["text"] == text.split(stop)[0]
        assert (sample["finish_reason"] == "stop") == (
            stop in text or before["finish_reason"] == "stop"
        )
        if stop in text:
            decode = [
                tokenizer.decode(before["tokens"][:n], skip_special_tokens=True)
                for n in (count - 1, count)
            ]
            assert [stop in t for t in decode] == [False, True]
    assert read(out)[0]["samples"][0]["text"] != whole[0]["text"]


def test_rows_that_fail_do_not_affect_the_others(
    bare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row fails if it is empty, too long or has a token with a NaN embedding; the error names it
    and the exit code is 2."""
    network = Qwen3ForCausalLM.from_pretrained(bare[0])
    with torch.no_grad():
        network.model.embed_tokens.weight[90] = torch.nan
    path = tmp_path / "poisoned"
    network.save_pretrained(path)
    good = [{"tokens": PROMPTS[i]} for i in (0, 2, 3)]
    bad = [{"tokens": PROMPTS[1]}, {"tokens": []}, {"tokens": [1] * 128}]
    rows = [good[0], bad[0], bad[1], good[1], bad[2], good[2]]
    out = tmp_path / "out.jsonl"

    def run_generate(rows: list, code: int) -> list[dict]:
        file = write(tmp_path / "in.jsonl", rows)
        flags = ("--max_new_tokens=6", "--top_k=2", "--seed=3")
        assert (
            call(generate, f"--model={path}", f"--prompts={file}", f"--out={out}", *flags) == code
        )
        return read(out)

    written = run_generate(rows, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        message.startswith("error: ")
        and "in.jsonl:2: the logits are nan after 0 sampled" in message
    )
    assert "(and 2 more rows); the other rows are in" in message
    errors = [row.get("error", "").partition("jsonl:")[2] for row in written]
    assert [e.partition(" ")[0] for e in errors] == ["", "2:", "3:", "", "5:", ""]
    assert [row["samples"] == [] for row in written] == [bool(e) for e in errors]
    usable = [row if row in good else good[0] for row in rows]
    for row, alone in zip(written, run_generate(usable, 0), strict=True):
        assert row["samples"] == alone["samples"] or row.get("error")


def test_chat_and_text_rows_are_rendered(chatty: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    rows = write(
        tmp_path / "in.jsonl",
        [{"prompt": "2 + 3 =", "answer": "5"}, {"messages": messages}, {"tokens": [1, 2]}],
    )
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    network = Qwen3ForCausalLM.from_pretrained(chatty)
    for thinking in ("on", "off"):
        out = tmp_path / f"{thinking}.jsonl"
        flags = ("--max_new_tokens=12", f"--thinking={thinking}", "--samples=2")
        assert call(generate, f"--model={chatty}", f"--prompts={rows}", f"--out={out}", *flags) == 0
        plain, chat, ids = read(out)
        assert plain["answer"] == "5"
        assert tokenizer.decode(plain["prompt_tokens"]) == "2 + 3 ="
        rendered = tokenizer.decode(chat["prompt_tokens"])
        assert rendered.startswith("<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n")
        assert rendered.endswith("</think>\n\n") == (thinking == "off")
        assert ids["prompt_tokens"] == [1, 2]
        for row in (plain, chat, ids):
            for sample in row["samples"]:
                text = tokenizer.decode(sample["tokens"], skip_special_tokens=True)
                assert sample["text"] == text
                whole = row["prompt_tokens"] + sample["tokens"]
                theirs = logprobs(network, whole)[len(row["prompt_tokens"]) - 1 :]
                np.testing.assert_allclose(sample["logprobs"], theirs, atol=1e-4)


def test_a_template_that_opens_the_block_is_seen_by_every_verb(
    chatty: Path, tmp_path: Path, capsys
) -> None:
    """Texts begin with the tag that the prompt opened, so that what is cut within the thoughts is
    no answer; tools reach the prompts."""
    model = shutil.copytree(chatty, tmp_path / "model")
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields["chat_template"] = THINKING_ONLY
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    asked = {"messages": [{"role": "user", "content": "2 + 3?"}], "tools": tools, "answer": "5"}
    rows, out = write(tmp_path / "in.jsonl", [asked]), tmp_path / "out.jsonl"
    sampled = (f"--model={model}", "--max_new_tokens=2")
    assert call(generate, f"--prompts={rows}", f"--out={out}", *sampled) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    (row,) = read(out)
    prompt = tokenizer.apply_chat_template(
        asked["messages"], tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert row["prompt_tokens"] == prompt and tokenizer.decode(prompt).endswith("<think>\n")
    (sample,) = row["samples"]
    text = tokenizer.decode(sample["tokens"], skip_special_tokens=True)
    assert sample["text"] == "<think>\n" + text
    cut = {**row, "samples": [{**sample, "text": "<think>\n5", "finish_reason": "stop"}]}
    graded = tmp_path / "graded.jsonl"
    flags = ("--benchmark=arithmetic", "--keep=all", f"--out={graded}")
    assert call(verify, f"--data={write(out, [cut])}", *flags) == 0
    assert read(graded)[0]["samples"][0]["outcome"] == "no_answer"
    flags = ("--benchmark=arithmetic", f"--data={rows}", f"--out={tmp_path / 'eval'}")
    assert call(evaluate, *flags, *sampled, "--seed=0") == 0
    (example,) = read(tmp_path / "eval" / "examples.jsonl")
    assert example["prompt_tokens"] == prompt and example["response"].startswith("<think>\n")
    assert (example["outcome"], example["well_formed"]) == ("no_answer", False)
    capsys.readouterr()
    generation = (f"--prompts={rows}", f"--out={out}2")
    for verb, arguments in ((generate, generation), (evaluate, flags)):
        assert call(verb, *arguments, *sampled, "--thinking=off") == 2
        words = "in.jsonl:1: it is not to think, but the chat template of"
        assert words in capsys.readouterr().err


def test_score_of_a_single_token_is_one_null(bare, tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", [{"tokens": [7]}, {"tokens": [7, 8]}])
    out = tmp_path / "out.jsonl"
    shared = (f"--model={bare[0]}", f"--tokens={rows}", f"--out={out}")
    assert call(score, *shared) == 0
    one, two = read(out)
    assert one == {"tokens": [7], "logprobs": [None]} and "top" not in two
    out.unlink()
    assert call(score, *shared, "--top_k=131", "--batch_size=1") == 0
    one, again = read(out)
    assert one["top"] == [None] and len(again["top"][1]) == 131
    np.testing.assert_allclose(again["logprobs"][1], two["logprobs"][1], atol=1e-4)
    assert sum(np.exp(x) for _, x in again["top"][1]) == pytest.approx(1, abs=1e-4)


def test_a_run_and_its_export_score_alike(run: Path, chatty: Path, tmp_path: Path) -> None:
    ids = list(range(3, 40))
    rows = write(tmp_path / "in.jsonl", [{"tokens": ids}])

    def scores(model: Path) -> list[float]:
        out = tmp_path / f"{model.name}.jsonl"
        assert call(score, f"--model={model}", f"--tokens={rows}", f"--out={out}") == 0
        return read(out)[0]["logprobs"][1:]

    out = tmp_path / "export"
    assert call(export, f"--run={run}", f"--out={out}", "--merge_lora") == 0
    network = Qwen3ForCausalLM.from_pretrained(out)
    assert network.dtype == torch.float32
    assert network.config.tie_word_embeddings
    newest = scores(run)
    np.testing.assert_allclose(newest, logprobs(network, ids), atol=1e-4)
    np.testing.assert_allclose(newest, scores(out), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(chatty).get_vocab()
    assert tokenizer.chat_template
    assert network.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert json.loads((out / "export.json").read_text())["step"] == STEPS[-1]

    # An earlier export is replaced; bfloat16 rounds.
    assert call(export, f"--run={run}", f"--out={out}", "--dtype=bfloat16", "--step=3") == 0
    rounded = Qwen3ForCausalLM.from_pretrained(out, dtype="auto")
    assert rounded.dtype == torch.bfloat16
    assert json.loads((out / "export.json").read_text())["step"] == 3
    assert not np.allclose(scores(out), newest, atol=0.1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_export_needs_a_run_and_an_unused_directory(
    run: Path, chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, empty = tmp_path / "taken", tmp_path / "run"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    empty.mkdir()
    shutil.copyfile(run / "config.json", empty / "config.json")
    new = tmp_path / "new"
    for flags, message in (
        ((f"--run={run}", f"--out={new}", "--step=5"), "no checkpoint of step 5, only of [7, 3]"),
        ((f"--run={empty}", f"--out={new}"), f"{empty}: a run without a checkpoint"),
        ((f"--run={chatty}", f"--out={new}"), f"--run={chatty}: no run directory"),
        ((f"--run={tmp_path / 'none'}", f"--out={new}"), "none: no run directory"),
        ((f"--run={run}", f"--out={taken}"), f"--out={taken}: holds files"),
        ((f"--run={run}", f"--out={taken / 'thesis.tex'}"), "not a directory"),
        ((f"--run={run}",), "--out is required"),
        ((f"--run={run}", "--out=gs://bucket/x"), "an export is written to a local directory"),
    ):
        assert call(export, *flags) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ") and message in line, line
        assert not new.exists()
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


BAD_PROMPTS = [
    ([], (), "in.jsonl: no rows"),
    (["{"], (), "in.jsonl:1: not JSON"),
    ([{"tokens": [1]}, {}], (), "in.jsonl:2: the model has no tokenizer"),
    ([{"tokens": [1]}, {"prompt": "x"}], (), "in.jsonl:2: the model has no tokenizer"),
    ([{"tokens": [1, "2"]}], (), "in.jsonl:1: tokens is not a list of token ids"),
    ([{"tokens": []}], (), "in.jsonl:1: the prompt is empty"),
    ([{"tokens": [1]}, {"tokens": [131]}], (), "in.jsonl:2: token id 131 is outside"),
    ([{"tokens": [1] * 65}], ("--max_new_tokens=64",), "in.jsonl:1: prompt of 65 tokens"),
    ([{"tokens": [1]}], ("--temperature=-1",), "temperature"),
    ([{"tokens": [1]}], ("--temperature=nan",), "--temperature=nan"),
    ([{"tokens": [1]}], ("--top_p=0",), "--top_p=0"),
    ([{"tokens": [1]}], ("--top_p=1.5",), "--top_p=1.5"),
    ([{"tokens": [1]}], ("--top_k=-1",), "top_k"),
    ([{"tokens": [1]}], ("--top_k=132",), "--top_k=132: the vocabulary has 131 tokens"),
    ([{"tokens": [1]}], ("--min_p=1.5",), "--min_p=1.5"),
    ([{"tokens": [1]}], ("--presence_penalty=nan",), "--presence_penalty=nan"),
    ([{"tokens": [1]}], ("--top_logprobs=132",), "--top_logprobs=132"),
    ([{"tokens": [1]}], ("--stop=x", "--stop="), "--stop=: an empty text"),
    ([{"tokens": [1]}], ("--stop=x",), "no tokenizer to find it with"),
    ([{"tokens": [1]}, {"tokens": [1], "max_new_tokens": 0}], (), "in.jsonl:2: max_new_tokens=0"),
    ([{"tokens": [1], "max_new_tokens": 2**31}], (), "in.jsonl:1: max_new_tokens=2147483648"),
    ([{"tokens": [1], "max_new_tokens": 2.5}], (), "in.jsonl:1: max_new_tokens=2.5"),
    ([{"tokens": [1]}], ("--samples=0",), "samples"),
    ([{"tokens": [1]}], ("--thinking=maybe",), "thinking"),
    ([{"tokens": [1]}], ("--model=no/such/place",), "no/such/place: no model directory"),
    ([{"tokens": [1]}], ("--model=nobody/nothing",), "nobody/nothing: no model directory"),
    ([{"tokens": [1]}], ("--prompts=none.jsonl",), "none.jsonl: no such file"),
    ([{"tokens": [1]}], ("--nonsense=1",), "nonsense"),
]
BAD_TOKENS = [
    ([{"prompt": "x"}], (), "in.jsonl:1: no tokens among its fields"),
    ([{"tokens": [1]}, {"tokens": [-1]}], (), "in.jsonl:2: tokens is not a list"),
    ([{"tokens": [500]}], (), "in.jsonl:1: token id 500"),
    ([{"tokens": [1] * 129}], (), "in.jsonl:1: 129 tokens exceed"),
    ([{"tokens": [1]}], ("--top_k=132",), "--top_k=132"),
    ([{"tokens": [1]}], ("--batch_size=0",), "batch_size"),
    ([{"tokens": [1]}], ("--dtype=float8",), "dtype"),
]


@pytest.mark.parametrize(
    ("verb", "rows", "flags", "said"),
    [(generate, *case) for case in BAD_PROMPTS] + [(score, *case) for case in BAD_TOKENS],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    verb: ModuleType,
    rows: list,
    flags: tuple[str, ...],
    said: str,
    bare,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    source = "--prompts" if verb is generate else "--tokens"
    limit = ("--max_new_tokens=2",) if verb is generate else ()
    shared = (f"--model={bare[0]}", f"{source}={path}", f"--out={tmp_path / 'out.jsonl'}")
    assert call(verb, *shared, *limit, *flags) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and said in line, line
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_output_paths_fail_before_any_work(
    bare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "in.jsonl", [{"tokens": [1]}])
    for out in (tmp_path, rows / "out.jsonl", Path("/dev/null")):
        assert call(score, f"--model={bare[0]}", f"--tokens={rows}", f"--out={out}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --out={out}: ")


def test_output_follows_a_symbolic_link(bare, tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", [{"tokens": [1]}])
    link, out = tmp_path / "link.jsonl", tmp_path / "there" / "out.jsonl"
    out.parent.mkdir()
    link.symlink_to(out)
    assert call(score, f"--model={bare[0]}", f"--tokens={rows}", f"--out={link}") == 0
    assert link.is_symlink() and read(out) == [{"tokens": [1], "logprobs": [None]}]


def set_field(name: str, value: object) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        fields = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(fields | {name: value}))

    return apply


def set_tensor(name: str, shape: tuple[int, ...] | None) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
        save_file(tensors, model / "model.safetensors")

    return apply


def cut_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
BAD_MODELS = {
    "architecture": (
        set_field("architectures", ["LlamaForCausalLM"]),
        "'LlamaForCausalLM' is none of",
    ),
    "missing": (set_tensor(UP, None), f"tensor {UP} is missing"),
    "extra": (set_tensor("model.extra", (3,)), "tensor model.extra is no part of this model"),
    "misshapen": (set_tensor(UP, (48, 31)), f"{UP} has shape [48, 31], config.json says [48, 32]"),
    "contradiction": (set_field("head_dim", 16), "config.json says"),
    "truncated": (cut_weights, "model.safetensors: not a readable safetensors file"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused_by_every_verb(name, chatty, run, tmp_path, capsys) -> None:
    """The error is one line naming the tensor, file or field, the exit code is 2, and nothing is
    written."""
    damage, said = BAD_MODELS[name]
    model, begun, out = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    shutil.copytree(chatty, model)
    damage(model)
    c = json.loads((run / "config.json").read_text())
    c["student"]["path"] = str(model)
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "config.json").write_text(json.dumps(c))
    asked = write(tmp_path / "asked.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    rows = write(tmp_path / "rows.jsonl", [{"tokens": [1]}])
    limit = "--max_new_tokens=4"
    calls: list[tuple[ModuleType, tuple[str, ...]]] = [
        (generate, (f"--model={model}", f"--prompts={rows}", f"--out={out}", limit)),
        (score, (f"--model={model}", f"--tokens={rows}", f"--out={out}")),
        (
            evaluate,
            (f"--model={model}", "--benchmark=gsm8k", f"--data={asked}", f"--out={out}", limit),
        ),
    ]
    if name == "architecture":  # an export does not read the student's weights
        calls.append((export, (f"--run={begun}", f"--out={out}")))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for verb, flags in calls:
        assert call(verb, *flags) == 2, verb
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ") and said in line and str(model) in line, (verb, line)
        assert captured.out == ""
        assert sorted(p.name for p in tmp_path.rglob("*")) == before, verb
    for role in ("student", "teacher"):
        run_config = base.get_config()
        run_config.student.path = run_config.teacher.path = str(chatty)
        run_config[role].path = str(model)
        run_config.opd.max_prompt_tokens, run_config.opd.max_response_tokens = 64, 8
        with pytest.raises(UserError) as error:
            loop.run(run_config, out)
        assert said in str(error.value) and str(model) in str(error.value)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before, role


def test_damaged_weights_are_named_in_the_error(bare, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bare[0], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    rows = write(tmp_path / "in.jsonl", [{"tokens": [1]}])
    out = tmp_path / "out.jsonl"
    assert call(score, f"--model={broken}", f"--tokens={rows}", f"--out={out}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{weights}: not a readable safetensors file" in line
    assert not out.exists()


def test_hub_downloads_exclude_pickles(chatty: Path, monkeypatch) -> None:
    requests = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        requests.append((repository, allow_patterns))
        return str(chatty)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert policy.resolve_model_dir("some-org/Qwen3-0.1B") == chatty
    assert policy.resolve_model_dir("some-org/Qwen3-0.1B") == chatty
    ((repository, patterns),) = requests
    assert repository == "some-org/Qwen3-0.1B"
    assert "*.safetensors" in patterns and not any("bin" in p for p in patterns)


def test_missing_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("runs/absent", "file", "/absent/model"):
        with pytest.raises(UserError, match=rf"^{name}: no model directory$"):
            policy.resolve_model_dir(name)


def test_a_run_with_a_missing_student_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"stages": ["opd"], "student": {"path": "./gone"}}')
    with pytest.raises(UserError, match=r"config.json: student.path: ./gone: no model directory"):
        policy.resolve_model_dir(tmp_path)


def test_inference_uses_all_devices(bare, chatty: Path) -> None:
    shapes = [
        dict(policy.get_mesh(policy.make_abstract_for_inference(str(p), "")).shape)
        for p in (bare[0], chatty)
    ]
    assert shapes == [
        {"data": 8, "fsdp": 1, "context": 1, "expert": 1, "tensor": 1},
        {"data": 1, "fsdp": 4, "context": 1, "expert": 1, "tensor": 2},
    ]


def test_verbs_run_as_commands(bare, run: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", [{"tokens": [1, 2]}])

    def verb(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"distill.{name}", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    shared = (f"--model={bare[0]}", f"--prompts={rows}", f"--out={tmp_path / 'samples.jsonl'}")
    done = verb("generate", *shared, "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    assert "generate 1/1" in done.stderr
    done = verb("export", f"--run={run}", f"--out={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr
    shared = (f"--model={bare[0]}", f"--tokens={rows}", f"--out={tmp_path / 'scores.jsonl'}")
    done = verb("score", *shared, "--top_k=1000")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "--top_k=1000" in done.stderr
    made = ["samples.jsonl", "samples.jsonl.about"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "in.jsonl", *made]
