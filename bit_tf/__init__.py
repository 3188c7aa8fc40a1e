"""Big Transfer (BiT) for TensorFlow and Keras 3.

Importing this package loads neither TensorFlow, Keras nor NumPy; each name is
imported where it is first used.
"""

import importlib

__version__ = "0.1.0"

# Name: the module that defines it.
_EXPORTS = {
    "list_models": "bit_tf.variants",
    "create_model": "bit_tf.models",
    "load_model": "bit_tf.models",
    "endpoints": "bit_tf.models",
    "decode_predictions": "bit_tf.labels",
    "BitMedium2Vec": "bit_tf.embed",
    "BitSmall2Vec": "bit_tf.embed",
}
_MODULES = (
    "checkpoints",
    "errors",
    "hub",
    "images",
    "labels",
    "layers",
    "models",
    "variants",
)

__all__ = [*_EXPORTS, *_MODULES]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"bit_tf.{name}")
    raise AttributeError(f"module 'bit_tf' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
