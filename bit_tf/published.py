"""From what somebody writes to a local path: a path, a name, or an address."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import re
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

from bit_tf import cache_records, cached_download, errors, presets, variants

if TYPE_CHECKING:
    from bit_tf import checkpoints

__all__ = [
    "Located",
    "check",
    "is_file",
    "locate",
    "open_checkpoint",
    "shown",
]

_FILES = (".npz", ".h5", ".safetensors", ".keras", ".pdparams", ".bin", ".pth")
_HF = "hf://"
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SAFETENSORS = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "*.safetensors.index.json",
)


class Located(NamedTuple):
    """Where weights lie, and what they were published as.

    Attributes:
      path: a file, or the directory of a SavedModel or of a Hugging Face
        repository.
      variant: the row of the published name that was asked for, or None.
    """

    path: pathlib.Path
    variant: variants.Variant | None


def locate(source: str | os.PathLike[str]) -> Located:
    """The local path of weights, downloaded if necessary.

    Args:
      source: one of
        an `os.PathLike`, or the path of something that exists;
        a published name of `variants`, with or without ".npz" or ".h5", from
        $BIT_TF_MODELS_URL if that is set, and Google's bucket otherwise;
        "hf://owner/name" or "hf://owner/name@revision", any repository on
        Hugging Face, or on $HF_ENDPOINT;
        the URL of a file, whose suffix is that of a checkpoint;
        any other URL: a TF-Hub handle, from tensorflow_hub's cache, which
        alone is not compared with its first content.

    Raises:
      DownloadError: what was asked for could not be fetched whole, or was
        changed or damaged since; or $BIT_TF_MODELS_URL is no address.
      UnknownNameError: there is no such file, but a published name is near.
      FileNotFoundError: nothing is at the path.
      HandleError: no model could be fetched from a TF-Hub handle.
      MissingExtraError: huggingface_hub is needed and not installed.
    """
    if source == "":
        raise FileNotFoundError(
            errno.ENOENT,
            "A checkpoint is given as a path or a name, such as BiT-M-R50x1. "
            "Received",
            source,
        )
    if not isinstance(source, str) or os.path.exists(source):
        return Located(pathlib.Path(source), None)
    if source.startswith(_HF):
        return Located(_hugging_face(source.removeprefix(_HF), source), None)
    if re.match(r"https?://", source, re.IGNORECASE):
        return Located(_web(source), None)
    row = _row(source)
    if row is None:
        _require(source)
        return Located(pathlib.Path(source), None)
    if row.url is not None:
        suffix = ".h5" if source.endswith(".h5") else ".npz"
        return Located(_bucket(row, suffix), row)
    if row.repository is not None:
        return Located(_hugging_face(row.repository, source), row)
    return Located(_hub(str(row.handle)), row)


def shown(source: str | os.PathLike[str]) -> str:
    """What `locate` takes, as it may be shown and recorded.

    Returns:
      A URL without user, password, query and fragment, or if it is malformed
      without all that follows its scheme; any other source as it is.
    """
    text = os.fspath(source)
    url = re.match(r"(?!hf:)[a-z][a-z\d+.-]*://", text, re.IGNORECASE)
    if not isinstance(source, str) or url is None or os.path.exists(source):
        return text
    try:
        return cached_download.shown(text)
    except errors.DownloadError:
        return f"{url[0]}…"


def check(
    variant: variants.Variant | None,
    blocks: tuple[int, ...],
    stem_width: int,
    num_classes: int,
    path: str | os.PathLike[str],
) -> None:
    """Compares weights with the name that they were published under.

    Two of the published .h5 files hold another architecture than theirs.

    Args:
      variant: what was asked for; None is not compared.
      blocks: the number of units in block1 to block4, as found.
      stem_width: channels of the root convolution, as found.
      num_classes: outputs of the head, as found; 0 if there is none.
      path: where the weights lie.

    Raises:
      CheckpointMismatchError: they are of another architecture or number of
        classes.
    """
    if variant is None:
        return
    found = variants.find_architecture(blocks, stem_width)
    if (
        found == variants.architecture(variant.architecture)
        and num_classes == variant.num_classes
    ):
        return
    name = (
        f"blocks {tuple(blocks)} and a stem of {stem_width}"
        if found is None
        else found.name
    )
    raise errors.CheckpointMismatchError(
        f"{variant.name!r} is {variant.architecture} with "
        f"{variant.num_classes} classes. Received: {name} with {num_classes} "
        f"classes, in {os.fspath(path)}. The file was published under a wrong "
        "name, or is another one; if its content is what you want, pass this "
        "path instead of the name."
    )


def open_checkpoint(
    source: str | os.PathLike[str],
) -> "checkpoints.Checkpoint":
    """Opens what `locate` finds, and compares it with its published name.

    A file of one's own that has a published file's name, and holds another
    architecture, is opened, and its notes say so.

    Args:
      source: whatever `locate` takes.

    Raises:
      CheckpointFormatError: no reader knows the file, or it is damaged.
      CheckpointMismatchError: what was downloaded is not what its name says.
        These two name what to delete in order to download a file again.
      and what `locate` raises.
    """
    from bit_tf import checkpoints

    located = locate(source)
    try:
        found = checkpoints.read(located.path)
        facts = (
            found.blocks,
            found.stem_width,
            found.num_classes,
            located.path,
        )
        check(located.variant, *facts)
    except errors.CheckpointError as error:
        record = cache_records.record_of(located.path)
        if record is None:
            raise
        raise type(error)(
            f"{error}\nTo download the file again, delete both "
            f"{located.path} and {record}."
        ) from error
    if located.variant is not None:
        found.facts = _facts(located.variant, found)
    namesake = _row(located.path.name)
    if located.variant is None and namesake is not None:
        try:
            check(namesake, *facts)
        except errors.CheckpointMismatchError as error:
            found.notes += (str(error),)
    return found


def _facts(
    variant: variants.Variant, found: "checkpoints.Checkpoint"
) -> "checkpoints.Facts":
    """What is known of published weights, where their file does not say it."""
    if found.facts.preset is not None and variant.url is None:
        return found.facts
    # An .npz or .h5 says nothing: its preset was the format's usual one.
    preset = variant.preset and presets.preset(variant.preset)
    return dataclasses.replace(found.facts, preset=preset or None)


def _row(name: str) -> variants.Variant | None:
    try:
        return variants.variant(name)
    except errors.UnknownNameError:
        return None


def _require(source: str) -> None:
    """Raises the error that helps most for what is no file and no name."""
    from bit_tf.checkpoints import checkpoint

    names = [row.name for row in variants.list_models()]
    near = errors.near(names, source.removesuffix(".npz").removesuffix(".h5"))
    if near:
        hint = " or ".join(map(repr, near))
        raise errors.UnknownNameError(
            "Neither a file nor published weights have this name. Received: "
            f"{source!r}. Did you mean {hint}?"
        )
    checkpoint.require_file(pathlib.Path(source))


def _bucket(row: variants.Variant, suffix: str) -> pathlib.Path:
    default = variants.BUCKET.rstrip("/")
    base = _base(os.environ.get("BIT_TF_MODELS_URL") or default)
    folder = "bit_models"
    if base != default:
        folder += f"-{hashlib.sha256(base.encode()).hexdigest()[:8]}"
    name = row.name + suffix
    return cached_download.cached(
        f"{base}/{name}",
        size=row.size if suffix == ".npz" else None,
        directory=cache_records.cache_directory() / folder,
        name=name,
    )


def _base(url: str) -> str:
    """The address of a bucket, without slashes at its end."""
    with contextlib.suppress(errors.DownloadError):
        cached_download.shown(url)
        if not re.search(r"[\s?#]", url):
            return url.rstrip("/")
    received = errors.brief(url)
    if re.search("[@?#]", url):
        received = "one with '@', '?' or '#', which is not shown"
    raise errors.DownloadError(
        "BIT_TF_MODELS_URL is an address of the form https://host[:port]/path, "
        f"without spaces, '?' and '#'. Received: {received}. Correct or unset "
        "it."
    )


def is_file(url: str) -> bool:
    """Whether a web address is a checkpoint's by its suffix, not a handle."""
    return _file_name(url).lower().endswith(_FILES)


def _file_name(url: str) -> str:
    path = re.split("[?#]", url, maxsplit=1)[0]
    return urllib.parse.unquote(path.rpartition("/")[2])


def _web(url: str) -> pathlib.Path:
    if not is_file(url):
        return _hub(url)
    name = _file_name(url)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    safe = re.sub(r"[^\w.-]", "_", name)[-150:]
    return cached_download.cached(
        url,
        directory=cache_records.cache_directory() / "files",
        name=f"{digest}-{safe}",
    )


def _hub(handle: str) -> pathlib.Path:
    from bit_tf import hub

    return pathlib.Path(hub.resolve(handle))


def _hugging_face(address: str, source: str) -> pathlib.Path:
    """The directory of a repository's weights and configuration.

    Args:
      address: "owner/name" or "owner/name@revision".
      source: what somebody wrote, for messages.
    """
    match = _REPOSITORY.fullmatch(address)
    if match is None:
        raise errors.UnknownNameError(
            "A Hugging Face repository is written hf://owner/name or "
            f"hf://owner/name@revision. Received: {source!r}."
        )
    repository, revision = match.groups()
    library = errors.import_extra("huggingface_hub", "huggingface")
    library_errors = errors.import_extra(
        "huggingface_hub.errors", "huggingface"
    )
    tqdm: Any = errors.import_extra("huggingface_hub.utils", "huggingface").tqdm

    class Bar(tqdm):
        """Is shown on a terminal only, which not all of them are."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **({"disable": None} | kwargs))

    # HTTPError is the base of those of the HTTP package below, which may be
    # httpx or requests; the transfer in chunks raises RuntimeError.
    known = (
        OSError,
        ValueError,
        RuntimeError,
        library_errors.HTTPError,
        library_errors.EntryNotFoundError,
    )
    # The pickles of PyTorch only where there is nothing better.
    for patterns in (_SAFETENSORS, (*_SAFETENSORS, "pytorch_model*.bin*")):
        try:
            directory = pathlib.Path(
                library.snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=patterns,
                    tqdm_class=Bar,
                )
            )
        except known as error:
            raise errors.DownloadError(
                f"The Hugging Face repository {repository!r} could not be "
                f"fetched. Received for {source!r}: {_text(error)} "
                "Check the name, the network and HF_HUB_OFFLINE; for a private "
                "or gated repository, log in with: hf auth login"
            ) from error
        weights = list(directory.glob("*.safetensors")) or list(
            directory.glob("pytorch_model*.bin")
        )
        if weights:
            cache_records.compare(
                weights,
                cache_records.cache_directory()
                / "huggingface"
                / f"{repository.replace('/', '--')}@{directory.name}.json",
            )
            return directory
    raise errors.DownloadError(
        "Weights on Hugging Face are model.safetensors or pytorch_model.bin, "
        f"perhaps in several parts. Received: {repository!r}, which has "
        "neither. Give another repository or revision."
    )


def _text(error: BaseException) -> str:
    """The beginning of a message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
