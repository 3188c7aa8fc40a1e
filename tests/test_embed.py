import io

import helpers
import numpy as np
import pytest
from PIL import Image

import bit_tf
from bit_tf import classify, embed, errors, images


@pytest.fixture(scope="module")
def encoder(features_export):
    return bit_tf.BitMedium2Vec(features_export)


@pytest.fixture(scope="module")
def model(small_npz):
    return bit_tf.load_model(small_npz, head=False)


def test_attributes(encoder, features_export):
    assert encoder.vector_length == 1024
    assert encoder.model_url == str(features_export)
    assert encoder.model_name == features_export.name
    assert encoder.__name__ == "bit_medium"
    assert encoder.zero_vector == [0.0] * 1024
    definition = encoder.definition
    assert definition["model_id"] == "image/bit-medium"
    assert definition["vector_length"] == 1024
    assert definition["release_date"] == "2019-12-24"
    assert {
        "model_name",
        "paper",
        "repo",
        "installation",
        "category",
        "short_description",
        "example",
    } <= definition.keys()


def test_default_models():
    import inspect

    for encoder, letter in (
        (embed.BitMedium2Vec, "m"),
        (embed.BitSmall2Vec, "s"),
    ):
        default = inspect.signature(encoder).parameters["model_url"].default
        assert default == f"https://tfhub.dev/google/bit/{letter}-r50x1/1"
    assert embed._model_name(default) == "s-r50x1"


def test_encode_equals_the_keras_model(encoder, model, photos):
    for path in photos:
        pixels = images.decode(path)
        expected = np.asarray(model(pixels[None]))[0]
        for form in (
            path,
            str(path),
            path.read_bytes(),
            io.BytesIO(path.read_bytes()),
            Image.open(path),
            pixels,
            images.as_float(pixels),
            encoder.read(path),
        ):
            vector = encoder.encode(form)
            assert isinstance(vector, list)
            assert isinstance(vector[0], float)
            assert helpers.relative_error(vector, expected) <= 1e-5


def test_bulk_equals_one_by_one_in_order(encoder, photos):
    expected = [encoder.encode(path) for path in photos]
    for options in ({}, {"chunks": 1}, {"threads": 1, "chunks": 2}):
        found = encoder.bulk_encode(iter(list(photos) * 9), **options)
        assert len(found) == 27
        for a, b in zip(found, expected * 9, strict=True):
            assert helpers.relative_error(a, b) <= 1e-5
    assert encoder.bulk_encode([]) == []


def test_bulk_runs_true_batches(features_export, photos, monkeypatch):
    encoder = bit_tf.BitSmall2Vec(features_export)
    batches = []
    function = encoder._function

    def counting(batch):
        batches.append(tuple(batch.shape))
        return function(batch)

    monkeypatch.setattr(encoder, "_function", counting)
    encoder.bulk_encode(list(photos) * 4, chunks=5)
    assert sorted(batches) == sorted(
        [(5, 64, 64, 3), (3, 64, 64, 3), (4, 48, 80, 3)]
    )


def test_errors_are_raised_or_returned_but_never_vectors(encoder, photos):
    mixed = [photos[0], b"not a picture", photos[1], "nowhere.png"]
    with pytest.raises(errors.ImageDecodeError):
        encoder.bulk_encode(mixed)
    found = encoder.bulk_encode(mixed, on_error="return")
    assert isinstance(found[1], errors.ImageDecodeError)
    assert isinstance(found[3], errors.ImageError)
    assert helpers.relative_error(found[0], encoder.encode(photos[0])) < 1e-5
    assert helpers.relative_error(found[2], encoder.encode(photos[1])) < 1e-5
    with pytest.raises(errors.ImageRangeError, match=r"\[0, 1\]"):
        encoder.encode(np.full((8, 8, 3), 200.0))
    with pytest.raises(errors.ImageRangeError, match="list of pictures"):
        encoder.bulk_encode(str(photos[0]))
    with pytest.raises(ValueError, match="on_error"):
        encoder.bulk_encode([], on_error="ignore")
    with pytest.raises(ValueError, match="at least 1"):
        encoder.bulk_encode([], chunks=0)


def test_a_batch_is_not_one_picture(encoder):
    for dtype in (np.uint8, np.float32):
        with pytest.raises(errors.ImageRangeError, match="one by one"):
            encoder.encode(np.zeros((2, 40, 40, 3), dtype))


def test_floats_of_any_kind(encoder, photos):
    import tensorflow as tf

    pixels = images.as_float(images.decode(photos[0])) * np.float32(0.999)
    expected = encoder.encode(pixels)
    assert encoder.encode(tf.constant(pixels)) == expected
    grey = pixels[..., 0]
    vectors = [encoder.encode(a) for a in (grey, grey[..., None])]
    assert vectors[0] == vectors[1]
    rgba = np.dstack([pixels, np.ones_like(grey)])
    assert helpers.relative_error(encoder.encode(rgba), expected) < 0.05


def test_whatever_an_object_raises_is_returned(encoder, photos):
    class Broken:
        def read(self, size):
            raise RuntimeError("lost")

    class Odd:
        def __array__(self, dtype=None, copy=None):
            raise KeyError("lost")

    found = encoder.bulk_encode([Broken(), photos[0], Odd()], on_error="return")
    assert isinstance(found[0], errors.ImageError)
    assert isinstance(found[2], errors.ImageError)
    assert found[1] == encoder.encode(photos[0])


def test_published_handles_and_others(features_export, monkeypatch):
    urls = bit_tf.BitMedium2Vec.urls
    hub = "https://tfhub.dev/google/bit/"
    for name, length in (
        ("m-r50x1", 2048),
        ("s-r50x3", 6144),
        ("m-r101x1", 2048),
        ("s-r101x3", 6144),
        ("m-r152x4", 8192),
    ):
        assert urls[f"{hub}{name}/1"] == {"vector_length": length}
    load = embed.hub.load
    monkeypatch.setattr(embed.hub, "load", lambda _: load(features_export))
    assert bit_tf.BitMedium2Vec().model_name == "m-r50x1"
    with pytest.warns(UserWarning, match="not one of the published"):
        bit_tf.BitMedium2Vec("https://example.org/model/1")


def test_a_model_with_a_head_still_gives_features(
    small_export, encoder, photos
):
    with_head = bit_tf.BitMedium2Vec(small_export)
    assert with_head.vector_length == 1024
    a, b = with_head.encode(photos[0]), encoder.encode(photos[0])
    assert helpers.relative_error(a, b) <= 1e-5


def test_presets(features_export, model, photos):
    encoder = bit_tf.BitMedium2Vec(features_export, "timm in21k")
    prepared = images.preprocess(photos[1], "timm in21k")
    assert prepared.shape == (224, 224, 3)
    expected = np.asarray(model(prepared[None]))[0]
    assert helpers.relative_error(encoder.encode(photos[1]), expected) <= 1e-5
    with pytest.raises(errors.UnknownNameError, match="timm in21k"):
        bit_tf.BitMedium2Vec(features_export, "timm in21")


def test_documents(encoder, photos):
    field = "thumb_bit_medium_vector_"
    documents = [
        {"image": {"thumb": str(photos[0])}},
        {"image": {}},
        {"other": 1},
        {"image": None},
    ]
    encoder.encode_documents(["image.thumb"], documents)
    assert documents[0]["image"][field] == encoder.encode(photos[0])
    assert documents[1:] == [{"image": {}}, {"other": 1}, {"image": None}]
    documents = [{"a": str(photos[0])}, {"b": 1}]
    encoder.encode_documents(["a"], documents, "zero_vector")
    assert documents[1]["a_bit_medium_vector_"] == encoder.zero_vector
    encoder.encode_documents(["c"], documents, missing_treatment=-1)
    assert documents[0]["c_bit_medium_vector_"] == -1
    documents = [{"image": None}, {"image": 3}]
    encoder.encode_documents("image.thumb", documents, "zero_vector")
    assert documents[0]["image"] == {field: encoder.zero_vector}
    assert documents[0]["image"][field] is not documents[1]["image"][field]
    found = encoder.encode_documents(["x"], iter([{}]), np.zeros(3))
    assert found[0]["x_bit_medium_vector_"].shape == (3,)
    documents = [{"a": str(photos[0])}, {"a": "nowhere.png"}]
    with pytest.raises(errors.ImageError):
        encoder.encode_documents(["a"], documents)
    assert documents == [{"a": str(photos[0])}, {"a": "nowhere.png"}]
    documents = [{"chunks": [{"a": str(photos[0])}, {"a": str(photos[2])}]}, {}]
    encoder.encode_chunk_documents("chunks", ["a"], documents)
    vectors = [c["a_bit_medium_vector_"] for c in documents[0]["chunks"]]
    expected = [encoder.encode(photos[0]), encoder.encode(photos[2])]
    assert helpers.relative_error(vectors, expected) <= 1e-5


def test_picture_helpers(encoder, photos, monkeypatch):
    pixels = encoder.read(photos[1])
    grey = encoder.to_grayscale(pixels)
    assert grey.shape == (48, 80)
    assert np.allclose(grey, pixels @ np.array([0.2989, 0.5870, 0.1140]))
    assert np.allclose(encoder.to_grayscale(pixels, (1, 0, 0)), pixels[..., 0])
    assert encoder.image_resize(pixels, width=40).shape == (24, 40, 3)
    assert encoder.image_resize(pixels, height=24).shape == (24, 40, 3)
    assert encoder.image_resize(pixels, 10, 20).shape == (20, 10, 3)
    assert encoder.image_resize(pixels, rescale=0.5).shape == (24, 40, 3)
    with pytest.raises(ValueError, match="rescale"):
        encoder.image_resize(pixels)
    with pytest.raises(ValueError, match="positive"):
        encoder.image_resize(pixels, width=-20)
    with pytest.raises(errors.ImageRangeError, match="one picture"):
        encoder.to_grayscale(grey)
    assert encoder.to_grayscale(pixels, np.ones(3)).shape == (48, 80)
    with pytest.raises(ValueError, match="symmetry"):
        encoder.image_resize(pixels, 10, resize_mode="crop")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    encoder.show_image(pixels)
    (drawn,) = pyplot.gca().images
    assert np.array_equal(drawn.get_array(), pixels)
    pyplot.close("all")


def test_missing_model(tmp_path):
    with pytest.raises(errors.HandleError, match="no such path"):
        bit_tf.BitMedium2Vec(tmp_path / "nothing")


def test_classifier(small_export, small_npz, features_export, photos):
    classifier = classify.Classifier(small_export, "tfhub")
    model = bit_tf.load_model(small_npz)
    logits = np.asarray(model(images.decode(photos[1])[None]))[0]
    exponents = np.exp(logits - logits.max())
    best = classifier.classify(photos[1], top=3)
    assert [name for _, name, _ in best] == [
        "abcdefghij"[i] for i in np.argsort(-logits)[:3]
    ]
    assert best[0][2] == pytest.approx(
        (exponents / exponents.sum()).max(), 1e-4
    )
    with pytest.raises(errors.HandleError, match="bit-tf embed"):
        classify.Classifier(features_export)
