"""Conversions of a model: to parameters by name and back, and between its two layer layouts.

Checkpoints, the optimizer and the table of checkpoint names use the parameter names.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from pabee_jax.models.encoder import EarlyExitModel


class Structure:
    """A model without its parameters, for use as a static argument of `jit`.

    Two structures are equal if the models differ only in the values of their parameters. The hash
    is computed once, because flax recomputes the hash of an `nnx.GraphDef` at every call of a
    jitted function, which takes 0.9 ms for 12 layers.
    """

    def __init__(self, graph: nnx.GraphDef):
        self.graph = graph
        self._hash = hash(graph)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        if not isinstance(other, Structure):
            return NotImplemented
        return self.graph is other.graph or self.graph == other.graph


def split(model: EarlyExitModel) -> tuple[Structure, dict[str, Any]]:
    """Return the model's structure and its parameters by name, such as "pooler.kernel"."""
    graph, parameters = nnx.split(model)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(parameters))
    return Structure(graph), {".".join(map(str, path)): value for path, value in flat.items()}


def merge(structure: Structure, parameters: Mapping[str, Any]) -> EarlyExitModel:
    """Return the model with this structure and these parameters: the inverse of `split`."""
    paths = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): value
        for name, value in parameters.items()
    }
    return nnx.merge(structure.graph, traverse_util.unflatten_dict(paths))


def stacked(model: EarlyExitModel) -> EarlyExitModel:
    """Return the model with the arrays of its groups stacked on a leading axis.

    Training scans over this axis.
    """
    result = nnx.merge(*nnx.split(model))
    result.groups = jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.groups)
    return result


def unstacked(model: EarlyExitModel) -> EarlyExitModel:
    """Return the model with separate arrays for every group: the inverse of `stacked`.

    A loop over separate arrays does not copy the weights of the current layer.
    """
    result = nnx.merge(*nnx.split(model))
    result.groups = nnx.List(
        [
            jax.tree.map(lambda leaf, index=index: leaf[index], model.groups)
            for index in range(model.config.num_hidden_groups)
        ]
    )
    return result


def on_host(model: EarlyExitModel) -> EarlyExitModel:
    """Return the model with its parameters as numpy arrays, in the memory of the host."""
    structure, parameters = split(model)
    return merge(structure, {name: np.asarray(value) for name, value in parameters.items()})


def in_compute_dtype(model: EarlyExitModel) -> EarlyExitModel:
    """Return the model with the encoder's matrices cast to the compute dtype, for inference.

    These are the operands of matrix products. Biases, LayerNorm parameters and embeddings, and all
    parameters of the pooler and the classifiers, stay in float32, as in training.
    """
    structure, parameters = split(model)
    for name, value in parameters.items():
        if name.endswith(".kernel") and not name.startswith(("pooler.", "classifiers.")):
            parameters[name] = value.astype(model.dtype)
    return merge(structure, parameters)
