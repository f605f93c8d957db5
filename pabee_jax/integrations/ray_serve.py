"""Ray Serve: the service of `pabee-jax serve` in replicas, on as many machines as the cluster has.

    from ray import serve
    from pabee_jax.integrations.ray_serve import application

    serve.run(application("runs/mrpc", deployment={"num_replicas": 2}))

`pip install 'pabee_jax[ray,serve]'`. Every replica has an engine of its own, compiles its programs
before it receives requests, and answers each text when it exits.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from pabee_jax.errors import InputError


def application(
    checkpoint: str, *, deployment: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Return the application for `ray.serve.run`; it answers the requests of `pabee-jax serve`.

    Args:
        checkpoint: a checkpoint directory, which every machine of the cluster must be able to read,
            or a Hugging Face hub id.
        deployment: arguments of `ray.serve.deployment`, such as `num_replicas`,
            `autoscaling_config` and `ray_actor_options`.
        options: further arguments of `Service.open`, such as `criterion`, `limits` and `config`.

    Raises:
        InputError: a library is not installed. What does not fit the checkpoint, a replica reports
            at its start.
    """
    try:
        serve = importlib.import_module("ray.serve")

        from pabee_jax.serving.app import make_app
        from pabee_jax.serving.service import Service
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed: pip install 'pabee_jax[ray,serve]'"
        ) from None

    def build() -> Any:
        service = Service.open(checkpoint, **options)
        service.warmup()
        return make_app(service)

    classifier = serve.ingress(build)()
    return serve.deployment(**{"name": "pabee_jax", **(deployment or {})})(classifier).bind()
