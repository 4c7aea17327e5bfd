"""Logging of web, relay, consumers, gunicorn and Django: one line format, one way out.

`monitoring.log_lines` says what is in a line, `monitoring.redaction` what is not, `monitoring.log_output` how it gets
out whole.
"""

import logging
import logging.config
import os
import sys
import threading
from types import TracebackType
from typing import Any, Literal, TextIO

from monitoring.conf import monitoring_settings
from monitoring.log_lines import JsonLineFormatter, TextLineFormatter
from monitoring.log_output import Output, output_to

__all__ = ["ConsoleHandler", "JsonLineFormatter", "TextLineFormatter", "configure_logging", "log_to"]

logger = logging.getLogger(__name__)

StreamName = Literal["stdout", "stderr"]
_stream_name: StreamName = "stderr"


class ConsoleHandler(logging.Handler):
    """Writes to what is stdout or stderr at that moment: JSON, or text in a terminal, as LOG_FORMAT says.

    A line that cannot be made or written raises nothing and fails nobody; how many were lost is logged as soon as one
    can be written again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._target = _Target(None)

    def handle(self, record: logging.LogRecord) -> bool:
        # Not Handler's, which holds a lock while the line is made. Output has its own.
        wanted = bool(self.filter(record))
        if wanted:
            self.emit(record)
        return wanted

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stdout if _stream_name == "stdout" else sys.stderr
            target = self._target
            if stream is not target.stream:
                target = self._target = _Target(stream)
            if target.output is not None and target.output.lost:
                self._tell_lost(target, target.output)
            target.write((self.formatter or target.formatter).format(record) + "\n")
        except Exception:  # noqa: S110 there is nowhere left to say it
            pass

    def _tell_lost(self, target: "_Target", output: Output) -> None:
        lost, output.lost = output.lost, 0
        record = logger.makeRecord(
            logger.name, logging.ERROR, __file__, 0, "log lines lost", (), None, extra={"lines": lost}
        )
        target.write((self.formatter or target.formatter).format(record) + "\n")
        if output.lost:
            output.lost = lost


class _Target:
    """Where lines go, and in which format."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.output: Output | None = None
        in_terminal = False
        try:
            if stream is not None:
                self.output = output_to(stream.fileno())
                in_terminal = stream.isatty()
        except (AttributeError, OSError, ValueError):
            pass  # no descriptor behind it: a test's, a notebook's
        log_format = monitoring_settings().log_format if stream is not None else "json"
        self.formatter: logging.Formatter
        if log_format == "text" or (log_format == "auto" and in_terminal):
            in_colour = in_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
            self.formatter = TextLineFormatter(in_colour=in_colour)
        else:
            self.formatter = JsonLineFormatter()

    def write(self, line: str) -> None:
        if self.output is not None:
            self.output.write(line.encode(errors="backslashreplace"))
        elif self.stream is not None:
            self.stream.write(line)
            self.stream.flush()


def log_to(stream_name: StreamName) -> StreamName:
    """Choose where log lines go and return where they went: servers take stdout.

    Until then it is stderr, because the stdout of other commands carries their result.
    """
    global _stream_name
    previous, _stream_name = _stream_name, stream_name
    return previous


def configure_logging() -> None:
    """Give every logger of the process the line format and level of the MONITORING setting.

    So are warnings, and exceptions that nobody caught: of threads, and of servers (`log_to("stdout")`) also those
    that end the process. A command shows its traceback as Python does.
    """
    config = monitoring_settings()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"console": {"()": ConsoleHandler}},
            "root": {"level": config.log_level, "handlers": ["console"]},
            "loggers": {
                # Refused requests are in the access log; only failures need a line with a traceback.
                "django.request": {"level": "ERROR"},
                "django.security.DisallowedHost": {"level": "CRITICAL"},
                "django.server": {"level": "WARNING"},
                "gunicorn.error": {"level": config.log_level, "handlers": [], "propagate": True},
                "asyncio": {"level": "WARNING"},
                "opentelemetry": {"level": "WARNING"},
            },
        }
    )
    logging.captureWarnings(True)
    # Not over the hook of anybody else, who has a reason for it.
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _uncaught_in_thread


_ALREADY_LOGGED = "_monitoring_logged"


def log_end(error: BaseException) -> None:
    """Log the exception that ends this server; it is not shown again when it reaches the top."""
    logger.critical("ended by an exception", exc_info=error)
    setattr(error, _ALREADY_LOGGED, True)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if getattr(error, _ALREADY_LOGGED, False):
        return
    if _stream_name == "stdout" and issubclass(kind, Exception):
        logger.critical("ended by an exception", exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)


def _uncaught_in_thread(args: Any) -> None:
    if args.exc_type is not SystemExit:  # by which threads end themselves
        error = args.exc_value or args.exc_type()
        name = args.thread.name if args.thread is not None else ""
        logger.error("thread ended by an exception", exc_info=error, extra={"thread_name": name})
