"""Parses the argument of a recipe, which follows the colon in --config=configs/NAME.py:ARGUMENT."""

from types import SimpleNamespace
from typing import Any


def parse_argument(recipe: str, arg: str, **choices: tuple[str, ...]) -> Any:
    """Parses an argument such as `student=8b,tiny`, its words in any order.

    Args:
      recipe: name of the recipe, for messages.
      choices: allowed values of each choice; the first is the default. The name may be left out
        where no other choice has the value: `opd` for `condition=opd`.

    Returns:
      An attribute for each choice, and `tiny`, a bool.

    Raises:
      ValueError: naming the word that the recipe does not take, and those that it takes.
    """
    parsed: dict[str, Any] = {"tiny": False}
    for word in arg.split(",") if arg else ():
        name, separator, value = word.partition("=")
        if not separator:
            owners = [owner for owner, values in choices.items() if word in values]
            name, value = (owners[0], word) if len(owners) == 1 else (word, "")
        known = word == "tiny" or value in choices.get(name, ())
        if not known or parsed.get(name):
            allowed = [f"{owner}={'|'.join(values)}" for owner, values in choices.items()]
            twice = "a second " if known else ""
            raise ValueError(
                f"configs/{recipe}.py takes {', '.join([*allowed, 'tiny'])}, not {twice}{word!r}"
            )
        parsed[name] = value or True
    defaults = {name: values[0] for name, values in choices.items()}
    return SimpleNamespace(**{**defaults, **parsed})
