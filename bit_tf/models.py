"""ResNet-v2 as BiT builds it: unit, block, model, and their weights.

From math to model, in the order of the forward pass. Every intermediate that
others use is an endpoint with a name. Source: arXiv:1603.05027 (the unit),
arXiv:1912.11370 (BiT), google-research/big_transfer.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np
from absl import logging
from keras import ops

from bit_tf import checkpoints, errors, images, published, variants
from bit_tf.checkpoints import layout
from bit_tf.layers import GroupNormalization, StandardizedConv2D

__all__ = [
    "ResNetV2",
    "canonical_arrays",
    "create_model",
    "endpoint_names",
    "endpoints",
    "from_checkpoint",
    "load_model",
    "recompute",
]

# Endpoint: the layer that computes it.
ENDPOINTS = {
    "stem": "root_block",
    "block1": "block1",
    "block2": "block2",
    "block3": "block3",
    "block4": "block4",
    "pre_logits": "pre_logits",
    "logits": "head",
}


@keras.saving.register_keras_serializable(package="bit_tf")
class RootBlock(keras.layers.Layer):
    """7×7 convolution at stride 2, then 3×3 max pooling at stride 2.

    float [n, h, w, 3] → float [n, ⌈h/4⌉, ⌈w/4⌉, filters].
    """

    def __init__(self, filters, ws_epsilon, pool_border, **kwargs):
        super().__init__(**kwargs)
        self.pool_border = pool_border
        self.conv = StandardizedConv2D(
            filters,
            7,
            strides=2,
            epsilon=ws_epsilon,
            name="standardized_conv2d",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape):
        self.conv.build(input_shape)

    def call(self, inputs):
        x = ops.pad(
            self.conv(inputs),
            [[0, 0], [1, 1], [1, 1], [0, 0]],
            constant_values=self.pool_border,
        )
        return ops.max_pool(
            x, 3, strides=2, padding="valid", data_format="channels_last"
        )

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        return (
            batch,
            None if height is None else -(-height // 4),
            None if width is None else -(-width // 4),
            self.conv.filters,
        )


@keras.saving.register_keras_serializable(package="bit_tf")
class Unit(keras.layers.Layer):
    """Pre-activated bottleneck: 1×1 (a), 3×3 (b), 1×1 (c), plus a shortcut.

    float [n, h, w, c] → float [n, ⌈h/strides⌉, ⌈w/strides⌉, 4·filters]. The
    stride is the 3×3's; a projected shortcut takes the activated input.

    Attributes:
      recompute: see `recompute`.
    """

    def __init__(
        self,
        filters,
        strides,
        dilation_rate,
        project,
        ws_epsilon,
        gn_epsilon,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.project = project
        self.recompute = False

        def norm():
            return GroupNormalization(
                epsilon=gn_epsilon,
                activation="relu",
                name="group_norm",
                dtype=self.dtype_policy,
            )

        def conv(filters, kernel_size, **options):
            return StandardizedConv2D(
                filters,
                kernel_size,
                epsilon=ws_epsilon,
                name="standardized_conv2d",
                dtype=self.dtype_policy,
                **options,
            )

        self.norm_a, self.conv_a = norm(), conv(filters, 1)
        self.norm_b, self.conv_b = (
            norm(),
            conv(filters, 3, strides=strides, dilation_rate=dilation_rate),
        )
        self.norm_c, self.conv_c = norm(), conv(4 * filters, 1)
        if project:
            self.conv_proj = conv(4 * filters, 1, strides=strides)

    def build(self, input_shape):
        shape = tuple(input_shape)
        with keras.name_scope("a"):
            self.norm_a.build(shape)
            self.conv_a.build(shape)
            if self.project:
                with keras.name_scope("proj"):
                    self.conv_proj.build(shape)
        for scope, norm, conv, before in (
            ("b", self.norm_b, self.conv_b, self.conv_a),
            ("c", self.norm_c, self.conv_c, self.conv_b),
        ):
            shape = (*shape[:-1], before.filters)
            with keras.name_scope(scope):
                norm.build(shape)
                conv.build(shape)

    def call(self, inputs):
        if self.recompute:
            return keras.remat(self._outputs)(inputs)
        return self._outputs(inputs)

    def _outputs(self, inputs):
        x = self.norm_a(inputs)
        shortcut = self.conv_proj(x) if self.project else inputs
        x = self.conv_a(x)
        x = self.conv_b(self.norm_b(x))
        x = self.conv_c(self.norm_c(x))
        return x + shortcut

    def compute_output_shape(self, input_shape):
        shape = self.conv_b.compute_output_shape(input_shape)
        return (*shape[:-1], self.conv_c.filters)


@keras.saving.register_keras_serializable(package="bit_tf")
class Block(keras.layers.Layer):
    """A stage: units of one width; the first projects and may stride.

    Args:
      units: how many.
      filters: width of a unit's 3×3; its output is 4 times as wide.
      strides: of the first unit.
      dilation_rates: of the first unit's 3×3, and of the others'.
      ws_epsilon, gn_epsilon: constants of the weights' source.
    """

    def __init__(
        self,
        units,
        filters,
        strides,
        dilation_rates,
        ws_epsilon,
        gn_epsilon,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = [
            Unit(
                filters,
                strides if index == 0 else 1,
                dilation_rates[0 if index == 0 else 1],
                project=index == 0,
                ws_epsilon=ws_epsilon,
                gn_epsilon=gn_epsilon,
                name=f"unit{index + 1:02d}",
                dtype=self.dtype_policy,
            )
            for index in range(units)
        ]

    def build(self, input_shape):
        for unit in self.units:
            unit.build(input_shape)
            input_shape = unit.compute_output_shape(input_shape)

    def call(self, inputs):
        x = inputs
        for unit in self.units:
            x = unit(x)
        return x

    def compute_output_shape(self, input_shape):
        for unit in self.units:
            input_shape = unit.compute_output_shape(input_shape)
        return input_shape


@keras.saving.register_keras_serializable(package="bit_tf")
class Head(keras.layers.Layer):
    """Linear classifier, float [n, c] → logits float [n, num_classes].

    Starts at zero, as BiT-HyperRule wants a new head.
    """

    def __init__(self, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(
            num_classes,
            kernel_initializer="zeros",
            name="conv2d",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.dense.units)


@keras.saving.register_keras_serializable(package="bit_tf")
class ImageModel(keras.Model):
    """A functional model of pictures that takes float [0,1] or uint8 [0,255].

    Keras would cast integers to float 0..255 before the first layer runs, so
    they are scaled before that. Inside another functional or Sequential model
    it is the outer one that casts: begin that one with
    `keras.Input((None, None, 3), dtype="uint8")`, or feed it floats in [0, 1].
    """

    def call(self, inputs, training=None, mask=None, **kwargs):
        return super().call(
            images.to_unit_range(inputs), training=training, mask=mask, **kwargs
        )


def _strides(output_stride: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(strides, dilation rates of the first and the other units) by block."""
    if output_stride not in (32, 16, 8):
        raise ValueError(
            f"output_stride must be 32, 16 or 8. Received: {output_stride!r}."
        )
    reached, rate = 4, 1
    for strides in (1, 2, 2, 2):
        before = rate
        if reached * strides > output_stride:
            rate, strides = rate * strides, 1
        reached *= strides
        yield strides, (before, rate)


@keras.saving.register_keras_serializable(package="bit_tf")
class ResNetV2(ImageModel):
    """BiT's network.

    RGB pictures of any size, float32 in [0,1] or uint8 in [0,255],
    [n ≥ 1, h, w, 3] → logits float [n, num_classes], or with num_classes=0 the
    feature vector float [n, 32 · stem_width].

    Layers by name: root_block, block1 … block4, group_norm, pre_logits, head.
    `model.get_layer("block1").trainable = False` freezes one.

    Args:
      blocks: number of units in each of the four blocks.
      stem_width: channels of the root convolution; a multiple of 32.
      num_classes: outputs of the head; 0 for no head.
      output_stride: 32; 16 or 8 keep the last blocks' resolution by dilation.
      numerics: a name in variants.NUMERICS: constants of the weights' source.
      frozen: names of layers, and of units such as "block1/unit01", that are
        not trainable.
    """

    def __init__(
        self,
        blocks,
        stem_width,
        num_classes=0,
        *,
        output_stride=32,
        numerics="google",
        frozen=(),
        **kwargs,
    ):
        dtype = kwargs.pop("dtype", None)
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        if policy.variable_dtype != "float32":
            raise ValueError(
                "Weights are float32; dtype must be 'float32', "
                "'mixed_bfloat16' or 'mixed_float16'. Received: "
                f"{policy.name!r}."
            )
        if len(blocks) != 4:
            raise ValueError(
                "A BiT-ResNet has four blocks. Received: blocks="
                f"{tuple(blocks)}."
            )
        num_classes = int(num_classes)
        constants = variants.numerics(numerics)
        epsilons = {
            "ws_epsilon": constants.ws_epsilon,
            "gn_epsilon": constants.gn_epsilon,
        }
        inputs = keras.Input((None, None, 3), name="images")
        x = 2.0 * inputs - 1.0
        x = RootBlock(
            stem_width,
            ws_epsilon=constants.ws_epsilon,
            pool_border=constants.pool_border,
            name="root_block",
            dtype=dtype,
        )(x)
        for index, (units, (strides, dilation_rates)) in enumerate(
            zip(blocks, _strides(output_stride), strict=True)
        ):
            x = Block(
                units,
                stem_width * 2**index,
                strides,
                dilation_rates,
                name=f"block{index + 1}",
                dtype=dtype,
                **epsilons,
            )(x)
        x = GroupNormalization(
            epsilon=constants.gn_epsilon,
            activation="relu",
            name="group_norm",
            dtype=dtype,
        )(x)
        x = keras.layers.GlobalAveragePooling2D(
            data_format="channels_last", name="pre_logits", dtype=dtype
        )(x)
        if num_classes:
            x = Head(num_classes, name="head", dtype=dtype)(x)
        super().__init__(inputs, x, **kwargs)
        self.blocks = tuple(blocks)
        self.stem_width = stem_width
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.numerics = numerics
        for name in frozen:
            self._freezable()[name].trainable = False

    @property
    def feature_dim(self) -> int:
        """Length of the feature vector."""
        return 32 * self.stem_width

    def _freezable(self) -> dict[str, keras.layers.Layer]:
        """Layers by name, and units by block and name."""
        found = {}
        for layer in self.layers:
            found[layer.name] = layer
            if isinstance(layer, Block):
                for unit in layer.units:
                    found[f"{layer.name}/{unit.name}"] = unit
        return found

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "blocks": self.blocks,
            "stem_width": self.stem_width,
            "num_classes": self.num_classes,
            "output_stride": self.output_stride,
            "numerics": self.numerics,
            "frozen": [
                name
                for name, layer in self._freezable().items()
                if not layer.trainable
            ],
            "dtype": keras.saving.serialize_keras_object(
                self.get_layer("root_block").dtype_policy
            ),
        }


def create_model(
    name: str = "R50x1",
    num_classes: int = 0,
    *,
    output_stride: int = 32,
    numerics: str = "google",
    dtype=None,
) -> ResNetV2:
    """A model with random weights; the head, if any, is zero.

    Args:
      name: an architecture, such as "R50x1" (see variants.ARCHITECTURES).
      num_classes: outputs of the head; 0 gives features.
      output_stride: 32, 16 or 8.
      numerics: constants of a source: "google", "big_vision" or "timm".
      dtype: a dtype policy, such as "mixed_bfloat16"; the global one if None.

    Raises:
      UnknownNameError: no such architecture.
    """
    row = variants.architecture(name)
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 0:
        raise ValueError(
            "num_classes must be 0 (features) or the number of classes. "
            f"Received: {num_classes!r}."
        )
    return ResNetV2(
        row.blocks,
        row.stem_width,
        num_classes,
        output_stride=output_stride,
        numerics=numerics,
        dtype=dtype,
        name=row.name,
    )


def endpoints(model: ResNetV2, names: Iterable[str]) -> ImageModel:
    """A model of the same layers and weights that returns several endpoints.

    Args:
      model: from create_model or load_model.
      names: of "stem" (after the root's pooling), "block1" … "block4" (before
        the final normalization), "pre_logits" (the feature vector), "logits".

    Returns:
      A model: pictures → dict of name to float [n, h, w, c], or [n, c] for the
      last two.

    Raises:
      UnknownNameError: the model has no such endpoint.
    """
    if isinstance(names, str):
        names = [names]
    outputs = {}
    known = endpoint_names(model)
    for name in names:
        if name not in known:
            raise errors.UnknownNameError(
                f"Endpoints of this model are {', '.join(known)}. "
                f"Received: {name!r}."
            )
        outputs[name] = model.get_layer(ENDPOINTS[name]).output
    return ImageModel(model.input, outputs, name=f"{model.name}_endpoints")


@contextlib.contextmanager
def recompute(model: keras.Model) -> Iterator[None]:
    """Has gradients of a model take less memory and more time.

    Inside the block a gradient keeps only what goes from unit to unit, and
    computes the rest of each again when it comes to it (arXiv:1604.06174). The
    values are the same. What was compiled before stays as it was.

    Args:
      model: a `ResNetV2`, or a model that contains one.

    Raises:
      TrainingError: it contains none, as with models from a hub, whose graph
        is given.
    """
    units = [
        layer for layer in model._flatten_layers() if isinstance(layer, Unit)
    ]
    if not units:
        raise errors.TrainingError(
            "Only this package's own units are computed again for a gradient. "
            f"Received: {model.name!r}, which has none. Begin with a "
            "checkpoint, or divide the batch (micro_batches, --micro-batches)."
        )
    before = [unit.recompute for unit in units]
    for unit in units:
        unit.recompute = True
    try:
        yield
    finally:
        for unit, value in zip(units, before, strict=True):
            unit.recompute = value


def endpoint_names(model: ResNetV2) -> list[str]:
    """The endpoints that the model has, in the order of the forward pass."""
    layers = {layer.name for layer in model.layers}
    return [name for name, layer in ENDPOINTS.items() if layer in layers]


def canonical_variables(model: ResNetV2) -> dict[str, keras.Variable]:
    """The model's variables by canonical name (see checkpoints.layout)."""
    return {
        layer.name + variable.path.removeprefix(layer.path): variable
        for layer in model.layers
        for variable in layer.weights
    }


class canonical_arrays(Mapping[str, np.ndarray]):  # noqa: N801
    """A model's weights by canonical name, each fetched when asked for.

    Args:
      model: from create_model or load_model.

    Attributes:
      shapes: name → shape.
      facts: the model's constants and output stride.
      config: the model's configuration.
    """

    def __init__(self, model: ResNetV2):
        self._variables = canonical_variables(model)
        self.facts = checkpoints.Facts(
            model.numerics, output_stride=model.output_stride
        )
        self.config = model.get_config()
        self.shapes = {
            name: tuple(variable.shape)
            for name, variable in self._variables.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._variables[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)


def assign(model: ResNetV2, arrays: checkpoints.Checkpoint) -> None:
    """Sets every weight of the model, or none if names or shapes differ.

    Args:
      model: its head may be absent where the checkpoint has one.
      arrays: canonical name → float32 array; names and shapes are compared
        before the first is assigned.

    Raises:
      CheckpointMismatchError: with every difference.
    """
    variables = canonical_variables(model)
    shapes = {
        name: shape
        for name, shape in arrays.shapes.items()
        if model.num_classes or not name.startswith("head/")
    }
    layout.check(
        shapes, {name: tuple(v.shape) for name, v in variables.items()}
    )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def load_model(
    source: str | os.PathLike[str],
    *,
    head: bool = True,
    numerics: str | None = None,
    output_stride: int | None = None,
    dtype=None,
) -> ResNetV2:
    """The model that a checkpoint holds, with its weights.

    Args:
      source: a checkpoint in any format that bit_tf.checkpoints reads; or what
        bit_tf.published finds: a published name such as "BiT-M-R50x1" or
        "google/bit-50", downloaded once and kept, or a URL. The architecture
        comes from the arrays' shapes, never from the name.
      head: False drops the head, and the model returns features.
      numerics: constants of a source instead of the checkpoint's own.
      output_stride: 32, 16 or 8; by default the checkpoint's own.
      dtype: a dtype policy.

    Raises:
      FileNotFoundError: there is no such file.
      UnknownNameError: nor weights of that name, but of a similar one.
      CheckpointError: the file cannot be used; the message says why.
      DownloadError: it could not be fetched whole.
    """
    checkpoint = published.open_checkpoint(source)
    for note in checkpoint.notes:
        logging.warning("%s: %s", published.shown(source), note)
    if checkpoint.extra:
        logging.warning(
            "%s holds arrays that are no part of BiT, and were not used: %s",
            published.shown(source),
            ", ".join(map(layout.printable, checkpoint.extra)),
        )
    return from_checkpoint(
        checkpoint,
        head=head,
        numerics=numerics,
        output_stride=output_stride,
        dtype=dtype,
    )


def from_checkpoint(
    checkpoint: checkpoints.Checkpoint,
    *,
    head: bool = True,
    numerics: str | None = None,
    output_stride: int | None = None,
    dtype=None,
) -> ResNetV2:
    """The model that an opened checkpoint holds; see `load_model`."""
    if not isinstance(head, bool):
        raise ValueError(f"head is True or False. Received: {head!r}.")
    known = variants.find_architecture(checkpoint.blocks, checkpoint.stem_width)
    model = ResNetV2(
        checkpoint.blocks,
        checkpoint.stem_width,
        checkpoint.num_classes if head else 0,
        output_stride=checkpoint.facts.output_stride
        if output_stride is None
        else output_stride,
        numerics=checkpoint.facts.numerics if numerics is None else numerics,
        dtype=dtype,
        name=known.name if known else "resnetv2",
    )
    assign(model, checkpoint)
    return model
