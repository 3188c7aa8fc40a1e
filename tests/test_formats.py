"""From every format that is read to every one that is written, and back."""

import dataclasses
import itertools
import json
import pathlib
import pickle
import subprocess
import sys
import zipfile

import foreign
import helpers
import keras
import numpy as np
import pytest
import toy_hub

import bit_tf
from bit_tf import (
    checkpoints,
    errors,
    hub,
    labels,
    models,
    presets,
    transfer,
)
from bit_tf.checkpoints import Facts, layout
from hub_export import formats, saved_model
from hub_export.sources import around_saved_model

BLOCKS, WIDTH, CLASSES = (1, 2, 1, 3), 32, 10
WRITTEN = {
    "npz": "x.npz",
    "timm": "x.safetensors",
    "transformers": "directory",
    "keras": "x.keras",
}
NAMES = (
    labels.Label("", "zero"),
    *(
        labels.Label(f"n{index:08}", f"class, {index}")
        for index in range(1, 10)
    ),
)


def make_npz(path, arrays):
    spelled = {f"resnet/{name}": array for name, array in arrays.items()}
    if layout.HEAD_KERNEL in arrays:
        spelled[f"resnet/{layout.HEAD_KERNEL}"] = arrays[layout.HEAD_KERNEL][
            None, None
        ]
    np.savez(path, **spelled)
    return path


def make_pdparams(path, arrays):
    path.write_bytes(pickle.dumps(foreign.paddle(arrays)))
    return path


def make_bit_jax(path, arrays):
    np.savez(path, **foreign.flax(arrays, "conv_head"))
    return path


def make_big_vision(path, arrays):
    spelled = foreign.flax(arrays, prefix="params/")
    np.savez(path, **spelled, **{"opt/0/count": np.array(7)})
    return path


def make_tf_hub(path, arrays):
    return foreign.saved_model(path, foreign.hub_names(arrays, "resnet/"))


def make_tf1_hub(path, arrays):
    return foreign.tf1_hub(path, foreign.hub_names(arrays))


def make_written(format):
    def make(path, arrays):
        checkpoints.write(arrays, path, format=format)
        return path

    return make


# What is read: (file's name, format as reported, numerics, how it is made).
READ = {
    "google npz": ("x.npz", "google_npz", "google", make_npz),
    "big_transfer h5": (
        "x.h5",
        "big_transfer_h5",
        "google",
        foreign.big_transfer_h5,
    ),
    "paddle": ("x.pdparams", "paddle", "timm", make_pdparams),
    "bit_jax": ("x.npz", "flax_npz", "google", make_bit_jax),
    "big_vision": ("x.npz", "flax_npz", "big_vision", make_big_vision),
    "tf hub": ("hub", "tf_hub", "google", make_tf_hub),
    "tf1 hub": ("hub1", "tf_hub", "google", make_tf1_hub),
    "timm": ("x.safetensors", "timm", "google", make_written("timm")),
    "transformers": (
        "directory",
        "transformers",
        "google",
        make_written("transformers"),
    ),
    "keras": ("x.keras", "keras", "google", make_written("keras")),
}


@pytest.fixture(scope="module")
def arrays():
    made = helpers.random_arrays(BLOCKS, WIDTH, CLASSES)
    # Bits that only survive where nothing is computed.
    made["group_norm/gamma"][:3] = [-0.0, 1e-45, 3.4e38]
    return made


@pytest.fixture(scope="module")
def sources(arrays, tmp_path_factory):
    made = {}
    for name, (file, _, _, make) in READ.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        made[name] = pathlib.Path(make(folder / file, arrays))
    return made


def same(found, arrays):
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    return True


@pytest.mark.parametrize("source", READ)
def test_every_format_is_told_by_its_contents(source, sources, arrays):
    _, format, numerics, _ = READ[source]
    found = checkpoints.read(sources[source])
    assert (found.format, found.facts.numerics) == (format, numerics)
    assert (found.blocks, found.stem_width) == (BLOCKS, WIDTH)
    assert found.num_classes == CLASSES
    assert found.extra == ()
    assert len(set(found.sources.values())) == len(arrays)
    assert same(found, arrays)


@pytest.mark.parametrize(
    ("source", "target"), [*itertools.product(READ, checkpoints.FORMATS)]
)
def test_every_pair_keeps_every_bit(source, target, sources, arrays, tmp_path):
    path = tmp_path / WRITTEN[target]
    read = checkpoints.read(sources[source])
    checkpoints.write(read, path)
    found = checkpoints.read(path)
    assert found.facts.numerics == read.facts.numerics
    assert found.facts.preset in (read.facts.preset, google_preset(found))
    assert same(found, arrays)


def google_preset(found):
    """What an .npz is taken for if it says nothing."""
    if found.format == "google_npz":
        return presets.PRESETS["big_transfer eval"]
    return found.facts.preset


@pytest.mark.parametrize("target", checkpoints.FORMATS)
@pytest.mark.parametrize("numerics", ["google", "big_vision", "timm"])
@pytest.mark.parametrize("preset", ["timm in1k", "tfhub", None])
def test_facts_travel(target, numerics, preset, arrays, tmp_path):
    facts = Facts(
        numerics,
        presets.PRESETS[preset] if preset else None,
        NAMES,
        output_stride=16,
    )
    path = tmp_path / WRITTEN[target]
    checkpoints.write(arrays, path, facts=facts)
    found = checkpoints.read(path).facts
    assert found.numerics == numerics
    assert found.output_stride == 16
    if preset:
        assert found.preset == facts.preset
    assert found.labels == NAMES
    assert bit_tf.load_model(path).numerics == numerics


@pytest.mark.parametrize("target", checkpoints.FORMATS)
def test_a_model_is_written_with_its_own_constants(target, tmp_path):
    model = models.ResNetV2(
        (1, 1, 1, 1), 32, 3, numerics="big_vision", output_stride=8
    )
    path = tmp_path / WRITTEN[target]
    checkpoints.write(model, path)
    again = bit_tf.load_model(path)
    assert (again.numerics, again.output_stride) == ("big_vision", 8)
    assert same(checkpoints.read(path), dict(models.canonical_arrays(model)))
    kernel = "block4/unit01/b/standardized_conv2d/kernel"
    np.testing.assert_array_equal(
        models.canonical_arrays(again)[kernel],
        models.canonical_arrays(model)[kernel],
    )


@pytest.mark.parametrize("target", checkpoints.FORMATS)
def test_other_facts_than_the_models_own(target, tmp_path):
    model = models.ResNetV2((1, 1, 1, 1), 32, 3)
    path = tmp_path / WRITTEN[target]
    checkpoints.write(model, path, facts=Facts("timm", output_stride=16))
    again = bit_tf.load_model(path)
    assert (again.numerics, again.output_stride) == ("timm", 16)


@pytest.mark.parametrize("format", [*checkpoints.FORMATS, "keras-folded"])
def test_the_command(format, call, small_npz, small_arrays, tmp_path):
    path = tmp_path / "out.keras"
    arguments = ("hub-export", "convert", small_npz, path, "--to", format)
    code, out, err = call(*arguments, "--numerics", "timm")
    assert code == 0, err
    assert "Read as google_npz: 45 arrays, each used once" in out
    assert "constants of timm" in out
    code, out, err = call(*arguments)
    assert code == 1
    assert "--overwrite" in err
    code, out, err = call(*arguments, "--overwrite", "--head", "none", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "google_npz"
    assert report["numerics"] == "google"
    if format == "keras-folded":
        return
    found = checkpoints.read(path)
    assert report["bytes"] == sum(
        file.stat().st_size
        for file in ([path] if path.is_file() else path.iterdir())
    )
    assert found.num_classes == 0
    backbone = {
        name: array
        for name, array in small_arrays.items()
        if not name.startswith("head/")
    }
    assert same(found, backbone)


def test_arrays_are_converted_without_tensorflow(small_npz, tmp_path):
    code = (
        "import sys\n"
        "from hub_export import commands\n"
        "try:\n"
        "    commands.main()\n"
        "finally:\n"
        "    loaded = {'tensorflow', 'keras', 'torch'} & sys.modules.keys()\n"
        "    assert not loaded, loaded\n"
    )
    source = small_npz
    for format, name in WRITTEN.items():
        target = tmp_path / f"{format}-{name}"
        run = subprocess.run(
            [
                *(sys.executable, "-c", code, "convert", source, target),
                *("--to", format),
            ],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        source = target


@pytest.mark.parametrize("format", [*checkpoints.FORMATS, "keras-folded"])
def test_what_appears_meanwhile_is_not_replaced(
    format, small_npz, tmp_path, monkeypatch
):
    target = tmp_path / "x.keras"
    write = formats._write

    def slow(*args):
        write(*args)
        # As another conversion to the same path that was faster.
        if format == "transformers":
            target.mkdir(exist_ok=True)
        (target / "x" if format == "transformers" else target).write_text("x")

    monkeypatch.setattr(formats, "_write", slow)
    if format == "transformers":
        (target).mkdir()
        (target / "x").write_text("x")
    with pytest.raises(errors.ExportError):
        formats.convert(small_npz, target, format)
    found = target / "x" if format == "transformers" else target
    assert found.read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["x.keras"]


def test_options_of_savedmodels_alone(call, small_npz, tmp_path):
    for option in (("--l2", "0.1"), ("--probabilities", "sigmoid")):
        code, _, err = call(
            *("hub-export", "convert", small_npz, tmp_path / "a.npz"),
            *("--to", "npz", *option),
        )
        assert code == 2
        assert "--to savedmodel" in err
    assert list(tmp_path.iterdir()) == []


def test_a_savedmodel_with_strangers_is_not_replaced(small_npz, tmp_path):
    path = tmp_path / "hub"
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"")
    (path / "notes.txt").write_text("precious")
    with pytest.raises(errors.ExportError, match=r"notes\.txt"):
        saved_model.convert(small_npz, path, overwrite=True)
    assert (path / "notes.txt").read_text() == "precious"


def test_an_npz_has_no_room_for_many_long_labels(tmp_path, caplog):
    arrays = helpers.random_arrays((1, 1, 1, 1), 32, 1000)
    names = tuple(labels.Label("", f"{i} " + "long " * 20) for i in range(1000))
    path = tmp_path / "a.npz"
    checkpoints.write(arrays, path, facts=Facts("timm", labels=names))
    assert "are not kept" in caplog.text
    assert checkpoints.read(path).facts == Facts("timm")
    known = labels.label_set("ilsvrc2012")
    checkpoints.write(arrays, tmp_path / "b.npz")
    checkpoints.write(arrays, path, facts=Facts(labels=known))
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_conversion_spares_its_source(small_npz, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(small_npz.read_bytes())
    with pytest.raises(errors.ExportError, match="must not hold"):
        formats.convert(path, path, "timm", overwrite=True)
    assert path.read_bytes() == small_npz.read_bytes()
    with pytest.raises(errors.ExportError, match="could not be written"):
        formats.convert(path, tmp_path / "none" / "b", "npz")
    with pytest.raises(errors.ExportError, match="Formats are"):
        formats.convert(path, tmp_path / "b", "onnx")
    precious = tmp_path / "precious.keras"
    precious.mkdir()
    (precious / "x").write_text("x")
    for format in (*checkpoints.FORMATS, "keras-folded"):
        with pytest.raises(errors.ExportError):
            formats.convert(path, precious, format, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.npz",
        "precious.keras",
    ]
    assert (precious / "x").read_text() == "x"


def test_a_model_that_moved_with_its_saved_model(tmp_path):
    """The note tells the place that is used."""
    (tmp_path / "old").mkdir()
    handle = toy_hub.save(tmp_path / "old" / "hub")
    model = transfer.classifier(handle, 2)
    transfer.save(model, tmp_path / "old" / "m.keras", Facts(labels=NAMES[:2]))
    (tmp_path / "old").rename(tmp_path / "new")
    found = around_saved_model(tmp_path / "new" / "m.keras")
    assert found.handles == (handle,)
    assert found.note() == (
        f"m.keras is around {tmp_path / 'new' / 'hub'}, which is fetched and "
        "run."
    )


def test_a_model_of_ones_own_around_a_saved_model(call, tmp_path):
    layer = hub.KerasLayer(toy_hub.save(tmp_path / "hub"))
    layers = [keras.Input((None, None, 3)), layer, keras.layers.Dense(2)]
    keras.Sequential(layers).save(tmp_path / "own.keras")
    code, _, err = call(
        "hub-export", "convert", tmp_path / "own.keras", tmp_path / "out"
    )
    assert code == 1
    assert "fetched and run" not in err
    assert "hub_export.export(model, path)" in err


def test_the_formats_of_the_command():
    from hub_export.commands import convert

    assert convert.TO == formats.FORMATS


def test_labels_of_a_written_directory(call, tmp_path):
    source = tmp_path / "a.npz"
    checkpoints.write(helpers.random_arrays((1, 1, 1, 1), 32, 1000), source)

    def id2label(name, *options):
        code, _, err = call(
            *("hub-export", "convert", source, tmp_path / name),
            *("--to", "transformers", *options),
        )
        assert code == 0, err
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config["id2label"]["1"]

    assert id2label("auto") == "goldfish, Carassius auratus"
    assert id2label("none", "--labels", "none") == "LABEL_1"
    (tmp_path / "names.txt").write_text(
        "".join(f"class {index}\n" for index in range(1000))
    )
    assert id2label("own", "--labels", tmp_path / "names.txt") == "class 1"
    # Nobody asked for names where a format does without.
    formats.convert(source, tmp_path / "b.safetensors", "timm")
    assert checkpoints.read(tmp_path / "b.safetensors").facts.labels is None


@pytest.mark.slow
def test_an_export_records_where_the_constants_came_from(
    small_arrays, tmp_path
):
    source = make_big_vision(tmp_path / "a.npz", small_arrays)
    for numerics, name, chosen in (
        (None, "big_vision", "source"),
        ("google", "google", "google"),
    ):
        path = tmp_path / name
        report = saved_model.convert(source, path, numerics=numerics)
        assert report["numerics"] == name
        assert report["arrays"] == len(checkpoints.read(source))
        card = json.loads((path / "assets.extra/card.json").read_text())
        assert card["numerics"]["name"] == name
        assert card["preset"]["name"] == "big_vision fewshot"
        provenance = json.loads(
            (path / "assets.extra/provenance.json").read_text()
        )
        assert provenance["numerics"] == "big_vision"
        assert provenance["numerics_chosen"] == chosen
        assert any("optimizer state" in note for note in provenance["notes"])
        again = checkpoints.read(path)
        assert again.facts.numerics == name
        assert again.facts.preset == presets.PRESETS["big_vision fewshot"]


def test_labels_go_with_the_weights(small_arrays, tmp_path):
    source = tmp_path / "a.safetensors"
    checkpoints.write(small_arrays, source, facts=Facts("timm", labels=NAMES))
    saved_model.convert(source, tmp_path / "hub")
    assert labels.read_saved_model(tmp_path / "hub") == NAMES
    assert checkpoints.read(tmp_path / "hub").facts.labels == NAMES
    formats.convert(tmp_path / "hub", tmp_path / "hf", "transformers")
    assert checkpoints.read(tmp_path / "hf").facts.labels == NAMES


def test_an_npz_of_googles_constants_is_googles_to_the_byte(arrays, tmp_path):
    facts = Facts("google", presets.PRESETS["big_transfer eval"])
    plain, told = tmp_path / "a.npz", tmp_path / "b.npz"
    checkpoints.write(arrays, plain)
    checkpoints.write(arrays, told, facts=facts)
    assert plain.read_bytes() == told.read_bytes()
    checkpoints.write(
        arrays, told, facts=dataclasses.replace(facts, numerics="timm")
    )
    with np.load(told) as file:
        np.testing.assert_array_equal(
            file["resnet/head/conv2d/bias"], arrays[layout.HEAD_BIAS]
        )
    with zipfile.ZipFile(told) as archive:
        assert json.loads(archive.comment)["numerics"] == "timm"


@pytest.mark.parametrize(
    "record",
    [
        b'{"numerics": "none such"}',
        b'{"numerics": []}',
        b'{"numerics": "timm", "preset": {"name": 1}}',
        b'{"numerics": "timm", "preset": 7}',
        b'{"numerics": "timm", "labels": [["a"]]}',
        b'{"numerics": "timm", "labels": [["a", 1]]}',
        b'{"numerics": "timm", "output_stride": 7}',
        b'{"numerics": "timm", "output_stride": [32]}',
        b'{"numerics": "timm"',
        b'{"numerics":' + b"[" * 50_000,
        b'{"numerics": "timm", "preset": {"name": "a", "resize": "squash", '
        b'"size": -1, "crop": null, "method": "bilinear", "antialias": true, '
        b'"source": ""}}',
    ],
)
def test_a_damaged_record_is_refused(record, small_npz, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(small_npz.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = record
    with pytest.raises(errors.CheckpointFormatError, match="bit_tf records"):
        checkpoints.read(path)


def test_another_programs_comment_is_left_alone(small_npz, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(small_npz.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand"
    assert checkpoints.read(path).facts.numerics == "google"
