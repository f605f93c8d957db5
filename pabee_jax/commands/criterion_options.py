"""The exit criterion of `predict` and `serve`: --criterion, or --patience."""

from pabee_jax import criteria
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.errors import InputError


def given_criterion(
    criterion: str | None, patience: int | None, regression_threshold: float | None
) -> ExitCriterion | None:
    """Return the criterion of the three options; None for the criterion of the checkpoint.

    Raises:
        InputError: a value cannot be used, both criteria are given, or the threshold without
            patience.
    """
    if criterion is not None and patience is not None:
        raise InputError("--patience and --criterion are two exit criteria; give one of them")
    if regression_threshold is not None and patience is None:
        raise InputError("--regression_threshold has no effect without --patience")
    if criterion is not None:
        return criteria.parse(criterion)
    return None if patience is None else Patience(patience, regression_threshold or 0.0)
