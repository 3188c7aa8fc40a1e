"""Make and publish BiT SavedModels.

Importing this package loads neither TensorFlow, Keras nor NumPy.
"""

import importlib

_EXPORTS = {
    "export": "hub_export.saved_model",
    "convert": "hub_export.saved_model",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hub_export' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
