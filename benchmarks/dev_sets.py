"""Full depth on the dev sets of GLUE tasks: driver `pool` beside PyTorch sorted by length.

    python -m benchmarks.dev_sets --model minilm,bert-base --tokenizer DIR --data_dir GLUE

The weights are random, and the texts are those of the tasks. Both compute types and PyTorch in both
types take turns. "of the floor" is the time of the pool over the time of the matrix products of all
real tokens, at the speed of one large product of this machine in the same type.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model
from pabee_jax import EarlyExitClassifier
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.load import load_task
from pabee_jax.data.tokenization import encode, load_tokenizer
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.flops import per_token_and_layer
from pabee_jax.training.config import TrainConfig

_TASKS = ("mrpc", "sst2", "stsb")
_TYPES = ("float32", "bfloat16")
_MAX_LENGTH = 128
_PYTORCH_BATCH = 32
# The shape of the product that gives the peak: 1,024 tokens of BERT-base's feed-forward.
_PRODUCT = (1024, 768, 3072)


def main(options) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    peak = {dtype: product_speed(dtype) for dtype in _TYPES}
    print(", ".join(f"{dtype}: {peak[dtype] / 1e9:.0f} GFLOP/s" for dtype in _TYPES))
    records = []
    budget = Budget(options.budget_minutes, len(options.model) * len(options.task))
    for name in options.model:
        for task in options.task:
            dataset = dev_set(task, options.data_dir, tokenizer)
            calls = timed_calls_of(name, dataset, options)
            seconds = time_in_turns(calls, budget.next_case(), options.rounds)
            rounds = seconds.pop("rounds")
            floor = floor_flops(random_model(name).config, dataset)
            for call, time in seconds.items():
                record = {"model": name, "task": task, "rows": len(dataset), "way": call, "s": time}
                if options.torch:
                    # Throughput, so PyTorch's time is the numerator.
                    record |= {
                        f"over PyTorch {dtype}": seconds[f"PyTorch {dtype}"] / time
                        for dtype in _TYPES
                    }
                dtype = call.rpartition(" ")[2]
                records.append(record | {"of the floor": time * peak[dtype] / floor})
                records[-1]["rounds"] = rounds
            print()
            command_line.print_records(records[-len(calls) :], list(records[-1]))
    command_line.save(options.output, "dev_sets", options, records, figure=False)


def dev_set(task: str, data_dir: str, tokenizer) -> Dataset:
    """Return the tokens of a task's dev set."""
    rows = load_task(TrainConfig(task=task, data_dir=data_dir)).read("dev")
    return Rows.of(rows, lambda texts: _encode(tokenizer, texts)).dataset


def _encode(tokenizer, texts) -> Dataset:
    firsts, pairs = zip(*((t, None) if isinstance(t, str) else t for t in texts), strict=True)
    return encode(tokenizer, firsts, pairs, _MAX_LENGTH)


def timed_calls_of(name: str, dataset: Dataset, options) -> dict[str, TimedCall]:
    """Return the calls to time, by name; every call waits for its result."""
    timed_calls: dict[str, TimedCall] = {}
    for dtype in _TYPES:
        model = random_model(name, dtype)
        pretrained = Pretrained(model, None, {}, ("0", "1"), _MAX_LENGTH)
        for driver in options.driver:
            classifier = EarlyExitClassifier(pretrained, driver=driver)
            timed_calls[f"{driver} {dtype}"] = lambda run=classifier.predict: run(dataset)
        if options.torch:
            forward = pytorch.make_forward(model, dtype)
            tokens = {field: dataset[field] for field in MODEL_INPUTS}
            batches = list(
                pytorch.batches_sorted_by_length(dataset.lengths, tokens, _PYTORCH_BATCH)
            )
            timed_calls[f"PyTorch {dtype}"] = lambda run=forward, batches=batches: [
                run(batch) for batch in batches
            ]
    return timed_calls


def floor_flops(config: ModelConfig, dataset: Dataset) -> float:
    """Return the FLOPs of all layers for the real tokens."""
    lengths = dataset.lengths.astype(float)
    per_layer = sum(length * per_token_and_layer(config, length) for length in lengths)
    return config.num_hidden_layers * per_layer


def product_speed(dtype: str) -> float:
    """Return the FLOP/s of one large matrix product that returns float32."""
    rows, inner, columns = _PRODUCT
    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)

    @jax.jit
    def multiply(left, right):
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    seconds = time_in_turns({"": lambda: multiply(left, right).block_until_ready()}, 3, 50)[""]
    return 2 * float(np.prod(_PRODUCT)) / seconds


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "minilm,bert-base")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="directory of a BERT tokenizer"
    )
    parser.add_argument("--data_dir", required=True, help="directory of GLUE's TSV files")
    parser.add_argument("--task", type=command_line.names_of(_TASKS), default=list(_TASKS))
    parser.add_argument("--driver", type=command_line.names_of(("pool", "full")), default=["pool"])
    command_line.add_budget(parser, 10)
    command_line.add_rounds(parser, 10)
    command_line.add_compilation_cache(parser)
    command_line.add_torch(parser)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
