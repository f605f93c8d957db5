"""Writes a checkpoint as one ONNX model, with the early exit inside it, through jax2onnx.

The model is the driver `loop` as a chain of `If` operators: a batch stops when its last row has
exited. The weights are part of the model; the thresholds of the criterion (such as the patience)
are inputs.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from pabee_jax.data.tokenization import save_tokenizer
from pabee_jax.drivers import loop
from pabee_jax.drivers.layer_loop import Control
from pabee_jax.errors import InputError
from pabee_jax.inference.artifact import TOKENS, thresholds
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.export import exported_length
from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically
from pabee_jax.models.parameters import split

# Of a protocol buffer.
_LARGEST_FILE = 2**31
OUTPUTS = ("exit_layers", "logits")


def export_onnx(
    classifier: EarlyExitClassifier,
    directory: str | os.PathLike,
    sequence_length: int | None = None,
) -> None:
    """Write the ONNX model `model.onnx`, for any number of rows, and the tokenizer.

    Its inputs are `input_ids`, `attention_mask` and, for a family with token types,
    `token_type_ids`, each (rows, sequence_length) int64, and a scalar for every threshold of the
    criterion by its name, such as `patience`; absent, the classifier's value. Its outputs are
    `exit_layers` (rows,) int32, from 1, and `logits` (rows, classes) float32. If only the last exit
    was trained, the thresholds are constants, so that no call can use another exit.

    Args:
        classifier: the classifier; the class of its criterion is part of the model.
        directory: a local path or a `gs://` address.
        sequence_length: tokens per row; absent, as many as the checkpoint takes.

    Raises:
        InputError: jax2onnx is not installed, the model does not fit into a file of 2 GiB, or as
            `exported_length`.
    """
    if importlib.util.find_spec("jax2onnx") is None:
        raise InputError(
            "ONNX needs jax2onnx: pip install 'pabee_jax[onnx]', and then pip install --no-deps "
            "jax2onnx (its own requirement is an orbax-checkpoint that training cannot use)"
        )
    import jax2onnx  # pyright: ignore[reportMissingImports]

    criterion, length = classifier.criterion, exported_length(classifier, sequence_length)
    if sum(value.nbytes for value in split(classifier.model)[1].values()) >= _LARGEST_FILE:
        raise InputError("an ONNX file has at most 2 GiB, but the parameters have more")
    # onnx_ir warns of every shape that depends on the number of rows.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    names = TOKENS if classifier.config.type_vocab_size > 1 else TOKENS[:2]
    constants = thresholds(criterion)
    values = {} if classifier.pretrained.trained_exits == "last" else constants
    model = classifier.model

    def run(*inputs: jax.Array):
        tokens: dict[str, jax.Array] = dict(zip(names, inputs, strict=False))
        given = dict(zip(values, inputs[len(names) :], strict=True))
        setting = type(criterion)(**constants | given)
        # Not `arange`: jax2onnx forgets that its length is the number of rows.
        row = jnp.cumsum(jnp.ones_like(inputs[0][:, 0])) - 1
        return loop.early_exit(model, tokens, setting, row, control=Control("cond"))

    shape = (*jax_export.symbolic_shape("rows"), length)
    inputs: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32) for _ in names]
    inputs += [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values.values()]
    input_names = [f"{name}_int32" for name in names] + list(values)
    proto = jax2onnx.to_onnx(
        run, inputs, model_name="pabee_jax", input_names=input_names, output_names=list(OUTPUTS)
    )
    _take_int64(proto.graph, names)
    _set_defaults(proto.graph, values)
    pretrained = classifier.pretrained
    with storage.local_folder(storage.path_of(directory)) as folder:
        if pretrained.tokenizer is not None:
            save_tokenizer(pretrained.tokenizer, folder, length)
        contents = proto.SerializeToString()
        write_atomically(folder / "model.onnx", lambda path: path.write_bytes(contents))


def _set_defaults(graph: Any, values: Mapping[str, np.ndarray]) -> None:
    """Give inputs default values, so that a call may leave them out."""
    from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def _take_int64(graph: Any, names: Sequence[str]) -> None:
    """Let the graph's first inputs be int64, which tokenizers return; JAX has int32."""
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    for value, name in zip(graph.input, names, strict=False):
        cast = helper.make_node("Cast", [name], [value.name], to=TensorProto.INT32)
        graph.node.insert(0, cast)
        value.name, value.type.tensor_type.elem_type = name, TensorProto.INT64
