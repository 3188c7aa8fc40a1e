"""Labelled pictures for transfer: open_dataset("folder:photos").

A `Dataset` has splits with the same classes, of which `input_pipeline` makes
batches.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from bit_tf import errors, picture_files
from bit_tf.errors import DatasetError, ImageError
from bit_tf.split import Split, is_random_access, require

__all__ = ["Dataset", "Split", "from_tfds", "open_dataset"]

_SPLITS = ("train", "validation", "test")
_BAD = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits with the same classes.

    Attributes:
      name: as it was asked for.
      class_names: of the labels 0, 1, ….
      splits: those of "train", "validation" and "test" that exist, in this
        order.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]

    @functools.cached_property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels: of all, or the median of a sample.

        Of the training pictures, if there are any. None if none can be read.
        """
        split = next(iter(self.splits.values()))
        return split.source.typical_size(split.positions)


def open_dataset(
    spec: Any,
    *,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    bad_images: str = "raise",
    progress: bool = True,
) -> Dataset:
    """Opens labelled pictures.

    Splits keep their names: where there is only a "validation" beside
    "train", there is no "test".

    Args:
      spec: a dataset of TFDS, such as "cifar10" or "oxford_flowers102:2.*";
        "folder:DIR" (picture_files.from_folder); "csv:FILE"
        (picture_files.from_csv); a tf.data.Dataset of (image, label) or of
        mappings with these keys, which is then train; or a mapping such as
        {"train": tf.data.Dataset, "test": tf.data.Dataset}. Images are uint8
        in [0, 255] or floats in [0, 1]; labels are integers.
      class_names: all classes in the order of their labels; by default those
        that the data name, or of a tf.data.Dataset "0", "1", … up to the
        largest label of train.
      data_dir: where TFDS keeps its datasets.
      manual_dir: where files lie that TFDS cannot download.
      download: whether TFDS may download what is missing.
      bad_images: "raise" means when the picture is used; "skip" looks at every
        picture now, warns with the name of each that is damaged, and leaves
        it out.
      progress: whether a terminal shows how far it is.

    Raises:
      DatasetError: there is no such dataset, or it cannot be used.
    """
    if bad_images not in _BAD:
        raise DatasetError(
            f"bad_images is 'raise' or 'skip'. Received: {bad_images!r}. "
            "Choose one."
        )
    names = None if class_names is None else tuple(map(str, class_names))
    if isinstance(spec, str):
        kind, _, place = spec.partition(":")
        if kind in ("folder", "csv"):
            dataset = _from_files(spec, kind, place, names)
        else:
            from bit_tf import tfds_source

            dataset = _from_found(
                spec,
                tfds_source.find(
                    spec,
                    data_dir=data_dir,
                    manual_dir=manual_dir,
                    class_names=names,
                    download=download,
                    progress=progress,
                ),
            )
    else:
        dataset = _from_streams(spec, names, progress)
    if bad_images == "skip":
        dataset = _without_bad(dataset, progress)
    return dataset


def from_tfds(
    builder: str,
    splits: Mapping[str, str],
    *,
    image: str = "image",
    label: str = "label",
    transform: Callable[[dict[str, Any]], tuple[Any, Any]] | None = None,
    needs: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    progress: bool = True,
) -> Dataset:
    """Chosen splits and features of a dataset of TFDS.

    Args:
      builder: its name, with configuration and version as TFDS writes them.
      splits: what to call them → TFDS's expression, such as
        {"train": "train[:800]+validation[:200]", "test": "test"}.
      image: path of the picture's feature, with "/" between names.
      label: path of the label's feature.
      transform: example with all its features, pictures decoded → (image,
        label), in TensorFlow's operations; instead of `image` and `label`.
      needs: paths of the features that transform reads; by default all are
        read.
      class_names: by default those of the label's feature.
      num_classes: instead of names where there are none: "0", "1", ….
      data_dir, manual_dir, download, progress: as open_dataset.

    Raises:
      DatasetError: there is no such dataset, split or feature.
    """
    from bit_tf import tfds_source

    if class_names is None and num_classes is not None:
        require("num_classes", num_classes, 1)
        class_names = list(map(str, range(num_classes)))
    names = None if class_names is None else tuple(map(str, class_names))
    found = tfds_source.find(
        builder,
        splits=splits,
        image=image,
        label=label,
        transform=transform,
        needs=needs,
        class_names=names,
        data_dir=data_dir,
        manual_dir=manual_dir,
        download=download,
        progress=progress,
    )
    return _from_found(builder, found)


def _from_files(
    spec: str, kind: str, place: str, class_names: tuple[str, ...] | None
) -> Dataset:
    if not place:
        raise DatasetError(
            f"{kind}: is followed by a path. Received: {spec!r}. Add it."
        )
    path = os.path.expanduser(place)
    if kind == "csv":
        found = picture_files.from_csv(path, class_names)
    else:
        found = picture_files.from_folder(path, class_names)
    return _assembled(spec, found.class_names, found.splits)


def _from_found(name: str, found: Any) -> Dataset:
    picture_files.check_classes(found.class_names, name)
    return _assembled(name, found.class_names, found.splits)


def _from_streams(
    spec: Any, class_names: tuple[str, ...] | None, progress: bool
) -> Dataset:
    from bit_tf import stream_source

    given = dict(spec) if isinstance(spec, Mapping) else {"train": spec}
    sources = {
        name: stream_source.from_dataset(name, dataset, progress)
        for name, dataset in given.items()
        if name in _SPLITS
    }
    if not given or len(sources) < len(given):
        raise DatasetError(
            f"Splits are {', '.join(_SPLITS)}. Received: "
            f"{errors.brief(list(given))}. Name them so."
        )
    if class_names is None:
        labels = sources.get("train", next(iter(sources.values()))).labels
        largest = int(labels.max(initial=0))
        class_names = tuple(map(str, range(largest + 1)))
    picture_files.check_classes(class_names, "the labels")
    dataset = _assembled("tf.data.Dataset", class_names, sources)
    for split in dataset.splits.values():
        if not split.labels.size:
            raise DatasetError(
                "A split has at least one example. Received: an empty "
                f"{split.name}. Leave it out, or fill it."
            )
    return dataset


def _assembled(
    name: str, class_names: Sequence[str], sources: Mapping[str, Any]
) -> Dataset:
    order = [*_SPLITS, *sources]
    splits = {
        split: Split(split, sources[split], class_names)
        for split in dict.fromkeys(order)
        if split in sources
    }
    return Dataset(name, tuple(class_names), splits)


def _without_bad(dataset: Dataset, progress: bool) -> Dataset:
    """Decodes every picture, and leaves out those that cannot be."""
    splits = {}
    for name, split in dataset.splits.items():
        bad: dict[int, str] = {}
        with tqdm(
            total=split.size,
            desc=f"looking at {name}",
            unit=" pictures",
            leave=False,
            disable=None if progress else True,
        ) as bar:
            for index, error in _failures(split):
                bar.update()
                if error is not None:
                    text = str(error).removesuffix(f" {picture_files.REMEDY}")
                    bad[index] = text
                    logging.warning("Left out of %s: %s", name, text)
        good = np.setdiff1d(np.arange(split.size), list(bad)).astype(np.int64)
        splits[name] = split.take(good) if bad else split
        if not len(good):
            raise DatasetError(
                "A split has at least one picture that can be used. Received: "
                f"{split.size} in {name} of {dataset.name}, all damaged; the "
                f"last one: {next(reversed(bad.values()))}"
            )
    return dataclasses.replace(dataset, splits=splits)


def _failures(split: Split) -> Iterable[tuple[int, Exception | None]]:
    """(index, why the picture cannot be decoded or None), in order."""
    order = split.positions.tolist()
    if not is_random_access(split.source):
        records = split.source.records(order)
        for index, record in enumerate(records):
            yield index, _failure(split.source, order[index], record)
        return
    with futures.ThreadPoolExecutor() as pool:
        step = 256
        for start in range(0, len(order), step):
            part = order[start : start + step]
            found = pool.map(functools.partial(_failure, split.source), part)
            yield from enumerate(found, start)


def _failure(
    source: Any, position: int, record: bytes | None = None
) -> Exception | None:
    try:
        if record is None:
            record = source.read(position)
        source.picture(record, position)
    except (ImageError, DatasetError) as error:
        return error
    return None
