"""Text for people: durations, tables, and the lines that end a verb."""

import shlex
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """Returns a duration as people say it: 0.42 s, 42 s, 3 min, 2 h 5 min, 14 h, 3.4 days."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60:.0f} h" if minutes < 2880 else f"{minutes / 1440:.1f} days"


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Renders rows of cells, the first of them the titles, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def format_command(verb: str, *arguments: object, **flags: object) -> str:
    """Returns a command as one types it in a shell, without the flags that are empty."""
    words = [f"--{name}={value}" for name, value in flags.items() if value not in ("", None)]
    words = [shlex.quote(str(word)) for word in (*arguments, *words)]
    return " ".join([f"python -m distill.{verb}", *words])


def format_sft_command(data: str) -> str:
    """Returns the command that trains a student, which the reader names, on responses."""
    flags = {
        "config": "configs/base.py",
        "config.stages": '("sft",)',
        "config.student.path": "STUDENT",
        "config.sft.data.source": data,
        "workdir": "runs/sft",
    }
    return format_command("train", **flags)


def print_end(made: Sequence[str], next_commands: Sequence[str] = ()) -> None:
    """Says what a verb made and where, a line each, and the commands that usually follow.

    On stderr, like all that is not the result itself, which other programs may read.
    """
    from distill.runtime import run_files

    lines = [*made, *(["next:"] if next_commands else []), *(f"  {x}" for x in next_commands)]
    for line in lines:
        run_files.log_line(line)
