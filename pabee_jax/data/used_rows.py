"""The record in `config.json` of the rows that a checkpoint has seen, and what they were used for.

Risk control is valid for rows that neither the weights nor the setting have seen.
"""

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pabee_jax.data.task import Examples

# The field of config.json. It is beside `early_exit`, which another criterion replaces.
KEY = "rows_used"
TRAINED, CHOSE_STEP, CHOSE_SETTING, CALIBRATED = "trained", "step", "setting", "calibration"
_WORDS = {
    TRAINED: "trained the weights",
    CHOSE_STEP: "chose the step whose weights were exported",
    CHOSE_SETTING: "chose the setting at the end of training",
}
# A record holds the smallest hashes, so that it finds a large part of its rows in any other set.
_SAMPLE = 32
_SHARE = 0.1


def with_uses(records: Any, examples: Examples, uses: Sequence[str]) -> list[dict[str, Any]]:
    """Return the records with one more use of the rows for each of `uses`.

    Args:
        records: the value of `KEY` in config.json; None if it has none.
        examples: the rows. Their labels are not recorded, because rows are the same without them.
        uses: `TRAINED`, `CHOSE_STEP`, `CHOSE_SETTING` or `CALIBRATED`.
    """
    hashes = _hashes(examples)
    sample = " ".join(heapq.nsmallest(_SAMPLE, hashes))
    by_sample = {record["sample"]: record for record in _valid(records)}
    counts = dict(by_sample.get(sample, {}).get("uses", {}))
    for use in uses:
        counts[use] = counts.get(use, 0) + 1
    by_sample[sample] = {"rows": len(examples), "sample": sample, "uses": counts}
    return list(by_sample.values())


def uses_of(records: Any, examples: Sequence[Examples]) -> dict[str, int]:
    """Return how often the rows, or a tenth of a set that shares rows with them, were used.

    Args:
        records: the value of `KEY` in config.json.
        examples: the parts of the rows.
    """
    hashes = set().union(*map(_hashes, examples))
    counts: dict[str, int] = {}
    for record in _valid(records):
        sample = record["sample"].split()
        if len(hashes.intersection(sample)) >= max(1, _SHARE * len(sample)):
            for use, count in record["uses"].items():
                counts[use] = counts.get(use, 0) + count
    return counts


def are_known(records: Any) -> bool:
    """Return whether the records include the rows that trained the weights."""
    return any(record["uses"].get(TRAINED) for record in _valid(records))


def describe(uses: Mapping[str, int]) -> str:
    """Return what rows were used for, as the end of a sentence: "trained the weights"."""
    words = [words for use, words in _WORDS.items() if uses.get(use)]
    if times := uses.get(CALIBRATED):
        words.append(f"were calibrated on before ({times} time{'s' if times > 1 else ''})")
    return " and ".join(words)


def _valid(records: Any) -> list[dict[str, Any]]:
    """Return the records that have the form of `with_uses`; anybody may edit config.json."""
    return [
        record
        for record in (records if isinstance(records, list) else ())
        if isinstance(record, dict)
        and isinstance(record.get("sample"), str)
        and isinstance(record.get("uses"), dict)
        and all(isinstance(count, int) for count in record["uses"].values())
    ]


def _hashes(examples: Examples) -> set[str]:
    pairs = examples.pairs or [None] * len(examples)
    return {
        hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12]
        for row in zip(examples.texts, pairs, strict=True)
    }
