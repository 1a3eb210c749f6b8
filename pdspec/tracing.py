"""OpenTelemetry spans of a request: queue → prefill → transfer → first token → decode.

Off unless ``traces`` names an exporter; then opentelemetry-sdk must be there. Ids come from the request's id, so that
every role's spans join one trace without a header of their own: trace = the first 16 bytes of SHA-256(request id), the
router's span = the 8 bytes after them. Spans are made when a phase is over, from times that are taken anyway.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from typing import Any

from pdspec.errors import ConfigError

_INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp"


class Tracer:
    """Spans of one process. Times are ``time.perf_counter`` seconds; spans that end before they begin are left out."""

    def __init__(self, exporter: Any, role: str) -> None:
        sdk, resources = _load("opentelemetry.sdk.trace"), _load("opentelemetry.sdk.resources")
        export = _load("opentelemetry.sdk.trace.export")
        resource = resources.Resource.create({"service.name": f"pdspec-{role}"})
        self._ids = _ids_class()()
        self._provider = sdk.TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pdspec")
        self._trace = _load("opentelemetry.trace")

    def span(self, name: str, request_id: str, began: float, ended: float, **attributes: Any) -> None:
        """A phase below the router's span."""
        if ended < began:
            return
        self._export(name, self._parent(request_id), began, ended, {"request_id": request_id, **attributes})

    def root(
        self, name: str, request_id: str, began: float, ended: float, *, error: str = "", **attributes: Any
    ) -> None:
        """The whole request, as the router sees it; ``error`` marks it as failed."""
        self._ids.next = _ids_of(request_id)
        try:
            shown = {"request_id": request_id, **attributes, **({"error": error} if error else {})}
            self._export(name, None, began, ended, shown)
        finally:
            self._ids.next = None

    def flush(self) -> None:
        """Send what waits."""
        self._provider.force_flush()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _parent(self, request_id: str) -> Any:
        trace_id, span_id = _ids_of(request_id)
        flags = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED)
        context = self._trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(context))

    def _export(self, name: str, context: Any, began: float, ended: float, attributes: dict[str, Any]) -> None:
        offset = time.time_ns() - int(1e9 * time.perf_counter())
        start = offset + int(1e9 * began)
        context = context or _load("opentelemetry.context").Context()
        shown = {key: value for key, value in attributes.items() if value != ""}
        span = self._tracer.start_span(name, context=context, start_time=start, attributes=shown)
        if attributes.get("error"):
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, attributes["error"]))
        span.end(end_time=offset + int(1e9 * ended))


def tracer_of(traces: str, role: str) -> Tracer | None:
    """None for an empty name. Raises ConfigError for an exporter that is not there."""
    return Tracer(_exporter(traces), role) if traces else None


def _exporter(traces: str) -> Any:
    if traces == "console":
        import sys

        return _load("opentelemetry.sdk.trace.export").ConsoleSpanExporter(out=sys.stderr)
    if traces == "otlp":  # OTEL_EXPORTER_OTLP_ENDPOINT and its kin say where to
        return _load("opentelemetry.exporter.otlp.proto.grpc.trace_exporter").OTLPSpanExporter()
    module, colon, name = traces.partition(":")
    if not colon:
        raise ConfigError(f"no exporter {traces!r}", field="traces", remedy="otlp, console, or MODULE:CLASS")
    found = getattr(_load(module), name, None)
    if found is None:
        raise ConfigError(f"{module} has no {name}", field="traces", remedy="name a class of a span exporter")
    return found()


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed", field="traces", remedy=_INSTALL) from error


def _ids_of(request_id: str) -> tuple[int, int]:
    digest = hashlib.sha256(request_id.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:16], "big") or 1, int.from_bytes(digest[16:24], "big") or 1


def _ids_class() -> type:
    base: Any = _load("opentelemetry.sdk.trace.id_generator").RandomIdGenerator

    class Ids(base):
        """Random ids, but for a root span whose ids are ``next``."""

        next: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            return self.next[0] if self.next else super().generate_trace_id()

        def generate_span_id(self) -> int:
            return self.next[1] if self.next else super().generate_span_id()

    return Ids
