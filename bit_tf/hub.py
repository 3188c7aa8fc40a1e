"""Models by handle: find, load, and make fast for inference."""

import hashlib
import os
import pathlib
import tempfile
import urllib.parse
import urllib.request

import tensorflow as tf

from bit_tf import archive, errors

__all__ = ["freeze", "load", "picture_function", "resolve"]

# A frozen graph is one protocol buffer, which cannot pass 2 GiB; the rest of
# the graph needs a little of that.
FREEZE_LIMIT = 2**31 - 2**24


def resolve(handle: str | os.PathLike) -> str:
    """The local directory of a model, downloaded or unpacked if necessary.

    Args:
      handle: a directory, a local .tar.gz archive, or any handle that
        tensorflow_hub resolves, such as
        "https://tfhub.dev/google/bit/m-r50x1/1". Downloads and unpacked
        archives are kept in $TFHUB_CACHE_DIR.

    Raises:
      HandleError: there is nothing at the handle, or it could not be fetched.
      ArchiveError: the archive is damaged or hostile.
    """
    handle = os.fsdecode(handle)
    if handle.startswith("file://"):
        handle = urllib.request.url2pathname(urllib.parse.urlsplit(handle).path)
    if os.path.isdir(handle):
        return handle
    if os.path.isfile(handle):
        if not archive.is_archive(handle):
            raise errors.HandleError(
                "A model handle is a directory, a .tar.gz archive or a URL. "
                f"Received: the file {handle!r}. A checkpoint becomes a model "
                "directory with: hub-export convert CHECKPOINT DIRECTORY"
            )
        return _unpacked(handle)
    if "://" not in handle:
        raise errors.HandleError(
            "A model handle is a directory, a .tar.gz archive or a URL. "
            f"Received: {handle!r}, and no such path exists."
        )
    import tensorflow_hub

    try:
        return tensorflow_hub.resolve(handle)
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise errors.HandleError(
            f"No model could be fetched from {handle!r}: {error}. Check the "
            "address and the network, or pass a directory or .tar.gz archive."
        ) from error


def _unpacked(path: str) -> str:
    """The directory of an unpacked archive, under its content's hash."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = os.environ.get("TFHUB_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), "tfhub_modules"
    )
    directory = pathlib.Path(cache) / f"sha256-{digest}"
    try:
        # A temporary folder may have been swept, half of it or all.
        if not _holds_model(directory):
            archive.unpack(path, directory, overwrite=True)
    except OSError as error:
        raise errors.HandleError(
            f"{path!r} could not be unpacked into {cache!r}: {error}. Set "
            "TFHUB_CACHE_DIR to a directory with room that can be written."
        ) from error
    return str(directory)


def _holds_model(directory: pathlib.Path) -> bool:
    return (directory / "saved_model.pb").is_file() and (
        (directory / "variables" / "variables.index").is_file()
        or not (directory / "variables").exists()
    )


def load(handle: str | os.PathLike):
    """The object that a model's SavedModel restores to.

    Args:
      handle: whatever `resolve` takes.

    Returns:
      A callable object with `variables`, `trainable_variables`,
      `regularization_losses` and `signatures`.

    Raises:
      HandleError: there is no SavedModel at the handle.
    """
    directory = resolve(handle)
    try:
        return tf.saved_model.load(directory)
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise errors.HandleError(
            f"{os.fspath(handle)!r} does not hold a SavedModel that can be "
            f"loaded: {error}"
        ) from error


def freeze(function):
    """Turns variables into constants, so that work on weights is done once.

    Args:
      function: a tf.types.experimental.ConcreteFunction of one tensor.

    Returns:
      A callable that takes and returns one tensor each; `function` itself
      where the constants would pass TensorFlow's limit of 2 GiB a graph.
    """
    size = sum(
        variable.dtype.size * variable.shape.num_elements()
        for variable in function.variables
    )
    if size > FREEZE_LIMIT:
        return function
    from tensorflow.python.framework import convert_to_constants

    frozen = convert_to_constants.convert_variables_to_constants_v2(function)

    def call(tensor):
        (output,) = frozen(tensor)
        return output

    return call


def picture_function(model, signature: str, output: str, handle: str):
    """A fast function of one SavedModel output, with the weights frozen.

    Args:
      model: from `load`.
      signature: the signature to use where the model has it; else `__call__`.
      output: that signature's output.
      handle: named in errors.

    Returns:
      (function, d): float32 [n, h, w, 3] in [0, 1] → float32 [n, d].

    Raises:
      HandleError: the model does not return one vector a picture.
    """
    signatures = getattr(model, "signatures", {})
    if signature in signatures:
        served = signatures[signature]

        def call(pixels):
            (argument,) = served.structured_input_signature[1]
            return served(**{argument: pixels})[output]
    elif callable(model):
        options = {"training": False} if _takes_training(model) else {}

        def call(pixels):
            return model(pixels, **options)
    else:
        raise errors.HandleError(
            "A model of pictures is callable, or has the signature "
            f"{signature!r}. Received from {handle!r}: neither."
        )
    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    try:
        concrete = tf.function(call, autograph=False).get_concrete_function(
            spec
        )
    except (KeyError, TypeError, ValueError, tf.errors.OpError) as error:
        raise errors.HandleError(
            "A model of pictures takes float32 [n, h, w, 3] alone. Received: "
            f"{handle!r}, which does not: {error}"
        ) from error
    result = concrete.structured_outputs
    shape = getattr(result, "shape", None)
    if shape is None or len(shape) != 2:
        raise errors.HandleError(
            "A model of pictures returns one vector a picture, [n, d]. "
            f"Received from {handle!r}: {result}."
        )
    function = freeze(concrete)
    width = shape[-1] or function(tf.zeros([1, 64, 64, 3])).shape[-1]
    return function, int(width)


def _takes_training(model) -> bool:
    """Whether a restored `__call__` has an argument `training`."""
    from tensorflow.python.util import tf_inspect

    spec = tf_inspect.getfullargspec(model.__call__)
    return "training" in [*spec.args, *spec.kwonlyargs]
