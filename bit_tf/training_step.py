"""One step of training, on one device or many."""

import keras
import tensorflow as tf

from bit_tf import distribution, errors, hyperrule

__all__ = ["Trainer"]


class Trainer:
    """Trains a model step by step: SGD on a softmax cross-entropy.

    Args:
      model: made under the scope of `on`.
      variables: that are trained.
      on: the strategy.
      where: this process in it.
      rule: its batch.
      micro_batches: parts of each replica's share of the batch.

    Attributes:
      state_variables: name → keras.Variable of all that changes.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: list[keras.Variable],
        on: tf.distribute.Strategy,
        where: distribution.Place,
        rule: hyperrule.Rule,
        micro_batches: int,
    ):
        self._model, self._variables = model, variables
        self._on, self._where = on, where
        self._batch = rule.batch_size
        share = rule.batch_size // where.replicas
        self._parts = min(micro_batches, share)
        with on.scope():
            self._optimizer = keras.optimizers.SGD(
                rule.peak_learning_rate, momentum=hyperrule.MOMENTUM
            )
            self._optimizer.build(variables)
        self.state_variables = {
            f"{kind}/{index:05}": variable
            for kind, found in (
                ("model", model.variables),
                ("optimizer", self._optimizer.variables),
            )
            for index, variable in enumerate(found)
            if keras.backend.standardize_dtype(variable.dtype) != "string"
        }
        self._compiled = tf.function(self._step, autograph=False)

    def step(self, pictures, targets, rate: float) -> tuple[float, float]:
        """Trains on one batch of this worker.

        Returns:
          (mean cross-entropy, that and the penalties) of the global batch.
        """
        with self._on.scope():
            self._optimizer.learning_rate = rate
        local = self._where.local
        if self._where.replicas > 1:
            share = len(targets) // local

            def part(tensor):
                def of(context):
                    begin = context.replica_id_in_sync_group % local * share
                    return tensor[begin : begin + share]

                return self._on.experimental_distribute_values_from_function(of)

            pictures, targets = part(pictures), part(targets)
        loss, penalty = self._compiled(pictures, targets)
        loss = float(loss)
        return loss, loss + float(penalty)

    def _step(self, pictures, targets):
        losses = self._on.run(self._replica, args=(pictures, targets))
        return [
            self._on.reduce(tf.distribute.ReduceOp.SUM, loss, axis=None)
            for loss in losses
        ]

    def _replica(self, pictures, targets):
        """One replica's share of the step: its part of the two losses."""
        parts = self._parts
        if parts == 1:
            loss, gradients = self._gradients(pictures, targets)
        else:
            loss, gradients = self._accumulated(pictures, targets, parts)
        # Each replica adds its part of the penalties, which all compute.
        values = [variable.value for variable in self._variables]
        with tf.GradientTape() as tape:
            terms = [
                tf.cast(variable.regularizer(variable), tf.float32)
                for variable in self._penalized()
            ]
            penalty = tf.add_n(terms or [tf.zeros([])]) / self._where.replicas
        for index, more in enumerate(tape.gradient(penalty, values)):
            if more is not None:
                gradients[index] += tf.cast(more, gradients[index].dtype)
        self._optimizer.apply(gradients, self._variables)
        return loss, penalty

    def _penalized(self) -> list[keras.Variable]:
        return [v for v in self._variables if v.regularizer is not None]

    def _gradients(self, pictures, targets):
        """(loss, its gradients) of some pictures, as part of the batch's."""
        values = [variable.value for variable in self._variables]
        with tf.GradientTape() as tape:
            logits = self._model(pictures, training=True)
            if len(self._model.losses) > len(self._penalized()):
                raise errors.TrainingError(
                    "A model's own losses are penalties of its weights. "
                    f"Received: {self._model.name!r}, whose layers add others "
                    "(add_loss, activity_regularizer). Take them out."
                )
            # TensorFlow's own cross-entropy has a gradient where there is no
            # target.
            likelihood = tf.nn.log_softmax(tf.cast(logits, tf.float32))
            targets = tf.cast(targets, tf.float32)
            loss = -tf.reduce_sum(targets * likelihood) / self._batch
        found = tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss, [tf.convert_to_tensor(gradient) for gradient in found]

    def _accumulated(self, pictures, targets, parts: int):
        """The same in parts, one after the other.

        What fills the last part up has no target, and adds nothing.
        """
        count = tf.shape(pictures)[0]
        size = -(-count // parts)
        missing = size * parts - count
        again = tf.repeat(pictures[-1:], missing, 0)
        pictures = tf.concat([pictures, again], 0)
        targets = tf.pad(targets, [[0, missing], [0, 0]])

        def more(index, loss, gradients):
            begin = index * size
            new_loss, new = self._gradients(
                pictures[begin : begin + size], targets[begin : begin + size]
            )
            added = [a + b for a, b in zip(gradients, new, strict=True)]
            return index + 1, loss + new_loss, added

        zeros = [tf.zeros(v.shape, v.dtype) for v in self._variables]
        _, loss, gradients = tf.while_loop(
            lambda index, *_: index < parts,
            more,
            (tf.constant(0), tf.zeros([]), zeros),
            parallel_iterations=1,
        )
        return loss, gradients
