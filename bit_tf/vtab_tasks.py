"""The 19 tasks of VTAB-1k as a table: pictures, labels and splits.

Those of google-research/task_adaptation (arXiv:1910.04867), read through
TensorFlow Datasets. What is done with them is in vtab.py.
"""

import dataclasses
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from bit_tf import errors, hyperrule, variants

__all__ = [
    "ALL",
    "EXAMPLES",
    "GROUPS",
    "TASKS",
    "Task",
    "bins",
    "check",
    "chosen",
    "clevr_count",
    "clevr_distance",
    "kitti_distance",
    "known_examples",
    "require_as_tabled",
    "sixteenths",
    "sprite",
]

# Stands for the names of all tasks.
ALL = "all"
GROUPS = ("natural", "specialized", "structured")
_TRAIN, _VALIDATION = 800, 200
# For training, in every task.
EXAMPLES = _TRAIN + _VALIDATION

# Distances from the camera: CLEVR's unit, and metres.
_CLEVR_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_KITTI_EDGES = (-100.0, 8.0, 20.0, 999.0)
_NO_VEHICLE = 1000.0
_VEHICLES = ("Car", "Van", "Truck")

# What TFDS raises for a builder, config or version that there is not, and for
# metadata that it cannot read.
_NO_BUILDER = (ValueError, AssertionError, KeyError, OSError)

# A dictionary of tensors, nested as the builder's features are.
Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of VTAB.

    Attributes:
      name: its key in TASKS and in variants.VTAB_TASKS.
      group: one of GROUPS.
      builder: TFDS' name, with the config.
      examples: number of those of each of the builder's splits that is used,
        by TFDS' metadata.
      validation: the split that the 200 come from, and the percentage of it
        where they begin. The 800 begin "train".
      test: the same of the test pictures, which are all from there on.
      features: what the label is read from: path in the builder's features →
        number of its classes, or None where it is no class label.
      picture: (height, width) in pixels, or None where pictures differ.
      label_map: example → int64 [], or None where the one feature is the
        label.
      class_names: of what label_map gives.
      first_names: those that the class label among the features begins with,
        where label_map relies on them.
      picture_map: picture → float32 [h, w, 3] in [0, 1], or None where the
        picture is one.
      flip: whether a mirrored picture has the same label.
      crop: whether a part of it has.
    """

    name: str
    group: str
    builder: str
    examples: Mapping[str, int]
    validation: tuple[str, int]
    test: tuple[str, int]
    features: Mapping[str, int | None]
    picture: tuple[int, int] | None = None
    label_map: Callable[[Example], tf.Tensor] | None = None
    class_names: tuple[str, ...] | None = None
    first_names: tuple[str, ...] = ()
    picture_map: Callable[[tf.Tensor], tf.Tensor] | None = None
    flip: bool = True
    crop: bool = True

    @property
    def classes(self) -> int:
        """Their number."""
        return variants.VTAB_TASKS[self.name][0]

    def splits(
        self, examples: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        """The splits "train800", "val200", "train800val200" and "test".

        Percentages are rounded down to a picture, as task_adaptation does.

        Args:
          examples: of the builder's splits, where not as in the table.

        Returns:
          name → an expression in TFDS' language of splits
        """
        counts = self.examples if examples is None else examples

        def begin(split: str, percent: int) -> int:
            return percent * counts[split] // 100 if percent else 0

        train = f"train[:{_TRAIN}]"
        first = begin(*self.validation)
        last = first + _VALIDATION
        validation = f"{self.validation[0]}[{first or ''}:{last}]"
        first = begin(*self.test)
        return {
            "train800": train,
            "val200": validation,
            "train800val200": f"{train}+{validation}",
            "test": f"{self.test[0]}[{first}:]" if first else self.test[0],
        }

    def rule(self, batch_size: int = hyperrule.BATCH_SIZE) -> hyperrule.Rule:
        """BiT-HyperRule for the thousand pictures.

        Where they differ in size, they count as large as the test pictures of
        the published weights are made.
        """
        side = variants.VTAB_TASKS[self.name][1]
        height, width = self.picture or (side, side)
        return hyperrule.derive(EXAMPLES, height, width, batch_size=batch_size)


def bins(value: tf.Tensor, edges: tuple[float, ...]) -> tf.Tensor:
    """The i for which edges[i] < value ≤ edges[i + 1].

    Args:
      value: float32 [].
      edges: in ascending order.

    Returns:
      int64 []: −1 up to the first edge, len(edges) − 1 above the last.
    """
    below = tf.constant(edges, tf.float32) < tf.cast(value, tf.float32)
    return tf.math.count_nonzero(below) - 1


def clevr_count(example: Example) -> tf.Tensor:
    """The number of objects, three at least, minus three."""
    return tf.size(example["objects"]["size"], tf.int64) - 3


def clevr_distance(example: Example) -> tf.Tensor:
    """The bin of the nearest object's distance."""
    distances = example["objects"]["pixel_coords"][:, 2]
    return bins(tf.reduce_min(distances), _CLEVR_EDGES)


def kitti_distance(example: Example) -> tf.Tensor:
    """The bin of the nearest vehicle's distance; the last is "no vehicle"."""
    objects = example["objects"]
    is_vehicle = objects["type"] < len(_VEHICLES)
    distances = tf.boolean_mask(objects["location"][:, 2], is_vehicle)
    nearest = tf.reduce_min(tf.concat([distances, [_NO_VEHICLE]], axis=0))
    return bins(nearest, _KITTI_EDGES)


def sixteenths(feature: str, values: int) -> Callable[[Example], tf.Tensor]:
    """A label map: in which sixteenth of its values a latent is.

    Args:
      feature: a class label.
      values: how many it has.
    """

    def label(example: Example) -> tf.Tensor:
        return tf.cast(example[feature], tf.int64) * 16 // values

    return label


def sprite(picture: tf.Tensor) -> tf.Tensor:
    """A picture map: uint8 [h, w, 1] of 0 and 1, where 1 is white."""
    return tf.image.grayscale_to_rgb(tf.cast(picture > 0, tf.float32))


# Where the 200 validation pictures begin, and where the test pictures.
_OWN: dict = {"validation": ("validation", 0), "test": ("test", 0)}
_90_10: dict = {"validation": ("train", 90), "test": ("test", 0)}
_80_20: dict = {"validation": ("train", 80), "test": ("test", 0)}
_60_20_20: dict = {"validation": ("train", 60), "test": ("train", 80)}
_80_10_10: dict = {"validation": ("train", 80), "test": ("train", 90)}
_CLEVR: dict = {
    "group": "structured",
    "builder": "clevr",
    "examples": {"train": 70_000, "validation": 15_000},
    "validation": ("train", 90),
    "test": ("validation", 0),
    "crop": False,
}
_DSPRITES: dict = {
    "group": "structured",
    "builder": "dsprites",
    "examples": {"train": 737_280},
    **_80_10_10,
    "picture": (64, 64),
    "picture_map": sprite,
    "flip": False,
}
_SMALLNORB: dict = {
    "group": "structured",
    "builder": "smallnorb",
    "examples": {"train": 24_300, "test": 24_300},
    "validation": ("test", 0),
    "test": ("test", 50),
    "picture": (96, 96),
}


def _labelled(
    group: str,
    name: str,
    builder: str,
    where: Mapping[str, tuple[str, int]],
    sizes: Mapping[str, int],
    picture: tuple[int, int] | None = None,
    **facts,
) -> Task:
    """A row whose builder has the label as it is."""
    return Task(
        name,
        group,
        builder,
        sizes,
        where["validation"],
        where["test"],
        {"label": variants.VTAB_TASKS[name][0]},
        picture,
        **facts,
    )


def _examples(train: int, test: int, validation: int = 0) -> dict[str, int]:
    found = {"train": train, "validation": validation, "test": test}
    return {split: size for split, size in found.items() if size}


def _rows() -> Iterator[Task]:
    for row in (
        ("caltech101", "caltech101", _90_10, _examples(3060, 6084)),
        (
            "cifar100",
            "cifar100",
            _90_10,
            _examples(50_000, 10_000),
            (32, 32),
        ),
        ("dtd", "dtd", _OWN, _examples(1880, 1880, 1880)),
        (
            "oxford_flowers102",
            "oxford_flowers102",
            _OWN,
            _examples(1020, 6149, 1020),
        ),
        (
            "oxford_iiit_pet",
            "oxford_iiit_pet",
            _80_20,
            _examples(3680, 3669),
        ),
        ("sun397", "sun397/tfds", _OWN, _examples(76_128, 21_750, 10_875)),
        (
            "svhn",
            "svhn_cropped",
            _90_10,
            _examples(73_257, 26_032),
            (32, 32),
        ),
    ):
        yield _labelled("natural", *row)
    for row in (
        (
            "patch_camelyon",
            "patch_camelyon",
            _OWN,
            _examples(262_144, 32_768, 32_768),
            (96, 96),
        ),
        ("eurosat", "eurosat/rgb", _60_20_20, {"train": 27_000}, (64, 64)),
        ("resisc45", "resisc45", _60_20_20, {"train": 31_500}, (256, 256)),
        (
            "diabetic_retinopathy",
            "diabetic_retinopathy_detection/btgraham-300",
            _OWN,
            _examples(35_126, 42_670, 10_906),
        ),
    ):
        yield _labelled("specialized", *row)
    yield Task(
        "clevr-count",
        **_CLEVR,
        features={"objects/size": 2},
        label_map=clevr_count,
        class_names=tuple(f"{count} objects" for count in range(3, 11)),
    )
    yield Task(
        "clevr-distance",
        **_CLEVR,
        features={"objects/pixel_coords": None},
        label_map=clevr_distance,
        class_names=(
            "up to 8",
            "8 to 8.5",
            "8.5 to 9",
            "9 to 9.5",
            "9.5 to 10",
            "over 10",
        ),
    )
    yield _labelled(
        "structured",
        "dmlab",
        "dmlab",
        _OWN,
        _examples(65_550, 22_735, 22_628),
        (360, 480),
        crop=False,
    )
    yield Task(
        "kitti-distance",
        "structured",
        "kitti",
        _examples(6347, 711, 423),
        **_OWN,
        features={"objects/type": 8, "objects/location": None},
        label_map=kitti_distance,
        class_names=("up to 8 m", "8 to 20 m", "over 20 m", "no vehicle"),
        first_names=_VEHICLES,
        crop=False,
    )
    yield Task(
        "dsprites-orientation",
        **_DSPRITES,
        features={"label_orientation": 40},
        label_map=sixteenths("label_orientation", 40),
        class_names=tuple(f"orientation {i} of 16" for i in range(1, 17)),
    )
    yield Task(
        "dsprites-xpos",
        **_DSPRITES,
        features={"label_x_position": 32},
        label_map=sixteenths("label_x_position", 32),
        class_names=tuple(f"column {i} of 16" for i in range(1, 17)),
        crop=False,
    )
    yield Task(
        "smallnorb-azimuth",
        **_SMALLNORB,
        features={"label_azimuth": 18},
        flip=False,
    )
    yield Task(
        "smallnorb-elevation", **_SMALLNORB, features={"label_elevation": 9}
    )


TASKS: Mapping[str, Task] = types.MappingProxyType(
    {row.name: row for row in _rows()}
)


def check(
    tasks: str | Iterable[str] = ALL,
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Compares the table with TFDS' builders; nothing is downloaded.

    Args:
      tasks: names in TASKS, one name, or "all".
      data_dir: where prepared datasets are, whose metadata tells sizes; None
        is TFDS' own folder.

    Returns:
      A row a task, JSON's types: "task"; "ok"; "problems", texts; "version" of
      the builder, or None; "sizes", the pictures of "train" and "test", empty
      where there is no metadata.

    Raises:
      UnknownNameError: there is no such task.
    """
    return [_checked(row, data_dir) for row in chosen(tasks)]


def chosen(tasks: str | Iterable[str]) -> list[Task]:
    """Rows in the table's order, each once."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if names == [ALL]:
        return list(TASKS.values())
    if not names:
        raise errors.UnknownNameError(
            "Tasks are named, one or more, or 'all'. Received: none."
        )
    wanted = {errors.lookup(TASKS, name, "VTAB tasks").name for name in names}
    return [row for name, row in TASKS.items() if name in wanted]


def known_examples(
    row: Task, data_dir: str | os.PathLike[str] | None
) -> Mapping[str, int]:
    """Pictures of the builder's splits, or the table's if it does not know."""
    try:
        splits = _builder(row, data_dir).info.splits
        return {name: splits[name].num_examples for name in row.examples}
    except _NO_BUILDER:
        return row.examples


def require_as_tabled(
    rows: Iterable[Task], data_dir: str | os.PathLike[str] | None
) -> None:
    """Refuses builders whose labels would be others, before any training."""
    problems = [
        f"{row.name}: {problem}"
        for row in rows
        for problem in _compared(row, data_dir)[1]
    ]
    if problems:
        raise errors.DatasetError(
            "VTAB's tasks are defined by the features of TFDS' builders. "
            f"Received: {'; '.join(problems)}. Install another version of "
            "tensorflow-datasets, or prepare the dataset in data_dir anew."
        )


def _builder(row: Task, data_dir: str | os.PathLike[str] | None):
    return tfds.builder(row.builder, data_dir=data_dir)


def _compared(
    row: Task, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, list[str]]:
    """(the builder or None, in what it is not as the table says)"""
    try:
        builder = _builder(row, data_dir)
    except _NO_BUILDER as error:
        return None, [f"builder {row.builder}: {str(error).splitlines()[0]}"]
    return builder, list(_differences(row, builder.info.features))


def _checked(
    row: Task, data_dir: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """One row of `check`."""
    builder, problems = _compared(row, data_dir)
    sizes: dict[str, int] = {}
    if builder is not None and builder.info.splits:
        sizes, more = _by_metadata(row, builder.info.splits)
        problems += more
    return {
        "task": row.name,
        "ok": not problems,
        "problems": problems,
        "version": builder and str(builder.version),
        "sizes": sizes,
    }


def _differences(row: Task, features: Any) -> Iterator[str]:
    """In what a builder's features are not as the table says."""
    picture = _feature(features, "image")
    if not isinstance(picture, tfds.features.Image):
        yield f"no picture 'image' among the features {_names(features)}"
    elif row.picture not in (None, tuple(picture.shape[:2])):
        yield f"pictures are {tuple(picture.shape[:2])}, not {row.picture}"
    for path, classes in row.features.items():
        feature = _feature(features, path)
        if feature is None:
            yield f"no feature {path!r} among {_names(features)}"
        elif classes is None:
            continue
        elif not isinstance(feature, tfds.features.ClassLabel):
            yield f"{path!r} is no class label but {feature}"
        elif feature.num_classes != classes:
            yield f"{path!r} has {feature.num_classes} classes, not {classes}"
        elif row.first_names:
            first = tuple(feature.names[: len(row.first_names)])
            if first != row.first_names:
                yield f"{path!r} begins with {first}, not {row.first_names}"


def _feature(features: Any, path: str) -> Any:
    """The feature at a path such as "objects/type", or None."""
    for name in path.split("/"):
        try:
            features = features[name]
        except (KeyError, TypeError, AttributeError):
            return None
    return features


def _names(features: Any) -> str:
    return ", ".join(map(repr, features))


def _by_metadata(row: Task, splits: Any) -> tuple[dict[str, int], list[str]]:
    """(pictures for training and for the test, problems) by the metadata."""
    missing = [name for name in row.examples if name not in splits]
    if missing:
        return {}, [f"no split {', '.join(missing)} among {', '.join(splits)}"]
    counts = {name: splits[name].num_examples for name in row.examples}
    problems = [
        f"split {name} has {count} pictures, not {row.examples[name]}"
        for name, count in counts.items()
        if count != row.examples[name]
    ]
    names = row.splits(counts)
    try:
        sizes = {
            "train": splits[names["train800val200"]].num_examples,
            "test": splits[names["test"]].num_examples,
        }
    except ValueError as error:
        return {}, [*problems, str(error)]
    if sizes["train"] != EXAMPLES:
        problems.append(
            f"{sizes['train']} pictures for training, not {EXAMPLES}"
        )
    return sizes, problems
