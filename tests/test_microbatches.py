"""Packed rows train as unpacked ones do, whatever is learned from them; and how they are packed."""

import dataclasses
import gc
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import quickstart
from distill import collect, losses, microbatches, packing, rollout, stages, teacher, train, trainer
from distill import mesh as mesh_lib
from distill import update as update_lib
from distill.examples import Example
from distill.layout import Form, Written
from distill.policy import Policy
from models.qwen3.model import Qwen3
from tests.test_moe import EVEN
from tests.test_update import CONFIG, TEACHER, placed
from tests.test_weights import hf_config

P, R, ROOM = 6, 12, 5
SPARSE = dataclasses.replace(
    CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
)
