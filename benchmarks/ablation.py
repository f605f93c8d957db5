"""A study of several patience values: one pass and a replay, against one real run each.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --checkpoint runs/mrpc

Without a checkpoint: a random model of the shape given by --models and 408 rows of 64 tokens.
"""

from pathlib import Path

import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.checkpoint import dev_set
from benchmarks.figures import bars
from benchmarks.measure import Budget, in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax import EarlyExitClassifier, Patience, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import MODEL_INPUTS


def measures_of(pretrained: Pretrained, rows, settings, torch_dtype: str | None) -> dict:
    full = EarlyExitClassifier(pretrained, driver="full")
    pool = EarlyExitClassifier(pretrained, driver="pool")
    loop = EarlyExitClassifier(pretrained, driver="loop")

    def study():
        logits = full.all_exit_logits(rows)
        return [np.asarray(replay(setting, logits)[0]) for setting in settings]

    def real_runs(classifier, batch_size=None):
        found = []
        for setting in settings:
            classifier.criterion = setting
            found.append(classifier.predict(rows, batch_size).exit_layers)
        return found

    found = {
        "one full-depth pass": lambda: full.all_exit_logits(rows),
        f"replay of {len(settings)} settings": study,
        f"{len(settings)} real runs, pool": lambda: real_runs(pool),
        f"{len(settings)} real runs, loop, one row at a time": lambda: real_runs(loop, 1),
    }
    if torch_dtype is not None:
        last_exit = pytorch.last_exit(pretrained.model, torch_dtype)
        dataset = full.tokenize(rows)
        tokens = {name: getattr(dataset, name) for name in MODEL_INPUTS}
        found["one full-depth pass, PyTorch, sorted by length"] = lambda: [
            last_exit(batch) for batch in pytorch.length_sorted(dataset.lengths, tokens, 32)
        ]
    return found


def main(values) -> None:
    settings = [Patience(each, values.regression_threshold) for each in values.patience]
    cases = {}
    if values.checkpoint:
        cases[values.checkpoint] = dev_set(values.checkpoint, values.dtype)
    else:
        for name in values.models:
            model = random_model(name, values.dtype)
            pretrained = Pretrained(model, None, {}, ("0", "1"), values.sequence_length)
            cases[name] = (pretrained, random_tokens(model.config, 408, values.sequence_length))
    budget = Budget(values.budget_minutes, len(cases))
    records = []
    for name, (pretrained, rows) in cases.items():
        measures = measures_of(pretrained, rows, settings, values.dtype if values.torch else None)
        taken = in_turns(measures, budget.next_case(), values.rounds)
        rounds = taken.pop("rounds")
        here = [
            {
                "model": name,
                "way": way,
                "seconds": seconds,
                "of one full-depth pass": seconds / taken["one full-depth pass"],
                "rounds": rounds,
            }
            for way, seconds in taken.items()
        ]
        print(f"\n{name}, {rounds} rounds")
        columns = ["way", "seconds", "of one full-depth pass"]
        command_line.show(here, columns)
        records += here
    bars(
        values.output / "ablation.png",
        [f"{Path(each['model']).name}: {each['way']}" for each in records],
        [each["of one full-depth pass"] for each in records],
        "time, in full-depth passes",
        "%.2f",
    )
    command_line.save(values.output, "ablation", values, records)


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="minilm", budget_minutes=5)
    result.add_argument("--sequence_length", type=command_line.positive_integer, default=64)
    kind, default = command_line.whole_numbers, [0, 1, 2, 3, 4, 5]
    result.add_argument("--patience", type=kind, default=default)
    result.add_argument("--regression_threshold", type=float, default=0.0)
    result.add_argument("--checkpoint", help="a run directory of train.py")
    result.add_argument("--rounds", type=command_line.positive_integer, default=5)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
