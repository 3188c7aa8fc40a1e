"""How good features are: a few-shot linear probe, and nearest neighbours.

NumPy alone: features are computed once, by any model.

Sources: google-research/big_vision, evaluators/fewshot_lsr.py (the probe);
arXiv:2104.14294 (the weighted vote of nearest neighbours).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = [
    "BIAS",
    "L2",
    "SEEDS",
    "SHOTS",
    "Ridge",
    "few_shot",
    "nearest_neighbours",
]

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 2.0**10
# The constant feature: so large that the penalty hardly weakens the bias.
BIAS = 100.0
_EPSILON = 1e-5
# Similarities that are held at a time.
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Ridge:
    """A linear classifier by least squares, for any strength of its penalty.

    Features are whitened one by one, (x − mean) / (standard deviation + 1e-5),
    with the training examples' numbers, and get a constant feature BIAS.
    Targets are 1 for the class and −1 for the others. Weights minimize
    ‖X w − y‖² + l2 ‖w‖², in float64.

    Attributes:
      mean, scale: [d] each, of the whitening.
      left: [d + 1, r]; eigenvalues: [r]; right: [r, classes]: the weights of
        a penalty are left · diag(1 / (eigenvalues + l2)) · right. r is the
        smaller of d + 1 and the number of examples.
    """

    mean: np.ndarray
    scale: np.ndarray
    left: np.ndarray
    eigenvalues: np.ndarray
    right: np.ndarray

    @classmethod
    def fit(cls, features: Any, labels: Any, num_classes: int) -> "Ridge":
        """Solves for all penalties at once.

        Args:
          features: finite [n, d], n ≥ 1.
          labels: integers [n] in [0, num_classes).
          num_classes: 1 or more.

        Raises:
          ValueError: an argument is not what is said above.
        """
        features, labels = _checked(features, labels, "train", num_classes)
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        scale = features.std(axis=0) + _EPSILON
        x = _whitened(features, mean, scale)
        y = np.full((len(x), num_classes), -1.0)
        y[np.arange(len(x)), labels] = 1.0
        # Xᵀ(XXᵀ + l2)⁻¹ = (XᵀX + l2)⁻¹Xᵀ: the smaller matrix is decomposed.
        if len(x) < x.shape[1]:
            values, vectors = np.linalg.eigh(x @ x.T)
            left, right = x.T @ vectors, vectors.T @ y
        else:
            values, left = np.linalg.eigh(x.T @ x)
            right = left.T @ (x.T @ y)
        # Of these matrices none is negative, but for rounding.
        return cls(mean, scale, left, np.maximum(values, 0.0), right)

    def weights(self, l2: float = L2) -> np.ndarray:
        """float64 [d + 1, classes]; the last row is the constant feature's.

        Raises:
          ValueError: l2 is no positive number.
        """
        if not 0 < l2 < np.inf:
            raise ValueError(f"l2 is a positive number. Received: {l2!r}.")
        return (self.left / (self.eigenvalues + l2)) @ self.right

    def scores(self, features: Any, l2: float = L2) -> np.ndarray:
        """[n, d] → float64 [n, classes]; the highest is the prediction.

        Raises:
          ValueError: the features are of another length, or l2 is no positive
            number.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"Features have the shape [n, {len(self.mean)}], as in "
                f"training. Received: {features.shape}."
            )
        weights = self.weights(l2)
        size = max(1, _CHUNK // len(weights))
        parts = [
            _whitened(features[start : start + size], self.mean, self.scale)
            @ weights
            for start in range(0, len(features), size)
        ]
        return np.concatenate([np.empty((0, weights.shape[1])), *parts])


def few_shot(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    *,
    num_classes: int,
    subset: Callable[[int, int], Any],
    shots: Iterable[int] = SHOTS,
    seeds: Iterable[int] = SEEDS,
    l2: float | Iterable[float] = L2,
) -> list[dict[str, Any]]:
    """Accuracy of `Ridge` on a few examples a class, over several subsets.

    Of several penalties, each subset takes the one that is the most accurate
    on the training examples outside of it, the larger one of equals; test
    examples choose nothing.

    Args:
      train_features: [n, d]; train_labels: integers [n].
      test_features: [m, d], m ≥ 1; test_labels: integers [m].
      num_classes: labels are in [0, num_classes).
      subset: (examples a class, seed) → indices of training examples.
      shots: examples a class.
      seeds: of subsets.
      l2: the penalty, or several.

    Returns:
      For each of `shots`: examples_per_class; min, median and max of the
      accuracy in [0, 1]; runs, for each seed its top1 and l2; and
      l2_chosen_on, "training examples outside the subset", or None if there
      was one penalty.

    Raises:
      ValueError: an argument is not what is said above, or several penalties
        are given and a subset leaves no training examples.
      and what `subset` raises.
    """
    train, labels = _checked(train_features, train_labels, "train", num_classes)
    test, true = _checked(test_features, test_labels, "test", num_classes)
    penalties = _penalties(l2)
    shots, seeds = list(shots), list(seeds)
    if not shots or not seeds:
        raise ValueError(
            "shots and seeds have one number or more. Received: "
            f"shots={shots}, seeds={seeds}."
        )
    rows = []
    for count in shots:
        runs = []
        for seed in seeds:
            chosen = np.asarray(subset(count, seed))
            model = Ridge.fit(train[chosen], labels[chosen], num_classes)
            penalty = penalties[0]
            if len(penalties) > 1:
                rest = np.setdiff1d(np.arange(len(train)), chosen)
                if not len(rest):
                    raise ValueError(
                        "Of several penalties the best is told by training "
                        f"examples outside the subset. Received: {count} a "
                        "class, which are all. Give one penalty."
                    )
                # The first of equals is the strongest.
                penalty = max(
                    sorted(penalties, reverse=True),
                    key=lambda l2: _accuracy(
                        model.scores(train[rest], l2), labels[rest]
                    ),
                )
            top1 = _accuracy(model.scores(test, penalty), true)
            runs.append({"seed": int(seed), "top1": top1, "l2": penalty})
        accuracies = [run["top1"] for run in runs]
        rows.append(
            {
                "examples_per_class": int(count),
                "min": min(accuracies),
                "median": float(np.median(accuracies)),
                "max": max(accuracies),
                "runs": runs,
                "l2_chosen_on": "training examples outside the subset"
                if len(penalties) > 1
                else None,
            }
        )
    return rows


def nearest_neighbours(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    *,
    num_classes: int,
    k: int | Iterable[int] = (1, 5, 20),
    temperature: float | None = None,
) -> list[dict[str, Any]]:
    """Accuracy of a vote of the k nearest training examples.

    Near is what has a high cosine similarity; of equally near examples the
    first, and of classes with as many votes the first. Similarities are held
    for a part of the test examples at a time.

    Args:
      train_features: [n, d]; train_labels: integers [n].
      test_features: [m, d], m ≥ 1; test_labels: integers [m].
      num_classes: labels are in [0, num_classes).
      k: neighbours that vote, or several such numbers, of 1 to n.
      temperature: neighbours' votes weigh exp(similarity / temperature), as in
        the source, whose temperature is 0.07; None gives each the same.

    Returns:
      For each of k: k, and top1, the accuracy in [0, 1].

    Raises:
      ValueError: an argument is not what is said above.
    """
    train, labels = _checked(train_features, train_labels, "train", num_classes)
    test, true = _checked(test_features, test_labels, "test", num_classes)
    counts = [k] if isinstance(k, (int, np.integer)) else list(k)
    if not counts or not all(1 <= count <= len(train) for count in counts):
        raise ValueError(
            f"k is from 1 to {len(train)}, the number of training examples. "
            f"Received: {counts}."
        )
    if temperature is not None and not 0 < temperature < np.inf:
        raise ValueError(
            f"The temperature is a positive number. Received: {temperature!r}."
        )
    if test.shape[1] != train.shape[1]:
        raise ValueError(
            "Features of training and test examples have the same length. "
            f"Received: {train.shape[1]} and {test.shape[1]}."
        )
    directions = _unit(train).T
    right = dict.fromkeys(counts, 0)
    size = max(1, _CHUNK // max(len(train), num_classes))
    for start in range(0, len(test), size):
        some = slice(start, start + size)
        similar = _unit(test[some]) @ directions
        nearest, values = _largest(similar, max(counts))
        votes = np.ones_like(values, dtype=np.float64)
        if temperature is not None:
            # As all weights of an example may be divided by one number.
            votes = np.exp((values - values[:, :1]) / temperature)
        for count in right:
            totals = _votes(
                labels[nearest[:, :count]], votes[:, :count], num_classes
            )
            right[count] += int((totals.argmax(axis=1) == true[some]).sum())
    return [{"k": int(n), "top1": right[n] / len(test)} for n in counts]


def _largest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of each row's largest, from the largest on.

    Of equals the first come first, as in a stable sort.
    """
    if count < values.shape[1]:
        limits = np.partition(values, -count, axis=1)[:, -count, None]
        above, equal = values > limits, values == limits
        room = count - above.sum(axis=1, keepdims=True)
        chosen = above | (equal & (equal.cumsum(axis=1) <= room))
        indices = np.nonzero(chosen)[1].reshape(len(values), count)
    else:
        indices = np.broadcast_to(np.arange(count), values.shape)
    found = np.take_along_axis(values, indices, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    return (
        np.take_along_axis(indices, order, axis=1),
        np.take_along_axis(found, order, axis=1),
    )


def _votes(
    classes: np.ndarray, weights: np.ndarray, num_classes: int
) -> np.ndarray:
    """The sum of votes for each class, [m, num_classes]."""
    rows = np.arange(len(classes))[:, None] * num_classes
    totals = np.bincount(
        (rows + classes).ravel(),
        weights.ravel(),
        minlength=len(classes) * num_classes,
    )
    return totals.reshape(len(classes), num_classes)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of zeros stay."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms > 0, norms, 1)


def _whitened(
    features: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    x = (features - mean) / scale
    return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def _penalties(l2: float | Iterable[float]) -> list[float]:
    given = list(l2) if isinstance(l2, Iterable) else [l2]
    try:
        penalties = [float(value) for value in given]
    except (TypeError, ValueError):
        penalties = []
    if not penalties or not all(0 < value < np.inf for value in penalties):
        raise ValueError(
            f"l2 is a positive number, or several. Received: {l2!r}."
        )
    return penalties


def _checked(
    features: Any, labels: Any, what: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(
            f"{what}_features are floats of shape [examples, dimensions], one "
            f"or more of both. Received: {features.dtype} of shape "
            f"{features.shape}."
        )
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{what}_labels are integers of shape ({len(features)},), one for "
            f"each row of features. Received: {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(
            f"{what}_labels are from 0 to {num_classes - 1}. Received: from "
            f"{labels.min()} to {labels.max()}."
        )
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        raise ValueError(
            f"{what}_features are finite. Received: {len(rows)} rows with "
            f"another number, the first of index {rows[0]}. Check the weights, "
            "and the precision that the model computes in."
        )
    return features, labels.astype(np.int64)
