"""The choice of driver and the sizes of pools and chunks, by kind of device and free memory."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from pabee_jax.distributed.sharding import DATA
from pabee_jax.drivers.shapes import ChunkSizes, sequence_lengths
from pabee_jax.errors import InputError, shown
from pabee_jax.io import host_memory
from pabee_jax.models.config import ModelConfig

DRIVERS = ("auto", "full", "loop", "pool")
DEFAULT_BATCH_SIZE = 32  # Of the driver "loop".


@dataclasses.dataclass(frozen=True)
class Backend:
    """The defaults of one kind of device; docs/performance.md has the measurements.

    Attributes:
        chunk_tokens: tokens of a chunk of the large pool.
        small_chunks: the sizes of the chunks of a small pool and of an engine (`inference.engine`).
        small_block: the tokens of their blocks of attention, unless a row is longer.
        small_pool_copies_parameters: their `ChunkSizes.copies_parameters`.
        pool_tokens: tokens of a pool per device, if the memory suffices.
        loop_rows: largest number of rows per device for which driver `auto` uses `loop`, and `full`
            pads rows; above it, `auto` uses `pool`, and `full` runs without padding.
        engine_tokens: tokens of the pool of an engine.
        length_step: the shortest length class.
        length_growth: the factor by which a length class may exceed the class before.
    """

    chunk_tokens: int
    small_chunks: tuple[int, ...]
    small_block: int
    small_pool_copies_parameters: bool
    pool_tokens: int
    loop_rows: int
    engine_tokens: int
    length_step: int
    length_growth: float

    def small_sizes(self, longest: int) -> ChunkSizes:
        """Return the sizes of a small pool and of an engine."""
        block, copies = max(self.small_block, longest), self.small_pool_copies_parameters
        return ChunkSizes(self.small_chunks, self._lengths(longest), block, copies)

    def large_sizes(self, longest: int, chunk_tokens: int | None) -> ChunkSizes:
        """Return the sizes of a large pool; absent, `chunk_tokens` is the default."""
        sizes = ChunkSizes.of(chunk_tokens or self.chunk_tokens, longest)
        return dataclasses.replace(sizes, lengths=self._lengths(longest))

    def _lengths(self, longest: int) -> tuple[int, ...]:
        return sequence_lengths(longest, self.length_step, self.length_growth)


_CPU = Backend(
    chunk_tokens=1024,
    small_chunks=(256, 128, 64),
    small_block=128,
    small_pool_copies_parameters=False,
    pool_tokens=16_384,
    loop_rows=2,
    engine_tokens=1024,
    length_step=8,
    length_growth=1.25,
)
# Not measured. A GPU needs larger matrix products to be fully used, every dynamic loop costs a
# synchronization with the host, and a length class takes seconds to compile.
ACCELERATOR = Backend(
    chunk_tokens=16_384,
    small_chunks=(4096, 256),
    small_block=4096,
    small_pool_copies_parameters=True,
    pool_tokens=524_288,
    loop_rows=8,
    engine_tokens=16_384,
    length_step=64,
    length_growth=2.0,
)
# Few rows run in a second, smaller pool: clearing the memory of a whole pool takes longer than
# running a few rows (89 ms for 512 rows of 64 tokens, BERT-base, CPU).
_SMALL_POOL_DIVISOR = 8
# A pool has one row per this many of its tokens: the texts of SST-2 have 25 tokens on average.
TOKENS_PER_ROW = 16
# A pool takes at most this share of the free memory.
_MEMORY_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """The sizes of a pool and the memory that it takes.

    Attributes:
        devices: the number of devices that share the rows.
        rows_per_device: the most rows on a device.
        tokens_per_device: the most tokens on a device.
        sizes: the sizes of the program.
        bytes_per_device: memory of the pool on each device, without the weights.
    """

    devices: int
    rows_per_device: int
    tokens_per_device: int
    sizes: ChunkSizes
    bytes_per_device: int

    @property
    def chunk_tokens(self) -> int:
        """The tokens that run together on a device."""
        return self.sizes.tokens[0]

    @property
    def rows(self) -> int:
        """The most rows, over all devices."""
        return self.devices * self.rows_per_device

    @property
    def tokens(self) -> int:
        """The tokens that fit in any case, over all devices.

        Several devices do not get equally many tokens (see `packed`).
        """
        if self.devices == 1:
            return self.tokens_per_device
        return self.devices * (self.tokens_per_device - self.sizes.longest)

    def __str__(self):
        return (
            f"a pool of up to {self.rows} rows with {self.tokens} tokens in chunks of "
            f"{self.chunk_tokens} takes {self.bytes_per_device / 1e6:.1f} MB on each device"
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


def loop_rows(mesh: Mesh) -> int:
    """Return the largest number of rows, over all devices, that run padded rather than pooled."""
    return backend(mesh).loop_rows * mesh.shape[DATA]


def pool_plans(
    config: ModelConfig,
    mesh: Mesh,
    longest: int,
    *,
    bytes_per_value: int = 4,
    chunk_tokens: int | None = None,
) -> tuple[PoolPlan, PoolPlan]:
    """Return the sizes of the small pool, for few rows, and of the large pool.

    The large pool has the device's default number of tokens, halved until the pool takes at most a
    quarter of the free memory.

    Args:
        config: the model's configuration.
        mesh: devices over which the rows are sharded.
        longest: the most tokens of a row.
        bytes_per_value: size of the compute type; 4 for float32.
        chunk_tokens: tokens of a chunk; absent, the device's default.

    Raises:
        InputError: `chunk_tokens` is below 1.
    """
    check_size("chunk_tokens", chunk_tokens)
    defaults, devices = backend(mesh), mesh.shape[DATA]
    fewest_tokens = 2 * longest

    def plan(tokens: int, sizes: ChunkSizes) -> PoolPlan:
        tokens = max(tokens, fewest_tokens)
        rows = max(1, tokens // TOKENS_PER_ROW)
        pool_bytes = _pool_bytes(config, rows, tokens, sizes, bytes_per_value)
        return PoolPlan(devices, rows, tokens, sizes, pool_bytes)

    sizes = defaults.large_sizes(longest, chunk_tokens)
    large, free_bytes = plan(defaults.pool_tokens, sizes), _free_bytes(mesh)
    allowed_bytes = math.inf if free_bytes is None else _MEMORY_SHARE * free_bytes
    while large.tokens_per_device > fewest_tokens and large.bytes_per_device > allowed_bytes:
        large = plan(large.tokens_per_device // 2, sizes)
    if chunk_tokens is None:
        sizes = defaults.small_sizes(longest)
    return plan(large.tokens_per_device // _SMALL_POOL_DIVISOR, sizes), large


def _pool_bytes(config: ModelConfig, rows: int, tokens: int, sizes: ChunkSizes, size: int) -> int:
    """Return the bytes of a pool's inputs, its tokens' arrays, and the activations of one chunk.

    A pool stores hidden states, queries, keys and values. The activations of a chunk are, per
    token: hidden states, keys, values and residual, and the intermediate activations of the
    feed-forward. A block of attention has copies of its queries, keys and values, and three arrays
    of attention scores, which are float32 whatever the compute type.
    """
    inputs = 4 * (4 * tokens + 2 * rows)
    chunk, block = sizes.tokens[0], sizes.block_tokens
    # A chunk or a block may extend beyond the last token.
    stored = 4 * size * (tokens + max(chunk, block)) * config.hidden_size
    expansions = 2 if config.is_gated else 1
    of_chunk = size * (6 * config.hidden_size + expansions * config.intermediate_size)
    # A layer's parameters are copied, with CLS pooling also those of the layer before.
    copies = 2 if config.exit_pooling == "cls" else 1
    if config.num_hidden_groups == 1 or not sizes.copies_parameters:
        copies = 0
    of_layer = 4 * config.hidden_size + (1 + expansions) * config.intermediate_size
    weights = copies * config.inner_group_num * size * config.hidden_size * of_layer
    of_block = 4 * size * config.hidden_size
    of_block += 4 * 3 * config.num_attention_heads * sizes.longest
    return inputs + stored + weights + chunk * of_chunk + block * of_block


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
