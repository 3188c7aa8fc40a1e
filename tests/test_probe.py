"""Linear probes and nearest neighbours, beside scikit-learn."""

import json

import numpy as np
import pytest
from sklearn import linear_model, neighbors

from bit_tf import probe

CLASSES = 4


def clusters(seed, examples, length, spread=1.0):
    """Features around one centre a class, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, length))
    labels = np.arange(examples) % CLASSES
    noise = rng.normal(size=(examples, length)) * spread
    return (centres[labels] + noise).astype(np.float32), labels


def prefixes(labels):
    """Nested balanced subsets, as those of data.Split."""

    def subset(count, seed):
        rng = np.random.default_rng(seed)
        return np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == label))[:count]
                for label in range(CLASSES)
            ]
        )

    return subset


@pytest.mark.parametrize("l2", [1e-3, 1.0, 2.0**10, 1e6])
@pytest.mark.parametrize(
    ("examples", "length"), [(12, 50), (51, 50), (50, 50), (400, 20), (1, 3)]
)
def test_ridge_solves_the_normal_equations(examples, length, l2):
    features, labels = clusters(0, examples, length)
    found = probe.Ridge.fit(features, labels, CLASSES)
    exact = features.astype(np.float64)
    x = (exact - exact.mean(axis=0)) / (exact.std(axis=0) + 1e-5)
    x = np.hstack([x, np.full((examples, 1), 100.0)])
    y = np.where(np.arange(CLASSES) == labels[:, None], 1.0, -1.0)
    expected = np.linalg.solve(x.T @ x + l2 * np.eye(length + 1), x.T @ y)
    weights = found.weights(l2)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-7 * scale)
    np.testing.assert_allclose(
        found.scores(features, l2), x @ expected, atol=1e-5
    )


@pytest.mark.parametrize(("examples", "length"), [(12, 50), (400, 20)])
def test_ridge_agrees_with_scikit_learn(examples, length):
    features, labels = clusters(0, examples, length)
    found = probe.Ridge.fit(features, labels, CLASSES)
    x = (features - found.mean) / found.scale
    x = np.hstack([x, np.full((examples, 1), probe.BIAS)])
    targets = np.where(np.arange(CLASSES) == labels[:, None], 1.0, -1.0)
    theirs = linear_model.Ridge(
        alpha=probe.L2, fit_intercept=False, solver="cholesky"
    ).fit(x, targets)
    np.testing.assert_allclose(found.weights(), theirs.coef_.T, atol=1e-10)


def test_constant_features_are_no_division_by_zero():
    features = np.ones((8, 5), np.float32)
    found = probe.Ridge.fit(features, np.arange(8) % CLASSES, CLASSES)
    assert np.isfinite(found.scores(features)).all()


def test_few_shot_improves_with_examples_and_knows_its_seeds():
    train, labels = clusters(1, 200, 30, spread=2.0)
    test, true = clusters(2, 400, 30, spread=2.0)
    rows = probe.few_shot(
        *(train, labels, test, true),
        num_classes=CLASSES,
        subset=prefixes(labels),
        shots=(1, 5, 25),
        seeds=range(5),
    )
    json.dumps(rows, allow_nan=False)
    assert [row["examples_per_class"] for row in rows] == [1, 5, 25]
    medians = [row["median"] for row in rows]
    assert medians == sorted(medians)
    assert medians[0] > 1.2 / CLASSES
    assert medians[-1] > 0.75
    for row in rows:
        tops = [run["top1"] for run in row["runs"]]
        assert [run["seed"] for run in row["runs"]] == [0, 1, 2, 3, 4]
        assert row["min"] == min(tops)
        assert row["median"] == sorted(tops)[2]
        assert row["max"] == max(tops)
        assert row["l2_chosen_on"] is None
        assert {run["l2"] for run in row["runs"]} == {1024.0}
    # What one run says is what the ridge itself says.
    chosen = prefixes(labels)(5, 3)
    model = probe.Ridge.fit(train[chosen], labels[chosen], CLASSES)
    by_hand = (model.scores(test).argmax(axis=1) == true).mean()
    assert rows[1]["runs"][3]["top1"] == by_hand


def test_of_several_penalties_the_test_examples_choose_none():
    train, labels = clusters(1, 80, 30, spread=2.0)
    test, true = clusters(2, 100, 30, spread=2.0)
    penalties = [1e-6, 1e3, 1e9]
    options = {
        "num_classes": CLASSES,
        "subset": prefixes(labels),
        "shots": [5],
        "seeds": [0],
        "l2": penalties,
    }
    (row,) = probe.few_shot(train, labels, test, true, **options)
    assert row["l2_chosen_on"] == "training examples outside the subset"
    chosen = prefixes(labels)(5, 0)
    rest = np.setdiff1d(np.arange(80), chosen)
    model = probe.Ridge.fit(train[chosen], labels[chosen], CLASSES)
    held_out = {
        l2: (
            model.scores(train[rest], l2).argmax(axis=1) == labels[rest]
        ).mean()
        for l2 in penalties
    }
    (run,) = row["runs"]
    assert held_out[run["l2"]] == max(held_out.values())
    # Other test labels change the accuracy, and not the choice.
    (other,) = probe.few_shot(train, labels, test, (true + 1) % 4, **options)
    assert other["runs"][0]["l2"] == run["l2"]
    assert other["runs"][0]["top1"] != run["top1"]
    with pytest.raises(ValueError, match=r"outside the subset.*20 a class"):
        probe.few_shot(train, labels, test, true, **{**options, "shots": [20]})


@pytest.mark.parametrize("k", [1, 3, 20, 80])
def test_neighbours_agree_with_scikit_learn(k):
    train, labels = clusters(1, 80, 10, spread=2.0)
    test, true = clusters(2, 150, 10, spread=2.0)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute"
    ).fit(train.astype(np.float64), labels)
    (found,) = probe.nearest_neighbours(
        train, labels, test, true, num_classes=CLASSES, k=k
    )
    assert found == {
        "k": k,
        "top1": pytest.approx(theirs.score(test.astype(np.float64), true)),
    }


def test_weighted_votes_agree_with_scikit_learn():
    train, labels = clusters(1, 80, 10, spread=2.0)
    test, true = clusters(2, 150, 10, spread=2.0)
    theirs = neighbors.KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
    ).fit(train.astype(np.float64), labels)
    rows = probe.nearest_neighbours(
        *(train, labels, test, true),
        num_classes=CLASSES,
        k=[1, 20],
        temperature=0.07,
    )
    assert rows[1]["top1"] == pytest.approx(
        theirs.score(test.astype(np.float64), true)
    )
    # exp(1 / 0.0001) is more than any float.
    sharp = probe.nearest_neighbours(
        *(train, labels, test, true),
        num_classes=CLASSES,
        k=20,
        temperature=1e-4,
    )
    assert sharp[0]["top1"] == rows[0]["top1"]


def test_parts_change_nothing(monkeypatch):
    train, labels = clusters(1, 80, 10, spread=2.0)
    test, true = clusters(2, 50, 10, spread=2.0)
    options = {"num_classes": CLASSES, "k": (1, 5, 20)}
    whole = probe.nearest_neighbours(train, labels, test, true, **options)
    seen = []
    largest = probe._largest
    monkeypatch.setattr(probe, "_CHUNK", 80 * 7)
    monkeypatch.setattr(
        probe, "_largest", lambda v, n: seen.append(v.shape) or largest(v, n)
    )
    parts = probe.nearest_neighbours(train, labels, test, true, **options)
    assert parts == whole
    assert seen == [(7, 80)] * 7 + [(1, 80)]


def test_of_equals_the_first_come_first():
    values = np.array([[1, 3, 3, 2, 3, 2.0], [0, 0, 0, 0, 0, 0]])
    indices, found = probe._largest(values, 4)
    assert indices.tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    assert found.tolist() == [[3, 3, 3, 2], [0, 0, 0, 0]]
    # One vote each for the classes 2 and 1: the first class wins.
    (row,) = probe.nearest_neighbours(
        *(np.eye(2), [2, 1], np.ones((1, 2)), [1]), num_classes=3, k=2
    )
    assert row["top1"] == 1


def test_features_of_zeros_are_far_from_all():
    zeros = np.zeros((1, 3))
    (row,) = probe.nearest_neighbours(
        *(np.eye(3), [0, 1, 2], zeros, [0]), num_classes=3, k=1
    )
    assert row["top1"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": np.zeros((4, 0))}, r"train_features.*\(4, 0\)"),
        ({"train": np.zeros(4)}, r"train_features.*\(4,\)"),
        ({"train": np.zeros((4, 3), int)}, "train_features.*int64"),
        ({"train": np.full((4, 3), np.nan)}, "4 rows.*index 0"),
        ({"test": np.full((2, 3), np.inf)}, "test_features are finite"),
        ({"test": np.zeros((2, 5))}, "length|shape"),
        ({"labels": [0, 1, 2]}, r"train_labels.*\(4,\)"),
        ({"labels": [0, 1, 2, 9]}, "from 0 to 3. Received: from 0 to 9"),
        ({"true": [0, -1]}, "test_labels.*from -1 to 0"),
        ({"true": [0.0, 1.0]}, "test_labels.*float64"),
    ],
)
@pytest.mark.parametrize("kind", ["probe", "neighbours"])
def test_bad_input(kind, changed, message):
    given = {
        "train": np.eye(4, 3),
        "labels": [0, 1, 2, 3],
        "test": np.eye(2, 3),
        "true": [0, 1],
        **changed,
    }
    options = {"k": 1}
    function = probe.nearest_neighbours
    if kind == "probe":
        options = {"subset": lambda k, seed: [0, 1, 2, 3], "shots": [1]}
        function = probe.few_shot
    with pytest.raises(ValueError, match=message):
        function(*given.values(), num_classes=CLASSES, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "from 1 to 4.*Received: \\[0\\]"),
        ({"k": [1, 5]}, "from 1 to 4"),
        ({"k": []}, "from 1 to 4"),
        ({"k": 1, "temperature": 0}, "temperature is a positive"),
        ({"k": 1, "temperature": np.nan}, "temperature is a positive"),
    ],
)
def test_bad_votes(options, message):
    with pytest.raises(ValueError, match=message):
        probe.nearest_neighbours(
            *(np.eye(4), np.arange(4), np.eye(4), np.arange(4)),
            num_classes=CLASSES,
            **options,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": 0}, "l2 is a positive"),
        ({"l2": [1, -1]}, "l2 is a positive"),
        ({"l2": []}, "l2 is a positive"),
        ({"l2": "many"}, "l2 is a positive"),
        ({"shots": []}, "one number or more"),
        ({"seeds": []}, "one number or more"),
    ],
)
def test_bad_probes(options, message):
    with pytest.raises(ValueError, match=message):
        probe.few_shot(
            *(np.eye(4), np.arange(4), np.eye(4), np.arange(4)),
            num_classes=CLASSES,
            **{"subset": lambda k, seed: np.arange(4), **options},
        )
