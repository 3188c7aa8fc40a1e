"""A BiT-ResNet of Keras' own layers only, standardization done beforehand.

Such a model, and its .keras file, need Keras and nothing of this package.
Converters to other runtimes, too, know all of its layers. The price: the
kernels are standardized once and for all, so training it further is not
training BiT, and no checkpoint can be made of it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from bit_tf import errors, files, models
from bit_tf.checkpoints import checkpoint, keras_file
from bit_tf.checkpoints.facts import Facts

__all__ = ["fold", "write"]

_TOLERANCE = 1e-4
_CHUNK = 1 << 20
# The child's memory is for the model: a parent that runs on a GPU has
# reserved that one's.
_FRUGAL = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "PYTHONWARNINGS": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTEROP_THREADS": "1",
}
_RUN = """
import sys
sys.modules["bit_tf"] = None
import keras
import numpy as np
path, pictures, outputs = sys.argv[1:]
model = keras.saving.load_model(path, compile=False)
foreign = {
    f"{type(layer).__module__}.{type(layer).__name__}"
    for layer in model.layers
    if not type(layer).__module__.startswith("keras.")
}
if foreign:
    sys.exit(f"layers that are not Keras' own: {sorted(foreign)}")
both = keras.Model(
    model.input, [model.get_layer("pre_logits").output, model.output]
)
features, output = both(np.load(pictures), training=False)
np.savez(
    outputs,
    pre_logits=keras.ops.convert_to_numpy(features),
    output=keras.ops.convert_to_numpy(output),
)
"""


def fold(model: models.ResNetV2) -> keras.Model:
    """Builds the same network of Keras' built-in layers.

    Every kernel is standardized in float64, rounded to float32, and becomes
    that of a Conv2D without bias. Layers are named after the scopes of the
    weights: root_block_conv, block1_unit01_a_norm … pre_logits, head.

    Outputs equal the model's to a relative error of about 1e-6. Keras' group
    normalization is less accurate under TensorFlow on a CPU where means are
    far from zero: at a hundred times the spread its relative error was 2e-4,
    and 5e-6 with this package's own; under JAX both were 1e-5.

    Args:
      model: from create_model or load_model; any numerics and output stride,
        with or without a head, of any dtype policy.

    Returns:
      A functional float32 model: RGB float32 [n, h, w, 3] in [0, 1], any size,
      → logits float32 [n, num_classes], or features [n, 32 · stem_width].
      Unlike ResNetV2 it does not scale uint8: Keras casts that to 0 … 255, so
      divide by 255 beforehand.
    """
    inputs = keras.Input((None, None, 3), dtype="float32", name="images")
    x = _layer("Rescaling", "rescaling", scale=2.0, offset=-1.0)(inputs)
    root = model.get_layer("root_block")
    x = _conv(x, root.conv, "root_block_conv")
    x = _pool(x, root.pool_border)
    for layer in model.layers:
        if isinstance(layer, models.Block):
            for unit in layer.units:
                x = _unit(x, unit, f"{layer.name}_{unit.name}")
    x = _norm(x, model.get_layer("group_norm"), "group_norm")
    x = _layer("GlobalAveragePooling2D", "pre_logits", channels=True)(x)
    if model.num_classes:
        source = model.get_layer("head").dense
        dense = _layer(
            "Dense", "head", units=source.units, kernel_initializer="zeros"
        )
        x = dense(x)
        dense.kernel.assign(source.kernel)
        dense.bias.assign(source.bias)
    return keras.Model(inputs, x, name=model.name)


def write(
    model: models.ResNetV2,
    path: str | os.PathLike[str],
    *,
    facts: Facts | None = None,
) -> None:
    """Folds a model and writes it as a .keras file that needs Keras alone.

    The file is loaded in a fresh process in which this package cannot be
    imported, and must give this model's features and output. Only then does
    it appear, at once and whole. Two writes of one model give the same bytes.
    `keras.saving.load_model(path)` reads it, safe mode included.

    Args:
      model: see `fold`. One in mixed precision is compared in float32, which
        takes the memory of another copy of its weights.
      path: the file to write or to replace; Keras wants ".keras" at its end.
      facts: recorded in metadata.json, which Keras does not read; those that
        the model itself tells if None.

    Raises:
      CheckpointFormatError: the path has another ending.
      VerificationError: the file does not give the model's outputs.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    keras_file.require_suffix(path)
    checkpoint.require_place(path)
    if facts is None:
        facts = Facts(model.numerics, output_stride=model.output_stride)
    expected = _expected(model)
    with (
        tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}."
        ) as directory,
        files.new_file(path) as file,
    ):
        folder = pathlib.Path(directory)
        saved = folder / "saved.keras"
        fold(model).save(saved)
        _repack(saved, file, facts)
        saved.unlink()
        file.flush()
        staged = folder / "staged.keras"
        staged.symlink_to(file.name)
        found = _run_alone(staged, folder, expected["pictures"], path)
        _compare(found, expected, path)


def _layer(kind: str, name: str, *, channels=False, **options):
    """A built-in layer, in float32 whatever the global policy is."""
    if channels:
        options["data_format"] = "channels_last"
    return getattr(keras.layers, kind)(name=name, dtype="float32", **options)


def _conv(x, source, name: str):
    border = source.dilation_rate * (source.kernel_size - 1) // 2
    padding = "valid"
    if border and source.strides == 1:
        padding = "same"
    elif border:
        x = _layer(
            "ZeroPadding2D", f"{name}_padding", channels=True, padding=border
        )(x)
    conv = _layer(
        "Conv2D",
        name,
        channels=True,
        filters=source.filters,
        kernel_size=source.kernel_size,
        strides=source.strides,
        padding=padding,
        dilation_rate=source.dilation_rate,
        use_bias=False,
        kernel_initializer="zeros",
    )
    x = conv(x)
    conv.kernel.assign(_standardized(source.kernel, source.epsilon))
    return x


def _standardized(kernel, epsilon: float) -> np.ndarray:
    """float32 HWIO: mean 0 and biased variance 1 in every filter."""
    kernel = ops.convert_to_numpy(kernel).astype(np.float64)
    kernel -= kernel.mean(axis=(0, 1, 2))
    variance = np.einsum("hwio,hwio->o", kernel, kernel)
    variance /= kernel.size // kernel.shape[-1]
    kernel /= np.sqrt(variance + epsilon)
    return kernel.astype(np.float32)


def _norm(x, source, name: str):
    norm = _layer(
        "GroupNormalization",
        name,
        groups=source.groups,
        axis=-1,
        epsilon=source.epsilon,
    )
    x = norm(x)
    norm.gamma.assign(source.gamma)
    norm.beta.assign(source.beta)
    return _layer("ReLU", f"{name}_relu")(x)


def _pool(x, border: float):
    """3×3 max pooling at stride 2, one pixel of `border` on every side."""
    if border == 0:
        x = _layer(
            "ZeroPadding2D", "root_block_pool_padding", channels=True, padding=1
        )(x)
        return _layer(
            "MaxPooling2D",
            "root_block_pool",
            channels=True,
            pool_size=3,
            strides=2,
            padding="valid",
        )(x)
    if border != -np.inf:
        raise ValueError(
            "Built-in layers can pool with a border of 0 or -inf. Received: "
            f"{border}."
        )
    # Padding "same" is of -inf, and symmetric at stride 1 only.
    x = _layer(
        "MaxPooling2D",
        "root_block_pool",
        channels=True,
        pool_size=3,
        strides=1,
        padding="same",
    )(x)
    return _layer(
        "MaxPooling2D",
        "root_block_pool_stride",
        channels=True,
        pool_size=1,
        strides=2,
        padding="valid",
    )(x)


def _unit(x, unit, name: str):
    inputs = x
    x = _norm(x, unit.norm_a, f"{name}_a_norm")
    shortcut = inputs
    if unit.project:
        shortcut = _conv(x, unit.conv_proj, f"{name}_a_proj_conv")
    x = _conv(x, unit.conv_a, f"{name}_a_conv")
    x = _norm(x, unit.norm_b, f"{name}_b_norm")
    x = _conv(x, unit.conv_b, f"{name}_b_conv")
    x = _norm(x, unit.norm_c, f"{name}_c_norm")
    x = _conv(x, unit.conv_c, f"{name}_c_conv")
    return _layer("Add", f"{name}_add")([x, shortcut])


def _expected(model: models.ResNetV2) -> dict[str, np.ndarray]:
    """Pictures of odd size, and what the model gives for them in float32."""
    root = model.get_layer("root_block")
    with keras.device("cpu:0"):
        if root.compute_dtype != "float32":
            twin = models.ResNetV2.from_config(
                {**model.get_config(), "dtype": "float32"}
            )
            for new, old in zip(twin.weights, model.weights, strict=True):
                new.assign(old)
            model = twin
        pictures = np.random.default_rng(0).random((2, 65, 71, 3), np.float32)
        last = models.endpoint_names(model)[-1]
        outputs = models.endpoints(model, ["pre_logits", last])(
            pictures, training=False
        )
        return {
            "pictures": pictures,
            "pre_logits": ops.convert_to_numpy(outputs["pre_logits"]),
            "output": ops.convert_to_numpy(outputs[last]),
        }


def _repack(source: pathlib.Path, file, facts: Facts) -> None:
    """Copies a .keras file with these facts, and without dates."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new,
    ):
        for info in old.infolist():
            if info.filename == keras_file.METADATA:
                text = keras_file.metadata(facts)
                new.writestr(keras_file.member(info.filename), text)
            elif info.filename == keras_file.CONFIG:
                config = json.loads(old.read(info), object_hook=_for_any_keras)
                text = json.dumps(config)
                new.writestr(keras_file.member(info.filename), text)
            else:
                member = keras_file.member(info.filename, info.file_size)
                with old.open(info) as reader, new.open(member, "w") as writer:
                    shutil.copyfileobj(reader, writer, _CHUNK)


def _for_any_keras(config: dict[str, Any]) -> dict[str, Any]:
    """Drops an argument that says nothing, and that older Kerases refuse."""
    if config.get("quantization_config", "") is None:
        del config["quantization_config"]
    return config


def _run_alone(
    staged: pathlib.Path,
    folder: pathlib.Path,
    pictures: np.ndarray,
    path: pathlib.Path,
) -> dict[str, np.ndarray]:
    """What a fresh process without this package gets for the pictures.

    Raises:
      VerificationError: it gets nothing.
    """
    np.save(folder / "pictures.npy", pictures)
    arguments = (staged, folder / "pictures.npy", folder / "outputs.npz")
    process = subprocess.run(
        [sys.executable, "-P", "-c", _RUN, *map(os.path.abspath, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_FRUGAL},
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["?"])[-1]
        raise errors.VerificationError(
            f"{path}: a fresh process must load the file with Keras alone. "
            f"Received: exit {process.returncode}, {reason}. Nothing was "
            "written."
        )
    with np.load(folder / "outputs.npz", allow_pickle=False) as outputs:
        return dict(outputs)


def _compare(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    path: pathlib.Path,
) -> None:
    """Holds the file's outputs against the model's.

    Raises:
      VerificationError: they differ.
    """
    for name in ("pre_logits", "output"):
        difference = np.linalg.norm(found[name] - expected[name])
        bound = _TOLERANCE * np.linalg.norm(expected[name])
        # Written so that NaN does not pass.
        if not difference <= bound:
            raise errors.VerificationError(
                f"{path}: in a fresh process the {name} must equal the "
                f"model's to a relative error of {_TOLERANCE}. Received: a "
                f"difference of {difference:g}, where {bound:g} is allowed. "
                "Nothing was written."
            )
