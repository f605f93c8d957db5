"""Exit criteria: the rules that decide at which layer a row exits, one class per criterion.

To add a criterion, add a class decorated with `@registered("its_name")` to a file of this package.
Every driver, `replay`, the option `--criterion` and `config.json` then accept the criterion.
"""

from pabee_jax.criteria.agreement import Divergence, Vote, Window
from pabee_jax.criteria.base import Criterion, ExitCriterion
from pabee_jax.criteria.bounds import FixedLayer, Oracle
from pabee_jax.criteria.confidence import (
    Energy,
    Ensemble,
    Entropy,
    Margin,
    MaxProbability,
    PatientConfidence,
)
from pabee_jax.criteria.consistency import Consistency
from pabee_jax.criteria.patience import Patience
from pabee_jax.criteria.registry import CRITERIA, as_arrays, registered
from pabee_jax.criteria.text import (
    criterion_class,
    describe,
    from_config,
    name_of,
    parse,
    to_config,
)
from pabee_jax.criteria.validation import ONLY_LAST_EXIT, check, check_labels, check_task, warn

__all__ = [
    "CRITERIA",
    "ONLY_LAST_EXIT",
    "Consistency",
    "Criterion",
    "Divergence",
    "Energy",
    "Ensemble",
    "Entropy",
    "ExitCriterion",
    "FixedLayer",
    "Margin",
    "MaxProbability",
    "Oracle",
    "Patience",
    "PatientConfidence",
    "Vote",
    "Window",
    "as_arrays",
    "check",
    "check_labels",
    "check_task",
    "criterion_class",
    "describe",
    "from_config",
    "name_of",
    "parse",
    "registered",
    "to_config",
    "warn",
]
