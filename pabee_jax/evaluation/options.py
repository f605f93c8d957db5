"""The arguments of evaluate.py, checked before any file is opened."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from pabee_jax import criteria, storage
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.drivers.plan import check_driver
from pabee_jax.errors import InputError

_DEFAULT_PATIENCE = "0,1,2,3,4,5,6"


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of evaluate.py; see its flags.

    Attributes:
        settings: the lines of the table.
        names: the criteria of a sweep or a calibration; empty: its default.
    """

    checkpoint: str
    settings: tuple[ExitCriterion, ...]
    names: tuple[str, ...]
    driver: str
    time: bool
    batch_size: int | None
    output: epath.Path
    regression_threshold: float | None
    split: str
    predictions: Path | None
    all_checkpoints: bool
    sweep: bool
    report: bool
    perturbed: str | None
    calibrate: bool
    max_drop: float
    confidence: float
    tolerance: float | None
    compilation_cache: str | None

    @classmethod
    def checked(
        cls,
        *,
        checkpoint: str | None,
        patience: str | None,
        criterion: Sequence[str],
        output: str | None,
        predictions: str | None,
        **others: Any,
    ) -> "Options":
        """Raises InputError for arguments that cannot be meant."""
        if not checkpoint:
            raise InputError("--checkpoint is missing: a run directory, a checkpoint or a hub id")
        check_driver(others["driver"])
        if others["split"] not in ("dev", "test"):
            raise InputError(f"--split is {others['split']!r}; it must be dev or test")
        if others["batch_size"] is not None and others["batch_size"] < 1:
            raise InputError(f"--batch_size is {others['batch_size']}; it must be at least 1")
        # A comma also stands between the fields of a setting.
        texts = [
            each for text in criterion for each in ([text] if ":" in text else text.split(","))
        ]
        names = tuple(criteria.known(text) and text for text in texts if ":" not in text)
        if names and not (others["sweep"] or others["calibrate"]):
            raise InputError(
                f"--criterion {names[0]}: give a setting, as in entropy:threshold=0.3; or with "
                "--sweep the whole range, with --calibrate the setting that is safe"
            )
        settings = [criteria.parse(text) for text in texts if ":" in text]
        if patience is not None or not settings:
            threshold = others["regression_threshold"] or 0.0
            values = _patience_values(_DEFAULT_PATIENCE if patience is None else patience)
            settings = [*(Patience(value, threshold) for value in values), *settings]
        if predictions and len(settings) != 1:
            raise InputError(
                "--predictions writes the answers of one setting: give one --patience, not "
                f"{len(settings)}"
            )
        if predictions and not storage.local_path_of(predictions).parent.is_dir():
            raise InputError(f"--predictions {predictions}: there is no such folder")
        _check_calibration(checkpoint, others)
        if not output and not storage.path_of(checkpoint).is_dir():
            output = Path(checkpoint).name
        return cls(
            checkpoint=checkpoint,
            settings=tuple(dict.fromkeys(settings)),
            names=tuple(dict.fromkeys(names)),
            output=storage.path_of(output or checkpoint),
            predictions=storage.local_path_of(predictions) if predictions else None,
            **others,
        )


def _check_calibration(checkpoint: str, others: dict[str, Any]) -> None:
    for name in ("max_drop", "confidence"):
        if not 0 < others[name] < 1:
            raise InputError(f"--{name} must be between 0 and 1, not {others[name]}")
    if others["tolerance"] is not None and not others["tolerance"] >= 0:
        raise InputError(f"--tolerance must be 0 or more, not {others['tolerance']}")
    if not others["calibrate"]:
        return
    if not storage.path_of(checkpoint).is_dir():
        raise InputError(
            f"--calibrate keeps the setting in the checkpoint's config.json: {checkpoint} must be "
            "a directory"
        )
    for name in ("sweep", "report", "perturbed", "all_checkpoints", "time"):
        if others[name]:
            raise InputError(
                f"--calibrate and --{name} do not go together: what is shown on the rows of a "
                "calibration would be too good"
            )


def _patience_values(text: str) -> list[int]:
    values = []
    for part in text.split(","):
        try:
            values.append(int(part))
        except ValueError:
            raise InputError(
                f"--patience takes whole numbers with commas between them, not {text!r}"
            ) from None
    if any(value < 0 for value in values):
        raise InputError(f"--patience must be 0 or more, not {min(values)}")
    return list(dict.fromkeys(values))
