"""How good a classifier's outputs are: accuracy, likelihood, calibration.

NumPy alone. Results are numbers that JSON can hold: what cannot be measured,
such as the accuracy of a class without examples, is None and never NaN.

Sources: calibration error, arXiv:1706.04599; Brier score,
doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2; ReaL, arXiv:2006.07159.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "BINS",
    "CONFUSION_LIMIT",
    "Mistake",
    "classification",
    "mistakes",
    "probabilities",
    "real",
]

# Of the expected calibration error.
BINS = 15
# Classes from which on there is no confusion matrix: it would have more than
# four million numbers.
CONFUSION_LIMIT = 2049
_TOP = 5
# Outputs that are float64 at a time.
_CHUNK = 1 << 22


class Mistake(NamedTuple):
    """One example that a classifier gets wrong.

    Attributes:
      example: its index, from 0.
      label: its class.
      predicted: the class with the highest output.
      probability: of `predicted`, in (0, 1].
    """

    example: int
    label: int
    predicted: int
    probability: float


def classification(
    logits: Any,
    labels: Any,
    class_names: Sequence[str],
    *,
    activation: str = "softmax",
) -> dict[str, Any]:
    """Measures outputs for examples of one class each.

    Of equal outputs the first class is the better one, as in
    labels.decode_predictions.

    Args:
      logits: finite [n, classes], n ≥ 1.
      labels: integers [n] in [0, classes).
      class_names: one a class.
      activation: see `probabilities`.

    Returns:
      examples: n.
      top1, top5: shares of examples whose class is the best output, or among
        the five best, in [0, 1]; of fewer than five classes, all are.
      loss: mean negative log-likelihood, in nats.
      calibration: ece, the expected calibration error in [0, 1], over 15 bins
        of equal width; brier, the mean over examples of the sum over classes
        of squared errors, in [0, 2]; bins, for each from (0, 1/15] on its
        examples, their mean confidence (the probability of the best output)
        and their accuracy, which are None where there are none.
      per_class: for each class name, examples, top1 (recall), which is None
        without examples, and precision, None where it was never predicted.
      confusion: [classes][classes] counts of examples, a row a true class and
        a column a prediction; None from CONFUSION_LIMIT classes on.

    Raises:
      ValueError: an argument is not what is said above.
    """
    logits, labels = _checked(logits, labels, class_names)
    examples, classes = logits.shape
    ranks, predicted, confidences, losses, squares = _measured(
        logits, labels, activation
    )
    right = ranks == 0
    support = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[right], minlength=classes)
    chosen = np.bincount(predicted, minlength=classes)
    confusion = None
    if classes < CONFUSION_LIMIT:
        pairs = np.bincount(
            labels * classes + predicted, minlength=classes * classes
        )
        confusion = pairs.reshape(classes, classes).tolist()
    return {
        "examples": examples,
        "top1": float(right.mean()),
        "top5": float((ranks < _TOP).mean()),
        "loss": float(losses.mean()),
        "calibration": {
            **_calibration(confidences, right),
            "brier": float(squares.mean()),
        },
        "per_class": [
            {
                "name": name,
                "examples": int(count),
                "top1": _share(hit, count),
                "precision": _share(hit, times),
            }
            for name, count, hit, times in zip(
                class_names, support, hits, chosen, strict=True
            )
        ],
        "confusion": confusion,
    }


def mistakes(
    logits: Any,
    labels: Any,
    count: int = 25,
    *,
    activation: str = "softmax",
) -> list[Mistake]:
    """The wrong predictions of which the classifier is surest, worst first.

    Args:
      logits, labels, activation: as in `classification`.
      count: how many at most, 0 or more.

    Raises:
      ValueError: an argument is not what is said there.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more. Received: {count}.")
    logits, labels = _checked(logits, labels)
    ranks, predicted, confidences, _, _ = _measured(logits, labels, activation)
    wrong = np.flatnonzero(ranks)
    order = np.argsort(-confidences[wrong], kind="stable")
    return [
        Mistake(
            int(index),
            int(labels[index]),
            int(predicted[index]),
            float(confidences[index]),
        )
        for index in wrong[order][:count]
    ]


def real(
    logits: Any, label_sets: Iterable[Iterable[int]]
) -> dict[str, int | float | None]:
    """ReaL accuracy: a prediction is right if it is in the example's set.

    Args:
      logits: finite [n, classes].
      label_sets: for each of the n examples the classes that are right, in
        [0, classes); those with none are skipped.

    Returns:
      examples: how many have a label; skipped: how many have none; top1: the
      share of `examples` that is right, None if there are none.

    Raises:
      ValueError: an argument is not what is said above.
    """
    logits = _checked_logits(logits)
    sets = [set(np.asarray(list(labels)).tolist()) for labels in label_sets]
    if len(sets) != len(logits):
        raise ValueError(
            f"label_sets must have one set for each of the {len(logits)} rows "
            f"of logits. Received: {len(sets)} sets."
        )
    classes = logits.shape[1]
    for index, labels in enumerate(sets):
        if not all(
            isinstance(label, int) and 0 <= label < classes for label in labels
        ):
            raise ValueError(
                f"Labels are integers from 0 to {classes - 1}. Received for "
                f"example {index}: {sorted(labels, key=str)}."
            )
    predicted = logits.argmax(axis=1).tolist()
    right = [
        choice in labels
        for choice, labels in zip(predicted, sets, strict=True)
        if labels
    ]
    return {
        "examples": len(right),
        "skipped": len(sets) - len(right),
        "top1": _share(sum(right), len(right)),
    }


def probabilities(logits: Any, activation: str = "softmax") -> np.ndarray:
    """What outputs say of one class being right and all others wrong.

    Args:
      logits: finite [n, classes].
      activation: "softmax"; or "sigmoid", for heads that were trained with
        many labels a picture: the logistic functions of the logits, divided by
        their sum, which keeps their order.

    Returns:
      float64 [n, classes]; rows sum to 1.

    Raises:
      ValueError: an argument is not what is said above.
    """
    return np.exp(_log_probabilities(_checked_logits(logits), activation))


def _log_probabilities(logits: np.ndarray, activation: str) -> np.ndarray:
    logits = logits.astype(np.float64)
    if activation == "sigmoid":
        logits = -np.logaddexp(0, -logits)
    elif activation != "softmax":
        raise ValueError(
            "activation must be 'softmax' or 'sigmoid'. Received: "
            f"{activation!r}."
        )
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _measured(
    logits: np.ndarray, labels: np.ndarray, activation: str
) -> tuple[np.ndarray, ...]:
    """Of every example, [n] each.

    Returns:
      The number of classes before the true one; the best class; its
      probability; the negative log-likelihood; the sum of squared errors.
    """
    parts = list(_parts(logits, labels, activation))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _parts(
    logits: np.ndarray, labels: np.ndarray, activation: str
) -> Iterator[tuple[np.ndarray, ...]]:
    size = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), size):
        some, true = logits[start : start + size], labels[start : start + size]
        rows = np.arange(len(some))
        score = some[rows, true][:, None]
        before = np.arange(some.shape[1]) < true[:, None]
        ranks = ((some > score) | ((some == score) & before)).sum(axis=1)
        predicted = some.argmax(axis=1)
        logs = _log_probabilities(some, activation)
        chances = np.exp(logs)
        confidences = chances[rows, predicted]
        chances[rows, true] -= 1
        squares = (chances**2).sum(axis=1)
        yield ranks, predicted, confidences, -logs[rows, true], squares


def _calibration(confidences: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    # Bins are open below and closed above, as in the source.
    bins = np.ceil(confidences * BINS).astype(np.int64) - 1
    bins = np.clip(bins, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, confidences, minlength=BINS)
    hits = np.bincount(bins, right, minlength=BINS)
    return {
        "ece": float(np.abs(sums - hits).sum() / len(confidences)),
        "bins": [
            {
                "examples": int(count),
                "confidence": _share(total, count),
                "accuracy": _share(hit, count),
            }
            for count, total, hit in zip(counts, sums, hits, strict=True)
        ],
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _checked(
    logits: Any, labels: Any, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    logits = _checked_logits(logits)
    examples, classes = logits.shape
    if not examples:
        raise ValueError("One example or more is measured. Received: none.")
    labels = np.asarray(labels)
    if labels.shape != (examples,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers of shape ({examples},), one for each row "
            f"of logits. Received: {labels.dtype} of shape {labels.shape}."
        )
    # Before the cast, in which a large unsigned label would turn negative.
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"Labels are integers from 0 to {classes - 1}, as there are "
            f"{classes} outputs. Received: {labels[wrong[0]]} for example "
            f"{wrong[0]}."
        )
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"class_names must name each of the {classes} classes. Received: "
            f"{len(class_names)} names."
        )
    return logits, labels.astype(np.int64)


def _checked_logits(logits: Any) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(
            "logits must have the shape [examples, classes]. Received: "
            f"{logits.shape}."
        )
    try:
        # Of bfloat16, which is no kind of NumPy's, all values are float32.
        logits = logits.astype(
            np.promote_types(logits.dtype, np.float32), copy=False
        )
    except (TypeError, ValueError):
        logits = logits.astype(object)
    if logits.dtype.kind != "f":
        raise ValueError(
            f"logits must be real numbers. Received: dtype {logits.dtype}."
        )
    # The differences of any two float32 numbers are finite in float64.
    limit = np.finfo(np.float32).max
    rows = np.flatnonzero(~(np.abs(logits) <= limit).all(axis=1))
    if len(rows):
        raise ValueError(
            "logits must be finite. Received: "
            f"{logits[rows[0]][~(np.abs(logits[rows[0]]) <= limit)][0]} for "
            f"example {rows[0]}, and {len(rows)} such examples of "
            f"{len(logits)}. Check the weights, the pictures' range, which is "
            "[0, 1], and the precision that the model computes in."
        )
    return logits
