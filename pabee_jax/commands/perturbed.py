"""`evaluate --perturbed`: what every setting loses on perturbed texts."""

from collections.abc import Sequence

import numpy as np

from pabee_jax.analysis import operating_points
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.robustness import Effect
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.data.perturbed import read_pairs
from pabee_jax.data.task import Examples, Task
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.predictions import predictions_of
from pabee_jax.reports import files, tables
from pabee_jax.reports.results_folder import ResultsFolder

_FILES = ("perturbed.csv", "perturbed.json")
_HEADER = ("setting", "original", "perturbed", "misled", "mean exit layer", "perturbed's")


def compare_texts(options: EvaluateOptions, pretrained: Pretrained, task: Task) -> None:
    """Print every setting's quality on both texts; write perturbed.csv and perturbed.json.

    Raises:
        InputError: a file that cannot be used, or results that cannot be written.
    """
    output = ResultsFolder(options.output_directory, "perturbed.json", options.overwrite)
    output.check(_FILES)
    pairs = read_pairs(options.perturbed or "", task)
    classifier = EarlyExitClassifier(pretrained, driver="full")
    original, perturbed = (
        _points(options, classifier, task, examples)
        for examples in (pairs.original, pairs.perturbed)
    )
    labels = pairs.original.labels
    assert labels is not None  # read_pairs refuses a file without labels.
    effects = [_effect(*points, labels) for points in zip(original, perturbed, strict=True)]
    names = tables.labels(original)
    print(f"\n{options.perturbed}: {len(labels)} pairs")
    print(tables.aligned([_HEADER, *map(_line, names, effects)]))
    records = [
        {"setting": name, **vars(effect)} for name, effect in zip(names, effects, strict=True)
    ]
    about = {"task": task.name, "file": str(options.perturbed), "pairs": len(labels)}
    with output.replace() as folder:
        files.write_csv(folder / "perturbed.csv", records)
        content = about | files.environment() | {"files": list(_FILES), "rows": records}
        files.write_json(folder / "perturbed.json", content)
    print(f"{', '.join(_FILES)} are in {output.path}")


def _points(
    options: EvaluateOptions, classifier: EarlyExitClassifier, task: Task, examples: Examples
) -> list[OperatingPoint]:
    rows = Rows.of({"dev": examples}, classifier.tokenize)
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    return operating_points.replayed(logits, options.settings, task, rows)


def _effect(original: OperatingPoint, perturbed: OperatingPoint, labels: np.ndarray) -> Effect:
    return Effect.of(
        labels,
        predictions_of(original.logits),
        predictions_of(perturbed.logits),
        original.mean_exit_layer,
        perturbed.mean_exit_layer,
    )


def _line(name: str, effect: Effect) -> Sequence[str]:
    shares = (effect.accuracy_original, effect.accuracy_perturbed, effect.misled)
    layers = (effect.mean_exit_layer_original, effect.mean_exit_layer_perturbed)
    percentages = [f"{100 * share:.2f}" for share in shares]
    return [name, *percentages, *(f"{layer:.2f}" for layer in layers)]
