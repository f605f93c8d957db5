"""Test configuration: eight CPU devices, so that meshes can be tested on any machine."""

import importlib.metadata
import os

# The tests compile many programs and compute little. Without optimizations, and without the fusion
# emitters of the CPU backend, compiling takes less than half the time; the semantics are the same.
_CHEAP_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA ends the process at a flag that it does not have. This flag is gone in jaxlib 0.11.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _CHEAP_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")

# Flags from the environment come last, so that they take precedence.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        *_CHEAP_COMPILATION,
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests simulate the hub, reachable or not. huggingface_hub and datasets read these variables
# when they are imported.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

import jax
import jaxtyping
import pytest

# beartype checks the shapes in the signatures of the modules that compute with arrays. (In other
# modules, beartype would raise before pabee_jax raises its own error for an invalid argument.)
jaxtyping.install_import_hook(
    [
        "pabee_jax.models.encoder",
        "pabee_jax.models.transformer",
        "pabee_jax.drivers",
        "pabee_jax.training.loss",
        "pabee_jax.training.step",
    ],
    "beartype.beartype",
)
from classifiers import classifier, directory  # noqa: F401
from pabee_jax.criteria import CRITERIA
from runs import finished, program, recording, sources, undisturbed  # noqa: F401


@pytest.fixture
def own_criteria():
    """For a test that registers criteria: other tests do not see them."""
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A new compilation cache for every session, because many tests compile the same programs.

    In the processes of the tests, it stores only programs that take long to compile: to write the
    others takes longer than it saves.
    """
    cache = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # For the processes that tests start.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return cache
