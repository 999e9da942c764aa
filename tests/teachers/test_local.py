"""Tests several teachers, teachers from the student's past, and teachers with extra context."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs import base, quickstart
from distill.data import chat, examples, teacher_context
from distill.objectives import divergences
from distill.policy import exporting, policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import collect, loop, setup
from models.errors import UserError
from tests.support.heads import token_stats
from tests.support.paths import ROOT
from tests.support.updates import sequences_of

STUDENT, TEACHER = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
HINT = "Note: add from left to right."


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Writes two question files with extra context for a teacher, and a text for all rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, start in (("a", 0), ("b", 50)):
        rows = [
            {
                "question": f"Start with {start + i}. Add {i}.",
                "answer": str(start + 2 * i),
                "response": f"It is {start + 2 * i}.",
                "manual": " ".join([HINT] * 20),
                "solution": f"The answer is {start + 2 * i}." if i % 4 else "",
            }
            for i in range(8)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hint.txt").write_text(HINT + "\n")
    return folder


def config(files: Path, objective: str = "opd", **changes) -> ConfigDict:
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = STUDENT, TEACHER
    c.mesh.fsdp, c.log.transcripts = 1, 0
    c.past, c.origin = base.make_teacher(), base.make_teacher()
    c.past.path, c.origin.path = "ema", "initial"
    c.past.dtype = c.origin.dtype = c.origin.param_dtype = "float32"
    s = c.opd
    s.objective, s.steps, s.batch_size, s.samples = objective, 2, 8, 2
    s.max_response_tokens = 12
    s.data.source, s.context.max_tokens = str(files / "a.jsonl"), 40
    for name, value in changes.items():
        *groups, field = name.split("__")
        group_config = s
        for group in groups:
            group_config = group_config[group]
        group_config[field] = value
    return c


def collect_first_step(c: ConfigDict, mesh=None):
    """Returns the sequences of the first step, scored by the teachers, and the step's metrics."""
    mesh = mesh or mesh_lib.make_mesh(1, 1, 1)
    plan = setup.setup_run(c, mesh)
    with policy.use(plan.student), graders.Grader() as grader:
        plan = setup.load_lora_base(c, plan)
        plan = setup.load_stage_models(c, plan, plan.stages[0])
        params = policy.load(plan.student, "float32").params
        collector = collect.make_collector(c, plan, plan.stages[0], mesh, grader)
        work, measured = loop.collect_step(collector, params, 0, params)
        teachers = local.place_heads([plan.teachers[name] for name in c.opd.teachers])
        score = lambda micro: local.score(teachers, micro.to_device(mesh), params)  # noqa: E731
        return sequences_of(work, score), measured


def map_prompts(files: Path, placed) -> dict[tuple[int, ...], list[int]]:
    """Maps the student's prompt to the teacher's, both rendered by transformers."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(TEACHER), {}
    for line in (files / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages_asked = [{"role": "user", "content": row["question"]}]
        ids = [
            tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                enable_thinking=True,
                return_dict=False,
                tokenize=True,
            )
            for messages in (messages_asked, placed(row, messages_asked))
        ]
        prompts[tuple(ids[0])] = ids[1]
    return prompts


def in_system(row: dict, messages: list[dict]) -> list[dict]:
    text = f"{HINT}\n\n{row['solution']}".strip()
    return [{"role": "system", "content": text}, *messages]


def before_question(row: dict, messages: list[dict]) -> list[dict]:
    if not row["solution"]:
        return messages
    return [{"role": "user", "content": f"{row['solution']}\n\n{messages[0]['content']}"}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is it?", "solution": "It is 3."},
        {"question": "What is it?", "response": "It is 3."},
        {"messages": [{"role": "user", "content": "What is it?"}], "response": "It is 3."},
        {"prompt": "What is it?", "response": "It is 3."},
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "What is it?"},
                {"role": "assistant", "content": "It is 3."},
            ]
        },
    ],
)
@pytest.mark.parametrize("place", teacher_context.PLACEMENTS)
def test_every_row_format_accepts_a_context(row, place):
    tokenizer = chat.load_tokenizer(TEACHER)
    assert tokenizer

    encoding = examples.Encoding(tokenizer)
    example = examples.make_example(row, "here", encoding)
    context = teacher_context.TeacherContext(HINT, "", place)
    with_context = teacher_context.add_context(context, row, example, encoding)
    assert (
        example.teacher_prompt is None
        and with_context.response == example.response
        and with_context.teacher_prompt
    )
    text = str(tokenizer.decode(with_context.teacher_prompt))
    assert text.count(HINT) == 1
    parts = [part for part in ("Be short.", "What is it?") if part in text]
    assert text.index(HINT) < text.index(parts[-1 if place == "question" else 0])
    assert text.replace(HINT, "").endswith(str(tokenizer.decode(example.prompt))[-30:])
    # A generated sample has its prompt as tokens, beside the row that it answers.
    if "response" not in row and "messages" in row:
        row = {"messages": row["messages"][:-1]}
    sample = {"tokens": example.prompt, "response_tokens": example.response, "source_row": row}
    again = teacher_context.add_context(context, sample, example, encoding)
    assert again.teacher_prompt == with_context.teacher_prompt
    # Rows with only tokens accept only tokens.
    bare = {"tokens": example.prompt, "response_tokens": example.response, "more": [7, 8]}
    alone = teacher_context.add_context(
        teacher_context.TeacherContext("", "more", place), bare, example, examples.Encoding(None)
    )
    assert alone.teacher_prompt == [7, 8, *example.prompt]
    with pytest.raises(UserError, match="takes its context as token ids"):
        teacher_context.add_context(context, bare, example, encoding)


def own_rows(rows):
    """Returns (prompt, response, positions of the response) of each sequence."""
    for row in rows:
        positions = np.flatnonzero(row.mask_BT)
        yield (
            tuple(row.tokens_BT[: positions[0]].tolist()),
            row.tokens_BT[positions].tolist(),
            positions,
        )


def test_teacher_scores_the_response_after_its_own_prompt(files):
    """Compares own samples and traces, packed together, with transformers."""
    hint = str(files / "hint.txt")
    c = config(files, "gkd", context__column="solution", context__text=hint, pack_tokens=200)
    prompts = map_prompts(files, in_system)
    network = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    rows, _ = collect_first_step(c)
    assert any(row.segments_BT[0] > 1 for row in rows)
    seen = 0
    for row, (prompt, response, positions) in zip(rows, own_rows(rows), strict=True):
        (hidden,) = row.teacher.hidden_BTE
        whole = prompts[prompt] + response
        with torch.no_grad():
            out = network(torch.tensor([whole]), output_hidden_states=True).hidden_states[-1][0]
        # From the last prompt token on, since it predicts the first response token.
        theirs = out[len(prompts[prompt]) - 1 : -1].numpy()
        np.testing.assert_allclose(hidden[positions - 1], theirs, atol=1e-4)
        seen += 1
    assert seen == 8


def test_an_empty_context_leaves_teacher_states_unchanged(files):
    """For rows with an empty column, the teacher reads what it reads without a context."""
    with_context, _ = collect_first_step(
        config(files, context__column="solution", context__place="question", batch_size=16)
    )
    plain, _ = collect_first_step(config(files, batch_size=16))
    prompts, num_equal = map_prompts(files, before_question), 0
    for contextual, reference, (prompt, _, positions) in zip(
        with_context, plain, own_rows(plain), strict=True
    ):
        (ours,), (theirs,) = contextual.teacher.hidden_BTE, reference.teacher.hidden_BTE
        equal = np.allclose(ours[positions - 1], theirs[positions - 1], atol=1e-5)
        assert equal == (prompts[prompt] == list(prompt))
        num_equal += equal
    assert num_equal == 4  # two of the eight rows have no solution


def test_the_teacher_logprob_reward_reads_the_context(files):
    c = config(
        files, "grpo", reward__teacher_logprob=1.0, reward__correct=0.0, context__column="solution"
    )
    c.opd.context.place = "question"
    rows, measured = collect_first_step(c)
    network = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    prompts, expected = map_prompts(files, before_question), []
    for prompt, response, _ in own_rows(rows):
        whole = torch.tensor([prompts[prompt] + response])
        with torch.no_grad():
            logp = network(whole).logits[0].log_softmax(-1)[len(prompts[prompt]) - 1 : -1]
        expected.append(float(logp[range(len(response)), response].mean()))
    assert measured["reward/teacher_logprob"] == pytest.approx(np.mean(expected), abs=1e-4)
    advantages = np.array([row.advantages_BT[-1] for row in rows]).reshape(-1, 2)
    better = np.diff(expected)[::2]
    assert (np.sign(np.diff(advantages)[:, 0]) == np.sign(better))[np.abs(better) > 1e-3].all()


def test_rows_are_routed_by_their_source(files):
    mixture = ((str(files / "a.jsonl"), 1.0), (str(files / "b.jsonl"), 1.0))
    c = config(files, data__mixture=mixture, teachers=("teacher", "origin"), batch_size=16)
    rows, _ = collect_first_step(c)
    by_source, seen = map_prompts(files, in_system), set()
    for row, (prompt, _, _) in zip(rows, own_rows(rows), strict=True):
        first = prompt in by_source
        assert (row.teacher.weight_BTN == [first, not first]).all()
        seen.add(first)
    assert seen == {True, False}


@pytest.mark.parametrize("estimator", ["exact", "topk"])
def test_a_mixture_averages_probabilities(estimator):
    """Log-probabilities, divergence and gradient are those of Σ share·q; a share of 1 is bitwise
    that teacher."""
    B, T, V = 2, 5, 11

    def by_row(share):
        return jnp.broadcast_to(jnp.array(share)[:, None], (B, T, 2))

    keys = jax.random.split(jax.random.key(0), 7)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape)  # noqa: E731
    hidden, targets = draw(0, B, T, 4), jax.random.randint(keys[1], (B, T), 0, V)
    teachers = (draw(2, B, T, 3), draw(3, B, T, 6))
    heads = (draw(4, V, 3), draw(5, V, 6))
    form = divergences.Divergence(k=3 if estimator == "topk" else 0)

    def total(own, hidden_BTE, heads_VE, share):
        stats = token_stats(
            hidden, own, targets, hidden_BTE, heads_VE, loss_chunk_mib=1e-3, divergence=form,
            teacher_weight_BTN=share,
        )  # fmt: skip
        return jnp.sum(stats["divergence"]), stats

    run = jax.value_and_grad(total, has_aux=True)
    own, share = draw(6, V, 4), by_row([[0.25, 0.75], [0.6, 0.4]])
    (value, stats), grad = run(own, teachers, heads, share)
    each = [jax.nn.softmax(x @ w.T) for x, w in zip(teachers, heads, strict=True)]
    mixed = jnp.log(share[..., :1] * each[0] + share[..., 1:] * each[1])
    # A teacher whose hidden states are the mixture's logits and whose head is the identity.
    (expected, theirs), slope = run(own, mixed, jnp.eye(V), None)
    assert value == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(grad, slope, atol=1e-5)
    for name in ("teacher_logp", "teacher_entropy", "reverse_kl"):
        np.testing.assert_allclose(stats[name], theirs[name], atol=1e-5)
    (_, routed), slope = run(own, teachers, heads, by_row([[1.0, 0.0], [0.0, 1.0]]))
    assert np.isfinite(slope).all()
    for row in range(B):
        alone = run(own, teachers[row], heads[row], None)[0][1]
        for name, x in routed.items():
            np.testing.assert_array_equal(x[row], alone[name][row])


def past(files: Path, rank: int, context: bool) -> ConfigDict:
    """Configures the student's initial weights and its moving average as joint teachers."""
    c = config(files, teachers=("origin", "past"), teacher_weights=(1, 3), steps=3, accumulate=2)
    c.student.ema_decay, c.student.lora.rank = 0.5, rank
    c.checkpoint.every, c.checkpoint.keep = 1, 3
    c.opd.optim.learning_rate = 1e-2
    if context:
        c.opd.context.text = str(files / "hint.txt")
    return c


@pytest.mark.parametrize(
    ("rank", "sizes"),
    [
        (0, (1, 1)),
        pytest.param(4, (2, 4), marks=pytest.mark.long),
    ],
)
def test_moving_average_teacher_is_updated_and_resumed(rank, sizes, files, tmp_path):
    c = past(files, rank, context=rank > 0)
    c.opd.batch_size, c.opd.accumulate = 16, 1 if rank else 2
    c.mesh.fsdp, c.mesh.tensor = sizes[0], 1
    c.mesh.data = sizes[1]
    loop.run(c, tmp_path / "run")
    described = policy.make_abstract_for_inference(str(tmp_path / "run"), "float32")

    def restore(step: int, average: bool):
        actual, _ = policy.restore_trained_params(described, step, average)
        return jax.tree.map(np.asarray, actual)

    for step in (2, 3):
        expected = jax.tree.map(
            lambda a, p: a + 0.5 * (p - a), restore(step - 1, True), restore(step, False)
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), restore(step, True), expected
        )
    whole = restore(3, True), restore(3, False)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/3")
    loop.run(c, tmp_path / "again")
    described = policy.make_abstract_for_inference(str(tmp_path / "again"), "float32")
    jax.tree.map(np.testing.assert_array_equal, whole, (restore(3, True), restore(3, False)))
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    if not rank:
        # Before the first update, both teachers equal the student.
        assert abs(rows[0]["train/divergence"]) < 1e-5 < rows[2]["train/divergence"]
        exporting.export_run(tmp_path / "run", tmp_path / "out", average=True)
        loaded = policy.load(
            policy.make_abstract_for_inference(str(tmp_path / "out"), "float32"), "float32"
        ).params
        np.testing.assert_array_equal(np.asarray(loaded["embed"]), whole[0]["embed"])


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("opd", {"teachers": ()}, "teachers: opd needs a teacher"),
        ("opd", {"teachers": ("judge",)}, "config.opd.teachers: 'judge' is not a teacher"),
        ("opd", {"teachers": ("student",)}, "'student' is not a teacher"),
        ("opd", {"teachers": ("teacher", "teacher")}, "'teacher' is named twice"),
        ("opd", {"teachers": ("teacher", "origin")}, "which names 0"),
        ("opd", {"teacher_weights": (1.0, 2.0)}, r"2 for the 1 of teachers=\('teacher',\)"),
        ("opd", {"teacher_weights": (-1.0,)}, "must be above 0 and finite"),
        ("opd", {"teachers": ("past",)}, "config.past.path=ema: no moving average is kept"),
        ("sft", {"teacher_weights": (1.0,)}, "teacher_weights: sft has no teacher"),
        ("grpo", {"context__column": "solution"}, "context: grpo has no teacher to read it"),
        (
            "distill",
            {
                "loss__teacher_output": "top",
                "loss__teacher_topk": 4,
                "loss__estimator": "topk",
                "loss__k": 4,
            },
            "a.jsonl:1: no top_logprobs beside its tokens",
        ),
        ("opd", {"context__text": "nowhere.md"}, "config.opd.context.text=nowhere.md: cannot be"),
        ("opd", {"context__column": "proof"}, "a.jsonl:1: no proof among its columns"),
        (
            "opd",
            {"context__column": "solution", "context__place": "end"},
            "context.place=.end.: must be one of",
        ),
        ("opd", {"context__column": "manual", "context__max_tokens": 1}, "allow 61 together"),
        (
            "opd",
            {"context__column": "solution", "context__max_tokens": 10**6},
            "max_response_tokens . context.max_tokens = 1000072 exceeds the model's",
        ),
        (
            "distill",
            {"context__column": "solution", "pack_tokens": 200},
            "config.opd.pack_tokens: a context makes",
        ),
    ],
)
def test_impossible_teachers_are_refused(objective, changes, words, files, monkeypatch):
    monkeypatch.setattr(policy, "load", None)  # before any weight is read
    with pytest.raises(UserError, match=words):
        setup.setup_run(config(files, objective, **changes), mesh_lib.make_mesh(1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.ema_decay": 1.0}, "config.student.ema_decay=1.0: must be at least 0"),
        ({"student.ema_decay": -0.1}, "config.student.ema_decay=-0.1"),
        ({"student.random_init": True}, "config.origin.path=initial: random weights are not"),
        ({"origin.path": TEACHER, "origin.step": 3}, "config.origin.step=3: .* is no run"),
        ({"origin.dtype": "int8"}, "config.origin.dtype='int8'"),
    ],
)
def test_impossible_past_teachers_are_refused(changes, words, files):
    c = config(files, teachers=("origin",))
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
