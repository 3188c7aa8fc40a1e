"""The container of Keras' weights: HDF5, of which only plain arrays are read.

HDF5 can name other files (external links, external storage, virtual
datasets), other places (soft links, references) and code (filters that are
plug-ins). None of it is followed: a file that holds such a thing is refused,
by the path of the thing. Which arrays are whose is the business of the formats
beside this file.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout

__all__ = ["Source", "can_open", "datasets", "is_hdf5", "texts"]

# A file's path, or what opens the file for reading, anew at each call.
Source = str | os.PathLike[str] | Callable[[], BinaryIO]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_OBJECTS = 100_000
_MAX_DEPTH = 64
_MAX_TEXTS = 1 << 24
_MAX_CHUNK = 1 << 20
_MAX_DEFLATE_RATIO = 1032

# What h5py raises on damaged files, with HDF5's own words.
_HDF5_ERRORS = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
    OverflowError,
    AttributeError,
    NotImplementedError,
    MemoryError,
)


def is_hdf5(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as HDF5 files do; never raises on garbage."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_SIGNATURE)) == _SIGNATURE
    except (OSError, ValueError):
        return False


def can_open(path: str | os.PathLike[str], attribute: str = "") -> bool:
    """Whether a file is HDF5 and its root has an attribute, if one is named.

    Never raises on garbage; False for a damaged file.
    """
    if not is_hdf5(path):
        return False
    try:
        with _opened(path) as file:
            return not attribute or attribute in file.attrs
    except (*_HDF5_ERRORS, errors.BitTfError):
        return False


def datasets(source: Source) -> dict[str, checkpoint.Entry]:
    """Opens every array of a file: reads its description, not its values.

    Args:
      source: the file.

    Returns:
      path of the dataset, without the leading slash → entry as stored, in the
      order of the file's groups. A load opens the file again and reads that
      dataset alone. Two opaque bytes that Keras marked as bfloat16 are that.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is not HDF5, is damaged or cut short, or
        holds what is not read: links to other places, data outside the file
        or computed from others, types that are not numbers, filters other
        than gzip, shuffle and Fletcher-32, arrays that were never written
        whole, or that cannot inflate to the size they claim.
    """
    found = {}
    with _opened(source) as file:
        for path, node in _walk(file):
            if _is_dataset(node):
                shape, dtype = _described(file, path, node)
                found[path] = checkpoint.Entry(
                    shape,
                    dtype,
                    functools.partial(_load, source, path, shape, dtype),
                    path,
                )
    return found


def texts(source: Source, attribute: str) -> dict[str, tuple[str, ...]]:
    """Reads an attribute that lists names, such as `weight_names`.

    Args:
      source: the file.
      attribute: its name.

    Returns:
      path of the group, "" for the root → the names, for each group that has
      the attribute. An empty array of any type is no names.

    Raises:
      FileNotFoundError, CheckpointFormatError: as `datasets`, or the attribute
        is not a list of UTF-8 texts.
    """
    found = {}
    with _opened(source) as file:
        for path, node in [("", file), *_walk(file)]:
            if not _is_dataset(node) and attribute in node.attrs:
                found[path] = _texts(path, node, attribute)
    return found


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The file, open; HDF5's own errors become CheckpointFormatError."""
    import h5py

    with contextlib.ExitStack() as stack:
        if callable(source):
            shown = "the HDF5 file"
            target: Any = stack.enter_context(contextlib.closing(source()))
        else:
            shown = os.fspath(source)
            checkpoint.require_file(Path(source))
            target = os.fspath(source)
            if not is_hdf5(source):
                raise errors.CheckpointFormatError(
                    f"{shown}: an HDF5 file begins with its signature. "
                    f"Received: {checkpoint.begins_like(source)}. "
                    f"{checkpoint.REMEDY}"
                )
        try:
            file = stack.enter_context(h5py.File(target, "r"))
        except _HDF5_ERRORS as error:
            raise errors.CheckpointFormatError(
                f"{shown}: HDF5 cannot open it: it is truncated or damaged. "
                f"Received: {_said(error)}. {checkpoint.REMEDY}"
            ) from error
        try:
            yield file
        except errors.CheckpointFormatError as error:
            raise errors.CheckpointFormatError(
                f"{shown}: {error} {checkpoint.REMEDY}"
            ) from error
        except _HDF5_ERRORS as error:
            raise errors.CheckpointFormatError(
                f"{shown}: HDF5 cannot read it: it is damaged. Received: "
                f"{_said(error)}. {checkpoint.REMEDY}"
            ) from error


def _said(error: BaseException) -> str:
    return layout.printable(" ".join(str(error).split())[:300])


def _is_dataset(node: Any) -> bool:
    import h5py

    return isinstance(node, h5py.Dataset)


def _walk(file: Any) -> Iterator[tuple[str, Any]]:
    """(path, group or dataset) of all that is in the file, depth first."""
    import h5py

    seen = {h5py.h5o.get_info(file.id).addr}
    pending = [iter([(name, file, name) for name in file])]
    while pending:
        step = next(pending[-1], None)
        if step is None:
            pending.pop()
            continue
        path, group, name = step
        node = _child(group, name, path)
        address = h5py.h5o.get_info(node.id).addr
        if address in seen:
            raise _refused(path, "an object has one name", "a second name")
        seen.add(address)
        if len(seen) > _MAX_OBJECTS or len(pending) > _MAX_DEPTH:
            raise _refused(
                path,
                f"a file holds up to {_MAX_OBJECTS} objects, nested up to "
                f"{_MAX_DEPTH} deep",
                "more",
            )
        yield path, node
        if not _is_dataset(node):
            pending.append(
                iter([(f"{path}/{inner}", node, inner) for inner in node])
            )


def _child(group: Any, name: str, path: str) -> Any:
    """What a hard link leads to; other links are not followed."""
    import h5py

    try:
        link = group.get(name, getlink=True)
        node = group[name] if isinstance(link, h5py.HardLink) else None
    except _HDF5_ERRORS as error:
        raise _refused(path, "HDF5 must understand it", _said(error)) from error
    if isinstance(link, h5py.ExternalLink):
        target = layout.printable(os.fsdecode(link.filename))
        raise _refused(
            path, "links are not followed", f"an external link to {target}"
        )
    if node is None:
        raise _refused(path, "links are not followed", "a soft link")
    if not isinstance(node, (h5py.Group, h5py.Dataset)):
        raise _refused(path, "a file holds groups and arrays", "a named type")
    return node


def _refused(path: str, rule: str, received: str) -> Exception:
    return errors.CheckpointFormatError(
        f"{layout.printable(path)} is refused: {rule}. Received: {received}."
    )


def _described(
    file: Any, path: str, dataset: Any
) -> tuple[tuple[int, ...], np.dtype]:
    """Checks a dataset before anything of it is read: its shape and dtype.

    Raises:
      CheckpointFormatError: with the path, without the file.
    """
    from h5py import h5d

    try:
        # The shape of a virtual dataset is that of the files it opens.
        plan = dataset.id.get_create_plist()
        if plan.get_layout() == h5d.VIRTUAL:
            raise _refused(
                path, "data lie in the file itself", "a virtual dataset"
            )
        if plan.get_external_count():
            raise _refused(
                path, "data lie in the file itself", "external storage"
            )
        shape, dtype = dataset.shape, _dtype(path, dataset)
        if shape is None:
            raise _refused(path, "an array has a shape", "a null dataspace")
        length = file.id.get_filesize()
        _check_storage(path, dataset, plan, shape, dtype, length)
    except errors.CheckpointFormatError:
        raise
    except _HDF5_ERRORS as error:
        raise _refused(path, "HDF5 must understand it", _said(error)) from error
    return shape, dtype


def _dtype(path: str, dataset: Any) -> np.dtype:
    dtype = dataset.dtype
    opaque = dtype.kind == "V" and dtype.names is None and dtype.itemsize == 2
    if opaque and dataset.attrs.get("dtype") in ("bfloat16", b"bfloat16"):
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if dtype.kind not in "biuf" or dtype.subdtype:
        raise _refused(
            path,
            "arrays are of numbers; objects, references, texts and records "
            "are not opened",
            f"dtype {dtype}",
        )
    return dtype


def _check_storage(
    path: str,
    dataset: Any,
    plan: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    length: int,
) -> None:
    """Compares the size that a dataset claims with the bytes that it has."""
    from h5py import h5z

    nbytes = math.prod(shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    chunks = dataset.chunks
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    known = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}
    if not known.issuperset(filters) or len(set(filters)) < len(filters):
        raise _refused(
            path,
            "filters are gzip (1), shuffle (2) and Fletcher-32 (3), each once",
            f"filters {filters}",
        )
    received = f"{nbytes} bytes for shape {shape}, of which {stored} are stored"
    if stored > length:
        raise _refused(path, f"data lie in the file's {length} bytes", received)
    if chunks is None:
        if stored != nbytes:
            raise _refused(path, "an array is stored whole", received)
        offset = dataset.id.get_offset()
        if offset is not None and offset + nbytes > length:
            raise _refused(
                path,
                f"data lie in the file's {length} bytes",
                f"{nbytes} bytes at byte {offset}",
            )
        return
    if not nbytes:
        return
    count = math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True))
    whole = count * math.prod(chunks) * dtype.itemsize
    if dataset.id.get_num_chunks() != count:
        raise _refused(
            path,
            f"an array is stored whole, in {count} chunks",
            f"{dataset.id.get_num_chunks()} of them; {received}",
        )
    if whole > 2 * nbytes + _MAX_CHUNK * count:
        raise _refused(
            path, "chunks are not much larger than their array", received
        )
    if stored * (_MAX_DEFLATE_RATIO if filters else 1) < whole:
        raise _refused(
            path, f"chunks inflate at most {_MAX_DEFLATE_RATIO}fold", received
        )
    # Data that do not compress grow by a little.
    if stored > whole + whole // 100 + 1024 * count:
        raise _refused(path, "chunks are not larger than their data", received)


def _texts(path: str, group: Any, attribute: str) -> tuple[str, ...]:
    import h5py

    stored = group.attrs.get_id(attribute)
    shape, dtype = stored.shape, stored.dtype
    if shape is not None and math.prod(shape) == 0:
        return ()
    size = dtype.itemsize * math.prod(shape or ())
    if (
        shape is None
        or len(shape) != 1
        or size > _MAX_TEXTS
        or h5py.check_string_dtype(dtype) is None
    ):
        raise _refused(
            f"{path}@{attribute}",
            "it is a list of names",
            f"dtype {dtype} of shape {shape}",
        )
    return tuple(
        item.decode() if isinstance(item, bytes) else str(item)
        for item in group.attrs[attribute]
    )


def _load(
    source: Source, path: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    with _opened(source) as file:
        node, walked = file, ""
        for name in path.split("/"):
            walked = f"{walked}/{name}".lstrip("/")
            node = _child(node, name, walked)
        if not _is_dataset(node) or _described(file, path, node) != (
            shape,
            dtype,
        ):
            raise errors.CheckpointFormatError(
                f"{layout.printable(path)} is not what it was when the file "
                "was opened."
            )
        try:
            array = np.asarray(node[()])
        except _HDF5_ERRORS as error:
            raise errors.CheckpointFormatError(
                f"{layout.printable(path)} cannot be read. Received: "
                f"{_said(error)}."
            ) from error
    return array.view(dtype) if array.dtype.kind == "V" else array
