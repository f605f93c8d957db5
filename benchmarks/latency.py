"""Latency of one row, in milliseconds, by its exit layer.

    python -m benchmarks.latency

For every shape and sequence length, an exit schedule makes the `loop` driver exit at given layers.
It is timed in turns with a straight-line program of the same layers and classifiers, and with
PyTorch at full depth if PyTorch is installed. The efficiency is (speed-up over full depth) /
(layers / exit layer); it is 1 if the time is proportional to the exit layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command_line, figures, pytorch
from benchmarks.exit_schedule import ExitSchedule
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax.distributed import sharding
from pabee_jax.drivers.layer_loop import Control, on_group
from pabee_jax.errors import InputError
from pabee_jax.inference.programs import run_loop
from pabee_jax.models.parameters import in_compute_dtype, merge, split

CONTROLS = {
    "while": Control(),
    "cond": Control("cond"),
    "while-after-2": Control(untested_layers=2),
    "cond-after-2": Control("cond", untested_layers=2),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def straight_line(structure, parameters, batch, layers):
    """Run the first `layers` layers with their classifiers, without a test in between."""
    model = merge(structure, parameters)
    hidden, mask, side = model.embed(batch)
    logits = []
    for layer in range(layers):
        hidden = on_group(model, layer, model.layer, hidden, mask, side.of_layer(layer))
        logits.append(model.exit_logits(layer, hidden, mask))
    return jnp.stack(logits)


def timed_calls_of(
    model, length: int, controls, exit_layers, dtype: str, with_torch: bool
) -> dict[str, TimedCall]:
    """Return the calls to time, by name; every call waits for its result."""
    mesh = sharding.make_mesh(1)
    structure, parameters = split(in_compute_dtype(model))
    parameters = sharding.replicate(parameters, mesh)
    batch = random_tokens(model.config, 1, length)
    row = np.zeros(1, np.int32)
    num_layers = model.config.num_hidden_layers

    def time_loop(exit_layer, control):
        schedule = ExitSchedule(np.array([exit_layer], np.int32))
        return jax.device_get(
            run_loop(structure, mesh, parameters, batch, schedule, row, control=control)
        )

    def run_straight_line(layers):
        return jax.device_get(straight_line(structure, parameters, batch, layers))

    timed_calls: dict[str, TimedCall] = {}
    # The deepest exit first: its untimed call follows PyTorch, whose threads spin for a while.
    for layer in reversed(exit_layers):
        for name in controls:
            timed_calls[f"{name} {layer}"] = functools.partial(time_loop, layer, CONTROLS[name])
        timed_calls[f"straight {layer}"] = functools.partial(run_straight_line, layer)
    if with_torch:
        forward = pytorch.make_forward(model, dtype)
        if dtype == "float32":
            last_logits = run_straight_line(num_layers)[-1][0]
            np.testing.assert_allclose(last_logits, forward(batch)[0], atol=1e-3)
        timed_calls["torch"] = lambda: forward(batch)
    return timed_calls


def main(options) -> None:
    records = []
    budget = Budget(options.budget_minutes, len(options.model) * len(options.sequence_length))
    for name in options.model:
        model = random_model(name, options.dtype)
        layers = model.config.num_hidden_layers
        exit_layers = sorted({max(1, round(layers * part / 12)) for part in (1, 2, 4, 6, 8, 10)})
        exit_layers.append(layers)
        positions = model.config.max_position_embeddings
        if max(options.sequence_length) > positions:
            raise InputError(
                f"--sequence_length {max(options.sequence_length)} is more than the {positions} "
                f"positions of {name}"
            )
        for length in options.sequence_length:
            timed_calls = timed_calls_of(
                model, length, options.controls, exit_layers, options.dtype, options.torch
            )
            medians = time_in_turns(timed_calls, budget.next_case(), options.rounds)
            records += records_of(name, length, layers, exit_layers, options.controls, medians)
            print_case(_records_of_case(records, name, length))
    draw(records, options.output / "latency.png")
    command_line.save(options.output, "latency", options, records)


def records_of(name, length, layers, exit_layers, controls, medians) -> list[dict]:
    """Return one record per control and exit layer."""
    records = []
    fastest = min(medians[f"{kind} {layers}"] for kind in (*controls, "straight"))
    torch_seconds = medians.get("torch")
    for control in controls:
        for layer in exit_layers:
            seconds = medians[f"{control} {layer}"]
            share = layer / layers
            records.append(
                {
                    "model": name,
                    "S": length,
                    "control": control,
                    "exit layer": layer,
                    "ms": 1000 * seconds,
                    "straight-line ms": 1000 * medians[f"straight {layer}"],
                    "efficiency": medians[f"{control} {layers}"] / seconds * share,
                    "efficiency over the fastest": fastest / seconds * share,
                    "PyTorch full depth ms": torch_seconds and 1000 * torch_seconds,
                    "of PyTorch": torch_seconds and seconds / torch_seconds,
                    "rounds": medians["rounds"],
                }
            )
    return records


def print_case(records: list[dict]) -> None:
    """Print the table of one shape and sequence length."""
    print(f"\n{records[0]['model']}, S = {records[0]['S']}, {records[0]['rounds']} rounds")
    columns = list(records[0])[2:-1]
    command_line.print_records(records, columns)


def draw(records: list[dict], path) -> None:
    """Draw time against exit layer, one panel per shape and sequence length."""
    cases = list(dict.fromkeys((record["model"], record["S"]) for record in records))
    figure, axes = figures.panels(len(cases))
    for axis, (name, length) in zip(axes, cases, strict=True):
        lines: dict[str, list[dict]] = {}
        for record in _records_of_case(records, name, length):
            lines.setdefault(record["control"], []).append(record)
        for control, line in lines.items():
            layers = [record["exit layer"] for record in line]
            label = "loop" if control == "while" else f"loop ({control})"
            color = figures.BLUE if control == "while" else None
            axis.plot(layers, [record["ms"] for record in line], "o-", color=color, label=label)
        # Every control has the same times of the other programs. The times of the straight-line
        # program are marks without a line, because they lie on the line of the loop.
        line = next(iter(lines.values()))
        layers = [record["exit layer"] for record in line]
        straight = [record["straight-line ms"] for record in line]
        axis.plot(layers, straight, "x", color=figures.BLACK, label="without an exit test", ms=8)
        if torch_milliseconds := line[0]["PyTorch full depth ms"]:
            axis.axhline(
                torch_milliseconds, color=figures.ORANGE, ls="--", label="PyTorch, full depth"
            )
        axis.set(title=f"{name}, {length} tokens", xlabel="exit layer", ylabel="milliseconds")
        axis.set(ylim=(0, None))
    figures.save(figure, path, legend_columns=4)


def _records_of_case(records: list[dict], name: str, length: int) -> list[dict]:
    return [record for record in records if (record["model"], record["S"]) == (name, length)]


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base,albert-base")
    command_line.add_timing(parser, budget_minutes=5, rounds=30)
    parser.add_argument("--sequence_length", type=command_line.positive_integers, default=[32, 128])
    parser.add_argument("--controls", type=command_line.names_of(CONTROLS), default=["while"])
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
