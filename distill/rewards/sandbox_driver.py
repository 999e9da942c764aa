"""Runs inside the sandbox, before and around a program. Started as `python -c`, never trusted.

Three modes: `script` becomes the program. `calls` imports it and answers calls of its functions, so
that whoever asks compares the values. `checks` runs assertions, whose functions under test are
remote: they live in another sandbox, in the mode `calls`. So a program never shares a process with
what judges it, and it can change the verdict only by the values that it returns.

Values travel as JSON: what JSON has as itself, a list too; other plain values as {"tag": content};
anything else stays where it is, and a handle to it travels. A handle equals nothing but itself, so
that a program cannot return an object that is equal to everything.

Imports the standard library only, and little of that: it starts once for each program.
"""

import os
import sys

MAX_ITEMS = 1_000_000  # of an iterator that a function returns

# Errors of a remote function that its caller may expect; any other arrives as Exception.
SIMPLE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, LookupError),
    *(NotImplementedError, OverflowError, RecursionError, RuntimeError, StopIteration),
    *(TypeError, ValueError, ZeroDivisionError, MemoryError),
)

# Indices of the arguments after -c; `distill.rewards.sandbox` writes them.
MODE, CHANNEL, STATUS, USER, CPU_SECONDS, MEMORY, FILE_BYTES, PROCESSES = range(1, 9)


class UnsupportedError(TypeError):
    """A value that cannot travel."""


class Handle:
    """A value of another process. Asks it by `ask`, which takes (operation, handle, arguments)."""

    def __init__(self, name, ask):
        self.__dict__.update(_name=name, _ask=ask)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, [args, kwargs])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name, value):
        self._ask("set", self, [name, value])


def encode_value(value, keep):
    """Converts a value to what JSON can hold; `keep(value)` returns a handle's name for the rest.

    An instance of a subclass travels as the plain value that it extends.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)

    def encode_all(items):
        return [encode_value(item, keep) for item in items]

    if isinstance(value, list):
        return encode_all(list.__iter__(value))
    if isinstance(value, tuple):
        return {"tuple": encode_all(tuple.__iter__(value))}
    if isinstance(value, dict):
        return {"dict": [encode_all(pair) for pair in dict.items(value)]}
    if isinstance(value, set):
        return {"set": encode_all(set.__iter__(value))}
    if isinstance(value, frozenset):
        return {"frozenset": encode_all(frozenset.__iter__(value))}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, type({}.keys())):
        return {"keys": encode_all(value)}
    if hasattr(type(value), "__next__"):
        import itertools

        return {"iterator": encode_all(itertools.islice(value, MAX_ITEMS))}
    return {"handle": keep(value)}


def decode_value(value, find):
    """Converts `encode_value`'s result back; `find(name)` returns the value of a handle.

    Raises ValueError, TypeError, KeyError or another error of the standard library for anything
    else: what a program writes is not to be trusted.
    """
    if isinstance(value, list):
        return [decode_value(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "handle":
        return find(content)
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content)
    items = decode_value(content, find)
    if kind == "dict":
        return dict(items)
    if kind == "keys":
        return dict.fromkeys(items).keys()
    if kind in ("complex", "range"):
        return {"complex": complex, "range": range}[kind](*items)
    makers = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    return makers[kind](items)


def limit_process(arguments):
    """Gives up root where `sandbox` says so, and limits this process and those it starts."""
    import resource

    def limit(kind, amount):
        resource.setrlimit(kind, (amount, amount))

    user = arguments[USER]
    if user >= 0:
        os.chmod(".", 0o777)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CPU, arguments[CPU_SECONDS])
    limit(resource.RLIMIT_FSIZE, arguments[FILE_BYTES])
    limit(resource.RLIMIT_AS, arguments[MEMORY])
    limit(resource.RLIMIT_NPROC, arguments[PROCESSES])


def write_source(name, source):
    """Writes a program into this folder. Some hold lone surrogates, which Python then refuses."""
    with open(name, "wb") as file:
        file.write(source.encode("utf-8", "surrogatepass"))


def become_script(channel):
    """Replaces this process by the program that the channel holds."""
    with open(channel, "rb") as source, open("main.py", "wb") as file:
        file.write(source.read())
    os.execv(sys.executable, [sys.executable, "-S", "-s", "-B", "main.py"])


def execute(module, name, source):
    """Executes a source text in the namespace of a module."""
    import importlib.machinery

    write_source(name + ".py", source)
    importlib.machinery.SourceFileLoader(module.__name__, name + ".py").exec_module(module)


def answer_calls(channel):
    """Imports the program that the channel's first line holds, and answers its further lines.

    A line is [operation, target, content], all encoded, and an answer [value, the arguments after
    the call] or {"raised": name}.
    """
    import json
    import types

    sys.set_int_max_str_digits(0)
    requests = open(channel, "rb", closefd=False)  # noqa: SIM115
    answers = open(channel, "wb", closefd=False)  # noqa: SIM115
    program, kept = types.ModuleType("program"), []
    sys.modules["program"] = program

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    def find(name):
        return getattr(program, name) if isinstance(name, str) else kept[name]

    def run(operation, target, content):
        if operation == "get":
            return [encode_value(getattr(target, content), keep), None]
        if operation == "set":
            setattr(target, *content)
            return [None, None]
        args, kwargs = content
        before = encode_value(args, keep) if any(hasattr(a, "clear") for a in args) else None
        value = encode_value(target(*args, **kwargs), keep)
        after = before and encode_value(args, keep)
        return [value, None if after == before else after]

    def answer(content):
        answers.write(json.dumps(content).encode() + b"\n")
        answers.flush()

    try:
        execute(program, "program", json.loads(requests.readline()))
        answer([True, None])
    except BaseException as error:
        answer({"raised": type(error).__name__})
        os._exit(0)
    for line in requests:
        try:
            request = decode_value(json.loads(line), find)
            reply = run(*request)
        except SystemExit:
            os._exit(0)
        except BaseException as error:
            reply = {"raised": type(error).__name__}
        answer(reply)


def make_asker(channel):
    """Returns the `ask` of handles to what is on the other side of the channel."""
    import builtins
    import json

    requests = open(channel, "wb", closefd=False)  # noqa: SIM115
    answers = open(channel, "rb", closefd=False)  # noqa: SIM115

    def refuse(value):
        if isinstance(value, Handle):
            return value._name
        raise UnsupportedError(f"it passes an argument of type {type(value).__name__}")

    def find(name):
        return Handle(name, ask)

    def receive():
        line = answers.readline()
        if not line:
            raise EOFError("the program ended")
        content = json.loads(line)
        if isinstance(content, dict):
            kind = getattr(builtins, str(content["raised"]), None)
            raise kind() if kind in SIMPLE_ERRORS else Exception()
        value, after = content
        return decode_value(value, find), after

    def ask(operation, handle, content):
        request = json.dumps(encode_value([operation, handle, content], refuse))
        requests.write(request.encode() + b"\n")
        requests.flush()
        value, after = receive()
        if operation == "call" and after is not None:
            for old, new in zip(content[0], decode_value(after, find), strict=True):
                update_argument(old, new)
        return value

    return ask, receive, requests


def update_argument(old, new):
    """Does to an argument what the call did to it on the other side."""
    if isinstance(old, list | bytearray) and type(new) is type(old):
        old[:] = new
    elif isinstance(old, dict | set) and isinstance(new, dict | set):
        old.clear()
        old.update(new)


def run_checks(channel, status):
    """Runs assertions on remote functions, and writes what became of each as a line to `status`.

    Standard input is JSON: `program`, `names` of its functions and classes that the tests use,
    `setup`, a source text that runs before them, and `tests`, source texts.
    """
    import json
    import types

    sys.set_int_max_str_digits(0)
    task = json.loads(sys.stdin.buffer.read())
    ask, receive, requests = make_asker(channel)
    requests.write(json.dumps(task["program"]).encode() + b"\n")
    requests.flush()
    module = types.ModuleType("checks")
    sys.modules["checks"] = module
    remote = {name: Handle(name, ask) for name in task["names"]}

    def attempt(action):
        try:
            action()
        except UnsupportedError as error:
            return {"unsupported": str(error)}
        except (ImportError, NameError) as error:  # of the tests: no remote error arrives as these
            return {"unsupported": f"{type(error).__name__}: {error}"}
        except BaseException as error:
            return {"raised": type(error).__name__}
        return {}

    def prepare():
        module.__dict__.update(remote)
        execute(module, "setup", task["setup"])
        module.__dict__.update(remote)

    loaded = attempt(receive)
    report = [loaded or attempt(prepare)]
    for number, test in enumerate(task["tests"] if not loaded else ()):
        report.append(attempt(lambda: execute(module, f"test_{number}", test)))  # noqa: B023
    os.write(status, json.dumps(report).encode() + b"\n")
    os._exit(0)


def main():
    mode, *numbers = sys.argv[1:]
    arguments = [None, mode, *map(int, numbers)]
    limit_process(arguments)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    channel, status = arguments[CHANNEL], arguments[STATUS]
    os.write(status, b"started\n")
    if mode == "checks":
        run_checks(channel, status)
    os.close(status)
    if mode == "script":
        become_script(channel)
    answer_calls(channel)


if __name__ == "__main__":
    main()
