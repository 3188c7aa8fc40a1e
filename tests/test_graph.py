import json
import subprocess
import sys

import pytest
import tensorflow as tf

from bit_tf import errors
from hub_export import fresh_process, graph

ANY = (None, None, None, 3)


class Model(tf.train.Checkpoint):
    """A reusable SavedModel of six weights, and what is changed in it."""

    def __init__(self, *, head=1.0, listed=True):
        super().__init__()
        kernel = tf.Variable(tf.fill([3, 2], 0.5), name="kernel")
        head = tf.Variable(tf.fill([2, 2], head), name="head")
        self.kernel, self.head = kernel, head
        if listed:
            self.variables = [kernel, head]
            self.trainable_variables = [kernel, head]

    def features(self, images):
        return tf.reduce_mean(images, [1, 2]) @ self.kernel

    def logits(self, images):
        return self.features(images) @ self.head


def save(model, path, function, *specs, options=({},)):
    """Saves it with a `__call__` of these traces."""
    model.__call__ = function
    for spec in specs:
        for arguments in options:
            function.get_concrete_function(spec, **arguments)
    tf.saved_model.save(model, str(path))


def plain(shape=ANY, dtype=tf.float32):
    return tf.TensorSpec(shape, dtype)


# Models whose output is changed; the others' features are.
OUTPUTS = ("dict", "dynamic")


def unknown(output):
    """The shape of an output, in a way that no graph can know beforehand."""
    zero = tf.cast(0 * tf.reduce_sum(output), tf.int32)
    return tf.shape(output) + zero


def changed_features(model, change):
    return lambda images: change(model.features(images)) @ model.head


def changed_output(model, change):
    return lambda images: change(model.logits(images))


def make_models(folder):
    """One SavedModel of each kind that the tests ask for."""
    model = Model()
    save(model, folder / "plain", tf.function(model.logits), plain())

    model = Model(listed=False)
    save(model, folder / "unlisted", tf.function(model.logits), plain())

    def trained(images, training=False):
        return model.logits(images)

    model = Model()
    frozen = tf.function(trained)
    save(model, folder / "frozen", frozen, plain(), options=[{}])

    model = Model(head=0.0)
    both = [{"training": False}, {"training": True}]
    specs = [plain(), plain(dtype=tf.uint8)]

    def cast(images, training=False):
        return model.logits(tf.cast(images, tf.float32))

    save(model, folder / "new head", tf.function(cast), *specs, options=both)

    for name, change in (
        ("stopped", tf.stop_gradient),
        ("zero", lambda features: features * 0 + 1),
        ("nan", lambda f: f + tf.sqrt(tf.reduce_sum(f) * 0)),
        ("dict", lambda features: {"features": features}),
        ("dynamic", lambda output: tf.reshape(output, unknown(output))),
    ):
        model = Model()
        call = changed_output if name in OUTPUTS else changed_features
        function = tf.function(call(model, change), input_signature=[plain()])
        save(model, folder / name, function)

    model = Model()

    def picky(images):
        tf.debugging.assert_greater(tf.shape(images)[1], 100)
        return model.logits(images)

    save(model, folder / "picky", tf.function(picky), plain())

    model = Model()
    fixed = plain([1, 33, 35, 3])
    save(model, folder / "fixed", tf.function(model.logits), fixed)

    model = Model()
    text = tf.TensorSpec([None], tf.string)
    save(
        model,
        folder / "text",
        tf.function(lambda t: tf.strings.length(t)),
        text,
    )

    model = Model()
    model.regularization_losses = [
        tf.function(lambda: tf.constant(float("nan")), input_signature=[])
    ]
    save(model, folder / "loss", tf.function(model.logits), plain())


def make_keras_export(folder):
    import keras

    inputs = keras.Input((None, None, 3))
    outputs = keras.layers.GlobalAveragePooling2D()(inputs)
    keras.Model(inputs, outputs).export(folder / "keras", verbose=False)


# Examines many in one process, which has TensorFlow to import once.
MANY = """
import json, os, sys
from hub_export import graph
found = {}
for directory in sys.argv[1:]:
    answers = []
    graph._work(directory, answers.append)
    found[os.path.basename(directory)] = answers[-1]
graph._LARGE = 0
for directory in sys.argv[1:]:
    name = os.path.basename(directory)
    if name in ("plain", "stopped"):
        answers = []
        graph._work(directory, answers.append)
        found[f"large {name}"] = answers[-1]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Name of a model → what `examine` would find."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    make_keras_export(folder)
    process = subprocess.run(
        [sys.executable, "-c", MANY, *map(str, sorted(folder.iterdir()))],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def found(answers, name):
    """(status, detail) by the check's name."""
    return {
        row["name"]: (row["status"], row["detail"])
        for row in answers[name]["checks"]
    }


def test_a_model_without_what_may_be_left_out(answers):
    checks = found(answers, "plain")
    status, detail = checks["interface"]
    assert status == "passed"
    assert "no attribute regularization_losses; no argument training" in detail
    assert checks["gradient"][0] == "passed"
    assert checks["golden"] == ("absent", "no golden values")
    assert answers["plain"]["graph"] == {
        "dtypes": ["float32"],
        "input_shape": [None, None, None, 3],
        "outputs": 2,
        "params": 10,
        "variables": 2,
        "trainable_variables": 2,
        "regularization_losses": 0,
        "signatures": {},
        "endpoints": {},
        "labels": None,
        "relative_error": None,
        "tolerance": None,
    }


def test_a_new_head_is_trained_in_two_steps(answers):
    checks = found(answers, "new head")
    assert checks["interface"][0] == "passed"
    assert answers["new head"]["graph"]["dtypes"] == ["float32", "uint8"]
    assert checks["gradient"] == (
        "passed",
        "a step changed each of 2 trainable variables, and the output",
    )


@pytest.mark.parametrize(
    ("name", "check", "text"),
    [
        ("unlisted", "interface", "__call__ uses what is not among"),
        ("frozen", "interface", "training=True) fails: there is no such trace"),
        ("dict", "interface", "must return one tensor; it returns dict"),
        ("text", "interface", "pictures [n, height, width, 3] as its only"),
        (
            "dynamic",
            "interface",
            "last dimension of what __call__ returns must",
        ),
        ("loss", "interface", "regularization_losses[0] must give a finite"),
        ("keras", "interface", "keras.Model.export"),
        ("stopped", "gradient", "1 of 2 trainable variables have no gradient"),
        ("zero", "gradient", "1 of 2 trainable variables is zero: kernel:0"),
        ("nan", "gradient", "the gradient of kernel:0 is not finite"),
    ],
)
def test_what_is_wrong_is_named(answers, name, check, text):
    status, detail = found(answers, name)[check]
    assert status == "failed"
    assert text in detail


@pytest.mark.parametrize("name", ["stopped", "zero", "nan", "picky", "fixed"])
def test_the_interface_does_not_depend_on_gradients(answers, name):
    assert found(answers, name)["interface"][0] == "passed"


@pytest.mark.parametrize("name", ["frozen", "dynamic", "picky", "fixed"])
def test_gradients_do_not_depend_on_the_interface(answers, name):
    """Nor on the size of pictures, where the model takes one size only."""
    assert found(answers, name)["gradient"][0] == "passed"


def test_large_models_are_not_trained(answers):
    status, detail = found(answers, "large plain")["gradient"]
    assert status == "passed"
    assert "2 trainable variables has a gradient, which was not run" in detail
    status, detail = found(answers, "large stopped")["gradient"]
    assert status == "failed"
    assert "1 of 2 trainable variables have no gradient" in detail


def test_shapes(answers):
    assert answers["fixed"]["graph"]["input_shape"] == [1, 33, 35, 3]
    assert answers["dynamic"]["graph"]["outputs"] == 2
    assert answers["text"]["graph"] is None
    assert answers["keras"]["graph"] is None


def test_a_process_that_dies(monkeypatch):
    """What it said before it did so still counts."""
    row = {"name": "interface", "status": "passed", "detail": "fine"}
    outcome = fresh_process.Outcome(
        {"graph": None, "checks": [row]}, "killed by SIGSEGV"
    )
    monkeypatch.setattr(fresh_process, "call", lambda *args: outcome)
    _, checks = graph.examine("anywhere")
    assert [check.name for check in checks] == list(graph.CHECKS)
    assert [check.status for check in checks] == ["passed", "failed", "failed"]
    assert "killed by SIGSEGV" in checks[1].detail
    assert checks[2].detail == "not reached"
    with pytest.raises(errors.VerificationError, match="SIGSEGV"):
        graph.inspect("anywhere")


def run_module(tmp_path, monkeypatch, code, **options):
    name = f"module_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return fresh_process.call(name, tmp_path, **options)


@pytest.mark.parametrize(
    ("code", "answer", "fault"),
    [
        ("print('{\"a\": 1}')", {"a": 1}, None),
        ("print('text')", None, "exit 0 without an answer"),
        ("raise SystemExit(3)", None, "exit 3"),
        ("raise ValueError('why')", None, "exit 1: ValueError: why"),
        (
            "import os\nos.write(1, b'{}\\n')\nos.kill(os.getpid(), 11)",
            {},
            "killed by SIGSEGV",
        ),
        ("while True: pass", None, "it was stopped after 1 s"),
    ],
)
def test_outcomes(tmp_path, monkeypatch, code, answer, fault):
    seconds = 1 if "while" in code else None
    found = run_module(tmp_path, monkeypatch, code, seconds=seconds)
    assert found == fresh_process.Outcome(answer, fault)


def test_what_a_model_prints_is_not_the_answer(tmp_path, monkeypatch):
    code = (
        "import os, sys\n"
        "from hub_export import fresh_process\n"
        "def work(directory, answer):\n"
        "    answer({'found': os.path.isdir(directory)})\n"
        "    print('{}')\n"
        "    os.write(1, b'{}\\n' * 10**6)\n"
        "sys.exit(fresh_process.serve(work))\n"
    )
    found = run_module(tmp_path, monkeypatch, code)
    assert found == fresh_process.Outcome({"found": True}, None)


def test_a_directory_whose_name_begins_with_a_dash(tmp_path, monkeypatch):
    (tmp_path / "-model").mkdir()
    code = (
        "import sys\n"
        "from hub_export import fresh_process\n"
        "def work(directory, answer):\n"
        "    answer({'directory': directory})\n"
        "sys.exit(fresh_process.serve(work))\n"
    )
    run_module(tmp_path, monkeypatch, code)
    monkeypatch.chdir(tmp_path)
    found = fresh_process.call(f"module_of_{tmp_path.name}", "-model")
    answer = {"directory": str(tmp_path / "-model")}
    assert found == fresh_process.Outcome(answer, None)


def test_errors_of_a_process_are_on_one_line(tmp_path, monkeypatch):
    code = (
        "import sys\n"
        "from bit_tf import errors\n"
        "from hub_export import fresh_process\n"
        "def work(directory, answer):\n"
        "    raise errors.VerificationError('many\\nlines')\n"
        "sys.exit(fresh_process.serve(work))\n"
    )
    found = run_module(tmp_path, monkeypatch, code)
    assert found == fresh_process.Outcome(None, "exit 1: many lines")


def test_a_process_ends_with_its_parent(tmp_path, monkeypatch):
    """Also when that is killed, and cannot end it."""
    (tmp_path / "endless.py").write_text(
        "import os, sys, time\n"
        "from hub_export import fresh_process\n"
        "def work(directory, answer):\n"
        "    path = os.path.join(directory, 'pid')\n"
        "    with open(path + '.new', 'w') as file:\n"
        "        file.write(str(os.getpid()))\n"
        "    os.rename(path + '.new', path)\n"
        "    time.sleep(60)\n"
        "fresh_process.serve(work)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = (
        "import sys\n"
        "from hub_export import fresh_process\n"
        "fresh_process.call('endless', sys.argv[1])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    pid_file = tmp_path / "pid"
    wait_until(pid_file.exists)
    parent.kill()
    parent.wait()
    pid = int(pid_file.read_text())
    wait_until(lambda: not is_running(pid))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    import time

    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("It did not happen in 30 seconds.")


def test_a_module_can_be_run_by_hand(tmp_path):
    """Without a parent at the other end of stdin."""
    code = (
        "import sys, time\n"
        "from hub_export import fresh_process\n"
        "def work(directory, answer):\n"
        "    time.sleep(0.5)\n"
        "    answer({'found': directory})\n"
        "sys.exit(fresh_process.serve(work))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "here"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert process.stdout == '{"found": "here"}\n'
