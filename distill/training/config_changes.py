"""Says which keys of a config may change when a run is resumed.

A change is allowed if the steps that are done would have been the same with it, bit for bit or but
for rounding. So whatever belongs to a stage that has not begun may change, and a stage may become
longer or shorter than it was, down to its steps that are done.
"""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from distill.teachers import external
from distill.training import stages

EXACT = "nothing that is trained depends on it"
ROUNDING = "the same but for rounding"
SAME_CONTENT = "the same content"
NOT_BEGUN = "no step that is done used it"
DEVICES = "token budgets and load-balancing losses depend on the devices, so samples may differ"

# What a changed key does to the steps of a run; the first pattern that matches a key counts. All
# others change what is trained.
RUN_KEYS = {
    "log.overlap_top_k": ROUNDING,  # computed in the program that trains
    "checkpoint.*": EXACT,
    "log.*": EXACT,
    "eval.*": EXACT,
    "alerts.*": EXACT,
    "compilation_cache": EXACT,
    "mesh.*": ROUNDING,
    "teacher_mesh.*": ROUNDING,
    "attention": ROUNDING,
    "deterministic": ROUNDING,
    "loss_chunk_mib": ROUNDING,
    "student.remat": ROUNDING,
}
STAGE_KEYS = {
    "accumulate": ROUNDING,
    "pack_tokens": ROUNDING,  # of samples; of traces it decides which are trained together
    "rollout.slots": ROUNDING,
    "rollout.segment": ROUNDING,
    "rollout.prefill_chunk": ROUNDING,
    "rollout.cache_tokens": ROUNDING,
    "rollout.page_size": ROUNDING,
    "rollout.gather_weights": ROUNDING,
    "rollout.drafts": ROUNDING,
    "rollout.draft_tokens": ROUNDING,
    "data.on_bad_row": EXACT,  # a run that fails has met no bad row
    "data.check_rows": EXACT,
}
# Keys that an earlier version did not have, and their values that change nothing.
UNSET = {
    **{"response_schedule": [], "drift": {"kl": 0.0, "every": 256}},
    **dict.fromkeys(("loss.position_half_life", "loss.entropy_weight", "loss.entropy_from")),
}
# Of a teacher that has begun to teach: settings of requests to servers.
TEACHER_KEYS = {"timeout_seconds": EXACT, "max_in_flight": EXACT, "api_key_env": EXACT}


@dataclasses.dataclass(frozen=True)
class Change:
    """A key that differs, with `reason` why that is allowed; "" if it is not."""

    key: str
    text: str  # "KEY was A, now B", and what follows from it
    reason: str
    input_key: str = ""  # of the input whose content decides


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a run has done: `begun` stages, and in the last of them `stage_steps` steps."""

    begun: list[str]
    stage_steps: int
    teachers: set[str]  # that they need


def compare_configs(
    before: dict[str, Any], c: ConfigDict, steps_done: int, input_keys: Collection[str] = ()
) -> list[Change]:
    """Compares a run's config, as JSON, with the one that resumes it after `steps_done` steps.

    Args:
      input_keys: of inputs whose content is compared, so that their names do not count.

    Returns:
      The differences, sorted by key, without those in sub-configs that nothing uses.
    """
    now = json.loads(c.to_json_best_effort())
    progress = _find_progress(before, c, steps_done)
    # A pair of a mixture begins with its name.
    inputs = {key + end: key for key in input_keys for end in ("", "[0]")}
    changes = []
    for key, old, new in sorted(_find_differences(before, now, "config"), key=lambda x: x[0]):
        text = f"{key} was {_to_text(old)}, now {_to_text(new)}"
        if key in inputs:
            changes.append(Change(key, text, SAME_CONTENT, inputs[key]))
        elif _is_used(key, before, now):
            reason, consequence = _judge_change(key, progress, before, now)
            changes.append(Change(key, text + consequence, reason))
    return changes


_MISSING = object()


def _to_text(value: Any) -> str:
    return "not there" if value is _MISSING else repr(value)


def _find_differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, old, new) for each leaf that differs. The list of stages is one leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() | now.keys():
            values = before.get(name, _MISSING), now.get(name, _MISSING)
            yield from _find_differences(*values, f"{key}.{name}")
    elif (
        isinstance(before, list)
        and isinstance(now, list)
        and len(before) == len(now)
        and (key != "config.stages")
    ):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from _find_differences(*pair, f"{key}[{i}]")
    elif before != now:
        yield key, before, now


def _find_progress(before: dict[str, Any], c: ConfigDict, steps_done: int) -> _Progress:
    begun, first_step, stage_steps, teachers = [], 0, 0, set()
    for name in before["stages"]:
        if first_step >= steps_done:
            break
        begun.append(name)
        stage_steps = steps_done - first_step
        first_step += before[name]["steps"]
        if name in c.stages:
            loss, _ = stages.resolve_objective(name, c[name])
            if stages.reads_teachers(c, c[name], loss):
                teachers |= set(before[name]["teachers"])
    return _Progress(begun, stage_steps, teachers)


def _is_stage(config: dict[str, Any], name: str) -> bool:
    return isinstance(config.get(name), dict) and "objective" in config[name]


def _is_teacher(config: dict[str, Any], name: str) -> bool:
    return name != "student" and isinstance(config.get(name), dict) and "step" in config[name]


def _is_used(key: str, *configs: dict[str, Any]) -> bool:
    """Returns False for a key of a stage that no config runs, or of a teacher that none names."""
    name = key.split(".")[1]
    used = {stage for config in configs for stage in config["stages"]}
    if any(_is_stage(config, name) for config in configs):
        return name in used
    if any(_is_teacher(config, name) for config in configs):
        return any(
            name in config[stage]["teachers"]
            for config in configs
            for stage in used
            if _is_stage(config, stage)
        )
    return True


def _judge_change(
    key: str, progress: _Progress, before: dict[str, Any], now: dict[str, Any]
) -> tuple[str, str]:
    """Returns why a change is allowed, or "", and what follows from it."""
    _, name, *rest = key.split(".")
    if key == "config.stages":
        is_same = now["stages"][: len(progress.begun)] == progress.begun
        return (NOT_BEGUN, "") if is_same else ("", f", but {', '.join(progress.begun)} began")
    if _is_stage(before, name) or _is_stage(now, name):
        if name not in progress.begun:
            return NOT_BEGUN, ""
        if not rest:  # the whole stage is gone
            return "", ""
        if rest == ["steps"]:
            return _judge_steps(name, progress, now)
        return _judge_stage_key(name, ".".join(rest), before, now), ""
    if _is_teacher(before, name) or _is_teacher(now, name):
        if name not in progress.teachers:
            return NOT_BEGUN, ""
        # An earlier version had no settings of servers, and no teacher there.
        unset = external.SERVER_KEYS.get(".".join(rest), _MISSING)
        is_new = rest and rest[0] not in before.get(name, {}) and now[name].get(rest[0]) == unset
        return EXACT if is_new else TEACHER_KEYS.get(".".join(rest), ""), ""
    reason = _find_reason(RUN_KEYS, key.removeprefix("config."))
    if name == "mesh" and (
        before[progress.begun[-1]]["rollout"]["token_budget"]
        or before["student"]["router_aux_loss_coef"]
    ):
        reason = DEVICES
    return reason, ""


def _judge_steps(name: str, progress: _Progress, now: dict[str, Any]) -> tuple[str, str]:
    s = now[name]
    if name != progress.begun[-1]:
        return "", ", but the stage is finished"
    if s["steps"] < progress.stage_steps:
        return "", f", but {progress.stage_steps} are done"
    followed = [] if s["optim"]["schedule"] == "constant" else ["learning rate"]
    followed += ["curriculum"] if s["data"]["curriculum"] else []
    if not followed:
        return NOT_BEGUN, ""
    return f"from here on {' and '.join(followed)} as in a stage of {s['steps']} steps", ""


def _judge_stage_key(name: str, key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns why a key of a stage that has begun may change; "" if it may not."""
    s, student = now[name], now["student"]  # what matters of them may not have changed
    if key in UNSET and _get(before[name], key) is _MISSING and _get(s, key) == UNSET[key]:
        return EXACT
    share = s["on_policy_share"]
    if share is None:
        share = stages.DEFAULT_ON_POLICY.get(s["objective"], 1.0)
    modes = {config[name]["data"].get("on_bad_row") for config in (before, now)}
    changes_training = (
        (key == "pack_tokens" and not round(share * s["batch_size"]))
        # The load-balancing loss is that of a micro-batch.
        or (key in ("pack_tokens", "accumulate") and student["router_aux_loss_coef"])
        # Which rows a budget of tokens ends depends on how they share the device.
        or (key.startswith("rollout.") and s["rollout"]["token_budget"])
        # A source that skips bad rows has as many rows as are good of those that are checked.
        or (key == "data.check_rows" and modes != {"fail"})
    )
    return "" if changes_training else _find_reason(STAGE_KEYS, key)


def _get(part: Any, key: str) -> Any:
    """Returns the value of a dotted key, or _MISSING."""
    for name in key.split("."):
        part = part.get(name, _MISSING) if isinstance(part, dict) else _MISSING
    return part


def _find_reason(table: dict[str, str], key: str) -> str:
    key = re.sub(r"\[\d+\]", "", key)  # of an item of a list
    keys = key, f"{key}."  # the second: a whole sub-config, that an earlier version did not have
    return next((r for x, r in table.items() for k in keys if fnmatch.fnmatchcase(k, x)), "")
