"""Exceptions of bit_tf and hub_export.

    BitTfError
    ├── CheckpointError (ValueError)
    │   ├── CheckpointFormatError     the file is not what it should be
    │   └── CheckpointMismatchError   names, shapes or dtypes differ
    ├── ImageError (ValueError)
    │   ├── ImageDecodeError          not a picture, or a damaged one
    │   ├── ImageTooLargeError        over the limit of pixels or bytes
    │   ├── ImageRangeError           dtype, shape or pixel range not accepted
    │   └── ImageFetchError (OSError) a URL that could not be read
    ├── DownloadError (OSError)       a file could not be fetched whole
    ├── HandleError (ValueError)      no model handle, or nothing there
    ├── ArchiveError (ValueError)     an archive that must not be unpacked
    ├── UnknownNameError (ValueError) no such model, labels, preset, endpoint
    ├── DatasetError (ValueError)     labelled pictures that cannot be used
    ├── TrainingError (RuntimeError)  fine-tuning cannot go on
    ├── ExportError (RuntimeError)    a SavedModel could not be written
    │   └── VerificationError         written, but it does not give its values
    └── MissingExtraError (ImportError)

Every message states the rule, what was received, and the remedy.
"""

import difflib
import importlib
import types
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = [
    "ArchiveError",
    "BitTfError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "DatasetError",
    "DownloadError",
    "ExportError",
    "HandleError",
    "ImageDecodeError",
    "ImageError",
    "ImageFetchError",
    "ImageRangeError",
    "ImageTooLargeError",
    "MissingExtraError",
    "TrainingError",
    "UnknownNameError",
    "VerificationError",
    "brief",
    "import_extra",
    "lookup",
    "near",
]

Row = TypeVar("Row")


class BitTfError(Exception):
    """The base of every exception that these packages raise on purpose."""


class CheckpointError(BitTfError, ValueError):
    """A checkpoint cannot be used."""


class CheckpointFormatError(CheckpointError):
    """A file is damaged, truncated, or not in the format it claims."""


class CheckpointMismatchError(CheckpointError):
    """Names, shapes or dtypes differ from those of the model.

    The message lists every difference, marked − (missing) and + (extra).
    """


class ImageError(BitTfError, ValueError):
    """An image cannot be used."""


class ImageDecodeError(ImageError):
    """The bytes are not a picture that can be decoded whole."""


class ImageTooLargeError(ImageError):
    """The picture exceeds the limit of pixels or of bytes."""


class ImageRangeError(ImageError):
    """The array's dtype, shape or pixel range is not one that is accepted."""


class ImageFetchError(ImageError, OSError):
    """A URL could not be read, or must not be.

    Attributes:
      status: the HTTP status that the server answered, if it did.
      retry_after: seconds for which the server asks to be left alone.
      transient: whether the connection failed, so that the same request may
        succeed later.
    """

    def __init__(
        self,
        *args: object,
        status: int | None = None,
        retry_after: float | None = None,
        transient: bool = False,
    ):
        super().__init__(*args)
        self.status = status
        self.retry_after = retry_after
        self.transient = transient


class DownloadError(BitTfError, OSError):
    """A file could not be fetched whole, or is not what was fetched before."""


class HandleError(BitTfError, ValueError):
    """A model handle is malformed, or no model is found there."""


class ArchiveError(BitTfError, ValueError):
    """An archive is damaged, hostile, or over its limits."""


class UnknownNameError(BitTfError, ValueError):
    """No model, preset, label set or endpoint has this name."""


class DatasetError(BitTfError, ValueError):
    """A dataset of labelled pictures is malformed, or not what was asked."""


class TrainingError(BitTfError, RuntimeError):
    """Fine-tuning cannot go on: memory, a loss of NaN, a lost worker."""


class ExportError(BitTfError, RuntimeError):
    """A SavedModel could not be written."""


class VerificationError(ExportError):
    """A SavedModel does not give the values recorded when it was made."""


class MissingExtraError(BitTfError, ImportError):
    """An optional package is needed and is not installed."""


def brief(value: object) -> str:
    """A value as a message shows it: its repr, cut short."""
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:80]}…"


def lookup(table: Mapping[str, Row], name: object, what: str) -> Row:
    """The row of that name.

    Args:
      table: name → row.
      name: what somebody wrote.
      what: the kind of rows, in the plural, such as "Presets".

    Raises:
      UnknownNameError: there is none; the message lists the names, or where
        they are many the nearest.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    names = " or ".join(map(repr, near(table, name)))
    hint = f" Did you mean {names}?" if names else ""
    rule = f"{what} are {', '.join(map(repr, table))}."
    if len(table) > 20:
        rule = f"{what} have {len(table)} names."
    raise UnknownNameError(f"{rule} Received: {name!r}.{hint}")


def near(names: Iterable[str], name: object) -> list[str]:
    """Up to three names that somebody may have meant, the nearest first."""
    by_case = {text.lower(): text for text in names}
    found = difflib.get_close_matches(str(name).lower(), by_case, 3, 0.7)
    return [by_case[text] for text in found]


def import_extra(module: str, extra: str) -> types.ModuleType:
    """Imports an optional module, or names the extra that installs it.

    Args:
      module: the module to import, such as "pyarrow.parquet".
      extra: the extra of bit-tf that brings it.

    Raises:
      MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"This needs the optional package {module.split('.')[0]!r}, which "
            f"could not be imported ({error}). Install it with: "
            f"pip install 'bit-tf[{extra}]'"
        ) from error
