"""Exports, seen by every kind of consumer, each in a fresh process."""

import json
import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf

import bit_tf
from bit_tf import checkpoints, errors, labels, models
from hub_export import card, golden, saved_model


@pytest.fixture(scope="module")
def small(small_export):
    return tf.saved_model.load(str(small_export))


@pytest.fixture(scope="module")
def keras_small(small_npz):
    return bit_tf.load_model(small_npz)


def test_both_dtypes_and_training_values(small, keras_small):
    pictures = helpers.random_images(2, 65, 40)
    expected = keras_small(pictures)
    floats = tf.constant(pictures / np.float32(255), tf.float32)
    for images in (tf.constant(pictures), floats):
        for training in (False, True):
            found = small(images, training=training)
            assert helpers.relative_error(found, expected) <= 1e-5
        assert helpers.relative_error(small(images), expected) <= 1e-5
        assert helpers.relative_error(small(images=images), expected) <= 1e-5


def test_reusable_interface(small, small_arrays):
    names = [variable.name for variable in small.variables]
    assert sorted(names) == sorted(f"{name}:0" for name in small_arrays)
    trainable = [variable.name for variable in small.trainable_variables]
    assert trainable == names
    for variable in small.variables:
        name = variable.name.removesuffix(":0")
        assert np.array_equal(variable, small_arrays[name])
    losses = [loss() for loss in small.regularization_losses]
    kernels = [a for name, a in small_arrays.items() if "kernel" in name]
    expected = sum(
        1e-4 * np.sum(np.square(k, dtype=np.float64)) for k in kernels
    )
    assert len(losses) == len(kernels)
    assert float(sum(losses)) == pytest.approx(expected, rel=1e-5)


def test_no_penalty_unless_asked(features_export):
    model = tf.saved_model.load(str(features_export))
    assert list(model.regularization_losses) == []


def test_static_last_dimensions(small, features_export):
    for function in small.__call__.concrete_functions:
        assert function.structured_outputs.shape.as_list() == [None, 10]
    features = tf.saved_model.load(str(features_export))
    for function in features.__call__.concrete_functions:
        assert function.structured_outputs.shape.as_list() == [None, 1024]
    for function in small.endpoints.__call__.concrete_functions:
        for name, output in function.structured_outputs.items():
            assert output.shape[-1] is not None, name


def test_signatures(small, keras_small, features_export):
    pictures = helpers.random_images(2, 40, 40) / np.float32(255)
    pictures = tf.constant(pictures, tf.float32)
    both = bit_tf.endpoints(keras_small, ["pre_logits", "logits"])(pictures)
    outputs = {
        name: signature(images=pictures)
        for name, signature in small.signatures.items()
    }
    expected = {
        "serving_default": {"output_1": both["logits"]},
        "image_feature_vector": {"features": both["pre_logits"]},
        "image_classification": {
            "logits": both["logits"],
            "probabilities": tf.nn.softmax(both["logits"]),
        },
    }
    assert outputs.keys() == expected.keys()
    for signature, values in expected.items():
        assert outputs[signature].keys() == values.keys()
        for name, value in values.items():
            assert (
                helpers.relative_error(outputs[signature][name], value) < 1e-5
            )
    features = tf.saved_model.load(str(features_export))
    assert set(features.signatures) == {
        "serving_default",
        "image_feature_vector",
    }
    found = features.signatures["serving_default"](images=pictures)["output_1"]
    assert helpers.relative_error(found, both["pre_logits"]) < 1e-5


def test_named_endpoints(small, keras_small):
    pictures = helpers.random_images(1, 50, 41)
    expected = bit_tf.endpoints(keras_small, models.ENDPOINTS)(pictures)
    found = small.endpoints(tf.constant(pictures), training=False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert helpers.relative_error(found[name], value) <= 1e-5, name
    assert len(small.endpoints.trainable_variables) == len(small.variables)


def test_sigmoid_for_imagenet21k_and_softmax_for_others(tmp_path):
    arrays = helpers.random_arrays(*helpers.TESTING, num_classes=21843)
    checkpoints.write(arrays, tmp_path / "m.npz")
    saved_model.convert(tmp_path / "m.npz", tmp_path / "m", verify=False)
    model = tf.saved_model.load(str(tmp_path / "m"))
    pictures = tf.constant(helpers.random_images(1, 32, 32) / 255, tf.float32)
    found = model.signatures["image_classification"](images=pictures)
    sigmoid = tf.nn.sigmoid(found["logits"])
    assert helpers.relative_error(found["probabilities"], sigmoid) < 1e-6
    names = labels.read_saved_model(tmp_path / "m")
    assert names == labels.label_set("imagenet21k")
    assert card.read(tmp_path / "m")[0]["labels"] == "imagenet21k"


def test_what_lies_beside_the_graph(small_export, small_npz):
    description, provenance = card.read(small_export)
    assert description["architecture"] == "testing"
    assert description["num_classes"] == 10
    assert description["labels"] == "custom"
    assert description["numerics"]["ws_epsilon"] == 1e-10
    assert provenance["source"] == small_npz.name
    assert provenance["sha256"] == checkpoints.read(small_npz).sha256()
    assert provenance["format"] == "google_npz"
    assert provenance["versions"]["tensorflow"] == tf.__version__
    names = labels.read_saved_model(small_export)
    assert [label.name for label in names] == list("abcdefghij")
    with np.load(small_export / golden.FILE) as values:
        assert values["images"].dtype == np.uint8
        assert values["output"].shape == (2, 10)
    allowed = {"assets", "assets.extra", "variables"} | {
        "saved_model.pb",
        "fingerprint.pb",
    }
    assert {path.name for path in small_export.iterdir()} <= allowed


CONSUMER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
kind, path, pictures = sys.argv[1:]
pictures = np.load(pictures)
if kind == "tf.saved_model.load":
    import tensorflow as tf
    output = tf.saved_model.load(path)(tf.constant(pictures))
elif kind == "hub.load":
    import tensorflow as tf, tensorflow_hub as hub
    output = hub.load(path)(tf.constant(pictures))
elif kind == "hub.KerasLayer":
    import tensorflow_hub as hub, tf_keras
    layer = hub.KerasLayer(path, trainable=True)
    model = tf_keras.Sequential(
        [tf_keras.layers.InputLayer((None, None, 3)), layer])
    output = model.predict(pictures, verbose=0)
    integers = np.round(pictures * 255).astype(np.uint8)
    again = np.asarray(layer(integers))
    assert np.linalg.norm(again - output) < 1e-5 * np.linalg.norm(output)
elif kind == "keras.layers.TFSMLayer":
    import keras
    layer = keras.layers.TFSMLayer(path, call_endpoint="serving_default")
    output = layer(pictures)["output_1"]
elif kind == "signature":
    import tensorflow as tf
    served = tf.saved_model.load(path).signatures["serving_default"]
    output = served(images=tf.constant(pictures))["output_1"]
np.save(sys.argv[3] + ".out.npy", np.asarray(output))
"""

CONSUMERS = [
    "tf.saved_model.load",
    "hub.load",
    "hub.KerasLayer",
    "keras.layers.TFSMLayer",
    "signature",
]


def run(*command):
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize("kind", CONSUMERS)
def test_consumers_get_the_same_features(
    kind, features_export, small_npz, tmp_path
):
    pictures = helpers.random_images(2, 64, 48) / np.float32(255)
    np.save(tmp_path / "x.npy", pictures.astype(np.float32))
    run(
        sys.executable,
        "-c",
        CONSUMER,
        kind,
        str(features_export),
        str(tmp_path / "x.npy"),
    )
    expected = bit_tf.load_model(small_npz, head=False)(pictures)
    found = np.load(tmp_path / "x.npy.out.npy")
    assert helpers.relative_error(found, expected) <= 1e-5


def test_saved_model_cli(features_export, small_npz, tmp_path):
    pictures = helpers.random_images(2, 64, 48) / np.float32(255)
    np.save(tmp_path / "x.npy", pictures.astype(np.float32))
    run(
        os.path.join(os.path.dirname(sys.executable), "saved_model_cli"),
        "run",
        *("--dir", str(features_export)),
        *("--tag_set", "serve"),
        *("--signature_def", "serving_default"),
        *("--inputs", f"images={tmp_path / 'x.npy'}"),
        *("--outdir", str(tmp_path)),
    )
    expected = bit_tf.load_model(small_npz, head=False)(pictures)
    found = np.load(tmp_path / "output_1.npy")
    assert helpers.relative_error(found, expected) <= 1e-5


FINE_TUNE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import tensorflow as tf, tensorflow_hub as hub, tf_keras
path, data = sys.argv[1:]
data = np.load(data)
layer = hub.KerasLayer(path, trainable=True)
model = tf_keras.Sequential(
    [tf_keras.layers.InputLayer((None, None, 3)), layer])
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(model(data["x"], training=True) * data["w"])
gradients = tape.gradient(loss, layer.trainable_weights)
names = [v.name.removesuffix(":0") for v in layer.trainable_weights]
np.savez(sys.argv[2] + ".gradients.npz", **{
    n.replace("/", "|"): g for n, g in zip(names, gradients)})
before = [v.numpy() for v in layer.trainable_weights]
model.add(tf_keras.layers.Dense(2))
model.compile(tf_keras.optimizers.SGD(0.1),
    tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(data["x"], np.arange(len(data["x"])) % 2, verbose=0)
changed = [bool((a != v.numpy()).any())
           for a, v in zip(before, layer.trainable_weights)]
print(json.dumps({"count": len(names), "changed": sum(changed)}))
"""


def fine_tune(export, model, size, tmp_path):
    """What hub.KerasLayer trains, and how its gradients compare to Keras 3."""
    rng = np.random.default_rng(0)
    x = helpers.random_images(2, *size) / np.float32(255)
    w = rng.standard_normal(model(x).shape).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, w=w)
    output = run(
        sys.executable, "-c", FINE_TUNE, str(export), str(tmp_path / "data.npz")
    )
    named = models.canonical_variables(model)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True) * w)
    gradients = tape.gradient(loss, [v.value for v in named.values()])
    with np.load(tmp_path / "data.npz.gradients.npz") as found:
        pairs = [
            (found[name.replace("/", "|")], gradient)
            for name, gradient in zip(named, gradients, strict=True)
        ]
    worst = max(helpers.relative_error(a, b) for a, b in pairs)
    return json.loads(output.splitlines()[-1]), worst


@pytest.mark.slow
def test_fine_tuning_in_tf_keras(features_export, small_npz, tmp_path):
    model = bit_tf.load_model(small_npz, head=False)
    report, worst = fine_tune(features_export, model, (40, 33), tmp_path)
    assert report == {"count": 43, "changed": 43}
    assert worst <= 1e-4


@pytest.fixture(scope="module")
def r50x1(tmp_path_factory):
    """(Keras model, its export) at full size."""
    folder = tmp_path_factory.mktemp("r50x1")
    arrays = helpers.random_arrays((3, 4, 6, 3), 64)
    checkpoints.write(arrays, folder / "r50x1.npz")
    saved_model.convert(folder / "r50x1.npz", folder / "model")
    return bit_tf.load_model(folder / "r50x1.npz"), folder / "model"


@pytest.mark.slow
def test_r50x1_in_every_consumer(r50x1, tmp_path):
    model, export = r50x1
    pictures = helpers.random_images(1, 97, 131) / np.float32(255)
    pictures = pictures.astype(np.float32)
    np.save(tmp_path / "x.npy", pictures)
    expected = model(pictures)
    for kind in CONSUMERS:
        run(
            *(sys.executable, "-c", CONSUMER, kind),
            *(str(export), str(tmp_path / "x.npy")),
        )
        found = np.load(tmp_path / "x.npy.out.npy")
        assert helpers.relative_error(found, expected) <= 1e-5, kind
    report, worst = fine_tune(export, model, (97, 131), tmp_path)
    assert report == {"count": 151, "changed": 151}
    assert worst <= 1e-4


def test_large_models_run_unit_by_unit(keras_small, tmp_path, monkeypatch):
    """What is done past saved_model.LARGE, forced on a small model."""
    monkeypatch.setattr(saved_model, "LARGE", 0)
    saved_model.export(keras_small, tmp_path / "out", verify=False)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    functions = [
        function
        for function in loaded.__call__.concrete_functions[0]
        .graph.as_graph_def()
        .library.function
        if function.attr["_noinline"].b
    ]
    assert len(functions) >= 4
    # No ReLU has an input of less than 1e-4 for this picture: one that
    # rounding may take over zero changes gradients by far more than rounding.
    pictures = helpers.random_images(1, 40, 40, seed=17)
    pictures = tf.constant(pictures / 255, tf.float32)
    expected = keras_small(pictures)
    assert helpers.relative_error(loaded(pictures), expected) <= 1e-5
    named = models.canonical_variables(keras_small)
    gradients = []
    for call, variables in (
        (loaded, loaded.trainable_variables),
        (keras_small, [variable.value for variable in named.values()]),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(pictures, training=True) ** 2)
        gradients.append(tape.gradient(loss, variables))
    for found, wanted in zip(*gradients, strict=True):
        assert helpers.relative_error(found, wanted) <= 1e-4
    assert "call" not in vars(keras_small.get_layer("block1").units[0])


def test_an_export_is_never_written_over(small_npz, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(errors.ExportError, match="overwrite"):
        saved_model.convert(small_npz, tmp_path / "there")
    with pytest.raises(errors.ExportError, match="is neither"):
        saved_model.convert(small_npz, tmp_path / "there", overwrite=True)
    assert (tmp_path / "there" / "file").read_text() == "mine"
    (tmp_path / "there" / "file").rename(tmp_path / "there" / "saved_model.pb")
    saved_model.convert(
        small_npz, tmp_path / "there", overwrite=True, verify=False
    )
    assert (tmp_path / "there" / "saved_model.pb").read_bytes() != b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_nothing_appears_when_verification_fails(
    small_npz, tmp_path, monkeypatch
):
    values = golden.make

    def wrong(model):
        made = values(model)
        return {**made, "output": made["output"] * 1.01}

    monkeypatch.setattr(golden, "make", wrong)
    with pytest.raises(errors.VerificationError, match="golden values"):
        saved_model.convert(small_npz, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_on_a_full_disk(small_npz, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "save", full)
    with pytest.raises(errors.ExportError, match="No space left"):
        saved_model.convert(small_npz, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_killed_midway_leaves_nothing_at_its_path(
    small_npz, tmp_path
):
    code = (
        "import os, sys\n"
        "from hub_export import golden, saved_model\n"
        "golden.check_in_fresh_process = lambda path: os._exit(9)\n"
        f"saved_model.convert({str(small_npz)!r}, sys.argv[1])\n"
    )
    target = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True
    )
    assert process.returncode == 9
    assert not target.exists()
    saved_model.convert(small_npz, target, verify=False)
    assert golden.check(target)["variables"] == 45


@pytest.mark.slow
def test_two_exports_at_once_cannot_mix(small_npz, tmp_path, monkeypatch):
    target = tmp_path / "out"
    check = golden.check_in_fresh_process

    def meanwhile(directory):
        target.mkdir()
        (target / "other").write_text("first")
        return check(directory)

    monkeypatch.setattr(golden, "check_in_fresh_process", meanwhile)
    with pytest.raises(errors.ExportError, match="other process"):
        saved_model.convert(small_npz, target)
    assert (target / "other").read_text() == "first"


def test_golden_values_find_damage(small_export, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(small_export, copy)
    data = copy / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    data.write_bytes(content)
    with pytest.raises(errors.VerificationError):
        golden.check_in_fresh_process(copy)
    (copy / golden.FILE).unlink()
    with pytest.raises(errors.VerificationError, match="holds golden values"):
        golden.check(copy)


@pytest.mark.slow
def test_a_new_head_still_has_its_backbone_checked(tmp_path, monkeypatch):
    """Its logits are all zero, so features are compared as well."""
    model = bit_tf.create_model("testing", 3)
    values = golden.make

    def wrong(model):
        made = values(model)
        assert np.all(made["output"] == 0)
        return {**made, "features": made["features"] * 1.01}

    monkeypatch.setattr(golden, "make", wrong)
    with pytest.raises(errors.VerificationError, match="image_feature_vector"):
        saved_model.export(model, tmp_path / "out")


@pytest.mark.slow
def test_mixed_precision_exports_float32_outputs(small_npz, tmp_path):
    model = bit_tf.load_model(small_npz, dtype="mixed_bfloat16")
    saved_model.export(model, tmp_path / "out")
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    pictures = tf.constant(helpers.random_images(1, 40, 40))
    found = loaded(pictures)
    assert found.dtype == tf.float32
    expected = tf.cast(model(pictures), tf.float32)
    assert helpers.relative_error(found, expected) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": "tanh"}, "'softmax' or 'sigmoid'"),
        ({"l2": -1.0}, "0 or more"),
        ({"l2": float("nan")}, "0 or more"),
        ({"class_labels": list(range(10))}, "one line of text"),
        ({"class_labels": [*"abcdefghi", "j\nk"]}, "one line of text"),
    ],
)
def test_wrong_options(keras_small, tmp_path, options, message):
    with pytest.raises(errors.ExportError, match=message):
        saved_model.export(keras_small, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_labels_must_fit(keras_small, tmp_path):
    with pytest.raises(errors.ExportError, match=r"each of the 10.*2 labels"):
        saved_model.export(
            keras_small, tmp_path / "out", class_labels=["a", "b"]
        )
    with pytest.raises(errors.ExportError, match="1000 labels"):
        saved_model.export(
            keras_small, tmp_path / "out", class_labels="ilsvrc2012"
        )
    with pytest.raises(errors.ExportError, match="Received: Sequential"):
        saved_model.export(keras.Sequential(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
