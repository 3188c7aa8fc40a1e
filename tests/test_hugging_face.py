"""Directories of transformers' BiT: files by hand, and transformers itself."""

import dataclasses
import importlib.util
import json
import re

import helpers
import numpy as np
import pytest

from bit_tf import errors, labels, presets
from bit_tf.checkpoints import (
    checkpoint,
    hugging_face,
    layout,
    processors,
    pytorch,
    rename,
    safetensors_file,
)
from bit_tf.checkpoints.facts import KEY, Facts
from bit_tf.labels import Label

TINY = (1, 1, 1, 1)
KERNEL = "block4/unit01/b/standardized_conv2d/kernel"
STORED = "bit.encoder.stages.3.layers.0.conv2.weight"
# As huggingface.co/google/bit-50 has it.
PROCESSOR = {
    "crop_size": {"height": 448, "width": 448},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 448},
}
CONFIG = {
    "architectures": ["BitForImageClassification"],
    "depths": [1, 1, 1, 1],
    "drop_path_rate": 0.1,
    "embedding_dynamic_padding": False,
    "embedding_size": 32,
    "global_padding": None,
    "hidden_act": "relu",
    "hidden_sizes": [128, 256, 512, 1024],
    "id2label": {str(index): f"class {index}" for index in range(10)},
    "layer_type": "preactivation",
    "model_type": "bit",
    "num_channels": 3,
    "num_groups": 32,
    "output_stride": 32,
    "torch_dtype": "float32",
    "width_factor": 1,
}


def with_transformers(function):
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(
            not (
                importlib.util.find_spec("torch")
                and importlib.util.find_spec("transformers")
            ),
            reason="needs torch and transformers: "
            "pip install -c constraints.txt '.[oracle]', then pytest -m slow",
        ),
        pytest.mark.filterwarnings("ignore"),
    ):
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


@pytest.fixture
def directory(tmp_path, arrays):
    """A directory as transformers saves it, with nothing of this package."""
    path = tmp_path / "model"
    path.mkdir()
    weights(path, rename.TRANSFORMERS, arrays)
    put(path, "config.json", CONFIG)
    put(path, "preprocessor_config.json", PROCESSOR)
    return path


def weights(path, scheme, arrays, metadata=None):
    shapes = {name: array.shape for name, array in arrays.items()}
    with open(path / "model.safetensors", "w+b") as file:
        safetensors_file.write(
            file,
            *safetensors_file.encoded(scheme, arrays, shapes),
            metadata or {"format": "pt"},
        )


def put(directory, name, value):
    (directory / name).write_text(json.dumps(value))


def change(directory, name, **changes):
    """Sets fields of a JSON file; those that are ... are removed."""
    value = json.loads((directory / name).read_text()) | changes
    put(directory, name, {k: v for k, v in value.items() if v is not ...})


def same(found, arrays):
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    return True


@pytest.mark.parametrize("blocks", [TINY, (1, 2, 1, 3)])
@pytest.mark.parametrize("classes", [0, 1, 10])
def test_round_trip_is_bit_identical(tmp_path, blocks, classes):
    arrays = helpers.random_arrays(blocks, 32, classes)
    arrays["group_norm/beta"][:3] = [-0.0, 1e-45, 3.4e38]
    path = tmp_path / "model"
    hugging_face.write(arrays, path)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    for source in (path, path / "model.safetensors"):
        assert pytorch.sniff(source)
        found = pytorch.read(source)
        assert found.format == "transformers"
        assert found.path == path / "model.safetensors"
        assert (found.blocks, found.stem_width) == (blocks, 32)
        assert found.num_classes == classes
        assert found.notes == found.extra == ()
        assert same(found, arrays)
    bare = "embedder.convolution.weight"
    root = found.sources[layout.ROOT_KERNEL]
    assert root == (f"bit.{bare}" if classes else bare)
    again = tmp_path / "again"
    hugging_face.write(found, again)
    for file in path.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_a_published_directory(directory, arrays):
    found = pytorch.read(directory)
    assert found.facts == Facts(
        "timm",
        presets.PRESETS["hf bit-50"],
        tuple(Label("", f"class {index}") for index in range(10)),
    )
    assert found.notes == ()
    assert same(found, arrays)


FACTS = {
    "none": Facts(),
    "published": Facts("timm", presets.PRESETS["hf bit-50"]),
    "TensorFlow's": Facts(
        "google",
        presets.PRESETS["big_transfer eval"],
        tuple(Label(f"n{index}", f"ä{index}") for index in range(10)),
        16,
    ),
    "without ids": Facts(
        "big_vision",
        presets.PRESETS["big_vision fewshot"],
        tuple(Label("", f"same {index // 2}") for index in range(10)),
        8,
    ),
    "not resized": Facts("timm", presets.PRESETS["tfhub"]),
}


@pytest.mark.parametrize("case", FACTS)
def test_facts_travel(tmp_path, arrays, case):
    facts = FACTS[case]
    path = tmp_path / "model"
    hugging_face.write(checkpoint.Selection(arrays, facts), path)
    found = pytorch.read(path)
    assert found.facts == facts
    assert found.notes == ()
    # Its stride is another thing, without dilation.
    assert json.loads((path / "config.json").read_text())["output_stride"] == 32


def test_what_is_changed_beside_recorded_facts_counts(tmp_path, arrays):
    path = tmp_path / "model"
    hugging_face.write(
        checkpoint.Selection(arrays, FACTS["TensorFlow's"]), path
    )
    change(
        path,
        "preprocessor_config.json",
        size={"shortest_edge": 448},
        do_center_crop=True,
        crop_size={"height": 448, "width": 448},
    )
    names = {str(index): f"new {index}" for index in range(10)}
    change(path, "config.json", id2label=names)
    facts = pytorch.read(path).facts
    assert facts.preset == presets.PRESETS["hf bit-50"]
    assert [label.name for label in facts.labels] == list(names.values())
    assert (facts.numerics, facts.output_stride) == ("google", 16)


def test_recorded_facts_in_the_weights_count_more(directory, arrays):
    facts = Facts("big_vision", presets.PRESETS["hf bit-50"], None, 8)
    weights(directory, rename.TRANSFORMERS, arrays, {KEY: facts.to_json()})
    found = pytorch.read(directory).facts
    assert (found.numerics, found.output_stride) == ("big_vision", 8)
    weights(directory, rename.TRANSFORMERS, arrays, {KEY: "{}"})
    with pytest.raises(errors.CheckpointFormatError, match="bit_tf records"):
        pytorch.read(directory)


def test_imagenets_names(tmp_path):
    arrays = helpers.random_arrays(TINY, 32, 1000)
    path = tmp_path / "model"
    hugging_face.write(arrays, path)
    config = json.loads((path / "config.json").read_text())
    # Nobody said that these thousand classes are ImageNet's.
    assert config["id2label"]["999"] == "LABEL_999"
    facts = Facts("timm", labels=labels.label_set("ilsvrc2012"))
    hugging_face.write(checkpoint.Selection(arrays, facts), path)
    config = json.loads((path / "config.json").read_text())
    names = [label.name for label in labels.label_set("ilsvrc2012")]
    assert list(config["id2label"].values()) == names
    assert list(config["id2label"]) == [str(index) for index in range(1000)]
    # "crane" is a bird and a machine.
    assert len(config["label2id"]) == len(set(names)) == 999
    for name, index in config["label2id"].items():
        assert config["id2label"][str(index)] == name
    assert "labels" not in config[KEY]
    assert pytorch.read(path).facts.labels == labels.label_set("ilsvrc2012")


@pytest.mark.parametrize(
    ("name", "value", "supported"),
    [
        ("model_type", "vit", "bit"),
        ("layer_type", "bottleneck", "preactivation"),
        ("global_padding", "same", "null"),
        ("global_padding", "SAME", "null"),
        ("global_padding", "valid", "null"),
        ("num_groups", 16, "32"),
        ("num_groups", 32.0, "32"),
        ("hidden_act", "gelu", "relu"),
        ("num_channels", 1, "3"),
        ("embedding_dynamic_padding", True, "false"),
        ("output_stride", 16, "32"),
        ("output_stride", None, "32"),
    ],
)
def test_options_that_are_not_bit_are_refused_by_name(
    directory, name, value, supported
):
    change(directory, "config.json", **{name: value, "more": 1})
    with pytest.raises(errors.CheckpointFormatError) as caught:
        pytorch.read(directory)
    first, line = str(caught.value).split("\n")
    assert str(directory / "config.json") in first
    assert line == f"{name}: {value!r}; supported is {line.split()[-1]}"
    assert line.split()[-1].strip('"') == supported


def test_every_unsupported_option_is_listed(directory):
    change(directory, "config.json", layer_type="bottleneck", num_groups=8)
    with pytest.raises(
        errors.CheckpointFormatError, match=r"(?s)layer_type.*num_groups"
    ):
        pytorch.read(directory)


def test_the_default_of_an_option_is_supported(directory):
    for name in hugging_face._OPTIONS:
        change(directory, "config.json", **{name: ...})
        assert pytorch.read(directory).facts.numerics == "timm"


def test_a_stride_that_this_package_recorded(directory):
    record = json.loads(Facts("timm", output_stride=16).to_json())
    change(directory, "config.json", output_stride=16, **{KEY: record})
    assert pytorch.read(directory).facts.output_stride == 16
    change(directory, "config.json", output_stride=8)
    with pytest.raises(errors.CheckpointFormatError, match="output_stride: 8"):
        pytorch.read(directory)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("depths", [1, 1, 2, 1], "depths"),
        ("depths", ..., "depths"),
        ("embedding_size", 64, "embedding_size"),
        ("embedding_size", ..., "embedding_size"),
        (
            "hidden_sizes",
            [128, 256, 512, 2048],
            "hidden_sizes × width_factor",
        ),
        ("width_factor", 2, "hidden_sizes × width_factor"),
    ],
)
def test_another_architecture_is_refused_by_name(directory, name, value, shown):
    change(directory, "config.json", **{name: value})
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        pytorch.read(directory)
    lines = str(caught.value).split("\n")[1:]
    assert [line.split(":")[0] for line in lines] == [f"≠ {shown}"]


def test_the_width_factor_multiplies(directory):
    change(
        directory,
        "config.json",
        hidden_sizes=[64, 128, 256, 512],
        width_factor=2,
    )
    assert pytorch.read(directory).stem_width == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", 4),
        ("depths", [1, 1, True, 1]),
        ("embedding_size", "32"),
        ("embedding_size", None),
        ("hidden_sizes", [[1]]),
        ("hidden_sizes", [128, 256, 512, 1024.0]),
        ("width_factor", 1e308),
        ("id2label", ["a"] * 10),
        ("id2label", {"0": "a", "2": "b"}),
        ("id2label", {str(i): i for i in range(10)}),
        ("id2label", {f"0{i}": "a" for i in range(10)}),
        ("id2label", {str(i): "a" for i in range(9)}),
        ("id2label", {str(i): "a\tb" for i in range(10)}),
        ("id2label", {}),
        (KEY, {"numerics": "none"}),
        (KEY, 7),
    ],
)
def test_a_damaged_field_is_named(directory, name, value):
    change(directory, "config.json", **{name: value})
    with pytest.raises(errors.CheckpointFormatError) as caught:
        pytorch.read(directory)
    assert str(directory / "config.json") in str(caught.value)
    assert name in str(caught.value) or "label" in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{} {}", '{"a": NaN}', '{"a":' + "[" * 99_999]
)
def test_a_damaged_file_is_named(directory, file, text):
    (directory / file).write_text(text)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        pytorch.read(directory)
    assert str(directory / file) in str(caught.value)


def test_labels(directory, arrays):
    placeholders = {str(index): f"LABEL_{index}" for index in range(10)}
    for value in (placeholders, ...):
        change(directory, "config.json", id2label=value)
        assert pytorch.read(directory).facts.labels is None
    change(directory, "config.json", num_labels=11)
    with pytest.raises(errors.CheckpointFormatError, match="11 labels"):
        pytorch.read(directory)


def test_a_model_without_a_head_has_no_labels(directory, arrays):
    headless = {n: a for n, a in arrays.items() if not n.startswith("head/")}
    for scheme in (rename.TRANSFORMERS, rename.TRANSFORMERS_BARE):
        weights(directory, scheme, headless)
        found = pytorch.read(directory)
        assert found.num_classes == 0
        assert found.facts.labels is None
        assert same(found, headless)


def test_weights_alone(tmp_path, arrays):
    weights(tmp_path, rename.TRANSFORMERS, arrays)
    for config in (None, {"architecture": "resnetv2_50x1_bit"}):
        if config:
            put(tmp_path, "config.json", config)
        found = pytorch.read(tmp_path)
        assert found.facts == Facts("timm")
        assert "layer type, padding and labels could not" in found.notes[0]
        assert "preprocessor_config.json" in found.notes[1]


@pytest.mark.parametrize("row", ["hf bit-50"])
def test_presets_of_published_files(directory, row):
    for kind in ("BitImageProcessorFast", "BitImageProcessorPil", ...):
        change(directory, "preprocessor_config.json", image_processor_type=kind)
        assert pytorch.read(directory).facts.preset == presets.PRESETS[row]


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        # Old files have integers.
        (
            {"size": 448, "crop_size": 448, "resample": 3},
            ("shortest_edge", 448, 448, "bicubic"),
        ),
        # What is absent has transformers' default.
        (
            {"size": ..., "crop_size": ...},
            ("shortest_edge", 224, 224, "bilinear"),
        ),
        ({"resample": None}, ("shortest_edge", 448, 448, "bicubic")),
        (
            {"size": {"height": 480, "width": 480}},
            ("squash", 480, 448, "bilinear"),
        ),
        ({"do_center_crop": False}, ("shortest_edge", 448, None, "bilinear")),
        ({"do_resize": False}, ("none", None, 448, "bilinear")),
        (
            {"do_resize": False, "do_center_crop": False},
            ("none", None, None, "bilinear"),
        ),
    ],
)
def test_presets_of_other_files(directory, changes, numbers):
    change(directory, "preprocessor_config.json", **changes)
    preset = pytorch.read(directory).facts.preset
    assert numbers == (preset.resize, preset.size, preset.crop, preset.method)
    assert preset.antialias
    assert preset.offset == "floor"
    assert preset.name.startswith("transformers ")
    assert preset.source == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 1}, "resample is 1"),
        ({"size": {"height": 448, "width": 224}}, "size is"),
        ({"size": {"shortest_edge": 448, "longest_edge": 999}}, "size is"),
        ({"crop_size": {"shortest_edge": 448}}, "crop_size is"),
        ({"crop_size": {"height": 448, "width": 224}}, "crop_size is"),
        ({"size": 224}, "pads pictures of 224 pixels to 448"),
        ({"do_pad": True}, "pads"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
    ],
)
def test_what_no_preset_can_say_is_a_note(directory, changes, words):
    change(directory, "preprocessor_config.json", **changes)
    found = pytorch.read(directory)
    assert found.facts.preset is None
    assert any(re.search(words, note) for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_rescale": False}, "do_rescale: False"),
        ({"do_normalize": False}, "do_normalize: False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: 0.0078"),
        ({"rescale_factor": 10**400}, "rescale_factor: 1000"),
        ({"image_mean": 10**400}, "image_mean: 1000"),
        ({"image_mean": [0.485, 0.456, 0.406]}, "image_mean: .*0.485"),
        ({"image_mean": ...}, "image_mean: .*0.481"),
        ({"image_std": [0.5, 0.5, 0.4]}, "image_std: .*0.4"),
        ({"image_std": [0.5]}, "image_std: "),
        ({"image_std": "0.5"}, "image_std: "),
        ({"do_resize": "yes"}, "do_resize"),
        ({"size": 0}, "size"),
        ({"size": True}, "size"),
        ({"size": -448}, "size"),
        ({"size": {"shortest_edge": "448"}}, "size"),
        ({"size": {}}, "size"),
        ({"size": 2**20}, "preset"),
        ({"crop_size": [448]}, "crop_size"),
    ],
)
def test_other_pixels_and_damage_are_refused_by_name(directory, changes, words):
    change(directory, "preprocessor_config.json", **changes)
    with pytest.raises(errors.CheckpointFormatError, match=words) as caught:
        pytorch.read(directory)
    assert str(directory / "preprocessor_config.json") in str(caught.value)


def test_a_scalar_mean_is_every_channels(directory):
    change(directory, "preprocessor_config.json", image_mean=0.5, image_std=0.5)
    assert pytorch.read(directory).facts.preset is not None


@pytest.mark.parametrize(
    "mutate",
    [
        lambda t: {("x" + n if n == STORED else n): t[n] for n in t},
        lambda t: {n: t[n] for n in t if n != STORED},
        lambda t: {**t, STORED: t[STORED].transpose(2, 3, 1, 0)},
        lambda t: {**t, STORED: t[STORED][:-1]},
    ],
    ids=["renamed", "dropped", "transposed", "truncated"],
)
def test_mutations_are_named(directory, arrays, mutate):
    tensors = {
        rename.TRANSFORMERS.spell(name): rename.TRANSFORMERS.encode(name, array)
        for name, array in arrays.items()
    }
    tensors = mutate(tensors)
    with open(directory / "model.safetensors", "w+b") as file:
        safetensors_file.write(
            file,
            {name: array.shape for name, array in tensors.items()},
            tensors.__getitem__,
            {},
        )
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        pytorch.read(directory)
    assert KERNEL in str(caught.value)
    assert STORED in str(caught.value)


def test_a_truncated_file_names_its_last_tensor(directory):
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(
        errors.CheckpointFormatError, match=r"\nclassifier|\nbit\.norm"
    ):
        pytorch.read(directory)


def shard(directory, arrays, parts=3):
    """Splits a directory's weights as transformers names shards."""
    (directory / "model.safetensors").unlink()
    names = sorted(arrays)
    where = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = {name: arrays[name] for name in names[part::parts]}
        weights(directory, rename.TRANSFORMERS, chosen)
        (directory / "model.safetensors").rename(directory / file)
        where |= {rename.TRANSFORMERS.spell(name): file for name in chosen}
    put(directory, "model.safetensors.index.json", {"weight_map": where})
    return where


@pytest.mark.parametrize("parts", [1, 3])
def test_shards(directory, arrays, parts):
    where = shard(directory, arrays, parts)
    for source in (directory, directory / "model.safetensors.index.json"):
        assert pytorch.sniff(source)
        found = pytorch.read(source)
        assert found.path == directory
        assert found.notes == ()
        assert same(found, arrays)
    (directory / where[STORED]).unlink()
    with pytest.raises(errors.CheckpointFormatError, match=where[STORED]):
        pytorch.read(directory)


def test_what_a_writer_may_replace(tmp_path, arrays):
    path = tmp_path / "model"
    path.mkdir()
    hugging_face.write(arrays, path)
    hugging_face.write(arrays, path)
    (path / "README.md").write_text("precious")
    with pytest.raises(FileExistsError, match=r"README\.md"):
        hugging_face.write(arrays, path)
    assert (path / "README.md").read_text() == "precious"
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(FileExistsError, match="a file"):
        hugging_face.write(arrays, file)
    assert file.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_a_bad_write_leaves_nothing(tmp_path, arrays):
    path = tmp_path / "model"
    bad_labels = dataclasses.replace(
        Facts(), labels=tuple(Label("", "x") for _ in range(9))
    )
    for source in (
        {**arrays, KERNEL: np.full_like(arrays[KERNEL], np.nan)},
        {**arrays, KERNEL: arrays[KERNEL][:-1]},
        {**arrays, "more": np.zeros(3, np.float32)},
        checkpoint.Selection(arrays, bad_labels),
    ):
        with pytest.raises(errors.CheckpointError):
            hugging_face.write(source, path)
        assert list(tmp_path.iterdir()) == []


def logits_of(arrays, blocks, width, classes, pictures):
    from bit_tf import models

    ours = models.ResNetV2(blocks, width, classes, numerics="timm")
    for name, variable in models.canonical_variables(ours).items():
        variable.assign(arrays[name])
    return np.asarray(ours(pictures))


def a_picture():
    pictures = helpers.random_images(1, 97, 131) / np.float32(255)
    return pictures.astype(np.float32)


@with_transformers
@pytest.mark.parametrize(
    ("blocks", "width", "classes"),
    [
        (TINY, 32, 10),
        ((1, 2, 1, 3), 32, 2),
        ((3, 4, 6, 3), 64, 1000),
    ],
)
def test_transformers_gives_the_same_logits(tmp_path, blocks, width, classes):
    import torch
    import transformers

    arrays = helpers.random_arrays(blocks, width, classes)
    path = tmp_path / "model"
    hugging_face.write(checkpoint.Selection(arrays, Facts("timm")), path)
    theirs, report = transformers.BitForImageClassification.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs.eval()
    pictures = a_picture()
    with torch.no_grad():
        tensor = torch.from_numpy(2 * pictures.transpose(0, 3, 1, 2) - 1)
        expected = theirs(tensor).logits.numpy()
    found = logits_of(arrays, blocks, width, classes, pictures)
    assert helpers.relative_error(found, expected) <= 1e-5
    config = json.loads((path / "config.json").read_text())
    assert theirs.config.id2label == {
        int(index): name for index, name in config["id2label"].items()
    }
    theirs.save_pretrained(tmp_path / "saved")
    again = pytorch.read(tmp_path / "saved")
    assert same(again, arrays)
    assert again.facts == pytorch.read(path).facts


@with_transformers
def test_transformers_gives_the_same_features(tmp_path):
    import torch
    import transformers

    arrays = helpers.random_arrays((1, 2, 1, 1), 32)
    path = tmp_path / "model"
    hugging_face.write(arrays, path)
    theirs, report = transformers.BitModel.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs.eval()
    pictures = a_picture()
    with torch.no_grad():
        tensor = torch.from_numpy(2 * pictures.transpose(0, 3, 1, 2) - 1)
        expected = theirs(tensor).pooler_output.numpy()[:, :, 0, 0]
    found = logits_of(arrays, (1, 2, 1, 1), 32, 0, pictures)
    assert helpers.relative_error(found, expected) <= 1e-5
    theirs.save_pretrained(tmp_path / "saved")
    assert same(pytorch.read(tmp_path / "saved"), arrays)


@with_transformers
@pytest.mark.parametrize("size", ["5GB", "1MB"])
@pytest.mark.parametrize("classes", [2, 10])
def test_what_transformers_saves_is_read(tmp_path, size, classes):
    import transformers

    config = transformers.BitConfig(
        depths=[1, 2, 1, 1],
        embedding_size=32,
        hidden_sizes=[128, 256, 512, 1024],
        num_labels=classes,
    )
    model = transformers.BitForImageClassification(config)
    model.save_pretrained(tmp_path, max_shard_size=size)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (size == "1MB")
    found = pytorch.read(tmp_path)
    assert found.facts == Facts("timm")
    assert (found.blocks, found.num_classes) == ((1, 2, 1, 1), classes)
    state = model.state_dict()
    assert set(found.sources.values()) == set(state)
    for name, source in found.sources.items():
        np.testing.assert_array_equal(
            found[name],
            rename.TRANSFORMERS.decode(name, state[source].numpy()),
            strict=True,
        )


@with_transformers
@pytest.mark.parametrize(
    "option",
    [
        {"layer_type": "bottleneck"},
        {"global_padding": "same"},
        {"output_stride": 16},
        {"embedding_dynamic_padding": True},
        {"num_groups": 16},
    ],
    ids=str,
)
def test_other_networks_that_transformers_saves_are_refused(tmp_path, option):
    import transformers

    config = transformers.BitConfig(
        depths=[1, 1, 1, 1],
        embedding_size=32,
        hidden_sizes=[128, 256, 512, 1024],
        **option,
    )
    transformers.BitForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(errors.CheckpointFormatError, match=next(iter(option))):
        pytorch.read(tmp_path)


@with_transformers
def test_defaults_are_transformers_own():
    import transformers

    config = transformers.BitConfig()
    for name, value in (
        hugging_face._OPTIONS | hugging_face._ARCHITECTURE
    ).items():
        assert getattr(config, name) == value


@with_transformers
@pytest.mark.parametrize(
    "name", ["hf bit-50", "timm in21k", "timm distilled", "big_vision fewshot"]
)
def test_transformers_prepares_the_same_pictures(tmp_path, name):
    from bit_tf import images

    path = tmp_path / "model"
    facts = Facts("timm", presets.PRESETS[name])
    arrays = helpers.random_arrays(TINY, 32)
    hugging_face.write(checkpoint.Selection(arrays, facts), path)
    from transformers.models.bit.image_processing_pil_bit import (
        BitImageProcessorPil,
    )

    processor = BitImageProcessorPil.from_pretrained(path)
    picture = helpers.random_images(1, 301, 260)[0]
    theirs = processor(picture, return_tensors="np")["pixel_values"]
    said, why = processors.from_transformers(
        path, json.loads((path / "preprocessor_config.json").read_text())
    )
    assert not why
    ours = 2 * images.preprocess(picture, said) - 1
    np.testing.assert_allclose(
        theirs[0].transpose(1, 2, 0), ours, atol=1.01 * 2 / 255
    )
    assert np.abs(theirs[0].transpose(1, 2, 0) - ours).mean() < 1e-3
    for field, value in processors._DEFAULTS.items():
        if field in ("image_mean", "image_std"):
            continue
        assert hasattr(BitImageProcessorPil, field) or field in (
            "rescale_factor",
            "do_pad",
        )
        if field not in ("rescale_factor", "do_pad"):
            assert getattr(BitImageProcessorPil, field) == value
