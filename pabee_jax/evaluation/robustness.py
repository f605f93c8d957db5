"""evaluate.py --perturbed: what each setting loses on perturbed texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.data.perturbed import read_pairs
from pabee_jax.data.task import Task
from pabee_jax.evaluation import operating_points, report
from pabee_jax.evaluation.operating_points import OperatingPoint, Rows
from pabee_jax.evaluation.options import Options
from pabee_jax.predictions import predictions_of


@dataclasses.dataclass(frozen=True)
class Effect:
    """What other texts do to one setting. Shares are from 0 to 1, layers count from 1.

    Attributes:
        accuracy_original: share of the rows that is right on the original texts.
        accuracy_perturbed: the same on the perturbed ones.
        misled: of the rows that were right, the share that is no more ("attack success rate").
        mean_exit_layer_original: of all rows.
        mean_exit_layer_perturbed: of all rows.
    """

    accuracy_original: float
    accuracy_perturbed: float
    misled: float
    mean_exit_layer_original: float
    mean_exit_layer_perturbed: float

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        original: np.ndarray,
        perturbed: np.ndarray,
        mean_exit_layer_original: float,
        mean_exit_layer_perturbed: float,
    ) -> "Effect":
        """From (rows,) class ids: the right ones, and those predicted from either text."""
        right, still = original == labels, perturbed == labels
        return cls(
            accuracy_original=float(right.mean()),
            accuracy_perturbed=float(still.mean()),
            misled=float((right & ~still).sum() / max(right.sum(), 1)),
            mean_exit_layer_original=float(mean_exit_layer_original),
            mean_exit_layer_perturbed=float(mean_exit_layer_perturbed),
        )


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
    effects = [_effect(*each, labels) for each in zip(before, after, strict=True)]
    names = report.labels(before)
    print(f"\n{options.perturbed}: {len(labels)} pairs")
    print(report.aligned([_HEADER, *map(_line, names, effects)]))
    records = [{"setting": name, **vars(each)} for name, each in zip(names, effects, strict=True)]
    about = {"task": task.name, "file": str(options.perturbed), "pairs": len(labels)}
    content = {**report.results([], about), "rows": records}
    with report.results_folder(options.output) as folder:
        report.write_csv(folder / "perturbed.csv", records)
        report.write_json(folder / "perturbed.json", content)
    print(f"perturbed.csv, perturbed.json are in {options.output}")


_HEADER = ("setting", "original", "perturbed", "misled", "mean exit layer", "perturbed's")


def _points(options: Options, classifier, task: Task, rows: Rows) -> list[OperatingPoint]:
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    return operating_points.replayed(logits, options.settings, task, rows)


def _effect(before: OperatingPoint, after: OperatingPoint, labels: np.ndarray) -> Effect:
    return Effect.of(
        labels,
        *(predictions_of(point.logits) for point in (before, after)),
        *(point.mean_exit_layer for point in (before, after)),
    )


def _line(name: str, effect: Effect) -> Sequence[str]:
    shares = (effect.accuracy_original, effect.accuracy_perturbed, effect.misled)
    layers = (effect.mean_exit_layer_original, effect.mean_exit_layer_perturbed)
    return [name, *(f"{100 * each:.2f}" for each in shares), *(f"{each:.2f}" for each in layers)]
