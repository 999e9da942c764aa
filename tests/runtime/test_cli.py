"""Tests exit codes and one-line errors as users see them."""

import os
import signal
import subprocess
import sys

import pytest
from absl.flags import FlagValues

from distill.__main__ import VERBS
from distill.runtime import cli
from tests.support.paths import ROOT
from tests.support.verbs import call, verb_module

VERB = '''
"""A verb for the test."""
import sys
from absl import flags
from ml_collections.config_flags import config_flags
from distill.__main__ import VERBS
from distill.runtime import cli
from models.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where.", required=True)
SIDE = flags.DEFINE_enum("side", "left", ["left", "right"], "Which side.")
flags.mark_flag_as_required("config")


def main():
    c = CONFIG.value
    if c.optim.rate == 13:
        raise UserError("config.optim.rate:\\n 13 is unlucky")
    if c.optim.rate == 14:
        raise RuntimeError("a bug")
    if c.optim.rate == 17:
        open("w" * 300, "w")
    if c.optim.rate == 18:
        open("/dev/full", "wb", buffering=0).write(b"x")
    if c.optim.rate == 19:
        open("lost.txt")
    if c.optim.rate == 20:
        print("half a pair: \\ud83d")
    if c.optim.rate == 15:
        raise KeyboardInterrupt
    if c.optim.rate == 16:
        sys.exit(1)
    print("rate", c.optim.rate, "sizes", c.sizes, SIDE.value)


if __name__ == "__main__":
    cli.run(main)
'''

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    c = ConfigDict({"optim": {"rate": 1.0}, "sizes": (1, 2), "steps": 1, "fast": False}).lock()
    if arg == "key":
        c.lost
    elif arg == "set":
        c.optim.rat = 2.0
    elif arg == "file":
        open("lost.txt")
    elif arg:
        raise ValueError(f"configs/x.py takes no argument {arg!r}")
    return c
"""


@pytest.fixture(scope="module")
def verb(tmp_path_factory):
    """Returns a function that runs the verb in its own process; returns (exit code, stdout,
    stderr)."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "verb.py").write_text(VERB)
    (folder / "x.py").write_text(CONFIG)
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("def get_config(:\n")

    def run(*args: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "verb.py", *args],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


GOOD = ("--config=x.py", "--workdir=w")


def test_a_verb_prints_its_result_and_exits_with_0(verb):
    code, out, err = verb(*GOOD, "--config.optim.rate=2", "--config.sizes=(3,)", "--side=right")
    assert (code, out, err) == (0, "rate 2.0 sizes (3,) right\n", "")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], " is required"),
        (["--config=x.py"], "--workdir is required"),
        ([*GOOD, "--wrkdir=w"], "Unknown command line flag 'wrkdir'"),
        ([*GOOD, "--side=up"], "--side=up"),
        ([*GOOD, "extra"], "unexpected argument 'extra'"),
        ([*GOOD, "--config.optim.rat=1"], "--config.optim.rat: no such key in the config; did you"),
        ([*GOOD, "--config.optim.rate=fast"], "--config.optim.rate=fast: could not convert"),
        ([*GOOD, "--config.optim.rate.x=1"], "optim.rate.x"),
        (["--workdir=w", "--config.optim.rate=1"], "needs --config=FILE before it"),
        (["--workdir=w", "--config"], "--config: needs a file: options are written --name=value"),
        (["--config", "--workdir=w"], "--config: needs a file"),
        (["--workdir=w", "--config", "lost.py"], "--config=lost.py: no such file"),
        (["--workdir=w", "--config=lost.py"], "--config=lost.py: no such file"),
        (["--workdir=w", "--config=x.py:file"], "No such file or directory: 'lost.txt'"),
        (["--workdir=w", "--config=x.py:big"], "x.py:big: configs/x.py takes no argument 'big'"),
        (["--workdir=w", "--config=x.py:key"], "x.py:7: 'lost': no such key in the config"),
        (
            ["--workdir=w", "--config=x.py:set"],
            "x.py:9: 'rat': no such key in the config; did you mean 'r",
        ),
        (["--workdir=w", "--config=empty.py"], "--config=empty.py: has no function get_config"),
        ([*GOOD, "--config.steps=many"], "--config.steps=many: is not an integer"),
        ([*GOOD, "--config.fast=maybe"], "--config.fast=maybe: is neither true nor false"),
        (["--workdir=w", "--config=broken.py"], "broken.py:1: SyntaxError: invalid syntax"),
        ([*GOOD, "--config.optim.rate=13"], "config.optim.rate: 13 is unlucky"),
    ],
)
def test_user_errors_are_one_line_and_exit_with_2(verb, args, line):
    code, out, err = verb(*args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert line in err.replace('"', "")


def test_a_bug_keeps_its_traceback(verb):
    code, _, err = verb(*GOOD, "--config.optim.rate=14")
    assert code == 1 and "Traceback" in err and "RuntimeError: a bug" in err


def test_what_the_machine_refuses_is_one_line(verb):
    code, _, err = verb(*GOOD, "--config.optim.rate=17")
    assert (code, err) == (2, f"error: {'w' * 300}: File name too long\n")
    assert verb(*GOOD, "--config.optim.rate=18") == (2, "", "error: No space left on device\n")
    code, _, err = verb(*GOOD, "--config.optim.rate=19")  # a missing file may be a bug
    assert code == 1 and "Traceback" in err


def test_any_text_can_be_printed(verb):
    code, out, err = verb(*GOOD, "--config.optim.rate=20")
    assert (code, err) == (0, "") and out.startswith("half a pair: \\ud83d\n")


def test_a_verb_may_return_its_own_exit_code(verb):
    assert verb(*GOOD, "--config.optim.rate=16") == (1, "", "")


def test_an_interrupt_exits_with_130_and_one_line(verb):
    assert verb(*GOOD, "--config.optim.rate=15") == (128 + signal.SIGINT, "", "interrupted\n")


def test_help_lists_the_flags(verb):
    code, out, err = verb("--help")
    assert (code, err) == (0, "")
    assert out.startswith("A verb for the test.")
    for flag in ("--config", "--workdir", "--side=left|right"):
        assert flag in out


def test_several_cpu_devices_get_enough_threads(monkeypatch):
    """There are more threads than devices, so that collectives cannot deadlock; a number set by the
    user wins."""
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(sys, "argv", ["verb"])
    for devices, requested, threads in [
        ("8", None, "32"),
        ("1", None, None),
        ("", None, None),
        ("8", "5", "5"),
    ]:
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", devices)
        monkeypatch.setenv("NPROC", requested) if requested else monkeypatch.delenv(
            "NPROC", raising=False
        )
        cli.run(lambda: None, FlagValues())
        assert os.environ.get("NPROC") == threads


def test_importing_cli_loads_no_jax():
    code = "import sys; from distill.runtime import cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_package_lists_every_verb():
    files = (path for path in (ROOT / "distill").glob("*.py") if path.stem != "__main__")
    verbs = {path.stem for path in files if "cli.run(main" in path.read_text()}
    assert {*VERBS} == verbs
    out = run_module("distill").stdout
    for verb, about in VERBS.items():
        assert f"  {verb:10}  {about}\n" in out


def test_the_package_runs_a_verb():
    done = run_module("distill", "train", "--config=configs/quickstart.py", "--workdr=x")
    assert done.returncode == 2 and "'workdr'" in done.stderr and done.stderr.count("\n") == 1
    done = run_module("distill", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: trian: no such verb; did you mean 'train'?\n"


CONFIG_FLAG = "--config=configs/quickstart.py"
NEAR = {
    "train --check --config=configs/quikstart.py": "'configs/quickstart.py'",
    f"train --check {CONFIG_FLAG} --config.log.to=wandbb": "'wandb'",
    f"train --check {CONFIG_FLAG} --config.opd.objective=odp": "'opd'",
    f"train --check {CONFIG_FLAG} --config.alerts.stop_on=entrop": "'entropy'",
    f"train --check {CONFIG_FLAG} --config.opd.data.source=assets/rowz": "'assets/rows'",
    "evaluate --benchmark=gsm8 --model=x --out=OUT": "'gsm8k'",
    "evaluate --benchmark=gsm8k --protocol=gredy --model=x --out=OUT": "'greedy'",
    "verify --benchmark=maths --data=x --out=OUT": "'math'",
    "chat --model=assets/techer": "'assets/teacher'",
    "chat --model=asets/teacher": "'assets/teacher'",
    "export --run=asets/rows --out=OUT": "'assets/rows'",
    "report asets/rows": "'assets/rows'",
    "compare asets/rows": "'assets/rows'",
}


@pytest.mark.parametrize("line", NEAR)
def test_the_nearest_name_is_proposed(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, *flags = line.replace("OUT", str(tmp_path / "out")).split()
    assert call(verb_module(verb), *flags) == 2
    assert f"; did you mean {NEAR[line]}?" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [*VERBS])
def test_help_of_a_verb_names_all_its_flags(name, capsys, monkeypatch):
    verb = verb_module(name)
    monkeypatch.setitem(sys.modules, "__main__", verb)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.run(verb.main, verb.OPTIONS)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(str(verb.__doc__).strip())
    for flag in (name for name in verb.OPTIONS if "." not in name):  # no key of a config
        assert f"\n  --{flag}=" in out or f"\n  --[no]{flag}\n" in out
    assert ("--config.opd.steps=200" in out) == ("config" in verb.OPTIONS)
    assert ("--coordinator_address" in out) == (name in ("train", "generate", "evaluate"))


def test_help_that_nobody_reads_to_its_end_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "distill.generate", "--help"]
    ended = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_help_and_refused_flags_load_no_jax():
    """They are answered at once: the libraries of a run take seconds to import."""
    code = (
        "import importlib, sys; from distill.__main__ import VERBS;"
        "[importlib.import_module(f'distill.{v}') for v in VERBS];"
        "slow = {'jax', 'transformers', 'datasets', 'matplotlib', 'scipy', 'torch'};"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
