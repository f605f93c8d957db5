"""evaluate.py --perturbed: what each setting loses on perturbed texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.data.perturbed import read_pairs
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.evaluation import operating_points, report
from pabee_jax.evaluation.operating_points import OperatingPoint, Rows
from pabee_jax.evaluation.options import Options
from pabee_jax.predictions import predictions_of


def compare_pairs(options: Options, classifier: EarlyExitClassifier, task: Task) -> None:
    """Prints what each setting does before and after; writes perturbed.csv and perturbed.json.

    Raises:
        InputError: a file that cannot be used, or results that cannot be written.
    """
    pairs = read_pairs(options.perturbed or "", task)
    before, after = (
        _points(options, classifier, task, Rows.of({"dev": examples}, classifier))
        for examples in (pairs.original, pairs.perturbed)
    )
    labels = pairs.original.labels
    assert labels is not None  # A file without them is refused.
    records = [_record(*each, labels) for each in zip(before, after, strict=True)]
    names = report.labels(before)
    print(f"\n{options.perturbed}: {len(labels)} pairs")
    print(report.aligned([_HEADER, *map(_line, names, records)]))
    for record, name in zip(records, names, strict=True):
        record["setting"] = name
    about = {"task": task.name, "file": str(options.perturbed), "pairs": len(labels)}
    content = {**report.results([], about), "rows": records}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report.write_csv(options.output / "perturbed.csv", records)
        report.write_json(options.output / "perturbed.json", content)
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}") from None
    print(f"perturbed.csv, perturbed.json are in {options.output}")


_HEADER = ("setting", "original", "perturbed", "misled", "mean exit layer", "perturbed's")


def _points(options: Options, classifier, task: Task, rows: Rows) -> list[OperatingPoint]:
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    return operating_points.replayed(logits, options.settings, task, rows)


def _record(before: OperatingPoint, after: OperatingPoint, labels: np.ndarray) -> dict[str, Any]:
    """Attributes of one setting; misled: of the rows that were right, the share that is no more."""
    right, still = (predictions_of(point.logits) == labels for point in (before, after))
    misled = (right & ~still).sum() / max(right.sum(), 1)
    return {
        "setting": "",
        "accuracy_original": float(right.mean()),
        "accuracy_perturbed": float(still.mean()),
        "misled": float(misled),
        "mean_exit_layer_original": before.mean_exit_layer,
        "mean_exit_layer_perturbed": after.mean_exit_layer,
    }


def _line(name: str, record: dict[str, Any]) -> Sequence[str]:
    shares = (record[key] for key in ("accuracy_original", "accuracy_perturbed", "misled"))
    layers = (record[f"mean_exit_layer_{kind}"] for kind in ("original", "perturbed"))
    return [name, *(f"{100 * each:.2f}" for each in shares), *(f"{each:.2f}" for each in layers)]
