"""RMSNorm, Linear and SwiGLU. Letters as in models/transformer.py."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import Config
from models.layers import quantised, sharded
from models.layers.lora import LoRA, make_factors


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; the mean square is computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        scale: Any = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype) * scale


class Linear(nn.Module):
    """x @ kernel without bias; `axes` are the logical names of the kernel's two dimensions.

    The kernel of a frozen model may be Quantised (models.layers.quantised).
    """

    features: int
    axes: tuple[str | None, str | None]
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(fan_in, self.axes)
        shape = (x.shape[-1], self.features)
        kernel: Any = self.param("kernel", init, shape, jnp.float32)
        fetched = functools.partial(sharded.gather_weights, T=x.shape[-2])
        kernel = quantised.cast_kernel(kernel, x.dtype)
        names = quantised.get_kernel_axes(kernel, self.axes)
        kernel = jax.tree.map(fetched, kernel, names)
        y = quantised.dot(x, kernel)
        low = make_factors(
            self, self.lora, f"{self.name}_proj", "kernel", shape, self.axes, x.dtype
        )
        if low is None:
            return y
        a, b = fetched(low[0], (self.axes[0], None)), fetched(low[1], (None, self.axes[1]))
        return y + (x @ a) @ b


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: Config
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        F = self.config.intermediate_size
        gate_BTF = Linear(F, ("embed", "mlp"), self.lora, name="gate")(x_BTD)
        up_BTF = Linear(F, ("embed", "mlp"), self.lora, name="up")(x_BTD)
        h_BTF = sharded.constrain_activations(nn.silu(gate_BTF) * up_BTF, "mlp")
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.lora, name="down")(h_BTF)
