"""A service of `pabee-jax serve` in a process of its own."""

import signal
import socket
import subprocess
import sys
import time

import httpx


class Server:
    """A service in a process of its own, on a free port.

    Args:
        checkpoint: what `pabee-jax serve --checkpoint` takes.
        *arguments: further arguments of the command.
        environment: the variables of the process; by default those of this process.
        stdout: what the process writes to, as in `subprocess.Popen`.
    """

    def __init__(self, checkpoint, *arguments, environment=None, stdout=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "pabee_jax.commands.main", "serve"]
        command += [f"--checkpoint={checkpoint}", f"--port={port}", *arguments]
        self.process = subprocess.Popen(command, env=environment, stdout=stdout)

    def wait_until_ready(self):
        while True:
            assert self.process.poll() is None, "the service has ended"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def post(self, body, path="/predict", **options):
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)
