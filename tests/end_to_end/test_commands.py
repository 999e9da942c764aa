"""Checks that every documented command parses: programs, flags, config keys and files exist.

Reads README.md, CONTRIBUTING.md, docs/*.md, the docstrings of recipes, verbs and benchmarks, and
the usage of launch_tpu.sh. Runs none of the commands; test_docs.py runs those of README and docs/
that need neither a network nor an accelerator.
"""

import ast
import functools
import importlib
import importlib.util
import operator
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl.flags import FlagValues

from configs import ablations, reproduce
from tests.support.pages import PAGES, find_blocks, find_files, find_spans, name_page, split_lines
from tests.support.paths import ROOT
from tests.support.recipes import at_home, parse_config  # noqa: F401  (at_home is a fixture)

PYTHONS = ("python", "python3", ".venv/bin/python")
OURS = (*PYTHONS, "make", "./launch_tpu.sh", "srun")  # programs whose arguments are checked
# Other programs in documented commands, and why their arguments are not checked.
UNCHECKED = {
    **dict.fromkeys(("bash", "cp", "echo", "grep", "head"), "belongs to every system"),
    **dict.fromkeys(("done", "export", "for", "read", "source", "while"), "belongs to the shell"),
    "$run": "is a command that configs/ablations.py printed, and test_recipes.py checks",
    "gcloud": "needs an account at Google",
    **dict.fromkeys(("lm_eval", "vllm"), "comes with a package of that name"),
    "pip": "needs a network; the files after -r are checked",
    **dict.fromkeys(("mlflow", "tensorboard", "trackio"), "comes with a package of that name"),
}
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LAUNCHER = (ROOT / "launch_tpu.sh").read_text()


class WrongCommand(Exception):
    """Raised for a command that would not run as written."""


def require(holds: object, message: str) -> None:
    if not holds:
        raise WrongCommand(message)


# Finding commands


def is_template(line: str) -> bool:
    """Returns true for `python -m distill.VERB`, `--config=configs/X.py`, `NAME [--option]`."""
    return bool(re.search(r"\.VERB|/X\.py| (VERB|NAME|STUDY)\b", line))


def find_in_markdown(text: str) -> Iterator[str]:
    """Yields the lines of bash blocks, and code spans that begin with one of our programs."""
    for block in find_blocks(text, "bash"):
        yield from split_lines(block)
    for span in find_spans(text):
        words = [word for word in span.split() if not re.match(r"\w+=", word)]
        if words and words[0] in OURS and len(words) > 1 and not is_template(span):
            yield span


def find_in_text(text: str) -> Iterator[str]:
    """Yields indented lines that begin with one of our programs."""
    joined = re.sub(r"\\\n *", "", text)
    for line in (line.strip() for line in re.findall(r"^ {4,}\S.*", joined, re.MULTILINE)):
        if line.split()[0] in (*OURS, "for", "cp") and not is_template(line):
            yield line


def get_docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text()), clean=False) or ""


def get_usage() -> str:
    """Returns the comment at the head of the launcher, which --help prints, indented."""
    return re.sub(r"^# ?", "  ", LAUNCHER.partition("\nset ")[0], flags=re.MULTILINE)


def find_commands() -> Iterator[tuple[str, str]]:
    """Yields (where it is written, command)."""
    for page in PAGES:
        yield from ((name_page(page), line) for line in find_in_markdown(page.read_text()))
    for folder in ("configs", "distill", "benchmarks", "studies"):
        for file in sorted((ROOT / folder).glob("*.py")):
            name = f"{folder}/{file.name}"
            yield from ((name, line) for line in find_in_text(get_docstring(file)))
    yield from (("launch_tpu.sh", line) for line in find_in_text(get_usage()))


# Checking them


def check_line(line: str) -> None:
    """Raises WrongCommand if any of the line's commands would not parse."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word == "do" or (word and set(word) <= set(";|&")):
            check_command(command)
            command = []
        else:
            command.append(word)


def check_command(words: list[str]) -> None:
    while words and re.match(r"\w+=", words[0]):  # variables before a program
        words = words[1:]
    if not words:  # between two separators
        return
    program, arguments = words[0], words[1:]
    if program == "srun":
        start = next((i for i, word in enumerate(words) if word in PYTHONS), None)
        require(start, "srun starts no python")
        check_command(words[start:])
    elif program in PYTHONS:
        check_python(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        goals = {word for word in arguments if "=" not in word}  # others set variables
        require(goals <= set(targets), f"make {arguments}: no such target")
    elif program == "./launch_tpu.sh":
        check_launcher(arguments)
    else:
        require(program in UNCHECKED, f"{program}: an unknown program")
        if program == "pip" and "-r" in arguments:
            check_file(arguments[arguments.index("-r") + 1])
        extras = re.findall(r"^\.\[(\w+)\]$", " ".join(arguments[-1:])) if program == "pip" else ()
        for extra in extras:
            require(f"\n{extra} = [" in PYPROJECT, f"{extra}: no such extra")


def check_file(path: str) -> None:
    require((ROOT / path).exists(), f"{path}: there is no such file")


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "command", "exec")
    elif arguments[0] != "-m":
        check_file(arguments[0])
        if arguments[0] == "configs/reproduce.py" and arguments[1:]:
            reproduce.list_commands(arguments[1], tiny="tiny" in arguments)
        if arguments[0] == "configs/ablations.py" and arguments[1:]:
            ablations.list_commands(arguments[1], tiny=arguments[2:] == ["tiny"])
    elif arguments[1] == "venv":
        require(len(arguments) == 3, f"venv {arguments[2:]}: one folder")
    elif arguments[1] == "pytest":
        for path in (word for word in arguments[2:] if word.startswith("tests")):
            check_file(path)
    elif arguments[1] == "distill":  # python -m distill [VERB ...]
        if arguments[2:]:
            check_python(["-m", f"distill.{arguments[2]}", *arguments[3:]])
    else:
        module = arguments[1]
        folder = module.partition(".")[0]
        require(folder in ("distill", "benchmarks", "studies"), f"{module}: no module of ours")
        require(importlib.util.find_spec(module), f"{module}: there is no such module")
        verb, words = importlib.import_module(module), arguments[2:]
        if hasattr(verb, "ARGUMENTS"):  # takes more than flags
            words = [word for word in words if word.startswith("-")]
        check_flags(verb.OPTIONS, words)


def check_flags(options: FlagValues, words: list[str], required: bool = True) -> None:
    """Checks flags and their values without setting them, and the config with its overrides."""
    config_words = [word for word in words if re.match(r"--config[.=]", word)]
    given_flags = set()
    for word in words:
        name, separator, value = word.removeprefix("--").partition("=")
        require(word.startswith("--"), f"{word}: not a flag")
        if word in config_words:
            given_flags.add("config")
            continue
        if not separator and name not in options:
            name = name.removeprefix("no")
        require(name in options, f"--{name}: there is no such flag")
        if "$" in value:  # a loop variable
            pass
        elif separator:
            try:
                options[name].parser.parse(value)
            except ValueError as error:
                raise WrongCommand(f"{word}: {error}") from None
        else:
            require(options[name].boolean, f"{word}: has no value")
        given_flags.add(name)
    for name in options if required else ():
        validators = " ".join(v.message for v in options[name].validators)
        missing = "must have a value other than None" in validators and name not in given_flags
        require(not missing, f"--{name}: is required")
    if required and "check" in options:  # of train, which requires one or the other
        require(given_flags & {"check", "workdir"}, "--workdir: is required")
    if config_words:
        require("config" in options, "--config: there is no such flag")
        check_config(config_words)


def check_config(words: list[str]) -> None:
    for file in re.findall(r"--config=([^:]*)", " ".join(words)):
        check_file(file.split()[0])
    try:
        config = parse_config(*(word for word in words if "$" not in word))
        for key in re.findall(r"--config\.([\w.]+)=\$", " ".join(words)):  # a loop variable
            functools.reduce(operator.getitem, key.split("."), config)
    except Exception as error:  # ml_collections, absl and recipes raise many kinds
        raise WrongCommand(f"{' '.join(words)}: {error}") from None


def check_launcher(arguments: list[str]) -> None:
    verbs = set(re.findall(r"^ {4}(\w+) {3,}\w", get_usage(), re.MULTILINE))
    known = set(re.findall(r"^ +(--[\w-]+=?)\*?\) [\w(]", LAUNCHER, re.MULTILINE))
    assert {"doctor", "babysit"} <= verbs and {
        "--name=",
        "--dry-run",
    } <= known  # the usage was parsed
    require(arguments and arguments[0] in verbs, f"{arguments}: no such verb of the launcher")
    own, flags = arguments[1:], []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    for word in own:
        require(re.sub(r"=.*", "=", word) in known, f"{word}: no such option of the launcher")
    train = importlib.import_module("distill.train").OPTIONS
    check_flags(train, flags, required=arguments[0] in ("run", "up", "babysit"))


COMMANDS = list(find_commands())


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{w}: {x[:60]}" for w, x in COMMANDS])
def test_documented_command_parses(where: str, line: str, tmp_path: Path) -> None:
    if where.endswith(".md"):  # with the files that its page tells the reader to save
        for name, code in find_files((ROOT / where).read_text()):
            (tmp_path / name).write_text(code)
            line = line.replace(f"--config={name}", f"--config={tmp_path / name}")
    check_line(line)


def test_every_source_contributes_commands() -> None:
    places = {where for where, _ in COMMANDS}
    pages = {name_page(page) for page in PAGES} - {"docs/api.md"}  # Python only
    assert {*pages, "launch_tpu.sh", "configs/ablations.py", "configs/reproduce.py"} <= places
    recipes = {file.stem for file in (ROOT / "configs").glob("*.py")}
    without = {"__init__", "arguments", "tiny"}
    assert recipes - without <= {Path(where).stem for where in places if "configs/" in where}
    for start in ("python -m distill.train", "make ", "./launch_tpu.sh ", "srun ", "for mode "):
        assert any(line.startswith(start) for _, line in COMMANDS), start


TRAIN = "python -m distill.train --config=configs/base.py --workdir=runs/x"


@pytest.mark.parametrize(
    "line",
    [
        "python -m distill.trian --config=configs/base.py --workdir=runs/x",
        "python -m distill.train --workdir=runs/x",
        "python -m distill.train --config=configs/base.py",
        "python -m distill.train --config=configs/lost.py --workdir=runs/x",
        "python -m distill.train --config=configs/recall.py:big --workdir=runs/x",
        f"{TRAIN} --workdri=runs/x",
        f"{TRAIN} --config.opd.stps=3",
        f"{TRAIN} --config.opd.steps=many",
        f"{TRAIN} --config.opd.stps=$n",
        f"{TRAIN} positional",
        "python -m distill.evaluate --model=x --out=y --batch_size=0",
        "python -m distill.evaluate --model=x --out=y --thinking=perhaps",
        "python -m distill.export --out=student",
        "python -m distill.export --run=runs/x --out",
        "python -m benchmarks.lost",
        "python configs/lost.py",
        "python configs/ablations.py lost",
        "python configs/reproduce.py lost",
        "python -m pytest tests/lost.py",
        'python -c "import"',
        "cd x && make quikstart",
        "make quikstart",
        "pip install -r lost.txt",
        "pip install -e '.[lost]'",
        "srun --nodes=2 .venv/bin/python -m distill.train --config=configs/base.py",
        "./launch_tpu.sh launch",
        "./launch_tpu.sh up --spot -- --config=configs/base.py --workdir=gs://b/x",
        "./launch_tpu.sh up -- --config=configs/base.py --workdir=gs://b/x --config.x=1",
        "./launch_tpu.sh babysit -- --config=configs/base.py",
        "for x in a b; do python -m distill.export --run=$x; done",
        "frobnicate",
    ],
)
def test_wrong_commands_are_reported(line: str) -> None:
    with pytest.raises((WrongCommand, ValueError, SyntaxError)):
        check_line(line)


def find_keys() -> Iterator[tuple[str, str]]:
    """Yields (place, config flag) of all texts, prose included."""
    texts = {name_page(page): page.read_text() for page in PAGES}
    for file in sorted((ROOT / "configs").glob("*.py")):
        texts[f"configs/{file.name}"] = get_docstring(file)
    for where, text in texts.items():
        yield from ((where, key) for key in re.findall(r"--config\.([a-z][\w.]*)=", text))


def test_config_keys_in_prose_exist() -> None:
    keys = list(find_keys())
    assert len(keys) > 20
    for where, key in keys:
        recipe = where if where.startswith("configs/") and "tiny" not in where else ""
        config = parse_config(f"--config={recipe or 'configs/base.py'}")
        for part in key.split("."):
            assert part in config, f"{where}: --config.{key}"
            config = config[part]


@pytest.mark.parametrize("file", sorted((ROOT / "distill").glob("*.py")), ids=lambda f: f.stem)
def test_flags_in_docstrings_of_verbs_exist(file: Path) -> None:
    options = getattr(importlib.import_module(f"distill.{file.stem}"), "OPTIONS", None)
    for name in re.findall(r"(?<![\w-])--([a-z]\w*)", get_docstring(file)) if options else ():
        assert name in options, f"distill/{file.name}: --{name}"
