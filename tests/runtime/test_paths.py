"""Home directories in flags and configs, and outputs that are tried before the work."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import base
from distill.runtime import paths
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.verbs import verb_module

VERBS = (
    *("clean", "compare", "diagnose", "evaluate", "export", "generate", "harness", "plan"),
    *("quickstart", "score", "serve", "train", "verify"),
)
# Flags of text that are no paths.
TEXTS = {
    *("served_model", "api_key_env", "host", "name", "output", "drafts", "window", "choice_by"),
    *("judge_template", "judge_model", "judge_api_key_env"),
    *("benchmark", "columns", "coordinator_address", "dtype", "k", "keep", "on_bad_row"),
    *("protocol", "scripts", "stage", "stop", "tasks", "template", "thinking", "topology", "chat"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "{}"),
        ("~/rows.jsonl", "{}/rows.jsonl"),
        ("hf:~/set:config:train[:5]", "hf:{}/set:config:train[:5]"),
        ("tfds:~/set", "tfds:{}/set"),
        ("gs://bucket/~/rows", "gs://bucket/~/rows"),
        ("./~/rows", "./~/rows"),
        ("rows~", "rows~"),
        ("hf:owner/~name", "hf:owner/~name"),
        ("", ""),
    ],
)
def test_a_leading_tilde_is_the_home_directory(home: str, path: str, expanded: str) -> None:
    assert paths.expand_home(path) == expanded.format(home)


def test_the_home_of_another_user_is_theirs_or_refused() -> None:
    user = pwd.getpwuid(os.getuid())
    assert paths.expand_home(f"~{user.pw_name}/x") == f"{user.pw_dir}/x"
    with pytest.raises(UserError, match=r"^hf:~no_such_user/x: no user has"):
        paths.expand_home("hf:~no_such_user/x")


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_known_as_a_path_or_a_text(verb: str) -> None:
    options = verb_module(verb).OPTIONS
    others = (flags.IntegerParser, flags.FloatParser, flags.BooleanParser)
    names = [name for name in options if "." not in name]  # no keys of an earlier call's config
    texts = {name for name in names if not isinstance(options[name].parser, others)}
    assert texts - {"config", "config_file"} <= {*paths.FLAGS} | TEXTS


def test_every_path_of_flags_is_expanded(home: str) -> None:
    options = flags.FlagValues()
    flags.DEFINE_string("out", None, "", options)
    flags.DEFINE_string("template", None, "", options)
    flags.DEFINE_list("against", [], "", flag_values=options)
    flags.DEFINE_string("report", "", "", options)
    options(["verb", "--out=~/o", "--template=~ {question}", "--against=~/a,hf:~/b,c"])
    paths.expand_flags(options)
    assert (options.out, options.template, options.report) == (f"{home}/o", "~ {question}", "")
    assert options.against == [f"{home}/a", f"hf:{home}/b", "c"]
    options(["verb", "--out="])
    with pytest.raises(UserError, match=r"^--out=: is empty"):
        paths.expand_flags(options)
    options.unparse_flags()
    flags.DEFINE_string("workdir", "runs/x", "", options)
    options(["verb", "--out=o", "--workdir="])
    with pytest.raises(UserError, match=r"^--workdir=: is empty"):
        paths.expand_flags(options)
    options(["verb", "--workdir=w", "--out=~no_such_user/o"])
    with pytest.raises(UserError, match=r"^--out=~no_such_user/o: no user"):
        paths.expand_flags(options)


def test_every_path_of_a_config_is_expanded(home: str) -> None:
    c = base.get_config()
    c.student.path, c.student.tokenizer, c.teacher.path = "~/s", "~/t", "initial"
    c.opd.data.source, c.opd.data.difficulty, c.opd.context.text = "hf:~/d", "~/d.jsonl", "~/c"
    c.opd.data.mixture = (("~/a.jsonl", 1.0), ("arithmetic", 2.0))
    c.opd.data.template = "~ {question}"
    c.eval.data, c.compilation_cache = "~/e.jsonl", "~/cache"
    paths.expand_config(c)
    assert (c.student.path, c.student.tokenizer) == (f"{home}/s", f"{home}/t")
    assert (c.teacher.path, c.opd.data.template) == ("initial", "~ {question}")
    assert (c.opd.data.source, c.opd.data.difficulty) == (f"hf:{home}/d", f"{home}/d.jsonl")
    assert c.opd.data.mixture == ((f"{home}/a.jsonl", 1.0), ("arithmetic", 2.0))
    assert (c.opd.context.text, c.eval.data) == (f"{home}/c", f"{home}/e.jsonl")
    assert c.compilation_cache == f"{home}/cache"
    c.opd.data.source = "~no_such_user/d"
    with pytest.raises(UserError, match=r"^config\.opd\.data\.source=~no_such_user/d: no user"):
        paths.expand_config(c)


def test_the_file_of_a_config_may_lie_in_the_home_directory(home: str) -> None:
    Path(home, "x.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''): return ConfigDict({'student': {'path': '~/model' + arg}})\n"
    )
    verb = (
        "from absl import flags\nfrom ml_collections import config_flags\n"
        "from distill.runtime import cli\n"
        "c = config_flags.DEFINE_config_file('config')\n"
        "cli.run(lambda: print(c.value.student.path))"
    )
    done = subprocess.run(
        [sys.executable, "-c", verb, "--config=~/x.py:8b"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"{home}/model8b\n"), done.stderr


def test_a_path_is_proposed_only_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "theories.jsonl").touch()
    for name, nearest in {
        "modles/qwen": "models/qwen",
        "models/qwenn": "models/qwen",
        "modles/llama": "",
        "other": "",
        "notrows.jsonl": "",
        "theory.jsonl": "theories.jsonl",
        "models": "",
        "models/" + "x" * 300: "",
        "models/a\0b": "",
    }.items():
        hint = f"; did you mean '{tmp_path}/{nearest}'?" if nearest else ""
        assert paths.suggest_path(tmp_path / name) == hint, name


# Outputs


@pytest.mark.parametrize("name", ["o.jsonl", "a/b [c]/o.jsonl", "-o #1 ü.jsonl", "link"])
def test_an_output_is_tried_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "target")
    out = paths.check_output(str(tmp_path / name), str(tmp_path / "in.jsonl"), "hf:owner/set")
    assert os.fspath(out) == os.path.realpath(tmp_path / name)
    assert list(Path(out).parent.iterdir()) == [] or not Path(out).exists()
    assert not list(tmp_path.rglob("*probe*"))


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "alias").symlink_to(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "folder": "is not a regular file",
        "new/": "is not a regular file",
        "pipe": "is not a regular file",
        "rows.jsonl/o": "rows.jsonl is a file, not a folder",
        "loop": "links|loop",
        "x" * 250: "File name too long",
        "rows.jsonl": "is also read or written, and would be lost",
        "alias": "is also read or written, and would be lost",
        "folder/../rows.jsonl": "is also read or written, and would be lost",
    }.items():
        with pytest.raises(UserError, match=f"(?s)^--out=.*: .*({words})"):
            paths.check_output(f"{tmp_path}/{name}", f"{tmp_path}/rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"
    with pytest.raises(UserError, match=r"^--report=/proc/o\.jsonl: "):
        paths.check_output("/proc/o.jsonl", flag="--report")


def test_the_projects_own_files_are_found_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("assets/student", "configs/quickstart.py"):
        assert paths.expand_input(name) == str(ROOT / name)
    for name in ("assets/nothing", "distill/train.py", "runs/x", "hf:assets/student", ""):
        assert paths.expand_input(name) == name
    (tmp_path / "assets" / "student").mkdir(parents=True)
    assert paths.expand_input("assets/student") == "assets/student", "one's own comes first"
