"""Datasets of TensorFlow Datasets (TFDS) by name."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from bit_tf import errors, pipeline_errors, stream_source
from bit_tf.errors import DatasetError

__all__ = ["Found", "Pictures", "find"]

_SPLITS = ("train", "validation", "test")

# What TFDS raises where a name, a version, a split or a file is wrong.
_FOREIGN_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    AssertionError,
    RuntimeError,
    TypeError,
    ImportError,
    NotImplementedError,
    tf.errors.OpError,
)


class Found(NamedTuple):
    """What a dataset of TFDS holds.

    Attributes:
      class_names: of the labels 0, 1, ….
      splits: name → source.
    """

    class_names: tuple[str, ...]
    splits: dict[str, stream_source.StreamSource]


def find(
    name: str,
    *,
    splits: Mapping[str, str] | None = None,
    image: str | None = None,
    label: str | None = None,
    transform: Callable[[dict[str, Any]], tuple[Any, Any]] | None = None,
    needs: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    progress: bool = True,
) -> Found:
    """Prepares a dataset, and opens its splits without reading them.

    Examples come in the order of the files, undecoded.

    Args:
      name: as tfds.builder takes it: "cifar10", "oxford_flowers102:2.*",
        "sun397/tfds:4.*".
      splits: name → TFDS's expression; by default those of "train",
        "validation" and "test" that exist and have labels.
      image: path of a picture's feature; by default "image", or the only
        picture.
      label: path of a class's feature; by default "label", or the only one.
      transform: example, decoded → (picture, label), instead of both.
      needs: paths of the features that transform reads; by default all.
      class_names: by default the label's feature has them.
      data_dir: where TFDS keeps datasets; by default where TFDS says.
      manual_dir: where files lie that people have to download.
      download: whether TFDS may download and prepare.
      progress: whether a terminal shows how far the first pass is.

    Raises:
      DatasetError: there is no such dataset, version, split or feature, or it
        could not be prepared.
    """
    builder = _builder(name, data_dir)
    features = builder.info.features
    skipped = _pictures(features)
    picture = target = ""
    if transform is None:
        picture = _chosen(features, image, "image", skipped, "picture", name)
        classes = _class_labels(features)
        target = _chosen(features, label, "label", classes, "class label", name)
        needs = [picture, target]
    elif class_names is None:
        raise DatasetError(
            "A transform makes labels of its own. Received: neither "
            "class_names nor num_classes. Give one of them."
        )

    def to_pair(example: dict[str, Any]) -> tuple[Any, Any]:
        decoded = {
            key: features[key].decode_example(value)
            if key in skipped
            else value
            for key, value in example.items()
        }
        if transform is not None:
            return transform(decoded)
        return _at(decoded, picture), _at(decoded, target)

    for path in needs or ():
        _chosen(features, path, path, (), path, name)
    if download:
        _prepare(builder, manual_dir)
    if class_names is None:
        # Some builders know the names only once they are prepared.
        class_names = _names_of(features, target, name)
    expressions = splits
    if expressions is None:
        # tfds.testing.mock_data knows no splits, and takes any.
        known = [s for s in _SPLITS if s in builder.info.splits]
        if not builder.info.splits:
            known = ["train", "test"]
        expressions = dict(zip(known, known, strict=True))
    decoders = _decoders(needs, skipped)
    sources = {}
    for split, expression in expressions.items():
        examples = _examples(builder, expression, decoders)
        source = stream_source.StreamSource(
            split, examples, to_pair, progress=progress
        )
        if splits is None and source.first_label() == -1:
            logging.warning(
                "%s of %s has no labels, and is left out", split, name
            )
            continue
        sources[split] = source
    if not sources:
        raise DatasetError(
            f"A dataset has a split of {', '.join(_SPLITS)} with labels. "
            f"Received: {name!r} with {', '.join(builder.info.splits)}. Use "
            "another, or data.from_tfds with the splits to take."
        )
    return Found(tuple(class_names), sources)


class Pictures:
    """The pictures of a prepared dataset, encoded as they are stored.

    Attributes:
      name: the dataset's, with its configuration and version.
    """

    def __init__(
        self,
        name: str,
        *,
        image: str | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        download: bool = True,
    ) -> None:
        """Prepares the dataset; the arguments are those of `find`.

        Raises:
          DatasetError: as `find`.
        """
        self._builder = _builder(name, data_dir)
        features = self._builder.info.features
        pictures = _pictures(features)
        self._image = _chosen(
            features, image, "image", pictures, "picture", name
        )
        if self._image not in pictures:
            raise DatasetError(
                f"Pictures come from an Image feature. Received: {image!r} of "
                f"{name!r}, which is {_at(features, self._image)}. Name one of "
                f"{', '.join(pictures) or 'another dataset'}."
            )
        if download:
            _prepare(self._builder, None)
        folder, _, version = self._builder.info.full_name.rpartition("/")
        self.name = f"{folder}:{version}"

    def ranges(self, split: str | None = None) -> list[tuple[str, int, int]]:
        """Which pictures an expression of TFDS means.

        Args:
          split: such as "test" or "train[:10%]+test"; by default all splits.

        Returns:
          (split's name, first index, index after the last), in order.

        Raises:
          DatasetError: no such split.
        """
        splits = self._builder.info.splits
        if split is None:
            return [(name, 0, s.num_examples) for name, s in splits.items()]
        try:
            chosen = tfds.core.ReadInstruction.from_spec(split)
            parts = chosen.to_absolute(splits)
            return [
                (
                    part.splitname,
                    part.from_ or 0,
                    splits[part.splitname].num_examples
                    if part.to is None
                    else part.to,
                )
                for part in parts
            ]
        except _FOREIGN_ERRORS as error:
            raise _no_split(split, self._builder, error) from error

    def read(self, split: str, start: int) -> Iterator[bytes]:
        """The pictures of a split from an index on.

        Raises:
          DatasetError: no such split, or its files are damaged or gone.
        """
        decoders = _decoders([self._image], [self._image])
        examples = _examples(self._builder, f"{split}[{start}:]", decoders)
        try:
            for example in pipeline_errors.iterate(examples):
                yield example[self._image].numpy()
        except DatasetError:
            raise
        except _FOREIGN_ERRORS as error:
            raise DatasetError(
                "The files of a prepared dataset can be read. Received: "
                f"{self.name!r}, of which TensorFlow says: {_said(error)} "
                "Check its folder, or prepare it again."
            ) from error


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    where = None if data_dir is None else os.path.expanduser(data_dir)
    # TFDS wants all three numbers of a version.
    full = re.sub(r"(:[0-9]+)(\.\*)?$", r"\1.*.*", name)
    full = re.sub(r"(:[0-9]+\.[0-9]+)(\.\*)?$", r"\1.*", full)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return tfds.builder(full, data_dir=where)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        base = name.partition(":")[0].partition("/")[0]
        guesses = " or ".join(map(repr, errors.near(known, base)))
        hint = f"Did you mean {guesses}?" if guesses else "Choose one of them."
        raise DatasetError(
            f"A dataset is one of the {len(known)} of TFDS, folder:DIR or "
            f"csv:FILE. Received: {name!r}. {_path_hint(name) or hint}"
        ) from error
    except _FOREIGN_ERRORS as error:
        hint = _path_hint(name) or "Mend the name."
        raise DatasetError(
            "A dataset of TFDS is name, name/configuration or name:version, "
            f"of those that exist. Received: {name!r}, of which TFDS says: "
            f"{_said(error)} {hint}"
        ) from error


def _path_hint(name: str) -> str:
    if os.path.isdir(name):
        return f"Did you mean 'folder:{name}'?"
    return f"Did you mean 'csv:{name}'?" if os.path.isfile(name) else ""


def _prepare(builder: Any, manual_dir: str | os.PathLike[str] | None) -> None:
    """Downloads what is not there yet."""
    config = tfds.download.DownloadConfig(
        manual_dir=None
        if manual_dir is None
        else os.path.abspath(os.path.expanduser(manual_dir))
    )
    managers = tfds.core.download.download_manager
    try:
        # TFDS prints, where results of our commands go.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except (
        *_FOREIGN_ERRORS,
        managers.NonMatchingChecksumError,
        managers.extractor.ExtractError,
        managers.extractor.UnsafeArchiveError,
        managers.util.DownloadError,
    ) as error:
        said = _said(error)
        advice = "Check the network and the disk, or name a data_dir with it."
        if isinstance(error, ImportError):
            advice = "Install that package."
        elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            steps = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
            # TFDS repeats them where the folder is empty.
            said = said.partition(" Create it and")[0]
            advice = (
                "Its files have to be downloaded by hand, into a folder that "
                f"you name with --manual-dir (manual_dir): {steps}"
            )
        raise DatasetError(
            "TFDS prepares a dataset before its first use. Received: "
            f"{builder.info.full_name!r}, which failed with "
            f"{type(error).__name__}: {said} {advice}"
        ) from error


def _examples(builder: Any, expression: str, decoders: Any) -> tf.data.Dataset:
    config = tfds.ReadConfig(
        try_autocache=False, skip_prefetch=True, interleave_cycle_length=1
    )
    try:
        return builder.as_dataset(
            split=expression,
            shuffle_files=False,
            decoders=decoders,
            read_config=config,
        )
    except _FOREIGN_ERRORS as error:
        raise _no_split(expression, builder, error) from error


def _no_split(expression: str, builder: Any, error: Exception) -> DatasetError:
    return DatasetError(
        "A split is one that the prepared dataset has. Received: "
        f"{expression!r} of {builder.info.full_name!r}, of which TFDS says: "
        f"{_said(error)} Name another split, or let TFDS download."
    )


def _decoders(needs: Sequence[str] | None, skipped: Sequence[str]) -> Any:
    """What has TFDS read the features needed, and leave pictures encoded."""
    if needs is None:
        return {key: tfds.decode.SkipDecoding() for key in skipped}
    tree: dict[str, Any] = {}
    for path in needs:
        *above, last = path.split("/")
        branch = tree
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = True
    return tfds.decode.PartialDecoding(
        tree,
        decoders={k: tfds.decode.SkipDecoding() for k in skipped if k in tree},
    )


def _said(error: Exception) -> str:
    """The beginning of an error's text, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:300]}…" if len(text) > 300 else f"{text.rstrip('.')}."


def _pictures(features: Any) -> list[str]:
    return [
        k for k, f in features.items() if isinstance(f, tfds.features.Image)
    ]


def _class_labels(features: Any) -> list[str]:
    return [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    ]


def _chosen(
    features: Any,
    asked: str | None,
    usual: str,
    candidates: Sequence[str],
    what: str,
    name: str,
) -> str:
    """The path of a feature: the one asked for, the usual, or the only one."""
    if asked is not None:
        try:
            _at(features, asked)
        except (KeyError, TypeError):
            pass
        else:
            return asked
    elif usual in candidates:
        return usual
    elif len(candidates) == 1:
        return candidates[0]
    lines = ", ".join(
        f"{key} ({type(f).__name__})" for key, f in sorted(features.items())
    )
    wanted = f"the feature {asked!r}" if asked else f"one {what}"
    raise DatasetError(
        f"A dataset to transfer to has {wanted}. Received: {name!r} with "
        f"{lines}. Use another dataset, or data.from_tfds with the features "
        "to take."
    )


def _at(tree: Any, path: str) -> Any:
    """The entry of a nested mapping; lists of mappings are looked into."""
    for key in path.split("/"):
        tree = getattr(tree, "feature", tree)[key]
    return tree


def _names_of(features: Any, label: str, name: str) -> tuple[str, ...]:
    feature = _at(features, label)
    if (
        not isinstance(feature, tfds.features.ClassLabel)
        or not feature.num_classes
    ):
        raise DatasetError(
            f"Class names come from a ClassLabel. Received: {label!r} of "
            f"{name!r}, which is {feature}. Give class_names or num_classes."
        )
    return tuple(feature.names or map(str, range(feature.num_classes)))
