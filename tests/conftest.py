"""Fixtures: small checkpoints and exports, made once a session."""

import os
import signal
import sys

# A shell's background jobs ignore Ctrl-C, which some tests send themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import helpers
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Downloads of these tests are kept apart from the user's."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIT_TF_CACHE", str(directory))
        patch.setenv("HF_HOME", str(directory / "huggingface"))
        yield directory


@pytest.fixture(scope="session")
def small_arrays():
    """Random weights of the `testing` architecture with ten classes."""
    return helpers.random_arrays(*helpers.TESTING, num_classes=10)


@pytest.fixture(scope="session")
def small_npz(small_arrays, tmp_path_factory):
    """The same as a checkpoint file."""
    from bit_tf import checkpoints

    path = tmp_path_factory.mktemp("checkpoint") / "small.npz"
    checkpoints.write(small_arrays, path)
    return path


@pytest.fixture(scope="session")
def small_export(small_npz, tmp_path_factory):
    """The same as a SavedModel with a head, labels and an L2 penalty."""
    from hub_export import saved_model

    path = tmp_path_factory.mktemp("export") / "small"
    saved_model.convert(
        small_npz, path, class_labels=list("abcdefghij"), l2=1e-4
    )
    return path


@pytest.fixture(scope="session")
def features_export(small_npz, tmp_path_factory):
    """The same as a SavedModel of features."""
    from hub_export import saved_model

    path = tmp_path_factory.mktemp("export") / "features"
    saved_model.convert(small_npz, path, head=False)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three picture files, two of one size."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for index, (height, width) in enumerate([(64, 64), (48, 80), (64, 64)]):
        pixels = helpers.random_images(1, height, width, seed=index)[0]
        path = folder / f"photo{index}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(program, *arguments):
        from bit_tf import commands as bit_tf_commands
        from hub_export import commands as hub_export_commands

        main = {
            "bit-tf": bit_tf_commands.main,
            "hub-export": hub_export_commands.main,
        }[program]
        arguments = [program, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run
