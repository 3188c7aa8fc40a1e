"""A SavedModel that has all that a KerasLayer knows of, in no time."""

import tensorflow as tf

__all__ = ["save"]


def save(path):
    """Writes a reusable SavedModel of means, which counts its training steps.

    `__call__` takes float32 or uint8 [n, h, w, 3] and returns "logits" [n, 4]
    and "means" [n, 3]. Variables: "w" [3, 4] and "w" [4], which are trained and
    have a regularization loss each, and "scope/steps" [].
    """
    root = tf.train.Checkpoint()
    kernel = tf.Variable(tf.random.stateless_uniform([3, 4], [0, 1]), name="w")
    bias = tf.Variable(tf.ones([4]), name="w")
    steps = tf.Variable(0, trainable=False, name="scope/steps")

    @tf.function
    def call(images, training=False, scale=1.0):
        if training:
            steps.assign_add(1)
        if images.dtype == tf.uint8:
            images = tf.cast(images, tf.float32) / 255
        means = tf.reduce_mean(images, [1, 2])
        return {"logits": scale * (means @ kernel + bias), "means": means}

    @tf.function
    def both(images, other):
        return {"sum": tf.reduce_mean(images, [1, 2]) + other}

    @tf.function(input_signature=[])
    def penalty():
        return tf.reduce_sum(tf.square(kernel))

    @tf.function(input_signature=[])
    def other_penalty():
        return 2 * tf.reduce_sum(tf.square(bias))

    floats = tf.TensorSpec([None, None, None, 3], tf.float32, name="images")
    for spec in (floats, tf.TensorSpec(floats.shape, tf.uint8)):
        for training in (False, True):
            for scale in (1.0, 3.0):
                call.get_concrete_function(spec, training, scale)
    root.__call__ = call
    root.variables = [kernel, bias, steps]
    root.trainable_variables = [kernel, bias]
    root.regularization_losses = [penalty, other_penalty]
    tf.saved_model.save(
        root,
        str(path),
        signatures={
            "serving_default": call.get_concrete_function(floats, False, 1.0),
            "both": both.get_concrete_function(
                floats, tf.TensorSpec([None, 3], tf.float32, name="other")
            ),
        },
    )
