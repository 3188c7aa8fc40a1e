"""Models by handle: find, load, and make fast for inference."""

import contextlib
import importlib
import os
import pathlib
import re
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from bit_tf import (
    addresses,
    archive,
    errors,
    handles,
    hub_cache,
    hub_fetch,
    hub_install,
    integrity,
)
from bit_tf.addresses import as_address
from bit_tf.model_hash import content_hash
from bit_tf.relocation import relocated

__all__ = [
    "KerasLayer",  # noqa: F822
    "as_address",
    "content_hash",
    "described_files",
    "fetch",
    "load",
    "picture_function",
    "relocated",
    "resolve",
]

# How often another program's lock is looked at; seconds.
_POLL = 1.0
# The longest wait for a download in which nothing arrives, by this process's
# own clock: its lock, by the file system's, has long ended; seconds.
_STUCK = hub_cache.IDLE + 120.0
# The longest wait for a repository's newest version where the cache has one;
# seconds.
_PATIENCE = 5.0


def resolve(
    handle: str | os.PathLike,
    *,
    offline: bool | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> str:
    """The local directory of a model, downloaded or unpacked if necessary.

    In this order it is taken from this disk, where the folder of a version in
    a repository means the model in it; from the cache of tensorflow_hub,
    under any spelling of its handle, if it is whole there; and from what
    `fetch` tries. An address without a version means the newest one that its
    repository, a mirror or, where they cannot be reached, the cache has.

    Args:
      handle: a directory, a local .tar.gz archive, or any handle that
        tensorflow_hub resolves, such as
        "https://tfhub.dev/google/bit/m-r50x1/1", or the same without
        "https://tfhub.dev/".
      offline: whether only this disk is used; $BIT_TF_HUB_OFFLINE unless
        given.
      cache: the cache; $TFHUB_CACHE_DIR unless given.

    Raises:
      HandleError: there is nothing at the handle, or it could not be fetched;
        the message lists all that was tried.
      ArchiveError: the local archive is damaged or hostile.
    """
    text = os.fsdecode(handle)
    if text.startswith("file://"):
        text = addresses.local_path(text)
    if os.path.isdir(text):
        return _model_folder(text)
    if os.path.isfile(text):
        if not archive.is_archive(text):
            raise errors.HandleError(
                f"{addresses.KINDS} Received: the file {text!r}. A checkpoint "
                "becomes a model directory with: hub-export convert CHECKPOINT "
                "DIRECTORY"
            )
        return _unpacked(text, hub_cache.directory(cache))
    address = as_address(text)
    offline = _is_offline(offline)
    if not _is_web(address):
        # Such as gs://, which is read in place.
        return _by_tensorflow_hub(address, offline)
    root = hub_cache.directory(cache)
    if not hub_fetch.is_versioned(address):
        address = _newest(address, offline, root) or address
    found = hub_cache.find(address, root) or _awaited(address, root)
    if found is not None:
        return str(found.path)
    return fetch(address, offline=offline, cache=root)


def fetch(
    handle: str,
    *,
    offline: bool | None = None,
    cache: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> str:
    """The local directory of a model that the cache does not have.

    Tried are, in this order, the mirrors in $BIT_TF_HUB_MIRRORS, which are
    addresses or directories of repositories, for handles of tfhub.dev and
    Kaggle; the handle itself; and its twin on Kaggle or tfhub.dev. Size and
    SHA-256 are compared with the repository's entry, where there is one. The
    handle itself is left to tensorflow_hub if TFHUB_MODEL_LOAD_FORMAT is
    UNCOMPRESSED: then it is read from where it lies.

    Args:
      handle: an http or https address of a model.
      offline: whether only directories are tried; $BIT_TF_HUB_OFFLINE unless
        given.
      cache: where it is kept, under this handle; $TFHUB_CACHE_DIR unless
        given.
      replace: whether it is put there though the cache seems to have it; what
        a mirror's directory has is copied then, not used in place.

    Raises:
      HandleError: it could not be fetched; the message lists all that was
        tried.
    """
    handle = as_address(handle)
    in_place = (
        os.environ.get("TFHUB_MODEL_LOAD_FORMAT") == "UNCOMPRESSED"
        and not replace
    )
    root = hub_cache.directory(cache)
    offline = _is_offline(offline)
    tried = [f"the cache {root}: {_in_cache(handle, root)}"]
    last: Exception | None = None
    for name, source in _sources(handle):
        is_web = isinstance(source, str)
        if is_web and offline:
            tried.append(f"{name}: not asked, in offline mode")
            continue
        try:
            if isinstance(source, pathlib.Path):
                return _from_repository(handle, source, root, replace)
            if in_place and source == handle:
                return _by_tensorflow_hub(handle, offline)
            path = hub_fetch.fetch(
                handle, root=root, address=source, replace=replace
            )
            return str(path)
        except (errors.BitTfError, OSError) as error:
            tried.append(f"{name}: {error}")
            last = error
    listed = "\n".join(f"- {line}" for line in tried)
    raise errors.HandleError(
        f"No model could be fetched from {hub_cache.shown(handle)!r}. "
        f"Received, from all that was tried:\n{listed}\nCheck the address and "
        "the network; or pass a directory or .tar.gz archive; or name "
        "repositories that have it in $BIT_TF_HUB_MIRRORS; or put it into the "
        "cache with: hub-export cache seed 'HANDLE=SOURCE'"
    ) from last


def described_files(handle: str) -> dict[str, handles.File]:
    """What a model is made of, as mirrors that are directories tell.

    Args:
      handle: an http or https address of one version of a model.

    Returns:
      Path → file; {} if none of them has its entry.
    """
    for _, source in _sources(handle):
        if isinstance(source, pathlib.Path):
            with contextlib.suppress(errors.BitTfError, OSError):
                published = _released(source)
                return {file.path: file for file in published.files}
    return {}


def _model_folder(directory: str) -> str:
    """The model in the folder of a version; any other directory itself."""
    model = os.path.join(directory, handles.MODEL_FOLDER)
    described = os.path.join(directory, handles.ENTRY_FILE)
    return (
        model
        if os.path.isfile(described) and os.path.isdir(model)
        else directory
    )


def _is_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    value = os.environ.get("BIT_TF_HUB_OFFLINE", "").strip().lower()
    return value not in ("", "0", "false", "no", "off")


def _is_web(address: str) -> bool:
    return bool(re.match("https?://", address, re.IGNORECASE))


def _by_tensorflow_hub(address: str, offline: bool) -> str:
    if offline:
        raise errors.HandleError(
            "In offline mode a model is on this disk. Received: "
            f"{hub_cache.shown(address)!r}, which tensorflow_hub reads from "
            "afar. Unset BIT_TF_HUB_OFFLINE, or copy it here and pass the "
            "directory."
        )
    import tensorflow as tf
    import tensorflow_hub

    try:
        return tensorflow_hub.resolve(address)
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise errors.HandleError(
            f"No model could be fetched from {hub_cache.shown(address)!r}: "
            f"{error}. Check the address and the network, or pass a directory "
            "or .tar.gz archive."
        ) from error


def _newest(address: str, offline: bool, root: pathlib.Path) -> str | None:
    """The address of the newest version; None if nothing tells it."""
    known = handles.known(address)
    base = address if known is None else f"{handles.TFHUB}{known}"
    cached = _newest_in_cache(base, root)
    has_one = cached is not None or hub_cache.find(address, root) is not None
    timeout = {"timeout": _PATIENCE} if has_one else {}
    for _, source in _sources(address):
        try:
            if isinstance(source, pathlib.Path):
                return _with_version(base, _released(source).handle.version)
            newest = None if offline else hub_fetch.newest(source, **timeout)
        except (errors.BitTfError, OSError):
            # Who is asked for the model next says so too.
            continue
        if newest is not None:
            return _with_version(base, newest)
    return None if cached is None else _with_version(base, cached)


def _with_version(address: str, version: int | None) -> str:
    """The address of one version of a model."""
    parts = urllib.parse.urlsplit(address)
    path = f"{parts.path.rstrip('/')}/{version}"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _newest_in_cache(address: str, root: pathlib.Path) -> int | None:
    """The newest version of a model that the cache has whole."""
    found = []
    try:
        entries = hub_cache.entries(root)
    except OSError:
        return None
    for entry in entries:
        version = (entry.handle or "").rstrip("/").rpartition("/")[2]
        if (
            re.fullmatch("[1-9][0-9]{0,8}", version)
            and _with_version(address, int(version))
            in handles.spellings(entry.handle or "")
            and not hub_cache.damage(entry)
        ):
            found.append(int(version))
    return max(found, default=None)


def _awaited(address: str, root: pathlib.Path) -> hub_cache.Entry | None:
    """The entry that tensorflow_hub is making in another process."""
    from absl import logging

    spellings = [hub_cache.key(text) for text in handles.spellings(address)]
    waited = False
    progress: list[tuple[str, float]] = []
    since = 0.0
    while True:
        running = [hub_cache.Entry(root, name).download for name in spellings]
        living = [lock for lock in running if lock and lock.living]
        arrived = [(lock.task, lock.changed) for lock in living]
        if arrived != progress:
            progress, since = arrived, time.monotonic()
        if not living or time.monotonic() - since > _STUCK:
            return hub_cache.find(address, root) if waited else None
        if not waited:
            logging.warning(
                "Waiting for tensorflow_hub of %s, which downloads %s",
                living[0].holder,
                hub_cache.shown(address),
            )
        waited = True
        time.sleep(_POLL)


def _in_cache(address: str, root: pathlib.Path) -> str:
    """What the cache has of a model that is not whole there."""
    spellings = handles.spellings(address)
    broken = []
    for spelling in spellings:
        entry = hub_cache.Entry(root, hub_cache.key(spelling))
        if entry.exists and (problems := hub_cache.damage(entry)):
            broken.append(f"{entry.key}: {problems[0]}")
    if not broken:
        return f"not there, in any of {len(spellings)} spellings"
    more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"broken there ({broken[0]}){more}"


def _sources(address: str) -> Iterator[tuple[str, str | pathlib.Path]]:
    """(name, web address or version's folder) of all that may have a model."""
    known = handles.known(address)
    for mirror in _mirrors() if known else ():
        if _is_web(mirror):
            addresses.require(mirror, "Each of BIT_TF_HUB_MIRRORS")
            parts = urllib.parse.urlsplit(mirror)
            path = f"{parts.path.rstrip('/')}/{known}"
            found = urllib.parse.urlunsplit(parts._replace(path=path))
            yield f"the mirror {hub_cache.shown(found)}", found
            continue
        if mirror.startswith("file://"):
            mirror = addresses.local_path(mirror)
        folder = pathlib.Path(os.path.expanduser(mirror), str(known))
        yield f"the mirror {folder}", folder
    yield f"the handle {hub_cache.shown(address)}", address
    if known is not None:
        twin = handles.kaggle_twin(known)
        host = urllib.parse.urlsplit(address).hostname or ""
        if host.removeprefix("www.") == "kaggle.com":
            twin = f"{handles.TFHUB}{known}"
        if twin is not None:
            yield f"its twin {twin}", twin


def _mirrors() -> list[str]:
    """Addresses and directories in $BIT_TF_HUB_MIRRORS."""
    text = os.environ.get("BIT_TF_HUB_MIRRORS", "").strip()
    # The path of one directory may have spaces.
    if os.path.isdir(os.path.expanduser(text)):
        return [text]
    return [mirror for mirror in re.split(r"[\s,]+", text) if mirror]


def _released(folder: pathlib.Path) -> handles.Release:
    """The entry in a folder of a repository on this disk.

    Raises:
      HandleError: it is damaged, or there is none.
    """
    try:
        text = (folder / handles.ENTRY_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise errors.HandleError(
            f"a repository has {handles.ENTRY_FILE} of a model in its folder. "
            f"Received: {str(folder)!r} without it."
        ) from None
    return handles.Release.parse(text)


def _from_repository(
    handle: str, folder: pathlib.Path, root: pathlib.Path, replace: bool
) -> str:
    """A model in a repository on this disk: in place, or its archive.

    All bytes are compared with the entry in either case.

    Raises:
      HandleError: the repository does not have it whole.
      ArchiveError: its archive is damaged or hostile.
    """
    published = _released(folder)
    if folder.parts[-len(published.handle.path.split("/")) :] != tuple(
        published.handle.path.split("/")
    ):
        raise errors.HandleError(
            f"{folder / handles.ENTRY_FILE} describes what is in its folder. "
            f"Received: an entry of {published.handle}."
        )
    expected = {file.path: file for file in published.files}
    model = folder / handles.MODEL_FOLDER
    problems = integrity.compared(model, expected)
    packed = pathlib.Path(f"{folder}{handles.ARCHIVE_SUFFIX}")
    if not problems and not replace:
        return str(model)
    source, found = model, None
    if problems:
        if not packed.is_file():
            raise errors.HandleError(
                f"{model} is not whole ({problems[0]}), and there is no "
                f"{packed.name}. Publish it anew."
            )
        source, found = packed, hub_fetch.check_archive(packed, published)
    path = hub_install.install_one(
        hub_cache.key(handle),
        handle,
        source,
        root=root,
        origin=str(source),
        archive=found,
        expected=expected,
        existing="replace" if replace else "keep",
    )
    return str(path)


def _unpacked(path: str, root: pathlib.Path) -> str:
    """The directory of an unpacked archive, under its content's hash."""
    found = hub_fetch.check_archive(path, None)
    entry = hub_cache.Entry(root, f"sha256-{found.sha256}")
    # A temporary folder may have been swept, half of it or all.
    if not entry.exists or hub_cache.damage(entry):
        hub_install.install_one(
            entry.key,
            None,
            path,
            root=root,
            origin=os.path.abspath(path),
            archive=found,
            check=None,
        )
    return str(entry.path)


def load(
    handle: str | os.PathLike,
    *,
    options=None,
    directory: str | None = None,
):
    """The object that a model's SavedModel restores to.

    Args:
      handle: whatever `resolve` takes.
      options: a tf.saved_model.LoadOptions.
      directory: what `resolve` returned for the handle, if it was asked.

    Returns:
      A callable object with `variables`, `trainable_variables`,
      `regularization_losses` and `signatures`.

    Raises:
      HandleError: there is no SavedModel at the handle.
    """
    import tensorflow as tf

    if directory is None:
        directory = resolve(handle)
    try:
        return tf.saved_model.load(directory, options=options)
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise errors.HandleError(
            f"{os.fspath(handle)!r} does not hold a SavedModel that can be "
            f"loaded: {error}"
        ) from error


def picture_function(
    model,
    signature: str,
    output: str,
    handle: str,
    precision: str = "float32",
):
    """A fast function of one SavedModel output, with the weights frozen.

    Args:
      model: from `load`.
      signature: the signature to use where the model has it; else `__call__`.
      output: that signature's output.
      handle: named in errors.
      precision: see frozen_graph.freeze.

    Returns:
      (function, d): float32 [n, h, w, 3] in [0, 1] → float32 [n, d].

    Raises:
      HandleError: the model does not return one vector a picture.
      UnknownNameError: there is no such precision.
    """
    import tensorflow as tf

    from bit_tf import frozen_graph

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
    function = frozen_graph.freeze(concrete, precision)
    width = shape[-1] or function(tf.zeros([1, 64, 64, 3])).shape[-1]
    return function, int(width)


def _takes_training(model) -> bool:
    """Whether a restored `__call__` has an argument `training`."""
    from tensorflow.python.util import tf_inspect

    spec = tf_inspect.getfullargspec(model.__call__)
    return "training" in [*spec.args, *spec.kwonlyargs]


def __getattr__(name: str) -> Any:
    # Keras loads only for who wants the layer.
    if name == "KerasLayer":
        return importlib.import_module("bit_tf.keras_layer").KerasLayer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
