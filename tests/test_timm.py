"""timm's .safetensors: names, layouts and facts, there and back."""

import json
import tracemalloc

import helpers
import numpy as np
import pytest

from bit_tf import errors, presets, variants
from bit_tf.checkpoints import (
    checkpoint,
    layout,
    pytorch,
    rename,
    safetensors_file,
    timm,
)
from bit_tf.checkpoints.facts import KEY, Facts
from bit_tf.labels import Label

TINY = (1, 1, 1, 1)
KERNEL = "block4/unit01/b/standardized_conv2d/kernel"
SMALLER = "block3/unit01/b/standardized_conv2d/kernel"
STORED = "stages.3.blocks.0.conv2.weight"
CONFIG = {
    "architecture": "resnetv2_50x1_bit",
    "num_classes": 10,
    "num_features": 1024,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "goog_in21k_ft_in1k",
        "input_size": [3, 448, 448],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 10,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    },
}


def stored(arrays):
    """Weights under timm's names, by the axes that timm documents."""
    found = {}
    for name, array in arrays.items():
        if name == layout.HEAD_KERNEL:
            array = array.T[:, :, None, None]
        elif array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        found[rename.TIMM.spell(name)] = np.ascontiguousarray(array)
    return found


def place(path, tensors, metadata=None):
    """A .safetensors of arrays of any dtype, without this package's writer."""
    names = {"float32": "F32", "float16": "F16", "float64": "F64"}
    header, data, end = {}, [], 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": names.get(array.dtype.name, "I32"),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        data.append(array.tobytes())
    if metadata:
        header["__metadata__"] = metadata
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data))
    return path


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


@pytest.fixture
def path(arrays, tmp_path):
    """A file without facts of ours, as timm publishes it."""
    return place(
        tmp_path / "model.safetensors", stored(arrays), {"format": "pt"}
    )


def describe(path, **changes):
    config = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        place = config if name in config else config["pretrained_cfg"]
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    (path.parent / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("blocks", [TINY, (1, 2, 1, 3)])
@pytest.mark.parametrize("classes", [0, 1, 10])
def test_round_trip_is_bit_identical(tmp_path, blocks, classes):
    arrays = helpers.random_arrays(blocks, 32, classes)
    arrays["group_norm/beta"][:3] = [-0.0, 1e-45, 3.4e38]
    path = tmp_path / "x.safetensors"
    timm.write(arrays, path)
    assert pytorch.sniff(path)
    found = pytorch.read(path)
    assert found.format == "timm"
    assert (found.blocks, found.stem_width) == (blocks, 32)
    assert found.num_classes == classes
    assert found.notes == found.extra == ()
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found[name].flags.c_contiguous
    again = tmp_path / "again.safetensors"
    timm.write(found, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [again.name, path.name]


def test_the_file_is_timms(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    timm.write(arrays, path)
    opened = safetensors_file.tensors(path)
    assert opened.metadata == {"format": "pt", KEY: Facts().to_json()}
    expected = stored(arrays)
    assert opened.entries.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(
            opened.entries[name].load(), array, strict=True
        )


def test_facts_travel(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    for facts in (
        Facts(),
        Facts("big_vision", output_stride=8),
        Facts(
            "google",
            presets.PRESETS["big_vision fewshot"],
            tuple(Label(f"n{i}", f"ä{i}") for i in range(10)),
            16,
        ),
    ):
        timm.write(checkpoint.Selection(arrays, facts), path)
        describe(path)
        assert pytorch.read(path).facts == facts


def test_labels_stay_with_their_head(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    names = tuple(Label("", str(i)) for i in range(10))
    headless = {n: a for n, a in arrays.items() if not n.startswith("head/")}
    timm.write(checkpoint.Selection(headless, Facts(labels=names)), path)
    assert pytorch.read(path).facts.labels is None
    with pytest.raises(errors.CheckpointFormatError, match="9 labels for 10"):
        timm.write(checkpoint.Selection(arrays, Facts(labels=names[1:])), path)
    assert pytorch.read(path).num_classes == 0


def test_damaged_facts_are_refused(arrays, tmp_path):
    for text in ("{}", "x", '{"numerics": "none"}'):
        path = place(tmp_path / "x.safetensors", stored(arrays), {KEY: text})
        with pytest.raises(
            errors.CheckpointFormatError, match="bit_tf records"
        ):
            pytorch.read(path)


def test_a_published_file(path):
    found = pytorch.read(path)
    assert found.facts == Facts("timm")
    assert any("config.json" in note for note in found.notes)
    describe(path)
    for source in (path, path.parent):
        found = pytorch.read(source)
        assert found.path == path
        assert found.facts == Facts("timm", presets.PRESETS["timm in1k"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("timm in21k", {"input_size": [3, 224, 224], "crop_pct": 0.875}),
        ("timm in1k 480", {"input_size": [3, 480, 480]}),
        ("timm in1k", {"crop_mode": None}),
        (
            "timm distilled",
            {
                "input_size": [3, 224, 224],
                "crop_pct": 0.875,
                "interpolation": "bicubic",
            },
        ),
        (
            "timm teacher 384",
            {"input_size": [3, 384, 384], "interpolation": "bicubic"},
        ),
    ],
)
def test_presets_of_published_files(path, name, changes):
    describe(path, **changes)
    assert pytorch.read(path).facts.preset == presets.PRESETS[name]


def test_presets_of_other_files(path):
    describe(path, crop_pct=0.95, crop_mode="squash")
    preset = pytorch.read(path).facts.preset
    assert preset.name == "timm squash 471 bilinear crop 448"
    assert (preset.resize, preset.size, preset.crop) == ("squash", 471, 448)
    assert preset.antialias
    assert preset.offset == "round"
    # The files of older versions have no pretrained_cfg.
    flat = {**CONFIG["pretrained_cfg"], **CONFIG}
    del flat["pretrained_cfg"]
    (path.parent / "config.json").write_text(json.dumps(flat))
    assert pytorch.read(path).facts.preset == presets.PRESETS["timm in1k"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ({"input_size": [3, 448, 224]}, r"input_size is \[3, 448, 224\]"),
        ({"input_size": [1, 448, 448]}, "input_size"),
        ({"crop_pct": 1.5}, "pads pictures of 298 pixels to 448"),
        ({"mean": None, "std": None}, "does not say mean, std"),
    ],
    ids=str,
)
def test_what_no_preset_can_say_is_a_note(path, changes, words):
    import re

    describe(path, **changes)
    found = pytorch.read(path)
    assert found.facts == Facts("timm")
    assert any(re.search(words, note) for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": [0.485, 0.456, 0.406]}, "mean: .*0.485"),
        ({"std": [0.5, 0.5, 0.25]}, "std: .*0.25"),
        ({"std": [0.5, 0.5]}, "std: "),
        ({"mean": "half"}, "mean: 'half'"),
        ({"input_size": "448"}, "input_size"),
        ({"input_size": [3, -448, -448]}, "input_size"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": True}, "crop_pct"),
        ({"crop_pct": 1e-310}, "crop_pct"),
        ({"crop_pct": 10**400}, "crop_pct"),
        ({"crop_pct": 1e-9}, "crop_pct|preset"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg"),
        ({"label_names": [1, 2]}, "label_names"),
        ({"label_names": {"1": "a"}}, "label_names"),
        ({"label_names": ["a\nb"] * 10}, "one line"),
        ({"label_names": ["a"] * 9}, "9 labels for 10"),
    ],
    ids=str,
)
def test_other_pixels_and_damage_are_refused_by_name(path, changes, words):
    describe(path, **changes)
    with pytest.raises(errors.CheckpointFormatError, match=words):
        pytorch.read(path)


def test_labels_of_timm(path):
    names = [f"n{i:08d}" for i in range(10)]
    expected = tuple(Label(name, f"thing {name}") for name in names)
    meanings = {name: f"thing {name}" for name in names}
    describe(path, label_names=names, label_descriptions=meanings)
    assert pytorch.read(path).facts.labels == expected
    by_index = {str(i): name for i, name in enumerate(names)}
    describe(path, label_names=by_index)
    assert pytorch.read(path).facts.labels == tuple(
        Label("", name) for name in names
    )


def test_contradictions_are_notes(path):
    describe(path)
    notes = pytorch.read(path).notes
    assert len(notes) == 1
    assert (
        "'resnetv2_50x1_bit'; the arrays have blocks (1, 1, 1, 1)" in notes[0]
    )
    describe(
        path,
        num_classes=1000,
        global_pool="max",
        model_args={"stem_type": "same", "output_stride": 16},
    )
    found = pytorch.read(path)
    assert found.facts.output_stride == 32
    config = json.loads((path.parent / "config.json").read_text())
    config["model_args"] = config["pretrained_cfg"].pop("model_args")
    (path.parent / "config.json").write_text(json.dumps(config))
    found = pytorch.read(path)
    assert found.facts.output_stride == 16
    for words in ("1000 classes", "pools by 'max'", "model_args"):
        assert any(words in note for note in found.notes)


def test_the_architecture_that_is_said(tmp_path):
    arrays = helpers.random_arrays(TINY, 32)
    path = place(tmp_path / "model.safetensors", stored(arrays))
    row = variants.ARCHITECTURES["R50x1"]
    assert (row.blocks, row.stem_width) == ((3, 4, 6, 3), 64)
    describe(path, num_classes=0)
    (note,) = pytorch.read(path).notes
    assert "resnetv2_50x1_bit" in note


def test_transformers_config_is_not_timms(path):
    (path.parent / "config.json").write_text('{"model_type": "vit"}')
    found = pytorch.read(path)
    assert found.facts == Facts("timm")
    assert found.notes == ("config.json is not timm's, and was not used.",)


@pytest.mark.parametrize("text", ["", "[]", "{", "\ufeff{}", "[" * 99_999])
def test_a_damaged_config(path, text):
    (path.parent / "config.json").write_text(text)
    with pytest.raises(errors.CheckpointFormatError, match=r"config\.json"):
        pytorch.read(path)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("mutate", "kind"),
    [
        (lambda t: {**without(t, STORED), STORED + "_": t[STORED]}, "Mismatch"),
        (lambda t: without(t, STORED), "Mismatch"),
        (lambda t: {**t, STORED: t[STORED].transpose(2, 3, 1, 0)}, "Mismatch"),
        (lambda t: {**t, STORED: t[STORED][:-1]}, "Mismatch"),
        (lambda t: {**t, STORED: t[STORED].astype(np.int32)}, "Format"),
    ],
    ids=["renamed", "dropped", "transposed", "truncated", "int"],
)
def test_mutations_are_named(tmp_path, arrays, mutate, kind):
    path = place(tmp_path / "x.safetensors", mutate(stored(arrays)))
    error = getattr(errors, f"Checkpoint{kind}Error")
    with pytest.raises(error) as caught:
        pytorch.read(path)
    assert KERNEL in str(caught.value)
    assert STORED in str(caught.value)
    assert str(path) in str(caught.value)


def test_nan_is_named_when_it_is_read(tmp_path, arrays):
    tensors = stored(arrays)
    tensors[STORED][3, 1, 2, 0] = np.nan
    found = pytorch.read(place(tmp_path / "x.safetensors", tensors))
    with pytest.raises(errors.CheckpointFormatError, match=STORED):
        found[KERNEL]
    assert np.isnan(found.stored(KERNEL)).sum() == 1
    with pytest.raises(errors.CheckpointFormatError, match=KERNEL):
        timm.write(found, tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_bad_write_leaves_the_old_file(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    timm.write(arrays, path)
    before = path.read_bytes()
    for change in (
        {KERNEL: np.full_like(arrays[KERNEL], np.inf)},
        {KERNEL: arrays[KERNEL][:-1]},
        {KERNEL: arrays[KERNEL].astype(int)},
        {"more": np.zeros(3, np.float32)},
    ):
        with pytest.raises(
            errors.CheckpointError, match=r"block4/unit01/b|more"
        ):
            timm.write({**arrays, **change}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError):
        timm.write(arrays, tmp_path / "none" / "x.safetensors")
    with pytest.raises(IsADirectoryError):
        timm.write(arrays, tmp_path)


@pytest.mark.parametrize(
    "metadata", [{}, {KEY: Facts("timm").to_json()}], ids=["none", "others"]
)
def test_what_reads_back_otherwise_is_refused(
    tmp_path, arrays, monkeypatch, metadata
):
    write = safetensors_file.write

    def wrong(file, shapes, make, _):
        write(file, shapes, make, metadata)

    monkeypatch.setattr(safetensors_file, "write", wrong)
    with pytest.raises(errors.CheckpointFormatError, match="read back"):
        timm.write(arrays, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_extra_tensors_are_told(tmp_path, arrays):
    tensors = stored(arrays) | {"ema.step": np.int32([3])}
    found = pytorch.read(place(tmp_path / "x.safetensors", tensors))
    assert found.extra == ("ema.step",)
    assert len(found) == len(arrays)


def test_half_precision_and_a_parallel_prefix(tmp_path, arrays):
    tensors = {
        f"module.{name}": array.astype(np.float16)
        for name, array in stored(arrays).items()
    }
    path = place(tmp_path / "x.safetensors", tensors)
    found = pytorch.read(path)
    assert found.sources[KERNEL] == f"module.{STORED}"
    assert found.dtypes[KERNEL] == np.float16
    np.testing.assert_array_equal(
        found[KERNEL],
        arrays[KERNEL].astype(np.float16).astype(np.float32),
        strict=True,
    )
    place(path, without(tensors, f"module.{STORED}"))
    with pytest.raises(
        errors.CheckpointMismatchError, match=f"module.{STORED}"
    ):
        pytorch.read(path)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "timm_model.", "module._orig_mod."],
)
def test_what_wraps_a_network_is_passed_over(tmp_path, arrays, prefix):
    tensors = {
        f"{prefix}{name}": array for name, array in stored(arrays).items()
    }
    found = pytorch.read(place(tmp_path / "x.safetensors", tensors))
    assert found.notes[0] == f"Passed over, before every name: {prefix}"
    assert found.sources[KERNEL] == f"{prefix}{STORED}"
    assert found.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name], strict=True)


@pytest.mark.parametrize("prefix", ["backbone.", "model", "Model.", "."])
def test_other_prefixes_are_another_model(tmp_path, arrays, prefix):
    tensors = {
        f"{prefix}{name}": array for name, array in stored(arrays).items()
    }
    path = place(tmp_path / "x.safetensors", tensors)
    with pytest.raises(errors.CheckpointMismatchError, match="another model"):
        pytorch.read(path)
    path = place(path, stored(arrays) | {f"model.{STORED}": arrays[KERNEL]})
    found = pytorch.read(path)
    assert found.extra == (f"model.{STORED}",)
    assert "Passed over" not in " ".join(found.notes)


def test_another_model_is_refused(tmp_path):
    path = place(
        tmp_path / "x.safetensors",
        {"layer1.0.conv1.weight": np.zeros((2, 2), np.float32)},
    )
    with pytest.raises(
        errors.CheckpointMismatchError, match=r"layer1\.0\.conv1\.weight"
    ) as caught:
        pytorch.read(path)
    assert "stem.conv.weight" in str(caught.value)


def test_batch_normalization_is_another_model(tmp_path, arrays):
    tensors = stored(arrays)
    name = "stages.0.blocks.0.norm1.running_mean"
    tensors[name] = np.zeros(32, np.float32)
    path = place(tmp_path / "x.safetensors", tensors)
    with pytest.raises(errors.CheckpointMismatchError, match=name):
        pytorch.read(path)


def test_every_truncation_is_an_error(path):
    raw = path.read_bytes()
    for cut in range(0, len(raw), len(raw) // 35):
        path.write_bytes(raw[:cut])
        pytorch.sniff(path)
        with pytest.raises(errors.CheckpointFormatError):
            pytorch.read(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(
        errors.CheckpointFormatError, match=r"\nstem\.conv.*after the file"
    ):
        pytorch.read(path)


def test_garbage(tmp_path):
    path = tmp_path / "x"
    for seed in range(30):
        path.write_bytes(np.random.default_rng(seed).bytes(500))
        assert not pytorch.sniff(path)
        with pytest.raises(errors.CheckpointFormatError):
            pytorch.read(path)
    path.write_bytes(b"")
    assert not pytorch.sniff(path)
    assert not pytorch.sniff(tmp_path)
    assert not pytorch.sniff(tmp_path / "none")
    assert not pytorch.sniff("\0")
    with pytest.raises(errors.CheckpointFormatError, match="empty"):
        pytorch.read(path)
    with pytest.raises(errors.CheckpointFormatError, match="none of them"):
        pytorch.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        pytorch.read(tmp_path / "none")


def test_one_array_needs_the_memory_of_one(path):
    found = pytorch.read(path)
    tracemalloc.start()
    array = found[SMALLER]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # As it is stored, and as it is wanted.
    assert peak < 2.5 * array.nbytes < 0.2 * path.stat().st_size


@pytest.mark.parametrize(
    ("names", "taken", "others"),
    [
        (["model.safetensors", "pytorch_model.bin"], 0, 1),
        (["bit.safetensors", "pytorch_model.bin"], 0, 1),
        (["bit.safetensors"], 0, 0),
        (["model.safetensors", "a.safetensors", "b.safetensors"], 0, 0),
    ],
)
def test_of_several_files_one_is_read(tmp_path, arrays, names, taken, others):
    for name in names:
        place(tmp_path / name, stored(arrays))
    found = pytorch.read(tmp_path)
    assert found.path == tmp_path / names[taken]
    assert sum("Of several" in note for note in found.notes) == others
    if others:
        assert names[1] in " ".join(found.notes)


def test_of_several_unknown_files_none_is_chosen(tmp_path, arrays):
    for name in ("a.safetensors", "b.safetensors"):
        place(tmp_path / name, stored(arrays))
    assert pytorch.sniff(tmp_path)
    with pytest.raises(
        errors.CheckpointFormatError, match=r"a\.safetensors, b\.safetensors"
    ):
        pytorch.read(tmp_path)


def test_hidden_files_are_passed_over(tmp_path, arrays):
    place(tmp_path / "a.safetensors", stored(arrays))
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\x16\7" + bytes(100))
    found = pytorch.read(tmp_path)
    assert found.path == tmp_path / "a.safetensors"
    assert "Of several" not in " ".join(found.notes)
    (tmp_path / "a.safetensors").unlink()
    assert not pytorch.sniff(tmp_path)


@pytest.mark.parametrize("other", ["saved_model.pb", "model_state.pdparams"])
def test_what_other_readers_take_is_told(tmp_path, arrays, other):
    place(tmp_path / "a.safetensors", stored(arrays))
    (tmp_path / other).write_bytes(b"x")
    found = pytorch.read(tmp_path)
    assert found.notes[0] == (
        f"Of several, a.safetensors was read, not {other}."
    )
