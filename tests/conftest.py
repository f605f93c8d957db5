"""Eight CPU devices for every test, so that meshes can be tested on any machine."""

import os

# The tests compile a lot and compute little: machine code that is not optimised halves their time,
# and means the same. What is given from outside comes last and wins.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Shapes in signatures are checked while tests run, where arrays are computed with. (Elsewhere the
# checker would answer a wrong argument before our own message does.)
jaxtyping.install_import_hook(
    ["pabee_jax.models", "pabee_jax.drivers", "pabee_jax.training.loss", "pabee_jax.training.step"],
    "beartype.beartype",
)
from runs import finished, program, recording, sources, undisturbed  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A new one for every session: many tests compile the same programs."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory
