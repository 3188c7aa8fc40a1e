"""Names and axes of every source, against each other."""

import pathlib

import numpy as np
import pytest

from bit_tf import errors, variants
from bit_tf.checkpoints import checkpoint, layout, rename

R50 = variants.architecture("R50x1")
DEEP = variants.architecture("R152x2")


def shapes_of(row, classes=7):
    return layout.expected_shapes(row.blocks, row.stem_width, classes)


@pytest.mark.parametrize("scheme", rename.SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("row", [R50, DEEP], ids=lambda row: row.name)
def test_names_go_there_and_back(scheme, row):
    shapes = shapes_of(row)
    spelled = {scheme.spell(name): name for name in shapes}
    assert len(spelled) == len(shapes)
    for source, name in spelled.items():
        assert scheme.canonical(source) == name


@pytest.mark.parametrize("scheme", rename.SCHEMES, ids=lambda s: s.name)
def test_arrays_go_there_and_back(scheme, rng):
    for name, shape in shapes_of(variants.architecture("testing")).items():
        array = rng.standard_normal(shape).astype(np.float32)
        stored = scheme.encode(name, array)
        assert stored.shape == scheme.stored_shape(name, shape)
        assert scheme.shape(name, stored.shape) == shape
        np.testing.assert_array_equal(
            scheme.decode(name, stored), array, strict=True
        )


def test_axes_are_those_of_the_sources():
    kernel = "block1/unit01/b/standardized_conv2d/kernel"
    gamma = "block1/unit01/b/group_norm/gamma"
    array = np.zeros((3, 4, 5, 6))
    array[1, 2, 3, 4] = 1
    assert rename.TIMM.encode(kernel, array)[4, 3, 1, 2] == 1
    assert rename.BIT_JAX.encode(kernel, array)[1, 2, 3, 4] == 1
    head = np.zeros((5, 2))
    head[4, 1] = 1
    for scheme, index in (
        (rename.TIMM, (1, 4, 0, 0)),
        (rename.TRANSFORMERS, (1, 4)),
        (rename.PADDLE, (4, 1)),
        (rename.BIT_JAX, (4, 1)),
    ):
        assert scheme.encode(layout.HEAD_KERNEL, head)[index] == 1
    assert rename.BIG_VISION.stored_shape(gamma, (64,)) == (1, 1, 1, 64)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("stages.3.blocks.11.norm2.bias", "block4/unit12/b/group_norm/beta"),
        ("stages.4.blocks.0.norm2.bias", "block5/unit01/b/group_norm/beta"),
        ("stages.00.blocks.0.norm2.bias", None),
        ("stages.٣.blocks.0.norm2.bias", None),
        ("stages.0.blocks.0.norm4.bias", None),
        ("stages.0.blocks.0.norm1.running_mean", None),
        ("stages.0.blocks.0.conv1.bias", None),
        ("stem.conv.weight\n", None),
        ("xstem.conv.weight", None),
        ("stages.9999999.blocks.0.norm2.bias", None),
    ],
)
def test_what_counts_as_a_name(name, canonical):
    assert rename.TIMM.canonical(name) == canonical


@pytest.mark.parametrize(
    "scheme",
    [
        rename.TIMM,
        rename.TRANSFORMERS,
        rename.TRANSFORMERS_BARE,
        rename.BIT_JAX,
    ],
    ids=lambda scheme: scheme.root,
)
def test_a_renamed_root_does_not_hide_the_scheme(scheme):
    names = [scheme.spell(name) for name in shapes_of(R50)]
    names[names.index(scheme.root)] = "renamed"
    assert rename.identify(names, rename.SCHEMES) == scheme


def test_strangers_have_no_scheme():
    assert rename.identify(["conv1.weight", "fc.bias"], rename.SCHEMES) is None
    assert rename.identify([], rename.SCHEMES) is None


def test_numbered_names():
    assert (
        rename.google_spelling(
            "resnet/block1/unit02/a/standardized_conv2d_14/kernel"
        )
        == "block1/unit02/a/standardized_conv2d/kernel"
    )


def entry(shape, name=""):
    return checkpoint.Entry(
        shape, np.dtype("f4"), lambda: np.zeros(shape, "f4"), name
    )


def test_collect_reports_strangers_and_refuses_doubles():
    stored = {
        "module.stem.conv.weight": entry((32, 3, 7, 7)),
        "z": entry((1,)),
        "ema": entry((1,)),
    }
    found, extra = rename.collect(
        pathlib.Path("a.pth"),
        rename.TIMM,
        stored,
        lambda name: name.removeprefix("module."),
    )
    assert extra == ("ema", "z")
    (root,) = found.values()
    assert root.shape == (7, 7, 3, 32)
    assert root.source == "module.stem.conv.weight"
    assert root.load().shape == (7, 7, 3, 32)
    stored["stem.conv.weight"] = entry((32, 3, 7, 7))
    with pytest.raises(errors.CheckpointFormatError, match="which are both"):
        rename.collect(
            pathlib.Path("a.pth"),
            rename.TIMM,
            stored,
            lambda name: name.removeprefix("module."),
        )


def test_shapes_that_do_not_fit_stay_as_they_are():
    kernel = "block1/unit01/a/standardized_conv2d/kernel"
    gamma = "block1/unit01/a/group_norm/gamma"
    assert rename.TIMM.shape(kernel, (64, 64)) == (64, 64)
    assert rename.BIT_JAX.shape(gamma, (2, 1, 1, 32)) == (2, 1, 1, 32)
    assert rename.TIMM.shape(layout.HEAD_KERNEL, (7, 64, 1, 2)) == (7, 64, 1, 2)
