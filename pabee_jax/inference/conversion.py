"""Compares a converted checkpoint with its source, in the library for which it was written."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import from_tensors
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import ExitCriterion, describe
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError, first_line_of
from pabee_jax.inference.artifact import thresholds
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.onnx_model import OUTPUTS
from pabee_jax.models.config import ModelConfig

# Libraries differ by 1e-5 in float32; a wrong operation changes much more. A share of the largest
# logit.
_TOLERANCE = 1e-3
_MOST_ROWS, _MOST_TOKENS = 8, 4096
# A model with more positions is compared on rows of this length, unless its format has another one.
_LONGEST_ROW = 1024
# Settings of the criterion's class, beside the checkpoint's own.
_SETTINGS = 3


def compare_plain(pretrained: Pretrained, directory: Path, exit: int, *, flax: bool) -> None:
    """Raise InputError unless a plain classifier has the logits of exit `exit`.

    `transformers` computes the logits; without PyTorch, and for Flax, this package does.
    """
    rows = generated_rows(pretrained, min(pretrained.max_length, _LONGEST_ROW))
    expected = EarlyExitClassifier(pretrained).all_exit_logits(rows)[exit - 1]
    if flax or importlib.util.find_spec("torch") is None:
        actual = _read_back(pretrained, directory).all_exit_logits(rows)[-1]
    else:
        actual = _logits_of_transformers(directory, rows)
    _compare(actual, expected, "the classifier")


def compare_exits(pretrained: Pretrained, directory: Path) -> None:
    """Raise InputError unless a checkpoint has the logits of `pretrained` at every exit."""
    rows = generated_rows(pretrained, min(pretrained.max_length, _LONGEST_ROW))
    actual = _read_back(pretrained, directory).all_exit_logits(rows)
    _compare(actual, EarlyExitClassifier(pretrained).all_exit_logits(rows), "the checkpoint")


def compare_onnx(classifier: EarlyExitClassifier, path: Path, length: int) -> None:
    """Raise InputError unless ONNX Runtime gives every row its exit layer and its logits.

    Without ONNX Runtime, log a warning.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        logging.warning("onnxruntime is not installed: the model was not compared with its source")
        return
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options)
    except Exception as error:  # The exceptions of ONNX Runtime have no public base class.
        raise InputError(
            f"ONNX Runtime cannot open the model, which was discarded: {first_line_of(error)}"
        ) from None
    rows = generated_rows(classifier.pretrained, length)
    logits = classifier.all_exit_logits(rows)
    # An input with a default value is an "overridable initializer".
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    names = {value.name for value in inputs}
    tokens = {name: value.astype(np.int64) for name, value in rows.items() if name in names}
    for setting in _settings(classifier, logits):
        values = {name: value for name, value in thresholds(setting).items() if name in names}
        exit_layers, answers = map(np.asarray, session.run(list(OUTPUTS), tokens | values))
        expected_layers, expected = map(np.asarray, replay(setting, logits))
        is_clear = _is_clear(setting, logits, expected_layers)
        if (exit_layers != expected_layers)[is_clear].any():
            raise InputError(
                f"with {describe(setting)}, rows exit at other layers in ONNX Runtime; the model "
                "was discarded: please report this"
            )
        _compare(answers[is_clear], expected[is_clear], "the ONNX model")


def generated_rows(pretrained: Pretrained, length: int) -> dict[str, np.ndarray]:
    """Return a padded batch of random tokens, with rows of 1 to `length` tokens.

    The position of a token in RoBERTa and MPNet of `transformers` depends on the padding ids before
    it, so only padding has this id.
    """
    config, random = pretrained.model.config, np.random.default_rng(0)
    count = min(_MOST_ROWS, max(2, _MOST_TOKENS // length))
    lengths = np.linspace(length, 1, count).round().astype(int)[:, None]
    lengths[1:2] = max(1, length - 1)
    mask = np.arange(length) < lengths
    padding = max(0, config.position_offset - 1)
    ids = random.choice(np.delete(np.arange(config.vocab_size), padding), mask.shape)
    types = mask & (np.arange(length) >= lengths // 2) & (config.type_vocab_size > 1)
    return {
        "input_ids": np.where(mask, ids, padding).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": types.astype(np.int32),
    }


def _read_back(pretrained: Pretrained, directory: Path) -> EarlyExitClassifier:
    """Load a checkpoint that was written from `pretrained`, without the warnings of a load."""
    shape = pretrained.model.config
    values = read_config_json(directory) | shape.exits
    config = ModelConfig.from_hugging_face(values, shape.num_labels)
    model, _ = from_tensors(read_tensors(directory), config)
    return EarlyExitClassifier(dataclasses.replace(pretrained, model=model, criterion=None))


def _logits_of_transformers(directory: Path, rows: dict[str, np.ndarray]) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    has_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    except Exception as error:  # The errors of transformers have no common base class.
        raise InputError(
            f"transformers cannot load the classifier, which was discarded: {first_line_of(error)}"
        ) from None
    finally:
        if has_bar:
            transformers.utils.logging.enable_progress_bar()
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    names = [name for name in rows if has_types or name != "token_type_ids"]
    with torch.no_grad():
        inputs: dict[str, Any] = {name: torch.tensor(rows[name]).long() for name in names}
        return model(**inputs).logits.numpy()


def _settings(
    classifier: EarlyExitClassifier, logits: Float[np.ndarray, "exits rows classes"]
) -> list[ExitCriterion]:
    """Return the criterion and, if a call may give others, settings of its class."""
    criterion = classifier.criterion
    if classifier.pretrained.trained_exits == "last":
        return [criterion]
    families = type(criterion).families(logits, _SETTINGS).values()
    others = list(itertools.chain(*families))
    return [criterion, *others[:: max(1, len(others) // _SETTINGS)]]


def _is_clear(
    setting: ExitCriterion, logits: Float[np.ndarray, "exits rows classes"], layers: np.ndarray
) -> np.ndarray:
    """Return which rows exit at these layers whatever the rounding of another library is."""
    noise = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    noise *= _TOLERANCE * np.abs(logits).max()
    replayed = [replay(setting, logits + sign * noise)[0] for sign in (-1, 1)]
    return np.all([np.asarray(other) == layers for other in replayed], axis=0)


def _compare(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    difference = np.abs(actual - expected).max(initial=0)
    if not difference <= _TOLERANCE * max(1, np.abs(expected).max(initial=0)):
        raise InputError(
            f"the logits of {what} differ from the checkpoint's by {difference:.1e}; it was "
            "discarded: please report this"
        )
