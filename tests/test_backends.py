"""The Keras model on backends other than TensorFlow, which is not importable.

The oracle's numbers are computed here, the model's in a fresh process.
"""

import importlib.util
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest
import reference

CODE = """
import sys
sys.modules["tensorflow"] = None
import numpy as np
import keras
import bit_tf
checkpoint, data, out = sys.argv[1:]
pictures = np.load(data)
created = bit_tf.create_model("testing", num_classes=3)
assert created(pictures).shape == (2, 3)
model = bit_tf.load_model(checkpoint)
outputs = bit_tf.endpoints(
    model, ["stem", "block1", "block4", "pre_logits", "logits"])(pictures)
outputs["float"] = model(pictures.astype("float32") / 255)
outputs["predict"] = model.predict(pictures, verbose=0)
model.save(out + ".keras")
outputs["again"] = keras.saving.load_model(out + ".keras")(pictures)
bit_tf.checkpoints.write(model, out + ".again.npz")
again = bit_tf.checkpoints.read(out + ".again.npz")
first = bit_tf.checkpoints.read(checkpoint)
assert all(np.array_equal(again[name], first[name]) for name in first)
np.savez(out, **{k: keras.ops.convert_to_numpy(v) for k, v in outputs.items()})
assert keras.backend.backend() != "tensorflow"
assert not any(
    name.partition(".")[0] == "tensorflow" and sys.modules[name] is not None
    for name in sys.modules)
"""


def check(backend, small_npz, small_arrays, tmp_path):
    pictures = helpers.random_images(2, 65, 40)
    np.save(tmp_path / "x.npy", pictures)
    process = subprocess.run(
        [
            *(sys.executable, "-c", CODE, str(small_npz)),
            *(str(tmp_path / "x.npy"), str(tmp_path / "out.npz")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    expected = reference.forward(small_arrays, pictures / 255)
    with np.load(tmp_path / "out.npz") as found:
        for name in found.files:
            wanted = expected.get(name, expected["logits"])
            assert helpers.relative_error(found[name], wanted) <= 1e-5, name


@pytest.mark.slow
def test_jax(small_npz, small_arrays, tmp_path):
    check("jax", small_npz, small_arrays, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("torch"),
    reason="needs torch: pip install -c constraints.txt '.[oracle]', then "
    "pytest -m slow",
)
def test_torch(small_npz, small_arrays, tmp_path):
    check("torch", small_npz, small_arrays, tmp_path)


@pytest.mark.slow
def test_saved_models_need_the_tensorflow_backend(small_npz, tmp_path):
    code = (
        "import sys\n"
        "from hub_export import saved_model\n"
        "from bit_tf import errors\n"
        "try:\n"
        "    saved_model.convert(*sys.argv[1:])\n"
        "except errors.ExportError as error:\n"
        "    assert 'KERAS_BACKEND=tensorflow' in str(error)\n"
        "    sys.exit(5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(small_npz), str(tmp_path / "out")],
        capture_output=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert process.returncode == 5, process.stderr
    assert not (tmp_path / "out").exists()
