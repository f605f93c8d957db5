"""Eight CPU devices for every test, so that meshes can be tested on any machine."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

# Shapes in signatures are checked while tests run, where arrays are computed with. (Elsewhere the
# checker would answer a wrong argument before our own message does.)
jaxtyping.install_import_hook(
    ["pabee_jax.model", "pabee_jax.drivers", "pabee_jax.training.loss", "pabee_jax.training.step"],
    "beartype.beartype",
)
