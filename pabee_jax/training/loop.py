"""The training run: start or go on, step, evaluate, save, export."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from tqdm import tqdm

from pabee_jax.analysis import metrics
from pabee_jax.checkpoints.pretrained import Pretrained, save_pretrained
from pabee_jax.data.batching import (
    assemble,
    by_bucket,
    prefetched,
    rows_of_step,
    sequence_buckets,
    steps_per_epoch,
    training_batch,
)
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.load import load_task
from pabee_jax.distributed import processes, sharding
from pabee_jax.errors import InputError, Preempted
from pabee_jax.io import storage
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.training import run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import TrainConfig, check
from pabee_jax.training.log import MetricsLog
from pabee_jax.training.speed import Speed
from pabee_jax.training.start import (
    check_same_everywhere,
    labeled_examples,
    starting_point,
    tokenized,
)
from pabee_jax.training.step import (
    StepMetrics,
    all_finite,
    initial_state,
    make_eval_step,
    make_train_step,
)
from pabee_jax.training.stop import StopRequest
from pabee_jax.training.strategy import in_last_phase, phase_of


class TrainingDiverged(InputError):
    """The loss or the gradient is no longer a finite number."""


def train(config: TrainConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Trains, or goes on training, and leaves a finished checkpoint in `workdir`.

    `workdir` is a local path or a `gs://` address.

    The rules for going on: a folder with the same config and a checkpoint goes on from the latest
    one; with the same config and none, it starts anew; with another config it is refused.

    Raises:
        InputError: anything the user can mend; nothing in `workdir` is lost.
        TrainingDiverged: a non-finite loss, with the step and the last good checkpoint.
    """
    check(config)
    workdir = storage.path_of(workdir)
    run_directory.check(workdir, config, overwrite=overwrite)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, config.gradient_accumulation, mesh)
    task = load_task(config)
    examples = {name: labeled_examples(task, name) for name in ("train", "dev")}
    start = starting_point(config, task, examples["train"])
    shard_parameters = config.mesh.shard_parameters
    sharding.check_model(start.model.config, mesh, shard_parameters=shard_parameters)
    data = {name: tokenized(parts, start) for name, parts in examples.items()}
    check_same_everywhere(config, start, data)
    if processes.is_first():
        run_directory.prepare(workdir, config, overwrite=overwrite)
    run_directory.check_shared(workdir)
    _Run(config, workdir, mesh, task, start, data).run()


class _Run:
    """One process's view of a run; `run` reads like the story."""

    def __init__(self, config, workdir, mesh, task, start: Pretrained, data):
        self.config = config
        self.workdir = workdir
        self.mesh = mesh
        self.task = task
        self.start = start
        (self.training_data,) = data["train"].values()
        self.dev_data: Mapping[str, Dataset] = data["dev"]
        self.buckets = sequence_buckets(config.max_seq_length)
        self.epoch_steps = steps_per_epoch(len(self.training_data), config.batch_size)
        self.total_steps = config.max_steps or math.ceil(config.num_epochs * self.epoch_steps)
        self.eval_every = config.eval_every or self.epoch_steps
        self.save_every = config.save_every or self.eval_every
        self.num_exits = start.model.config.num_hidden_layers
        self.graph, parameters = split(stacked(start.model))
        state = initial_state(parameters, config)
        where = sharding.shardings(state, mesh, shard_parameters=config.mesh.shard_parameters)
        self.state = sharding.put(state, where)
        self.speed = Speed(start.model.config, mesh.size)
        self.train_step = make_train_step(self.graph, config, self.total_steps, where)
        self.eval_step = make_eval_step(self.graph, mesh)

    def run(self) -> None:
        self.checkpoints = Checkpoints(self.workdir / run_directory.CHECKPOINTS)
        self._resume()
        self.log = MetricsLog(self.workdir, self.step)
        closing = contextlib.closing
        with closing(self.checkpoints), closing(self.log), StopRequest() as self.stop:
            self._steps()
            self._export()

    def _resume(self) -> None:
        self.step = self.checkpoints.latest or 0
        if self.step:
            self.state = self.checkpoints.restore(self.step, self.state)
            self._say(f"going on from step {self.step} of {self.total_steps}")

    def _steps(self) -> None:
        pending: tuple[int, StepMetrics] | None = None
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.2 if sys.stderr.isatty() else 30
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc="train",
            mininterval=interval,
            maxinterval=interval,
            disable=not processes.is_first(),
        )
        batches = prefetched(self._batch(step) for step in range(self.step, self.total_steps))
        with bar, contextlib.closing(batches):
            for tokens, batch in batches:
                phase = phase_of(self.config, self.step, self.total_steps, self.num_exits)
                self.state, step_metrics = self.train_step(self.state, batch, phase)
                self.step += 1
                # The device is at work on this step while the host reads the one before.
                if pending:
                    self._record(pending, bar)
                self.speed.count(tokens, *batch["input_ids"].shape)
                pending = (self.step, step_metrics)
                stops = self.stop.reached(self.step) and self.step < self.total_steps
                if stops or self._is_due(self.eval_every) or self._is_due(self.save_every):
                    self._record(pending, bar)
                    pending = None
                    if speed := self.speed.measured():
                        self.log.write(self.step, {"speed": speed})
                    self._evaluate_and_save(stops)
                    self.speed.restart()
                if stops:
                    self._say(
                        f"stopped by SIGTERM; step {self.step} of {self.total_steps} is saved: the "
                        "same command goes on from there"
                    )
                    raise Preempted

    def _batch(self, step: int) -> tuple[int, dict[str, jax.Array]]:
        """The tokens of the batch of `step`, and this process's rows of it, on their way to its
        devices."""
        size, config = self.config.batch_size, self.config
        batch = training_batch(
            self.training_data,
            size,
            self.buckets,
            config.seed,
            step,
            order=config.order,
            part=sharding.process_rows(size, self.mesh),
        )
        rows = rows_of_step(self.training_data, size, config.seed, step, config.order)
        tokens = int(self.training_data.lengths[rows].sum())
        return tokens, sharding.shard_batch(batch, self.mesh, size)

    def _evaluate_and_save(self, stops: bool) -> None:
        """What is due after this step; a run that stops saves in any case."""
        # The loss of this step is from before its update, which may have ruined the parameters.
        if not all_finite(self.state.parameters):
            self._stop_diverged(self.step, "the new parameters are not finite")
        score = self._evaluate() if self._is_due(self.eval_every) else None
        if not in_last_phase(self.config, self.step - 1, self.total_steps):
            score = None  # Whatever it is: the early exits are not trained yet.
        # The best step can only be exported if every evaluated one was saved.
        wants_best = score is not None and self.config.export == "best"
        if stops or self._is_due(self.save_every) or wants_best:
            self.log.flush()  # A run that goes on from here finds what was logged before.
            self.checkpoints.save(self.state, score)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _record(self, pending: tuple[int, StepMetrics], bar: tqdm) -> None:
        step, values = pending
        values = jax.device_get(values)
        self._refuse_divergence(step, values)
        self.log.write(
            step,
            {
                "loss": float(values.loss),
                "exit_losses": [float(loss) for loss in values.exit_losses],
                "gradient_norm": float(values.gradient_norm),
                "learning_rate": float(values.learning_rate),
            },
        )
        bar.set_postfix(loss=f"{values.loss:.3f}", refresh=False)
        bar.update(step - bar.n)

    def _refuse_divergence(self, step: int, values: StepMetrics) -> None:
        if not (math.isfinite(values.loss) and math.isfinite(values.gradient_norm)):
            self._stop_diverged(
                step, f"the loss is {values.loss} and the gradient norm {values.gradient_norm}"
            )

    def _stop_diverged(self, step: int, what: str) -> NoReturn:
        kept = self.checkpoints.latest
        good = (
            f"the last good checkpoint is {self.workdir / run_directory.CHECKPOINTS / str(kept)}"
            if kept
            else "there is no checkpoint yet"
        )
        raise TrainingDiverged(
            f"at step {step} {what}: training stopped; {good}. A smaller learning_rate may help"
        )

    def _evaluate(self) -> float:
        """Every exit on dev; returns the last exit's primary metric on the first part."""
        results = {}
        for name, dataset in self.dev_data.items():
            labels, logits = dataset.labels, self.all_exit_logits(dataset)
            assert labels is not None  # `labeled_examples` checked it.
            exits = [metrics.compute(self.task.metrics, exit, labels) for exit in logits]
            results[name] = {
                metric: [values[metric] for values in exits] for metric in self.task.metrics
            }
        self.log.write(self.step, results)
        score = next(iter(results.values()))[self.task.metrics[0]][-1]
        self._say(f"step {self.step}: dev {self.task.metrics[0]} {score:.4f} at the last exit")
        return score

    def all_exit_logits(self, dataset: Dataset) -> np.ndarray:
        """(L, N, C) logits of every row in input order; padding rows are left out."""
        size = self.config.batch_size
        shape = self.start.model.config
        result = np.empty((shape.num_hidden_layers, len(dataset), shape.num_labels), np.float32)
        for rows, part in by_bucket([dataset], size, self.buckets):
            mine = sharding.process_rows(size, self.mesh)
            here = np.arange(len(part))[mine]
            batch = assemble(part, here, mine.stop - mine.start, part.input_ids.shape[1])
            batch = sharding.shard_batch(batch, self.mesh, size)
            logits = self.eval_step(self.state.parameters, batch)
            result[:, rows] = np.asarray(logits)[:, : len(rows)]
        return result

    def _export(self) -> None:
        """The finished run directory: a Hugging Face style checkpoint."""
        parameters, step = self.state.parameters, self.step
        if self.config.export == "best" and self.checkpoints.best is not None:
            step = self.checkpoints.best
            parameters = self.checkpoints.parameters(step, parameters)
        gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(self.mesh))
        parameters = jax.device_get(gather(parameters))
        if processes.is_first():
            model = unstacked(merge(self.graph, parameters))
            save_pretrained(dataclasses.replace(self.start, model=model), self.workdir)
        processes.wait_for_all("the parameters are written")
        self._say(f"the parameters of step {step} are in {self.workdir}")

    def _say(self, message: str) -> None:
        if processes.is_first():
            tqdm.write(message)
