"""Charts are whole PNG files that show what they should."""

import concurrent.futures
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import charts, errors, metrics

# Some that mathtext would read as formulas, and one in no font of Latin.
SLOW = pytest.mark.slow
NAMES = [
    "cat",
    "dog $x^2$",
    r"Rosé $\no$",
    "цветок",
    "زهرة",
    "木蓮",
    "a\nb\x07",
    "",
]


def pixels(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def count(picture, colour, tolerance=12):
    """Pixels of a colour such as "#0072B2"."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - wanted).max(axis=2) <= tolerance).sum())


def training(steps, every=0):
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 3.0 / step, "learning_rate": 0.003}
        if every and step % every == 0:
            row["validation_top1"] = 1 - 1 / step
        yield row


def report(classes, examples=200):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, examples)
    logits = rng.normal(size=(examples, classes))
    logits[np.arange(examples), labels] += 3
    names = [f"class {index}" for index in range(classes)]
    return metrics.classification(logits, labels, names), names


def items(number):
    return [
        (
            helpers.random_images(1, *((40, 40), (20, 60), (600, 90))[i % 3])[
                0
            ],
            NAMES[i % 8],
            NAMES[(i + 1) % 8],
            1 - i / 40,
            f"folder/of/pictures/{NAMES[i % 8]}/image_{i:04}.png",
        )
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("rows", "has_accuracy"),
    [
        (training(1), False),
        (training(90, every=30), True),
        ([{"step": 1, "loss": 2.0, "validation_top1": None}], False),
        ([{"step": 1, "loss": np.nan}, {"step": 2, "loss": 1.0}], False),
    ],
    ids=["one step", "long", "loss alone", "a loss that is NaN"],
)
def test_learning_curves(tmp_path, rows, has_accuracy):
    charts.learning_curves(rows, tmp_path / "curves.png")
    picture = pixels(tmp_path / "curves.png")
    assert count(picture, "#0072B2") > 20
    assert (count(picture, "#009E73") > 20) == has_accuracy


def test_learning_curves_of_nothing(tmp_path):
    for rows in ([], [{"step": 1, "loss": np.inf}]):
        with pytest.raises(ValueError, match=f"Received: {len(rows)} rows"):
            charts.learning_curves(rows, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_smoothing_keeps_constants_and_means():
    values = np.full(300, 2.5)
    np.testing.assert_allclose(charts._smoothed(values), values)
    noise = np.random.default_rng(0).normal(size=600)
    smooth = charts._smoothed(noise)
    assert smooth.std() < 0.4
    assert smooth[300] == pytest.approx(noise[290:311].mean())


@pytest.mark.parametrize("classes", [2, pytest.param(130, marks=SLOW)])
def test_confusion_matrix(tmp_path, classes):
    found, names = report(classes)
    charts.confusion_matrix(found["confusion"], names, tmp_path / "matrix.png")
    picture = pixels(tmp_path / "matrix.png")
    assert max(picture.shape) <= 24 * 144
    # The darkest blue of a diagonal.
    assert count(picture, "#08306B", 60) > 500


def test_rows_without_examples_are_grey(tmp_path):
    for matrix, grey in (([[3, 1], [1, 3]], False), ([[3, 1], [0, 0]], True)):
        charts.confusion_matrix(matrix, ["a", "b"], tmp_path / "matrix.png")
        picture = pixels(tmp_path / "matrix.png")
        assert (count(picture, "#E8E8E8", 0) > 10_000) == grey


@pytest.mark.parametrize("classes", [30, pytest.param(102, marks=SLOW)])
def test_names_of_many_classes_can_be_read(tmp_path, classes):
    """A line of letters a class: neighbouring names do not overlap."""
    found, names = report(classes, 500)
    charts.confusion_matrix(found["confusion"], names, tmp_path / "matrix.png")
    picture = pixels(tmp_path / "matrix.png")
    dark = picture.max(axis=2) < 110
    # The matrix' left side; names end a little before it.
    side = np.flatnonzero(dark.mean(axis=0) > 0.5)[0]
    rows = dark[:, side - 70 : side - 10].any(axis=1)
    starts = np.count_nonzero(rows[1:] & ~rows[:-1])
    assert classes <= starts <= classes + 4


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        ([], []),
        ([[1, 2]], ["a"]),
        ([[1, 2], [3, 4]], ["a"]),
        ([[1, -2], [3, 4]], ["a", "b"]),
        ([["a", "b"], ["c", "d"]], ["a", "b"]),
        ([[1, np.nan], [3, 4]], ["a", "b"]),
    ],
)
def test_no_confusion_matrix(tmp_path, matrix, names):
    with pytest.raises(ValueError, match="a row and a column"):
        charts.confusion_matrix(matrix, names, tmp_path / "matrix.png")


def test_reliability(tmp_path):
    found, _ = report(8)
    charts.reliability(found["calibration"], tmp_path / "reliability.png")
    picture = pixels(tmp_path / "reliability.png")
    for colour in ("#0072B2", "#D55E00", "#009E73"):
        assert count(picture, colour) > 200


@pytest.mark.parametrize("number", [0, 1, 7])
def test_mistakes(tmp_path, number):
    charts.mistakes(items(number), tmp_path / "mistakes.png")
    picture = pixels(tmp_path / "mistakes.png")
    colourful = np.ptp(picture, axis=2) > 60
    assert (colourful.sum() > 1000 * number) == (number > 0)


def test_float_pictures_and_bad_ones(tmp_path):
    path = tmp_path / "mistakes.png"
    picture = np.zeros((300, 300, 3), np.float32)
    picture[..., 0] = 1
    charts.mistakes([(picture, "a", "b", 0.5, "x")], path)
    before = path.read_bytes()
    assert count(pixels(path), "#FF0000", 2) > 10_000
    with pytest.raises(errors.ImageRangeError):
        charts.mistakes([(picture * 255, "a", "b", 0.5, "x")], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names_in_every_script(tmp_path):
    """No formulas, no warnings of missing glyphs, no broken lines."""
    charts.confusion_matrix(np.eye(8, dtype=int), NAMES, tmp_path / "m.png")
    charts.mistakes(items(6), tmp_path / "s.png")


def test_long_names_are_cut():
    assert charts._short("a b\n c\x00", 10) == "a b c"
    assert charts._short("x" * 50, 10) == "x" * 9 + "…"
    assert charts._short("folder/name.png", 9, end=True) == "…name.png"
    wide = charts._short("木" * 50, 10)
    assert charts._width(wide[:-1]) <= 9
    caption = charts._caption("x" * 80, "y" * 80, 0.5)
    assert max(map(len, caption.split("\n"))) < 36


def test_threads_and_settings_of_others(tmp_path):
    import matplotlib

    def draw(number):
        path = tmp_path / f"{number}.png"
        charts.learning_curves(training(30), path)
        return path.read_bytes()

    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            drawn = list(pool.map(draw, range(3)))
        assert dict(matplotlib.rcParams) == before
    assert len(set(drawn)) == 1


def test_no_global_figures(tmp_path):
    code = (
        "import sys\n"
        "from bit_tf import charts\n"
        "assert 'matplotlib' not in sys.modules\n"
        "charts.learning_curves([{'step': 1, 'loss': 1.0}], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "curves.png"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "curves.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[plot\]"):
        charts.require()
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[plot\]"):
        charts.mistakes([], tmp_path / "mistakes.png")


def test_what_was_there_stays_if_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        charts.learning_curves(training(3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
