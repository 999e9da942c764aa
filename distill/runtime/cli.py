"""The entry point shared by all verbs: flags in, exit code out.

A verb defines absl flags at module level and ends in `if __name__ == "__main__": cli.run(main)`.
Verbs whose flag names clash with those of others define them on their own FlagValues, so that all
can be imported together, and end in `cli.run(main, OPTIONS)`.
Exit codes: 0 success; 1 an unexpected exception (with its traceback), unless the verb calls
`sys.exit` with another code; 2 a user's mistake, or what the machine lacks (memory, a device, a
network, room on a disk), reported in one line on stderr; 128 + N stopped by signal N: 130 by
Ctrl-C, 143 by SIGTERM.
JAX is not imported here, so that verbs that only read files start quickly.
"""

import atexit
import contextlib
import errno
import gc
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from distill.runtime import failures, gpu, paths, stop_signals, usage
from models.errors import UserError, UserErrors, suggest

_HELP = ("-h", "-help", "--h", "--help")

# What the machine refuses, however right the program is: a full disk, no permission, a bad name.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE),
}


def run(
    main: Callable[[], None],
    options: flags.FlagValues = flags.FLAGS,
    arguments: list[str] | None = None,
) -> None:
    """Parses sys.argv into `options`, calls `main` and turns a user's mistakes into exit codes.

    arguments: receives what is not an option; None: a verb that takes nothing else.
    """
    # By default, the garbage of every 700 new objects is looked for, now and then among those of
    # all libraries: a sixth of the time of a verb's start. At the end, the same for nothing.
    gc.set_threshold(20_000)
    atexit.register(gc.freeze)
    with contextlib.suppress(AttributeError):  # of a stand-in for the terminal, in tests
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        if any(arg in _HELP for arg in sys.argv[1:]):
            _print_help(options)
        _parse_flags(sys.argv, options, arguments)
        gpu.set_xla_flags()
        _set_threads()
        # A traceback of many lines, also where no GPU is wanted; failures.py says it in one.
        logging.getLogger("jax._src.xla_bridge").addFilter(
            lambda record: not str(record.msg).startswith("Jax plugin configuration error")
        )
        # Each retry would be said twice; the error after the last one says what is wrong.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
        with stop_signals.StopSignals() as signals, signals.interrupt():
            main()
    except Exception as error:
        if isinstance(error, UserErrors):
            _exit_with_error(*error.messages)
        message = _explain_error(error, options)
        if message is None:
            raise
        _exit_with_error(message)
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        code = 128 + getattr(error, "number", signal.SIGINT)
        if "coordinator_address" in options and options["coordinator_address"].value:
            sys.exit(code)  # the other processes are told
        _end_process(code)


def _print_help(options: flags.FlagValues) -> NoReturn:
    try:
        usage.print_usage(options)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `--help | head`
        _end_process(0)
    sys.exit(0)


def _end_process(code: int) -> NoReturn:
    """Ends the process as it is. An interruption leaves work undone in XLA's threads, such as the
    compilation of a program; where Python first takes down what they use, they end in a
    segmentation fault."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _explain_error(error: Exception, options: flags.FlagValues) -> str | None:
    """Returns the line about a mistake of the user, or what the machine lacks; else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    given = [name for name in options if options[name].value is not None]
    return failures.explain_failure(error, given)


def _set_threads() -> None:
    """Gives XLA more threads than the CPU has cores if the CPU simulates several devices.

    A device that waits in a collective occupies a thread. With fewer threads than devices, those
    that the others wait for cannot run, and XLA aborts the process after 40 s.
    """
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdigit() and int(devices) > 1:
        os.environ.setdefault("NPROC", str(4 * int(devices)))  # read by XLA


def _exit_with_error(*messages: str) -> NoReturn:
    for message in messages:
        print("error:", paths.escape_controls(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def define_model_flags(
    options: flags.FlagValues,
    required: bool = True,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    about: str = "Model directory, hub id or run directory.",
) -> tuple[flags.FlagHolder[str], flags.FlagHolder[str]]:
    """Defines --model and --dtype and returns them."""
    default = None if required else ""
    model = flags.DEFINE_string("model", default, about, options, required=required)
    about = "Dtype of weights and computation. Default: bfloat16; on CPUs float32, faster there."
    return model, flags.DEFINE_enum("dtype", "", ["", *dtypes], about, flag_values=options)  # pyright: ignore[reportReturnType]


def define_server_flags(options: flags.FlagValues) -> None:
    """Defines the flags of a verb whose --model may be the address of a server."""
    for name, about in (
        ("served_model", "Name of the model on the server. Default: the only one that it serves."),
        ("api_key_env", "Name of the environment variable with the server's bearer token."),
        (
            "tokenizer",
            "Directory or hub id of the served model's tokenizer: prompts are then rendered here "
            "and sent as token ids. Default: the server renders them.",
        ),
    ):
        about = f"With --model=http://...: {about}"
        flags.DEFINE_string(name, "", about, flag_values=options)


def read_server_flags(options: flags.FlagValues) -> dict[str, Any]:
    """Returns the values of `define_server_flags`' flags by name."""
    return {name: options[name].value for name in ("served_model", "api_key_env", "tokenizer")}


def check_server_flags(options: flags.FlagValues, is_server: bool, *unread: str) -> None:
    """Raises UserError for a flag that would not be read: one about a server if the model is none,
    or one of `unread` and those of several processes if it is."""
    if not is_server:
        for name, value in read_server_flags(options).items():
            if value:
                raise UserError(f"--{name}: is read with --model=http://... only")
        return
    for name in (*unread, "coordinator_address", "num_processes", "process_id"):
        if options[name].present and options[name].value:
            raise UserError(f"--{name}: is not read with --model=http://..., which runs elsewhere")


def define_process_flags(options: flags.FlagValues) -> None:
    """Defines the flags of a verb that several processes can run together."""
    flags.DEFINE_string(
        "coordinator_address",
        os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "For runs of several processes: HOST:PORT of process 0, the same for all, with "
        "--num_processes and --process_id; or auto: a TPU slice, Slurm or MPI provides all three. "
        "Default: JAX_COORDINATOR_ADDRESS, or one process.",
        flag_values=options,
    )
    for name, meaning in (
        ("num_processes", "Number of processes"),
        ("process_id", "Index of this process, from 0"),
    ):
        default = os.environ.get(f"JAX_{name.upper()}")
        description = f"{meaning}. Default: JAX_{name.upper()}."
        flags.DEFINE_integer(name, default, description, lower_bound=0, flag_values=options)


def define_sampling_flags(options: flags.FlagValues, **defaults: Any) -> None:
    """Defines the flags shared by verbs that sample; those not in `defaults` default to None."""
    integers = {
        "samples": (1, "Responses per prompt."),
        "max_new_tokens": (
            1,
            "Maximum length of a response, in tokens. Default: 1024, or the protocol's; less where "
            "the model's positions leave less.",
        ),
        "top_k": (0, "Samples from the K most likely tokens; 0: off."),
        "seed": (0, "Random seed for sampling."),
        "batch_size": (1, "Responses sampled at a time; of a server, requests in flight."),
    }
    for name, (least, about) in integers.items():
        flags.DEFINE_integer(name, defaults.get(name), about, least, flag_values=options)
    floats = {
        "temperature": (0.0, "Divides the logits; 0: greedy."),
        "top_p": (
            None,
            "Samples from the most likely tokens with this total probability; 1: off.",
        ),
        "min_p": (None, "Minimum probability relative to the most likely token's; 0: off."),
        "presence_penalty": (
            None,
            "Subtracted from the logits of tokens in the response; 0: off.",
        ),
    }
    for name, (least, about) in floats.items():
        flags.DEFINE_float(name, defaults.get(name), about, least, flag_values=options)
    about = "The chat template's thinking switch."
    flags.DEFINE_enum("thinking", defaults.get("thinking"), ["on", "off"], about, options)


def read_sampling_flags(options: flags.FlagValues) -> dict[str, Any]:
    """Returns the values of `define_sampling_flags`' flags; `thinking` as True, False or None."""
    names = ("samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    names += ("presence_penalty", "seed", "batch_size", "thinking")
    values = {name: options[name].value for name in names}
    return values | {"thinking": {None: None, "on": True, "off": False}[values["thinking"]]}


def _parse_flags(
    argv: list[str], options: flags.FlagValues, arguments: list[str] | None = None
) -> None:
    """Parses the flags, with home directories in their paths, and in those of a config, expanded.

    Every failure here is a user's mistake, so it raises UserError only."""
    try:
        rest = options(_expand_config_files(argv))
    except UserError:
        raise
    except Exception as error:
        message = _explain_parse_error(error, argv)
        if "--check" in argv:
            _list_parse_errors(message, argv, options)
        raise UserError(message) from error
    if arguments is not None:
        arguments[:] = rest[1:]
    elif len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value")
    paths.expand_flags(options)
    for name in options:
        if config_flags.is_config_flag(options[name]):
            _check_config(name, options[name])
            if options[name].value is not None:  # a verb may do without
                paths.expand_config(options[name].value, name)


def _list_parse_errors(message: str, argv: list[str], options: flags.FlagValues) -> None:
    """Raises UserErrors for an error in a flag, and for those in the flags that are not tried after
    it: each that is refused is left out, and the others are tried again."""
    messages = [message]
    while match := re.search(r"(?:--|flag ')([\w.]+)", messages[-1]):
        rest = [arg for arg in argv if arg.lstrip("-").partition("=")[0] != match[1]]
        if len(rest) == len(argv) or match[1] == "config":
            break
        argv = sys.argv = rest  # where the flag of a config looks for its keys
        options.unparse_flags()
        for key in [name for name in options if "." in name]:  # defined by those that were parsed
            delattr(options, key)
        try:
            options(_expand_config_files(argv))
            break
        except Exception as error:
            messages.append(_explain_parse_error(error, argv))
    raise UserErrors(messages)


def _expand_config_files(argv: list[str]) -> list[str]:
    """Expands the path in --config=~/file.py:ARGUMENT, which is read while flags are parsed; the
    file may also be the next argument."""
    expanded: list[str] = []
    rest = iter(argv)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            value = value if equals else next(rest, "")
            if not value or value.startswith("-"):
                raise UserError("--config: needs a file: options are written --name=value")
            file, colon, argument = value.partition(":")
            arg = f"{name}={paths.expand_input(file)}{colon}{argument}"
        expanded.append(arg)
    return expanded


def _check_config(name: str, flag: flags.Flag) -> None:
    """Raises UserError if the config file is unreadable: ml_collections defers that error until the
    config is accessed."""
    config: Any = flag.value
    try:
        _ = config and config.is_locked
    except OSError as error:
        filename = config_flags.get_config_filename(flag)
        reason = str(error.__cause__).strip().splitlines()[-1].strip()
        file = filename.partition(":")[0]
        if not os.path.exists(file):  # the config may itself miss a file
            reason = f"no such file{paths.suggest_path(file)}"
        raise UserError(f"--{name}={filename}: {reason}") from error


def _explain_parse_error(error: Exception, argv: list[str]) -> str:
    """Returns a one-line message for an error raised while parsing `argv`."""
    message = str(error).strip()
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname.partition(".")[0]
        if name != error.flagname:
            return f"--{error.flagname} needs --{name}=FILE before it"
        return message
    if required := re.match(r"flag --(\S+)=None: .* must have a value other than None", message):
        return f"--{required[1]} is required"
    if isinstance(error, config_flags.UnsupportedOperationError):
        return message.partition(". ")[0]
    if isinstance(error, flags.Error):
        # A ValueError or TypeError raised by the config file arrives with its traceback inside.
        head, wrapped, trace = message.partition("Error whilst parsing config file:")
        if wrapped:
            last = trace.strip().splitlines()[-1].removeprefix("ValueError: ")
            return f"{head.removeprefix('flag ')}{last}"
        return _explain_wrong_type(message.removeprefix("flag "))
    libraries = ("absl", "ml_collections", "importlib", os.path.basename(__file__))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not any(name in f.filename for name in libraries)]
    if ours:  # raised by the config file or one of its imports
        reason = _explain_missing_key(error) or f"{type(error).__name__}: {message}"
        return f"{ours[-1].filename}:{ours[-1].lineno}: {reason}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    if message.endswith("has no attribute 'get_config'"):
        file = next((arg for arg in argv if arg.lstrip("-").startswith("config")), "--config")
        return f"{file}: has no function get_config, which returns the config"
    return _explain_unknown_key(message, argv) or f"{type(error).__name__}: {message}"


def _explain_wrong_type(message: str) -> str:
    """Returns a message about a flag's value, with what is wanted in place of Python's words."""
    message = re.sub(r"invalid literal for int\(\) with base 10: .*", "is not an integer", message)
    return re.sub(
        r"\('Non-boolean argument to boolean flag', .*", "is neither true nor false", message
    )


def _explain_missing_key(error: Exception) -> str | None:
    """Returns what is wrong if a config file reads or sets a key that its config does not have."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    values = frame.f_locals
    config: Any = values.get("self")
    key = values.get("key", values.get("attribute"))
    if not (type(config) is ConfigDict and isinstance(key, str)) or key in config:
        return None
    hint = suggest(key, config) or f"; here are {', '.join(config)}"
    return f"{key!r}: no such key in the config{hint}"


def _explain_unknown_key(message: str, argv: list[str]) -> str | None:
    """Returns a one-line message if `message` is about an override in `argv` of an unknown key."""
    words = message.replace("\\'", "'").strip("\"'")
    key = re.match(r"\w+", words)
    hint = re.search(r'Did you mean \\?"(\w+)', words)
    for arg in argv[1:]:
        name = arg.partition("=")[0].lstrip("-")
        if key and key[0] in name.split(".")[1:]:
            suggestion = f"; did you mean {hint[1]!r}?" if hint else ""
            return f"--{name}: no such key in the config{suggestion}"
    return None
