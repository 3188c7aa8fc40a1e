"""Finds pictures wherever they are named, and reads their bytes ahead."""

import collections
import contextlib
import functools
import itertools
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bit_tf import (
    download,
    errors,
    fetching,
    item_lists,
    picture_paths,
    tar_items,
)
from bit_tf.errors import (
    BitTfError,
    DatasetError,
    ImageError,
    ImageFetchError,
)
from bit_tf.fetching import Read
from bit_tf.picture_files import as_text

__all__ = ["Item", "Reader", "find", "require_use"]

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
_PORT = re.compile(r"[^:]*(:[0-9]*)?|\[[^]]*\](:[0-9]*)?")
_FILES_AT_ONCE = 4
# Bytes that may wait to be taken before no new read begins.
_HELD = 256 * 2**20


class Item(NamedTuple):
    """One picture, not read yet.

    Attributes:
      id: the same on every run; equal only where the place is the same.
      source: what a person would open: a path, a URL, "shard.tar#member".
      location: how `Reader` finds the bytes, of JSON's types: ("file", path),
        ("url", url), ("tar", path, offset, size) or ("tfds", name, data_dir,
        split, index, feature). Paths are absolute, and as os.fsdecode gives
        them.
    """

    id: str
    source: str
    location: Sequence[Any]


def find(
    sources: Iterable[str],
    *,
    column: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
) -> Iterator[Item]:
    """The pictures of many sources, in a fixed order, as they are found.

    A source is one of

    * a picture file, whatever its suffix;
    * a folder: the pictures by their suffix in it and below, in the order of
      their names. What is hidden is passed over, and so is a folder that was
      reached before by another link;
    * a list, FILE.txt: a path or URL a line, but for blank ones and those that
      begin with #; or FILE.csv, FILE.tsv or FILE.parquet with a column of
      paths or URLs. Relative paths are relative to the list;
    * FILE.tar: the pictures by their suffix;
    * an http or https URL of a picture;
    * tfds:NAME, tfds:NAME:VERSION: a dataset of TFDS;
    * a glob of files and folders (*, ?, [a-z], ** for any folders), with
      {a,b} and {000..127} for alternatives that must all exist.

    What is named twice comes twice, with the same id. What a list names and
    is not there is an item too, which cannot be read.

    Args:
      sources: as above.
      column: of lists that have columns; by default "path", "url", "source",
        "image" or "file", or the only one. Of a dataset of TFDS, the feature
        with the picture; by default "image", or the only picture.
      data_dir: where TFDS keeps datasets; by default where TFDS says.
      split: an expression of TFDS, such as "test" or "train[:10%]"; by
        default all splits in their order.

    Returns:
      An iterator, which holds one folder's names in memory at most.

    Raises:
      DatasetError: at once, where a source is none of these, is empty, or has
        no such column; later, where a list or an archive is damaged.
    """
    opened = []
    for source in _texts(sources):
        make = _open(source, column, data_dir, split)
        # What is wrong with its beginning is told before any work is done.
        if next(make(), None) is None:
            raise DatasetError(
                "A source holds at least one picture. Received: "
                f"{as_text(source)!r} without any (files are taken by their "
                "suffix). Name another, or leave it out."
            )
        opened.append(make)
    if not opened:
        raise DatasetError(
            "Pictures come from at least one source. Received: none. Name a "
            "file, a folder, a list, an archive, a URL or a dataset."
        )
    return itertools.chain.from_iterable(make() for make in opened)


def require_use(
    sources: Iterable[str], *, column: str | None, split: str | None
) -> None:
    """Refuses options that none of the sources has a use for.

    Args:
      sources: as find() takes them.
      column, split: of find().

    Raises:
      DatasetError: as said.
    """
    names = [source.lower() for source in _texts(sources)]
    datasets = any(name.startswith("tfds:") for name in names)
    tables = any(name.endswith((".csv", ".tsv", ".parquet")) for name in names)
    if split is not None and not datasets:
        raise DatasetError(
            "--split (split) is of a dataset, tfds:NAME. Received: "
            f"{errors.brief(split)}, and no dataset among the sources. Leave "
            "it out."
        )
    if column is not None and not (datasets or tables):
        raise DatasetError(
            "--column (column) is of a list .csv, .tsv or .parquet, or of a "
            f"dataset. Received: {errors.brief(column)}, and none of them "
            "among the sources. Leave it out."
        )


def _open(
    source: str,
    column: str | None,
    data_dir: str | os.PathLike[str] | None,
    split: str | None,
) -> Callable[[], Iterator[Item]]:
    """What gives the items of a source, as often as it is called."""
    if source[:5].lower() == "tfds:":
        where = None if data_dir is None else os.fsdecode(data_dir)
        if where is not None and "://" not in where:
            where = _absolute(where)
        return functools.partial(_dataset, source[5:], where, split, column)
    if _URL.match(source):
        _check_url(source)
        return functools.partial(_one, _named(source, ""))
    if os.path.lexists(source):
        return functools.partial(_path, source, column)
    if picture_paths.is_pattern(source):
        picture_paths.check(source)
        return functools.partial(_pattern, source, column)
    raise DatasetError(
        "A source is a picture, a folder, a list (.txt, .csv, .tsv, .parquet)"
        ", a .tar archive, an http or https URL, a glob, or tfds:NAME. "
        f"Received: {as_text(source)!r}, where there is nothing. "
        f"{picture_paths.guess(source)}"
    )


def _check_url(url: str) -> None:
    suffixes = (*item_lists.SUFFIXES, ".tar", *tar_items.COMPRESSED)
    # What cannot be split is no URL.
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme.lower() in ("http", "https") and not (
            parts.path.lower().endswith(suffixes)
        ):
            return
    raise DatasetError(
        "A URL is http or https, and of a picture. Received: "
        f"{_without_password(url)!r}. Download it first, and name the file."
    )


def _one(item: Item) -> Iterator[Item]:
    yield item


def _path(source: str, column: str | None) -> Iterator[Item]:
    """The items of a path that exists."""
    lower = source.lower()
    if os.path.isdir(source):
        for path in picture_paths.walk(source):
            yield _file(path)
    elif lower.endswith(tar_items.COMPRESSED):
        raise DatasetError(
            "A .tar archive is not compressed, so that pictures can be read "
            f"in place. Received: {as_text(source)!r}. Unpack it, or "
            "decompress it to .tar."
        )
    elif lower.endswith(".tar"):
        for member in tar_items.members(source):
            shown = f"{source}#{member.name}"
            place = _absolute(source)
            location = ("tar", place, member.offset, member.size)
            id_ = f"{_id(source)}#{_escaped(member.name)}"
            yield Item(id_, as_text(shown), location)
    elif lower.endswith(item_lists.SUFFIXES):
        folder = os.path.dirname(source)
        for line, name in item_lists.read(source, column):
            if name:
                yield _named(name, folder)
            else:
                shown = as_text(f"{source}#{line}")
                yield Item(f"{_id(source)}#{line}", shown, ("file", ""))
    else:
        yield _file(source)


def _pattern(pattern: str, column: str | None) -> Iterator[Item]:
    """The items of a glob; lists and archives where its suffix says so."""
    suffix = os.path.splitext(pattern)[1].lower()
    taken = suffix if suffix in (*item_lists.SUFFIXES, ".tar") else ""
    # What ** finds lies below folders that it finds too.
    deep = "**" in pattern.split("/")
    for one in dict.fromkeys(picture_paths.expand(pattern)):
        for path in picture_paths.matches(one):
            if os.path.isdir(path):
                wanted = not deep
            else:
                wanted = picture_paths.is_picture(path) or (
                    bool(taken) and path.lower().endswith(taken)
                )
            if wanted:
                yield from _path(path, column)


def _dataset(
    name: str, data_dir: str | None, split: str | None, feature: str | None
) -> Iterator[Item]:
    from bit_tf import tfds_source

    pictures = tfds_source.Pictures(name, image=feature, data_dir=data_dir)
    end = "" if feature is None else f"#{feature}"
    for part, first, last in pictures.ranges(split):
        for index in range(first, last):
            shown = f"tfds:{pictures.name}/{part}/{index}{end}"
            place = ("tfds", pictures.name, data_dir, part, index, feature)
            yield Item(shown, shown, place)


def _file(path: str) -> Item:
    return Item(_id(path), as_text(path), ("file", _absolute(path)))


def _absolute(path: str) -> str:
    """A path that does not depend on where the process is later."""
    # os.path.abspath would take "link/.." for ".".
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def _id(path: str) -> str:
    """A path as text that no other path has.

    Written as \\xff are bytes that are no text, the backslash of a name that
    has such letters itself, and the # that would part an archive from a member.
    """
    return _escaped(path).replace("#", r"\x23")


def _escaped(name: str) -> str:
    return as_text(_ESCAPE.sub(r"\\x5c", name))


def _named(name: str, folder: str) -> Item:
    """The item of a path or URL, as a list has it."""
    if _URL.match(name):
        shown = as_text(_without_password(name))
        return Item(shown, shown, ("url", name))
    return _file(os.path.join(folder, name))


def _without_password(url: str) -> str:
    """A URL without the user and password in it."""
    head, slashes, rest = url.partition("//")
    end = min((rest + "/?#").index(mark) for mark in "/?#")
    host = rest[:end].rpartition("@")[2]
    if not _PORT.fullmatch(host) and "@" in rest[end:]:
        # A password with a slash in it, which no URL can have.
        return f"{head}{slashes}***@{rest.rpartition('@')[2]}"
    return f"{head}{slashes}{host}{rest[end:]}"


def _texts(sources: Any) -> list[str]:
    """Sources as text; one alone is a list of one."""
    if isinstance(sources, (str, bytes, os.PathLike)):
        sources = [sources]
    try:
        return [os.fsdecode(source) for source in sources]
    except TypeError as error:
        raise DatasetError(
            "Sources are paths, URLs or names of datasets. Received: "
            f"{errors.brief(sources)} ({error}). Pass a list of texts."
        ) from error


def _kind(location: Any) -> str:
    """The kind of a place; "" if it is none."""
    match location:
        case ("file" | "url" as kind, str()):
            return kind
        case ("tar", str(), int(offset), int(size)):
            return "tar" if min(offset, size) >= 0 else ""
        case ("tfds", str(), str() | None, str(), int(), str() | None):
            return "tfds"
    return ""


class Reader:
    """Reads items: files by a few threads, URLs many at once.

    It may be used by several threads, which share its limits, and pickled,
    which keeps its options alone.
    """

    def __init__(
        self,
        *,
        connections: int = 32,
        per_host: int = 8,
        retries: int = 3,
        timeout: float = download.TIMEOUT,
        max_bytes: int = download.MAX_BYTES,
        public_only: bool = False,
        seed: int = 0,
    ) -> None:
        """Starts nothing yet; the arguments are those of fetching.Fetcher.

        Raises:
          ValueError: a number that is too small.
        """
        self._options: dict[str, Any] = {
            "connections": connections,
            "per_host": per_host,
            "retries": retries,
            "timeout": timeout,
            "max_bytes": max_bytes,
            "public_only": public_only,
            "seed": seed,
        }
        self._max_bytes = max_bytes
        self._fetcher = fetching.Fetcher(**self._options)
        self._local = fetching.Workers(_FILES_AT_ONCE + 1)
        # Made by the one thread that reads datasets, which needs TensorFlow.
        self._datasets: Any = None

    def __reduce__(self) -> tuple:
        return functools.partial(Reader, **self._options), ()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way, and all threads."""
        self._fetcher.close()
        self._local.close()
        if self._datasets is not None:
            self._datasets.close()

    def read(self, item: Item) -> bytes:
        """The bytes of one item.

        Raises:
          ImageError: they cannot be read.
        """
        workers, read = self._prepared(item, lambda: True)
        try:
            return workers.start(read).result()
        finally:
            workers.cancel([read])

    def read_all(
        self, items: Iterable[Item], *, window: int = 64
    ) -> Generator[tuple[Item, bytes | ImageError], None, None]:
        """The bytes of many items, in their order, several read at once.

        What comes first is waited for, while what follows is read: up to
        `window` items, and no more once 256 MiB wait to be taken.

        Args:
          items: taken one by one, `window` ahead.
          window: the most that are begun and not yet taken.

        Yields:
          (item, its bytes or why they cannot be read).

        Raises:
          ValueError: a window below 1.
          BitTfError: what iterating over `items` raises, after the items that
            came before.
        """
        if window < 1:
            raise ValueError(
                f"A window is at least 1. Received: window={window}."
            )
        ahead = _Ahead()
        source = iter(items)
        failure: BitTfError | None = None
        waiting: collections.deque[tuple[Item, fetching.Workers, Read]]
        waiting = collections.deque()
        more = True
        try:
            while True:
                while more and len(waiting) < window:
                    try:
                        item = next(source)
                    except StopIteration:
                        more = False
                    except BitTfError as error:
                        failure, more = error, False
                    else:
                        waiting.append(self._begin(item, ahead))
                if not waiting:
                    break
                item, workers, read = waiting[0]
                ahead.head = read.future
                if ahead.blocked:
                    ahead.blocked = False
                    self._look()
                outcome: bytes | ImageError
                try:
                    outcome = read.future.result()
                    ahead.add(-len(outcome))
                except ImageError as error:
                    outcome = error
                waiting.popleft()
                yield item, outcome
                del outcome, read
        finally:
            for _, workers, read in waiting:
                workers.cancel([read])
        if failure is not None:
            raise failure

    def _begin(
        self, item: Item, ahead: "_Ahead"
    ) -> tuple[Item, fetching.Workers, Read]:
        workers, read = self._prepared(item, lambda: ahead.open_to(read))
        read.future.add_done_callback(ahead.note)
        workers.start(read)
        return item, workers, read

    def _look(self) -> None:
        self._fetcher.workers.look()
        self._local.look()

    def _prepared(
        self, item: Item, ready: Callable[[], bool]
    ) -> tuple[fetching.Workers, Read]:
        kind = _kind(item.location)
        if kind == "url":
            url = item.location[1]
            return self._fetcher.workers, self._fetcher.read(url, ready)

        def run(abort: download.Abort) -> bytes:
            if not kind:
                raise ImageFetchError(
                    "A place is of kind file, url, tar or tfds, as items.Item "
                    f"says. Received: {errors.brief(item.location)}. Find the "
                    "pictures again."
                )
            return self._read_local(*item.location)

        limit = 1 if kind == "tfds" else _FILES_AT_ONCE
        return self._local, Read(run, kind, limit, ready)

    def _read_local(self, kind: str, *place: Any) -> bytes:
        if kind == "file" and place[0]:
            file = pathlib.Path(place[0])
            return download.read_source(file, max_bytes=self._max_bytes)
        if kind == "file":
            raise ImageFetchError(
                "Each row of a list names a picture. Received: an empty cell. "
                "Fill it, or remove the row."
            )
        if kind == "tar":
            path, offset, size = place
            return tar_items.read(path, offset, size, self._max_bytes)
        return self._read_dataset(*place)

    def _read_dataset(self, *place: Any) -> bytes:
        if self._datasets is None:
            from bit_tf import tfds_items

            self._datasets = tfds_items.Datasets()
        return self._datasets.read(*place)


class _Ahead:
    """What one read_all holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self.head: object = None
        # Whether a read was kept from beginning.
        self.blocked = False

    def open_to(self, read: Read) -> bool:
        """Whether a read may begin: there is room, or it is waited for."""
        if self._bytes < _HELD:
            return True
        # First, so that a change that comes now is followed by a look.
        self.blocked = True
        return self._bytes < _HELD or self.head is read.future

    def note(self, future: Any) -> None:
        """Counts what a read gave."""
        if not future.cancelled() and future.exception() is None:
            self.add(len(future.result()))

    def add(self, size: int) -> None:
        with self._lock:
            self._bytes += size
