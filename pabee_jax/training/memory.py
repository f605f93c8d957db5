"""The memory that a run needs at least; a run that cannot fit is refused before it allocates."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pabee_jax.distributed.sharding import DATA, MODEL
from pabee_jax.errors import InputError, first_line_of
from pabee_jax.io import host_memory
from pabee_jax.models.config import ModelConfig
from pabee_jax.training.config import TrainConfig

_GIB = 2**30
# Parameter, gradient and AdamW's two moments, all in float32.
_BYTES_PER_PARAMETER = 4 * 4
# Token ids, attention mask and token types, in int32.
_BYTES_PER_TOKEN = 3 * 4


def check(config: TrainConfig, model: ModelConfig, mesh: Mesh, length: int) -> None:
    """Raise InputError if the run cannot fit into the memory of a device of this process.

    The estimate is a lower bound: it leaves out buffers that depend on the compiler.

    Args:
        config: the configuration of the run.
        model: the architecture.
        mesh: the mesh of the run.
        length: sequence length, in tokens, of the shortest batch.
    """
    limit, devices = _limit(mesh)
    if limit is None:
        return
    parameters, state = state_bytes(config, model, mesh)
    rows, activations = activation_bytes(config, model, mesh, length)
    needed = devices * (state + activations)
    if needed <= limit:
        return
    if state > activations:
        cause = f"{parameters:,} parameters with their gradients and optimizer state"
        advice = "give a smaller model or a larger config.mesh.model"
    else:
        cause = f"the activations of {rows:,} rows of at least {length:,} tokens per device"
        advice = (
            "give a smaller config.batch_size or config.max_seq_length, or a larger "
            "config.gradient_accumulation"
        )
    raise InputError(
        f"this run needs at least {needed / _GIB:,.1f} GiB of memory, most of it for {cause}, but "
        f"{limit / _GIB:,.1f} GiB are available; {advice}"
    )


def state_bytes(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> tuple[int, int]:
    """Return the number of parameters, and the bytes of the training state on a device."""
    count = parameter_count(model)
    shards = mesh.size if config.mesh.shard_parameters else mesh.shape[MODEL]
    return count, count * _BYTES_PER_PARAMETER // shards


def parameter_count(model: ModelConfig) -> int:
    """Return the number of parameters of a model."""
    hidden, inner, size = model.hidden_size, model.intermediate_size, model.embedding_size
    bias = int(model.has_biases)
    rows = model.vocab_size + model.type_vocab_size
    rows += model.max_position_embeddings if model.has_position_embeddings else 0
    embeddings = rows * size + (1 + bias) * size
    if model.has_projection:
        embeddings += size * hidden + hidden
    expansions = 2 if model.is_gated else 1
    layer = 4 * (hidden * hidden + bias * hidden) + 2 * (1 + bias) * hidden
    layer += (expansions + 1) * hidden * inner + bias * (inner + hidden)
    poolers = model.num_hidden_layers if model.exit_pooler == "per_exit" else 1
    return (
        embeddings
        + model.relative_buckets * model.num_attention_heads
        + model.num_hidden_groups * model.inner_group_num * layer
        + (hidden if model.is_pre_norm else 0)
        + poolers * (hidden * hidden + hidden)
        + model.num_hidden_layers * (hidden + 1) * model.num_labels
    )


def activation_bytes(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, length: int
) -> tuple[int, int]:
    """Return the rows of a microbatch on a device, and the bytes of their activations.

    The backward pass needs the input of every layer and, without `rematerialize`, the results of
    every layer's matrix products.
    """
    batch_rows = config.batch_size // mesh.shape[DATA]
    rows = batch_rows // config.gradient_accumulation
    values = model.hidden_size
    if not config.rematerialize:
        products = 5 * model.hidden_size + model.intermediate_size
        values += model.inner_group_num * (products + model.num_attention_heads * length)
    stored = rows * length * values * model.num_hidden_layers
    # Evaluation runs the whole batch at once, but keeps the activations of one layer only.
    evaluated = batch_rows * length * model.hidden_size
    activations = max(stored, evaluated) * jnp.dtype(config.dtype).itemsize // mesh.shape[MODEL]
    return rows, activations + batch_rows * length * _BYTES_PER_TOKEN


@contextlib.contextmanager
def exhaustion_as_input_error() -> Iterator[None]:
    """Raise InputError, with advice, if an allocation fails within the `with` block."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        first_line = first_line_of(error)
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first_line):
            raise
        raise InputError(
            f"the memory is too small for this run ({first_line}); give a smaller "
            "config.batch_size or config.max_seq_length, or a larger config.gradient_accumulation"
        ) from error


def _limit(mesh: Mesh) -> tuple[int | None, int]:
    """Return the bytes that are available, and the number of devices that share them.

    The number of bytes is None if it is unknown.
    """
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return host_memory.limit_bytes(), len(devices)
    statistics = devices[0].memory_stats() or {}
    return statistics.get("bytes_limit"), 1
