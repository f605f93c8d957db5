"""Training checkpoints with orbax: the last two and the best on dev, as plain arrays by name."""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.training import digests
from pabee_jax.training.step import Parameters, TrainState

_KEEP_LAST = 2


class SaveFailed(InputError):
    """Raised when a checkpoint cannot be written; training stops."""


class NotRestorable(InputError):
    """Raised when a checkpoint does not hold the arrays of the run: it is damaged, or foreign."""


class Checkpoints:
    """The checkpoints of one run in one directory: the last two, and the best on dev.

    A checkpoint holds `step`, `parameters`, and `optimizer`. For each part of the parameters,
    `optimizer` holds AdamW's `count` and the moments `mu` and `nu`. All arrays are stored by name,
    so that a checkpoint does not depend on optax's classes.

    A background thread writes each checkpoint from a copy of the state. Orbax renames a checkpoint
    to its final name when the checkpoint is complete (in a bucket, orbax marks the checkpoint as
    complete). A run that is killed while saving therefore leaves no partial checkpoint under a
    final name. Digests of the files are stored with each checkpoint, so that a later start detects
    corrupted files.

    In a run of several processes, every process must make the same calls, and every process writes
    its own shards.
    """

    def __init__(self, directory: epath.Path, *, read_only: bool = False):
        """Open the checkpoints in `directory`.

        Args:
            directory: the directory of the checkpoints; it may be absent.
            read_only: remove and rename nothing, because a run may be writing to `directory`.

        Raises:
            InputError: a file of a checkpoint cannot be read (not with `read_only`).
        """
        self._directory, self._read_only = directory, read_only
        if not read_only:
            self._rename_damaged()
            _hide_errors_of_closed_event_loops()
        # Any: orbax's annotations of its own policies contradict each other.
        policies: Any = ocp.training.preservation_policies
        save_always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            storage.absolute(directory),
            save_decision_policy=save_always,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(_KEEP_LAST),
                    # By default, orbax keeps every checkpoint that has no metrics.
                    policies.BestN(
                        get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )
        self._background = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._pending_save: concurrent.futures.Future | None = None
        self._failed = False

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        self._wait_for_save()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint; None without checkpoints."""
        steps = self.steps
        return steps[-1] if steps else None

    @property
    def best(self) -> int | None:
        """The step with the best dev score, the later of equal scores; None without scores."""
        self._wait_for_save()
        scores_and_steps = [
            (_score(checkpoint.metrics), checkpoint.step)
            for checkpoint in self._checkpointer.checkpoints
            if checkpoint.metrics
        ]
        return max(scores_and_steps)[1] if scores_and_steps else None

    def save(self, state: TrainState, score: float | None) -> None:
        """Save `state` under its step.

        The call returns when the state is copied. An error of the background thread is raised by
        the next call.

        Args:
            state: the state to save.
            score: the dev metric of the last exit; None if this step was not evaluated.

        Raises:
            SaveFailed: this checkpoint or the previous checkpoint could not be written.
        """
        self._wait_for_save()
        step = int(state.step)
        metrics: Any = None if score is None else {"score": score}
        with self._save_errors(step):
            response = self._checkpointer.save_checkpointables_async(
                step, _to_stored_names(_named_arrays(state)), metrics=metrics
            )
        if response is not None:
            self._pending_save = self._background.submit(self._finish_save, response, step)

    def _finish_save(self, response: Any, step: int) -> None:
        with self._save_errors(step):
            response.result()
            if processes.is_first():
                digests.write(self._directory / str(step))

    @contextlib.contextmanager
    def _save_errors(self, step: int) -> Iterator[None]:
        """Raise SaveFailed, with the reason and the last checkpoint, when saving `step` fails."""
        try:
            yield
        except Exception as error:  # The storage and its client libraries raise many types.
            self._failed = True
            if not (storage.refusal(error) or isinstance(error, OSError)):
                # The cause may be a bug in pabee_jax: the traceback is needed.
                logging.error("saving a checkpoint failed", exc_info=error)
            complete = [
                checkpoint.step
                for checkpoint in self._checkpointer.checkpoints
                if checkpoint.step != step
            ]
            last_good = "there is no good checkpoint yet"
            if complete:
                last_good = f"the last good checkpoint is step {max(complete)}"
            raise SaveFailed(
                f"the checkpoint of step {step} cannot be saved in {self._directory}: "
                f"{storage.reason_of(error)}; {last_good}"
            ) from error

    def _wait_for_save(self) -> None:
        """Wait for the pending save; raise the error that stopped it."""
        pending_save, self._pending_save = self._pending_save, None
        if pending_save is not None:
            pending_save.result()

    def _rename_damaged(self) -> None:
        """Rename damaged checkpoints, so that the run restores the latest intact checkpoint."""
        if processes.is_first() and self._directory.is_dir():
            folders = [path for path in self._directory.iterdir() if path.name.isdigit()]
            for step in sorted(int(path.name) for path in folders if path.is_dir()):
                if problem := self._problem(step):
                    self._rename(step, problem)
        processes.wait_for_all("damaged checkpoints are renamed")

    def _problem(self, step: int) -> str | None:
        """Describe the damage of a checkpoint; return None if it is intact.

        Raises:
            InputError: a file cannot be read. The checkpoint may be intact.
        """
        folder = self._directory / str(step)
        try:
            return digests.problem(folder)
        except OSError as error:
            raise InputError(
                f"the checkpoint {folder} cannot be read: {storage.reason_of(error)}: "
                f"{error.filename}; it was left as it is"
            ) from error

    def _rename(self, step: int, problem: str) -> None:
        folder = self._directory / str(step)
        renamed = folder.rename(_unused_name(folder))
        logging.warning(
            "checkpoint %s is damaged (%s); it is renamed to %s and will not be restored",
            folder,
            problem,
            renamed.name,
        )

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """Return the state of the latest checkpoint that can be restored; None if there is none.

        Later checkpoints that cannot be restored are renamed. If no checkpoint can be restored,
        none is renamed, because the reason may be another version of this program.

        Args:
            like: a state with the shapes, types and shardings of the result.

        Raises:
            InputError: there are checkpoints, and none of them can be restored.
        """
        failures: dict[int, NotRestorable] = {}
        for step in reversed(self.steps):
            try:
                state = self.restore(step, like)
            except NotRestorable as error:
                if jax.process_count() > 1:  # Another process may have restored its part.
                    raise
                failures[step] = error
                continue
            for failed_step in failures:
                self._rename(failed_step, "its arrays cannot be restored")
            if failures:
                self._checkpointer.reload()
            return state
        if failures:
            raise next(iter(failures.values()))
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of `step`, with the shapes, types and shardings of `like`.

        Raises:
            NotRestorable: the arrays of the checkpoint are not the arrays of `like`.
        """
        arrays = self._load(step, _named_arrays(like))
        if int(arrays["step"]) != step:
            raise NotRestorable(
                f"the checkpoint {self._directory / str(step)} holds the state of step "
                f"{int(arrays['step'])}; rename the folder"
            )
        optimizer = {
            part: optax.tree.set(part_state, **arrays["optimizer"][part])
            for part, part_state in like.optimizer.items()
        }
        return TrainState(arrays["step"], arrays["parameters"], optimizer)

    def parameters(self, step: int, like: Parameters) -> Parameters:
        """Return only the parameters of `step`, without the optimizer's moments.

        Raises:
            InputError: the checkpoint is damaged (checked with `read_only`), or its arrays are not
                the arrays of `like`.
        """
        if self._read_only and (problem := self._problem(step)):
            raise InputError(f"the checkpoint of step {step} is damaged: {problem}")
        return self._load(step, {"parameters": like})["parameters"]

    def _load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        try:
            stored = self._checkpointer.load_checkpointables(
                step, _abstract(_to_stored_names(like))
            )
            return _from_stored_names(stored)
        except (KeyError, ValueError) as error:
            advice = "use the version that wrote the checkpoint"
            if not self._read_only:
                advice += ", or start again with --overwrite"
            raise NotRestorable(
                f"the checkpoint of step {step} in {self._directory} does not hold the arrays that "
                f"this model and this version of pabee_jax expect; {advice}"
            ) from error

    def close(self) -> None:
        """Wait for the pending save, and release orbax's resources."""
        try:
            self._wait_for_save()
        finally:
            self._background.shutdown()
            # After a failed save, orbax would raise the same error again.
            with contextlib.suppress(*[Exception] if self._failed else ()):
                self._checkpointer.close()


def _hide_errors_of_closed_event_loops() -> None:
    """Print no stack traces of writes that end after another write of the same save has failed.

    When one of orbax's writes fails, orbax closes the event loop of all writes. The storage library
    then reports every later write as an error of the closed loop, on stderr. The error of the first
    write is raised, and is the one that counts.
    """
    previous = sys.unraisablehook
    if getattr(previous, "func", None) is not _unless_event_loop_is_closed:
        sys.unraisablehook = functools.partial(_unless_event_loop_is_closed, previous)


def _unless_event_loop_is_closed(previous: Callable[[Any], Any], unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        previous(unraisable)


def _to_stored_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Rename the arrays of `tree` to the names in checkpoints, which are those of version 0.1."""
    return _rename(tree, r"\.(query|key|value)_projection\.", r".\1.")


def _from_stored_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Undo `_to_stored_names`."""
    return _rename(tree, r"\.(query|key|value)\.", r".\1_projection.")


def _rename(tree: Any, pattern: str, replacement: str) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        re.sub(pattern, replacement, name): _rename(value, pattern, replacement)
        for name, value in tree.items()
    }


def _unused_name(folder: epath.Path) -> epath.Path:
    names = (folder.with_name(f"damaged-{folder.name}-{count}") for count in itertools.count(1))
    return next(name for name in names if not name.exists())


def _score(metrics: Any) -> float:
    # NaN (a correlation of constant predictions) would make the order of checkpoints random.
    value = (metrics or {}).get("score", math.nan)
    return -math.inf if math.isnan(value) else value


def _named_arrays(state: TrainState) -> dict[str, Any]:
    optimizer = {
        part: {name: optax.tree.get(part_state, name) for name in ("count", "mu", "nu")}
        for part, part_state in state.optimizer.items()
    }
    return {"step": state.step, "parameters": state.parameters, "optimizer": optimizer}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree
    )
