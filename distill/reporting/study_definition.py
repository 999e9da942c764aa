"""Checks the definition of a study, study.json: what its page needs, field by field."""

import json
from collections.abc import Sequence
from typing import Any

from distill.reporting.read import Record, as_record, is_number
from models.errors import UserError

_MAX_WEIGHT = 1000  # of an arm in a contrast
_EXPECTED = ("above", "below", "none")
_WORDS = {str: "a text", list: "a list", bool: "true or false", dict: "an object"}
# Fields by their types; those marked * must be there.
_FIELDS = {"*study": str, "title": str, "question": str, "command": str}
_LISTS = {
    "arms": {"*name": str, "about": str, "tuned": bool},
    "figures": {"*key": str, "title": str, "format": str},
    "curves": {"*x": str, "*y": str, "title": str, "log_x": bool},
    "claims": {
        **{"*kind": str, "*figure": str, "name": str, "claimed": str, "source": str},
        **{"verdict_explained": str, "why": str, "settle": str, "unit": str},
    },
}
_TUNING = {"problems": str, "figure": str, "budget": str}


def check_definition(record: Record, where: str) -> None:
    """Raises UserError naming the first field that is wrong.

    Args:
      where: the file, for the message.
    """
    _check_fields(record, _FIELDS, where, "")
    _check_seeds(record.get("seeds"), where, "seeds")
    for key, fields in _LISTS.items():
        rows = record.get(key, [])
        _check_type(rows, list, where, key)
        for number, row in enumerate(rows):
            _check_type(row, dict, where, f"{key}[{number}]")
            _check_fields(row, fields, where, f"{key}[{number}].")
        if not rows and key in ("arms", "figures"):
            raise UserError(f"{where}: {key}: names none")
    names = [arm["name"] for arm in record["arms"]]
    for number, arm in enumerate(record["arms"]):
        if arm["name"] in names[:number]:
            raise UserError(
                f"{where}: arms[{number}].name: {show(arm['name'])} is an earlier arm's"
            )
        _check_seeds(arm.get("seeds", record["seeds"]), where, f"arms[{number}].seeds")
    if record.get("tuning") is not None:
        _check_type(record["tuning"], dict, where, "tuning")
        _check_fields(record["tuning"], _TUNING, where, "tuning.")
    for number, claim in enumerate(record.get("claims", [])):
        if problem := _find_problem(claim, names):
            raise UserError(f"{where}: claims[{number}].{problem}")


def show(value: Any) -> str:
    """Returns the beginning of a value as JSON."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_type(value: Any, kind: type, where: str, field: str) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{where}: {field}: {show(value)} is not {_WORDS[kind]}")


def _check_fields(record: Record, fields: dict[str, type], where: str, prefix: str) -> None:
    for name, kind in fields.items():
        key = name.removeprefix("*")
        if name.startswith("*") or key in record:
            _check_type(record.get(key), kind, where, prefix + key)


def _check_seeds(seeds: Any, where: str, field: str) -> None:
    _check_type(seeds, list, where, field)
    if not seeds or not all(type(x) is int for x in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: {field}: {show(seeds)} are not different integers")


def _find_problem(claim: Record, arms: Sequence[str]) -> str:
    """Returns the field of a claim that is wrong, and why; "" if none is."""
    kinds = {"contrast": _check_contrast, "reach": _check_reach, "slope": _check_slope}
    if claim["kind"] not in kinds:
        return f"kind: {show(claim['kind'])} is none of {', '.join(kinds)}"
    claimed = claim.get("claimed_range")
    is_range = isinstance(claimed, list) and len(claimed) == 2 and all(map(is_number, claimed))
    if claimed is not None and not (is_range and claimed[0] <= claimed[1]):
        return f"claimed_range: {show(claimed)} is not [low, high]"
    problem, named = kinds[claim["kind"]](claim)
    for key, name in named:
        if not problem and name not in arms:
            return f"{key}: {show(name)} is not among the arms"
    return problem


def _check_contrast(claim: Record) -> tuple[str, list[tuple[str, Any]]]:
    """Returns the problem or "", and the arms that are named, with their fields."""
    weights, expected = as_record(claim.get("weights")), claim.get("expected")
    named = [("weights", name) for name in weights]
    if not weights or not all(map(is_number, weights.values())):
        return f"weights: {show(claim.get('weights'))} are not numbers by arm", named
    if max(map(abs, weights.values())) > _MAX_WEIGHT:
        return f"weights: {show(weights)}: at most {_MAX_WEIGHT} each", named
    if expected not in _EXPECTED:
        return f"expected: {show(expected)} is none of {', '.join(_EXPECTED)}", named
    if expected == "none" and not is_number(claim.get("margin")):
        return f"margin: {show(claim.get('margin'))} is not a number", named
    return "", named


def _check_reach(claim: Record) -> tuple[str, list[tuple[str, Any]]]:
    named = [(key, claim.get(key)) for key in ("fast", "slow")]
    if not isinstance(claim.get("axis"), str):
        return f"axis: {show(claim.get('axis'))} is not a text", named
    if claim.get("at") is not None and not is_number(claim["at"]):
        return f"at: {show(claim['at'])} is not a number", named
    return "", named


def _check_slope(claim: Record) -> tuple[str, list[tuple[str, Any]]]:
    amounts, cost = as_record(claim.get("amounts")), claim.get("cost")
    named = [("amounts", name) for name in amounts]
    if claim.get("reach_of") is not None:
        named.append(("reach_of", claim["reach_of"]))
    values = list(amounts.values())
    is_line = len(values) > 1 and all(is_number(x) and x > 0 for x in values)
    if not is_line or max(values) < 1.01 * min(values):
        return f"amounts: {show(claim.get('amounts'))} are not different amounts above 0", named
    if cost is not None and not (isinstance(cost, str) and claim.get("reach_of")):
        return f"cost: {show(cost)} is not a text beside `reach_of`", named
    return "", named
