"""What every opened checkpoint keeps to, whatever its format."""

import copy
import os
import pickle

import foreign
import helpers
import numpy as np
import pytest

from bit_tf import checkpoints, errors
from bit_tf.checkpoints import Facts, layout
from bit_tf.labels import Label

GAMMA = "block3/unit01/c/group_norm/gamma"
KERNEL = "block2/unit01/a/standardized_conv2d/kernel"
TINY = helpers.TESTING


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(*TINY, 10)


@pytest.fixture(scope="module")
def others():
    return helpers.random_arrays(*TINY, 10, seed=1)


def make(format, path, arrays):
    if format == "h5":
        return foreign.big_transfer_h5(path, arrays)
    if format == "hub":
        return foreign.saved_model(path, foreign.hub_names(arrays))
    checkpoints.write(arrays, path, format=format)
    return path


FORMATS = [*checkpoints.FORMATS, "h5", "hub"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_replaced_is_not_read_half(
    format, arrays, others, tmp_path
):
    path = make(format, tmp_path / "a.keras", arrays)
    opened = checkpoints.read(path)
    np.testing.assert_array_equal(opened[KERNEL], arrays[KERNEL])
    new = make(format, tmp_path / "b.keras", others)
    os.replace(path, tmp_path / "old")
    os.replace(new, path)
    with pytest.raises(errors.CheckpointFormatError, match=GAMMA):
        opened[GAMMA]
    np.testing.assert_array_equal(checkpoints.read(path)[GAMMA], others[GAMMA])


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_gone(format, arrays, tmp_path):
    path = make(format, tmp_path / "a.keras", arrays)
    opened = checkpoints.read(path)
    os.replace(path, tmp_path / "elsewhere")
    with pytest.raises(errors.CheckpointFormatError, match=GAMMA):
        opened[GAMMA]


@pytest.mark.parametrize("format", FORMATS)
def test_the_current_directory_may_change(
    format, arrays, tmp_path, monkeypatch
):
    path = make(format, tmp_path / "a.keras", arrays)
    monkeypatch.chdir(tmp_path)
    opened = checkpoints.read(path.name)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    np.testing.assert_array_equal(opened[KERNEL], arrays[KERNEL])


def test_copies_are_the_same_and_pickles_are_refused(small_npz):
    opened = checkpoints.read(small_npz)
    assert copy.copy(opened) is opened
    assert copy.deepcopy({"a": opened})["a"] is opened
    with pytest.raises(TypeError, match="Send its path"):
        pickle.dumps(opened)


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_labels_that_are_no_text_are_refused(format, arrays, tmp_path):
    facts = Facts(labels=(Label("", "a\ud800"),) * 10)
    with pytest.raises((errors.CheckpointError, ValueError)):
        checkpoints.write(
            arrays, tmp_path / "a.keras", format=format, facts=facts
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"numerics": "google", "labels": ["ab", "cd"]}',
        '{"numerics": "google", "labels": [["a", "\\ud800"]]}',
        '{"numerics": "google", "labels": [["a", "b", "c"]]}',
        '{"numerics": "google", "output_stride": 16.0}',
        '{"numerics": "google", "output_stride": true}',
    ],
)
def test_records_are_what_they_should_be(text):
    with pytest.raises(errors.CheckpointFormatError, match="bit_tf records"):
        Facts.from_json(text)


def test_selections(arrays):
    facts = Facts("timm", labels=(Label("", "x"),) * 10)
    whole = checkpoints.Selection(arrays, facts)
    part = checkpoints.Selection(arrays, facts, head=False)
    assert whole.shapes.keys() == arrays.keys()
    assert whole.facts == facts
    assert part.shapes.keys() == arrays.keys() - {
        layout.HEAD_KERNEL,
        layout.HEAD_BIAS,
    }
    assert part.facts == Facts("timm")
    with pytest.raises(KeyError):
        part[layout.HEAD_BIAS]
