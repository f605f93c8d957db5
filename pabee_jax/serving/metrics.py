"""The metrics of the service for Prometheus: TEI's names where they mean the same, and its own."""

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from pabee_jax.inference.engine import Answer, Engine

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one service.

    Counts are gauges, because the library adds "_total" to the names of counters, which TEI's names
    do not have.
    """

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self._num_layers = engine.classifier.num_layers

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=registry)

        def count(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self.requests = count("te_request_count", "Requests for predictions", ("method",))
        self.successes = count("te_request_success", "Requests that were answered", ("method",))
        self.failures = count("te_request_failure", "Requests that failed", ("err",))
        self.duration = seconds("te_request_duration", "Seconds of a request")
        self.tokenization = seconds("te_request_tokenization_duration", "Seconds of tokenization")
        self._queue = seconds("te_request_queue_duration", "Seconds that a row waits")
        self._inference = seconds("te_request_inference_duration", "Seconds of a row in the pool")
        waiting = count("te_queue_size", "Rows that wait for their answers")
        waiting.set_function(lambda: engine.num_waiting)
        active = count("pabee_rows_in_flight", "Rows in the pool")
        active.set_function(lambda: engine.num_active)
        self._exit_layers = Histogram(
            "pabee_exit_layer",
            "Exit layers of the rows",
            buckets=range(1, self._num_layers + 1),
            registry=registry,
        )
        self._saved = count("pabee_layers_saved", "Layers that the rows did not need")

    def observe(self, answer: Answer) -> None:
        """Record the answer of a row."""
        self._queue.observe(answer.queue_seconds)
        self._inference.observe(answer.inference_seconds)
        self._exit_layers.observe(answer.exit_layer)
        self._saved.inc(self._num_layers - answer.exit_layer)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
