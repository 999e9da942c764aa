"""Programs for the sandbox: hostile ones, and mutated ones; and the kinds of sandboxes."""

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest

from distill.rewards import isolation, sandbox
from distill.rewards.isolation import Isolation
from models.errors import UserError

# What each program tries, and what must come of it: the limit that stops it, or its exit code.
HOSTILE = {
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "time",
    ),
    "allocates 10 GB": ("x = bytearray(10 * 2**30)", 1),
    "allocates in many processes": (
        "import os, time\nfor _ in range(8):\n    if not os.fork():\n        break\n"
        "x = b'a' * 2**28\ntime.sleep(60)",
        "memory",
    ),
    "prints 1 GB": (
        "import sys\nfor _ in range(1000):\n    sys.stdout.write('a' * 10**6)",
        "output",
    ),
    "loops": ("while True:\n    pass", "time"),
    "sleeps": ("import time\ntime.sleep(1000)", "time"),
    "ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try:\n"
        "        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "time",
    ),
    "leaves a daemon": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        os.close(1)\n        time.sleep(1000)\n    os._exit(0)",
        0,
    ),
    "hides behind a closed output": ("import os, time\nos.close(1)\ntime.sleep(1000)", "time"),
    "writes outside": ("open('/outside', 'w')", 1),
    "writes to a library": ("import os\nopen(os.__file__, 'a')", 1),
    "writes where it can": ("open('FOLDER/written', 'w')", 1),
    "fills its folder": ("for i in range(100):\n    open(str(i), 'wb').write(b'a' * 10**7)", 1),
    "writes one large file": ("f = open('f', 'wb')\nwhile True:\n    f.write(b'a' * 10**7)", 1),
    "reads the home folder": ("print(open('FOLDER/secret').read())", 1),
    "reads the users": ("print(open('/etc/passwd').read())", 1),
    "links out": ("import os\nos.symlink('FOLDER/secret', 'l')\nprint(open('l').read())", 1),
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)", 1),
    "sends far away": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('192.0.2.1', 53))",
        1,
    ),
    "kills all": ("import os\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)", None),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)", None),
    "makes namespaces": (
        "import ctypes\nc = ctypes.CDLL(None)\nfor flags in (0x10000000, 0x20000):\n"
        "    assert c.unshare(flags) == -1\nassert c.mount(b'a', b'/tmp', b'tmpfs', 0, 0) == -1",
        0,
    ),
    "takes memory of nobody": (
        "import ctypes\nc = ctypes.CDLL(None)\nassert c.shmget(0, 10**6, 0o1600) == -1\n"
        "assert c.memfd_create(b'a', 0) == -1",
        0,
    ),
    "looks into others": (
        "import ctypes, os\nc = ctypes.CDLL(None)\nassert c.ptrace(16, os.getppid(), 0, 0) == -1\n"
        "assert not os.path.exists('/proc/self')",
        0,
    ),
}

SLOW = ("fork bomb", "allocates in many processes", "loops", "ignores signals", "sleeps")
SLOW += ("hides behind a closed output",)


def skip_without_sandbox() -> None:
    """Skips the test, with the reason, where programs cannot be set apart."""
    try:
        sandbox.find_isolation()
    except UserError as error:
        pytest.skip(str(error))


def find_isolation(kind: str) -> Isolation:
    """Returns the isolation of a kind; skips the test if it does not work here."""
    ways = [way for way in isolation.list_isolations() if way.name == kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "list_isolations", lambda: ways)
        try:
            return sandbox.find_isolation.__wrapped__()
        except UserError as error:
            pytest.skip(f"no {kind}: {error}")


class _Mutator(ast.NodeTransformer):
    """Changes the node with number `target` of those that it knows how to change."""

    def __init__(self, target: int, draw: random.Random) -> None:
        self.target, self.count, self.draw = target, 0, draw

    def _is_turn(self) -> bool:
        self.count += 1
        return self.count - 1 == self.target

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if self._is_turn():
            node.ops = [
                self.draw.choice([ast.Lt(), ast.GtE(), ast.NotEq(), ast.Eq()]),
                *node.ops[1:],
            ]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if self._is_turn():
            node.op = self.draw.choice([ast.Add(), ast.Sub(), ast.Mult(), ast.Mod()])
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if self._is_turn():
            node.op = self.draw.choice([ast.Sub(), ast.Add(), ast.Mult()])
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if self._is_turn():
            value = node.value
            swapped = not value if isinstance(value, bool) else None
            if isinstance(value, int | float) and swapped is None:
                swapped = value + self.draw.choice([-1, 1])
            return ast.Constant(swapped if swapped is not None else "mutated")
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if self._is_turn():
            return ast.Return(ast.Constant(None)) if self.draw.random() < 0.5 else ast.Pass()
        return node


def mutate(source: str, seed: int) -> str:
    """Returns a program with one node changed, chosen by the seed; it may be equivalent."""
    draw = random.Random(seed)
    counter = _Mutator(-1, draw)
    counter.visit(ast.parse(source))
    tree = _Mutator(draw.randrange(counter.count), draw).visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree))


def run_plainly(row: dict, program: str, folder: Path, seconds: float = 5) -> bool:
    """Returns True if a program passes a row's test in a plain process of its own."""
    path = folder / "plain.py"
    path.write_text(f"{row['prompt']}\n{program}\n{row['test']}\ncheck({row['entry_point']})\n")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", path], capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
