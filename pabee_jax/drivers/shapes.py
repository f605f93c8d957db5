"""Sizes that compiled programs share."""


def next_power_of_two(rows: int) -> int:
    """Return the smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


def previous_power_of_two(rows: int) -> int:
    """Return the largest power of two that is at most `rows`."""
    return 1 << (int(rows).bit_length() - 1)
