"""Accuracy, likelihood and calibration, by hand and beside scikit-learn."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from sklearn import metrics as sklearn

from bit_tf import labels as label_sets
from bit_tf import metrics

NAMES = list("abcdefgh")


def random(seed=0, examples=300, classes=8):
    """Logits that are right for about half of the examples, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    logits = rng.normal(size=(examples, classes))
    logits[np.arange(examples), labels] += 1.5
    return logits.astype(np.float32), labels


def strict(report):
    return json.loads(json.dumps(report, allow_nan=False))


def test_agrees_with_scikit_learn():
    logits, labels = random()
    found = strict(metrics.classification(logits, labels, NAMES))
    chances = metrics.probabilities(logits)
    every = np.arange(8)
    predicted = logits.argmax(axis=1)
    assert found["examples"] == 300
    for key, k in (("top1", 1), ("top5", 5)):
        expected = sklearn.top_k_accuracy_score(
            labels, logits, k=k, labels=every
        )
        assert found[key] == pytest.approx(expected, abs=1e-12)
    expected = sklearn.log_loss(labels, chances, labels=every)
    assert found["loss"] == pytest.approx(expected, abs=1e-9)
    expected = sklearn.confusion_matrix(labels, predicted, labels=every)
    assert found["confusion"] == expected.tolist()
    precision, recall, _, support = sklearn.precision_recall_fscore_support(
        labels, predicted, labels=every
    )
    for index, row in enumerate(found["per_class"]):
        assert row["name"] == NAMES[index]
        assert row["examples"] == support[index]
        assert row["top1"] == pytest.approx(recall[index])
        assert row["precision"] == pytest.approx(precision[index])
    one_hot = np.eye(8)[labels]
    assert found["calibration"]["brier"] == pytest.approx(
        np.square(chances - one_hot).sum(axis=1).mean()
    )


def test_by_hand():
    # Probabilities 0.9 (right), 0.6 (wrong), 0.6 (right) of two classes.
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    found = metrics.classification(logits, [0, 1, 1], ["no", "yes"])
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["top5"] == 1
    assert found["loss"] == pytest.approx(
        -(math.log(0.9) + math.log(0.4) + math.log(0.6)) / 3
    )
    calibration = found["calibration"]
    # 0.6 is the upper edge of the ninth bin, or by rounding in the tenth.
    nine, ten = calibration["bins"][8:10]
    assert nine["examples"] + ten["examples"] == 2
    assert calibration["bins"][13] == {
        "examples": 1,
        "confidence": pytest.approx(0.9),
        "accuracy": 1.0,
    }
    assert calibration["bins"][0] == {
        "examples": 0,
        "confidence": None,
        "accuracy": None,
    }
    assert calibration["brier"] == pytest.approx(
        (2 * 0.01 + 2 * 0.36 + 2 * 0.16) / 3
    )
    assert found["confusion"] == [[1, 0], [1, 1]]
    assert found["per_class"] == [
        {"name": "no", "examples": 1, "top1": 1.0, "precision": 0.5},
        {"name": "yes", "examples": 2, "top1": 0.5, "precision": 1.0},
    ]


def test_calibration_error_by_hand():
    # Ten examples of confidence 0.7, of which seven, then four, are right.
    logits = np.log([[0.7, 0.3]] * 10)
    for right, error in ((7, 0.0), (4, 0.3)):
        labels = [0] * right + [1] * (10 - right)
        found = metrics.classification(logits, labels, ["a", "b"])
        assert found["calibration"]["ece"] == pytest.approx(error)
        (full,) = [b for b in found["calibration"]["bins"] if b["examples"]]
        assert full["accuracy"] == pytest.approx(right / 10)
        assert found["calibration"]["bins"].index(full) == 10


@pytest.mark.parametrize("edge", range(1, 16))
def test_bins_are_closed_above(edge):
    confidences = np.array([edge / 15 - 1e-9, min(edge / 15 + 1e-9, 1.0)])
    bins = metrics._calibration(confidences, np.array([True, False]))["bins"]
    assert len(bins) == metrics.BINS == 15
    assert bins[edge - 1]["examples"] == (2 if edge == 15 else 1)


def test_an_edge_is_in_the_bin_below():
    bins = metrics._calibration(np.array([1 / 3]), np.array([True]))["bins"]
    assert [row["examples"] for row in bins[3:7]] == [0, 1, 0, 0]


def test_perfect_and_hopeless():
    logits = np.eye(8) * 200
    found = metrics.classification(logits, np.arange(8), NAMES)
    assert (found["top1"], found["top5"], found["loss"]) == (1, 1, 0)
    assert found["calibration"]["ece"] == 0
    # Far beyond what exp can hold.
    found = metrics.classification(-logits * 1e30, np.arange(8), NAMES)
    assert found["top1"] == 0
    assert found["loss"] == pytest.approx(2e32, rel=1e-6)
    strict(found)


def test_ties_go_to_the_first_class_as_in_decode_predictions():
    logits = np.array([[1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    order = [
        int(name)
        for _, name, _ in label_sets.decode_predictions(
            logits, top=8, labels=list("01234567")
        )[0]
    ]
    for label in range(8):
        found = metrics.classification(logits, [label], NAMES)
        assert found["top1"] == (order.index(label) == 0)
        assert found["top5"] == (order.index(label) < 5)
    assert metrics.mistakes(logits, [2])[0].predicted == 1


def test_classes_without_examples_are_null():
    found = strict(metrics.classification([[9, 0, 0]], [0], ["a", "b", "c"]))
    assert found["per_class"][1] == {
        "name": "b",
        "examples": 0,
        "top1": None,
        "precision": None,
    }
    assert found["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_sigmoid_keeps_the_order_and_sums_to_one():
    logits, labels = random()
    softmax = metrics.classification(logits, labels, NAMES)
    sigmoid = metrics.classification(
        logits, labels, NAMES, activation="sigmoid"
    )
    for key in ("top1", "top5", "confusion", "per_class"):
        assert softmax[key] == sigmoid[key]
    chances = metrics.probabilities(logits, "sigmoid")
    one_by_one = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = one_by_one / one_by_one.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(chances, expected, rtol=1e-12)
    assert sigmoid["loss"] == pytest.approx(
        sklearn.log_loss(labels, expected, labels=np.arange(8))
    )
    extreme = metrics.probabilities([[-3e38, -2e38], [3e38, 2e38]], "sigmoid")
    np.testing.assert_allclose(extreme, [[0, 1], [0.5, 0.5]])


def test_chunks_change_nothing(monkeypatch):
    logits, labels = random()
    whole = metrics.classification(logits, labels, NAMES)
    monkeypatch.setattr(metrics, "_CHUNK", 8 * 7)
    assert metrics.classification(logits, labels, NAMES) == whole


def test_thousands_of_classes_have_no_confusion_matrix():
    for classes, is_there in ((2048, True), (2049, False)):
        found = metrics.classification(
            np.zeros((1, classes), np.float32), [0], [""] * classes
        )
        assert (found["confusion"] is not None) == is_there


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int32])
def test_other_dtypes(dtype):
    logits = np.array([[3, 1], [0, 2]]).astype(dtype)
    found = metrics.classification(logits, np.uint8([0, 1]), ["a", "b"])
    assert found["top1"] == 1


def test_mistakes_are_sorted_and_counted():
    logits, labels = random()
    found = metrics.mistakes(logits, labels, 10)
    assert len(found) == 10
    chances = [item.probability for item in found]
    assert chances == sorted(chances, reverse=True)
    for item in found:
        assert item.label == labels[item.example] != item.predicted
        assert item.predicted == logits[item.example].argmax()
    wrong = logits.argmax(axis=1) != labels
    assert len(metrics.mistakes(logits, labels, 1000)) == wrong.sum()
    best = metrics.probabilities(logits).max(axis=1)
    assert chances[0] == pytest.approx(best[wrong].max())
    assert metrics.mistakes(logits, labels, 0) == []


def test_real_by_hand():
    logits = np.eye(4)[[0, 1, 2, 3]]
    sets = [[0], [], {3, 2}, np.array([0, 1])]
    assert metrics.real(logits, sets) == {
        "examples": 3,
        "skipped": 1,
        "top1": pytest.approx(2 / 3),
    }
    nothing = metrics.real(logits, [[], [], [], []])
    assert strict(nothing) == {"examples": 0, "skipped": 4, "top1": None}


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        ([1.0, 2.0], [0], "ab", r"\[examples, classes\].*\(2,\)"),
        (np.zeros((2, 0)), [0, 0], "", r"\(2, 0\)"),
        (np.zeros((0, 2)), [], "ab", "Received: none"),
        ([["x", "y"]], [0], "ab", "real numbers"),
        ([[1j, 0]], [0], "ab", "real numbers"),
        ([[0, math.nan]], [0], "ab", "finite. Received: nan for example 0"),
        ([[0, 1], [math.inf, 1]], [0, 0], "ab", "inf for example 1"),
        ([[0, 1e39]], [0], "ab", "finite"),
        ([[0, 1]], [0, 1], "ab", r"shape \(2,\)"),
        ([[0, 1]], [0.0], "ab", "float64"),
        ([[0, 1]], [2], "ab", "from 0 to 1.*Received: 2 for example 0"),
        ([[0, 1]], [-1], "ab", "Received: -1"),
        ([[0, 1]], np.uint64([2**63]), "ab", "Received: 9223372036854775808"),
        ([[0, 1]], [0], "abc", "each of the 2 classes. Received: 3"),
    ],
)
def test_bad_input(logits, labels, names, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification(logits, labels, list(names))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([[0]], "each of the 2 rows.*1 sets"),
        ([[0], [2]], "example 1: \\[2\\]"),
        ([[0], ["a"]], "example 1"),
        ([[0], [0.5]], "example 1"),
    ],
)
def test_bad_label_sets(sets, message):
    with pytest.raises(ValueError, match=message):
        metrics.real(np.zeros((2, 2)), sets)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"'softmax' or 'sigmoid'.*'relu'"):
        metrics.probabilities([[0, 1]], "relu")
    with pytest.raises(ValueError, match="0 or more"):
        metrics.mistakes([[0, 1]], [0], -1)
