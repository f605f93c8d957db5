"""evaluate.py --calibrate: the fastest safe setting, kept in the checkpoint's config.json."""

import numpy as np
from jaxtyping import Int

from pabee_jax import storage
from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import Patience, describe, known
from pabee_jax.data.task import Task
from pabee_jax.evaluation import operating_points, report
from pabee_jax.evaluation.calibration import Guarantee, calibrate
from pabee_jax.evaluation.curves import SETTINGS
from pabee_jax.evaluation.operating_points import Rows
from pabee_jax.evaluation.options import Options
from pabee_jax.pretrained import save_criterion


def select(options: Options, classifier: EarlyExitClassifier, task: Task, rows: Rows) -> None:
    """Calibrates on one half of the split, looks at the choice on the other, and saves it.

    Raises:
        InputError: no setting qualifies (and why), or the checkpoint cannot be written.
    """
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    ours, others = halves(logits.shape[1])
    labels = rows.dataset.labels
    families = {
        f"{name} {family}": settings
        for name in options.names or ("patience",)
        # The other half, without its labels, says which thresholds there are: an order of settings
        # that the calibration rows have no part in.
        for family, settings in known(name).families(logits[:, others], SETTINGS).items()
    }
    found = calibrate(
        families,
        logits[:, ours],
        None if labels is None else labels[ours],
        max_drop=options.max_drop,
        confidence=options.confidence,
        tolerance=options.tolerance,
    )
    print(_told(found, labels is not None))
    shown = [Patience(0), found.setting]
    points = operating_points.replayed(logits[:, others], shown, task, rows.take(others))
    print(f"\non the other {len(others)} rows:\n{report.table(points)}\n")
    checkpoint = storage.path_of(options.checkpoint)
    guarantee = {name: value for name, value in vars(found).items() if name != "setting"}
    save_criterion(checkpoint, found.setting, guarantee | {"split": options.split})
    print(
        f"saved in {checkpoint / 'config.json'}: EarlyExitClassifier.from_pretrained"
        f"({options.checkpoint!r}) uses it"
    )


def halves(rows: int) -> tuple[Int[np.ndarray, " half"], Int[np.ndarray, " rest"]]:
    """The rows to calibrate on and the others, always the same for so many rows."""
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[: (rows + 1) // 2]), np.sort(order[(rows + 1) // 2 :])


def _told(found: Guarantee, with_labels: bool) -> str:
    harm = "get a worse answer than at full depth" if with_labels else "differ from full depth"
    return (
        f"{describe(found.setting)}: with {found.confidence:.0%} confidence at most "
        f"{found.max_drop:.2%} of new rows {harm}\n"
        f"on the {found.rows} rows of the calibration: {found.harmed} do, mean exit layer "
        f"{found.mean_exit_layer:.2f}"
    )
