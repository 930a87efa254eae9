"""Logs as JSON lines on stderr, without anything that could name a patient.

Standard-library records (torch's) go the same way, without the stacks that come with them: those end in the text of
foreign exceptions, and that text holds paths and keys.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(**context: str) -> None:
    """Set up logging for this process; `context` (job, attempt …) goes into every line, of whichever thread."""

    def in_context(logger: Any, name: str, event: Any) -> Any:
        return {**context, **event}

    shared: list[Any] = [
        in_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _drop_stack],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def adopt_torch() -> None:
    """Take torch's loggers from the handlers that torch gave them. Call it once torch is loaded."""
    import torch  # noqa: F401 - its import is what installs the handlers

    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "torch"]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # It warns about every heartbeat that an outage of the store holds up; the outage itself is logged by us.
    logging.getLogger("torch.distributed.elastic.rendezvous.dynamic_rendezvous").setLevel(logging.ERROR)


def _drop_stack(logger: Any, name: str, event: Any) -> Any:
    """Keep the class of an exception and drop its text and stack."""
    failure = event.pop("exc_info", None)
    if isinstance(failure, tuple) and failure[0] is not None:
        event["exception"] = failure[0].__name__
    return event
