"""A server in this process, and what its tests ask of it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from jax.sharding import Mesh

from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.serving.server import RunningServer, ServerOptions, open_server

TOKEN = "s3cret"


@contextlib.contextmanager
def serve(
    model: Path | str, *, mesh: Mesh | None = None, param_dtype: str = "float32", **options: Any
) -> Iterator[RunningServer]:
    """Serves a model that computes in float32, by default on one device, at a free port."""
    mesh = mesh or mesh_lib.make_mesh(1, 1, 1)
    subject = policy.make_abstract_for_inference(str(model), "float32", mesh)
    settings = {"port": 0, "name": "tiny", "token": TOKEN, **options}
    with open_server(subject, param_dtype, ServerOptions(**settings)) as running:
        yield running


def post(running: RunningServer, route: str, token: str = TOKEN, **body: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.post(f"{running.url}{route}", json=body, headers=headers, timeout=120)


def get(running: RunningServer, route: str, **headers: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", **headers}
    return requests.get(f"{running.url}{route}", headers=headers, timeout=120)


def read_metric(running: RunningServer, name: str) -> float:
    """Returns the value of a metric without labels."""
    lines = get(running, "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.split()[0] == name)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
