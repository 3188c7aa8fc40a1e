"""The names and shapes that other programs give, against the layout.

tests/corpora/README.md tells where the lists come from.
"""

import pytest
from foreign import PUBLISHED, corpus

from bit_tf import variants
from bit_tf.checkpoints import google_npz, layout, rename

# Folder: (scheme, what the files put before every name).
SCHEMES = {
    "timm": (rename.TIMM, ""),
    "transformers": (rename.TRANSFORMERS, ""),
    "transformers, bare": (rename.TRANSFORMERS_BARE, ""),
    "paddle": (rename.PADDLE, ""),
    "flax_bit_jax": (rename.BIT_JAX, ""),
    "flax_big_vision": (rename.BIG_VISION, "params/"),
}
HEAD = "classifier.1.weight"


def found(source, architecture):
    """(names and shapes of a source, number of classes)."""
    if source == "transformers, bare":
        # BitModel has neither the prefix nor the classifier.
        whole = corpus("transformers", architecture)
        return {
            name.removeprefix("bit."): shape
            for name, shape in whole.items()
            if name.startswith("bit.")
        }, 0
    if source == "paddle":
        # PaddlePaddle's Linear keeps (in, out), torch's (out, in).
        whole = corpus("transformers", architecture)
        return whole | {HEAD: whole[HEAD][::-1]}, 1000
    return corpus(source, architecture), 1000


@pytest.mark.parametrize("architecture", PUBLISHED)
@pytest.mark.parametrize("source", SCHEMES)
def test_lists_map_one_to_one(source, architecture):
    scheme, prefix = SCHEMES[source]
    theirs, classes = found(source, architecture)
    row = variants.ARCHITECTURES[architecture]
    ours = layout.expected_shapes(row.blocks, row.stem_width, classes)
    translated = {}
    for name, shape in theirs.items():
        assert name.startswith(prefix)
        canonical = scheme.canonical(name.removeprefix(prefix))
        translated[canonical] = scheme.shape(canonical, shape)
    assert len(translated) == len(theirs)
    assert translated == ours
    assert theirs == {
        prefix + scheme.spell(name): scheme.stored_shape(name, shape)
        for name, shape in ours.items()
    }


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_googles_own_list(architecture):
    theirs = corpus("google", architecture)
    row = variants.ARCHITECTURES[architecture]
    ours = layout.expected_shapes(row.blocks, row.stem_width, 1000)
    assert theirs == {
        f"resnet/{name}": google_npz._stored_shape(name, shape)
        for name, shape in ours.items()
    }
    assert {rename.google_spelling(name) for name in theirs} == ours.keys()
