"""Training throughput for the log."""

import time

import jax

from pabee_jax.models import flops
from pabee_jax.models.config import ModelConfig


class Speed:
    """Counts of the steps, tokens and FLOPs since `restart`.

    The first step of a run is not counted, because it includes compilation.
    """

    def __init__(self, config: ModelConfig, devices: int):
        """Start without counts; `devices` is the number of devices of the run."""
        peak_per_device = flops.peak_per_second(jax.devices()[0])
        self._config = config
        self._peak = peak_per_device and peak_per_device * devices
        self._start_time: float | None = None

    def restart(self) -> None:
        """Reset all counts. Call after evaluation or saving, so that their time is excluded."""
        self._start_time = time.perf_counter()
        self._steps, self._tokens, self._flops = 0, 0, 0.0

    def count(self, tokens: int, rows: int, length: int) -> None:
        """Count one dispatched step.

        Args:
            tokens: the tokens of the batch, without padding.
            rows: the rows of the batch, with padding rows.
            length: the sequence length of the batch, with padding.
        """
        if self._start_time is None:
            self.restart()
            return
        self._steps += 1
        self._tokens += tokens
        self._flops += flops.of_training_step(self._config, rows, length)

    def measured(self) -> dict[str, float]:
        """Return the throughput per second since `restart`, summed over all devices.

        `flop_utilisation` ("MFU") is the model's FLOPs per second, padding included, as a fraction
        of the bfloat16 peak of all devices. It is absent for chips without a peak in
        `pabee_jax.models.flops`. The result is empty if no step was counted.
        """
        if self._start_time is None or not self._steps:
            return {}
        seconds = time.perf_counter() - self._start_time
        throughput = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        if self._peak:
            throughput["flop_utilisation"] = self._flops / seconds / self._peak
        return throughput
