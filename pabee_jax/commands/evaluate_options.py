"""The options of `evaluate`: each written down once, all checked before any file is opened."""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

from etils import epath

from pabee_jax import criteria
from pabee_jax.commands.config_file import USAGE
from pabee_jax.commands.options import option, refuse_without_effect
from pabee_jax.commands.plugins import plugin_option
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.data.config import DataConfig
from pabee_jax.data.glue import submission_paths
from pabee_jax.errors import InputError
from pabee_jax.inference.planning import check_driver
from pabee_jax.io import storage
from pabee_jax.training.config import leaves

_DEFAULT_PATIENCE = "0,1,2,3,4,5,6"
# For an option, the options that have no effect beside it.
_IGNORED_BY = {
    "calibrate": (
        "patience",
        "regression_threshold",
        "driver",
        "time",
        "output",
        "predictions",
        "all_checkpoints",
        "sweep",
        "report",
        "perturbed",
        "overwrite",
    ),
    "perturbed": (
        "split",
        "driver",
        "time",
        "predictions",
        "all_checkpoints",
        "sweep",
        "report",
    ),
}
# For an option, the options at least one of which it needs.
_ONLY_WITH = {
    "max_drop": ("calibrate",),
    "confidence": ("calibrate",),
    "tolerance": ("calibrate", "sweep", "report"),
}


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The options of `evaluate` beside `--config`; each field is a flag.

    Raises:
        InputError: a value that cannot be used, or an option that has no effect.
    """

    config_help: ClassVar[str] = f"Data to use instead of the run's own: {USAGE}."
    config_fields: ClassVar[tuple[str, ...]] = (
        "max_seq_length",
        *leaves(DataConfig()),
    )

    checkpoint: str = option(
        "Required: run or checkpoint directory (local or gs://BUCKET/...), or hub id.", ""
    )
    patience: str | None = option(
        f"Patience values, comma-separated; by default {_DEFAULT_PATIENCE}."
    )
    criterion: tuple[str, ...] = option(
        "A setting of an exit criterion, as in entropy:threshold=0.3; may be given several times. "
        "With --sweep or --calibrate: names of criteria, comma-separated.",
        (),
    )
    regression_threshold: float | None = option(
        "For regression: two scores agree when they differ by less than this."
    )
    split: str = option("Rows to evaluate on: dev or test.", "dev")
    driver: str = option(
        "full: one pass, and a replay of every setting; auto, loop, pool: run every setting.",
        "full",
    )
    batch_size: int | None = option(
        "Most rows that run together; by default 32, and in a pool as many as are good for speed."
    )
    time: bool = option("Also measure milliseconds per example.", False)
    output: str | None = option(
        "Directory of the results; by default the checkpoint or, for other rows than the dev rows "
        "of a run, a folder in it."
    )
    predictions: str | None = option("File for predictions in GLUE's submission format.")
    overwrite: bool = option(
        "Replace files of --output that this command did not write, and --predictions.", False
    )
    all_checkpoints: bool = option("Evaluate every kept training checkpoint.", False)
    sweep: bool = option("Also evaluate every criterion over its whole range, as curves.", False)
    report: bool = option("Also write report.html, a page of figures.", False)
    perturbed: str | None = option(
        "File of original and perturbed texts: evaluate every setting on both."
    )
    calibrate: bool = option(
        "Find the fastest setting whose risk is controlled, and store it in config.json.", False
    )
    max_drop: float = option("With --calibrate: the share of new rows that may be harmed.", 0.01)
    confidence: float = option("With --calibrate: the probability that this holds.", 0.95)
    tolerance: float | None = option(
        "For regression: the largest error of a score that counts as correct."
    )
    compilation_cache: str | None = option("Directory that keeps compiled programs.")
    plugin: tuple[str, ...] = plugin_option()

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: a run directory, a checkpoint or a hub id")
        check_driver(self.driver)
        if self.split not in ("dev", "test"):
            raise InputError(f"--split is {self.split!r}; it must be dev or test")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch_size is {self.batch_size}; it must be at least 1")
        for name in ("max_drop", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} must be between 0 and 1, not {getattr(self, name)}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise InputError(f"--tolerance must be 0 or more, not {self.tolerance}")
        refuse_without_effect(self, _IGNORED_BY, _ONLY_WITH)
        self._check_criteria()
        if self.predictions:
            self._check_predictions(self.predictions)
        if self.calibrate and not storage.path_of(self.checkpoint).is_dir():
            raise InputError(
                "--calibrate stores the setting in the checkpoint's config.json: "
                f"{self.checkpoint} must be a directory"
            )

    @functools.cached_property
    def settings(self) -> tuple[ExitCriterion, ...]:
        """The rows of the table: every patience, then every setting of another criterion.

        With --calibrate, there are no settings: the command chooses one.
        """
        if self.calibrate:
            return ()
        settings = [criteria.parse(text) for text in self._criterion_texts if ":" in text]
        if self.patience is not None or not settings:
            threshold = self.regression_threshold or 0.0
            text = _DEFAULT_PATIENCE if self.patience is None else self.patience
            settings = [*(Patience(value, threshold) for value in _numbers(text)), *settings]
        return tuple(dict.fromkeys(settings))

    @functools.cached_property
    def criterion_names(self) -> tuple[str, ...]:
        """The criteria of a sweep or of risk control; empty for the default."""
        names = [text for text in self._criterion_texts if ":" not in text]
        for name in names:
            criteria.criterion_class(name)
        return tuple(dict.fromkeys(names))

    @functools.cached_property
    def checkpoint_directory(self) -> epath.Path:
        """The checkpoint as a path; it need not exist, for a hub id."""
        return storage.path_of(self.checkpoint)

    @functools.cached_property
    def output_directory(self) -> epath.Path:
        """Where the results are written; for a hub id, a directory of its name."""
        if self.output:
            return storage.path_of(self.output)
        if self.checkpoint_directory.is_dir():
            return self.checkpoint_directory
        return epath.Path(Path(self.checkpoint).name)

    @property
    def _criterion_texts(self) -> list[str]:
        # A comma also stands between the fields of a setting.
        return [
            part for text in self.criterion for part in ([text] if ":" in text else text.split(","))
        ]

    def _check_criteria(self) -> None:
        names, given = self.criterion_names, [text for text in self.criterion if ":" in text]
        if names and not (self.sweep or self.calibrate):
            raise InputError(
                f"--criterion {names[0]}: give a setting, as in entropy:threshold=0.3; or add "
                "--sweep for the whole range, or --calibrate for a setting whose risk is controlled"
            )
        if given and self.calibrate:
            raise InputError(
                f"--criterion {given[0]} is one setting, and --calibrate chooses among all: give "
                f"--criterion {given[0].partition(':')[0]}"
            )
        if not any(isinstance(setting, Patience) for setting in self.settings) and (
            self.regression_threshold is not None
        ):
            raise InputError(
                "--regression_threshold has no effect without --patience: a setting of "
                "--criterion has its own thresholds"
            )

    def _check_predictions(self, predictions: str) -> None:
        if len(self.settings) != 1:
            raise InputError(
                "--predictions writes the answers of one setting: give one --patience, not "
                f"{len(self.settings)}"
            )
        path = storage.local_path_of(predictions)
        if not path.parent.is_dir():
            raise InputError(f"--predictions {predictions}: its directory does not exist")
        for submission in submission_paths(path):
            if submission.exists() and not self.overwrite:
                raise InputError(f"--predictions {submission} exists; replace it with --overwrite")


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--patience takes whole numbers with commas between them, not {text!r}"
        ) from None
    if min(values) < 0:
        raise InputError(f"--patience must be 0 or more, not {min(values)}")
    return values
