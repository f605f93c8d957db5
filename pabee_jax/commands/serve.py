"""`serve`: answers requests over HTTP, each row when it exits."""

from collections.abc import Sequence

from pabee_jax.commands import command_line
from pabee_jax.commands.options import read_flags
from pabee_jax.commands.serve_options import ServeOptions
from pabee_jax.errors import InputError
from pabee_jax.inference.engine import EngineConfig
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax serve`."""
    command_line.define(ServeOptions, argv)

    def run(_: Sequence[str]) -> None:
        serve(read_flags(ServeOptions))

    command_line.run(run, argv)


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT; requests that were accepted are answered.

    Raises:
        InputError: a checkpoint that cannot be used, a criterion that does not fit it, or a library
            that is not installed.
    """
    try:
        import uvicorn

        from pabee_jax.serving.app import make_app
        from pabee_jax.serving.service import Limits, Service
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'pabee_jax[serve]'") from None
    limits = Limits(
        max_client_batch_size=options.max_client_batch_size,
        max_body_bytes=options.max_body_bytes,
        auto_truncate=options.auto_truncate,
        api_key=_key(options.api_key_file),
        cors_allow_origin=options.cors_allow_origin,
    )
    service = Service.open(
        options.checkpoint,
        limits=limits,
        config=EngineConfig(
            layers_per_look=options.layers_per_look,
            max_waiting=options.max_waiting,
            max_waiting_bytes=options.max_waiting_bytes,
        ),
        allowed_criteria=options.allowed_criteria,
        criterion=options.exit_criterion,
        dtype=options.dtype,
        compilation_cache=options.compilation_cache,
    )
    app = make_app(service)
    print(f"{options.checkpoint}: http://{options.host}:{options.port}", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


def _key(name: str) -> str:
    """Return the key in a file, so that it is neither in the list of processes nor in a history."""
    if not name:
        return ""
    path = storage.local_path_of(name)
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api_key_file {path} cannot be read: {error}") from None
    if not key:
        raise InputError(f"--api_key_file {path} is empty")
    return key
