import numpy as np
import pytest

import bit_tf
from bit_tf import errors, labels


def test_published_sets():
    for name, count in labels.LABEL_SETS.items():
        rows = labels.label_set(name)
        assert len(rows) == count
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        assert len({row.id for row in rows}) == count
        assert all(row.name for row in rows)
    first = labels.label_set("ilsvrc2012")[0]
    assert (first.id, first.name) == ("n01440764", "tench, Tinca tinca")
    assert labels.label_set("imagenet21k")[0].name == "organism, being"


def test_decode_predictions():
    scores = np.zeros((2, 1000))
    scores[0, [5, 7]] = [0.9, 0.5]
    scores[1, 999] = 1
    first, second = bit_tf.decode_predictions(scores, top=2)
    rows = labels.label_set("ilsvrc2012")
    assert first == [
        (rows[5].id, rows[5].name, 0.9),
        (rows[7].id, rows[7].name, 0.5),
    ]
    assert second[0] == (rows[999].id, rows[999].name, 1.0)
    scores = np.zeros((1, 21843))
    scores[0, 0] = 1
    wide = bit_tf.decode_predictions(scores)
    assert wide[0][0][1] == "organism, being"
    assert len(wide[0]) == 5
    own = bit_tf.decode_predictions([[1.0, 2.0]], labels=["a", "b"])
    assert own == [[("", "b", 2.0), ("", "a", 1.0)]]


def test_errors():
    with pytest.raises(errors.UnknownNameError, match="No label set has 7"):
        bit_tf.decode_predictions(np.zeros((1, 7)))
    with pytest.raises(ValueError, match=r"\[images, classes\]"):
        bit_tf.decode_predictions(np.zeros(1000))
    with pytest.raises(ValueError, match="top must be"):
        bit_tf.decode_predictions(np.zeros((1, 1000)), top=-1)
    with pytest.raises(ValueError, match="2 labels"):
        bit_tf.decode_predictions(np.zeros((1, 3)), labels=["a", "b"])
    with pytest.raises(errors.UnknownNameError, match="ilsvrc2012"):
        labels.label_set("imagenet")


def test_stored_in_saved_models(tmp_path):
    rows = labels.parse("n1\tone\n\ttwo, deux\n")
    assert rows == (labels.Label("n1", "one"), labels.Label("", "two, deux"))
    assert labels.read_saved_model(tmp_path) is None
    labels.write_saved_model(rows, tmp_path)
    assert labels.read_saved_model(tmp_path) == rows
    (tmp_path / "assets" / "wordnet_ids.txt").write_text("n1\n")
    with pytest.raises(errors.HandleError, match="1 and 2"):
        labels.read_saved_model(tmp_path)
    (tmp_path / "assets" / "labels.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.HandleError, match="UTF-8"):
        labels.read_saved_model(tmp_path)
    odd = labels.check(["a\u2028b", "c\x0bd"], 2)
    labels.write_saved_model(odd, tmp_path)
    (tmp_path / "assets" / "wordnet_ids.txt").unlink()
    assert labels.read_saved_model(tmp_path) == odd
    names = labels.parse("\ufeffone\r\ntwo\r\n")
    assert names == labels.parse("one\ntwo")
    other = tmp_path / "other"
    other.mkdir()
    labels.write_saved_model(names, other)
    assert [p.name for p in (other / "assets").iterdir()] == ["labels.txt"]
    assert labels.read_saved_model(other) == names


@pytest.mark.parametrize(
    "bad", [["a", ""], ["a", "b\nc"], ["a", 1], ["a", None], ["a", " "], ["a"]]
)
def test_labels_are_lines_of_text(bad):
    with pytest.raises(ValueError, match="Received"):
        labels.check(bad, 2)


def test_sigmoid_belongs_to_imagenet21k():
    assert labels.activation(21843) == "sigmoid"
    assert labels.activation(1000) == labels.activation(10) == "softmax"
