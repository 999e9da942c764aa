"""The argument of a recipe, what follows the colon in --config=configs/NAME.py:ARGUMENT."""

from types import SimpleNamespace
from typing import Any


def parse_argument(recipe: str, arg: str, **choices: tuple[str, ...]) -> Any:
    """The choices in `arg`, and whether it says `tiny`: `student=8b,tiny`, in any order.

    Of each choice the first is taken where `arg` is silent. Its name may be left out where no
    other choice has the value: `opd` for `condition=opd`.

    Raises:
      ValueError: naming the word that is no argument of the recipe, and those that are.
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
