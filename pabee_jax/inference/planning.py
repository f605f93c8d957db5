"""Which driver runs a batch, and how large pools and chunks are: every such choice in one place."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from pabee_jax.distributed.sharding import DATA
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig

DRIVERS = ("auto", "full", "loop", "pool")
DEFAULT_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Backend:
    """Defaults of one kind of device; docs/performance.md has the measurements.

    Attributes:
        chunk_tokens: tokens (rows times sequence length) that a chunk of the pool holds.
        pool_rows: rows of a pool, per device, where memory allows.
        loop_rows: up to so many rows per device `auto` takes `loop`, beyond `pool`.
    """

    chunk_tokens: int
    pool_rows: int
    loop_rows: int


_CPU = Backend(chunk_tokens=1024, pool_rows=256, loop_rows=2)
# Not measured: a GPU needs larger products to be busy, and every dynamic loop costs it a
# synchronisation with the host.
ACCELERATOR = Backend(chunk_tokens=16_384, pool_rows=4096, loop_rows=8)
# A pool of this share of the rows for batches that fit into it: clearing the memory of a whole pool
# for a few rows took longer than running them (89 ms for 512 rows of 64 tokens, BERT-base, CPU).
_SMALL_POOL = 8
# A pool takes at most this share of the memory that is free.
_MEMORY_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """The size of a pool and what it costs.

    Attributes:
        rows: rows of the pool, over all devices.
        chunk_size: rows that run together on a device.
        sequence_length: tokens per row.
        bytes_per_device: memory that the pool takes on each device, weights not included.
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
    """Raises InputError for an unknown driver."""
    if driver not in DRIVERS:
        raise InputError(f"unknown driver {driver!r}; known are {', '.join(DRIVERS)}")


def check_size(name: str, value: object) -> None:
    """Raises InputError for what is no whole number of rows or tokens; None means the default."""
    if value is None:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")


def backend(mesh: Mesh) -> Backend:
    """The defaults of the mesh's devices."""
    return _CPU if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR


def pool_shapes(batch_size: int) -> tuple[int, ...]:
    """The rows of the pools that are compiled for batches of up to `batch_size` rows."""
    return tuple(sorted({max(1, batch_size // _SMALL_POOL), batch_size}))


def pool_shape(rows: int, batch_size: int) -> int:
    """The smallest of `pool_shapes` that holds `rows`."""
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
    """Sizes of a pool; without `rows` one that fits the memory that is free on the devices.

    Raises:
        InputError: a size below 1.
    """
    check_size("batch_size", rows)
    check_size("chunk_tokens", chunk_tokens)
    check_size("sequence_length", sequence_length)
    defaults, devices = backend(mesh), mesh.shape[DATA]
    chunk = max(1, (chunk_tokens or defaults.chunk_tokens) // sequence_length)

    def plan(rows_per_device: int) -> PoolPlan:
        chunk_size = min(chunk, rows_per_device)
        cost = _pool_bytes(config, rows_per_device, chunk_size, sequence_length, bytes_per_value)
        return PoolPlan(rows_per_device * devices, chunk_size, sequence_length, cost)

    if rows is not None:
        return plan(-(-rows // devices))
    chosen, free = plan(defaults.pool_rows), _free_bytes(mesh)
    allowed = math.inf if free is None else _MEMORY_SHARE * free
    while chosen.rows > devices and chosen.bytes_per_device > allowed:
        chosen = plan(chosen.rows // devices // 2)
    return chosen


def check_fits(pool: PoolPlan, mesh: Mesh) -> None:
    """Raises InputError for a pool that is larger than the memory that is free."""
    free = _free_bytes(mesh)
    if free is not None and pool.bytes_per_device > free:
        raise InputError(f"{pool}, but only {free / 1e6:.1f} MB are free")


def _pool_bytes(config: ModelConfig, rows: int, chunk_size: int, length: int, size: int) -> int:
    """Inputs and hidden states of all rows, and the activations of one chunk.

    Where exits read the first token only, also the keys and values of all rows (see `pool`).

    Per token of a chunk: its own hidden states, keys, values and residual, the feed-forward's
    inside, and three arrays of attention scores, which are float32 in any case.
    """
    inputs = 3 * 4 * rows * length
    arrays = 3 if config.exit_pooling == "cls" else 1
    carried = arrays * size * rows * length * config.hidden_size
    per_token = size * (6 * config.hidden_size + config.intermediate_size)
    per_token += 4 * 3 * config.num_attention_heads * length
    return inputs + carried + chunk_size * length * per_token


def _free_bytes(mesh: Mesh) -> int | None:
    """Memory that is free on each device of this process; None where nobody says."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # All CPU devices share the host's memory.
        free = _free_host_bytes()
        return None if free is None else free // len(mesh.local_devices)
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)


def _free_host_bytes() -> int | None:
    try:
        # Not sysconf's free pages: those leave out what the file cache would give back.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    try:  # A container may have less.
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        return max(0, min(free, limit - used))
    except (OSError, ValueError):  # No such limit.
        return free
