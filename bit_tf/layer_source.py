"""Where a layer's SavedModel comes from, and how a file keeps that."""

import os
from typing import Any

from absl import logging

from bit_tf import addresses, errors, hub, hub_cache, model_hash, relocation

__all__ = ["LayerSource", "found"]


class LayerSource:
    """A handle, or an object that was loaded from one.

    Attributes:
      handle: as it was given; None for an object.
      shown: the same for messages, or what kind of an object it is.
    """

    def __init__(self, handle: Any):
        """Nothing is loaded yet.

        Args:
          handle: whatever `bit_tf.hub.resolve` takes, or an object.
        """
        self._object = handle
        self.handle: str | None = None
        self.shown = f"an object of type {type(handle).__name__}"
        if isinstance(handle, (str, bytes, os.PathLike)):
            self.handle = os.fsdecode(handle)
            self.shown = repr(self.handle)
        self._place: str | None = None
        self._directory: str | None = None
        self._stamp: tuple | None = None
        self._content_hash: str | None = None

    def load(self, options: Any, content_hash: str | None) -> Any:
        """The object at the handle, or the one given.

        Args:
          options: a tf.saved_model.LoadOptions, or None.
          content_hash: what the SavedModel must have; None for any.

        Raises:
          HandleError: there is no SavedModel, or another one.
          ValueError: one of these is given with an object.
        """
        if self.handle is not None:
            # The current directory may be another one when it is saved.
            self._place = addresses.absolute(self.handle)
            self._directory = addresses.absolute(hub.resolve(self.handle))
            self._stamp = _stamp(self._directory)
            if content_hash is not None:
                _require(self._directory, content_hash, self.handle)
                self._content_hash = content_hash
            return hub.load(
                self.handle, options=options, directory=self._directory
            )
        given = {"load_options": options, "content_hash": content_hash}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} is for handles that are loaded. Received: {name} "
                    f"with {self.shown}."
                )
        if callable(self._object) or hasattr(self._object, "signatures"):
            return self._object
        raise errors.HandleError(
            "A layer is made from a handle, or from an object that was loaded "
            f"from one. Received: {errors.brief(self._object)}."
        )

    @property
    def content_hash(self) -> str | None:
        """The hash of the SavedModel that was loaded; None for an object.

        Raises:
          HandleError: its files have changed since, or cannot be read.
          ArchiveError: there is something in it that is no regular file.
        """
        if self._content_hash is None and self._directory is not None:
            current = model_hash.content_hash(self._directory)
            if _stamp(self._directory) != self._stamp:
                raise errors.HandleError(
                    "The hash of a SavedModel is that of the files that were "
                    f"loaded. Received: {self._directory!r}, where they have "
                    "changed since. Export to another directory than the one "
                    "that a model was loaded from."
                )
            self._content_hash = current
        return self._content_hash

    def config(self, owner: str) -> dict[str, str | None]:
        """`handle` and `content_hash`, as a file keeps them.

        Args:
          owner: whose it is, for messages.

        Returns:
          An address, without what is secret in it, or absolute path; and the
          hash, or None, after a warning, where it cannot be made any more.

        Raises:
          BitTfError: it is of an object.
        """
        if self.handle is None:
            raise errors.BitTfError(
                "A layer is saved by its model's handle. Received: a "
                f"{owner} that was made from a loaded object. Make it "
                "with the handle itself, KerasLayer(handle), or save the "
                "weights alone, with save_weights."
            )
        try:
            digest = self.content_hash
        except errors.BitTfError as error:
            # What was trained for hours is not lost for that.
            logging.warning(
                "The %s is saved without the hash of its SavedModel. %s",
                owner,
                error,
            )
            digest = None
        handle = None if self._place is None else addresses.public(self._place)
        return {"handle": handle, "content_hash": digest}


def found(handle: str, content_hash: str | None) -> str:
    """Where the model is that a file names.

    Args:
      handle: as the file has it.
      content_hash: likewise; None for any.

    Returns:
      The handle, or what `bit_tf.hub.relocated` says instead.

    Raises:
      HandleError: there is no model, or another one.
    """
    if not isinstance(handle, str):
        raise errors.HandleError(
            "A saved layer names its SavedModel's handle. Received: "
            f"{errors.brief(handle)}. Save the model anew."
        )
    place = relocation.moved(handle)
    try:
        directory = hub.resolve(place)
    except errors.HandleError as error:
        raise errors.HandleError(
            "A file that names a SavedModel is loaded where that can be "
            f"reached. Received: {error}\nIf it has moved, load the file in a "
            f"block `{_block(handle)}`; commands take --relocate OLD=NEW."
        ) from error
    if content_hash is not None:
        _require(directory, content_hash, handle)
    return place


def _require(directory: str, expected: str, handle: str) -> None:
    """Compares a model's hash with the one that it must have.

    Args:
      directory: of the model.
      expected: the hash.
      handle: where a file says that it is.
    """
    current = model_hash.content_hash(directory)
    if current != expected:
        raise errors.HandleError(
            "A layer is made of the SavedModel whose hash is given, as a saved "
            f"layer is. Received: {hub_cache.shown(handle)!r}, for which there "
            f"is now {current[:12]}…, and not {str(expected)[:12]}…, in "
            f"{directory!r}. Put the former one back; or, if it lies "
            f"elsewhere, load the file in a block `{_block(handle)}`; commands "
            "take --relocate OLD=NEW. To take the one that is there now, make "
            "the model anew and load the weights into it."
        )


def _block(handle: str) -> str:
    shown = hub_cache.shown(handle)
    return f"with bit_tf.hub.relocated({{{shown!r}: NEW_HANDLE}}):"


def _stamp(directory: str) -> tuple | None:
    """What changes with the files; None if there is no telling."""
    try:
        return model_hash.stamp(directory)
    except errors.BitTfError:
        return None
