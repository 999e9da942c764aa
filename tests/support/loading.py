"""Loading for tests and for processes that they start, without torch, whose import takes
seconds."""

import jax
import jax.numpy as jnp

from distill.runtime import mesh as mesh_lib
from models import families, tensor_files, weights


def counted(read: list[int]):
    """Wraps tensor_files.safe_open to record the bytes of each slice that is read."""
    original = tensor_files.safe_open

    class Slice:
        def __init__(self, handle):
            self.get_shape, self.get_dtype, self.handle = handle.get_shape, handle.get_dtype, handle

        def __getitem__(self, index):
            out = self.handle[index]
            read.append(out.nbytes)
            return out

    class File:
        def __init__(self, *arguments, **named):
            self.opened = original(*arguments, **named)

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    return File


def load(directory, sizes, **options):
    config = families.read_config(directory)
    abstract = mesh_lib.make_abstract_params(config, mesh_lib.make_mesh(*sizes))
    shardings = jax.tree.map(lambda p: p.sharding, abstract)
    dtype = jnp.dtype("float32")
    loaded = weights.load(directory, config, abstract, shardings, dtype, **options)
    return loaded, weights.count_reads(config, abstract, shardings)
