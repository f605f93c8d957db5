"""`evaluate --calibrate`: the fastest setting whose risk is controlled, stored in config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from pabee_jax.analysis import operating_points
from pabee_jax.analysis.curves import SETTINGS
from pabee_jax.analysis.risk_control import Guarantee, NoSetting, fastest_safe_setting
from pabee_jax.analysis.rows import Rows
from pabee_jax.analysis.selection import halves
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.checkpoints.saving import save_criterion, save_rows_used
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.criteria import Patience, criterion_class, describe
from pabee_jax.data import used_rows
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.reports import tables

_GUARANTEE = "guaranteed"


def choose_setting(options: EvaluateOptions, pretrained: Pretrained, task: Task) -> None:
    """Choose a setting on one half of the split, evaluate it on the other half, and store it.

    Raises:
        InputError: no setting qualifies (and why), or the checkpoint cannot be written.
    """
    classifier = EarlyExitClassifier(pretrained, driver="full")
    parts = task.read(options.split)
    rows = Rows.of(parts, classifier.tokenize)
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    if logits.shape[1] < 2:
        raise InputError(
            "--calibrate needs at least 2 rows, half of them to choose a setting and half "
            f"to evaluate it; the {options.split} split has 1"
        )
    calibration_rows, other_rows = halves(logits.shape[1])
    labels = rows.dataset.labels
    families = {
        f"{name} {family}": settings
        for name in options.criterion_names or ("patience",)
        # Thresholds come from the other half, without its labels, so that the order of the settings
        # does not depend on the calibration rows.
        for family, settings in criterion_class(name)
        .families(logits[:, other_rows], SETTINGS)
        .items()
    }
    claim = _claim(pretrained.hugging_face_config.get(used_rows.KEY), list(parts.values()))
    try:
        guarantee = fastest_safe_setting(
            families,
            logits[:, calibration_rows],
            None if labels is None else labels[calibration_rows],
            max_drop=options.max_drop,
            confidence=options.confidence,
            tolerance=options.tolerance,
        )
    except NoSetting as error:
        if error.is_tested:
            _record(options, pretrained, parts)
        raise
    # The rows are used from now on, whether the setting is stored or not.
    _record(options, pretrained, parts)
    print(_summary(guarantee, labels is not None, claim))
    if guarantee.mean_exit_layer >= len(logits):
        raise InputError(
            "the fastest setting whose risk is controlled saves no layer; it is not stored"
        )
    shown = [Patience(0), guarantee.setting]
    points = operating_points.replayed(logits[:, other_rows], shown, task, rows.take(other_rows))
    print(f"\non the other {len(other_rows)} rows:\n{tables.table(points)}\n")
    stored = {name: value for name, value in vars(guarantee).items() if name != "setting"}
    directory = options.checkpoint_directory
    save_criterion(directory, guarantee.setting, stored | {"split": options.split, "claim": claim})
    print(
        f"saved in {directory / 'config.json'}: EarlyExitClassifier.from_pretrained"
        f"({options.checkpoint!r}) uses it"
    )


def _record(
    options: EvaluateOptions, pretrained: Pretrained, parts: Mapping[str, Examples]
) -> None:
    records = pretrained.hugging_face_config.get(used_rows.KEY)
    for examples in parts.values():
        records = used_rows.with_uses(records, examples, [used_rows.CALIBRATED])
    save_rows_used(options.checkpoint_directory, records or [])


def _claim(records: Any, parts: Sequence[Examples]) -> str:
    """Return whether the bound is guaranteed, in words for a reader of config.json."""
    if uses := used_rows.describe(used_rows.uses_of(records, parts)):
        return (
            f"an estimate without a guarantee: these rows, or many of them, {uses}; calibrate on "
            "rows that were not used before, with --split test or with other files"
        )
    if used_rows.are_known(records):
        return _GUARANTEE
    return (
        f"{_GUARANTEE} if the rows are new to the checkpoint, which does not record the rows that "
        "it was trained and selected on"
    )


def _summary(guarantee: Guarantee, with_labels: bool, claim: str) -> str:
    harm = "get a worse answer than at full depth" if with_labels else "differ from full depth"
    confidence = f"with {guarantee.confidence:.0%} confidence "
    if not claim.startswith(_GUARANTEE):
        confidence = "by estimate "
    return (
        f"{describe(guarantee.setting)}: {confidence}at most {guarantee.max_drop:.2%} of new rows "
        f"{harm} ({claim})\n"
        f"on the {guarantee.rows} calibration rows: {guarantee.harmed} do, mean exit layer "
        f"{guarantee.mean_exit_layer:.2f}"
    )
