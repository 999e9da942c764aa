"""Checks the structure of the source: layers, import cycles, sizes, and that documented names
exist."""

import ast
import functools
import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from tests.support.paths import ROOT

PACKAGES = ("models", "distill", "configs", "assets", "benchmarks", "studies", "tests")

# The folders of distill/ from top to bottom, each with its files from top to bottom: a file imports
# only what is listed after it. The files of distill/ itself are the verbs, and batch.
FOLDERS = {
    "": "__main__ quickstart harness report diagnose plan train chat serve evaluate generate score "
    "compare verify clean export",
    "reporting": "watching writing study_page study_tables study_curves study_claims study_read "
    "study_definition page document tables figures transcripts read",
    "planning": "checking fit forecast programs roofline aot gpus hlo diagnosis",
    "training": "demonstration loop stopping saving metrics_log run_summary alerts preflight "
    "eval_hook collect drift teacher_outputs rollout_metrics grading trainer memory "
    "sampling_programs calls microbatches prompts resume config_changes setup graded_rows update "
    "update_metrics optim stage_responses stages response_limits",
    "evaluation": "judges judging served_evaluation evaluator comparison rejection responses "
    "records divergence likelihood lm_eval_model storing scoring protocols problems statistics "
    "example_rows",
    "evaluation.tasks": "arithmetic gsm8k math500 aime24 aime25 amc math ifeval "
    "gpqa mmlu_redux choice qa livecodebench humaneval mbpp task",
    "serving": "server app calls guard formats requests worker score_queue jobs text schemas "
    "errors",
    "teachers": "local external remote endpoints stored stored_files wire outputs",
    "rollout": "served_completions served_model completions sampler simulate engine buffer options "
    "scheduler decode decode_steps draft_lengths decode_types drafts decode_weights sequence "
    "sampling",
    "policy": "exporting forward compatibility policy identity hub",
    "data": "collate packing dataset teacher_context cleaning dedup curriculum examples sources "
    "retry canonical columns turns answers arithmetic chat template sandbox messages files values",
    "objectives": "losses token_weights loss fused_head chunks divergences advantages",
    "rewards": "terms ifeval choices text_match programs program_tests graders equality answers "
    "sandbox isolation sandbox_driver sandbox_namespaces system_calls",
    "runtime": "arguments checkpoint saved_step integrity cli usage failures host_memory outputs "
    "locks trackers stop_signals progress watchdog distributed xla compiling console http_client "
    "run_files tensorboard tracker_process addresses paths environment network phases gpu mesh",
}
# The files of studies/, likewise.
STUDIES = "run summary results definitions study jobs worker models tasks traces"
STUDIES += " facts graphs manual instructions"
FLOOR = {
    ".".join(filter(None, ("distill", folder, file))): place
    for place, (folder, file) in enumerate(
        [
            *((folder, file) for folder, files in FOLDERS.items() for file in files.split()),
            ("", "batch"),
        ]
    )
}


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Maps the module name of every Python file in the project to its syntax tree."""
    files = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
    return {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            f.read_text(), str(f)
        )
        for f in files
    }


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Returns dotted names that `module` imports anywhere: modules, as deep as they exist here."""
    names = set()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.add(deeper if deeper in sources() else str(node.module))
    return frozenset(names)


def reached(module: str) -> set[str]:
    """Returns everything that importing `module` imports, through the project's own modules."""
    seen: set[str] = set()
    stack = [module]
    while stack:
        for name in imports(stack.pop()) - seen:
            seen.add(name)
            if name in sources():
                stack.append(name)
    return seen


def under(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def modules_of(package: str) -> list[str]:
    return [m for m in sources() if under(m, package) and m != package]


def folders() -> set[str]:
    """Returns packages of distill/, whose __init__ has only a docstring or re-exports."""
    return {f"distill.{name}" for name in FOLDERS if name}


def test_every_file_is_listed_in_a_layer():
    assert set(modules_of("distill")) - folders() == FLOOR.keys()


def test_imports_only_point_to_lower_layers():
    for module in modules_of("distill"):
        for name in imports(module):
            above = under(name, "tests", "assets", "benchmarks", "studies", "configs")
            assert not above, f"{module} imports {name}"
            if name in FLOOR and module in FLOOR:
                assert FLOOR[module] < FLOOR[name], f"{module} imports {name}, which stands above"
            if name in folders():  # a face stands where its topmost file does
                top = min(FLOOR[m] for m in FLOOR if under(m, name))
                assert FLOOR[module] < top, f"{module} imports {name}, which stands above"
    for module in modules_of("models"):
        for name in imports(module):
            above = under(name, "distill", "configs", "tests", "assets", "benchmarks", "studies")
            assert not above, (module, name)
    for module in modules_of("configs"):
        for name in imports(module):
            above = under(name, "distill", "models", "tests", "assets", "studies")
            assert not above, (module, name)


def test_studies_import_only_what_is_listed_after_them():
    place = {f"studies.{name}": i for i, name in enumerate(STUDIES.split())}
    files = {".".join(module.split(".")[:2]) for module in modules_of("studies")}
    assert files == place.keys()
    for module in modules_of("studies"):
        here = ".".join(module.split(".")[:2])
        for name in imports(module):
            there = ".".join(name.split(".")[:2])
            if under(name, "studies") and there != here:
                assert place[here] < place[there], f"{module} imports {name}, which stands above"


def files_of_tests() -> list[str]:
    return [m for m in modules_of("tests") if file_of(m).match("test_*.py") or m == "tests.house"]


def test_no_test_imports_from_another():
    """Shared helpers belong in tests/support/; processes that tests start may not import tests
    either."""
    alone = {name.rpartition(".")[2] for name in files_of_tests()}
    for module in modules_of("tests"):
        for name in imports(module):
            assert name.rpartition(".")[2] not in alone, f"{module} imports {name}"
        text = file_of(module).read_text()
        found = re.search(r"^\s*(?:from|import) (?:tests\.[\w.]*)?test_\w+", text, re.MULTILINE)
        assert not found, f"{module}: {found and found[0].strip()}"


def test_test_folders_mirror_the_source():
    here = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    own = {"support", "long", "configs", "benchmarks", "studies", "end_to_end", "fuzz"}
    assert here <= {*FOLDERS, "models", *own}, here
    flat = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert flat == {"conftest.py", "house.py"}, "a test stands in the folder of what it tests"
    names = [name.rpartition(".")[2] for name in files_of_tests()]
    assert len(names) == len(set(names)), "two test files of one name"


def test_families_are_imported_only_by_their_table():
    """Shared model code imports no family, except in the table; distill/ imports none at all."""
    family_packages = {
        "models." + path.name
        for path in (ROOT / "models").iterdir()
        if path.is_dir() and path.name not in ("layers", "__pycache__")
    }
    assert family_packages
    for module in (*modules_of("distill"), *modules_of("models")):
        if module != "models.families" and not under(module, *family_packages):
            for name in imports(module):
                assert not under(name, *family_packages), f"{module} imports {name}"


def test_there_are_no_import_cycles():
    for module in sources():
        assert module not in reached(module), f"{module} imports itself, by way of others"


def test_objectives_depend_on_arrays_only():
    plain = {"jax", "numpy", *sys.stdlib_module_names}
    known = ("models.errors", "models.checks", "distill.objectives", "distill.batch")
    for module in modules_of("distill.objectives"):
        for name in imports(module):
            assert name.partition(".")[0] in plain or under(name, *known), name


# Modules that run in grader processes, or only read files, start without jax.
LIGHT = (
    "distill.rewards.graders",
    "distill.rewards.terms",
    "distill.evaluation.tasks",
    "distill.data.arithmetic",
    "distill.data.chat",
    "distill.runtime.cli",
    "distill.runtime.tracker_process",
)


def test_light_modules_do_not_import_jax():
    for module in LIGHT:
        assert not [n for n in reached(module) if under(n, "jax", "flax", "optax")], module


def test_flax_is_imported_in_two_places_only():
    for module in sources():
        if any(under(name, "flax") for name in imports(module)):
            assert under(module, "models", "distill.runtime.mesh", "tests"), module


def test_files_and_functions_stay_short():
    for module, tree in sources().items():
        lines = len(file_of(module).read_text().splitlines())
        assert lines <= (700 if under(module, "tests") else 400), f"{module}: {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{module}.{node.name}: {length} lines"


# Calls that execute what they read, or hand it to a shell. `.eval` and `.compile` are methods of
# others, so only bare names count there.
UNSAFE_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml")
UNSAFE_NAMES = ("eval", "exec", "compile", "__import__")
UNSAFE_METHODS = ("torch.load", "os.system", "os.popen", "yaml.load", "pickle.load", "pickle.loads")
UNSAFE_OPTIONS = ("allow_pickle", "trust_remote_code", "shell")


def find_unsafe_code(tree: ast.AST) -> list[str]:
    """Returns lines that unpickle, evaluate text, or run a shell or the code of a model."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [f"{node.lineno}: {n}" for n in names if under(n, *UNSAFE_IMPORTS)]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = [
                k.arg
                for k in node.keywords
                if k.arg in UNSAFE_OPTIONS and ast.unparse(k.value) != "False"
            ]
            if name in UNSAFE_NAMES + UNSAFE_METHODS or options:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_executes_what_it_reads():
    for module in sources():
        if under(module, "distill", "models", "configs"):
            assert not find_unsafe_code(sources()[module]), module
    for line in (
        "import pickle",
        "from yaml import load",
        "eval(x)",
        "np.load(f, allow_pickle=True)",
    ):
        assert find_unsafe_code(ast.parse(line)), line
    for line in ("subprocess.run(x, shell=True)", "torch.load(f)", "f(trust_remote_code=yes)"):
        assert find_unsafe_code(ast.parse(line)), line


def keys(c: ConfigDict) -> set[str]:
    """Returns the names of all leaves."""
    names: set[str] = set()
    for name in c:
        names |= keys(c[name]) if isinstance(c[name], ConfigDict) else {name}
    return names


def test_every_config_key_is_read():
    """A key is read as an attribute somewhere in distill/, or as part of a group passed by ** (its
    names are then keyword arguments, and Python itself refuses an unknown one)."""
    attributes: set[str] = set()
    spread: set[str] = set()
    for module in modules_of("distill"):
        for node in ast.walk(sources()[module]):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                attributes.add(node.attr)
            if isinstance(node, ast.keyword) and node.arg is None:
                spread |= {n.attr for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
    c = base.get_config()
    for group in [g for g in spread if isinstance(c.get(g), ConfigDict)]:
        attributes |= keys(c[group])
    unread = keys(c) - attributes
    assert not unread, f"keys that nothing reads: {unread}"


def test_defaults_stand_only_in_the_base_config():
    """Code reads c.x without a default: defaults are in configs/base.py."""
    for module in modules_of("distill") + modules_of("configs"):
        for node in ast.walk(sources()[module]):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            root = node.func.value
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            is_config = isinstance(root, ast.Name) and root.id in ("c", "s", "config")
            assert not (is_config and node.func.attr == "get" and len(node.args) > 1), (
                f"{module}:{node.lineno}: a default beside configs/base.py"
            )


def test_the_reading_list_of_contributing_is_short():
    """Counts the files that CONTRIBUTING lists for reading in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    page = text.partition("## Read these in order")[2].partition("\n## ")[0]
    files = [ROOT / name for name in re.findall(r"^\d+\. `([\w/.]+)`", page, re.MULTILINE)]
    assert 1 < len(files) <= 12
    assert sum(len(file.read_text().splitlines()) for file in files) <= 3500
