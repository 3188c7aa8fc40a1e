"""Batches: what step t sees, flips, crops, mixup, evaluation, caches."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import batch_plan, data, images, presets
from bit_tf.errors import DatasetError, ImageDecodeError

COUNT = 22


@pytest.fixture(scope="module")
def pipeline():
    from bit_tf import input_pipeline

    return input_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of many sizes in two classes, and 37 for tests."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", COUNT), ("test", 37)):
        for index in range(count):
            path = root / split / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = helpers.random_images(1, 12 + index, 30 - index % 9, index)
            Image.fromarray(pixels[0]).save(path)
    return root


@pytest.fixture(scope="module")
def dataset(folder):
    return data.open_dataset(f"folder:{folder}")


@pytest.fixture
def files(dataset):
    return dataset.splits["train"]


def as_stream(split):
    """The same pictures as a tf.data.Dataset gives them."""
    import tensorflow as tf

    ragged = [
        tf.RaggedTensor.from_tensor(p)
        for p in split.pictures(range(split.size))
    ]
    stream = tf.data.Dataset.from_tensor_slices(
        (tf.stack(ragged), split.labels)
    ).map(lambda image, label: (image.to_tensor(), label))
    return data.open_dataset(stream).splits["train"]


@pytest.fixture
def make(pipeline, files, monkeypatch):
    """Makes the split of a kind."""

    def make(kind):
        if kind == "files":
            return files
        if kind == "long stream":
            # Its examples do not fit into memory.
            monkeypatch.setattr(pipeline, "_SHUFFLED", 12_000)
        split = as_stream(files)
        assert pipeline._buffer(split) == {"stream": COUNT}.get(kind, 6)
        return split

    return make


@pytest.fixture
def batches(pipeline):
    """All training batches as arrays."""

    def run(split, **options):
        options = {
            "resize": 12,
            "crop": 9,
            "batch_size": 8,
            "seed": 5,
            "mixup_alpha": 0.4,
            "steps": 6,
            **options,
        }
        found = pipeline.training_batches(split, **options)
        return [(x.numpy(), y.numpy()) for x, y in pipeline.iterate(found)]

    return run


def require_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype == np.float32
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "kind",
    ["files", "long stream", pytest.param("stream", marks=pytest.mark.slow)],
)
def test_a_step_depends_on_nothing_before_it(make, batches, kind):
    split = make(kind)
    whole = batches(split)
    assert [len(x) for x, _ in whole] == [8] * 6
    assert whole[0][0].shape == (8, 9, 9, 3)
    assert whole[0][1].shape == (8, 2)
    assert 0 <= whole[0][0].min() < whole[0][0].max() <= 1
    require_same(batches(split, first_step=4), whole[4:])
    require_same(batches(split, first_step=6), [])


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [
        ("files", 0.4),
        ("long stream", 0.4),
        pytest.param("files", 0.0, marks=pytest.mark.slow),
        pytest.param("stream", 0.4, marks=pytest.mark.slow),
    ],
    ids=["files", "long-stream", "files-plain", "stream"],
)
def test_shards_are_rows_of_the_global_batch(make, batches, kind, alpha):
    split = make(kind)
    whole = batches(split, mixup_alpha=alpha)
    for index in (0, 2):
        rows = slice(2 * index, 2 * index + 2)
        expected = [(x[rows], y[rows]) for x, y in whole]
        found = batches(split, mixup_alpha=alpha, shard=(index, 4))
        require_same(found, expected)


def test_shards_of_one_row(files, batches):
    whole = batches(files, batch_size=2)
    for index in range(2):
        found = batches(files, batch_size=2, shard=(index, 2))
        rows = slice(index, index + 1)
        require_same(found, [(x[rows], y[rows]) for x, y in whole])


def test_files_and_a_short_stream_give_the_same(make, batches):
    require_same(batches(make("files")), batches(make("stream")))


@pytest.mark.parametrize(
    "kind",
    ["long stream", pytest.param("files", marks=pytest.mark.slow)],
)
def test_caches_give_the_same(make, batches, kind, tmp_path):
    split = make(kind)
    expected = batches(split)
    kept = tmp_path / "cache"
    for cache in (True, kept, kept):
        require_same(batches(split.take(range(COUNT)), cache=cache), expected)
    (file,) = kept.glob("*.examples")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DatasetError, match="Remove the file"):
        batches(split, cache=kept)


def test_cache_notices_changed_files(batches, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / name / "0.png")
    options = {"cache": tmp_path / "cache", "steps": 1, "mixup_alpha": 0}

    def run():
        split = data.open_dataset(f"folder:{tmp_path}").splits["train"]
        return batches(split.take([0, 1]), **options)[0][0]

    # The cache is no class folder while it does not exist.
    split = data.open_dataset(f"folder:{tmp_path}").splits["train"]
    before = batches(split, **options)[0][0]
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "a" / "0.png")
    os.utime(tmp_path / "a/0.png", ns=(1, 1))
    after = batches(split, **options)[0][0]
    assert before[..., 2].max() == 0
    assert after[..., 2].max() == 1


def test_global_seeds_do_not_matter(files, batches):
    import tensorflow as tf

    expected = batches(files)
    try:
        tf.random.set_seed(7)
        np.random.seed(7)
        require_same(batches(files), expected)
    finally:
        tf.random.set_seed(None)
    other = batches(files, seed=6)
    assert not np.array_equal(other[0][0], expected[0][0])


@pytest.mark.parametrize("kind", ["files", "long stream"])
def test_every_example_once_an_epoch(make, batches, kind):
    split = make(kind)
    found = batches(
        split,
        resize=8,
        crop=8,
        mixup_alpha=0,
        flip=False,
        batch_size=4,
        steps=11,
    )
    seen = np.concatenate([x for x, _ in found])
    labels = np.concatenate([y for _, y in found]).argmax(axis=-1)
    preset = dataclasses.replace(presets.preset("big_transfer eval"), size=8)
    pictures = [
        images.preprocess(split.picture(i), preset) for i in range(COUNT)
    ]
    distance = np.abs(seen[:, None] - np.stack(pictures)).max(axis=(2, 3, 4))
    which = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-6
    assert labels.tolist() == split.labels[which].tolist()
    for epoch in (which[:COUNT], which[COUNT:]):
        assert sorted(epoch) == list(range(COUNT))
    assert which[:COUNT].tolist() != which[COUNT:].tolist()


def colours(tmp_path, count=2):
    """Pictures whose left half is black, and right half is white."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[:, 1] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return data.open_dataset(f"folder:{tmp_path}").splits["train"]


def test_half_of_10000_draws_are_flipped(pipeline):
    import tensorflow as tf

    pixels = np.zeros((10, 2, 2, 3), np.uint8)
    pixels[:, :, 1] = 255
    stream = tf.data.Dataset.from_tensor_slices((pixels, [0, 1] * 5))
    found = pipeline.training_batches(
        data.open_dataset(stream).splits["train"],
        resize=2,
        crop=2,
        batch_size=500,
        seed=0,
        random_crop=False,
        steps=20,
    )
    right = np.concatenate([x[:, 0, 1, 0] for x, _ in pipeline.iterate(found)])
    assert len(right) == 10_000
    assert set(right) == {0, 1}
    assert abs(np.mean(right == 0) - 0.5) <= 0.02


def test_nothing_is_flipped_where_side_matters(batches, tmp_path):
    split = colours(tmp_path)
    for x, _ in batches(
        split, resize=2, crop=2, flip=False, random_crop=False, batch_size=64
    ):
        assert (x[:, :, 0] == 0).all()
        assert (x[:, :, 1] == 1).all()


def test_crops_are_uniform(pipeline, tmp_path):
    """A gradient tells where a crop lies; all corners are reached."""
    size, crop = 8, 6
    y, x = np.mgrid[0:size, 0:size]
    pixels = np.stack([y, x, x * 0], -1).astype(np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    split = data.open_dataset(f"folder:{tmp_path}").splits["train"]
    found = pipeline.training_batches(
        split,
        resize=size,
        crop=crop,
        batch_size=100,
        seed=0,
        flip=False,
        steps=9,
    )
    counts = collections.Counter()
    for batch, _ in pipeline.iterate(found):
        corners = np.rint(batch[:, 0, 0].numpy() * 255).astype(int)
        counts.update((top, left) for top, left, _ in corners.tolist())
    assert len(counts) == (size - crop + 1) ** 2
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_without_random_crop_pictures_are_squashed(files, batches):
    found = batches(
        files,
        resize=20,
        random_crop=False,
        flip=False,
        mixup_alpha=0,
        batch_size=COUNT,
        steps=1,
    )
    plan = make_plan(files, COUNT)
    positions, _ = plan.draws(0)
    for position, picture in zip(positions, found[0][0], strict=True):
        expected = images.resize(files.picture(position), 9, 9, antialias=False)
        np.testing.assert_allclose(picture, expected, atol=1e-6)


def make_plan(split, batch_size, alpha=0.3, shard=(0, 1), seed=5):
    return batch_plan.Plan(
        split,
        batch_size=batch_size,
        seed=seed,
        room=0,
        mixup_alpha=alpha,
        shard=shard,
        buffer=split.size,
    )


@pytest.mark.parametrize(
    ("size", "batch_size"),
    [
        (size, batch)
        for size in (2, 3, 4, 5, 22)
        for batch in (2, 3, 4, 5, 7, 8, 23, 45)
    ],
    ids=lambda value: str(value),
)
def test_mixup_never_pairs_a_picture_with_itself(files, size, batch_size):
    split = files.take(range(size))
    for seed in range(2):
        plan = make_plan(split, batch_size, seed=seed)
        for step in range(20):
            positions, _ = plan.draws(step)
            _, first, _ = plan.recipe(step)
            before = np.roll(positions, 1)
            before[0] = positions[first]
            assert (positions != before).all()


def test_mixup(pipeline, files, batches):
    plain = batches(files, mixup_alpha=0)
    mixed = batches(files, mixup_alpha=0.4)
    ratios = set()
    for (x, y), (mixed_x, mixed_y) in zip(plain, mixed, strict=True):
        # λ of the batch, from any pixel where a pair differs
        other = np.roll(x, 1, axis=0)
        where = np.abs(x - other) > 0.2
        ratio = np.median((mixed_x - other)[where] / (x - other)[where])
        ratios.add(round(float(ratio), 4))
        np.testing.assert_allclose(
            mixed_x, ratio * x + (1 - ratio) * other, atol=1e-5
        )
        other = np.roll(y, 1, axis=0)
        np.testing.assert_allclose(
            mixed_y, ratio * y + (1 - ratio) * other, atol=1e-5
        )
    assert len(ratios) == 6
    assert all(0 <= ratio <= 1 for ratio in ratios)


def test_a_batch_of_one_is_not_mixed(files, batches):
    plain = batches(files, mixup_alpha=0, batch_size=1)
    require_same(batches(files, batch_size=1), plain)


def test_mixup_ratio_is_beta(files):
    from scipy import stats

    plan = make_plan(files, 8, alpha=0.5)
    ratios = [plan.recipe(step)[0] for step in range(2000)]
    assert stats.kstest(ratios, stats.beta(0.5, 0.5).cdf).pvalue > 0.01


def test_37_pictures_at_batch_16(pipeline, dataset):
    split = dataset.splits["test"]
    preset = pipeline.evaluation_preset(9)
    found = list(
        pipeline.iterate(
            pipeline.evaluation_batches(split, preset=preset, batch_size=16)
        )
    )
    assert [len(x) for x, _ in found] == [16, 16, 5]
    labels = np.concatenate([y for _, y in found])
    assert labels.dtype == np.int64
    assert labels.tolist() == split.labels.tolist()


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("files", "evaluation"),
        ("stream", "evaluation"),
        ("files", "timm distilled"),
        ("stream", "hf bit-50"),
        ("files", "big_vision fewshot"),
    ],
)
def test_evaluation_is_preprocess(pipeline, make, kind, preset):
    if preset == "evaluation":
        row = pipeline.evaluation_preset(17)
    else:
        row = dataclasses.replace(presets.preset(preset), size=12, crop=9)
    split = make(kind).take([0, 5, 3])
    ((pictures, _),) = pipeline.iterate(
        pipeline.evaluation_batches(split, preset=row, batch_size=8)
    )
    assert pictures.dtype == np.float32
    for picture, index in zip(pictures, (0, 5, 3), strict=True):
        expected = images.preprocess(make("files").picture(index), row)
        np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_evaluation_needs_one_size(pipeline, files):
    for name in ("tfhub", "vectorhub"):
        with pytest.raises(DatasetError, match="one size"):
            pipeline.evaluation_batches(
                files, preset=presets.preset(name), batch_size=2
            )
    row = dataclasses.replace(presets.preset("timm in21k"), crop=None)
    with pytest.raises(DatasetError, match="one size"):
        pipeline.evaluation_batches(files, preset=row, batch_size=2)


@pytest.mark.parametrize("damage", ["empty", "truncated", "gone"])
def test_a_damaged_picture_comes_out_named(pipeline, batches, tmp_path, damage):
    split = colours(tmp_path)
    path = tmp_path / "b/1.png"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-20]}.get(damage, b""))
    error = ImageDecodeError
    if damage == "gone":
        path.unlink()
        error = images.ImageError
    with pytest.raises(error, match=r"b/1\.png"):
        batches(split)
    found = pipeline.evaluation_batches(
        split, preset=pipeline.evaluation_preset(4), batch_size=1
    )
    seen = []
    with pytest.raises(error, match=r"b/1\.png"):
        seen.extend(pipeline.iterate(found))
    assert len(seen) <= 3


def test_errors_of_a_stream_come_out(pipeline, batches):
    import tensorflow as tf

    def encoded(index):
        text = tf.where(index == 5, b"no picture", tf.io.encode_png(pixels))
        return tf.io.decode_png(text, 3), index % 2

    pixels = tf.zeros((4, 4, 3), tf.uint8)
    dataset = tf.data.Dataset.range(8).map(encoded)
    with pytest.raises(DatasetError, match="read and decoded") as caught:
        data.open_dataset(dataset)
    assert "bad_images" in str(caught.value)


def test_other_errors_are_left_alone(pipeline):
    import tensorflow as tf

    error = tf.errors.ResourceExhaustedError(None, None, "OOM")
    assert pipeline.raised(error) is error
    error = ValueError("other")
    assert pipeline.raised(error) is error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"crop": 13}, "resize is an integer of 13 or more"),
        ({"crop": 0}, "crop"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"first_step": -1}, "first_step"),
        ({"steps": -1}, "steps"),
        ({"mixup_alpha": -0.1}, "mixup_alpha"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha"),
        ({"shard": (0, 3)}, "shard"),
        ({"shard": (2, 2)}, "shard"),
    ],
    ids=str,
)
def test_arguments(files, batches, options, message):
    with pytest.raises(DatasetError, match=message):
        batches(files, **options)


def test_no_examples(files, batches):
    with pytest.raises(DatasetError, match="at least one example"):
        batches(files.take([]))


def test_endless(pipeline, files):
    found = pipeline.training_batches(
        files, resize=4, crop=4, batch_size=64, seed=0
    )
    steps = iter(pipeline.iterate(found))
    assert [len(next(steps)[0]) for _ in range(3)] == [64] * 3


def test_shuffled_order():
    for size, buffer in ((1, 1), (7, 7), (100, 10), (100, 2)):
        orders = [
            batch_plan._shuffled(size, buffer, 0, epoch) for epoch in range(3)
        ]
        for order in orders:
            assert sorted(order) == list(range(size))
            early = np.arange(size) - np.argsort(order)
            assert (np.asarray(order) - np.arange(size)).max() < buffer
            assert early.min() > -size
        if size > 1:
            assert orders[0].tolist() != orders[1].tolist()


KILLED = """
import sys
from bit_tf import data, example_cache
split = data.open_dataset("folder:" + sys.argv[1]).splits["train"]
read = split.source.read
def slow(position):
    print(position, flush=True)
    if position == 9:
        import time
        time.sleep(60)
    return read(position)
split.source.read = slow
split.source.records = lambda order: map(slow, order)
example_cache.on_disk(split, sys.argv[2])
"""


def test_cache_after_kill(files, folder, batches, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder, tmp_path],
        stdout=subprocess.PIPE,
        cwd=os.path.dirname(os.path.dirname(__file__)),
        text=True,
    )
    with process:
        for line in process.stdout:
            if line.strip() == "9":
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("*.examples"))
    require_same(
        batches(files, cache=tmp_path, steps=1), batches(files, steps=1)
    )
    assert len(list(tmp_path.glob("*.examples"))) == 1
