"""Eight CPU devices for every test, so that meshes can be tested on any machine."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Shapes in signatures are checked while tests run, where arrays are computed with. (Elsewhere the
# checker would answer a wrong argument before our own message does.)
jaxtyping.install_import_hook(
    ["pabee_jax.model", "pabee_jax.drivers", "pabee_jax.training.loss", "pabee_jax.training.step"],
    "beartype.beartype",
)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A new one for every session: many tests compile the same programs."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory
