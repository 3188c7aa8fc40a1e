"""A repository of models for tests, without the process that `publish` starts.

Its tree is that of hub_export.tree, with real archives, hashes and pages; the
descriptions are made up.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import helpers
import numpy as np

from bit_tf import archive, handles
from hub_export import entry, pages, repository, tree

__all__ = [
    "Server",
    "add_version",
    "loaded_in_fresh_process",
    "make_repository",
    "make_site",
    "pixels",
    "refresh",
    "serving",
    "static_host",
]


def make_repository(
    root: pathlib.Path, exports: Mapping[str, pathlib.Path]
) -> pathlib.Path:
    """Makes a repository of SavedModels.

    Args:
      root: must not exist.
      exports: handle with a version → SavedModel directory.

    Returns:
      `root`
    """
    root.mkdir()
    for handle, model in exports.items():
        add_version(root, handle, model)
    return root


def add_version(
    root: pathlib.Path, handle: str, model: pathlib.Path
) -> entry.Entry:
    """Adds a version, as if `publish` had: the folder by one rename."""
    name = handle.rpartition("/")[0]
    classes = 10 if name.endswith("_classification") else 0
    described = helpers.make_entry(handle, classes, labels=None)
    folder = tree.directory(root, described.handle)
    staging = root / ".staging" / handle.replace("/", "-")
    shutil.copytree(model, staging / handles.MODEL_FOLDER)
    size, sha256 = archive.pack(model, staging / tree.ARCHIVE_FILE)
    described = dataclasses.replace(
        described,
        archive=handles.File(described.archive.path, size, sha256),
        files=tuple(
            handles.File(
                path.relative_to(model).as_posix(),
                path.stat().st_size,
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in sorted(model.rglob("*"))
            if path.is_file()
        ),
    )
    rest = pages.version_files(described, None)
    described = described.with_pages(rest)
    rest[handles.ENTRY_FILE] = described.to_json().encode()
    for name, content in rest.items():
        (staging / name).write_bytes(content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    link = tree.archive(root, described.handle)
    link.symlink_to(f"{described.handle.version}/{tree.ARCHIVE_FILE}")
    staging.rename(folder)
    refresh(root)
    return described


def refresh(root: pathlib.Path) -> None:
    """Writes what lies around the versions."""
    found = [tree.read(root, handle) for handle in tree.released(root)]
    for name, content in repository.derived(found, None, "Models").items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.new").write_bytes(content)
        path.with_name(f".{path.name}.new").rename(path)


def make_site(root: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A copy for static hosts: `N.tar.gz` is a file, nothing begins with a dot.

    Returns:
      `out`
    """

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(".") or name == tree.ARCHIVE_FILE
        ]

    shutil.copytree(root, out, ignore=left_out, symlinks=False)
    return out


@dataclasses.dataclass
class Server:
    """A running `hub-export serve`.

    Attributes:
      process: it.
      url: such as "http://127.0.0.1:1234/".
      port: the number in it.
      log: lines of stderr up to now.
    """

    process: subprocess.Popen
    url: str
    port: int
    log: list[str]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops it: the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(
    root: os.PathLike,
    *options: str,
    before: str = "",
    command: Sequence[str] = (),
) -> Iterator[Server]:
    """Runs `hub-export serve ROOT --port 0` until the block ends.

    Args:
      root: of the repository.
      options: more arguments.
      before: statements that may change hub_export's modules
        `served_files` and `serving`.
      command: put before the interpreter.
    """
    code = f"from hub_export import served_files, serving\n{before}\n"
    code += "from hub_export.commands import main\nmain()"
    process = subprocess.Popen(
        [
            *(*command, sys.executable, "-c", code),
            *("serve", str(root), "--port", "0", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        if " at http://" not in line:
            process.wait(10)
            reader.join(10)
            raise AssertionError(f"no server: {line} {''.join(log)}")
        url = line.split(" at ")[1].strip()
        port = int(url.split(":")[-1].split("/")[0])
        yield Server(process, url, port, log)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


@contextlib.contextmanager
def static_host(root: os.PathLike) -> Iterator[str]:
    """Python's own web server over a directory: its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", "http.server", "0"),
            *("--bind", "127.0.0.1", "--directory", os.fspath(root)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = process.stdout.readline().split(" port ")[1].split()[0]
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


_LOAD = """
import json, os, sys
import numpy as np
import tensorflow as tf
import tensorflow_hub
from tensorflow_hub import uncompressed_module_resolver

found = {}
pixels = np.load(sys.argv[1])
for number, handle in enumerate(sys.argv[3:]):
    if handle.startswith("uncompressed "):
        resolver = uncompressed_module_resolver.HttpUncompressedFileResolver()
        resolver.path_resolver = lambda path: path
        found[f"{number}"] = np.asarray(resolver(handle.split()[1]))
        continue
    for kind, cache in (("load", "1"), ("layer", "2")):
        os.environ["TFHUB_CACHE_DIR"] = f"{sys.argv[2]}.cache{number}{cache}"
        if kind == "load":
            model = tensorflow_hub.load(handle)
        else:
            model = tensorflow_hub.KerasLayer(handle, trainable=True)
            assert model.trainable_variables
        found[f"{number} {kind}"] = model(tf.constant(pixels)).numpy()
np.savez(sys.argv[2], **found)
"""


def loaded_in_fresh_process(
    folder: pathlib.Path, addresses: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """What tensorflow_hub makes of addresses, each with an empty cache.

    Args:
      folder: for caches and results.
      addresses: handles; "uncompressed HANDLE" asks for its gs:// address.

    Returns:
      For each {"load": of hub.load, "layer": of hub.KerasLayer}, their outputs
      for `pixels()`; of an uncompressed one {"": the address}.
    """
    np.save(folder / "pixels.npy", pixels())
    process = subprocess.run(
        [
            *(sys.executable, "-c", _LOAD, str(folder / "pixels.npy")),
            *(str(folder / "found.npz"), *addresses),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"},
    )
    assert process.returncode == 0, process.stderr
    result: list[dict[str, np.ndarray]] = [{} for _ in addresses]
    with np.load(folder / "found.npz") as found:
        for name in found.files:
            number, _, kind = name.partition(" ")
            result[int(number)][kind] = found[name]
    return result


def pixels() -> np.ndarray:
    """float32 [2, 32, 40, 3] in [0, 1]"""
    images = helpers.random_images(2, 32, 40)
    return images.astype(np.float32) / np.float32(255)
