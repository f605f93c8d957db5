"""Sizes that compiled programs share."""

import dataclasses
from collections.abc import Sequence

# The exits of one row per this many tokens of a chunk are computed together.
_TOKENS_PER_EXIT = 32


def next_power_of_two(rows: int) -> int:
    """Return the smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


def previous_power_of_two(rows: int) -> int:
    """Return the largest power of two that is at most `rows`."""
    return 1 << (int(rows).bit_length() - 1)


def sequence_lengths(max_length: int, multiple: int = 8, growth: float = 1.25) -> tuple[int, ...]:
    """Return the lengths to which rows are padded, in ascending order; the last is `max_length`.

    The others are multiples of `multiple`: the first four, and then lengths that grow by at most
    the factor `growth`, so that a text pays for few tokens that it does not have.
    """
    lengths = [multiple, 2 * multiple, 3 * multiple, 4 * multiple]
    while lengths[-1] < max_length:
        lengths.append(int(lengths[-1] * growth) // multiple * multiple)
    return (*(length for length in lengths if length < max_length), max_length)


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """The static sizes of a program that runs rows without padding.

    Attributes:
        tokens: the sizes of chunks, in descending order: of full chunks, and of the chunks for the
            tokens that do not fill one.
        lengths: the length classes, in ascending order: attention pads rows to one of them. No row
            is longer than the last.
        block_tokens: the tokens, with padding, of the rows whose attention runs together.
        copies_parameters: whether the program copies the parameters of a layer before it runs the
            layer. Otherwise, every use of parameters is a switch over the layers, which saves the
            time of the copy (worth it for few tokens) and takes longer to compile.

    Raises:
        ValueError: the sizes do not descend, or a block cannot hold the longest row.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    block_tokens: int
    copies_parameters: bool = True

    def __post_init__(self):
        if list(self.tokens) != sorted(set(self.tokens), reverse=True):
            raise ValueError(f"the sizes of chunks must descend, not be {self.tokens}")
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"the length classes must ascend, not be {self.lengths}")
        if self.block_tokens < self.longest:
            raise ValueError(f"{self.block_tokens} tokens cannot hold a row of {self.longest}")

    @classmethod
    def of(cls, chunk_tokens: int, longest: int) -> "ChunkSizes":
        """Return the sizes for rows of up to `longest` tokens; the last chunks are a quarter."""
        tokens = {chunk_tokens, max(1, chunk_tokens // 4)}
        tokens = tuple(sorted(tokens, reverse=True))
        return cls(tokens, sequence_lengths(longest), max(chunk_tokens, longest))

    @property
    def longest(self) -> int:
        """The most tokens of a row."""
        return self.lengths[-1]

    @property
    def exit_rows(self) -> list[int]:
        """The rows whose exits are computed together, in descending order."""
        return sorted({max(1, size // _TOKENS_PER_EXIT) for size in self.tokens}, reverse=True)


def run_while_more_than(sizes: Sequence[int]) -> list[int]:
    """Return how much must remain for each size, so that a chunk of this size runs.

    Chunks of the first size run while more remains than chunks of the second size should take. What
    then remains runs in chunks of the second size, and in the end in the smallest that holds it.

    Args:
        sizes: the sizes of chunks, in descending order.
    """
    if len(sizes) == 1:
        return [0]
    return [sizes[0] - sizes[1], *sizes[2:], 0]
