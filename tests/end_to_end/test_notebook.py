"""Runs every cell of the notebook, tiny and on a CPU; checks its form and that a second "Run all"
repeats nothing."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from configs import colab
from distill import compare, export
from distill.evaluation.problems import load_problems
from tests.support.paths import ROOT
from tests.support.verbs import verb_module

evaluate = verb_module("evaluate")
train = verb_module("train")

FILE = ROOT / "notebooks" / "colab_tpu.ipynb"
VERBS = {"evaluate": evaluate, "train": train, "compare": compare, "export": export}
# An extra last cell: prints its Python and what that imported, and shows that a program's failure
# fails the cell.
PROBE = """
print(sys.executable, sorted({"jax", "numpy", "distill"} & set(sys.modules)))
try:
    run(PYTHON, "-c", "print('gone wrong'); raise SystemExit(3)")
except RuntimeError as error:
    print(error)
"""


def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def code(nb: Any) -> list[Any]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def execute(folder: Path, directory: Path = FILE.parent, **parameters: object) -> Any:
    """Runs the notebook in `directory` with these parameters, in a kernel of this Python, and
    returns it with its outputs. Raises CellExecutionError at the first cell that fails."""
    nb = notebook()
    index = next(
        i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    lines = "".join(f"{name} = {value!r}\n" for name, value in parameters.items())
    nb.cells.insert(index + 1, nbformat.v4.new_code_cell(lines))
    nb.cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / "jupyter"))  # neither read nor write the user's files
        where = {"metadata": {"path": str(directory)}}
        NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()
    return nb


def printed(nb: Any, name: str) -> str:
    """Returns the printed output of the cell with this id."""
    cell = next(cell for cell in nb.cells if cell.get("id") == name)
    return "".join(output.get("text", "") for output in cell.outputs)


def shown(nb: Any, kind: str) -> list[str]:
    """Returns the outputs that cells displayed with this MIME type."""
    outputs = [output for cell in code(nb) for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Returns the executed notebook and the folder of its run."""
    folder = tmp_path_factory.mktemp("notebook")
    return execute(folder, TINY=True, KEEP="local", RUN=str(folder / "run")), folder / "run_tiny"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def problems(limit: int) -> list[tuple[str, dict[str, Any]]]:
    return load_problems("arithmetic", "", limit)


def test_every_cell_runs(done: tuple[Any, Path]) -> None:
    nb, out = done
    assert all(cell.execution_count for cell in code(nb))
    assert str(out) in printed(nb, "place")
    assert "assets/rows/gsm8k.jsonl: 12 prompts" in printed(nb, "chip")
    steps = rows(out / "metrics.jsonl")
    assert [row["step"] for row in steps] == [0, 1]
    (table,), (picture,) = shown(nb, "text/markdown"), shown(nb, "image/png")
    for row in steps:
        text = f"| {row['step'] + 1} | {row['train/reverse_kl']:.4f} | {row['eval/accuracy']:.1%} |"
        assert text in table
    assert len(picture) > 10_000 and (out / "curves.png").is_file()
    before, after = (
        json.loads((out / f"{when}/summary.json").read_text()) for when in ("before", "after")
    )
    assert before["problems"] == after["problems"] == 16 and before["accuracy"] > 0
    assert after["accuracy"] == steps[-1]["eval/accuracy"]  # the same problems
    for evaluation in (before, after):
        assert f"{100 * evaluation['accuracy']:.1f} [" in printed(nb, "after")
    assert {"adapter", "model.safetensors", "tokenizer.json"} <= set(printed(nb, "export").split())
    text = printed(nb, "transcript")
    pairs = zip(*(rows(out / when / "examples.jsonl") for when in ("before", "after")), strict=True)
    prompts = [f"<|im_start|>user\n{row['question']}<|im_end|>" for _, row in problems(16)]
    assert any(  # a question with its two answers
        question in text and all(row["response"] in text for row in pair)
        for question, pair in zip(prompts, pairs, strict=True)
    )


def test_kernel_imports_no_jax_and_shows_failures(done: tuple[Any, Path]) -> None:
    """The kernel imports nothing that the installation replaces, and leaves the chip to
    programs."""
    text = printed(done[0], "probe").splitlines()
    assert text[0] == f"{sys.executable} []"
    assert text[1] == "gone wrong" and text[2].startswith("exit code 3, see above: ")


@pytest.mark.long
def test_second_run_all_repeats_nothing(done: tuple[Any, Path]) -> None:
    nb, out = done

    def read_files() -> dict[str, tuple[bytes, int]]:
        files = [
            out / "metrics.jsonl",
            *out.glob("*/examples.jsonl"),
            *out.glob("eval/*/*.jsonl"),
        ]
        files += [*out.glob("checkpoints/*/commit_success.txt"), *out.glob("student/*.json")]
        return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    before = read_files()
    assert len(before) > 8
    again = execute(out.parent, TINY=True, KEEP="local", RUN=str(out).removesuffix("_tiny"))
    assert {name: content for name, (content, _) in read_files().items()} == {
        name: content for name, (content, _) in before.items()
    }
    for name in before:
        if "checkpoints" in name or "student" in name:
            assert read_files()[name] == before[name], name
    assert "step 0: compiled" in printed(nb, "train")
    text = printed(again, "train")
    assert "all of its 2 steps are done" in text and "compiled" not in text
    for name in ("curves", "transcript"):
        assert printed(again, name) == printed(nb, name)


def test_failing_cell_fails_the_notebook(tmp_path: Path) -> None:
    """Runs outside a checkout, without REPOSITORY."""
    with pytest.raises(CellExecutionError, match="set REPOSITORY to this project's address"):
        execute(tmp_path, directory=tmp_path, TINY=True)


def test_committed_notebook_has_no_outputs_and_its_metadata() -> None:
    nb = notebook()
    nbformat.validate(nb)
    assert nb.metadata.accelerator == "TPU" and nb.metadata.colab.gpuType == "V5E1"
    assert nb.metadata.kernelspec.name == "python3" and nb.metadata.language_info.name == "python"
    assert [cell.id for cell in code(nb) if cell.metadata.get("tags")] == ["parameters"]
    assert code(nb)[0].metadata.tags == ["parameters"]
    parameters = {t.id for t in ast.walk(ast.parse(code(nb)[0].source)) if isinstance(t, ast.Name)}
    assert parameters == {"REPOSITORY", "KEEP", "RUN", "PROBLEMS", "TINY"}
    for cell in code(nb):
        assert not cell.outputs and cell.execution_count is None, cell.id
        paths = re.findall(r"""["'](/\w[^"']*)""", cell.source)
        assert all(path.startswith("/content/drive") for path in paths), paths
    assert "colab.research.google.com" in nb.cells[0].source
    assert not re.findall(r"github\.com/(?!OWNER/NAME)\w", FILE.read_text())  # no fixed repository


def flags(nb: Any) -> Iterator[tuple[str, str]]:
    """Yields (verb, flag) of every command in the cells, with names replaced by their values."""
    nodes = [node for cell in code(nb) for node in ast.walk(ast.parse(cell.source))]
    named = {ast.unparse(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
    for node in nodes:
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "run"):
            continue
        words: list[ast.expr] = []
        for part in node.args:
            whole = named[ast.unparse(part.value)] if isinstance(part, ast.Starred) else part
            words += whole.elts if isinstance(whole, ast.Tuple) else [whole]
        texts = [ast.unparse(word).removeprefix("f").strip("'\"") for word in words]
        for verb in [t.removeprefix("distill.") for t in texts if t.startswith("distill.")]:
            yield from ((verb, text) for text in texts if text.startswith("--"))


def test_flags_of_commands_in_cells_exist() -> None:
    commands = list(flags(notebook()))
    assert {verb for verb, _ in commands} == set(VERBS) and len(commands) > 15
    for verb, text in commands:
        name = text.removeprefix("--").partition("=")[0]
        assert name in VERBS[verb].OPTIONS, (verb, text)


def test_config_keys_in_prose_exist_for_train() -> None:
    named = re.findall(r"--config\.([\w.]+)=", FILE.read_text())
    assert named
    for path in named:
        node = colab.get_config()
        for key in path.split("."):
            assert key in node, path
            node = node[key]


def test_full_size_runs_the_same_cells() -> None:
    """TINY only chooses values; no cell branches on it."""
    for cell in code(notebook()):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.If):
                assert "TINY" not in ast.unparse(node.test), cell.id
