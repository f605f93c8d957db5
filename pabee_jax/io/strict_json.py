"""JSON without NaN and infinity, which the JSON standard does not allow."""

import json
import math
from typing import Any


def dumps(values: Any, indent: int | None = None) -> str:
    """Return `values` as JSON text, with null in place of every number that is not finite."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
