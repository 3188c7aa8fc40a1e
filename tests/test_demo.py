import numpy as np
import pytest
from PIL import Image

import bit_tf
from bit_tf import checkpoints
from hub_export import demo, digits


@pytest.fixture(scope="module")
def bundled():
    return str(digits.DATA / digits.CHECKPOINT)


def test_the_bundled_checkpoint(bundled):
    import os

    assert os.path.getsize(bundled) <= 9_000_000
    checkpoint = checkpoints.read(bundled)
    row = bit_tf.variants.find_architecture(
        checkpoint.blocks, checkpoint.stem_width
    )
    assert row.name == "testing"
    assert checkpoint.num_classes == 10
    assert checkpoint.extra == ()


def test_it_reads_held_out_digits(bundled):
    pictures, truth = digits.held_out()
    assert pictures.shape == (360, 32, 32, 3)
    logits = bit_tf.load_model(bundled).predict(pictures, verbose=0)
    assert np.mean(logits.argmax(-1) == truth) >= 0.97


def test_held_out_digits_are_held_out():
    """They are scikit-learn's, in the order of the training's own split."""
    from sklearn import datasets

    data = datasets.load_digits()
    unseen = np.random.default_rng(0).permutation(len(data.target))[:360]
    pictures, truth = digits.held_out()
    assert np.array_equal(truth, data.target[unseen])
    assert np.array_equal(pictures, digits.pictures(data.images[unseen]))


@pytest.mark.slow
def test_training_writes_both_files(tmp_path):
    accuracy = digits.train(tmp_path, epochs=2, seed=1)
    assert accuracy > 0.3
    again = checkpoints.read(tmp_path / digits.CHECKPOINT)
    assert again.num_classes == 10
    with (
        np.load(tmp_path / digits.HELD_OUT) as mine,
        np.load(digits.DATA / digits.HELD_OUT) as packaged,
    ):
        assert np.array_equal(mine["digits"], packaged["digits"])


def test_demo(tmp_path):
    lines = []
    picture = demo.run(tmp_path, say=lines.append)
    text = "\n".join(lines)
    accuracy = float(text.split("% of 360 held-out")[0].split()[-1])
    assert accuracy >= 97
    for words in ("hub.load", "hub.KerasLayer", "BitMedium2Vec", "verify"):
        assert words in text
    assert "RANDOM" not in text
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 500
        assert len(drawn.getcolors(2**20)) > 100


@pytest.mark.slow
def test_demo_with_photos_and_random_weights(tmp_path, photos):
    lines = []
    picture = demo.run(
        tmp_path,
        random="testing",
        photos=[str(photos[0]), str(photos[1])],
        preset="big_transfer eval 128",
        say=lines.append,
    )
    text = "\n".join(lines)
    assert text.count("RANDOM") >= 2
    assert "1000 classes" in text
    assert "photo0.png:" in text
    assert picture.exists()
    assert (tmp_path / "RANDOM-testing.npz").exists()


@pytest.mark.slow
def test_demo_with_a_checkpoint_file(tmp_path, small_npz):
    lines = []
    demo.run(tmp_path, checkpoint=small_npz, say=lines.append)
    text = "\n".join(lines)
    assert "held-out digits are right" not in text
    assert small_npz.name in text
