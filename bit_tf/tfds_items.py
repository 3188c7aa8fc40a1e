"""Pictures of datasets of TFDS, by their index."""

from collections.abc import Iterator

from bit_tf import tfds_source
from bit_tf.errors import DatasetError, ImageFetchError

__all__ = ["Datasets"]

# How far a dataset is read on rather than opened again, in pictures.
_GAP = 256
_MOST = 4


class Datasets:
    """Datasets of TFDS, read on where the last picture was taken."""

    def __init__(self) -> None:
        self._pictures: dict[tuple, tfds_source.Pictures] = {}
        # (dataset, split) and the next index → the pictures from there on.
        self._iterators: dict[tuple[tuple, int], Iterator[bytes]] = {}

    def read(
        self,
        name: str,
        data_dir: str | None,
        split: str,
        index: int,
        feature: str | None = None,
    ) -> bytes:
        """One picture, by one thread at a time.

        Raises:
          ImageFetchError: it is not there, or damaged.
        """
        key = (name, data_dir, split, feature)
        try:
            iterator = self._at(key, index)
            data = next(iterator, None)
        except DatasetError as error:
            raise ImageFetchError(f"{name}/{split}/{index}: {error}") from error
        if data is None:
            raise ImageFetchError(
                "A picture of a dataset has an index that the split has. "
                f"Received: {index} of {split} of {name!r}. Has the dataset "
                "changed? Find its pictures again."
            )
        self._iterators[key, index + 1] = iterator
        while len(self._iterators) > _MOST:
            del self._iterators[next(iter(self._iterators))]
        return data

    def _at(self, key: tuple, index: int) -> Iterator[bytes]:
        for other, position in self._iterators:
            if other == key and 0 <= index - position <= _GAP:
                iterator = self._iterators.pop((other, position))
                for _ in range(index - position):
                    next(iterator, None)
                return iterator
        name, data_dir, split, feature = key
        dataset = (name, data_dir, feature)
        if dataset not in self._pictures:
            self._pictures[dataset] = tfds_source.Pictures(
                name, image=feature, data_dir=data_dir, download=False
            )
        return self._pictures[dataset].read(split, index)

    def close(self) -> None:
        """Closes their files."""
        self._iterators.clear()
        self._pictures.clear()
