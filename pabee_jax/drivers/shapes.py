"""Sizes that compiled programs share."""

import dataclasses
from collections.abc import Sequence

# The exits of one row per this many tokens of a chunk are computed together.
_TOKENS_PER_EXIT = 32
# The tokens that do not fill a chunk run in chunks of `chunk_tokens // _REMAINDER_DIVISOR`.
_REMAINDER_DIVISOR = 4


def next_power_of_two(rows: int) -> int:
    """Return the smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


def previous_power_of_two(rows: int) -> int:
    """Return the largest power of two that is at most `rows`."""
    return 1 << (int(rows).bit_length() - 1)


def sequence_lengths(max_length: int, multiple: int = 8) -> tuple[int, ...]:
    """Return the lengths to which rows are padded, in ascending order; the last is `max_length`.

    The others are multiples of `multiple`: the first four, and then lengths that grow by at most
    25%, so that a text pays for few tokens that it does not have.
    """
    lengths = [multiple, 2 * multiple, 3 * multiple, 4 * multiple]
    while lengths[-1] < max_length:
        lengths.append(lengths[-1] * 5 // 4 // multiple * multiple)
    return (*(length for length in lengths if length < max_length), max_length)


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """The static sizes of a program that runs rows in chunks.

    Attributes:
        tokens: the tokens of a chunk: of full chunks, of the chunks for the tokens that do not
            fill one (neither is shorter than the longest row), and of smaller chunks for the last
            tokens. In descending order.
        longest: the most tokens of a row.
        block_factor: how many times the tokens of a chunk its padded block may have. With few rows,
            of mixed lengths, 1 leaves a part of the chunks empty.

    Raises:
        ValueError: a row might be longer than the chunks that run it.
    """

    tokens: tuple[int, ...]
    longest: int
    block_factor: int = 1

    def __post_init__(self):
        if list(self.tokens) != sorted(set(self.tokens), reverse=True):
            raise ValueError(f"the sizes of chunks must descend, not be {self.tokens}")
        # When the chunks of a size start, no more remains than the chunks before them leave.
        remains = [self.longest, *run_while_more_than(self.tokens)[:-1]]
        for size, most in zip(self.tokens, remains, strict=True):
            if size < min(self.longest, most):
                raise ValueError(
                    f"chunks of {self.tokens} tokens cannot hold {self.longest} tokens"
                )

    @classmethod
    def of(
        cls,
        chunk_tokens: int,
        longest: int,
        smallest: int | None = None,
        block_factor: int = 1,
    ) -> "ChunkSizes":
        """Return the sizes for rows of up to `longest` tokens.

        Args:
            chunk_tokens: the tokens of a full chunk; at least `longest`.
            longest: the most tokens of a row.
            smallest: the tokens of the smallest chunk, at least 8. A chunk costs its window whether
                or not tokens fill it; each further size adds a copy of the layers to the program.
                Absent, the last tokens have no smaller chunks.
            block_factor: see `ChunkSizes`.
        """
        tokens = [chunk_tokens]
        remainder = max(chunk_tokens // _REMAINDER_DIVISOR, longest)
        if remainder < chunk_tokens:
            tokens.append(remainder)
        while smallest is not None and tokens[-1] > (half := (tokens[-1] + 1) // 2) >= smallest:
            tokens.append(half)  # Rounded up, so that a row that is left over fits.
        return cls(tuple(tokens), longest, block_factor)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length classes of all rows; the last is `longest`."""
        return sequence_lengths(self.longest)

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
