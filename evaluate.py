"""Evaluates a checkpoint: the table patience -> metric, layers, speed.

python evaluate.py --checkpoint runs/mrpc --patience 0,3,4,5,6
"""

from absl import flags
from ml_collections import config_flags

from pabee_jax import command_line
from pabee_jax.evaluation.program import Options, evaluate

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Run or checkpoint directory, also gs://..., or hub id."
)
_PATIENCE = flags.DEFINE_string(
    "patience", None, "Patience values, comma-separated; by default 0,1,2,3,4,5,6."
)
_CRITERION = flags.DEFINE_multi_string(
    "criterion",
    [],
    "A setting of an exit criterion, as in entropy:threshold=0.3; may be given several times. With "
    "--sweep or --calibrate names of criteria, comma-separated.",
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Also every criterion over its whole range, as curves.")
_REPORT = flags.DEFINE_bool("report", False, "Also report.html, a page of pictures.")
_PERTURBED = flags.DEFINE_string(
    "perturbed", None, "File of original and perturbed texts: what each setting loses on them."
)
_CALIBRATE = flags.DEFINE_bool(
    "calibrate", False, "Find the fastest safe setting on half of the rows; keep it in config.json."
)
_MAX_DROP = flags.DEFINE_float(
    "max_drop", 0.01, "--calibrate: the share of new rows that early exit may harm."
)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.95, "--calibrate: how sure that must be.")
_TOLERANCE = flags.DEFINE_float(
    "tolerance", None, "Regression: up to which error a score counts as right."
)
_DRIVER = flags.DEFINE_string(
    "driver", "full", "full: one pass and a replay; auto, loop, pool: real runs."
)
_TIME = flags.DEFINE_bool("time", False, "Also measure milliseconds per example.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Rows that run together; by default 32, in a pool 256 if they fit."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory of the results; by default the checkpoint."
)
_THRESHOLD = flags.DEFINE_float(
    "regression_threshold", None, "Regression: scores closer than this agree."
)
_SPLIT = flags.DEFINE_string("split", "dev", "dev or test.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "File for predictions in GLUE's format.")
_ALL_CHECKPOINTS = flags.DEFINE_bool("all_checkpoints", False, "Every kept training checkpoint.")
_CACHE = flags.DEFINE_string("compilation_cache", None, "Directory that keeps compiled programs.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Data to use instead of the run's own.")


def main(_) -> None:
    options = Options.checked(
        checkpoint=_CHECKPOINT.value,
        patience=_PATIENCE.value,
        criterion=_CRITERION.value,
        sweep=_SWEEP.value,
        report=_REPORT.value,
        perturbed=_PERTURBED.value,
        calibrate=_CALIBRATE.value,
        max_drop=_MAX_DROP.value,
        confidence=_CONFIDENCE.value,
        tolerance=_TOLERANCE.value,
        driver=_DRIVER.value,
        time=_TIME.value,
        batch_size=_BATCH_SIZE.value,
        output=_OUTPUT.value,
        regression_threshold=_THRESHOLD.value,
        split=_SPLIT.value,
        predictions=_PREDICTIONS.value,
        all_checkpoints=_ALL_CHECKPOINTS.value,
        compilation_cache=_CACHE.value,
    )
    evaluate(options, _CONFIG.value)


if __name__ == "__main__":
    command_line.run(main)
