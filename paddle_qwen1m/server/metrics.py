"""Figures for Prometheus, under the names that vLLM's dashboards read."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from paddle_qwen1m.server.answers import Change, Running
from paddle_qwen1m.server.engine_thread import EngineThread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
TTFT_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(mantissa * 10**power for power in range(7) for mantissa in (1, 2, 5))


class Metrics:
    """Of one server."""

    def __init__(self, engine: EngineThread, model: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model, "0")
        self.registry.register(_State(engine, self._labels))
        self._prompt_tokens = self._counter("prompt_tokens", "tokens of prompts that were read")
        self._cached_tokens = self._counter("prompt_tokens_cached", "of them those found in the prefix cache")
        self._generated = self._counter("generation_tokens", "tokens of answers")
        self._queries = self._counter("prefix_cache_queries", "tokens looked for in the prefix cache")
        self._hits = self._counter("prefix_cache_hits", "tokens found there")
        self._by_source = Counter(
            "vllm:prompt_tokens_by_source", "where a prompt's keys came from", (*LABELS, "source"),
            registry=self.registry,
        )  # fmt: skip
        self._ended = Counter(
            "vllm:request_success", "requests that ended", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "to the first token", TTFT_SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "between tokens", TOKEN_SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "of a request", REQUEST_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "until its prefill began", REQUEST_SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "of the prefill", REQUEST_SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "from the first token", REQUEST_SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "of prefill and decode", REQUEST_SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "tokens of a prompt", TOKENS)
        self._answer = self._histogram("request_generation_tokens", "tokens of an answer", TOKENS)

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))

    def follow(self, running: Running) -> _Followed:
        """What follows one call."""
        return _Followed(self, running)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry)
        return made.labels(*self._labels)


class _Followed:
    """Times of one call's tokens, and its sums at the end."""

    def __init__(self, metrics: Metrics, running: Running) -> None:
        self._metrics, self._running = metrics, running
        self._last: dict[int, float] = {}

    def saw(self, changes: list[Change]) -> None:
        now, metrics = time.perf_counter(), self._metrics
        for change in changes:
            if not change.token_ids:
                continue
            metrics._generated.inc(len(change.token_ids))
            before = self._last.get(change.index)
            if before is None:
                metrics._ttft.observe(now - self._running.started)
            else:
                for _ in change.token_ids:
                    metrics._between.observe((now - before) / len(change.token_ids))
            self._last[change.index] = now

    def ended(self) -> None:
        """Whatever is there now is what became of the call."""
        metrics = self._metrics
        for one in self._running.collectors:
            if one.num_reused is not None:
                prompt, cached = len(one.request.prompt), one.num_reused
                metrics._prompt_tokens.inc(one.num_prefilled)
                metrics._cached_tokens.inc(cached)
                metrics._queries.inc(prompt)
                metrics._hits.inc(cached)
                for source, tokens in (
                    ("local_cache_hit", cached - one.num_restored),
                    ("external_kv_transfer", one.num_restored),
                    ("local_compute", one.num_prefilled - cached),
                ):
                    metrics._by_source.labels(*metrics._labels, source).inc(max(0, tokens))
            if not one.finished:
                metrics._ended.labels(*metrics._labels, "abort").inc()
                continue
            for answer in one.answers:
                metrics._ended.labels(*metrics._labels, answer.finish_reason).inc()
                metrics._answer.observe(len(answer.token_ids))
            metrics._prompt.observe(len(one.request.prompt))
            times = one.metrics
            if times.finished_time is not None:
                metrics._whole.observe(times.finished_time - times.arrival_time)
                if times.first_scheduled_time is not None and times.first_token_time is not None:
                    metrics._queue.observe(max(0.0, times.first_scheduled_time - times.arrival_time))
                    metrics._prefill.observe(times.first_token_time - times.first_scheduled_time)
                    metrics._decode.observe(times.finished_time - times.first_token_time)
                    metrics._inference.observe(times.finished_time - times.first_scheduled_time)


class _State(Collector):
    """What holds at the moment of asking."""

    def __init__(self, engine: EngineThread, labels: tuple[str, str]) -> None:
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterator[Metric]:
        engine, own = self._engine, self._engine.metrics()
        for name, text, value in (
            ("num_requests_running", "requests that the engine works on", engine.num_running),
            ("num_requests_waiting", "requests that wait", engine.num_waiting),
            ("kv_cache_usage_perc", "share of the KV cache that requests hold", own.pages_held / max(1, own.pages)),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            gauge.add_metric(self._labels, float(value))
            yield gauge
        for name, text, value in (
            ("vllm:external_prefix_cache_queries", "tokens looked for in the prefix cache", own.prefix_queried_tokens),
            ("vllm:external_prefix_cache_hits", "tokens that came from the prefix store", own.store_tokens),
            ("prefix_store_hits", "requests for which there was something in the prefix store", own.store_hits),
            ("prefix_store_read_bytes", "bytes of a rank that came from it", own.store_read_bytes),
            ("prefix_store_read_seconds", "that requests waited for them", own.store_read_seconds),
            ("prefix_store_written_bytes", "bytes of a rank that went into it", own.store_written_bytes),
            ("prefix_store_write_seconds", "that this took, in the background", own.store_write_seconds),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, float(value))
            yield counter
