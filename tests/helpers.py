"""What several tests need: random weights, pictures, errors, processes."""

import numpy as np

from hub_export import random_weights

# blocks and stem width of variants.ARCHITECTURES["testing"]
TESTING = ((1, 1, 1, 1), 32)


def random_arrays(blocks, stem_width, num_classes=0, seed=0):
    """Weights in the published layout: {canonical name: float32 array}."""
    weights = random_weights.RandomWeights(
        blocks, stem_width, num_classes, seed
    )
    return dict(weights)


def random_images(n, height, width, seed=0):
    """uint8 [n, height, width, 3]: smooth shapes with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32.0
    waves = rng.uniform(-2, 2, (n, 3, 3))
    images = [
        [np.sin(a * x + b * y + c) for a, b, c in channels]
        for channels in waves
    ]
    images = np.moveaxis(np.asarray(images), 1, -1) * 80 + 128
    images = images + rng.normal(0, 10, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8)


def relative_error(a, b):
    """‖a − b‖₂ / ‖b‖₂ over the whole output."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def make_entry(handle, num_classes=0, architecture="R50x1", labels="auto"):
    """A published version's description, as if there was a SavedModel."""
    from bit_tf import handles, variants
    from bit_tf import labels as names
    from hub_export import card, entry

    row = variants.architecture(architecture)
    if labels == "auto":
        labels = names.of_count(num_classes)
    output = num_classes or row.feature_dim
    where = handles.Handle.parse(handle)
    shape = (None, None, None, 3)
    signatures = {
        "serving_default": {"output_1": (None, output)},
        "image_feature_vector": {"features": (None, row.feature_dim)},
    }
    if num_classes:
        signatures["image_classification"] = {
            "logits": (None, num_classes),
            "probabilities": (None, num_classes),
        }
    model_card = card.Card(
        architecture=architecture,
        feature_dim=row.feature_dim,
        num_classes=num_classes,
        params=row.count_params(num_classes),
        task="image-classification" if num_classes else "image-feature-vector",
        input="RGB pictures [n, height, width, 3] of any size, float32 in "
        "[0, 1] or uint8 in [0, 255]; scaled inside",
        output=f"logits float32 [n, {num_classes}]"
        if num_classes
        else f"features float32 [n, {row.feature_dim}]",
        probabilities=names.activation(num_classes) if num_classes else None,
        labels=labels,
        output_stride=32,
        numerics={
            "name": "google",
            "ws_epsilon": 1e-10,
            "gn_epsilon": 1e-05,
            "pool_border": "0.0",
        },
    )
    graph = entry.Graph(
        dtypes=("float32", "uint8"),
        input_shape=shape,
        outputs=output,
        params=model_card.params,
        variables=row.count_arrays(bool(num_classes)),
        trainable_variables=row.count_arrays(bool(num_classes)),
        regularization_losses=0,
        signatures=signatures,
        endpoints={"pre_logits": (None, row.feature_dim)},
        labels=num_classes if labels else None,
        relative_error=2.5e-7,
        tolerance=1e-4,
    )
    size = 4 * model_card.params
    return entry.Entry(
        publication=entry.Publication(
            where,
            "Feature vectors of BiT-M R50x1, trained on ImageNet-21k.",
            "apache-2.0",
            ("imagenet-21k",),
        ),
        card=model_card,
        provenance=card.Provenance(
            source="BiT-M-R50x1.npz",
            name="BiT-M-R50x1",
            numerics="google",
            numerics_chosen="source",
            sha256="1" * 64,
            format="google_npz",
            versions={"bit-tf": "0.1.0", "tensorflow": "2.21.0"},
        ),
        graph=graph,
        archive=handles.File(
            f"{where}{handles.ARCHIVE_SUFFIX}", size * 9 // 10, "2" * 64
        ),
        files=(
            handles.File("saved_model.pb", 1_000_000, "3" * 64),
            handles.File("variables/variables.index", 9_000, "4" * 64),
        ),
        published="2026-11-21T18:00:00Z",
    )
