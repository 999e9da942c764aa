"""Each recipe's tiny variant trains, and its full size passes every check that needs no weights."""

import functools
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import ablations, arguments, base, conditions
from distill.evaluation import tasks
from distill.runtime import mesh as mesh_lib
from distill.training import loop, setup
from tests.support.paths import ROOT
from tests.support.recipes import at_home, check_recipe, offline, parse_config, published  # noqa: F401  (fixtures)

# Recipe and argument -> its stages, and the slice of its docstring, as a topology.
RECIPES = {
    "strong_to_weak:student=8b,teacher=32b": (("sft", "opd"), "v5p:4x4x2"),
    "opd_math": (("sft", "opd"), "v5p:4x4x2"),
    "opd_math:lora=32": (("sft", "opd"), "v5p:4x4x2"),
    "opd_math:lora=128": (("sft", "opd"), "v5p:4x4x2"),
    **{f"conditions:{name}": (kinds, "v6e:2x4") for name, kinds in conditions.CONDITIONS.items()},
    "recall": (("knowledge", "recall"), "v6e:4x4"),
    "manual:sft": (("sft",), "v5e:2x2"),
    "manual:opd": (("opd",), "v5e:2x2"),
    "one_prompt": (("opd",), "v5p:2x2x2"),
    "colab": (("opd",), "v5e:1x1"),
    "gsm8k": (("opd",), "v5e:2x4"),
}
# One more size, with experts; tests/long has all.
SIZES = {"strong_to_weak:student=30b-a3b,teacher=235b-a22b": "v5p:4x4x4"}
NAMES = {"v5p:4x4x2": "v5p-64", "v5p:4x4x4": "v5p-128", "v6e:2x4": "v6e-8", "v6e:4x4": "v6e-16"}
NAMES |= {"v5e:2x2": "v5e-4", "v5e:2x4": "v5e-8", "v5p:2x2x2": "v5p-16", "v5e:1x1": "v5e-1"}


def make_tiny_flag(recipe: str) -> str:
    """Returns the flag of the recipe's tiny variant."""
    file, _, argument = recipe.partition(":")
    return f"--config=configs/{file}.py:{','.join(w for w in (argument, 'tiny') if w)}"


# The first differs in its rank only; end_to_end/test_notebook.py trains the second, and
# end_to_end/test_docs.py the third.
ALIKE = ("opd_math:lora=128", "colab", "gsm8k")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=pytest.mark.long) if r in ALIKE else r for r in RECIPES],
)
def test_tiny_variant_trains_every_stage(recipe: str, tmp_path: Path) -> None:
    loop.run(parse_config(make_tiny_flag(recipe), "--config.log.transcripts=1"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    stages = RECIPES[recipe][0]
    assert [row["stage"] for row in rows] == [name for name in stages for _ in range(2)]
    for row in rows:
        assert row["train/loss"] is not None and row["data/skipped"] == 0
        # Groups of equal rewards have no gradient, and the student knows no boxed answers.
        assert row["train/grad_norm"] > 0 or "reward/mean" in row


def test_docstrings_name_command_hardware_cost_and_result() -> None:
    for recipe, (_, topology) in RECIPES.items():
        doc = importlib.import_module(f"configs.{recipe.partition(':')[0]}").__doc__
        assert doc is not None and NAMES[topology] in doc
        assert f"python -m distill.train --config=configs/{recipe.partition(':')[0]}.py" in doc
        for part in ("Hardware: ", "Time and cost: ", "Expected", "not yet measured", "tiny"):
            assert part in doc, (recipe, part)


# Full size


@pytest.mark.parametrize("recipe", [*RECIPES, *SIZES])
@pytest.mark.usefixtures("offline")
def test_full_size_passes_all_checks(
    recipe: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_recipe(recipe, SIZES.get(recipe) or RECIPES[recipe][1], shared_data, monkeypatch)


# Arguments


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("strong_to_weak.py:student=9b", "student=8b|0.6b|1.7b|4b|14b|30b-a3b, teacher=32b"),
        ("strong_to_weak.py:8b,8b", "not a second '8b'"),
        ("conditions.py:sft", "condition=baseline|sft_traces|"),
        ("opd_math.py:rank=32", "takes lora=full|32|128, tiny, not 'rank=32'"),
        ("recall.py:big", "configs/recall.py takes tiny, not 'big'"),
        ("quickstart.py:big", "configs/quickstart.py takes tiny, not 'big'"),
    ],
)
def test_wrong_argument_is_refused_with_the_known_ones(flag: str, words: str) -> None:
    file, _, argument = flag.partition(".py:")
    with pytest.raises(ValueError, match=rf"^configs/{file}\.py takes ") as error:
        importlib.import_module(f"configs.{file}").get_config(argument)
    assert words in str(error.value)


def test_wrong_argument_exits_with_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill.train", "--config=configs/recall.py:big", "--workdir=x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("configs/recall.py takes tiny, not 'big'\n")


def test_arguments_take_defaults_names_and_any_order() -> None:
    parse = functools.partial(arguments.parse_argument, "x", size=("a", "b"), other=("b", "c"))
    assert vars(parse("")) == {"size": "a", "other": "b", "tiny": False}
    assert vars(parse("c,tiny")) == {"size": "a", "other": "c", "tiny": True}
    assert vars(parse("other=b,size=b")) == {"size": "b", "other": "b", "tiny": False}
    for bad in ("b", "size=c", "d", "tiny,tiny", "size", "=a", ",", "size=", "tiny=1"):
        with pytest.raises(ValueError, match=r"configs/x\.py takes size=a\|b, other=b\|c, tiny"):
            parse(bad)


def test_recipes_put_questions_as_the_benchmarks_do() -> None:
    assert tasks.BENCHMARKS["gsm8k"].prompt == base.BOXED_TEMPLATE


# Studies


@pytest.mark.parametrize("study", ablations.STUDIES)
def test_runs_of_a_study_differ_and_pass_setup(study: str) -> None:
    commands = [shlex.split(line) for line in ablations.list_commands(study, tiny=True)]
    workdirs = [words[4] for words in commands]
    assert len(set(workdirs)) == len(commands) > 1
    configs = set()
    for words, full in zip(commands, ablations.list_commands(study, tiny=False), strict=True):
        assert words[:3] == ["python", "-m", "distill.train"]
        assert words.pop(4).startswith(f"--workdir=runs/{study}/")
        long = shlex.split(full)[3:]
        c = parse_config(*words[3:])
        configs |= {c.to_json_best_effort(), parse_config(long[0], *long[2:]).to_json_best_effort()}
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
    assert len(configs) >= len(commands) + 1  # each run differs


def test_command_line_of_ablations(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, code, out in (
        ([], 0, "divergence"),
        (["rank"], 0, "opd_math.py:lora=32 --workdir=runs/rank/lora_32\n"),
        (["rank", "tiny"], 0, "opd_math.py:lora=32,tiny "),
        (["ranks"], 2, "error: configs/ablations.py takes conditions|"),
        (["rank", "big"], 2, "error: "),
    ):
        monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
        try:
            ablations.main()
            assert code == 0
        except SystemExit as stop:
            assert stop.code == code
        output = capsys.readouterr()
        assert out in (output.err if code else output.out)
