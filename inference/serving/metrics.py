"""Metrics in Prometheus' format, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """All metrics of one server. Labels have few values: routes, statuses, names of models."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tokenloom_requests", "Requests answered, by route and status (499: the client left)",
            ("route", "method", "status"), registry=self.registry)
        self.in_flight = Gauge(
            "tokenloom_requests_in_flight", "Requests for images or words without their answer",
            registry=self.registry)
        self.rejected = Counter(
            "tokenloom_rejected", "Generation requests that ended in an error, by its code: full "
            "queue, deadline, draining, safety filter, invalid, failed", ("reason",),
            registry=self.registry)
        self.cancelled = Counter(
            "tokenloom_cancelled", "Jobs stopped before their end: the client left, the "
            "deadline, an error", ("reason",), registry=self.registry)
        self.images = Counter(
            "tokenloom_images", "Images handed out", ("model",), registry=self.registry)
        self.request_seconds = Histogram(
            "tokenloom_request_seconds", "From a generation request to the end of its reply",
            buckets=SECONDS, registry=self.registry)
        self.queue_seconds = Histogram(
            "tokenloom_queue_seconds", "From a generation request to its first decoder step",
            buckets=SECONDS, registry=self.registry)
        self.first_partial_seconds = Histogram(
            "tokenloom_first_partial_seconds", "From a request to its first partial image",
            buckets=SECONDS, registry=self.registry)

    def watch(self, stats: Callable[[], Any]) -> None:
        """Read the engine's own figures whenever the metrics are asked for."""
        self.registry.register(_EngineFigures(stats))

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the engine's figures of this moment."""
        stats = self._stats()
        for name, text, value in (
                ("queue_jobs", "Jobs that wait", stats.queued),
                ("rows_active", "Rows of the batch that hold an image", stats.active_rows),
                ("rows", "Rows of the batch", stats.rows),
                ("tokens_per_second", "Image tokens drawn a second, lately",
                 stats.tokens_per_second),
                ("models_loaded", "Models in memory", len(stats.loaded)),
                ("model_bytes", "Memory of the models", stats.model_bytes)):
            yield GaugeMetricFamily(f"tokenloom_{name}", text, value)
        yield CounterMetricFamily("tokenloom_tokens", "Image tokens drawn", stats.tokens)
