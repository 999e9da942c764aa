"""Which keys of a config may change when a run is resumed, and why."""

import copy
import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import base
from distill.training import config_changes
from distill.training.config_changes import DEVICES, EXACT, NOT_BEGUN, ROUNDING, SAME_CONTENT


def config() -> ConfigDict:
    c = base.get_config()
    c.stages = ("sft", "opd")
    c.sft.steps, c.opd.steps = 10, 20
    for s in (c.sft, c.opd):
        s.optim.schedule = "constant"
    return c


def compare(
    changes: dict[str, Any], steps_done: int, before: dict[str, Any] | None = None, **options: Any
) -> dict[str, str]:
    """Returns key → reason for each difference that `changes` make to a run."""
    c = config()
    c.update_from_flattened_dict(before or {})
    saved, now = json.loads(c.to_json_best_effort()), copy.deepcopy(c)
    now.update_from_flattened_dict(changes)
    found = config_changes.compare_configs(saved, now, steps_done, **options)
    return {change.key.removeprefix("config."): change.reason for change in found}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("log.transcripts", 3, EXACT),
        ("log.to", ("tensorboard", "mlflow"), EXACT),
        ("log.overlap_top_k", 5, ROUNDING),
        ("eval.every", 7, EXACT),
        ("alerts.stop_on", ("entropy",), EXACT),
        ("checkpoint.every", 7, EXACT),
        ("compilation_cache", "x", EXACT),
        ("mesh.fsdp", 2, ROUNDING),
        ("teacher_mesh.devices", 2, ROUNDING),
        ("loss_chunk_mib", 7.0, ROUNDING),
        ("student.remat", False, ROUNDING),
        ("attention", "xla", ROUNDING),
        ("opd.accumulate", 2, ROUNDING),
        ("opd.pack_tokens", 4096, ROUNDING),
        ("opd.rollout.slots", 8, ROUNDING),
        ("opd.rollout.cache_tokens", 0.5, ROUNDING),
        ("opd.data.check_rows", 7, EXACT),
        ("opd.data.on_bad_row", "skip", EXACT),
        ("seed", 1, ""),
        ("student.dtype", "float32", ""),
        ("student.lora.rank", 8, ""),
        ("student.lora.targets", ("q_proj",), ""),
        ("student.ema_decay", 0.5, ""),
        ("teacher.param_dtype", "int8", ""),
        ("opd.optim.learning_rate", 1e-3, ""),
        ("opd.batch_size", 32, ""),
        ("opd.minibatches", 2, ""),
        ("opd.max_response_tokens", 7, ""),
        ("opd.rollout.asynchronous", True, ""),
        ("opd.rollout.cache_dtype", "int8", ""),
        ("opd.rollout.token_budget", 100, ""),
        ("opd.sampling.temperature", 0.5, ""),
        ("opd.loss.divergence", "jsd", ""),
        ("opd.data.source", "x.jsonl", ""),
        ("opd.teachers", ("teacher", "other"), ""),
        ("sft.optim.learning_rate", 1e-3, ""),
        ("sft.steps", 11, ""),
    ],
)
def test_each_key_has_its_reason(key: str, value: Any, reason: str) -> None:
    assert compare({key: value}, 12) == {key: reason}


@pytest.mark.parametrize(
    ("before", "key", "value"),
    [
        ({"opd.rollout.token_budget": 100}, "opd.rollout.slots", 8),
        ({"student.router_aux_loss_coef": 0.1}, "opd.accumulate", 2),
        ({"student.router_aux_loss_coef": 0.1}, "opd.pack_tokens", 4096),
        ({"opd.data.on_bad_row": "skip"}, "opd.data.check_rows", 7),
        ({"opd.objective": "distill"}, "opd.pack_tokens", 4096),
    ],
)
def test_a_key_that_another_makes_matter_may_not_change(
    before: dict[str, Any], key: str, value: Any
) -> None:
    assert compare({key: value}, 12, before) == {key: ""}


@pytest.mark.parametrize(
    "before", [{"opd.rollout.token_budget": 100}, {"student.router_aux_loss_coef": 0.1}]
)
def test_another_mesh_that_changes_what_is_trained_is_said(before: dict[str, Any]) -> None:
    assert compare({"mesh.fsdp": 2}, 12, before) == {"mesh.fsdp": DEVICES}


def test_a_stage_that_has_not_begun_may_change() -> None:
    changes = {"opd.objective": "grpo", "opd.steps": 5, "opd.samples": 2, "teacher.path": "x"}
    assert compare(changes, 10) == dict.fromkeys(changes, NOT_BEGUN)
    assert "" in compare(changes, 11).values()
    assert compare({"teacher.path": "x"}, 11) == {"teacher.path": ""}


def test_further_stages_may_follow() -> None:
    only = {"stages": ("sft",)}
    assert compare({"stages": ("sft", "opd"), "opd.samples": 2}, 10, only) == {
        "stages": NOT_BEGUN,
        "opd.samples": NOT_BEGUN,
    }
    assert compare({"stages": ("opd", "sft")}, 10, only) == {"stages": ""}
    assert compare({"stages": ("sft",)}, 10) == {"stages": NOT_BEGUN}
    assert compare({"stages": ("sft",)}, 11) == {"stages": ""}
    assert not compare({"opd.samples": 2}, 10, only)  # a stage that is not run does not count


def test_a_stage_may_become_longer_but_not_shorter_than_it_is() -> None:
    assert compare({"opd.steps": 40}, 30) == {"opd.steps": NOT_BEGUN}
    assert compare({"opd.steps": 5}, 15) == {"opd.steps": NOT_BEGUN}
    assert compare({"opd.steps": 4}, 15) == {"opd.steps": ""}
    assert compare({"sft.steps": 20}, 10) == {"sft.steps": NOT_BEGUN}
    cosine = {"opd.optim.schedule": "cosine", "opd.data.curriculum": "ordered"}
    assert compare({"opd.steps": 40}, 30, cosine) == {
        "opd.steps": "from here on learning rate and curriculum as in a stage of 40 steps"
    }


def test_the_content_of_an_input_decides_not_its_name() -> None:
    mixture = {"sft.data.mixture": (("a.jsonl", 1.0), ("b.jsonl", 1.0))}
    renamed = {"sft.data.mixture": (("c.jsonl", 1.0), ("b.jsonl", 2.0)), "student.path": "moved"}
    keys = ["config.sft.data.mixture[0]", "config.sft.data.mixture[1]", "config.student.path"]
    assert compare(renamed, 5, mixture, input_keys=keys) == {
        "sft.data.mixture[0][0]": SAME_CONTENT,
        "sft.data.mixture[1][1]": "",
        "student.path": SAME_CONTENT,
    }


def test_a_text_says_what_differs() -> None:
    c = config()
    saved = json.loads(c.to_json_best_effort())
    del saved["opd"]["samples"]
    c.opd.steps, c.sft.steps = 1, 9
    texts = [change.text for change in config_changes.compare_configs(saved, c, 15)]
    assert texts == [
        "config.opd.samples was not there, now 1",
        "config.opd.steps was 20, now 1, but 5 are done",
        "config.sft.steps was 10, now 9, but the stage is finished",
    ]


def test_a_run_of_an_earlier_version_has_no_alerts() -> None:
    c = config()
    saved = json.loads(c.to_json_best_effort())
    del saved["alerts"], saved["checkpoint"]["keep_every"]
    found = config_changes.compare_configs(saved, c, 5)
    assert {x.key: x.reason for x in found} == {
        "config.alerts": EXACT,
        "config.checkpoint.keep_every": EXACT,
    }


SET_NOW = {
    **{"drift.kl": 0.5, "response_schedule": ((0, 4),), "loss.entropy_from": "student"},
    **{"loss.position_half_life": 8.0, "loss.entropy_weight": 0.5},
}


@pytest.mark.parametrize("key", config_changes.UNSET)
def test_a_stage_of_an_earlier_version_goes_on_without_newer_keys(key: str) -> None:
    """But not if they are set now."""
    c = config()
    saved = json.loads(c.to_json_best_effort())
    *parts, name = key.split(".")
    del (saved["opd"][parts[0]] if parts else saved["opd"])[name]
    found = config_changes.compare_configs(saved, c, 15)
    assert {x.key: x.reason for x in found} == {f"config.opd.{key}": EXACT}
    for name, value in SET_NOW.items():
        if name.startswith(key):
            c.opd.update_from_flattened_dict({name: value})
    found = config_changes.compare_configs(saved, c, 15)
    assert {x.key: x.reason for x in found} == {f"config.opd.{key}": ""}


def test_every_key_of_the_tables_is_one_of_the_config() -> None:
    c = base.get_config()
    keys = [*config_changes.RUN_KEYS, *(f"opd.{key}" for key in config_changes.STAGE_KEYS)]
    for key in keys:
        part = c
        for name in key.removesuffix(".*").split("."):
            assert name in part, key
            part = part[name]
