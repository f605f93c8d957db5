"""The rows of the recorded sweep over lengths. This file uses neither torch nor pabee_jax."""

import numpy as np

# Families that have token types.
TYPES = ("bert", "electra", "albert")


def row_of_length(model_type: str, length: int) -> dict[str, np.ndarray]:
    """Return a row of so many tokens, by a formula. The mask of every seventh row has holes."""
    position = np.arange(length, dtype=np.int32)[None]
    ids = 2 + (7 * position + position**2 // 11 + 3 * length) % 58
    has_hole = (length % 7 == 0) & (position % 5 == 3) & (position < length - 1)
    types = (2 * position >= length) * (model_type in TYPES)
    arrays = {"input_ids": ids, "attention_mask": ~has_hole, "token_type_ids": types}
    return {name: values.astype(np.int32) for name, values in arrays.items()}
