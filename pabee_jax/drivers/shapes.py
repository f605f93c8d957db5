"""Sizes that compiled programs share."""


def next_power_of_two(rows: int) -> int:
    """Return the smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


def previous_power_of_two(rows: int) -> int:
    """Return the largest power of two that is at most `rows`."""
    return 1 << (int(rows).bit_length() - 1)


def sequence_lengths(max_length: int) -> tuple[int, ...]:
    """Return the lengths to which rows are padded, in ascending order; the last is `max_length`.

    The lengths are 8 apart up to 32, and then grow by at most 25%, so that a text pays for few
    tokens that it does not have.
    """
    lengths = [8, 16, 24, 32]
    while lengths[-1] < max_length:
        lengths.append(8 * (lengths[-1] * 5 // 4 // 8))
    return (*(length for length in lengths if length < max_length), max_length)
