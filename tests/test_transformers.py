"""Against an independent implementation: transformers' BiT, in torch."""

import importlib.util

import helpers
import numpy as np
import pytest

from bit_tf import models

pytestmark = [
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
]


def state_dict(arrays, blocks):
    """Weights by transformers' names and layouts, written out by hand."""
    import torch

    def conv(name):
        kernel = arrays[f"{name}/standardized_conv2d/kernel"]
        return torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())

    def vector(name):
        return torch.from_numpy(arrays[name])

    found = {"bit.embedder.convolution.weight": conv("root_block")}
    for stage, units in enumerate(blocks):
        for layer in range(units):
            unit = f"block{stage + 1}/unit{layer + 1:02d}"
            prefix = f"bit.encoder.stages.{stage}.layers.{layer}"
            for number, letter in ((1, "a"), (2, "b"), (3, "c")):
                found[f"{prefix}.conv{number}.weight"] = conv(
                    f"{unit}/{letter}"
                )
                norm = f"{unit}/{letter}/group_norm"
                found[f"{prefix}.norm{number}.weight"] = vector(f"{norm}/gamma")
                found[f"{prefix}.norm{number}.bias"] = vector(f"{norm}/beta")
            if layer == 0:
                found[f"{prefix}.downsample.conv.weight"] = conv(
                    f"{unit}/a/proj"
                )
    found["bit.norm.weight"] = vector("group_norm/gamma")
    found["bit.norm.bias"] = vector("group_norm/beta")
    head = arrays["head/conv2d/kernel"]
    found["classifier.1.weight"] = torch.from_numpy(head.T.copy())
    found["classifier.1.bias"] = vector("head/conv2d/bias")
    return found


@pytest.mark.parametrize("size", [(224, 224), (225, 225), (97, 131)])
def test_r50x1_equals_transformers(size):
    import torch
    import transformers

    blocks, classes = (3, 4, 6, 3), 1000
    arrays = helpers.random_arrays(blocks, 64, classes)
    config = transformers.BitConfig(depths=list(blocks), num_labels=classes)
    assert config.layer_type == "preactivation"
    assert config.global_padding is None
    theirs = transformers.BitForImageClassification(config).eval()
    theirs.load_state_dict(state_dict(arrays, blocks), strict=True)

    ours = models.ResNetV2(blocks, 64, classes, numerics="timm")
    for name, variable in models.canonical_variables(ours).items():
        variable.assign(arrays[name])

    pictures = helpers.random_images(1, *size) / np.float32(255)
    pictures = pictures.astype(np.float32)
    with torch.no_grad():
        tensor = torch.from_numpy(2 * pictures.transpose(0, 3, 1, 2) - 1)
        expected = theirs(tensor).logits.numpy()
    assert helpers.relative_error(ours(pictures), expected) <= 1e-5
