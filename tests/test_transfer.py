"""Which network a task starts from, what is trained of it, and its file."""

import json
import shutil
import zipfile

import helpers
import keras
import numpy as np
import pytest
import tiny_models
import toy_hub

from bit_tf import errors, hub, labels, models, transfer
from bit_tf.checkpoints import Facts
from bit_tf.presets import preset

LABELS = tuple(labels.Label("", name) for name in ("oak", "elm", "ash"))
FACTS = Facts(labels=LABELS, preset=preset("big_transfer eval 128"))
IMAGES = helpers.random_images(2, 40, 40).astype(np.float32) / 255
FROZEN = "root_block|block[1-3]"


def kernels(model):
    """The values of all variables."""
    return [np.asarray(variable) for variable in model.variables]


@pytest.fixture(scope="module")
def of_checkpoint(small_npz):
    return transfer.classifier(small_npz, 3)


@pytest.fixture(scope="module")
def of_hub(features_export):
    return transfer.classifier(str(features_export), 3)


@pytest.fixture(scope="module")
def reference(small_npz):
    """What the weights' features are."""
    return np.asarray(models.load_model(small_npz, head=False)(IMAGES))


@pytest.fixture(scope="module")
def of_toy(tmp_path_factory):
    """A classifier on a toy's features, whose weights are no longer its own."""
    handle = toy_hub.save(tmp_path_factory.mktemp("toy") / "toy")
    model = transfer.classifier(handle, 3)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(rng.normal(size=variable.shape))
    return model


@pytest.fixture(scope="module")
def hub_file(of_toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.keras"
    transfer.save(of_toy, path, FACTS)
    return path


def test_checkpoint(of_checkpoint, reference):
    assert isinstance(of_checkpoint, models.ResNetV2)
    logits = np.asarray(of_checkpoint(IMAGES))
    assert logits.shape == (2, 3)
    assert not logits.any()
    found = models.endpoints(of_checkpoint, "pre_logits")(IMAGES)
    np.testing.assert_array_equal(found["pre_logits"], reference)


def test_hub(of_hub, reference):
    layer = of_hub.get_layer("features")
    assert isinstance(layer, hub.KerasLayer)
    assert layer.trainable
    assert not np.asarray(of_hub(IMAGES)).any()
    assert len(of_hub.trainable_variables) == len(of_hub.variables) > 40
    assert helpers.relative_error(layer(IMAGES), reference) < 1e-6


def test_saved_model_with_a_head(small_export, reference, caplog):
    """BiT's own is read as a checkpoint, without its head."""
    model = transfer.classifier(small_export, 4)
    assert isinstance(model, models.ResNetV2)
    assert model.num_classes == 4
    assert "has a head, which is dropped" in caplog.text
    features = models.endpoints(model, "pre_logits")(IMAGES)["pre_logits"]
    assert helpers.relative_error(features, reference) < 1e-6


def test_foreign_saved_model_with_a_head(tmp_path):
    directory = toy_hub.save(tmp_path / "model", classes=True)
    with pytest.raises(errors.HandleError, match="'feature_vector'"):
        transfer.classifier(directory, 3)
    model, facts = transfer.open_classifier(directory)
    assert model(IMAGES).shape == (2, 4)
    assert facts.labels is None


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (lambda x: {"features": x}, "returns dict"),
        (lambda x: x[:, :, None], r"returns \(None, 4, 1\)"),
    ],
    ids=["dict", "rank 3"],
)
def test_no_vector(output, told, tmp_path):
    directory = toy_hub.save(tmp_path / "model", output=output)
    with pytest.raises(errors.HandleError, match=told):
        transfer.classifier(directory, 3)
    with pytest.raises(errors.HandleError, match="A classifier returns"):
        transfer.open_classifier(directory)


def test_not_trainable(tmp_path):
    directory = str(tiny_models.save(tmp_path / "model"))
    with pytest.raises(errors.HandleError, match="trainable_variables"):
        transfer.classifier(directory, 3)


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
def test_number_of_classes(count, small_npz):
    with pytest.raises(ValueError, match="1 or more"):
        transfer.classifier(small_npz, count)


def test_from_scratch(small_npz):
    one, same, other = (
        transfer.classifier(source, 2, scratch=True, seed=seed)
        for source, seed in (("testing", 1), (small_npz, 1), ("testing", 2))
    )
    for first, second in zip(kernels(one), kernels(same), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (np.asarray(one.variables[0]) != other.variables[0].numpy()).any()
    assert len({v.numpy().std() for v in one.variables if v.ndim == 4}) > 10
    assert not np.asarray(one(IMAGES)).any()
    assert transfer.describe(one)["kind"] == "random weights"


def test_scratch_of_a_saved_model(features_export):
    with pytest.raises(errors.HandleError, match="Random weights are for"):
        transfer.classifier(features_export, 2, scratch=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda source: transfer.classifier(source, 3),
        transfer.feature_model,
        transfer.open_classifier,
    ],
    ids=["classifier", "features", "open"],
)
def test_architecture_without_weights(call):
    with pytest.raises(errors.UnknownNameError, match="BiT-M-R50x1"):
        call("R50x1")


def test_features(small_npz, features_export, small_export, reference):
    for source in (small_npz, str(features_export), small_export):
        model = transfer.feature_model(source)
        assert helpers.relative_error(model(IMAGES), reference) < 1e-6
    assert not transfer.feature_model(features_export).trainable_variables


def test_open_classifier(small_npz, small_arrays, small_export):
    by_file, facts = transfer.open_classifier(small_npz)
    assert facts.labels is None
    by_hub, told = transfer.open_classifier(small_export)
    assert [label.name for label in told.labels] == list("abcdefghij")
    assert told.preset.name == "big_transfer eval"
    logits = by_file(IMAGES)
    assert logits.shape == (2, 10)
    assert helpers.relative_error(by_hub(IMAGES), logits) < 1e-6


def test_open_without_a_head(features_export, small_arrays, tmp_path):
    from bit_tf import checkpoints

    path = tmp_path / "features.npz"
    checkpoints.write(
        {n: a for n, a in small_arrays.items() if "head" not in n}, path
    )
    with pytest.raises(errors.CheckpointMismatchError, match="--probe"):
        transfer.open_classifier(path)
    with pytest.raises(errors.HandleError, match="--probe"):
        transfer.open_classifier(features_export)


def test_what_is_trained(of_checkpoint, of_hub):
    """The same names go for both kinds."""
    found = []
    for model in (of_checkpoint, of_hub):
        names = list(transfer.trainable_names(model))
        assert len(names) == len(model.trainable_variables)
        assert transfer.variables_to_train(model) == list(
            transfer.trainable_names(model).values()
        )
        kept = transfer.variables_to_train(model, FROZEN)
        found.append(
            sorted(
                name.removeprefix("features/")
                for name, variable in transfer.trainable_names(model).items()
                if any(variable is one for one in kept)
            )
        )
    assert found[0] == found[1]
    assert found[0][-2:] == ["head/conv2d/bias", "head/conv2d/kernel"]
    assert {name.split("/")[0] for name in found[0]} == {
        "block4",
        "group_norm",
        "head",
    }


def test_what_cannot_be_frozen(of_checkpoint):
    for pattern, told in (("blok", "matches none"), (".", "matches all")):
        with pytest.raises(errors.UnknownNameError, match=told):
            transfer.variables_to_train(of_checkpoint, pattern)
    with pytest.raises(errors.UnknownNameError, match="regular expression"):
        transfer.variables_to_train(of_checkpoint, "block(")


def test_file_of_a_checkpoint(of_checkpoint, small_npz, tmp_path):
    path = tmp_path / "model.keras"
    head = of_checkpoint.layers[-1].dense
    head.bias.assign([1.0, 2.0, 3.0])
    transfer.save(of_checkpoint, path, FACTS)
    head.bias.assign([0.0, 0.0, 0.0])
    for read in (transfer.load, transfer.open_classifier):
        model, facts = read(path)
        assert (facts.labels, facts.preset) == (LABELS, FACTS.preset)
        np.testing.assert_array_equal(model(IMAGES)[0], [1, 2, 3])
    described = transfer.describe(model)
    assert described["format"] == "keras"
    again = transfer.classifier(path, 5)
    assert not np.asarray(again(IMAGES)).any()


def test_file_of_a_hub(of_toy, hub_file):
    assert [entry.name for entry in hub_file.parent.iterdir()] == [
        "model.keras"
    ]
    model, facts = transfer.load(hub_file)
    assert facts == FACTS
    np.testing.assert_array_equal(model(IMAGES), of_toy(IMAGES))
    described = transfer.describe(model)
    layer = of_toy.layers[0]
    assert described["handle"] == layer.handle
    assert described["content_hash"] == hub.content_hash(layer.handle)
    assert described["source"] == str(hub_file)
    again = transfer.classifier(hub_file, 5)
    assert not np.asarray(again(IMAGES)).any()
    assert len(again.trainable_variables) == 3
    features = transfer.feature_model(hub_file)
    np.testing.assert_allclose(features(IMAGES), layer(IMAGES), rtol=1e-6)
    with zipfile.ZipFile(hub_file) as archive:
        assert all(not info.compress_type for info in archive.infolist())


def test_no_file_has_a_password(tmp_path, monkeypatch):
    directory = toy_hub.save(tmp_path / "toy")
    monkeypatch.setattr("bit_tf.hub.resolve", lambda handle: directory)
    handle = "https://me:secret@hub.example/toy/1?token=secret"
    model = transfer.classifier(handle, 3)
    path = tmp_path / "model.keras"
    transfer.save(model, path, FACTS)
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(name) for name in archive.namelist()]
    assert not any(b"secret" in content for content in members)
    assert sum(b"https://hub.example/toy/1" in text for text in members) == 2
    # Who loads it gives the password anew.
    with hub.relocated({"https://hub.example": "https://me:new@hub.example"}):
        found, _ = transfer.load(path)
    assert found.layers[0].handle == "https://me:new@hub.example/toy/1"


def test_moved_together(tmp_path):
    """An output folder finds its SavedModel where both were moved."""
    (tmp_path / "old" / "out").mkdir(parents=True)
    handle = toy_hub.save(tmp_path / "old" / "hub")
    model = transfer.classifier(handle, 2)
    transfer.save(
        model, tmp_path / "old" / "out" / "m.keras", Facts(labels=LABELS[:2])
    )
    (tmp_path / "old").rename(tmp_path / "new")
    found, _ = transfer.load(tmp_path / "new" / "out" / "m.keras")
    assert found.layers[0].handle == str(tmp_path / "new" / "hub")
    shutil.rmtree(tmp_path / "new" / "hub")
    with pytest.raises(errors.HandleError):
        transfer.load(tmp_path / "new" / "out" / "m.keras")


def rewritten(path, target, change):
    """Copies an archive, with its members changed by name."""
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(target, "w") as archive,
    ):
        for info in source.infolist():
            data = change(info.filename, source.read(info))
            if data is not None:
                archive.writestr(info.filename, data)
    return target


def edited(member, edit):
    """A change of one JSON member."""

    def change(name, data):
        if name != member:
            return data
        found = json.loads(data)
        edit(found)
        return json.dumps(found)

    return change


def add_layer(**layer):
    def edit(config):
        config["config"]["layers"].insert(1, layer)

    return edited("config.json", edit)


RAISES = {"class_name": "__lambda__", "config": {"value": "4wAA"}}


def forget(key):
    return edited("metadata.json", lambda found: found.pop(key))


def two_labels(found):
    facts = Facts(labels=LABELS[:2])
    found["bit_tf"] = facts.to_json()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            add_layer(
                class_name="Lambda",
                module="keras.layers",
                registered_name=None,
                config={"function": RAISES},
            ),
            "'Lambda'",
        ),
        (
            add_layer(
                class_name="system",
                module="os",
                registered_name=None,
                config={},
            ),
            "'os'",
        ),
        (
            add_layer(
                class_name=["Sequential"],
                module="keras",
                registered_name=None,
                config={},
            ),
            "Sequential",
        ),
        (
            edited(
                "config.json",
                lambda found: found.update(compile_config={"loss": RAISES}),
            ),
            "__lambda__",
        ),
        (forget("bit_tf"), "without labels"),
        (edited("metadata.json", two_labels), "2 labels for 3 classes"),
        (
            edited("config.json", lambda found: found["config"].pop("layers")),
            "cannot load",
        ),
        (
            lambda name, data: None if name.endswith(".h5") else data,
            "known formats",
        ),
        (
            lambda name, data: data[:300] if name.endswith(".h5") else data,
            "cannot load",
        ),
        (
            lambda name, data: b"[" * 9999 if name == "config.json" else data,
            "cannot be read",
        ),
    ],
    ids=[
        "lambda",
        "module",
        "unhashable",
        "compiled",
        "no facts",
        "labels",
        "no layers",
        "no weights",
        "short weights",
        "deep",
    ],
)
def test_hostile_file(change, told, hub_file, tmp_path):
    path = rewritten(hub_file, tmp_path / "hostile.keras", change)
    with pytest.raises(errors.CheckpointError, match=told):
        transfer.load(path)


def test_truncated_file(hub_file, tmp_path):
    data = hub_file.read_bytes()
    path = tmp_path / "short.keras"
    for size in (0, 3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(errors.CheckpointError):
            transfer.load(path)


def test_file_that_is_not_written(of_toy, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(b"older")
    with pytest.raises(errors.CheckpointFormatError, match=r"\.keras"):
        transfer.save(of_toy, tmp_path / "model.h5", FACTS)
    with pytest.raises(TypeError, match=r"transfer\.classifier"):
        transfer.save(keras.Sequential([keras.Input((3,))]), path, FACTS)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(OSError, match="No space"):
        transfer.save(of_toy, path, FACTS)
    assert path.read_bytes() == b"older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.keras"]


def test_description(of_checkpoint, of_hub, small_npz):
    found = transfer.describe(of_checkpoint)
    assert found["source"] == str(small_npz)
    assert found["architecture"] == "testing"
    assert len(found["sha256"]) == 64
    assert found["parameters"] == 2_007_328 + 3 * 1025
    by_hub = transfer.describe(of_hub)
    assert by_hub["parameters"] == found["parameters"]
    assert by_hub["trainable_parameters"] == found["parameters"]
    own = transfer.describe(keras.Sequential([keras.Input((2,))]))
    assert own["kind"] == "own"
    json.dumps([found, by_hub, own], allow_nan=False)


def test_look(small_npz, features_export, hub_file, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr("bit_tf.cached_download.cached", refuse)
    monkeypatch.setattr("bit_tf.hub.fetch", refuse)
    handle = "https://tfhub.dev/google/bit/m-r50x1/1"
    for source, kind, architecture, here in (
        (small_npz, "checkpoint", "testing", True),
        (str(small_npz), "checkpoint", "testing", True),
        (features_export, "hub", None, True),
        (hub_file, "transfer", None, True),
        ("R101x1", "architecture", "R101x1", True),
        ("BiT-M-R152x4", "checkpoint", "R152x4", False),
        ("BiT-S-R50x1.npz", "checkpoint", "R50x1", False),
        (handle, "hub", "R50x1", False),
        ("google/bit/m-r50x1/1", "hub", None, False),
        ("hf://owner/name", "checkpoint", None, False),
        ("https://example.org/weights.npz?x=1", "checkpoint", None, False),
        ("gs://bucket/model", "hub", None, False),
    ):
        found = transfer.look(source)
        assert (found.kind, found.architecture, found.here) == (
            kind,
            architecture,
            here,
        ), source


def test_look_at_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        transfer.look(tmp_path / "no.npz")
    with pytest.raises(FileNotFoundError):
        transfer.look("no.npz")
    with pytest.raises(errors.UnknownNameError, match="BiT-M-R50x1"):
        transfer.look("BiT-M-R50x11")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(errors.CheckpointFormatError):
        transfer.look(tmp_path / "text.npz")


def test_mixed_precision(small_npz):
    model = transfer.classifier(small_npz, 3, dtype="mixed_bfloat16")
    assert transfer.describe(model)["precision"] == "mixed_bfloat16"
    assert {v.dtype for v in model.variables} == {"float32"}
