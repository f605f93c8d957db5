"""The choice of driver and the sizes of pools and chunks, by kind of device and free memory."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from pabee_jax.distributed.sharding import DATA
from pabee_jax.errors import InputError, shown
from pabee_jax.io import host_memory
from pabee_jax.models.config import ModelConfig

DRIVERS = ("auto", "full", "loop", "pool")
DEFAULT_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Backend:
    """The defaults of one kind of device; docs/performance.md has the measurements.

    Attributes:
        chunk_tokens: tokens (rows times sequence length) of a chunk of the pool.
        pool_rows: rows of a pool per device, if the memory suffices.
        loop_rows: largest number of rows per device for which driver `auto` uses `loop`; above it,
            `auto` uses `pool`.
    """

    chunk_tokens: int
    pool_rows: int
    loop_rows: int


_CPU = Backend(chunk_tokens=1024, pool_rows=256, loop_rows=2)
# Not measured. A GPU needs larger matrix products to be fully used, and every dynamic loop costs a
# synchronization with the host.
ACCELERATOR = Backend(chunk_tokens=16_384, pool_rows=4096, loop_rows=8)
# A batch of at most `batch_size // _SMALL_POOL_DIVISOR` rows runs in a pool of that many rows:
# clearing the memory of a whole pool for a few rows took longer than running these rows (89 ms for
# 512 rows of 64 tokens, BERT-base, CPU).
_SMALL_POOL_DIVISOR = 8
# Without a given number of rows, a pool takes at most this share of the free memory.
_MEMORY_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """The sizes of a pool and the memory that it takes.

    Attributes:
        rows: rows of the pool, over all devices.
        chunk_size: rows that run together on a device.
        sequence_length: tokens per row.
        bytes_per_device: memory of the pool on each device, without the weights.
    """

    rows: int
    chunk_size: int
    sequence_length: int
    bytes_per_device: int

    def __str__(self):
        return (
            f"a pool of {self.rows} rows of {self.sequence_length} tokens in chunks of "
            f"{self.chunk_size} takes {self.bytes_per_device / 1e6:.1f} MB on each device"
        )


def check_driver(driver: str) -> None:
    """Raise InputError for an unknown driver."""
    if driver not in DRIVERS:
        raise InputError(f"unknown driver {driver!r}; known are {', '.join(DRIVERS)}")


def check_size(name: str, value: object) -> None:
    """Raise InputError unless `value` is an integer of at least 1, or None (the default)."""
    if value is None:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")


def check_lengths(lengths: object, limit: int) -> None:
    """Raise InputError unless `lengths` is a sequence of integers from 1 to `limit`."""
    if not isinstance(lengths, Sequence | np.ndarray) or isinstance(lengths, str | bytes):
        raise InputError(f"lengths is {shown(lengths)}; it must be a list of numbers of tokens")
    for length in lengths:
        if not isinstance(length, int | np.integer) or not 1 <= length <= limit:
            raise InputError(f"lengths has {shown(length)}; a text has 1 to {limit} tokens")


def backend(mesh: Mesh) -> Backend:
    """Return the defaults of the mesh's devices."""
    return _CPU if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR


def pool_shapes(batch_size: int) -> tuple[int, ...]:
    """Return the row counts of the pools that are compiled for batches of up to `batch_size`."""
    return tuple(sorted({max(1, batch_size // _SMALL_POOL_DIVISOR), batch_size}))


def pool_shape(rows: int, batch_size: int) -> int:
    """Return the smallest of `pool_shapes` that has at least `rows` rows."""
    return next(shape for shape in pool_shapes(batch_size) if shape >= rows)


def pool_plan(
    config: ModelConfig,
    mesh: Mesh,
    sequence_length: int,
    *,
    bytes_per_value: int = 4,
    rows: int | None = None,
    chunk_tokens: int | None = None,
) -> PoolPlan:
    """Return the sizes of a pool.

    Args:
        config: the model's configuration.
        mesh: devices over which the rows are sharded.
        sequence_length: tokens per row.
        bytes_per_value: size of the compute type; 4 for float32.
        rows: rows of the pool over all devices, rounded up to a multiple of the devices; absent,
            the device's default, halved until the pool takes at most a quarter of the free memory.
        chunk_tokens: tokens of a chunk; absent, the device's default.

    Raises:
        InputError: a size is below 1.
    """
    check_size("batch_size", rows)
    check_size("chunk_tokens", chunk_tokens)
    check_size("sequence_length", sequence_length)
    defaults, devices = backend(mesh), mesh.shape[DATA]
    max_chunk_size = max(1, (chunk_tokens or defaults.chunk_tokens) // sequence_length)

    def plan(rows_per_device: int) -> PoolPlan:
        chunk_size = min(max_chunk_size, rows_per_device)
        pool_bytes = _pool_bytes(
            config, rows_per_device, chunk_size, sequence_length, bytes_per_value
        )
        return PoolPlan(rows_per_device * devices, chunk_size, sequence_length, pool_bytes)

    if rows is not None:
        return plan(-(-rows // devices))
    pool, free_bytes = plan(defaults.pool_rows), _free_bytes(mesh)
    allowed_bytes = math.inf if free_bytes is None else _MEMORY_SHARE * free_bytes
    while pool.rows > devices and pool.bytes_per_device > allowed_bytes:
        pool = plan(pool.rows // devices // 2)
    return pool


def check_fits(pool: PoolPlan, mesh: Mesh) -> None:
    """Raise InputError for a pool that exceeds the free memory."""
    free_bytes = _free_bytes(mesh)
    if free_bytes is not None and pool.bytes_per_device > free_bytes:
        raise InputError(
            f"{pool}, but only {free_bytes / 1e6:.1f} MB are free: give a smaller batch_size"
        )


def _pool_bytes(config: ModelConfig, rows: int, chunk_size: int, length: int, size: int) -> int:
    """Return the bytes of the inputs and hidden states of all rows and of one chunk's activations.

    With CLS pooling, the pool also stores the keys and values of all rows (see `drivers.pool`).

    The activations of a chunk are, per token: hidden states, keys, values and residual, the
    intermediate activations of the feed-forward, and three arrays of attention scores, which are
    float32 whatever the compute type.
    """
    inputs = 3 * 4 * rows * length
    arrays = 3 if config.exit_pooling == "cls" else 1
    carried = arrays * size * rows * length * config.hidden_size
    per_token = size * (6 * config.hidden_size + config.intermediate_size)
    per_token += 4 * 3 * config.num_attention_heads * length
    return inputs + carried + chunk_size * length * per_token


def _free_bytes(mesh: Mesh) -> int | None:
    """Return the free memory of each device of this process; None if it is not known."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # All CPU devices share the host's memory.
        host_bytes = host_memory.free_bytes()
        return None if host_bytes is None else host_bytes // len(mesh.local_devices)
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
