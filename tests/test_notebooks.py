"""The notebooks: clean files whose cells call the packages and run offline."""

import ast
import base64
import hashlib
import io
import json
import os
import pathlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# What a cell may import, beside the standard library.
PACKAGES = {
    *("IPython", "bit_tf", "hub_export", "google", "keras", "matplotlib"),
    *("numpy", "sklearn", "tensorflow", "tensorflow_hub"),
}
LONGEST_CELL = 20

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.stem
)
# Publishing starts a dozen processes, each of which loads TensorFlow.
SLOW = {"bit_finetuning", "bit_publishing"}
each_run = pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow] if path.stem in SLOW else [],
        )
        for path in NOTEBOOKS
    ],
)


@pytest.fixture(autouse=True)
def jupyter(monkeypatch, tmp_path):
    """Jupyter with this interpreter as its kernel and no settings of a user."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    home = tmp_path / "jupyter"
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(home / name.lower()))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    monkeypatch.setenv("JUPYTER_PATH", str(home))
    from ipykernel import kernelspec

    kernel = home / "kernels" / "python3"
    kernel.parent.mkdir(parents=True)
    kernelspec.write_kernel_spec(kernel)
    spec = json.loads((kernel / "kernel.json").read_text("utf-8"))
    assert spec["argv"][0] == sys.executable


def read(path):
    import nbformat

    return nbformat.reads(path.read_text("utf-8"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def without_magics(source):
    """Python of a cell: a magic's line becomes `pass`."""
    lines = []
    for line in source.splitlines():
        code = line.lstrip()
        magic = code.startswith(("%", "!"))
        lines.append(line[: len(line) - len(code)] + "pass" if magic else line)
    return "\n".join(lines)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == CHECKS.keys()


@each_notebook
def test_file_is_valid_and_has_no_outputs(path):
    import nbformat

    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert cell.metadata == {}
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    assert path.read_text("utf-8") == text


@each_notebook
def test_cells_are_short_and_call_the_packages(path):
    for cell in code_cells(read(path)):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.id
        assert max(map(len, cell.source.splitlines())) <= 80, cell.id
        tree = ast.parse(without_magics(cell.source), cell.id)
        compile(tree, cell.id, "exec")
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), cell.id
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            tops = {name.partition(".")[0] for name in names}
            assert tops <= PACKAGES | sys.stdlib_module_names, cell.id


@each_run
def test_runs_offline(path, features_export, monkeypatch, tmp_path):
    import nbclient

    work = tmp_path / "work"
    work.mkdir()
    cache = tmp_path / "cache"
    monkeypatch.setenv("BIT_TF_NOTEBOOK_MODEL", str(features_export))
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(cache))
    # Any request fails at once, instead of leaving this machine.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    python_path = [str(ROOT), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, python_path)))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name, value in ENVIRONMENTS.get(path.stem, lambda _: {})(
        tmp_path
    ).items():
        monkeypatch.setenv(name, str(value))

    notebook = read(path)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
    ).execute()

    outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    printed = "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert not cache.exists(), "the model was not to be downloaded"
    CHECKS[path.stem](work, outputs, printed, features_export)


def check_bit_embeddings(work, outputs, printed, model):
    assert f"Model: {model}\n" in printed
    assert "BIT_TF_NOTEBOOK_MODEL is set" in printed
    figures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(figures) == 2
    for figure in figures:
        assert figure.width > 800
        assert np.unique(figure.convert("L")).size > 100

    with np.load(work / "bit_embeddings" / "vectors.npz") as saved:
        names, vectors = list(saved["names"]), saved["vectors"]
        assert saved["model"] == str(model)
        assert saved["preset"] == "big_transfer eval"
    assert vectors.shape == (8, 1024)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert "Length of a vector: 1024\n" in printed
    assert "FAILED: notes.txt: A picture is" in printed
    assert "notes.txt" not in names

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(len(names))
    for query, name in enumerate(names):
        photo, _, part = name.partition(", ")
        nearest = names[similarity[query].argmax()]
        if part:
            assert nearest == photo
        assert f"\n{name}: {nearest} (" in printed


def check_bit_publishing(work, outputs, printed, model):
    repository = work / "bit_publishing" / "repository"
    index = json.loads((repository / "index.json").read_text("utf-8"))
    assert [(row["handle"], row["version"]) for row in index["entries"]] == [
        ("me/digits/features", 1),
        ("me/digits/tiny_classification", 1),
        ("me/digits/tiny_classification", 2),
    ]
    for row in index["entries"]:
        archive = repository / row["archive"]["path"]
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert digest == row["archive"]["sha256"]
    accuracies = re.findall(r"Right: (\d+) of 360", printed)
    assert len(accuracies) == 2
    assert min(map(int, accuracies)) > 340
    assert "A version is immutable" in printed
    assert "FAILED" not in printed
    site = work / "bit_publishing" / "site"
    assert (site / "me/digits/features/1.tar.gz").is_file()
    assert "Server stopped" in printed


def finetuning_environment(folder):
    """Digits: a model that knows them, and a folder of pictures."""
    from bit_tf import images
    from hub_export import digits, saved_model

    checkpoint = digits.DATA / digits.CHECKPOINT
    features = folder / "features"
    saved_model.convert(str(checkpoint), features, head=False)
    pictures, labels = digits.held_out()
    for index, (picture, label) in enumerate(
        zip(pictures, labels, strict=True)
    ):
        split = "train" if index % 2 else "test"
        place = folder / "digits" / split / digits.NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        images.to_pil(picture).save(place / f"{index}.png")
    return {
        "BIT_TF_NOTEBOOK_MODEL": features,
        "BIT_TF_NOTEBOOK_CHECKPOINT": checkpoint,
        "BIT_TF_NOTEBOOK_DATASET": f"folder:{folder / 'digits'}",
    }


def check_bit_finetuning(work, outputs, printed, model):
    assert "BIT_TF_NOTEBOOK_MODEL is set" in printed
    assert "50 pictures to learn from, 180 to be tested on\n" in printed
    assert "The rule says 16000 steps of 16 pictures." in printed
    # 0.3 × 16 / 512, as it is.
    assert "Peak of the learning rate: 0.009375\n" in printed
    losses = re.search(r"Loss: (\S+) at first, (\S+) at step 20", printed)
    assert float(losses[2]) < 0.5 * float(losses[1])
    accuracies = re.findall(r"Top-1.*: (\S+)%", printed)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 60
    folder = work / "bit_finetuning"
    assert (folder / "model.keras").is_file()
    assert (folder / "saved_model" / "saved_model.pb").is_file()
    index = json.loads((folder / "repository/index.json").read_text("utf-8"))
    assert [(row["handle"], row["version"]) for row in index["entries"]] == [
        ("me/flowers/bit_classification", 1)
    ]
    rows = (folder / "run" / "history.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 21))
    figures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(figures) == 6
    for figure in figures:
        assert np.unique(figure.convert("L")).size > 10


# What a notebook needs beside a model, and what is checked when it ran.
ENVIRONMENTS = {"bit_finetuning": finetuning_environment}
CHECKS = {
    "bit_finetuning": check_bit_finetuning,
    "bit_embeddings": check_bit_embeddings,
    "bit_publishing": check_bit_publishing,
}
