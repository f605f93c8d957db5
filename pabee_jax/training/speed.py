"""How fast training is, for the log."""

import time

import jax

from pabee_jax.models import flops
from pabee_jax.models.config import ModelConfig


class Speed:
    """Adds up the steps since `restart`. The first of all, which compiles, is left out."""

    def __init__(self, config: ModelConfig, devices: int):
        peak = flops.peak_per_second(jax.devices()[0])
        self._config, self._peak = config, peak and peak * devices
        self._since: float | None = None

    def restart(self) -> None:
        """To be called after what is not training: evaluating, saving."""
        self._since, self._steps, self._tokens, self._flops = time.perf_counter(), 0, 0, 0.0

    def count(self, tokens: int, rows: int, length: int) -> None:
        """One more step is given to the devices: its real tokens, and its padded shape."""
        if self._since is None:
            self.restart()
            return
        self._steps += 1
        self._tokens += tokens
        self._flops += flops.of_training_step(self._config, rows, length)

    def measured(self) -> dict[str, float]:
        """Per second since `restart`, over all devices; nothing without a step.

        `flop_utilisation` is the share of the chips' bfloat16 peak that the model's own operations
        made use of, padding included ("MFU"); only for chips whose peak is known.
        """
        if self._since is None or not self._steps:
            return {}
        seconds = time.perf_counter() - self._since
        found = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        if self._peak:
            found["flop_utilisation"] = self._flops / seconds / self._peak
        return found
