"""What the spans of all sources have in common: how a failure is said."""

from opentelemetry.trace import Span, StatusCode


def mark_failed(span: Span, error: BaseException | str) -> None:
    """Set the span's status and its error.type: the exception's full name, or the word given.

    Not the error's text, nor a traceback: they quote what was asked and answered (OpenTelemetry's conventions for
    recording errors, with less in them).
    """
    span.set_status(StatusCode.ERROR)
    span.set_attribute("error.type", error if isinstance(error, str) else error_type(error))


def error_type(error: BaseException) -> str:
    """Return the full name of the exception's class, without `builtins`."""
    module, name = type(error).__module__, type(error).__qualname__
    return name if module == "builtins" else f"{module}.{name}"
