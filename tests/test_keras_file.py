"""Our .keras files as arrays: against Keras itself, damaged, hostile."""

import gc
import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Mapping

import h5py
import helpers
import keras
import numpy as np
import pytest

from bit_tf import errors, labels, models, presets, variants
from bit_tf.checkpoints import google_npz, keras_file, layout
from bit_tf.checkpoints.facts import Facts

TINY = (1, 1, 1, 1)
GAMMA = "block2/unit01/b/group_norm/gamma"
GAMMA_PATH = "layers/block_1/units/unit/norm_b/vars/0"
KERNEL = "block4/unit01/b/standardized_conv2d/kernel"
KERNEL_PATH = "layers/block_3/units/unit/conv_b/vars/0"
PICTURES = helpers.random_images(2, 65, 54)


class Arrays(dict):
    """Arrays with facts, and perhaps a config."""

    facts = Facts()


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


@pytest.fixture(scope="module")
def path(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("keras") / "tiny.keras"
    keras_file.write(arrays, path)
    return path


def filled(model, seed=0):
    """The model with random weights, and those by canonical name."""
    weights = helpers.random_arrays(
        model.blocks, model.stem_width, model.num_classes, seed
    )
    for name, variable in models.canonical_variables(model).items():
        variable.assign(weights[name])
    return model, weights


def assert_same(read, arrays):
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.tobytes() == arrays[name].tobytes(), name
        assert array.shape == arrays[name].shape


def tree(path):
    """{HDF5 path: attributes, and the values of a dataset}"""
    with zipfile.ZipFile(path) as archive:
        data = io.BytesIO(archive.read("model.weights.h5"))
    found = {}

    def visit(name, item):
        value = None
        if isinstance(item, h5py.Dataset):
            value = (item.shape, item.dtype, item[()].tobytes())
        found[name] = dict(item.attrs), value

    with h5py.File(data) as file:
        visit("", file)
        file.visititems(visit)
    return found


def member(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def rezipped(source, target, replaced, method=zipfile.ZIP_STORED):
    """Copies an archive with some members replaced, or dropped (None)."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", method) as new,
    ):
        for name in old.namelist():
            data = replaced.get(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def edited(source, target, edit):
    """Copies a .keras file after a change to its HDF5 file."""
    data = io.BytesIO(member(source, "model.weights.h5"))
    with h5py.File(data, "r+") as file:
        edit(file)
    return rezipped(source, target, {"model.weights.h5": data.getvalue()})


def configured(source, target, top=(), **changes):
    """Copies a .keras file after a change to its config."""
    found = json.loads(member(source, "config.json"))
    found["config"].update(changes)
    found.update(top)
    return rezipped(source, target, {"config.json": json.dumps(found)})


@pytest.mark.parametrize("num_classes", [0, 1, 10])
@pytest.mark.parametrize("blocks", [TINY, (1, 2, 1, 3)])
def test_round_trip_is_bit_identical(tmp_path, blocks, num_classes):
    arrays = helpers.random_arrays(blocks, 32, num_classes)
    arrays[GAMMA][:3] = [-0.0, 1e-45, 3.4e38]
    keras_file.write(arrays, tmp_path / "a.keras")
    read = keras_file.read(tmp_path / "a.keras")
    assert_same(read, arrays)
    assert (read.blocks, read.num_classes) == (blocks, num_classes)
    assert (read.format, read.extra, read.notes) == ("keras", (), ())
    assert read.facts == Facts()
    assert read.shapes == layout.expected_shapes(blocks, 32, num_classes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0, "numerics": "big_vision"},
        {"output_stride": 16, "numerics": "timm"},
        {"dtype": "mixed_bfloat16", "name": "mine"},
        {"frozen": ("root_block", "block2", "block4/unit02")},
    ],
)
def test_what_keras_saves_is_read_bit_identically(tmp_path, options):
    model, weights = filled(
        models.ResNetV2((1, 2, 1, 3), 32, **{"num_classes": 10, **options})
    )
    model.save(tmp_path / "a.keras")
    assert keras_file.sniff(tmp_path / "a.keras")
    read = keras_file.read(tmp_path / "a.keras")
    assert_same(read, weights)
    assert read.sources[GAMMA] == GAMMA_PATH
    assert read.sources[KERNEL] == KERNEL_PATH
    assert read.facts == Facts(
        options.get("numerics", "google"),
        output_stride=options.get("output_stride", 32),
    )
    assert read.extra == ()


def test_gamma_and_beta_kernel_and_bias_are_told_apart(tmp_path):
    """Of one shape each, only the order of the variables tells them."""
    model = models.ResNetV2(TINY, 32, 1024)
    for name, variable in models.canonical_variables(model).items():
        variable.assign(np.full(variable.shape, len(name), np.float32))
        if name.endswith(("gamma", "bias")):
            variable.assign(np.full(variable.shape, -3, np.float32))
    model.save(tmp_path / "a.keras")
    for name, array in keras_file.read(tmp_path / "a.keras").items():
        wanted = -3 if name.endswith(("gamma", "bias")) else len(name)
        assert (array == wanted).all(), name


@pytest.mark.parametrize(
    "options",
    [
        {"name": "resnetv2", "numerics": "timm", "output_stride": 8},
        {"name": "x", "num_classes": 0, "dtype": "mixed_float16"},
        {"name": "y", "frozen": ("block1", "head")},
    ],
)
def test_what_is_written_is_what_keras_saves(tmp_path, options):
    model, weights = filled(
        models.ResNetV2((1, 2, 1, 1), 32, **{"num_classes": 10, **options})
    )
    model.save(tmp_path / "theirs.keras")
    ours = Arrays(weights)
    ours.facts = Facts(model.numerics, output_stride=model.output_stride)
    if "output_stride" not in options:
        ours.config = model.get_config()
    keras_file.write(ours, tmp_path / "ours.keras")
    assert tree(tmp_path / "ours.keras") == tree(tmp_path / "theirs.keras")
    one, other = (
        json.loads(member(tmp_path / name, "config.json"))
        for name in ("ours.keras", "theirs.keras")
    )
    assert one == {"compile_config": {}, **other}
    one, other = (
        json.loads(member(tmp_path / name, "metadata.json"))
        for name in ("ours.keras", "theirs.keras")
    )
    assert one.keys() - {"bit_tf"} == other.keys()
    assert one["keras_version"] == other["keras_version"]


@pytest.mark.parametrize("numerics", ["google", "big_vision"])
def test_keras_loads_what_is_written(tmp_path, arrays, numerics):
    ours = Arrays(arrays)
    ours.facts = Facts(numerics, output_stride=16)
    keras_file.write(ours, tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert isinstance(loaded, models.ResNetV2)
    assert loaded.name == "testing"
    assert (loaded.numerics, loaded.output_stride) == (numerics, 16)
    model, _ = filled(
        models.ResNetV2(TINY, 32, 10, numerics=numerics, output_stride=16)
    )
    for name, variable in models.canonical_variables(loaded).items():
        assert np.asarray(variable).tobytes() == arrays[name].tobytes()
    np.testing.assert_array_equal(loaded(PICTURES), model(PICTURES))


def test_facts_travel(tmp_path, arrays):
    ours = Arrays(arrays)
    ours.facts = Facts(
        "timm",
        presets.PRESETS["timm in1k"],
        tuple(labels.Label(f"n{i}", f"name {i} é") for i in range(10)),
        8,
    )
    keras_file.write(ours, tmp_path / "a.keras")
    assert keras_file.read(tmp_path / "a.keras").facts == ours.facts
    keras_file.write(
        keras_file.read(tmp_path / "a.keras"), tmp_path / "b.keras"
    )
    one, other = tmp_path / "a.keras", tmp_path / "b.keras"
    assert one.read_bytes() == other.read_bytes()


def test_the_config_is_stronger_than_the_facts(tmp_path, arrays):
    ours = Arrays(arrays)
    ours.facts = Facts("timm", presets.PRESETS["timm in1k"])
    ours.config = models.ResNetV2(TINY, 32, 10, output_stride=8).get_config()
    keras_file.write(ours, tmp_path / "a.keras")
    assert keras_file.read(tmp_path / "a.keras").facts == Facts(
        "google", presets.PRESETS["timm in1k"], output_stride=8
    )


def test_two_writes_give_the_same_bytes(arrays, path, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr("time.time", lambda: 1e9)
    keras_file.write(dict(reversed(arrays.items())), tmp_path / "a.keras")
    assert (tmp_path / "a.keras").read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.keras"]


def test_optimizer_state_is_skipped_and_said(tmp_path):
    model = models.ResNetV2(TINY, 32, 10, dtype="mixed_float16")
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        run_eagerly=True,
    )
    model.fit(PICTURES, np.zeros(2, np.int32), verbose=0)
    model.save(tmp_path / "a.keras")
    state = [name for name in tree(tmp_path / "a.keras") if "optimizer" in name]
    assert len(state) > 2 * len(model.trainable_variables)
    read = keras_file.read(tmp_path / "a.keras")
    assert read.extra == ()
    (note,) = read.notes
    assert note.startswith("skipped optimizer state: optimizer/…")
    assert_same(
        read,
        {
            name: np.asarray(variable)
            for name, variable in models.canonical_variables(model).items()
        },
    )


@pytest.mark.parametrize("name", variants.ARCHITECTURES)
def test_names_go_both_ways(name):
    row = variants.ARCHITECTURES[name]
    shapes = layout.expected_shapes(row.blocks, row.stem_width, 1000)
    spelled = [keras_file.spell(key) for key in shapes]
    assert len(set(spelled)) == len(shapes)
    assert [keras_file.canonical(path) for path in spelled] == list(shapes)


def test_names():
    for name, path in {
        layout.ROOT_KERNEL: "layers/root_block/conv/vars/0",
        "block1/unit01/a/group_norm/beta": (
            "layers/block/units/unit/norm_a/vars/1"
        ),
        "block3/unit12/c/standardized_conv2d/kernel": (
            "layers/block_2/units/unit_11/conv_c/vars/0"
        ),
        "block2/unit01/a/proj/standardized_conv2d/kernel": (
            "layers/block_1/units/unit/conv_proj/vars/0"
        ),
        "group_norm/gamma": "layers/group_normalization/vars/0",
        "head/conv2d/bias": "layers/head/dense/vars/1",
    }.items():
        assert keras_file.spell(name) == path
        assert keras_file.canonical(path) == name
    for path in (
        "layers/block_0/units/unit/norm_a/vars/1",
        "layers/block/units/unit_0/norm_a/vars/1",
        "layers/block_01/units/unit/norm_a/vars/1",
        "layers/block/units/unit/norm_a/vars/2",
        "layers/head/dense/vars/0/",
        "",
    ):
        assert keras_file.canonical(path) is None
    assert keras_file.spell("other") == "other"


@pytest.mark.slow
def test_a_deep_model_is_named_as_keras_names_it(tmp_path):
    model, weights = filled(models.ResNetV2((3, 8, 36, 3), 32, 10))
    model.save(tmp_path / "theirs.keras")
    assert_same(keras_file.read(tmp_path / "theirs.keras"), weights)
    ours = Arrays(weights)
    ours.config = model.get_config()
    keras_file.write(ours, tmp_path / "ours.keras")
    assert tree(tmp_path / "ours.keras") == tree(tmp_path / "theirs.keras")


def transposed(file):
    value = file[KERNEL_PATH][()].transpose(3, 2, 0, 1)
    del file[KERNEL_PATH]
    file[KERNEL_PATH] = value


def shorter(file):
    value = file[KERNEL_PATH][..., 1:]
    del file[KERNEL_PATH]
    file[KERNEL_PATH] = value


def of_integers(file):
    value = file[KERNEL_PATH][()].astype(np.int32)
    del file[KERNEL_PATH]
    file[KERNEL_PATH] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda file: file.move(KERNEL_PATH, KERNEL_PATH[:-1] + "2"),
            KERNEL_PATH[:-1] + "2",
        ),
        (
            lambda file: file.move("layers/block_3", "layers/block_4"),
            "block4/unit01",
        ),
        (lambda file: file.pop(KERNEL_PATH), "−"),
        (transposed, "OIHW"),
        (shorter, "≠"),
        (of_integers, "int32"),
    ],
    ids=["renamed", "moved", "dropped", "transposed", "shorter", "integers"],
)
def test_a_changed_tensor_is_named(path, tmp_path, edit, message):
    edited(path, tmp_path / "a.keras", edit)
    with pytest.raises(errors.CheckpointError) as error:
        keras_file.read(tmp_path / "a.keras")
    assert message in str(error.value)
    if message != "block4/unit01":
        assert KERNEL in str(error.value)
        assert KERNEL_PATH in str(error.value)


def test_nan_is_named_when_it_is_read(path, tmp_path):
    def edit(file):
        file[KERNEL_PATH][0, 0, 3, 4] = np.nan

    read = keras_file.read(edited(path, tmp_path / "a.keras", edit))
    assert np.isfinite(read[GAMMA]).all()
    with pytest.raises(errors.CheckpointFormatError, match="nan") as error:
        read[KERNEL]
    assert KERNEL in str(error.value)
    assert KERNEL_PATH in str(error.value)


def test_foreign_arrays_are_reported(path, tmp_path):
    def edit(file):
        file["layers/dropout/seed/vars/0"] = np.zeros(2, np.uint32)

    read = keras_file.read(edited(path, tmp_path / "a.keras", edit))
    assert read.extra == ("layers/dropout/seed/vars/0",)


def test_a_flipped_bit_is_found(arrays, path, tmp_path):
    data = bytearray(path.read_bytes())
    at = data.index(arrays[KERNEL].tobytes()[:64]) + 1001
    data[at] ^= 1
    (tmp_path / "a.keras").write_bytes(data)
    read = keras_file.read(tmp_path / "a.keras")
    for _ in range(2):
        with pytest.raises(errors.CheckpointFormatError, match="CRC") as error:
            read[KERNEL]
        assert KERNEL_PATH in str(error.value)


def test_deflated_files_are_read(arrays, path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    rezipped(path, tmp_path / "a.keras", {}, zipfile.ZIP_DEFLATED)
    assert keras_file.sniff(tmp_path / "a.keras")
    read = keras_file.read(tmp_path / "a.keras")
    assert_same(read, arrays)
    assert len(list((tmp_path / "t").iterdir())) == 1
    del read
    gc.collect()
    assert list((tmp_path / "t").iterdir()) == []


def test_damaged_deflated_files(path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    whole = rezipped(path, tmp_path / "a.keras", {}, zipfile.ZIP_DEFLATED)
    data = bytearray(whole.read_bytes())
    for at in range(3000, len(data) - 3000, len(data) // 4):
        changed = bytearray(data)
        changed[at] ^= 8
        (tmp_path / "b.keras").write_bytes(changed)
        with pytest.raises(errors.CheckpointFormatError):
            keras_file.read(tmp_path / "b.keras")
        gc.collect()
        assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_truncated_files_are_refused(path, tmp_path, method):
    whole = rezipped(path, tmp_path / "a.keras", {}, method).read_bytes()
    cuts = {0, 1, 4, 29, 30, 31, 64, len(whole) - 1, len(whole) - 22}
    cuts |= set(range(0, len(whole), len(whole) // 24))
    for cut in sorted(cuts):
        (tmp_path / "b.keras").write_bytes(whole[:cut])
        assert not keras_file.sniff(tmp_path / "b.keras")
        with pytest.raises(errors.CheckpointFormatError, match=r"b\.keras"):
            keras_file.read(tmp_path / "b.keras")


def test_a_truncated_weights_file_is_refused(path, tmp_path):
    weights = member(path, "model.weights.h5")
    for cut in (0, 7, 8, 100, 1000, len(weights) // 2, len(weights) - 1):
        rezipped(
            path, tmp_path / "a.keras", {"model.weights.h5": weights[:cut]}
        )
        with pytest.raises(errors.CheckpointFormatError):
            dict(keras_file.read(tmp_path / "a.keras"))


def test_sniff_never_raises(path, tmp_path, arrays):
    assert keras_file.sniff(path)
    assert not keras_file.sniff(tmp_path)
    assert not keras_file.sniff(tmp_path / "missing")
    google_npz.write(arrays, tmp_path / "a.npz")
    assert not keras_file.sniff(tmp_path / "a.npz")
    assert not google_npz.sniff(path)
    rng = np.random.default_rng(0)
    for size in (0, 1, 4, 22, 100, 5000):
        for start in (b"", b"PK\x03\x04"):
            (tmp_path / "x").write_bytes(start + rng.bytes(size))
            assert not keras_file.sniff(tmp_path / "x")


def test_errors_of_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        keras_file.read(tmp_path / "missing.keras")
    with pytest.raises(errors.CheckpointFormatError, match="a directory"):
        keras_file.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        keras_file.write({}, tmp_path / "no" / "a.keras")


def test_a_lambda_layer_is_refused_and_not_run(tmp_path):
    # Keras saves the code of a lambda expression.
    harm = eval(f"lambda x: open({str(tmp_path / 'harm')!r}, 'w').close() or x")
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Lambda(harm, output_shape=(4,))]
    )
    model.save(tmp_path / "a.keras")
    # Building the model may have run the function.
    (tmp_path / "harm").unlink(missing_ok=True)
    assert keras_file.sniff(tmp_path / "a.keras")
    with pytest.raises(errors.CheckpointFormatError) as error:
        keras_file.read(tmp_path / "a.keras")
    for words in ("holds a Sequential", "Lambda", "Nothing of it was run"):
        assert words in str(error.value)
    assert not (tmp_path / "harm").exists()
    loaded = keras.saving.load_model(tmp_path / "a.keras", safe_mode=False)
    loaded(np.zeros((1, 4)))
    assert (tmp_path / "harm").exists()


def test_a_config_with_a_lambda_inside_is_read_as_numbers(path, tmp_path):
    """Our class with a policy that names a program: it is looked at by none."""
    configured(
        path,
        tmp_path / "a.keras",
        dtype={"class_name": "__lambda__", "config": {"value": "4wEA"}},
    )
    assert keras_file.read(tmp_path / "a.keras").num_classes == 10


def test_other_models_are_refused(path, tmp_path):
    for top, words in (
        ({"class_name": "Functional", "registered_name": "Functional"}, "a Fu"),
        ({"registered_name": "evil>ResNetV2"}, "as 'evil>ResNetV2',"),
        ({"class_name": "Other\n"}, r"'Other\n'"),
        ({"class_name": None, "config": None}, "nameless"),
        (
            {
                "class_name": "Functional",
                "config": {
                    "layers": [
                        {"name": "block1_unit01_a_conv", "class_name": "Conv2D"}
                    ]
                },
            },
            "bit_tf.folded",
        ),
    ):
        configured(path, tmp_path / "a.keras", top)
        with pytest.raises(errors.CheckpointFormatError) as error:
            keras_file.read(tmp_path / "a.keras")
        assert words in str(error.value)


def test_a_real_endpoints_model_is_refused(tmp_path):
    model = models.endpoints(models.ResNetV2(TINY, 32), ["stem"])
    model.save(tmp_path / "a.keras")
    with pytest.raises(errors.CheckpointFormatError, match="a ImageModel"):
        keras_file.read(tmp_path / "a.keras")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": [1, 1, 2, 1]}, "blocks=(1, 1, 2, 1)"),
        ({"stem_width": 64}, "stem_width=64"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_a_config_of_another_architecture(path, tmp_path, changes, words):
    configured(path, tmp_path / "a.keras", **changes)
    with pytest.raises(errors.CheckpointMismatchError) as error:
        keras_file.read(tmp_path / "a.keras")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": None},
        {"blocks": [1, 1, "1", 1]},
        {"stem_width": 32.0},
        {"num_classes": True},
        {"output_stride": 5},
        {"output_stride": [32]},
        {"numerics": "other"},
        {"numerics": ["google"]},
    ],
)
def test_a_damaged_config_is_named(path, tmp_path, changes):
    configured(path, tmp_path / "a.keras", **changes)
    with pytest.raises(errors.CheckpointFormatError, match=next(iter(changes))):
        keras_file.read(tmp_path / "a.keras")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 200_000,
        b'{"config": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 1}',
        b" " * (1 << 24) + b"{}",
    ],
    ids=["empty", "list", "cut", "bytes", "nested", "number", "twice", "long"],
)
@pytest.mark.parametrize("name", ["config.json", "metadata.json"])
def test_damaged_json_is_named(path, tmp_path, name, text):
    rezipped(path, tmp_path / "a.keras", {name: text})
    with pytest.raises(errors.CheckpointFormatError, match=name):
        keras_file.read(tmp_path / "a.keras")


def test_infinity_is_read_as_keras_writes_it(path, tmp_path):
    found = json.loads(member(path, "config.json"))
    found["compile_config"] = {"loss_weights": [float("inf"), float("nan")]}
    text = json.dumps(found)
    assert "Infinity, NaN" in text
    rezipped(path, tmp_path / "a.keras", {"config.json": text})
    read = keras_file.read(tmp_path / "a.keras")
    assert read.shapes == keras_file.read(path).shapes


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (Facts("timm").to_json(), "must agree"),
        (Facts(output_stride=8).to_json(), "must agree"),
        (Facts(labels=(labels.Label("a", "b"),)).to_json(), "1 labels"),
        ("{}", "numerics"),
        (7, "numerics"),
    ],
)
def test_damaged_facts_are_refused(path, tmp_path, recorded, words):
    found = json.dumps({"bit_tf": recorded})
    rezipped(path, tmp_path / "a.keras", {"metadata.json": found})
    with pytest.raises(errors.CheckpointFormatError, match=words) as error:
        keras_file.read(tmp_path / "a.keras")
    assert "a.keras" in str(error.value)


def test_missing_members_are_named(path, tmp_path):
    for name in ("config.json", "metadata.json", "model.weights.h5"):
        rezipped(path, tmp_path / "a.keras", {name: None})
        with pytest.raises(errors.CheckpointFormatError, match=name):
            keras_file.read(tmp_path / "a.keras")


def test_a_bomb_is_refused_before_it_goes_off(path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("inflated"))
    for name in ("config.json", "model.weights.h5"):
        rezipped(
            path,
            tmp_path / "a.keras",
            {name: b"{}" + bytes(8 << 20)},
            zipfile.ZIP_DEFLATED,
        )
        with pytest.raises(errors.CheckpointFormatError, match="inflate"):
            keras_file.read(tmp_path / "a.keras")


def patched(data, name, offset, form, value):
    """An archive's bytes with a field of the directory's record changed."""
    data = bytearray(data)
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    struct.pack_into(form, data, at + offset, value)
    return bytes(data)


def test_a_bomb_of_false_size_stops(path, tmp_path, monkeypatch):
    """More than the directory says does not reach the disk."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    written = []
    rezipped(
        path,
        tmp_path / "a.keras",
        {"model.weights.h5": bytes(64 << 20)},
        zipfile.ZIP_DEFLATED,
    )
    data = (tmp_path / "a.keras").read_bytes()
    data = patched(data, "model.weights.h5", 24, "<I", 1 << 20)
    (tmp_path / "a.keras").write_bytes(data)
    crc32 = zlib.crc32

    def counting(part, crc=0):
        written.append(len(part))
        return crc32(part, crc)

    monkeypatch.setattr("zlib.crc32", counting)
    with pytest.raises(errors.CheckpointFormatError, match="inflates to"):
        keras_file.read(tmp_path / "a.keras")
    assert sum(size for size in written if size >= 1 << 20) <= 3 << 20


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (8, "<H", 1, "encrypted"),
        (10, "<H", 14, "compression method 14"),
        (20, "<I", 1 << 31, "outside the file"),
        (24, "<I", 17, "two different sizes"),
        # Python 3.13 sees by itself that two members overlap.
        (42, "<I", 5, "no member|Overlapped"),
        (42, "<I", 0, "another member"),
    ],
)
def test_false_directories_are_refused(
    path, tmp_path, offset, form, value, words
):
    data = path.read_bytes()
    data = patched(data, "model.weights.h5", offset, form, value)
    (tmp_path / "a.keras").write_bytes(data)
    with pytest.raises(errors.CheckpointFormatError, match=words):
        keras_file.read(tmp_path / "a.keras")


def test_a_member_twice_is_refused(path, tmp_path):
    (tmp_path / "a.keras").write_bytes(path.read_bytes())
    with (
        zipfile.ZipFile(tmp_path / "a.keras", "a") as archive,
        warnings.catch_warnings(action="ignore"),
    ):
        archive.writestr("config.json", member(path, "config.json"))
    with pytest.raises(errors.CheckpointFormatError, match="twice"):
        keras_file.read(tmp_path / "a.keras")


def test_an_external_link_is_not_followed(arrays, path, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = arrays[KERNEL]

    def edit(file):
        del file[KERNEL_PATH]
        file[KERNEL_PATH] = h5py.ExternalLink(
            str(tmp_path / "other.h5"), "secret"
        )

    edited(path, tmp_path / "a.keras", edit)
    with pytest.raises(errors.CheckpointFormatError) as error:
        keras_file.read(tmp_path / "a.keras")
    assert KERNEL_PATH in str(error.value)
    assert "a.keras" in str(error.value)


def test_reading_one_array_needs_the_memory_of_one(tmp_path):
    arrays = helpers.random_arrays((1, 1, 1, 2), 64, 0)
    keras_file.write(arrays, tmp_path / "a.keras")
    read = keras_file.read(tmp_path / "a.keras")
    read[GAMMA]
    tracemalloc.start()
    array = read["block1/unit01/b/standardized_conv2d/kernel"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes + (2 << 20)
    assert (tmp_path / "a.keras").stat().st_size > 10 * peak


class Lazy(Mapping):
    """Arrays made when asked for; may fail at one."""

    def __init__(self, shapes, fail_at=None):
        self.shapes = shapes
        self.fail_at = fail_at

    def __getitem__(self, name):
        if name == self.fail_at:
            raise RuntimeError("no such variable")
        return np.full(self.shapes[name], 0.5, np.float32)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def test_writing_needs_the_memory_of_one_array(tmp_path):
    shapes = layout.expected_shapes((1, 1, 1, 3), 64, 0)
    largest = 4 * max(map(np.prod, shapes.values()))
    tracemalloc.start()
    keras_file.write(Lazy(shapes), tmp_path / "a.keras")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest + (4 << 20)
    assert (tmp_path / "a.keras").stat().st_size > 2 * peak


def test_a_failed_write_leaves_what_was_there(tmp_path):
    shapes = layout.expected_shapes(TINY, 32, 0)
    (tmp_path / "a.keras").write_bytes(b"before")
    with pytest.raises(RuntimeError, match="no such variable"):
        keras_file.write(Lazy(shapes, KERNEL), tmp_path / "a.keras")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.keras"]
    assert (tmp_path / "a.keras").read_bytes() == b"before"


def test_a_config_of_another_model_is_not_written(tmp_path, arrays):
    ours = Arrays(arrays)
    for blocks, num_classes in (((1, 1, 1, 2), 10), (TINY, 0)):
        ours.config = models.ResNetV2(blocks, 32, num_classes).get_config()
        with pytest.raises(errors.CheckpointMismatchError, match="config"):
            keras_file.write(ours, tmp_path / "a.keras")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written(tmp_path, arrays):
    bad = dict(arrays)
    bad[KERNEL] = np.full_like(bad[KERNEL], np.nan)
    with pytest.raises(errors.CheckpointFormatError, match=KERNEL):
        keras_file.write(bad, tmp_path / "a.keras")
    assert list(tmp_path.iterdir()) == []


def test_keras_is_not_imported(path, tmp_path):
    code = """
import sys
from bit_tf.checkpoints import keras_file
read = keras_file.read(sys.argv[1])
keras_file.write(read, sys.argv[2])
print(sorted({"keras", "tensorflow", "jax", "torch"} & set(sys.modules)))
"""
    process = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "b.keras"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert process.stdout == "[]\n"
    assert (tmp_path / "b.keras").read_bytes() == path.read_bytes()
