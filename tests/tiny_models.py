"""Small SavedModels in no time, and where a repository would have them."""

import hashlib
import json

import numpy as np

from bit_tf import archive, handles, integrity

__all__ = ["Published", "as_published", "features", "save"]


def save(directory, seed=0):
    """A reusable SavedModel of 2 kB with one variable and one asset."""
    import tensorflow as tf

    names = directory.with_name(f"{directory.name}-names.txt")
    names.write_text("\n".join(map(str, range(8))))
    module = tf.Module()
    weight = np.random.default_rng(seed).normal(size=(3, 8))
    module.weight = tf.Variable(weight.astype(np.float32))
    module.names = tf.saved_model.Asset(str(names))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def call(images):
        return tf.reduce_mean(images, [1, 2]) @ module.weight

    module.__call__ = call
    tf.saved_model.save(module, str(directory))
    return directory


def features(model):
    """float32 [1, 8]: what a loaded model makes of one picture."""
    import tensorflow as tf

    return np.asarray(model(tf.ones([1, 4, 4, 3])))


class Published:
    """A version's folder and archive, as a repository has them.

    Attributes:
      handle: handles.Handle, with its version.
      archive: bytes of the archive.
      entry: bytes of its entry.json.
      files: path → bytes below the repository's root.
    """

    def __init__(self, model, handle, packed):
        self.handle = handles.Handle.parse(handle)
        self.archive = packed
        digest = hashlib.sha256(packed).hexdigest()
        rows = [
            {"path": file.path, "size": file.size, "sha256": file.sha256}
            for file in integrity.contents(model).values()
        ]
        entry = {
            "schema": handles.SCHEMA,
            "handle": self.handle.at(None).path,
            "version": self.handle.version,
            "archive": {
                "path": f"{handle}.tar.gz",
                "size": len(packed),
                "sha256": digest,
            },
            "files": rows,
        }
        self.entry = json.dumps(entry).encode()
        newest = self.handle.at(None).path
        self.files = {
            f"{newest}/entry.json": self.entry,
            f"{handle}/entry.json": self.entry,
            f"{handle}.tar.gz": packed,
        }

    def serve(self, server, prefix="", *, entry=True):
        """Has a file_server answer as a repository's server does."""
        for path, body in self.files.items():
            if entry or not path.endswith(".json"):
                server.bodies[f"{prefix}/{path}"] = body
        server.bodies[f"{prefix}/{self.handle}"] = self.archive

    def write(self, root):
        """Writes the files below a directory."""
        for path, body in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(body)


def as_published(model, handle, folder):
    """A model's directory as a published version."""
    path = folder / "packed.tar.gz"
    archive.pack(model, path)
    return Published(model, handle, path.read_bytes())
