"""Latency of the exported ONNX model in ONNX Runtime, beside our own programs, at fixed exits.

    python -m benchmarks.onnx_latency --model bert-base --sequence_length 32

The criterion is `FixedLayer`, whose layer is an input of the model, so that one model serves all
exits. Needs the extra `[onnx]` and jax2onnx (docs/encoders.md).
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax import EarlyExitClassifier
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import FixedLayer
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.onnx_model import export_onnx
from pabee_jax.models.encoder import EarlyExitModel


def onnx_session(classifier: EarlyExitClassifier, length: int):
    """Return an ONNX Runtime session of the exported model, with one thread per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(classifier, folder, length)
        path = Path(folder) / "model.onnx"
        print(f"{path.stat().st_size / 1e6:.0f} MB")
        return onnxruntime.InferenceSession(path, options)


def timed_calls_of(model: EarlyExitModel, length: int, rows: int) -> dict[str, TimedCall]:
    """Return the calls to time: both runtimes at the first, the middle and the last exit."""
    depth = model.config.num_hidden_layers
    pretrained = Pretrained(model, None, {}, ("0", "1"), length)
    classifier = EarlyExitClassifier(pretrained, criterion=FixedLayer(depth), driver="loop")
    session = onnx_session(classifier, length)
    names = {value.name for value in session.get_inputs()}
    tokens = random_tokens(model.config, rows, length)
    dataset = Dataset(**tokens)
    inputs = {name: value.astype(np.int64) for name, value in tokens.items() if name in names}
    timed_calls: dict[str, TimedCall] = {}
    for layer in (1, depth // 2, depth):
        own = EarlyExitClassifier(pretrained, criterion=FixedLayer(layer), driver="loop")
        given = inputs | {"layer": np.array(layer, np.int32)}

        def run_onnx(given=given):
            return session.run(None, given)

        exit_layers, logits = run_onnx()
        expected = own.predict(dataset)
        assert (exit_layers == layer).all()
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
        timed_calls[f"pabee_jax, exit {layer}"] = lambda own=own: own.predict(dataset)
        timed_calls[f"ONNX Runtime, exit {layer}"] = run_onnx
    return timed_calls


def main(options) -> None:
    records = []
    budget = Budget(options.budget_minutes, len(options.model) * len(options.sequence_length))
    for name in options.model:
        for length in options.sequence_length:
            calls = timed_calls_of(random_model(name), length, options.batch_size)
            seconds = time_in_turns(calls, budget.next_case(), options.rounds)
            rounds = seconds.pop("rounds")
            for call, time in seconds.items():
                record = {"model": name, "S": length, "way": call, "ms": 1000 * time}
                records.append(record | {"rounds": rounds})
            print()
            command_line.print_records(records[-len(calls) :], list(records[-1]))
    command_line.save(options.output, "onnx_latency", options, records, figure=False)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base")
    parser.add_argument(
        "--batch_size", type=command_line.positive_integer, default=1, help="rows of a call"
    )
    parser.add_argument("--sequence_length", type=command_line.positive_integers, default=[32])
    command_line.add_budget(parser, 2)
    command_line.add_rounds(parser, 20)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
