"""What is downloaded, against what this package and others say of it.

    python -m benchmarks.published --pictures ILSVRC2012/val --output TABLE.md

Needs the internet, and downloads about half a gigabyte into $BIT_TF_CACHE,
$HF_HOME and $TFHUB_CACHE_DIR. Prints a Markdown table, a row a check:

- each file of --weights: its size, arrays and values;
- three logits of google/bit-50 that transformers' own test has;
- Google's TF-Hub modules against this package's models of the same weights;
- top-1 accuracy on a folder of ILSVRC-2012 pictures, if one is given.

A check that fails is a row that says why, and the others go on. Exits with 1
if a row differs from what is expected, or failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import shlex
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from bit_tf import checkpoints, errors, files, images, labels, variants
from bit_tf import published as published_weights
from bit_tf.checkpoints import google_npz, inspection, layout

__all__ = [
    "AS_EXPECTED",
    "DIFFERS",
    "Check",
    "Finding",
    "Once",
    "Row",
    "class_index",
    "compare_logits",
    "compare_outputs",
    "describe_weights",
    "expected_bytes",
    "labelled_pictures",
    "main",
    "run",
    "table",
    "top_1",
    "wilson",
]

Function = Callable[[np.ndarray], np.ndarray]
Value = TypeVar("Value")

AS_EXPECTED = "as expected"
DIFFERS = "differs"

FEATURES = "BiT-M-R50x1"
CLASSIFIER = "BiT-M-R50x1-ILSVRC2012"
PORTED = "google/bit-50"
WEIGHTS = (FEATURES, CLASSIFIER, PORTED)

COCO = "http://images.cocodataset.org/val2017/000000039769.jpg"
# transformers, tests/models/bit/test_modeling_bit.py.
KNOWN_LOGITS = (-0.65258133, -0.52634168, -1.43975902)
# Their test allows 1e-4 of its own pixels; these are resized by this package.
LOGITS_TOLERANCE = 1e-2
PARITY_TOLERANCE = 1e-4

# timm, results of resnetv2_50x1_bit.goog_in21k_ft_in1k at 448 pixels.
TOP_1 = 80.386
# For what another preset than timm's may change.
TOP_1_TOLERANCE = 1.0
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      what: what was looked at.
      expected: what is published of it, and by whom.
      measured: what was found.
      verdict: "as expected", "differs", "not compared: …", "not run: …", or
        "failed: …".
    """

    what: str
    expected: str
    measured: str
    verdict: str

    @property
    def bad(self) -> bool:
        """Whether somebody must look at it."""
        return self.verdict == DIFFERS or self.verdict.startswith("failed")


class Finding(NamedTuple):
    """What a check has measured, and its verdict (see Row)."""

    measured: str
    verdict: str


class Check(NamedTuple):
    """A row before it is measured."""

    what: str
    expected: str
    measure: Callable[[], Finding]


class Once(Generic[Value]):
    """A value that is made when first asked for; a failure is remembered.

    Args:
      make: makes it, or raises BitTfError or OSError.
    """

    def __init__(self, make: Callable[[], Value]):
        self._make = make
        self._values: list[Value] = []
        self._error: Exception | None = None

    def __call__(self) -> Value:
        if self._error is not None:
            raise self._error
        if not self._values:
            try:
                self._values.append(self._make())
            except (errors.BitTfError, OSError) as error:
                self._error = error
                raise
        return self._values[0]


def run(check: Check) -> Row:
    """Measures; what fails on purpose becomes a row too."""
    try:
        found = check.measure()
    except (errors.BitTfError, OSError) as error:
        found = Finding("", f"failed: {type(error).__name__}: {error}")
    return Row(check.what, check.expected, *found)


def verdict(right: bool) -> str:
    """The words of a comparison."""
    return AS_EXPECTED if right else DIFFERS


def expected_bytes(row: variants.Variant) -> tuple[int | None, str]:
    """(bytes of the published .npz or None, where that number comes from)."""
    if row.size is not None:
        return row.size, "published"
    if row.url is None:
        return None, "no size is published"
    arch = variants.architecture(row.architecture)
    shapes = layout.expected_shapes(
        arch.blocks, arch.stem_width, row.num_classes
    )
    return google_npz.file_size(shapes), "inferred from the shapes"


def stored_names(path: pathlib.Path) -> list[str] | None:
    """The arrays' names in an .npz or .safetensors, told without a reader.

    Args:
      path: a file; or a directory, of which all .safetensors are taken.

    Returns:
      The names as the file spells them, or None of another format.
    """
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: list[str] = []
    for part in parts:
        if part.suffix != ".safetensors":
            return None
        with open(part, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found += json.loads(file.read(length))
    return [name for name in found if name != "__metadata__"] or None


def weights_expected(row: variants.Variant) -> str:
    """What `describe_weights` holds a file against."""
    size, source = expected_bytes(row)
    arrays = variants.architecture(row.architecture).count_arrays(
        bool(row.num_classes)
    )
    begin = source if size is None else f"{size} bytes ({source})"
    return f"{begin}; {arrays} arrays, each used once, all finite, no others"


def describe_weights(
    row: variants.Variant, checkpoint: checkpoints.Checkpoint
) -> Finding:
    """Size, SHA-256, names and values of one published file.

    Args:
      row: what it was published as.
      checkpoint: what was downloaded, opened.

    Raises:
      CheckpointFormatError: the file is damaged.
    """
    found = inspection.inspect(checkpoint)
    size, _ = expected_bytes(row)
    arrays = found["arrays"]
    taken = [array["source"] for array in arrays]
    names = stored_names(checkpoint.path)
    once = len(set(taken)) == len(taken) and (
        names is None
        or collections.Counter(names)
        == collections.Counter([*taken, *found["extra"]])
    )
    count = variants.architecture(row.architecture).count_arrays(
        bool(row.num_classes)
    )
    shown = [
        f"{found['bytes']} bytes",
        f"SHA-256 {checkpoint.sha256()}",
        f"{len(arrays)} arrays",
        "each used once" if once else "NOT each used once",
        "all finite" if found["finite"] else "NOT all finite",
        "no others"
        if not found["extra"]
        else f"others: {', '.join(found['extra'])}",
        *checkpoint.notes,
    ]
    right = (
        size in (None, found["bytes"])
        and len(arrays) == count
        and once
        and found["finite"]
        and not found["extra"]
    )
    return Finding("; ".join(shown), verdict(right))


def compare_logits(
    function: Function, image: Any, preset: str | images.Preset = "hf bit-50"
) -> Finding:
    """The first three logits of google/bit-50, against those of transformers.

    Args:
      function: float32 [n, h, w, 3] in [0, 1] → logits float32 [n, classes].
      image: COCO's val2017 picture 000000039769, as images.preprocess takes.
      preset: how it is prepared.

    Raises:
      ImageError: there is no picture to read.
    """
    pixels = images.preprocess(image, preset)
    found = function(pixels[None])[0, : len(KNOWN_LOGITS)]
    error = float(np.abs(found - np.asarray(KNOWN_LOGITS)).max())
    return Finding(
        f"{', '.join(f'{value:.8f}' for value in found)}; largest absolute "
        f"difference {error:.1e}",
        verdict(error <= LOGITS_TOLERANCE),
    )


def compare_outputs(
    ours: Function, theirs: Function, pictures: np.ndarray
) -> Finding:
    """Two models' outputs for the same pictures.

    Args:
      ours: float32 [n, h, w, 3] in [0, 1] → float32 [n, d].
      theirs: the same, and what ours is held against.
      pictures: float32 [n, h, w, 3] in [0, 1].
    """
    found, expected = ours(pictures), theirs(pictures)
    if found.shape != expected.shape:
        return Finding(
            f"shapes {found.shape} here, {expected.shape} there", DIFFERS
        )
    difference = np.linalg.norm(found - expected.astype(np.float64))
    error = float(difference / np.linalg.norm(expected.astype(np.float64)))
    return Finding(
        f"relative error {error:.1e} over {found.shape[0]} × {found.shape[1]}",
        verdict(error <= PARITY_TOLERANCE),
    )


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson's score for a share.

    Args:
      right: how many of n, 0 to n.
      n: 1 or more.

    Returns:
      (low, high), in [0, 1].
    """
    z = 1.959963984540054
    share = right / n
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def class_index(name: str, classes: Sequence[labels.Label]) -> int:
    """The class that a folder's name stands for.

    Args:
      name: a WordNet id such as "n01440764", or a number from 0.
      classes: in the order of the logits.

    Raises:
      UnknownNameError: it is neither.
    """
    by_id = {label.id: index for index, label in enumerate(classes) if label.id}
    if name in by_id:
        return by_id[name]
    if name.isascii() and name.isdigit() and int(name) < len(classes):
        return int(name)
    raise errors.UnknownNameError(
        "A folder of pictures has one folder a class, named by its WordNet id "
        f"such as 'n01440764', or by its index, 0 to {len(classes) - 1}. "
        f"Received: {name!r}. Rename it, or take it out."
    )


def labelled_pictures(
    folder: pathlib.Path, classes: Sequence[labels.Label]
) -> list[tuple[pathlib.Path, int]]:
    """(file, class) of every picture in a folder of class folders, sorted.

    Hidden files and folders are passed over.

    Raises:
      UnknownNameError: a class folder has another name than `class_index`
        knows, or there is no picture.
      OSError: the folder cannot be read.
    """
    found = []
    for part in sorted(folder.iterdir()):
        if part.name.startswith(".") or not part.is_dir():
            continue
        index = class_index(part.name, classes)
        found += [
            (file, index)
            for file in sorted(part.iterdir())
            if file.is_file() and not file.name.startswith(".")
        ]
    if not found:
        raise errors.UnknownNameError(
            "A folder of pictures has one folder a class, with files. "
            f"Received: {str(folder)!r}, without any. Name their parent."
        )
    return found


def top_1(
    function: Function,
    preset: str | images.Preset,
    pictures: Sequence[tuple[pathlib.Path, int]],
    num_classes: int,
) -> Finding:
    """Accuracy on labelled pictures, and how far it can be trusted.

    Compared with the published number only if every class is there.

    Args:
      function: float32 [n, s, s, 3] in [0, 1] → logits [n, num_classes].
      preset: how pictures are prepared; one that gives squares of one size.
      pictures: (file, class), at least one.
      num_classes: how many classes there are.

    Raises:
      ImageError: a file is no picture.
    """
    right = 0
    with tqdm(
        total=len(pictures), unit="picture", disable=None, file=sys.stderr
    ) as progress:
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            batch = np.stack(
                [images.preprocess(path, preset) for path, _ in part]
            )
            best = function(batch).argmax(axis=-1)
            right += int((best == [index for _, index in part]).sum())
            progress.update(len(part))
    n = len(pictures)
    low, high = (100 * bound for bound in wilson(right, n))
    classes = len({index for _, index in pictures})
    words = verdict(
        low - TOP_1_TOLERANCE <= TOP_1 <= high + TOP_1_TOLERANCE,
    )
    if classes < num_classes:
        words = (
            f"not compared: pictures of {classes} of the {num_classes} classes"
        )
    return Finding(
        f"{100 * right / n:.3f} % of n = {n}; 95 % interval (Wilson) "
        f"{low:.3f} to {high:.3f} %, wide where n is small",
        words,
    )


def network(checkpoint: checkpoints.Checkpoint, head: bool) -> Function:
    """This package's model of a checkpoint, as a fast function of arrays.

    Args:
      checkpoint: opened.
      head: whether it returns logits; otherwise features.
    """
    import tensorflow as tf

    from bit_tf import frozen_graph, models

    model = models.from_checkpoint(checkpoint, head=head)
    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    function = frozen_graph.freeze(
        tf.function(lambda x: model(x), autograph=False).get_concrete_function(
            spec
        )
    )
    return lambda pictures: np.asarray(function(tf.constant(pictures)))


def hub_module(handle: str, signature: str, output: str) -> Function:
    """A TF-Hub module, as a function of arrays.

    Args:
      handle: whatever hub.load takes.
      signature, output: used where the module has them; else `__call__`.

    Raises:
      HandleError: there is no such module, or none of pictures.
    """
    import tensorflow as tf

    from bit_tf import hub

    function, _ = hub.picture_function(
        hub.load(handle), signature, output, handle
    )

    def call(pictures: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(function(tf.constant(pictures)))
        except tf.errors.OpError as error:
            raise errors.HandleError(
                f"A module of pictures takes {pictures.shape}. Received from "
                f"{handle!r}: {error}"
            ) from error

    return call


def random_pictures() -> np.ndarray:
    """float32 [2, 224, 224, 3] of noise in [0, 1], the same every time."""
    return np.random.default_rng(0).random((2, 224, 224, 3), np.float32)


def lazily(make: Callable[..., Value], *values: Any) -> Callable[[], Value]:
    """A call whose values are made when it is called, not before.

    Args:
      make: takes the values, each `Once` among them by what it makes.
      *values: what it takes.
    """
    return lambda: make(
        *(value() if isinstance(value, Once) else value for value in values)
    )


def not_run(check: Check, reason: str) -> Check:
    """The same check, which says why it is not run."""
    return check._replace(measure=lambda: Finding("", f"not run: {reason}"))


def plan(args: argparse.Namespace) -> Iterator[Check]:
    """Every check, in the order of the table; see the module's docstring."""
    names = dict.fromkeys(args.weights)
    opened = {
        name: Once(functools.partial(published_weights.open_checkpoint, name))
        for name in {**names, **dict.fromkeys(WEIGHTS)}
    }
    networks: dict[str, Once[Function]] = {
        name: Once(lazily(network, checkpoint, name != FEATURES))
        for name, checkpoint in opened.items()
    }
    coco = Once(lambda: images.decode(args.coco_image))
    for name in names:
        row = variants.variant(name)
        yield Check(
            name,
            weights_expected(row),
            lazily(describe_weights, row, opened[name]),
        )
    for name, check in (
        (PORTED, logits_check(networks[PORTED], coco)),
        *module_checks(networks, args.hub_module, args.hub_classifier, coco),
        *top_1_checks(networks, args.labelled),
    ):
        yield (
            check
            if name in names
            else not_run(check, f"{name} is not among --weights")
        )


def logits_check(function: Once[Function], coco: Once[np.ndarray]) -> Check:
    """google/bit-50 against the logits that transformers' test has."""
    return Check(
        f"{PORTED}: first logits of COCO val2017 000000039769",
        f"{', '.join(map(str, KNOWN_LOGITS))} (transformers), to "
        f"{LOGITS_TOLERANCE:g}, the picture resized by this package",
        lazily(compare_logits, function, coco),
    )


def module_checks(
    networks: Mapping[str, Once[Function]],
    features: str,
    classifier: str,
    coco: Once[np.ndarray],
) -> Iterator[tuple[str, Check]]:
    """(weights, check) of Google's two TF-Hub modules, with two batches."""
    batches = {
        "2 random pictures of 224 pixels": Once(random_pictures),
        "the COCO picture": Once(lambda: images.as_float(coco())[None]),
    }
    for name, handle, signature, output in (
        (FEATURES, features, "image_feature_vector", "features"),
        (CLASSIFIER, classifier, "image_classification", "logits"),
    ):
        module = Once(functools.partial(hub_module, handle, signature, output))
        for text, batch in batches.items():
            yield (
                name,
                Check(
                    f"{handle}: {output} of {text}, against {name}",
                    f"the same, to a relative error of {PARITY_TOLERANCE:g}",
                    lazily(compare_outputs, networks[name], module, batch),
                ),
            )


def top_1_checks(
    networks: Mapping[str, Once[Function]],
    pictures: Sequence[tuple[pathlib.Path, int]] | None,
) -> Iterator[tuple[str, Check]]:
    """(weights, check) of the accuracy of both classifiers."""
    for name in (CLASSIFIER, PORTED):
        row = variants.variant(name)
        check = Check(
            f"{name}: top-1, preset {row.preset!r}",
            f"{TOP_1} % (timm's port at 448 pixels, ILSVRC-2012 validation), "
            f"in the interval widened by {TOP_1_TOLERANCE:g} point for the "
            "preset",
            lazily(
                top_1, networks[name], row.preset, pictures, row.num_classes
            ),
        )
        if pictures is None:
            check = not_run(check, "no folder is given with --pictures")
        yield name, check


def machine() -> str:
    """The processor, its cores, and the operating system."""
    name = platform.processor()
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
                break
    cpu = name or "unknown processor"
    return f"{cpu}, {os.cpu_count()} cores, {platform.platform()}"


def table(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """Markdown: what ran where, then a line a row."""
    lines = [f"- {key}: {_cell(str(value))}" for key, value in facts.items()]
    lines += ["", "| Check | Expected | Measured | Verdict |", "|" + "---|" * 4]
    lines += [
        "| "
        + " | ".join(_cell(text) or "–" for text in dataclasses.astuple(row))
        + " |"
        for row in rows
    ]
    return "".join(f"{line}\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks.

    Returns:
      0, or 1 if a row differs or failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parse(argv)
    if sys.stderr.isatty():
        os.environ.setdefault("TFHUB_DOWNLOAD_PROGRESS", "1")
    rows = []
    # TF-Hub tells its progress on the standard output.
    with contextlib.redirect_stdout(sys.stderr):
        for check in plan(args):
            print(f"{check.what} …", file=sys.stderr)
            rows.append(run(check))
            print(f"  {rows[-1].verdict}", file=sys.stderr)
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.published", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "machine": machine(),
        "versions": _versions(),
    }
    text = table(
        facts
        | {"versions": ", ".join(f"{k} {v}" for k, v in _versions().items())},
        rows,
    )
    print(text, end="")
    if args.output is not None:
        with files.new_file(args.output) as file:
            file.write(text.encode())
    if args.json is not None:
        document = facts | {"rows": [dataclasses.asdict(row) for row in rows]}
        with files.new_file(args.json) as file:
            file.write(
                json.dumps(document, indent=2, ensure_ascii=False).encode()
                + b"\n"
            )
    return int(any(row.bad for row in rows))


def _versions() -> dict[str, str]:
    from hub_export import card

    return card.versions()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, and `labelled`: the pictures of --pictures, or None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=WEIGHTS,
        metavar="NAME",
        help=f"published names (default: {' '.join(WEIGHTS)})",
    )
    parser.add_argument(
        "--pictures",
        type=pathlib.Path,
        metavar="DIR",
        help="one folder a class, named by WordNet id or index",
    )
    parser.add_argument(
        "--hub-module",
        default=variants.variant(FEATURES).feature_handle,
        metavar="HANDLE",
        help=f"features of {FEATURES} (default: %(default)s)",
    )
    parser.add_argument(
        "--hub-classifier",
        default=variants.variant(CLASSIFIER).handle,
        metavar="HANDLE",
        help=f"logits of {CLASSIFIER} (default: %(default)s)",
    )
    parser.add_argument(
        "--coco-image",
        default=COCO,
        metavar="PATH_OR_URL",
        help="val2017/000000039769.jpg (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="TABLE.md",
        help="write the table there too",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        help="write the rows as JSON",
    )
    args = parser.parse_args(argv)
    try:
        for name in args.weights:
            variants.variant(name)
            if os.path.exists(name):
                raise errors.UnknownNameError(
                    "Names of --weights are downloaded. Received: "
                    f"{name!r}, which is also a path here, and would be read "
                    "instead. Run this in another directory."
                )
        args.labelled = args.pictures and labelled_pictures(
            args.pictures, labels.label_set("ilsvrc2012")
        )
        for path in (args.output, args.json):
            if path is not None and not path.parent.is_dir():
                raise FileNotFoundError(f"{path.parent} is not a directory.")
    except (errors.BitTfError, OSError) as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
