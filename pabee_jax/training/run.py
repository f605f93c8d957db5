"""The training run: start or resume, train, evaluate, save, export."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from pabee_jax.analysis import metrics
from pabee_jax.checkpoints.model_card import TrainingFacts
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data import used_rows
from pabee_jax.data.batching import (
    assemble,
    batches_by_bucket,
    bucket_of,
    prefetched,
    rows_of_step,
    steps_per_epoch,
    training_batch,
    training_lengths,
)
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.labels import are_numbered
from pabee_jax.data.load import load_task
from pabee_jax.distributed import processes, sharding
from pabee_jax.errors import InputError, Preempted
from pabee_jax.io import storage
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.reports.tables import UNDEFINED
from pabee_jax.training import memory, run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import PLACES, TrainConfig, changed, check
from pabee_jax.training.effects import refuse_settings_without_effect
from pabee_jax.training.log import MetricsLog
from pabee_jax.training.run_rows import RunRows
from pabee_jax.training.select_exit import select_exit
from pabee_jax.training.speed import Speed
from pabee_jax.training.start import (
    check_same_everywhere,
    classifier_label_names,
    examples_of,
    input_hashes,
    starting_point,
    tokenized,
    with_answers,
)
from pabee_jax.training.step import (
    StepMetrics,
    all_finite,
    initial_state,
    make_eval_step,
    make_train_step,
)
from pabee_jax.training.steps import refuse_short_run, total_steps
from pabee_jax.training.stop import StopRequest
from pabee_jax.training.strategy import phase_of, trains_early_exits


class TrainingDiverged(InputError):
    """Raised when the loss, the gradient or the parameters are not finite."""


def train(config: TrainConfig, workdir: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Train a model, or resume its training, and write a Hugging Face style checkpoint.

    If `workdir` contains a run with the same config, training resumes from the latest training
    checkpoint, or starts from step 0 if there is no checkpoint. If this run is finished, nothing
    changes. If `workdir` contains a run with another config, or a run that was started from other
    rows or parameters, InputError is raised.

    Args:
        config: the configuration of the run.
        workdir: the directory of the run, a local path or a `gs://` address.
        overwrite: remove the run in `workdir`, and start from step 0.

    Raises:
        InputError: an invalid setting, model, data set or `workdir`; no file in `workdir` is lost.
        TrainingDiverged: a loss, gradient or parameter is not finite. The message names the step
            and the last good checkpoint.
        Preempted: SIGTERM stopped the run after a checkpoint was saved.
    """
    check(config)
    workdir = storage.path_of(workdir)
    run_directory.check(workdir, config, overwrite=overwrite)
    if not overwrite and all(processes.gather(run_directory.is_finished(workdir))):
        if processes.is_first():
            print(f"the run in {workdir} is finished and was left as it is")
        return
    # A run that an earlier version has started is resumed with the settings that it has.
    is_new = overwrite or not run_directory.has_parameters(workdir)
    if is_new:
        refuse_settings_without_effect(config)
    with memory.exhaustion_as_input_error():
        _train(config, workdir, is_new=is_new, overwrite=overwrite)


def _train(config: TrainConfig, workdir: epath.Path, *, is_new: bool, overwrite: bool) -> None:
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, config.gradient_accumulation, mesh)
    class_names = classifier_label_names(config)
    task = load_task(config, class_names, is_new_head=config.strategy != "attach")
    examples = {name: examples_of(config, task, name) for name in ("train", "dev")}
    (training_examples,) = examples["train"].values()
    steps = total_steps(config, len(training_examples))
    if is_new:
        refuse_short_run(config, len(training_examples))
    start = starting_point(config, task, examples["train"], mesh)
    data = {name: tokenized(parts, start) for name, parts in examples.items()}
    if config.strategy == "attach":
        data = {name: with_answers(parts, start) for name, parts in data.items()}
    (training_data,) = data["train"].values()
    if steps >= steps_per_epoch(len(training_data), config.batch_size):
        # The run trains all rows. The lengths of their batches are known now.
        longest = int(training_data.lengths.max())
        longest_batch = bucket_of(longest, training_lengths(config.max_seq_length, config.order))
        memory.check(config, start.model.config, mesh, longest_batch)
    inputs = input_hashes(config, start, data)
    check_same_everywhere(config, inputs, start)
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            # Before the lock, which creates a file: a refused run leaves no file behind.
            run_directory.check_inputs(workdir, inputs, overwrite=overwrite)
            stack.enter_context(run_directory.locked(workdir))
            run_directory.prepare(workdir, config, inputs, overwrite=overwrite)
        run_directory.check_shared(workdir)
        is_numbered = are_numbered(class_names) and not config.label_names
        rows = RunRows(task, {**examples["train"], **examples["dev"]}, is_numbered)
        _Run(config, workdir, mesh, task, start, data, steps, rows).run()


class _Run:
    """A run in one process of possibly several; `run` executes the run."""

    def __init__(
        self, config, workdir, mesh, task, start: Pretrained, data, steps: int, rows: RunRows
    ):
        self.config = config
        self.rows = rows
        self.workdir = workdir
        self.mesh = mesh
        self.task = task
        self.start = start
        (self.training_data,) = data["train"].values()
        self.dev_data: Mapping[str, Dataset] = data["dev"]
        self.buckets = training_lengths(config.max_seq_length, config.order)
        self.epoch_steps = steps_per_epoch(len(self.training_data), config.batch_size)
        self.total_steps = steps
        self.eval_every = config.eval_every or self.epoch_steps
        self.save_every = config.save_every or self.eval_every
        self.num_exits = start.model.config.num_hidden_layers
        self.structure, parameters = split(stacked(start.model))
        state = initial_state(parameters, config)
        shardings = sharding.shardings(state, mesh, shard_parameters=config.mesh.shard_parameters)
        self.state = sharding.put(state, shardings)
        self.speed = Speed(start.model.config, mesh.size)
        self.train_step = make_train_step(self.structure, config, self.total_steps, shardings)
        self.eval_step = make_eval_step(self.structure, mesh)

    def run(self) -> None:
        """Resume from the latest checkpoint if there is a checkpoint, train, and export."""
        self.checkpoints = Checkpoints(self.workdir / run_directory.CHECKPOINTS)
        self._resume()
        self.log = MetricsLog(self.workdir, self.step)
        closing = contextlib.closing
        with closing(self.checkpoints), closing(self.log), StopRequest() as self.stop:
            if self.step == 0:
                self._describe_labels()
            self._train()
            self._export()

    def _resume(self) -> None:
        self.step = 0
        if restored := self.checkpoints.restore_latest(self.state):
            self.state, self.step = restored, int(restored.step)
            self._print(f"resumed from step {self.step} of {self.total_steps}")

    def _describe_labels(self) -> None:
        """Print the classes and their counts, and log likely mistakes."""
        if self.rows.text:
            self._print(self.rows.text)
        if processes.is_first():
            self.rows.warn()
        if self.start.trained_exits != "none":  # The last exit is a trained classifier.
            dataset = next(iter(self.dev_data.values()))
            logits = self.all_exit_logits(dataset)
            if processes.is_first():
                self.rows.warn_of_order(logits[-1], dataset)

    def _train(self) -> None:
        """Run the steps that remain, with the evaluations and checkpoints that are due."""
        pending: tuple[int, StepMetrics] | None = None
        # In a log file, each update of the progress bar is a line, so updates are rare.
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
                # The host reads the metrics of the previous step while the device runs this step.
                if pending:
                    self._record(pending, bar)
                self.speed.count(tokens, *batch["input_ids"].shape)
                pending = (self.step, step_metrics)
                stop_now = self.stop.reached(self.step) and self.step < self.total_steps
                if stop_now or self._is_due(self.eval_every) or self._is_due(self.save_every):
                    self._record(pending, bar)
                    pending = None
                    if speed := self.speed.measured():
                        self.log.write(self.step, {"speed": speed})
                    self._evaluate_and_save(stop_now)
                    self.speed.restart()
                if stop_now:
                    self._print(
                        f"stopped by SIGTERM; step {self.step} of {self.total_steps} is saved; run "
                        "the same command again to resume"
                    )
                    raise Preempted

    def _batch(self, step: int) -> tuple[int, dict[str, jax.Array]]:
        """Return the number of tokens in the batch of `step`, and the batch on the devices.

        A process reads only its own rows of the batch.
        """
        size, config = self.config.batch_size, self.config
        batch = training_batch(
            self.training_data,
            size,
            self.buckets,
            config.seed,
            step,
            order=config.order,
            batch_rows=sharding.process_rows(size, self.mesh),
        )
        rows = rows_of_step(self.training_data, size, config.seed, step, config.order)
        tokens = int(self.training_data.lengths[rows].sum())
        return tokens, sharding.shard_batch(batch, self.mesh, size)

    def _evaluate_and_save(self, stop_now: bool) -> None:
        """Evaluate and save if due after this step; a run that stops always saves."""
        # The loss of this step was computed before the update, so the new parameters may be NaN
        # although the loss is finite.
        if not all_finite(self.state.parameters):
            self._stop_diverged(self.step, "the new parameters are not finite")
        score = self._evaluate() if self._is_due(self.eval_every) else None
        if not trains_early_exits(self.config, self.step - 1, self.total_steps):
            score = None  # The early exits are not trained yet: this step must not become the best.
        # The best step can only be exported if every evaluated step was saved.
        may_be_best = score is not None and self.config.export == "best"
        if stop_now or self._is_due(self.save_every) or may_be_best:
            self.log.flush()  # A run that resumes from this checkpoint needs the log up to here.
            self.checkpoints.save(self.state, score)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _record(self, pending: tuple[int, StepMetrics], bar: tqdm) -> None:
        """Check and log the metrics of a step, and update the progress bar."""
        step, values = pending
        values = jax.device_get(values)
        self._check_finite(step, values)
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

    def _check_finite(self, step: int, values: StepMetrics) -> None:
        if not (math.isfinite(values.loss) and math.isfinite(values.gradient_norm)):
            self._stop_diverged(
                step, f"the loss is {values.loss} and the gradient norm is {values.gradient_norm}"
            )

    def _stop_diverged(self, step: int, problem: str) -> NoReturn:
        latest = self.checkpoints.latest
        last_good = (
            f"the last good checkpoint is {self.workdir / run_directory.CHECKPOINTS / str(latest)}"
            if latest
            else "there is no checkpoint yet"
        )
        raise TrainingDiverged(
            f"training stopped at step {step}: {problem}; {last_good}; a smaller learning_rate may "
            "help"
        )

    def _evaluate(self) -> float:
        """Evaluate and log all exits on dev.

        Returns:
            The last exit's primary metric on the first part of dev.
        """
        results = {}
        names, positive_class = self.task.metrics, self.task.positive_class
        for name, dataset in self.dev_data.items():
            labels, logits = dataset.labels, self.all_exit_logits(dataset)
            assert labels is not None  # `examples_of` raised InputError otherwise.
            exit_metrics = [
                metrics.compute(names, exit_logits, labels, positive_class)
                for exit_logits in logits
            ]
            results[name] = {
                metric: [values[metric] for values in exit_metrics] for metric in names
            }
        self.log.write(self.step, results)
        score = next(iter(results.values()))[names[0]][-1]
        shown = UNDEFINED if math.isnan(score) else f"{score:.4f}"
        self._print(f"step {self.step}: dev {names[0]} {shown} at the last exit")
        return score

    def all_exit_logits(self, dataset: Dataset) -> np.ndarray:
        """Return the logits (L, N, C) of all rows of `dataset`, in the order of `dataset`."""
        size = self.config.batch_size
        model_config = self.start.model.config
        all_logits = np.empty(
            (model_config.num_hidden_layers, len(dataset), model_config.num_labels), np.float32
        )
        for rows, part in batches_by_bucket([dataset], size, self.buckets):
            process_rows = sharding.process_rows(size, self.mesh)
            part_rows = process_rows[process_rows < len(part)]
            batch = assemble(part, part_rows, len(process_rows), part.input_ids.shape[1])
            batch = sharding.shard_batch(batch, self.mesh, size)
            logits = self.eval_step(self.state.parameters, batch)
            # The last rows of a batch may be padding rows.
            all_logits[:, rows] = np.asarray(logits)[:, : len(rows)]
        return all_logits

    def _export(self) -> None:
        """Write the last or the best parameters to `workdir` as a Hugging Face style checkpoint."""
        parameters, step = self.state.parameters, self.step
        best = self.checkpoints.best if self.config.export == "best" else None
        if best is not None:
            step = best
            parameters = self.checkpoints.parameters(step, parameters)
        self.state = self.state._replace(parameters=parameters)
        criterion, said = self._select_exit()
        gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(self.mesh))
        parameters = jax.device_get(gather(parameters))
        if processes.is_first():
            model = unstacked(merge(self.structure, parameters))
            trained_exits = "last" if self.config.loss.weights == "last" else "all"
            uses = [used_rows.CHOSE_STEP] * (best is not None)
            # The table is printed by the selection.
            uses += [used_rows.CHOSE_SETTING] * bool(said)
            finished = dataclasses.replace(
                self.start,
                model=model,
                criterion=criterion,
                trained_exits=trained_exits,
                hugging_face_config=self.rows.with_used_rows(self.start.hugging_face_config, uses),
            )
            settings = "\n".join(
                f"{name}={value}"
                for name, value in changed(self.config).items()
                if name not in PLACES
            )
            facts = TrainingFacts(
                self.task.name, self.config.model, settings, "\n".join([self.rows.text, *said])
            )
            save_pretrained(finished, self.workdir, training=facts)
        processes.wait_for_all("the parameters are written")
        self._print(f"the parameters of step {step} are in {self.workdir}")

    def _select_exit(self) -> tuple[ExitCriterion | None, list[str]]:
        """Select the criterion of the finished checkpoint, and return what was said about it.

        The criterion is None in all processes but the first.
        """
        said: list[str] = []
        dataset = next(iter(self.dev_data.values()))
        logits = self.all_exit_logits(dataset)
        if not processes.is_first() or self.config.loss.weights == "last":
            return None, said
        assert dataset.labels is not None  # `examples_of` raised InputError otherwise.

        def say(message: str) -> None:
            said.append(message)
            self._print(message)

        names, positive_class = self.task.metrics, self.task.positive_class
        return select_exit(logits, dataset.labels, names, say, positive_class), said

    def _print(self, message: str) -> None:
        """Print `message` on process 0, without breaking the progress bar."""
        if processes.is_first():
            tqdm.write(message)
