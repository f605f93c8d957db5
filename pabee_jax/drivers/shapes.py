"""Sizes that compiled programs share."""


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
