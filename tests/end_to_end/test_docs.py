"""Checks README and docs/*.md: what they name exists, links resolve, and commands run."""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from distill.teachers import remote
from tests.support import serving
from tests.support.pages import (
    GUIDES,
    PAGES,
    find_blocks,
    find_files,
    find_spans,
    make_anchors,
    name_page,
    split_lines,
)
from tests.support.paths import ROOT
from tests.support.runs import numbers, tiny_model
from tests.support.verbs import call, verb_module

NAMED_PAGES = [pytest.param(page, id=name_page(page)) for page in PAGES]

# Links


RECORDS = [ROOT / "LOG.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [*NAMED_PAGES, *(pytest.param(page, id=name_page(page)) for page in RECORDS)]
)
def test_links_and_images_resolve(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_page(page)}: {target}"
        assert not anchor or anchor in make_anchors(file.read_text()), target


def test_readme_links_to_every_page_and_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    for page in PAGES[1:]:
        assert f"]({name_page(page)})" in text, page


def test_readme_lists_the_verbs() -> None:
    verbs = {
        file.stem for file in (ROOT / "distill").glob("*.py") if "cli.run(main" in file.read_text()
    }
    section = (ROOT / "README.md").read_text().partition("\n## The verbs\n")[2]
    table = section.partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == verbs


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in GUIDES])
def test_a_page_begins_with_its_use_and_a_command(page: Path) -> None:
    text = page.read_text()
    assert re.match(r"# .+\n\nAfter this page you can ", text)
    assert re.search(r"^```(bash|python)\n", text.partition("\n## ")[0], re.MULTILINE)


# Names in the prose


@functools.cache
def read_sources() -> str:
    """Returns everything that may define a name: code, configs, launcher and notebook; of tests
    their paths and what they define."""
    code = ("assets", "benchmarks", "configs", "distill", "models")
    files = [file for folder in code for file in (ROOT / folder).rglob("*.py")]
    for pattern in ("*.sh", "Makefile", "requirements*.txt", "notebooks/*.ipynb", "*.toml"):
        files += ROOT.glob(pattern)
    texts = [file.read_text() for file in files]
    texts += [name for page in PAGES for name, _ in find_files(page.read_text())]
    for file in (ROOT / "tests").rglob("*.py"):
        texts.append(str(file.relative_to(ROOT)))
        texts += re.findall(r"^(?:def |class )?\w+(?=[(:]| =)", file.read_text(), re.MULTILINE)
    return "\n".join(texts)


@functools.cache
def list_words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", read_sources()))


def flatten(c: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in c:
        yield f"{prefix}{name}"
        if isinstance(c[name], ConfigDict):
            yield from flatten(c[name], f"{prefix}{name}.")


@functools.cache
def list_keys() -> frozenset[str]:
    """Returns all keys of a config, each with every ending that prose may use for it."""
    keys = set(flatten(base.get_config()))
    return frozenset(key.split(".", i)[-1] for key in keys for i in range(key.count(".") + 1))


@functools.cache
def list_flags() -> frozenset[str]:
    flags = set(re.findall(r"^ +--([\w-]+)=?\*?\) ", (ROOT / "launch_tpu.sh").read_text(), re.M))
    verbs = [f"distill.{file.stem}" for file in (ROOT / "distill").glob("*.py")]
    for verb in (*verbs, "benchmarks.gpu", "studies.run", "studies.tasks"):
        flags |= set(getattr(importlib.import_module(verb), "OPTIONS", ()))
    return frozenset({name for name in flags if not name.startswith("config.")})


# Names that belong to others, and those that a reader of CONTRIBUTING is to replace or to add.
FOREIGN = ("sbatch --requeue", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92", "pypi.org", "-s osv")
FOREIGN += ("--max-logprobs", "--max-num-batched-tokens", "OPENAI_API_KEY", "response_format")
FOREIGN += ("pip install --require-hashes -r requirements-lock.txt", "mlflow.db")
TEMPLATE = re.compile(r"NAME|FILE|/X/|olympiad|opd_jsd")


def find_fault(span: str) -> str:
    """Returns what is wrong with a code span; "" if all that it names exists."""
    if span in FOREIGN or TEMPLATE.search(span):
        return ""
    for name in re.findall(r"(?<![\w-])--([\w.-]+)", span):
        if name.startswith("config."):
            if name.removeprefix("config.").replace("STAGE", "opd") not in list_keys():
                return f"--{name}: no such key"
        elif name != "config" and name not in list_flags():
            return f"--{name}: no such flag"
    key = re.fullmatch(r"(?:config\.|c\.)?([a-z]\w*(?:\.[a-z]\w*)*)(?:=.*)?", span)
    if "." in span.partition("=")[0] and key and not _is_key_or_symbol(key[1]):
        return f"{key[1]}: neither a key nor a file nor a name in the code"
    ours = re.match(r"(?:assets|benchmarks|configs|distill|docs|models|tests)/[\w./]+", span)
    if ours:
        return "" if (ROOT / ours[0]).exists() else f"{ours[0]}: no such file"
    for word in re.findall(r"[A-Za-z_]\w{2,}", span):
        if word not in list_words():
            return f"{word}: the code does not know it"
    return ""


def _is_key_or_symbol(name: str) -> bool:
    if name.replace("STAGE.", "") in list_keys():
        return True
    last = name.rpartition(".")[2]
    if last in ("py", "md", "json", "jsonl", "parquet", "safetensors", "txt", "sh"):
        return name in read_sources() or bool(list(ROOT.glob(f"**/{name}")))
    return bool(re.search(rf"^\s*(?:def |class )?{last}\b\s*[(:=]", read_sources(), re.MULTILINE))


@pytest.mark.parametrize("page", NAMED_PAGES)
def test_code_spans_name_what_exists(page: Path) -> None:
    faults = {span: find_fault(span) for span in find_spans(page.read_text())}
    assert not {span: fault for span, fault in faults.items() if fault}


@pytest.mark.parametrize(
    "span",
    [
        "--workdri",
        "--config.opd.stesp=4",
        "python -m distill.trian",
        "opd.stesp",
        "data.colums=question=input",
        "distill/training/looop.py",
        "metrics.jsonll",
        "train/reverse_kll",
        "WANDB_API_KEYS",
        "qwen3-thinkking",
    ],
)
def test_names_that_do_not_exist_are_found(span: str) -> None:
    assert find_fault(span)


# Figures


def test_readme_has_the_table_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    results = (ROOT / "benchmarks/results/quickstart.md").read_text()
    table = results[results.index("| |") :]
    assert table.count("\n") >= 5 and table in readme


# Commands

# Commands of README and docs/ that the tests below do not run: a pattern, and why. The flags, keys
# and files of all are checked in test_commands.py.
NOT_RUN = {
    r"Qwen/|hf:|configs/gsm8k\.py": "read models or data of the hub",
    r"runs/gsm8k|samples\.jsonl|traces\.jsonl": "need what these made",
    r"^pip |^python3 -m venv": "install packages",
    r"log\.to=|^tensorboard|^trackio|^mlflow": "need packages that the project does not install",
    r"launch_tpu\.sh|gcloud|ACCELERATOR=": "need Google Cloud",
    r"import jax|benchmarks\.gpu": "need a GPU",
    r"distill\.serve|^vllm |http://": "serve until they are stopped, or ask such a server",
    r"^make quickstart": "takes minutes; test_quickstart.py runs it, tiny",
    r"assets/make_tokenizer|tiny_teacher|tiny_student": "made the models that are committed",
    r"ablations\.py|for rate in": "are studies, whose runs test_recipes.py checks",
    r"reproduce\.py": "prints commands, which test_reproduce.py checks, or takes minutes",
}


def find_commands() -> Iterator[tuple[str, str]]:
    """Yields the lines of the bash blocks of README and docs/."""
    for page in (PAGES[0], *GUIDES):
        for block in find_blocks(page.read_text(), "bash"):
            yield from ((name_page(page), line) for line in split_lines(block))


def is_run(line: str) -> bool:
    return not any(re.search(pattern, line) for pattern in NOT_RUN)


def test_each_reason_for_not_running_a_command_is_needed() -> None:
    lines = [line for _, line in find_commands()]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert sum(map(is_run, lines)) > 10


@pytest.mark.long  # starts a process for each command
@pytest.mark.parametrize("page", sorted({where for where, line in find_commands() if is_run(line)}))
def test_commands_that_need_nothing_else_run(page: str, tmp_path: Path) -> None:
    """Runs them in order, in a folder of their own that sees the checkout."""
    for folder in ("assets", "configs", "distill", "models"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, code in find_files((ROOT / page).read_text()):
        (tmp_path / name).write_text(code)
    for line in [line for where, line in find_commands() if where == page and is_run(line)]:
        command = re.sub(r"^python\b", shlex.quote(sys.executable), line)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, line + done.stdout[-1000:] + done.stderr[-2000:]


@pytest.mark.long
def test_the_commands_of_your_own_models_run(tmp_path: Path, monkeypatch) -> None:
    """Trains, evaluates and exports by README's flags, with the recipe's tiny variant, the embedded
    models and their task in place of GSM8K."""
    section = (ROOT / "README.md").read_text().partition("\n## Your own models\n")[2]
    blocks = list(find_blocks(section.partition("\n## ")[0], "bash"))
    lines = [shlex.split(line) for line in split_lines(blocks[-1])]
    verbs = ["distill.train", "distill.evaluate", "distill.report", "distill.export"]
    assert [line[2] for line in lines] == verbs
    monkeypatch.chdir(ROOT)
    changes = {
        "--config=configs/gsm8k.py": "--config=configs/gsm8k.py:tiny",
        "--config.student.path=Qwen/Qwen3-0.6B": "--config.student.path=assets/student",
        "--config.teacher.path=Qwen/Qwen3-8B": "--config.teacher.path=assets/teacher",
        "--benchmark=gsm8k": "--benchmark=arithmetic",
        "--data=hf:": "--limit=2",
        "--max_new_tokens=1024": "--max_new_tokens=16",
        "--out=report.html": f"--out={tmp_path}/report.html",
        "--out=student": f"--out={tmp_path}/student",
    }
    used = set()
    for words in lines:
        used |= changes.keys() & set(words)
        flags = [changes.get(w, w).replace("runs/gsm8k", f"{tmp_path}/run") for w in words[3:]]
        assert call(importlib.import_module(words[2]), *flags) == 0
    assert used == changes.keys()
    assert (tmp_path / "run/eval/summary.json").is_file()
    assert "<html" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "student/model.safetensors").is_file()


# A teacher elsewhere

TOKEN_VARIABLE = "TEACHER_TOKEN"


def read_teacher_commands() -> list[list[str]]:
    """Returns README's three commands: serve, check, train."""
    section = (ROOT / "README.md").read_text().partition("\n## A teacher elsewhere\n")[2]
    blocks = find_blocks(section.partition("\n## ")[0], "bash")
    lines = [shlex.split(line) for block in blocks for line in split_lines(block)]
    commands = [words for words in lines if words[0] == "python"]
    assert [words[2] for words in commands] == ["distill.serve", "distill.train", "distill.train"]
    exported = [words for words in lines if words[0] == "export"]
    assert exported and all(words[1].startswith(f"{TOKEN_VARIABLE}=") for words in exported)
    return commands


def replace_words(words: list[str], changes: dict[str, str]) -> list[str]:
    assert changes.keys() <= set(words)
    return [changes.get(word, word) for word in words[3:]]


def check_and_train_elsewhere(url: str, workdir: Path, *flags: str) -> None:
    """Runs the student's commands by README's flags, tiny, with the teacher at `url`.

    flags: further ones of both commands.
    """
    changes = {
        "--config=configs/gsm8k.py": "--config=configs/gsm8k.py:tiny",
        "--config.teacher.path=http://teacher:8000": f"--config.teacher.path={url}",
    }
    _, check, train = read_teacher_commands()
    assert "--check" in check
    assert call(verb_module("train"), *replace_words(check, changes), *flags) == 0
    assert not workdir.exists()
    changes["--workdir=runs/gsm8k"] = f"--workdir={workdir}"
    assert call(verb_module("train"), *replace_words(train, changes), *flags) == 0
    assert numbers(workdir)[-1]["train/reverse_kl"] > 0


def test_a_run_learns_from_a_teacher_elsewhere(tmp_path: Path, monkeypatch) -> None:
    """One step of one layer, with the server in this process; the test below starts it by README's
    command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(remote, "_get_head_cache", lambda: tmp_path / "heads")
    monkeypatch.setenv(TOKEN_VARIABLE, serving.TOKEN)
    student = tiny_model(tmp_path / "student", 0, num_hidden_layers=1)
    teacher = tiny_model(tmp_path / "teacher", 1, num_hidden_layers=1, hidden_size=48)
    with serving.serve(teacher, slots=1, max_length=128) as running:
        flags = (f"--config.student.path={student}", "--config.opd.steps=1")
        check_and_train_elsewhere(running.url, tmp_path / "run", *flags)
        assert running.server.served.model_hash in (tmp_path / "run/inputs.json").read_text()


@pytest.mark.long
def test_the_commands_of_a_teacher_elsewhere_run(tmp_path: Path, monkeypatch) -> None:
    """All three, with the embedded models: the server as a process, which SIGTERM ends."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(remote, "_get_head_cache", lambda: tmp_path / "heads")
    monkeypatch.setenv(TOKEN_VARIABLE, serving.TOKEN)
    serve, log = read_teacher_commands()[0], tmp_path / "log"
    flags = replace_words(serve, {"--model=Qwen/Qwen3-8B": "--model=assets/teacher"})
    words = [sys.executable, *serve[1:3], *flags, "--port=0", "--dtype=float32"]
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        serving.wait_until(lambda: "serving" in log.read_text() or process.poll() is not None, 300)
        port = log.read_text().strip().rpartition(":")[2]
        check_and_train_elsewhere(f"http://127.0.0.1:{port}", tmp_path / "run")
        process.terminate()
        assert process.wait(60) == 143, log.read_text()
    finally:
        process.kill()
        process.wait()
