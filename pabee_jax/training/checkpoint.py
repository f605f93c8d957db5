"""Training checkpoints with orbax: the last ones and the best on dev, as plain arrays by name."""

import concurrent.futures
import contextlib
import itertools
import math
import re
from collections.abc import Iterator
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
    """A checkpoint that could not be written; training does not go on without."""


class Checkpoints:
    """The checkpoints of one run in one folder: the last two, and the best on dev.

    A step holds `step`, `parameters`, and under `optimizer` for each part of the parameters AdamW's
    `count` and its moments `mu` and `nu`, all by name, so that a stored run does not depend on
    optax's classes. Saving goes on in the background, from a copy. A step's folder appears by a
    rename once it is complete (in a bucket it counts once orbax has marked it): a run that is
    killed while saving leaves nothing that could be mistaken for a checkpoint. Digests of its files
    tell later whether the disk kept them.

    In a run of several processes every process makes all the calls, and each writes its shards.
    """

    def __init__(self, directory: epath.Path, *, read_only: bool = False):
        """With `read_only` nothing is cleaned up or set aside: a run may be writing there."""
        self._directory, self._read_only = directory, read_only
        # Any: the library's annotations of its own policies contradict each other.
        policies: Any = ocp.training.preservation_policies
        save_always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            storage.absolute(directory),
            save_decision_policy=save_always,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(_KEEP_LAST),
                    # The library's default keeps every checkpoint that has no metrics.
                    policies.BestN(
                        get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )
        self._background = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._saving: concurrent.futures.Future | None = None
        self._failed = False
        if not read_only:
            self._set_damaged_aside()

    @property
    def steps(self) -> list[int]:
        """Every kept step, ascending."""
        self._settle()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        steps = self.steps
        return steps[-1] if steps else None

    @property
    def best(self) -> int | None:
        """The step with the best dev score, the later one of two equals; None without scores."""
        self._settle()
        kept = self._checkpointer.checkpoints
        scored = [(_score(one.metrics), one.step) for one in kept if one.metrics]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, score: float | None) -> None:
        """Stores the state under its step; `score` is the dev metric, if it was evaluated there.

        Returns when the state is copied. What goes wrong later is raised by the next call.

        Raises:
            SaveFailed: this one or the one before could not be written, and why.
        """
        self._settle()
        step = int(state.step)
        metrics: Any = None if score is None else {"score": score}
        with self._failing(step):
            saving = self._checkpointer.save_checkpointables_async(
                step, _stored(_parts(state)), metrics=metrics
            )
        if saving is not None:
            self._saving = self._background.submit(self._finish, saving, step)

    def _finish(self, saving: Any, step: int) -> None:
        with self._failing(step):
            saving.result()
            if processes.is_first():
                digests.write(self._directory / str(step))

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Says in a sentence what went wrong with a save, and what is left."""
        try:
            yield
        except Exception as error:  # Whatever the storage and the libraries between raise.
            self._failed = True
            if not (storage.refusal(error) or isinstance(error, OSError)):
                logging.error("a save failed", exc_info=error)  # Perhaps a mistake of ours.
            kept = [one.step for one in self._checkpointer.checkpoints if one.step != step]
            left = "there is no good one yet"
            if kept:
                left = f"the last good checkpoint is that of step {max(kept)}"
            where, reason = self._directory, storage.reason_of(error)
            raise SaveFailed(f"step {step} cannot be saved in {where}: {reason}; {left}") from error

    def _settle(self) -> None:
        """Waits for the save that is under way; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _set_damaged_aside(self) -> None:
        """Renames the checkpoints that the disk did not keep, so that good ones are used."""
        if processes.is_first():
            for step in self.steps:
                folder = self._directory / str(step)
                if problem := digests.problem(folder):
                    aside = folder.rename(_free_name(folder))
                    logging.warning(
                        "the checkpoint %s is damaged (%s): it is not used, and is now called %s",
                        folder,
                        problem,
                        aside.name,
                    )
        processes.wait_for_all("damaged checkpoints are set aside")
        self._checkpointer.reload()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, with `like`'s shapes, types and shardings.

        Raises:
            InputError: the checkpoint holds other arrays than `like` has.
        """
        parts = self._load(step, _parts(like))
        optimizer = {
            part: optax.tree.set(state, **parts["optimizer"][part])
            for part, state in like.optimizer.items()
        }
        return TrainState(parts["step"], parts["parameters"], optimizer)

    def parameters(self, step: int, like: Parameters) -> Parameters:
        """Only the parameters of `step`, without the optimiser's moments.

        Raises:
            InputError: it is damaged, or it holds other arrays than `like` has.
        """
        if self._read_only and (problem := digests.problem(self._directory / str(step))):
            raise InputError(f"the checkpoint of step {step} is damaged: {problem}")
        return self._load(step, {"parameters": like})["parameters"]

    def _load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        try:
            stored = self._checkpointer.load_checkpointables(step, _abstract(_stored(like)))
            return _loaded(stored)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the checkpoint of step {step} in {self._directory} does not hold the arrays that "
                "this model and this version of pabee_jax expect: go on with the version that "
                "wrote it, or begin again with --overwrite"
            ) from error

    def close(self) -> None:
        """Waits for what is being saved."""
        try:
            self._settle()
        finally:
            self._background.shutdown()
            # It would raise again what has been told already.
            with contextlib.suppress(*[Exception] if self._failed else ()):
                self._checkpointer.close()


def _stored(tree: dict[str, Any]) -> dict[str, Any]:
    """The same arrays under the names that checkpoints store; they are those of version 0.1."""
    return _renamed(tree, r"\.(query|key|value)_projection\.", r".\1.")


def _loaded(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_stored`."""
    return _renamed(tree, r"\.(query|key|value)\.", r".\1_projection.")


def _renamed(tree: Any, pattern: str, replacement: str) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        re.sub(pattern, replacement, name): _renamed(value, pattern, replacement)
        for name, value in tree.items()
    }


def _free_name(folder: epath.Path) -> epath.Path:
    names = (folder.with_name(f"damaged-{folder.name}-{count}") for count in itertools.count(1))
    return next(name for name in names if not name.exists())


def _score(metrics: Any) -> float:
    # NaN (a correlation of constant predictions) would make the order of checkpoints random.
    value = (metrics or {}).get("score", math.nan)
    return -math.inf if math.isnan(value) else value


def _parts(state: TrainState) -> dict[str, Any]:
    optimizer = {
        part: {name: optax.tree.get(one, name) for name in ("count", "mu", "nu")}
        for part, one in state.optimizer.items()
    }
    return {"step": state.step, "parameters": state.parameters, "optimizer": optimizer}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree
    )
