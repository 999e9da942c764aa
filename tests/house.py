"""The structure, read from the source: floors, circles, sizes, and that what is named exists."""

import ast
import functools
import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from tests.support.paths import ROOT

PACKAGES = ("models", "distill", "configs", "assets", "benchmarks", "tests")

# The folders of distill/ from top to bottom, each with its files from top to bottom: a file imports
# what stands behind it in this list. The files of distill/ itself are the verbs, and batch.
FOLDERS = {
    "": "quickstart harness diagnose plan train evaluate generate score compare verify clean "
    "export",
    "planning": "fit forecast programs roofline aot hlo diagnosis",
    "training": "loop preflight eval_hook collect grading trainer memory sampling_programs calls "
    "microbatches prompts setup update optim stages",
    "evaluation": "evaluator comparison rejection responses records divergence lm_eval_model "
    "scoring protocols problems statistics",
    "evaluation.tasks": "arithmetic gsm8k math500 aime24 aime25 amc math ifeval task",
    "teachers": "local",
    "rollout": "completions sampler simulate engine buffer options scheduler decode sequence "
    "sampling",
    "policy": "exporting forward compatibility policy hub",
    "data": "collate packing dataset teacher_context cleaning dedup curriculum examples sources "
    "columns arithmetic chat",
    "objectives": "losses fused_head chunks divergences advantages",
    "rewards": "terms ifeval graders",
    "runtime": "checkpoint cli distributed xla run_files environment gpu mesh",
}
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
    """Module name → its syntax tree, of every Python file of the project."""
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
    """Dotted names that `module` imports, anywhere in it: modules, as deep as they exist here."""
    found = set()
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                found.add(deeper if deeper in sources() else str(node.module))
    return frozenset(found)


def reached(module: str) -> set[str]:
    """Everything that importing `module` imports, through the project's own modules."""
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


def of(package: str) -> list[str]:
    return [m for m in sources() if under(m, package) and m != package]


def folders() -> set[str]:
    """Packages of distill/, whose __init__ holds a docstring and, of rollout, its face."""
    return {f"distill.{name}" for name in FOLDERS if name}


def test_every_file_has_a_floor():
    assert set(of("distill")) - folders() == FLOOR.keys()


def test_imports_point_down():
    for module in of("distill"):
        for name in imports(module):
            above = under(name, "tests", "assets", "benchmarks", "configs")
            assert not above, f"{module} imports {name}"
            if name in FLOOR and module in FLOOR:
                assert FLOOR[module] < FLOOR[name], f"{module} imports {name}, which stands above"
            if name in folders():  # a face stands where its topmost file does
                top = min(FLOOR[m] for m in FLOOR if under(m, name))
                assert FLOOR[module] < top, f"{module} imports {name}, which stands above"
    for module in of("models"):
        for name in imports(module):
            assert not under(name, "distill", "configs", "tests", "assets", "benchmarks"), (
                module,
                name,
            )
    for module in of("configs"):
        for name in imports(module):
            assert not under(name, "distill", "models", "tests", "assets"), (module, name)


def files_of_tests() -> list[str]:
    return [m for m in of("tests") if file_of(m).match("test_*.py") or m == "tests.house"]


def test_no_test_imports_from_another():
    """What several need stands in tests/support; nor do processes that tests start."""
    alone = {name.rpartition(".")[2] for name in files_of_tests()}
    for module in of("tests"):
        for name in imports(module):
            assert name.rpartition(".")[2] not in alone, f"{module} imports {name}"
        text = file_of(module).read_text()
        found = re.search(r"^\s*(?:from|import) (?:tests\.[\w.]*)?test_\w+", text, re.MULTILINE)
        assert not found, f"{module}: {found and found[0].strip()}"


def test_tests_lie_as_the_source_does():
    here = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    own = {"support", "long", "configs", "benchmarks", "end_to_end"}
    assert here <= {*FOLDERS, "models", *own}, here
    flat = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert flat == {"conftest.py", "house.py"}, "a test stands in the folder of what it tests"
    names = [name.rpartition(".")[2] for name in files_of_tests()]
    assert len(names) == len(set(names)), "two test files of one name"


def test_models_know_families_by_their_table_only():
    """What no family owns imports none, but for the table; distill/ imports none at all."""
    family_packages = {
        "models." + path.name
        for path in (ROOT / "models").iterdir()
        if path.is_dir() and path.name not in ("layers", "__pycache__")
    }
    assert family_packages
    for module in (*of("distill"), *of("models")):
        if module != "models.families" and not under(module, *family_packages):
            for name in imports(module):
                assert not under(name, *family_packages), f"{module} imports {name}"


def test_no_circles():
    for module in sources():
        assert module not in reached(module), f"{module} imports itself, by way of others"


def test_losses_know_arrays_only():
    plain = {"jax", "numpy", *sys.stdlib_module_names}
    known = ("models.errors", "models.checks", "distill.objectives", "distill.batch")
    for module in of("distill.objectives"):
        for name in imports(module):
            assert name.partition(".")[0] in plain or under(name, *known), name


# What runs in the graders' processes, or only reads files, starts without jax.
LIGHT = (
    "distill.rewards.graders",
    "distill.rewards.terms",
    "distill.evaluation.tasks",
    "distill.data.arithmetic",
    "distill.data.chat",
    "distill.runtime.cli",
)


def test_light_modules_do_without_jax():
    for module in LIGHT:
        assert not [n for n in reached(module) if under(n, "jax", "flax", "optax")], module


def test_flax_in_two_places_only():
    for module in sources():
        if any(under(name, "flax") for name in imports(module)):
            assert under(module, "models", "distill.runtime.mesh", "tests"), module


def test_sizes():
    for module, tree in sources().items():
        lines = len(file_of(module).read_text().splitlines())
        assert lines <= (700 if under(module, "tests") else 400), f"{module}: {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{module}.{node.name}: {length} lines"


def keys(c: ConfigDict) -> set[str]:
    """The names of all leaves."""
    found: set[str] = set()
    for name in c:
        found |= keys(c[name]) if isinstance(c[name], ConfigDict) else {name}
    return found


def test_every_config_key_is_read():
    """As an attribute, somewhere in distill/; or a group as a whole, by ** (its names are then
    keyword arguments, and Python itself refuses an unread one)."""
    attributes: set[str] = set()
    spread: set[str] = set()
    for module in of("distill"):
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


def test_no_default_in_two_places():
    """A config is read as c.x: its defaults stand in configs/base.py."""
    for module in of("distill") + of("configs"):
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


def commands() -> list[str]:
    """Lines of README's fenced bash blocks, continuations joined."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for line in commands():
        for target in re.findall(r"(?:^|&& )make ([\w-]+)", line):
            assert target in targets, line
        for module in re.findall(r"python3? -m ((?:distill|benchmarks)\.\w+)", line):
            assert module in sources(), line
        for path in re.findall(r"(?:--config=|\bpython3? )((?:configs|assets)/\w+\.py)", line):
            assert (ROOT / path).is_file(), line


def test_readme_keys_exist():
    """Every --config.KEY that README names, in commands or between, is one of base.py."""
    named = set(re.findall(r"--config\.([a-z][\w.]*)=", (ROOT / "README.md").read_text()))
    assert len(named) > 10
    for path in named:
        found = base.get_config()
        for key in path.split("."):
            assert key in found, f"--config.{path}"
            found = found[key]


def test_the_reading_page_is_short():
    """The files that CONTRIBUTING lists to be read in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    page = text.partition("## Read these in order")[2].partition("\n## ")[0]
    files = [ROOT / name for name in re.findall(r"^\d+\. `([\w/.]+)`", page, re.MULTILINE)]
    assert 1 < len(files) <= 12
    assert sum(len(file.read_text().splitlines()) for file in files) <= 3500
