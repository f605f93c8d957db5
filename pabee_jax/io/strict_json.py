"""JSON without NaN and infinity, which the JSON standard does not allow."""

import json
import math
from typing import Any


def dumps(values: Any, **options: Any) -> str:
    """Return `values` as JSON text, with null in place of every number that is not finite.

    Args:
        options: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
