"""A small state to save, for tests and for processes that they start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

TX = optax.adamw(1e-3)


def mesh(*sizes, devices=8):
    chosen = np.array(jax.devices()[:devices])
    return Mesh(chosen.reshape(sizes), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def state(seed=0, where=None, dtype=jnp.float32):
    """Returns parameters, AdamW's state and a step on `where` (a mesh), the matrix split over axis
    a."""
    key = jax.random.key(seed)
    params = {"layers": {"kernel": jax.random.normal(key, (64, 96), dtype)}, "norm": jnp.ones(7)}
    tree = {"params": params, "opt_state": TX.init(params), "step": jnp.int32(seed)}
    where = where or mesh(4, 2)
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(where, P("a") if x.ndim == 2 else P())), tree
    )


def abstract(tree, where=None, spec=("b", "a")):
    where = where or mesh(4, 2)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(where, P(*spec) if x.ndim == 2 else P())
        ),
        tree,
    )
