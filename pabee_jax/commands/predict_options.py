"""The options of `predict`."""

import dataclasses
import functools

from pabee_jax.commands.criterion_options import given_criterion
from pabee_jax.commands.options import option
from pabee_jax.commands.plugins import plugin_option
from pabee_jax.criteria import ExitCriterion
from pabee_jax.errors import InputError
from pabee_jax.inference.planning import check_driver, check_size


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """The options of `predict`; each field is a flag.

    Raises:
        InputError: a value that cannot be used, or an option that has no effect.
    """

    checkpoint: str = option(
        "Required: run or checkpoint directory (local or gs://BUCKET/...), or hub id.", ""
    )
    input: tuple[str, ...] = option(
        "Required: file of rows: .csv, .tsv, .jsonl, .json (one object per line, or one array) or "
        ".parquet (also a folder of files), local or gs://; may be given several times.",
        (),
    )
    output: str = option("Required: file to write: .csv, .tsv, .jsonl or .parquet.", "")
    text: str = option("Column of the texts.", "text")
    text_pair: str = option("Column of the second texts of pairs; by default single texts.", "")
    keep: str = option("Columns of the input that are copied to the output, comma-separated.", "")
    patience: int | None = option(
        "Patience of the exit criterion; by default the criterion of the checkpoint."
    )
    regression_threshold: float | None = option(
        "For regression, with --patience: two scores agree when they differ by less than this."
    )
    criterion: str | None = option("An exit criterion, as in max_probability:threshold=0.9.")
    driver: str = option("How the layers run: auto, full, loop or pool.", "auto")
    batch_size: int | None = option(
        "Most rows that run together; by default as many as are good for speed."
    )
    dtype: str = option("Compute type: float32 or bfloat16.", "float32")
    overwrite: bool = option("Replace --output, and discard the parts of another command.", False)
    compilation_cache: str | None = option("Directory that keeps compiled programs.")
    plugin: tuple[str, ...] = plugin_option()

    def __post_init__(self):
        for name, meaning in (
            ("checkpoint", "a run directory, a checkpoint or a hub id"),
            ("input", "a file of rows"),
            ("output", "the file to write"),
            ("text", "the column of the texts"),
        ):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing: {meaning}")
        check_driver(self.driver)
        check_size("--batch_size", self.batch_size)
        if self.text == self.text_pair:
            raise InputError(f"--text and --text_pair name the same column {self.text!r}")
        for name in self.kept_columns:
            if not name or self.kept_columns.count(name) > 1:
                raise InputError(f"--keep is {self.keep!r}, which has an empty or a repeated name")
        _ = self.exit_criterion

    @functools.cached_property
    def exit_criterion(self) -> ExitCriterion | None:
        """The given criterion; None for the criterion of the checkpoint."""
        return given_criterion(self.criterion, self.patience, self.regression_threshold)

    @functools.cached_property
    def kept_columns(self) -> tuple[str, ...]:
        return tuple(self.keep.split(",")) if self.keep else ()
