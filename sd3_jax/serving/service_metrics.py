"""What Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

# From a queue without delay to a request at its time limit (limits.request_s).
SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServiceMetrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, batch_size: int, waiting: Callable[[], int]):
        # Not the global one: a second server in the process, as in tests, would
        # collide.
        self._registry = CollectorRegistry()
        options = {"registry": self._registry, "namespace": "sd3_jax"}
        # prometheus_client adds "_total" to the names of counters.
        self.requests = Counter(
            "requests",
            "Answers by endpoint and status",
            ["endpoint", "status"],
            **options,
        )
        self.rejected = Counter(
            "rejected", "Requests that were refused, by status", ["status"], **options
        )
        self.pictures = Counter("pictures", "Pictures that were painted", **options)
        self.open_requests = Gauge(
            "open_requests", "Requests being answered", **options
        )
        self.ready = Gauge("ready", "1 while /readyz answers 200", **options)
        Gauge("queue_pictures", "Pictures that wait", **options).set_function(waiting)
        # Whole numbers up to the size of a batch, so that the mean is exact.
        buckets = sorted({1, *range(0, batch_size + 1, max(1, batch_size // 16))} - {0})
        self.batch_rows = Histogram(
            "batch_rows",
            "Pictures of a batch, without padding",
            buckets=buckets,
            **options,
        )
        self.seconds = Histogram(
            "stage_seconds",
            "Seconds by stage: queue, paint, filter, encode, request",
            ["stage"],
            buckets=SECONDS,
            **options,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
