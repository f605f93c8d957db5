"""Wall-clock times: full depth, the recorded exit layers of a run, and PyTorch, in turns.

The times need no trained weights: every row leaves at the layer at which it left in the evidence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import pytorch
from benchmarks.evidence.points import METRICS, SPEEDUPS, point_at
from benchmarks.evidence.runs import Run
from benchmarks.exit_schedule import ExitSchedule
from benchmarks.measure import TimedCall, time_in_turns
from pabee_jax import EarlyExitClassifier, Patience
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.load import load_task

# Rows that are timed one at a time.
_SINGLE_ROWS = 50
# PyTorch must give the same logits: rounding in float32 and in bfloat16.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def times_of(run: Run, arrays: dict[str, np.ndarray], options, seconds: float) -> dict[str, Any]:
    """Return the median seconds of all dev rows ("pool") and of single rows ("loop"), by setting.

    The settings are "full depth", the speed-ups "1.5", "2" and "3", and "PyTorch": the same encoder
    at full depth in `transformers`, with the rows in batches that are sorted by length.

    Args:
        run: the run.
        arrays: the recorded logits and labels of the run.
        options: those of the command. The pool gets `copies` of the dev rows.
        seconds: time for all drivers together.
    """
    result: dict[str, Any] = {"dtype": options.dtype, "copies": options.copies}
    config = run.config(options)
    pretrained = load_pretrained(
        options.model,
        num_labels=arrays["logits"].shape[2],
        dtype=options.dtype,
        exits={"exit_pooler": config.pooler, "exit_pooling": config.pooling},
    ).with_max_length(config.max_seq_length)
    exit_layers = {
        f"{speedup:g}": point_at(speedup, **arrays, metric=METRICS[run.task]).exit_layers
        for speedup in SPEEDUPS
    }
    for driver in options.drivers:
        classifier = EarlyExitClassifier(
            pretrained,
            driver=driver,
            chunk_tokens=options.chunk_tokens if driver == "pool" else None,
        )
        dataset = Rows.of(load_task(config).read("dev"), classifier.tokenize).dataset
        parts = [np.tile(np.arange(len(dataset)), options.copies)]
        if driver == "loop":
            parts = np.arange(0, len(dataset), max(1, len(dataset) // _SINGLE_ROWS))[:, None]
        datasets = [dataset.take(rows) for rows in parts]
        calls = {"full depth": predict_all(classifier, datasets, [Patience(0)] * len(parts))}
        for speedup, layers in exit_layers.items():
            schedules = [ExitSchedule(layers[rows].astype(np.int32)) for rows in parts]
            calls[speedup] = predict_all(classifier, datasets, schedules)
        if options.torch:
            calls["PyTorch"] = pytorch_call(classifier, datasets, options)
        medians = time_in_turns(calls, seconds / len(options.drivers), options.rounds)
        result[driver] = {"rows": sum(map(len, parts)), **medians}
    return result


def predict_all(
    classifier: EarlyExitClassifier, parts: Sequence[Dataset], settings: Sequence[ExitCriterion]
) -> TimedCall:
    """Return a call that predicts each part by itself, with its setting."""

    def predict():
        for part, setting in zip(parts, settings, strict=True):
            classifier.criterion = setting
            classifier.predict(part)

    return predict


def pytorch_call(classifier: EarlyExitClassifier, parts: Sequence[Dataset], options) -> TimedCall:
    """Return the call of PyTorch; every batch is as wide as its longest row.

    Raises:
        ValueError: the logits of the first batch differ from ours.
    """
    forward = pytorch_forward(classifier, options)
    batches = [
        batch
        for part in parts
        for batch in pytorch.batches_sorted_by_length(
            part.lengths, {name: part[name] for name in MODEL_INPUTS}, options.torch_batch
        )
    ]
    classifier.criterion = Patience(0)
    ours, theirs = classifier.predict(batches[0]).logits, forward(batches[0])
    if not np.allclose(ours, theirs, atol=_TOLERANCE[options.dtype]):
        raise ValueError(f"PyTorch differs by {np.abs(ours - theirs).max()}")
    return lambda: [forward(batch) for batch in batches]


def pytorch_forward(
    classifier: EarlyExitClassifier, options
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return a function from a batch to the last exit's logits, with `transformers`.

    PyTorch runs on a GPU if it has access to one.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    encoder = transformers.AutoModel.from_pretrained(options.model, dtype=dtype).eval().to(device)
    model, config = classifier.model, classifier.config
    pooler, classifiers = model.pooler, model.classifiers
    own = config.exit_pooler == "per_exit"
    arrays = [pooler.kernel[...], pooler.bias[...]]
    arrays = [array[-1] if own else array for array in arrays]
    arrays += [classifiers.kernel[-1], classifiers.bias[-1]]
    pool_kernel, pool_bias, kernel, bias = (
        torch.from_numpy(np.array(array, np.float32)).to(device) for array in arrays
    )
    names = MODEL_INPUTS if config.type_vocab_size > 1 else MODEL_INPUTS[:2]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(batch[name]).long().to(device) for name in names}
            hidden = encoder(**inputs).last_hidden_state.float()
            if config.exit_pooling == "mean":
                mask = inputs["attention_mask"][:, :, None].float()
                hidden = (hidden * mask).sum(1) / mask.sum(1)
            else:
                hidden = hidden[:, 0]
            pooled = torch.tanh(hidden @ pool_kernel + pool_bias)
            return (pooled @ kernel + bias).cpu().numpy()

    return run
