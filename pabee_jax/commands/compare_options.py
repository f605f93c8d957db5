"""The options of `compare`."""

import dataclasses

from pabee_jax.commands.options import option
from pabee_jax.commands.plugins import plugin_option


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The options of `compare`; each field is a flag."""

    criterion: tuple[str, ...] = option(
        "A setting, as in patience:patience=3; may be given several times.", ()
    )
    metric: str = option("Metric to compare; by default the task's first.", "")
    output: str = option("Directory of the results.", "comparison")
    overwrite: bool = option("Replace files of --output that this command did not write.", False)
    plugin: tuple[str, ...] = plugin_option()
