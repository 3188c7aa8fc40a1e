"""Who imports whom: BUILD, the layers, what loads late, the public names."""

import ast
import fnmatch
import graphlib
import importlib
import shutil
import subprocess
import sys

import build_file
import pytest

import bit_tf
import hub_export

# A file imports files of its own row or of rows above it, in no circle.
LAYERS = """
    bit_tf/__init__ hub_export/__init__
    bit_tf/errors bit_tf/files
    bit_tf/handles bit_tf/variants bit_tf/labels bit_tf/hyperrule
        bit_tf/archive bit_tf/presets bit_tf/resampling bit_tf/download
        bit_tf/cache_records bit_tf/cached_download
    bit_tf/checkpoints/*
    bit_tf/integrity bit_tf/hub_cache bit_tf/hub_install bit_tf/hub_fetch
        bit_tf/addresses bit_tf/relocation bit_tf/model_hash
        bit_tf/conv_precision bit_tf/fast_norms bit_tf/frozen_graph bit_tf/hub
    bit_tf/layer_source bit_tf/distributed_call bit_tf/saved_model_variables
        bit_tf/keras_layer
    bit_tf/published
    bit_tf/images
    bit_tf/layers
    bit_tf/models
    bit_tf/folded
    bit_tf/embed bit_tf/classify
    bit_tf/metrics bit_tf/charts bit_tf/probe
    bit_tf/pipeline_errors bit_tf/stream_source bit_tf/split
    bit_tf/picture_files bit_tf/tfds_source bit_tf/data
    bit_tf/batch_plan bit_tf/example_cache bit_tf/input_pipeline
    bit_tf/model_origins bit_tf/transfer_file bit_tf/model_sources
        bit_tf/transfer
    bit_tf/evaluate bit_tf/feature_scores bit_tf/imagenet_real
    bit_tf/interrupts bit_tf/event_log bit_tf/distribution
        bit_tf/training_state bit_tf/training_records bit_tf/training_step
    bit_tf/finetune
    bit_tf/transfer_run bit_tf/vtab_tasks bit_tf/vtab
    bit_tf/picture_paths bit_tf/item_lists bit_tf/tar_items bit_tf/tfds_items
        bit_tf/fetching bit_tf/items
    bit_tf/embedding_table bit_tf/embed_model
    bit_tf/embed_plan bit_tf/embed_engine bit_tf/embed_run
    bit_tf/beam_modules bit_tf/bulk_options bit_tf/bulk_output bit_tf/bulk_steps
        bit_tf/bulk
    bit_tf/index_rows bit_tf/ivf_pq bit_tf/near_duplicates bit_tf/index
        bit_tf/search_page
    bit_tf/commands/*
    bit_tf/__main__
    hub_export/fresh_process hub_export/golden hub_export/card
        hub_export/digits hub_export/operations hub_export/random_weights
        hub_export/sources
    hub_export/entry hub_export/tree
    hub_export/description hub_export/documentation_tags
    hub_export/contradictions hub_export/documentation
        hub_export/documentation_check
    hub_export/origins hub_export/reusable hub_export/reexport
    hub_export/graph hub_export/saved_model hub_export/formats
    hub_export/pages
    hub_export/repository
    hub_export/report
    hub_export/repository_check
    hub_export/verification
    hub_export/demo hub_export/cache hub_export/publishing hub_export/site
    hub_export/access_log hub_export/http_conditions hub_export/nginx
        hub_export/served_files hub_export/server hub_export/serving
        hub_export/stores/*
    hub_export/commands/*
    hub_export/__main__
    benchmarks/*
    tests/*
"""
ROWS = [
    row.split() for row in LAYERS.strip().replace("\n        ", " ").split("\n")
]

HEAVY = ["PIL", "jax", "keras", "numpy", "tensorflow", "tf_keras", "torch"]

CONTRACT = {
    "bit_tf": "BitMedium2Vec create_model decode_predictions endpoints "
    "list_models load_model",
    "bit_tf.checkpoints": "read write",
    "bit_tf.hub": "KerasLayer load resolve",
    "hub_export": "export",
}

PACKAGE_FILES = [
    file for file in build_file.files() if file.startswith(build_file.PACKAGES)
]
COMMANDS = {"bit-tf": "bit_tf.commands", "hub-export": "hub_export.commands"}


def module_name(file):
    return file.replace("/", ".").removesuffix(".__init__")


def layer(file):
    for number, patterns in enumerate(ROWS):
        if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns):
            return number
    pytest.fail(
        f"{file}.py is in no row of LAYERS in tests/test_imports.py. Add it "
        "below every file that it imports, and to the design."
    )


def early(file):
    """The files that a file imports, but for the late ones."""
    return {
        name
        for name in build_file.imports(file)
        if (file, name) not in build_file.LATE
    }


def reached(file):
    """All files that importing and using a file runs: {file: who asked}."""
    asked = {file: None}
    todo = [file]
    while todo:
        one = todo.pop()
        for other in sorted({*early(one), *build_file.parents(one)}):
            if other not in asked:
                asked[other] = one
                todo.append(other)
    return asked


def way(asked, file):
    names = []
    while file:
        names.append(file)
        file = asked[file]
    return " → ".join(reversed(names))


def test_build_has_the_imports_of_every_file():
    problems = [
        build_file.problem(name)
        for name in [*build_file.PACKAGES, *build_file.files()]
    ]
    problems = [problem for problem in problems if problem]
    known = {*build_file.PACKAGES, *build_file.files(), "run_pytest"}
    problems += [
        f"{name}: there is no {name}.py. Remove the target from BUILD."
        for name in build_file.rules()
        if name not in known
    ]
    if problems:
        pytest.fail("\n\n".join(problems), pytrace=False)


def test_build_is_sorted():
    def key(name):
        folder = (
            name if name in build_file.PACKAGES else name.rpartition("/")[0]
        )
        top = folder.partition("/")[0]
        return build_file.FOLDERS.index(top), folder, name

    names = [name for name in build_file.rules() if name != "run_pytest"]
    assert names == sorted(names, key=key)


def test_rule_of_imports():
    imports = build_file.imports
    assert "bit_tf/images" in imports("bit_tf/embed")
    assert "bit_tf/embed" in imports("bit_tf/commands/embed")  # in a function
    assert "bit_tf/__init__" in imports("hub_export/card")
    assert "bit_tf/models" in imports("tests/test_models")
    assert "tests/build_file" in imports("tests/test_imports")
    assert imports("bit_tf/__init__") == set()


def test_late_imports_are_still_made():
    for file, name in build_file.LATE:
        assert name in build_file.imports(file), (
            f"{file}.py no longer imports {name}: remove it from LATE in "
            "tests/build_file.py"
        )


def test_imports_go_in_no_circle():
    graph = {file: early(file) for file in build_file.files()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go in a circle: {' ← '.join(error.args[1])}")


@pytest.mark.parametrize("file", build_file.files())
def test_imports_go_one_way(file):
    later = [name for name in early(file) if layer(name) > layer(file)]
    assert not later, f"{file}.py imports of a later layer"


@pytest.mark.parametrize(
    "file", [file for file in PACKAGE_FILES if file.startswith("bit_tf/")]
)
def test_bit_tf_never_imports_hub_export(file):
    asked = reached(file)
    found = [way(asked, name) for name in asked if "hub_export/" in name]
    assert not found


@pytest.mark.parametrize("forbidden", ["bit_tf/models", "bit_tf/layers"])
def test_embed_never_imports_models(forbidden):
    asked = reached("bit_tf/embed")
    assert forbidden not in asked, way(asked, forbidden)


def subcommands(package):
    """Names that the modules of a command line register."""
    found = []
    for file in PACKAGE_FILES:
        if file.startswith(package.replace(".", "/")):
            path = build_file.ROOT / f"{file}.py"
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                match node:
                    case ast.Call(
                        ast.Attribute(ast.Name("subparsers"), "add_parser"),
                        [ast.Constant(name)],
                    ):
                        found.append(name)
    return found


def loaded(code, *arguments):
    """Which heavy modules a fresh interpreter has loaded after some code."""
    code = f"import sys\n{code}\nprint(*(set({HEAVY}) & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=build_file.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    *lines, last = process.stdout.split("\n")[:-1]
    return last.split(), "\n".join(lines)


@pytest.mark.parametrize("package", build_file.PACKAGES)
def test_import_loads_no_tensorflow(package):
    assert loaded(f"import {package}")[0] == []


@pytest.mark.parametrize(
    ("program", "command"),
    [
        (program, command)
        for program, package in COMMANDS.items()
        for command in [None, *subcommands(package)]
    ],
)
def test_help_loads_no_tensorflow(program, command):
    modules, stdout = loaded(
        f"from {COMMANDS[program]} import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "else:\n"
        "    raise AssertionError('main returned')",
        *([command] if command else []),
        "--help",
    )
    assert "usage: " in stdout
    assert modules == []


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_all_names_exist(file):
    module = importlib.import_module(module_name(file))
    assert "__all__" in vars(module), f"{file}.py has no __all__"
    names = module.__all__
    assert sorted(names) == sorted(set(names))
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{file}.py: __all__ has names that do not exist"


@pytest.mark.parametrize("package", [bit_tf, hub_export])
def test_lazy_names_resolve(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        package.no_such  # noqa: B018


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    module = importlib.import_module(name)
    for attribute in CONTRACT[name].split():
        assert attribute in module.__all__
        assert callable(getattr(module, attribute))


def bazel(directory, expression):
    """The labels of a query, made offline in a server-less Bazel."""
    startup = ["--nohome_rc", "--batch"]
    startup.append(f"--output_user_root={directory}")
    process = subprocess.run(
        ["bazel", *startup, "query", expression],
        cwd=build_file.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bazel") is None,
    reason="no bazel; apt-get install bazel-bootstrap, then pytest -m slow",
)
def test_bazel_query(tmp_path):
    names = build_file.rules()
    assert bazel(tmp_path, "//...") == {f"//:{name}" for name in names}
    for package in build_file.PACKAGES:
        found = bazel(tmp_path, f"deps(//:{package})")
        files = {f for f in PACKAGE_FILES if f.startswith(f"{package}/")}
        assert {f"//:{file}.py" for file in files} <= found
        assert ("//:hub_export/saved_model" in found) == (
            package == "hub_export"
        )
    found = bazel(tmp_path, "deps(//:bit_tf/embed)")
    assert "//:bit_tf/hub.py" in found
    assert "//:bit_tf/models.py" not in found
    found = bazel(tmp_path, "deps(labels(deps, //:tests/test_models))")
    assert "//:bit_tf/layers.py" in found
