"""What a service counts, in the words of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from .pool import Pool

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one service."""

    def __init__(self, pool: Pool) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry: CollectorRegistry = CollectorRegistry()
        every = self.registry
        self._requests = Counter(
            "unet_rt_requests", "Requests, by what was asked and status", ("what", "status"), registry=every
        )
        self._seconds = Histogram(
            "unet_rt_request_seconds", "From arrival to answer", ("what",), buckets=SECONDS, registry=every
        )
        self._pixels = Counter("unet_rt_pixels", "Pixels predicted, by engine", ("engine",), registry=every)
        gauges = (
            ("unet_rt_requests_inside", "Requests that wait or are computed", lambda: pool.inside),
            ("unet_rt_worker_restarts", "Processes that died and were replaced", lambda: pool.restarts),
            ("unet_rt_cancelled", "Jobs ended because nobody waited any more", lambda: pool.cancelled),
        )
        for name, text, read in gauges:
            Gauge(name, text, registry=every).set_function(read)

    def count(self, what: str, status: int, seconds: float) -> None:
        """Counts one request that is over."""
        self._requests.labels(what, str(status)).inc()
        self._seconds.labels(what).observe(seconds)

    def count_pixels(self, engine: str, mpx: float) -> None:
        """Counts the pixels of one prediction."""
        self._pixels.labels(engine).inc(round(mpx * 1e6))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
