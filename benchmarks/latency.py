"""One row at a time: milliseconds against the layer at which it leaves.

    python -m benchmarks.latency

For each shape and sequence length the `loop` driver is made to leave after given layers, beside a
straight-line program of the same layers and classifiers, and PyTorch at full depth if it is there.
Efficiency is (speed-up over full depth) / (layers / exit layer): 1 means that time follows layers.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.exit_schedule import ExitSchedule
from benchmarks.measure import Budget, in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax.distributed import sharding
from pabee_jax.drivers.layer_loop import Control, apply_layer
from pabee_jax.errors import InputError
from pabee_jax.inference.programs import run_early_exit
from pabee_jax.models.parameters import in_compute_dtype, merge, split

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONTROLS = {
    "while": Control(),
    "cond": Control("cond"),
    "while-after-2": Control(untested_layers=2),
    "cond-after-2": Control("cond", untested_layers=2),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def straight_line(graph, parameters, batch, layers):
    """The first `layers` layers with their classifiers and no question in between."""
    model = merge(graph, parameters)
    hidden, mask = model.embed(batch)
    logits = []
    for layer in range(layers):
        hidden = apply_layer(model, layer, hidden, mask)
        logits.append(model.exit_logits(layer, hidden, mask))
    return jnp.stack(logits)


def measures_of(model, length: int, controls, exit_layers, dtype: str, with_torch: bool):
    """Name -> a call that waits for its result."""
    mesh = sharding.make_mesh(1)
    graph, parameters = split(in_compute_dtype(model))
    parameters = sharding.replicate(parameters, mesh)
    batch = random_tokens(model.config, 1, length)
    row = np.zeros(1, np.int32)
    num_layers = model.config.num_hidden_layers

    def leave_at(layer, control):
        schedule = ExitSchedule(np.array([layer], np.int32))
        return jax.device_get(
            run_early_exit(graph, mesh, parameters, batch, schedule, row, control=control)
        )

    def run_straight(layer):
        return jax.device_get(straight_line(graph, parameters, batch, layer))

    measures = {}
    # The longest first: its untimed call comes after PyTorch, whose threads spin for a while.
    for layer in reversed(exit_layers):
        for name in controls:
            measures[f"{name} {layer}"] = functools.partial(leave_at, layer, CONTROLS[name])
        measures[f"straight {layer}"] = functools.partial(run_straight, layer)
    if with_torch:
        run = pytorch.last_exit(model, dtype)
        theirs, ours = run(batch)[0], run_straight(num_layers)[-1][0]
        if dtype == "float32":
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
        measures["torch"] = lambda: run(batch)
    return measures


def main(values) -> None:
    records = []
    budget = Budget(values.budget_minutes, len(values.models) * len(values.sequence_lengths))
    for name in values.models:
        model = random_model(name, values.dtype)
        layers = model.config.num_hidden_layers
        exit_layers = sorted({max(1, round(layers * part / 12)) for part in (1, 2, 4, 6, 8, 10)})
        exit_layers.append(layers)
        positions = model.config.max_position_embeddings
        if max(values.sequence_lengths) > positions:
            raise InputError(f"--sequence_lengths: {name} has {positions} positions")
        for length in values.sequence_lengths:
            measures = measures_of(
                model, length, values.controls, exit_layers, values.dtype, values.torch
            )
            seconds = in_turns(measures, budget.next_case(), values.rounds)
            records += records_of(name, length, layers, exit_layers, values.controls, seconds)
            show([each for each in records if (each["model"], each["S"]) == (name, length)])
    draw(records, values.output / "latency.png")
    command_line.save(values.output, "latency", values, records)


def records_of(name, length, layers, exit_layers, controls, seconds) -> list[dict]:
    found = []
    fastest = min(seconds[f"{kind} {layers}"] for kind in (*controls, "straight"))
    theirs = seconds.get("torch")
    for control in controls:
        for layer in exit_layers:
            here = seconds[f"{control} {layer}"]
            share = layer / layers
            found.append(
                {
                    "model": name,
                    "S": length,
                    "control": control,
                    "exit layer": layer,
                    "ms": 1000 * here,
                    "straight-line ms": 1000 * seconds[f"straight {layer}"],
                    "efficiency": seconds[f"{control} {layers}"] / here * share,
                    "efficiency over the fastest": fastest / here * share,
                    "PyTorch full depth ms": theirs and 1000 * theirs,
                    "of PyTorch": theirs and here / theirs,
                    "rounds": seconds["rounds"],
                }
            )
    return found


def show(records: list[dict]) -> None:
    print(f"\n{records[0]['model']}, S = {records[0]['S']}, {records[0]['rounds']} rounds")
    columns = list(records[0])[2:-1]
    command_line.show(records, columns)


def draw(records: list[dict], path) -> None:
    """Time against exit layer, one panel per shape and length."""
    cases = list(dict.fromkeys((each["model"], each["S"]) for each in records))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.6), squeeze=False)
    for axis, (name, length) in zip(axes[0], cases, strict=True):
        here = [each for each in records if (each["model"], each["S"]) == (name, length)]
        for control in dict.fromkeys(each["control"] for each in here):
            line = [each for each in here if each["control"] == control]
            layers = [each["exit layer"] for each in line]
            axis.plot(layers, [each["ms"] for each in line], "o-", label=f"loop ({control})")
        straight = [each["straight-line ms"] for each in line]
        axis.plot(layers, straight, "x:", color="grey", label="straight-line program")
        if line[0]["PyTorch full depth ms"]:
            axis.axhline(line[0]["PyTorch full depth ms"], color="black", lw=1, label="PyTorch")
        axis.set(title=f"{name}, S = {length}", xlabel="exit layer", ylabel="ms", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments():
    result = command_line.parser(
        __doc__.splitlines()[0], models="bert-base,albert-base", budget_minutes=5
    )
    result.add_argument(
        "--sequence_lengths", type=command_line.positive_integers, default=[32, 128]
    )
    result.add_argument("--controls", type=command_line.names_of(CONTROLS), default=["while"])
    result.add_argument("--rounds", type=command_line.positive_integer, default=30)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
