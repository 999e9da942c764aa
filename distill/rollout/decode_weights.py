"""The weights that decode: a copy, as every step reads all of them."""

import functools

import jax
from jax.sharding import Mesh

from distill.runtime import mesh as mesh_lib
from models import transformer
from models.layers import lora, quantised
from models.transformer import Params, Transformer


def prefers_stacked(mesh: Mesh) -> bool:
    """Returns true where decoding is faster from weights stacked over layers: on TPUs. On GPUs XLA
    copies each layer out of the stack before it reads it, at every step."""
    return mesh.devices.flat[0].platform == "tpu"


def prepare_weights(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    *,
    stacked: bool,
    gather_weights: bool,
    param_dtype: str,
    lora_params: Params | None = None,
) -> tuple[Transformer, Params]:
    """Returns the model as it decodes, and its variables: the parameters, and the factors of a LoRA
    where lora_params are given.

    Args:
      stacked: parameters of all layers in one array, else one for each layer.
      gather_weights: do not split the weights over the mesh axes that split rows (experts still
        are), so that no step fetches them; takes the memory of all weights / tensor on each device.
      param_dtype: "": the model's; may be one of 8 bits (models.layers.quantised).
    """
    rules = mesh_lib.GATHERED_RULES if gather_weights else mesh_lib.SHARDING_RULES
    kind = None if lora_params is None or model.lora is None else lora.with_unit_scale(model.lora)
    return model.clone(scan=stacked, remat=False, lora=kind), convert_weights(
        model, params, lora_params, mesh=mesh, rules=rules, stacked=stacked, param_dtype=param_dtype
    )


@functools.partial(jax.jit, static_argnames=("model", "mesh", "rules", "stacked", "param_dtype"))
def convert_weights(
    model: Transformer,
    params: Params,
    lora_params: Params | None,
    mesh: Mesh,
    rules: tuple,
    stacked: bool,
    param_dtype: str,
) -> Params:
    """Converts weights for `prepare_weights`, once: every step reads all of them."""
    kind, dtype = quantised.split_dtypes(param_dtype or model.dtype, model.dtype)

    def constrain_params(tree: Params, shapes: Params) -> Params:
        tree = jax.tree.map(
            lambda p, like: jax.lax.with_sharding_constraint(p, like.sharding), tree, shapes
        )
        return tree if stacked else transformer.unstack_layers(tree, model.config.num_hidden_layers)

    converted = quantised.quantise_params(params, kind, dtype)
    leaves = jax.tree.leaves(converted, is_leaf=quantised.is_quantised)
    dtypes = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
    shapes = mesh_lib.make_abstract_params(model.config, mesh, rules=rules)
    shapes = quantised.quantise_shapes(shapes, dtypes.pop()) if dtypes else shapes
    variables = {"params": constrain_params(converted, shapes)}
    if lora_params is not None:
        assert model.lora is not None
        factors, _ = lora.fold_scale(lora_params, model.lora, model.dtype)
        shapes = mesh_lib.make_abstract_params(model.config, mesh, model.lora, rules)
        variables[lora.LORA] = constrain_params(factors, shapes)
    return variables
