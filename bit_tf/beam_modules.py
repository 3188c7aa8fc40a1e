"""Apache Beam (extra "beam"), imported without its notes."""

import logging

from bit_tf import errors

__all__ = [
    "Metrics",
    "MetricsFilter",
    "beam",
    "filesystem",
    "filesystems",
    "inference",
    "pipeline_options",
]


class _Unused(logging.Filter):
    """Keeps away what Beam says of parts of it that are not used here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(
            ("apitools not found", "Resource module is not available")
        )


logging.getLogger().addFilter(_Unused())
errors.import_extra("apache_beam", "beam")

import apache_beam as beam  # noqa: E402
from apache_beam.io import filesystem, filesystems  # noqa: E402
from apache_beam.metrics import Metrics, MetricsFilter  # noqa: E402
from apache_beam.ml.inference import base as inference  # noqa: E402
from apache_beam.options import pipeline_options  # noqa: E402
