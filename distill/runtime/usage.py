"""Usage of a verb, as --help prints it: what it does, its flags, and how a config's keys are set.

JAX is not imported here, so that --help is printed at once.
"""

import sys
import textwrap

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from distill.runtime import paths

_WIDTH = 100
_CONFIG = "The recipe: a Python file that returns a run's config; after the colon, its argument."


def print_usage(options: flags.FlagValues) -> None:
    """Prints the main module's docstring, and every flag that its verb defines."""
    print((sys.modules["__main__"].__doc__ or "").strip())
    print("\nFlags:")
    for name in options:
        if "." not in name and not str(options.find_module_defining_flag(name)).startswith("absl."):
            print(_describe_flag(options[name]))
    if any(config_flags.is_config_flag(options[name]) for name in options):
        print(_explain_keys())


def _describe_flag(flag: flags.Flag) -> str:
    value, about = flag.name.upper(), " ".join(str(flag.help).split())
    if config_flags.is_config_flag(flag):
        value, about = "FILE.py[:ARGUMENT]", _CONFIG
    elif isinstance(flag, flags.EnumFlag):
        value, about = "|".join(filter(None, flag.parser.enum_values)), about.partition(": ")[2]
    about = about.replace("; repeat this option to specify a list of values", " May be repeated.")
    usage = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
    if any("must have a value other than None" in x.message for x in flag.validators):
        about += " Required."
    elif isinstance(flag.default, ConfigDict):
        about += f" Default: {getattr(flag, 'config_filename', '')}."
    elif flag.default not in (None, "", [], False) and "default" not in about.lower():
        shown = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        about += f" Default: {shown}."
    indent = " " * 6
    lines = textwrap.fill(about, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"  {usage}\n{lines}"


def _explain_keys() -> str:
    """Says how a config's keys are set, and where all of them are listed."""
    return f"""
Keys of the config:
  Each is a flag of its own, after --config. `opd` is the name of a stage:
      --config.student.path=models/mine --config.opd.steps=200 --config.opd.data.source=rows.jsonl
  All keys, with their defaults, units and consequences, are listed in
      {paths.find_project_file("configs/base.py")}"""
