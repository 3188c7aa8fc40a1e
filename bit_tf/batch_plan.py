"""Which examples a step of training has, and what is done to them.

Numbers only: nothing is read. Everything follows from labels, seed and step.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from bit_tf.split import Split

__all__ = ["Plan", "mixup"]

_ORDERS_KEPT = 4


@dataclasses.dataclass
class Plan:
    """Which rows a step has, and what is done to them: numbers only.

    Attributes:
      split: whose labels and positions they are.
      batch_size: of the global batch.
      seed: of everything.
      room: pixels that a crop can be moved by.
      mixup_alpha: of Beta(α, α).
      shard: (i, n).
      buffer: among how many examples they are shuffled.
    """

    split: Split
    batch_size: int
    seed: int
    room: int
    mixup_alpha: float
    shard: tuple[int, int]
    buffer: int
    _orders: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 and self.batch_size > 1

    @property
    def rows_per_shard(self) -> int:
        return self.batch_size // self.shard[1]

    @property
    def rows_drawn(self) -> int:
        """A shard also reads the row before its first, to mix them."""
        return self.rows_per_shard + (self.mixes and self.shard[1] > 1)

    @property
    def start(self) -> int:
        """Of the shard's own rows among those that it draws."""
        return self.rows_drawn - self.rows_per_shard if self.shard[0] else 0

    def draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the source [m], and (top, left, flip) [m, 3]."""
        rng = np.random.default_rng([self.seed, 1, step])
        shape = (self.batch_size, 2)
        moves = rng.integers(0, self.room + 1, shape)
        flips = rng.integers(0, 2, (self.batch_size, 1))
        rows = self._rows(step)
        chosen = np.concatenate([moves, flips], axis=1)[rows]
        indices = self._indices(step, rows)
        return self.split.positions[indices], chosen

    def recipe(self, step: int) -> tuple[np.float32, int, np.ndarray]:
        """λ, the row drawn that mixes with the first, and labels."""
        first = self.shard[0] * self.rows_per_shard
        rows = np.arange(first, first + self.rows_per_shard)
        labels = self._one_hot(step, rows)
        if not self.mixes:
            return np.float32(1), 0, labels
        rng = np.random.default_rng([self.seed, 2, step])
        alpha = self.mixup_alpha
        ratio = np.float32(rng.beta(alpha, alpha))
        before = rows - 1
        before[0] = self._before(step, first)
        labels = mixup(labels, self._one_hot(step, before), ratio)
        drawn = self._rows(step).tolist()
        return ratio, drawn.index(int(before[0])), labels

    def epochs(self, first_step: int, stop: int) -> Iterator[list[int]]:
        """The positions of all draws in order, a list for each epoch.

        A position is in a list once, so that a pass over a stream can serve
        it.
        """
        epoch = 0
        wanted: list[int] = []
        for step in range(first_step, stop):
            rows = self._rows(step)
            positions = self.split.positions[self._indices(step, rows)]
            epochs = (step * self.batch_size + rows) // self.split.size
            for now, position in zip(epochs, positions.tolist(), strict=True):
                if now != epoch:
                    if wanted:
                        yield wanted
                    epoch, wanted = now, []
                wanted.append(position)
        if wanted:
            yield wanted

    def _rows(self, step: int) -> np.ndarray:
        """Rows of the global batch that the shard draws, ascending."""
        first = self.shard[0] * self.rows_per_shard
        rows = np.arange(first, first + self.rows_per_shard)
        if self.rows_drawn > self.rows_per_shard:
            rows = np.sort(np.append(rows, self._before(step, first)))
        return rows

    def _before(self, step: int, row: int) -> int:
        """The row that mixes with this one: the one before, cyclically.

        Never the same example, which two epochs may have put at both ends.
        """
        if row:
            return row - 1
        last = self.batch_size - 1
        first, end = self._indices(step, np.array([0, last]))
        return last - 1 if first == end and last > 1 else last

    def _one_hot(self, step: int, rows: np.ndarray) -> np.ndarray:
        labels = self.split.labels[self._indices(step, rows)]
        result = np.zeros((len(rows), self.split.num_classes), np.float32)
        result[np.arange(len(rows)), labels] = 1
        return result

    def _indices(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Indices of examples in the split."""
        epochs, places = np.divmod(
            step * self.batch_size + rows, self.split.size
        )
        found = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._order(int(epoch))[places[chosen]]
        return found

    def _order(self, epoch: int) -> np.ndarray:
        """Indices of one epoch: every example once.

        The first differs from the last of the epoch before, so that no
        example comes twice in a row.
        """
        order = self._orders.get(epoch)
        if order is None:
            size = self.split.size
            # Two examples never come twice in a row if they keep their order.
            drawn = epoch if size > 2 else 0
            order = _shuffled(size, self.buffer, self.seed, drawn)
            if epoch and size > 2:
                before = self._orders.get(epoch - 1)
                if before is None:
                    before = _shuffled(size, self.buffer, self.seed, epoch - 1)
                if order[0] == before[-1]:
                    order[[0, 1]] = order[[1, 0]]
            self._orders[epoch] = order
            for old in list(self._orders)[:-_ORDERS_KEPT]:
                self._orders.pop(old, None)
        return order


def mixup(own: Any, other: Any, ratio: Any) -> Any:
    """ratio · own + (1 − ratio) · other."""
    return ratio * own + (1 - ratio) * other


def _shuffled(size: int, buffer: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation; none comes more than `buffer` places early.

    As if a buffer of so many were filled, and each time one of them, drawn at
    random, were given and replaced with the next.
    """
    rng = np.random.default_rng([seed, 0, epoch])
    if buffer >= size:
        return rng.permutation(size)
    held = list(range(buffer))
    order = []
    for new, slot in zip(
        range(buffer, size),
        rng.integers(0, buffer, size - buffer).tolist(),
        strict=True,
    ):
        order.append(held[slot])
        held[slot] = new
    return np.array(order + rng.permutation(held).tolist())
