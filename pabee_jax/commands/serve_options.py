"""The options of `serve`."""

import dataclasses
import functools
import re

from pabee_jax import criteria
from pabee_jax.commands.criterion_options import given_criterion
from pabee_jax.commands.options import option
from pabee_jax.commands.plugins import plugin_option
from pabee_jax.criteria import ExitCriterion
from pabee_jax.errors import InputError
from pabee_jax.inference.planning import check_size

_SIZES = (
    "max_waiting",
    "max_waiting_bytes",
    "max_client_batch_size",
    "max_body_bytes",
    "layers_per_look",
)


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The options of `serve`; each field is a flag.

    Raises:
        InputError: a value that cannot be used, or an option that has no effect.
    """

    checkpoint: str = option(
        "Required: run or checkpoint directory (local or gs://BUCKET/...), or hub id.", ""
    )
    host: str = option("Address to listen on.", "127.0.0.1")
    port: int = option("Port to listen on.", 8000)
    patience: int | None = option(
        "Patience of requests that give no criterion; by default the criterion of the checkpoint."
    )
    regression_threshold: float | None = option(
        "For regression, with --patience: two scores agree when they differ by less than this."
    )
    criterion: str | None = option("An exit criterion, as in max_probability:threshold=0.9.")
    allow_criteria: str = option(
        "Criteria that requests may give, comma-separated; their programs are compiled at the "
        "start. By default patience and, for classes, max_probability.",
        "",
    )
    dtype: str = option("Compute type: float32 or bfloat16.", "float32")
    max_waiting: int = option(
        "Most rows that wait for their answers; more are refused with status 429.", 1024
    )
    max_waiting_bytes: int = option(
        "Most bytes of the texts of these rows; more are refused with status 429.", 16_000_000
    )
    max_client_batch_size: int = option("Most rows of a request.", 32)
    max_body_bytes: int = option("Most bytes of a request.", 2_000_000)
    auto_truncate: bool = option(
        "Truncate texts with too many tokens if a request does not say.", False
    )
    layers_per_look: int = option("Layers that run between two looks at the pool.", 1)
    cors_allow_origin: tuple[str, ...] = option(
        "Origin whose pages may use the service from a browser, such as https://example.com; * for "
        "all; may be given several times.",
        (),
    )
    api_key_file: str = option("File with the bearer key that requests must have.", "")
    compilation_cache: str | None = option("Directory that keeps compiled programs.")
    plugin: tuple[str, ...] = plugin_option()

    def __post_init__(self):
        if not self.checkpoint:
            raise InputError("--checkpoint is missing: a run directory, a checkpoint or a hub id")
        if not 0 <= self.port < 65_536:
            raise InputError(f"--port is {self.port}; it must be from 0 to 65535")
        for name in _SIZES:
            check_size(f"--{name}", getattr(self, name))
        for origin in self.cors_allow_origin:
            _check_origin(origin)
        for name in self.allowed_criteria:
            criteria.criterion_class(name)
        _ = self.exit_criterion

    @functools.cached_property
    def exit_criterion(self) -> ExitCriterion | None:
        """The given criterion; None for the criterion of the checkpoint."""
        return given_criterion(self.criterion, self.patience, self.regression_threshold)

    @functools.cached_property
    def allowed_criteria(self) -> tuple[str, ...]:
        """The criteria that were named; empty for the default."""
        return tuple(self.allow_criteria.split(",")) if self.allow_criteria else ()


def _check_origin(origin: str) -> None:
    """Raise InputError for an origin that no browser sends, such as an address with a path."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s,*A-Z]+", origin):
        raise InputError(
            f"--cors_allow_origin is {origin!r}; it must be * or a scheme, a host in lower case "
            "and perhaps a port, without a path or a slash at its end, as in https://example.com"
        )
