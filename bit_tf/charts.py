"""Charts of training and of evaluation, as PNG files.

They need matplotlib (extra "plot"). Nothing global of matplotlib is used or
changed, so that charts can be drawn in any thread and beside other figures.
Colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

import contextlib
import functools
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bit_tf import errors, files, images

__all__ = [
    "confusion_matrix",
    "learning_curves",
    "mistakes",
    "reliability",
    "require",
]

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_EMPTY = "#E8E8E8"
_DPI = 144
# Classes up to which a cell has its count, and up to which it has a name.
_COUNTED, _NAMED = 20, 120
_LARGEST = 24.0
_THUMBNAIL = 256
# Fonts with the letters of many scripts, where they are installed.
_FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Segoe UI",
)


def require() -> None:
    """Asks for matplotlib, before the work whose result is to be drawn.

    Raises:
      MissingExtraError: it is not installed.
    """
    errors.import_extra("matplotlib.figure", "plot")


def learning_curves(
    rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]
) -> None:
    """Draws loss, accuracy and learning rate over the steps of training.

    Args:
      rows: each with `step`; `loss`, `learning_rate` and `validation_top1` in
        [0, 1] where they were measured. Those that are not finite are left
        out.
      path: of the PNG file.

    Raises:
      ValueError: there is nothing to draw.
      MissingExtraError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    rows = list(rows)
    panels = [
        ("loss", "Loss (nats)", _BLUE, 1.0),
        ("validation_top1", "Validation accuracy (%)", _GREEN, 100.0),
        ("learning_rate", "Learning rate", _ORANGE, 1.0),
    ]
    curves = {key: _curve(rows, key) for key, *_ in panels}
    panels = [panel for panel in panels if len(curves[panel[0]][0])]
    if not panels:
        raise ValueError(
            "Learning curves need a row with a step and a finite loss, "
            f"validation_top1 or learning_rate. Received: {len(rows)} rows."
        )
    with _figure(path, 8.0, 1.0 + 2.2 * len(panels)) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axis, (key, title, colour, scale) in zip(
            axes[:, 0], panels, strict=True
        ):
            steps, values = curves[key]
            few = len(steps) <= 60
            smooth = _smoothed(values) if key == "loss" and not few else None
            axis.plot(
                steps,
                values * scale,
                color=colour,
                linewidth=1.5 if smooth is None else 0.8,
                alpha=1.0 if smooth is None else 0.35,
                marker="o" if few else None,
                markersize=3.5,
                label="each step",
            )
            if smooth is not None:
                axis.plot(
                    steps, smooth, color=colour, linewidth=1.8, label="smoothed"
                )
                axis.legend(frameon=False, fontsize=8)
            axis.set_ylabel(title)
            if key != "validation_top1":
                axis.set_ylim(bottom=0)
            else:
                _mark_best(axis, steps, values * scale)
            _tidy(axis)
        ticker = errors.import_extra("matplotlib.ticker", "plot")
        axes[-1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes[-1, 0].set_xlabel("Step")
        figure.suptitle("Learning curves")


def confusion_matrix(
    matrix: Any, class_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draws which classes are taken for which.

    Colours are shares of the true class: each row is divided by its sum. With
    many classes they follow a square root, so that rare confusions are seen.

    Args:
      matrix: counts [classes][classes], a row a true class and a column a
        prediction.
      class_names: one a class.
      path: of the PNG file.

    Raises:
      ValueError: the matrix is not square, or has negative numbers or no
        rows, or the names do not fit.
      MissingExtraError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    counts = np.asarray(matrix)
    classes = len(counts)
    if (
        not classes
        or counts.shape != (classes, classes)
        or counts.dtype.kind not in "iuf"
        or not (counts >= 0).all()
        or len(class_names) != classes
    ):
        raise ValueError(
            "A confusion matrix has a row and a column of counts for every "
            f"class name. Received: {counts.dtype} of shape {counts.shape} "
            f"and {len(class_names)} names."
        )
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(
        np.broadcast_to(sums == 0, counts.shape), counts / np.maximum(sums, 1)
    )
    few, named = classes <= _COUNTED, classes <= _NAMED
    # Inches a class: enough for a number, or for a line of small letters.
    side = classes * (0.55 if few else 0.14)
    side = min(max(side, 2.6), _LARGEST - 4)
    longest = 28 if few else 22
    names = [_short(name, longest) for name in class_names]
    margin = 0.095 * max(map(_width, names)) if named else 0.6
    with _figure(path, side + margin + 1.9, side + margin + 1.1) as figure:
        axis = figure.add_subplot()
        colours = errors.import_extra("matplotlib.colors", "plot")
        maps = errors.import_extra("matplotlib", "plot").colormaps
        gamma = 1.0 if few else 0.5
        drawn = axis.imshow(
            shares,
            cmap=maps["Blues"].with_extremes(bad=_EMPTY),
            norm=colours.PowerNorm(gamma, 0.0, 1.0),
            interpolation="none" if classes <= 400 else "antialiased",
        )
        axis.set_xlabel("Predicted class")
        axis.set_ylabel("True class")
        if named:
            size = 9 if few else 6.5
            axis.set_xticks(range(classes))
            axis.set_yticks(range(classes))
            axis.set_xticklabels(
                names, rotation=90, fontsize=size, parse_math=False
            )
            axis.set_yticklabels(names, fontsize=size, parse_math=False)
        else:
            axis.set_xlabel("Predicted class (number)")
            axis.set_ylabel("True class (number)")
        axis.tick_params(length=2)
        if few:
            _write_counts(axis, counts, shares)
        bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.02)
        bar.set_label(
            "Share of the true class" + ("" if few else " (square-root scale)")
        )
        if not few:
            bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
        bar.ax.yaxis.set_major_formatter(_percent())
        total = int(counts.sum())
        share = np.trace(counts) / total if total else math.nan
        text = f"Confusion matrix: {total} examples"
        if total:
            text += f", {share:.1%} on the diagonal"
        axis.set_title(text)


def reliability(
    calibration: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Draws accuracy over confidence, and how often each confidence occurs.

    Args:
      calibration: that of metrics.classification.
      path: of the PNG file.

    Raises:
      MissingExtraError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    bins = calibration["bins"]
    edges = np.linspace(0, 1, len(bins) + 1)
    counts = np.asarray([row["examples"] for row in bins], np.float64)
    full = np.flatnonzero(counts)
    accuracy = np.asarray([bins[i]["accuracy"] for i in full])
    confidence = np.asarray([bins[i]["confidence"] for i in full])
    width = edges[1]
    with _figure(path, 5.6, 6.6) as figure:
        grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
        upper = figure.add_subplot(grid[0])
        upper.bar(
            edges[full],
            accuracy,
            width,
            align="edge",
            color=_BLUE,
            edgecolor="white",
            label="Accuracy of the bin",
        )
        upper.plot(
            [0, 1],
            [0, 1],
            color=_GREY,
            linestyle="--",
            linewidth=1.2,
            label="As confident as accurate",
        )
        upper.vlines(
            confidence,
            np.minimum(accuracy, confidence),
            np.maximum(accuracy, confidence),
            color=_ORANGE,
            linewidth=2.2,
            label="Gap to the mean confidence",
        )
        upper.set_ylabel("Accuracy (share of examples)")
        upper.set_ylim(0, 1)
        upper.legend(frameon=False, fontsize=8, loc="upper left")
        upper.set_title(
            f"Reliability: calibration error {calibration['ece']:.3f}, Brier "
            f"score {calibration['brier']:.3f}",
            fontsize=11,
        )
        lower = figure.add_subplot(grid[1], sharex=upper)
        lower.bar(
            edges[:-1],
            counts / max(counts.sum(), 1),
            width,
            align="edge",
            color=_GREEN,
            edgecolor="white",
        )
        lower.set_ylabel("Examples")
        lower.yaxis.set_major_formatter(_percent())
        lower.set_xlabel("Confidence (probability of the predicted class)")
        lower.set_xlim(0, 1)
        upper.tick_params(labelbottom=False)
        for axis in (upper, lower):
            _tidy(axis)


def mistakes(
    items: Iterable[tuple[np.ndarray, str, str, float, str]],
    path: str | os.PathLike[str],
) -> None:
    """Draws pictures that a classifier got wrong, on one sheet.

    Args:
      items: of (picture, true class, predicted class, probability of the
        predicted class, identifier); pictures are uint8 [h, w, 3] in
        [0, 255], or floats in [0, 1].
      path: of the PNG file.

    Raises:
      ImageRangeError: a picture is not what is said above.
      MissingExtraError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    items = list(items)
    columns = max(1, min(5, len(items)))
    lines = math.ceil(len(items) / columns)
    with _figure(
        path, max(4.5, 2.3 * columns), 0.6 + 3.0 * max(lines, 0.4)
    ) as figure:
        figure.suptitle(
            "Mistakes, the surest first: true class → predicted class "
            "(probability)"
            if columns > 2
            else "Mistakes: true → predicted (probability)",
            fontsize=11,
        )
        if not items:
            figure.text(0.5, 0.4, "There are none.", ha="center", fontsize=11)
            return
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, item in zip(axes, items, strict=False):
            picture, true, predicted, probability, identifier = item
            axis.imshow(
                images.as_float(_thumbnail(picture)), interpolation="nearest"
            )
            axis.set_title(
                _caption(true, predicted, probability),
                fontsize=8,
                parse_math=False,
            )
            axis.text(
                0.5,
                -0.03,
                _short(identifier, 32, end=True),
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=6,
                color=_GREY,
                parse_math=False,
            )


@contextlib.contextmanager
def _figure(
    path: str | os.PathLike[str], width: float, height: float
) -> Iterator[Any]:
    """A figure to draw on, which is at `path` when the block succeeds."""
    errors.import_extra("matplotlib", "plot")
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="w"
    )
    canvas = backend_agg.FigureCanvasAgg(figure)
    yield figure
    families = [name for name, _ in _fonts()]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    with files.new_file(path) as file:
        canvas.print_figure(
            file, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.12
        )


@functools.cache
def _fonts() -> tuple[tuple[str, frozenset[int]], ...]:
    """(family, code points) of fonts: matplotlib's own first."""
    from matplotlib import font_manager, ft2font

    own = "DejaVu Sans"
    paths = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    found = []
    for name in (own, *_FONTS):
        if name in paths:
            # One that was removed since the list was made.
            with contextlib.suppress(OSError, RuntimeError):
                letters = ft2font.FT2Font(paths[name]).get_charmap()
                found.append((name, frozenset(letters)))
    return tuple(found)


def _caption(true: str, predicted: str, probability: float) -> str:
    """One line, or two of long names, from left to right in every script."""
    mark = "\N{LEFT-TO-RIGHT MARK}"
    before = f"{mark}{_short(true, 24)}{mark}"
    after = f"{mark}→ {_short(predicted, 18)}{mark} ({probability:.2f})"
    return f"{before}{' ' if _width(before + after) < 30 else chr(10)}{after}"


def _short(text: str, longest: int, end: bool = False) -> str:
    """One line of letters that the fonts have, cut to so many columns.

    Args:
      text: any.
      longest: columns; letters of East Asia take two.
      end: whether the end is kept, not the beginning.
    """
    known: frozenset[int] = frozenset().union(*(have for _, have in _fonts()))
    text = " ".join(unicodedata.normalize("NFC", text).split())
    letters = [
        letter if ord(letter) in known else "\N{WHITE SQUARE}"
        for letter in text
        if unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
    ]
    if _width(letters) <= longest:
        return "".join(letters)
    while _width(letters) > longest - 1:
        letters.pop(0 if end else -1)
    cut = "".join(letters)
    return f"…{cut.lstrip()}" if end else f"{cut.rstrip()}…"


def _width(text: Iterable[str]) -> int:
    """Columns of a text."""
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _curve(
    rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of what some rows have."""
    pairs = [
        (row["step"], float(row[key]))
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of a window around each value, one-sided at both ends."""
    reach = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - reach, 0)
    high = np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _mark_best(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    best = int(values.argmax())
    axis.set_title(
        f"best {values[best]:.1f}% at step {steps[best]}, "
        f"last {values[-1]:.1f}%",
        fontsize=8,
        color=_GREY,
        loc="right",
    )


def _write_counts(axis: Any, counts: np.ndarray, shares: Any) -> None:
    whole = counts.dtype.kind in "iu" or (counts == np.floor(counts)).all()
    for row, column in np.argwhere(counts > 0):
        value = counts[row, column]
        text = f"{int(value)}" if whole else f"{value:.3g}"
        axis.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=9 if len(text) < 5 else 7,
            color="white" if shares[row, column] > 0.55 else "black",
        )


def _percent() -> Any:
    ticker = errors.import_extra("matplotlib.ticker", "plot")
    return ticker.PercentFormatter(1.0)


def _tidy(axis: Any) -> None:
    axis.grid(True, color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """A picture whose longer side is at most that of a thumbnail."""
    picture = np.asarray(picture)
    height, width = picture.shape[:2]
    longer = max(height, width)
    if longer <= _THUMBNAIL:
        return picture
    return images.resize(
        picture,
        max(1, round(height * _THUMBNAIL / longer)),
        max(1, round(width * _THUMBNAIL / longer)),
        antialias=True,
    )
