"""Wall-clock times of a trained run: full depth, the chosen settings, and PyTorch, in turns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pytorch
from benchmarks.evidence.runs import Run, dev_rows
from benchmarks.measure import TimedCall, time_in_turns
from pabee_jax import EarlyExitClassifier, Patience, criteria
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset

_PYTORCH_BATCH = 32
# Rows that are timed one at a time.
_SINGLE_ROWS = 50
# PyTorch must give the same logits: rounding in float32 and in bfloat16.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def times_of(run: Run, record: dict[str, Any], options, seconds: float) -> dict[str, Any]:
    """Return the median seconds of all dev rows ("pool") and of single rows ("loop"), by setting.

    The settings are "full depth", "SPEEDUP, half 1" and "SPEEDUP, half 2", and "PyTorch": the same
    model at full depth in `transformers`, with the rows in batches that are sorted by length.
    """
    workdir = run.workdir(options.output)
    result: dict[str, Any] = {"dtype": options.dtype}
    for driver in ("pool", "loop"):
        classifier = EarlyExitClassifier.from_pretrained(
            str(workdir), driver=driver, dtype=options.dtype
        )
        dataset = dev_rows(workdir, classifier).dataset
        parts = [dataset]
        if driver == "loop":
            rows = range(0, len(dataset), max(1, len(dataset) // _SINGLE_ROWS))
            parts = [dataset.take(slice(row, row + 1)) for row in rows]
        calls = timed_calls(classifier, record, parts)
        if options.torch:
            calls["PyTorch"] = pytorch_call(workdir, classifier, parts, options.dtype)
        medians = time_in_turns(calls, seconds / 2, options.rounds)
        result[driver] = {"rows": sum(map(len, parts)), **medians}
    return result


def timed_calls(
    classifier: EarlyExitClassifier, record: dict[str, Any], parts: Sequence[Dataset]
) -> dict[str, TimedCall]:
    """Return the calls of our driver, by setting; a call predicts each part by itself."""

    def call_of(setting) -> TimedCall:
        def predict():
            classifier.criterion = setting
            for part in parts:
                classifier.predict(part)

        return predict

    calls = {"full depth": call_of(Patience(0))}
    for speedup, point in record["points"].items():
        for half, values in enumerate(point["settings"], start=1):
            calls[f"{speedup}, half {half}"] = call_of(criteria.from_config(values))
    return calls


def pytorch_call(
    workdir: Path, classifier: EarlyExitClassifier, parts: Sequence[Dataset], dtype: str
) -> TimedCall:
    """Return the call of PyTorch; every batch is as wide as its longest row.

    Raises:
        ValueError: the logits of the first batch differ from ours.
    """
    forward = pytorch_forward(workdir, classifier, dtype)
    batches = [
        batch
        for part in parts
        for batch in pytorch.batches_sorted_by_length(
            part.lengths, {name: part[name] for name in MODEL_INPUTS}, _PYTORCH_BATCH
        )
    ]
    classifier.criterion = Patience(0)
    ours, theirs = classifier.predict(batches[0]).logits, forward(batches[0])
    if not np.allclose(ours, theirs, atol=_TOLERANCE[dtype]):
        raise ValueError(f"PyTorch differs by {np.abs(ours - theirs).max()}")
    return lambda: [forward(batch) for batch in batches]


def pytorch_forward(
    workdir: Path, classifier: EarlyExitClassifier, dtype: str
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return a function from a batch to the last exit's logits, with `transformers`."""
    import torch
    import transformers

    encoder = transformers.AutoModel.from_pretrained(workdir, dtype=getattr(torch, dtype)).eval()
    model, config = classifier.model, classifier.config
    pooler, classifiers = model.pooler, model.classifiers
    own = config.exit_pooler == "per_exit"
    arrays = [pooler.kernel[...], pooler.bias[...]]
    arrays = [array[-1] if own else array for array in arrays]
    arrays += [classifiers.kernel[-1], classifiers.bias[-1]]
    pool_kernel, pool_bias, kernel, bias = (
        torch.from_numpy(np.array(array, np.float32)) for array in arrays
    )
    names = MODEL_INPUTS if config.type_vocab_size > 1 else MODEL_INPUTS[:2]

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(batch[name]).long() for name in names}
            hidden = encoder(**inputs).last_hidden_state.float()
            if config.exit_pooling == "mean":
                mask = inputs["attention_mask"][:, :, None].float()
                hidden = (hidden * mask).sum(1) / mask.sum(1)
            else:
                hidden = hidden[:, 0]
            pooled = torch.tanh(hidden @ pool_kernel + pool_bias)
            return (pooled @ kernel + bias).numpy()

    return run
