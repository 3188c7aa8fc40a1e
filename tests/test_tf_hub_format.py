"""TF-Hub's SavedModels as checkpoints: variables are read, nothing is run."""

import gc
import io
import itertools
import json
import pathlib
import shutil
import tarfile
import tempfile
import tracemalloc

import helpers
import numpy as np
import pytest
import tensorflow as tf
from foreign import hub_names as spelled
from foreign import saved_model as module
from foreign import tf1_hub
from tensorflow.core.protobuf import trackable_object_graph_pb2

from bit_tf import archive, checkpoints, errors, variants
from bit_tf.checkpoints import layout, tensor_bundle, tf_hub

CORPORA = pathlib.Path(__file__).parent / "corpora" / "google"
PUBLISHED = [name for name in variants.ARCHITECTURES if name != "testing"]
TINY = (1, 1, 1, 1)
KERNEL = "block2/unit01/b/standardized_conv2d/kernel"
INDEX = "variables/variables.index"
SHARD = "variables/variables.data-00000-of-00001"
OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


def same(read, arrays):
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.shape == arrays[name].shape
        assert array.tobytes() == arrays[name].tobytes()
    return True


@pytest.fixture(scope="module")
def resnet(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    return module(path, spelled(arrays, "resnet/"))


@pytest.fixture
def copy(resnet, tmp_path):
    return shutil.copytree(resnet, tmp_path / "copy")


def test_our_own_export(small_export, small_arrays):
    assert tf_hub.sniff(small_export)
    read = tf_hub.read(small_export)
    assert same(read, small_arrays)
    assert (read.blocks, read.stem_width, read.num_classes) == (TINY, 32, 10)
    assert (read.format, read.extra) == ("tf_hub", ())
    assert read.facts.numerics == "google"
    assert read.facts.preset.name == "big_transfer eval"
    assert [label.name for label in read.facts.labels] == list("abcdefghij")
    assert read.facts.output_stride == 32
    assert not any("inferred" in note for note in read.notes)
    assert any("save_counter" in note for note in read.notes)
    assert read.sources[KERNEL] == KERNEL
    assert len(read.sha256()) == 64


def test_our_own_export_of_features(features_export, small_arrays):
    read = tf_hub.read(features_export)
    features = {n: a for n, a in small_arrays.items() if "head" not in n}
    assert same(read, features)
    assert (read.num_classes, read.facts.labels) == (0, None)


def card(path, **changes):
    file = path / tf_hub.CARD_FILE
    file.parent.mkdir(exist_ok=True)
    said = {"numerics": {"name": "timm"}, "output_stride": 8} | changes
    file.write_text(json.dumps(said))


def test_a_card_is_honoured(copy):
    card(copy, more="of everything")
    (copy / "assets" / "labels.txt").write_text(
        "".join(f"class {n}\n" for n in range(10))
    )
    facts = tf_hub.read(copy).facts
    assert (facts.numerics, facts.output_stride) == ("timm", 8)
    assert facts.labels[9].name == "class 9"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"numerics": "google", "output_stride": 32}',
        '{"numerics": {"name": "nobody"}, "output_stride": 32}',
        '{"numerics": {"name": "google"}, "output_stride": 31}',
        '{"numerics": {"name": "google"}, "output_stride": 32, "preset": 7}',
        '{"numerics": {"name": ["google"]}, "output_stride": 32}',
        '{"numerics": {"name": "google"}, "output_stride": 8, "a": 1, "a": 1}',
        "[" * 100_000,
        '"\udcff"',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_damaged_card(copy, text):
    card(copy)
    (copy / tf_hub.CARD_FILE).write_bytes(
        text.encode("utf-8", "surrogateescape")
    )
    with pytest.raises(errors.CheckpointFormatError, match=r"card\.json"):
        tf_hub.read(copy)


def test_damaged_labels(copy):
    labels = copy / "assets" / "labels.txt"
    labels.write_bytes(b"\xff\xfe\n")
    with pytest.raises(errors.CheckpointFormatError, match="UTF-8"):
        tf_hub.read(copy)
    labels.write_text("one\ntwo\n")
    with pytest.raises(errors.CheckpointFormatError, match="2 labels"):
        tf_hub.read(copy)


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("", {}),
        ("resnet/", {"numbered": True}),
        ("keras_layer/", {"square": False}),
        ("keras_layer/resnet/", {}),
        ("module/resnet/", {}),
        ("a/b_7/", {"numbered": True}),
    ],
)
def test_scopes_and_spellings(tmp_path, prefix, options):
    arrays = helpers.random_arrays((1, 2, 1, 1), 32, 4)
    path = module(tmp_path / "m", spelled(arrays, prefix, **options))
    assert tf_hub.sniff(path)
    read = tf_hub.read(path)
    assert same(read, arrays)
    assert read.extra == ()
    assert read.facts.numerics == "google"
    assert read.facts.preset.name == "tfhub"
    assert read.notes[0] == (
        "The variables' names are inferred from public re-saves; no published "
        "module was seen."
    )
    assert read.sources[KERNEL].startswith(prefix + "block2/unit01/b/")


def test_big_transfers_own_name_of_the_head(tmp_path, arrays):
    named = {
        name.replace("head/conv2d", "head/dense"): array
        for name, array in arrays.items()
    }
    assert same(tf_hub.read(module(tmp_path / "m", named)), arrays)


def test_half_precision(tmp_path, arrays):
    named = {
        name: tf.cast(array, tf.bfloat16) for name, array in arrays.items()
    }
    read = tf_hub.read(module(tmp_path / "m", named))
    assert {dtype.name for dtype in read.dtypes.values()} == {"bfloat16"}
    for name, array in read.items():
        np.testing.assert_array_equal(array, named[name].numpy(), strict=False)


def test_other_variables_are_extra_and_state_is_told(tmp_path, arrays):
    named = spelled(arrays, "keras_layer/") | {
        "dense/kernel": np.zeros((3, 2), "f4"),
        "table": np.arange(5),
        "ema/group_norm/gamma": np.zeros(3, "f4"),
        "words": np.array("a text"),
        "keras_layer/global_step": np.int64(7),
        f"Adam/m/{KERNEL}": np.zeros(3, "f4"),
        f"keras_layer/{KERNEL}/Momentum": np.zeros(3, "f4"),
    }
    read = tf_hub.read(module(tmp_path / "m", named))
    assert same(read, arrays)
    assert read.extra == ("dense/kernel", "ema/group_norm/gamma", "table")
    state, text = read.notes[1:]
    assert "optimizer state" in state
    assert "Adam/m/block2" in state
    assert "(3 variables)" in state
    assert "words" in text


def test_an_optimizers_slots_are_no_second_model(tmp_path, arrays):
    names = spelled(arrays, square=False)
    kept = [tf.Variable(value, name=name) for name, value in names.items()]
    root = tf.train.Checkpoint(kept=kept)
    root.optimizer = tf.keras.optimizers.SGD(0.1, momentum=0.9)
    root.optimizer.build(kept)
    tf.saved_model.save(root, str(tmp_path / "m"))
    read = tf_hub.read(tmp_path / "m")
    assert same(read, arrays)
    assert read.extra == ()
    assert any("optimizer" in note for note in read.notes)


def test_two_models_are_refused(tmp_path, arrays):
    named = spelled(arrays, "student/") | spelled(arrays, "teacher/")
    path = module(tmp_path / "m", named)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        tf_hub.read(path)
    assert "'student/' and 'teacher/'" in str(caught.value)


def test_one_name_twice(tmp_path, arrays):
    named = spelled(arrays, square=False)
    twice = KERNEL.replace("conv2d/", "conv2d_1/")
    path = module(tmp_path / "m", named | {twice: named[KERNEL]})
    with pytest.raises(errors.CheckpointFormatError, match="which are both"):
        tf_hub.read(path)


def test_tf1_hub_without_running_its_graph(tmp_path, arrays):
    victim = tmp_path / "victim"
    names = spelled(arrays, "module/resnet/", numbered=True)
    path = tf1_hub(tmp_path / "m", names, victim, slots=True)
    assert b"WriteFile" in (path / "saved_model.pb").read_bytes()
    assert tf_hub.sniff(path)
    read = tf_hub.read(path)
    assert same(read, arrays)
    assert read.extra == ()
    assert "Momentum" in read.notes[1]
    assert f"({len(arrays) + 1} variables)" in read.notes[1]
    assert not victim.exists()


@pytest.mark.parametrize("graph", [b"", b"garbage\xff\xff", b"\x0a" * 99])
def test_the_graph_is_not_even_parsed(copy, arrays, graph):
    (copy / "saved_model.pb").write_bytes(graph)
    assert tf_hub.sniff(copy)
    assert same(tf_hub.read(copy), arrays)


def test_partitioned_variables(tmp_path, arrays):
    names, slices, tensors = [], [], []
    for name, array in spelled(arrays, "resnet/").items():
        width = array.shape[-1]
        cuts = [0, width // 3, width] if KERNEL in name else [0, width]
        for start, stop in itertools.pairwise(cuts):
            whole = " ".join(map(str, array.shape))
            ranges = ["-"] * (array.ndim - 1) + [f"{start},{stop - start}"]
            names.append(name)
            slices.append(f"{whole} {':'.join(ranges)}" if cuts[2:] else "")
            tensors.append(array[..., start:stop])
    (tmp_path / "variables").mkdir()
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "variables" / "variables"),
        tensor_names=names,
        shape_and_slices=slices,
        tensors=tensors,
    )
    assert same(tf_hub.read(tmp_path), arrays)
    data = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(data[: arrays[KERNEL].nbytes // 2])
    with pytest.raises(errors.CheckpointFormatError, match="which ends at"):
        tf_hub.read(tmp_path)


def resaved(path, change):
    """Writes a model's variables again, its object graph changed."""
    prefix = path / "variables" / "variables"
    reader = tf.train.load_checkpoint(str(prefix))
    values = {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
    }
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(values[OBJECTS])
    change(graph, values)
    values[OBJECTS] = graph.SerializeToString()
    shutil.rmtree(prefix.parent)
    prefix.parent.mkdir()
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


def nameless(graph, values):
    for node in graph.nodes:
        for attribute in node.attributes:
            attribute.full_name = ""


def test_names_that_only_the_saved_model_knows(copy, arrays):
    resaved(copy, nameless)
    assert same(tf_hub.read(copy), arrays)
    (copy / "saved_model.pb").write_bytes(b"\xff")
    with pytest.raises(errors.CheckpointMismatchError, match="kept/7"):
        tf_hub.read(copy)


def test_names_that_are_paths_of_objects(tmp_path, arrays):
    root = tf.Module()
    for name, value in arrays.items():
        node, (*scopes, leaf) = root, name.split("/")
        for scope in scopes:
            if not hasattr(node, scope):
                setattr(node, scope, tf.Module())
            node = getattr(node, scope)
        setattr(node, leaf, tf.Variable(value))
    tf.saved_model.save(root, str(tmp_path / "m"))
    resaved(tmp_path / "m", nameless)
    (tmp_path / "m" / "saved_model.pb").write_bytes(b"")
    assert same(tf_hub.read(tmp_path / "m"), arrays)


def test_a_damaged_object_graph(copy, arrays):
    def loop(graph, values):
        graph.nodes[0].children.add(node_id=0, local_name="me")
        graph.nodes[0].children.add(node_id=10**6, local_name="far")
        graph.nodes[0].children.add(node_id=-7, local_name="before")
        nameless(graph, values)

    resaved(copy, loop)
    assert same(tf_hub.read(copy), arrays)

    def other(graph, values):
        graph.nodes[1].attributes.add(name="VARIABLE_VALUE", checkpoint_key="x")

    resaved(copy, other)
    assert same(tf_hub.read(copy), arrays)
    prefix = copy / "variables" / "variables"
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[OBJECTS],
        shape_and_slices=[""],
        tensors=[b"\xff\xff garbage"],
    )
    with pytest.raises(errors.CheckpointFormatError, match="message"):
        tf_hub.read(copy)


def child(graph, parent, name):
    graph.nodes[parent].children.add(node_id=len(graph.nodes), local_name=name)
    graph.nodes.add()
    return len(graph.nodes) - 1


def deep(graph):
    last = 0
    for _ in range(1500):
        last = child(graph, last, "x" * 200)
        yield last


def wide(graph):
    first = child(graph, 0, "x" * 100_000)
    for number in range(1000):
        yield child(graph, first, str(number))


@pytest.mark.parametrize("nodes", [deep, wide])
def test_an_object_graph_needs_little_memory(copy, arrays, nodes):
    def grow(graph, values):
        nameless(graph, values)
        for node in nodes(graph):
            leaf = graph.nodes[node].attributes.add(name="VARIABLE_VALUE")
            leaf.checkpoint_key = f"unknown/{node}"
        values["unknown/key"] = np.zeros(3, "f4")
        leaf.checkpoint_key = "unknown/key"

    resaved(copy, grow)
    tracemalloc.start()
    try:
        read = tf_hub.read(copy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.extra == ("unknown/key",)
    assert peak < 16 << 20
    assert same(read, arrays)


def test_a_name_of_many_parts(tmp_path, arrays, monkeypatch):
    long = "/".join(["a"] * 5000)
    named = spelled(arrays, "resnet/") | {long: np.zeros(3, "f4")}
    path = module(tmp_path / "m", named)
    asked = []
    claims = layout.claims
    monkeypatch.setattr(
        layout, "claims", lambda name: asked.append(name) or claims(name)
    )
    read = tf_hub.read(path)
    assert read.extra == (long,)
    assert len(asked) < 20 * len(named)
    assert same(read, arrays)


@pytest.mark.parametrize(
    "name",
    ["a [v2]", "a[", "a]b", "back\\slash", "a?", "a*b", "{a,b}", "~", "\udcff"],
    ids=ascii,
)
def test_a_path_is_no_pattern(tmp_path, resnet, arrays, name):
    shutil.copytree(resnet, tmp_path / name)
    for other in ("a v", "ab", "aXb", "a2"):
        shutil.copytree(resnet, tmp_path / other)
        shard = tmp_path / other / SHARD
        shard.write_bytes(bytes(shard.stat().st_size))
    assert tf_hub.sniff(tmp_path / name)
    assert same(tf_hub.read(tmp_path / name), arrays)


@pytest.mark.parametrize("name", [INDEX, SHARD])
def test_files_that_change_after_opening(copy, name):
    read = tf_hub.read(copy)
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    (copy / name).write_bytes(data + b"\0")
    with pytest.raises(errors.CheckpointFormatError, match="Open it again"):
        read[KERNEL]


def mutated(tmp_path, arrays, change, error=errors.CheckpointMismatchError):
    named = spelled(arrays, "resnet/")
    change(named)
    path = module(tmp_path / "m", named)
    with pytest.raises(error) as caught:
        dict(tf_hub.read(path))
    message = str(caught.value)
    assert str(path) in message
    assert KERNEL in message
    return message


def to(function):
    def change(named):
        named[f"resnet/{KERNEL}"] = function(named[f"resnet/{KERNEL}"])

    return change


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: np.swapaxes(x, 0, 2), "transposed"),
        (lambda x: x.transpose(3, 2, 0, 1), "OIHW"),
        (lambda x: x[..., :-1], "found (3, 3, 64, 63)"),
    ],
)
def test_another_shape_is_named(tmp_path, arrays, function, word):
    assert word in mutated(tmp_path, arrays, to(function))


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.astype("i4"), "int32"),
        (lambda x: np.where(x == x.max(), np.nan, x).astype("f4"), "nan"),
        (lambda x: np.array("a text"), "object"),
    ],
)
def test_other_values_are_named(tmp_path, arrays, function, word):
    kind = errors.CheckpointFormatError
    assert word in mutated(tmp_path, arrays, to(function), kind)


def test_missing_and_renamed_variables_are_named(tmp_path, arrays):
    def rename(named):
        named["resnet/block2/kernel"] = named.pop(f"resnet/{KERNEL}")

    message = mutated(tmp_path, arrays, rename)
    assert f"− {KERNEL}" in message
    assert "+ resnet/block2/kernel" in message
    shutil.rmtree(tmp_path / "m")
    mutated(tmp_path, arrays, lambda named: named.pop(f"resnet/{KERNEL}"))
    shutil.rmtree(tmp_path / "m")

    def fifth(named):
        for name in [name for name in named if "block4" in name]:
            named[name.replace("block4", "block5")] = named[name]
        named.pop(f"resnet/{KERNEL}")

    assert "+ block5/unit01" in mutated(tmp_path, arrays, fifth)


def test_other_models(tmp_path):
    path = module(tmp_path / "m", {"conv1/kernel": np.zeros((7, 7), "f4")})
    assert tf_hub.sniff(path)
    with pytest.raises(errors.CheckpointMismatchError, match="conv1/kernel"):
        tf_hub.read(path)


def place(path, name):
    """Where a variable's bytes lie in the only shard."""
    prefix = path / "variables" / "variables"
    for variable in tensor_bundle.variables(prefix).values():
        if variable.shape == name:
            return variable
    raise AssertionError(name)


def test_a_flipped_bit_names_the_variable(copy, arrays):
    variable = place(copy, arrays[KERNEL].shape)
    data = bytearray((copy / SHARD).read_bytes())
    data[variable.offset + 1000] ^= 1
    (copy / SHARD).write_bytes(data)
    read = tf_hub.read(copy)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        read[KERNEL]
    assert f"resnet/{KERNEL}" in str(caught.value)
    assert "hecksum" in str(caught.value)
    assert str(copy) in str(caught.value)
    for name in set(arrays) - {KERNEL}:
        assert read[name].tobytes() == arrays[name].tobytes()


def test_a_truncated_or_missing_shard(copy, arrays):
    data = (copy / SHARD).read_bytes()
    for cut in [*range(0, len(data), len(data) // 12), len(data) - 1]:
        (copy / SHARD).write_bytes(data[:cut])
        with pytest.raises(errors.CheckpointFormatError) as caught:
            dict(tf_hub.read(copy))
        assert str(copy) in str(caught.value)
    variable = place(copy, arrays[KERNEL].shape)
    end = variable.offset + variable.size
    assert end < len(data)
    (copy / SHARD).write_bytes(data[: end - 1])
    with pytest.raises(errors.CheckpointFormatError):
        tf_hub.read(copy)
    (copy / SHARD).unlink()
    with pytest.raises(errors.CheckpointFormatError, match="no file variables"):
        tf_hub.read(copy)


def test_a_truncated_shard_names_its_variables(tmp_path, arrays):
    path = tf1_hub(tmp_path / "m", spelled(arrays, "resnet/"))
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:-1])
    with pytest.raises(errors.CheckpointFormatError) as caught:
        tf_hub.read(path)
    assert "1 of" in str(caught.value)
    assert "resnet/root_block/standardized_conv2d/kernel" in str(caught.value)
    (path / SHARD).unlink()
    with pytest.raises(errors.CheckpointFormatError, match=KERNEL):
        tf_hub.read(path)


def test_a_shard_that_goes_after_opening(copy):
    read = tf_hub.read(copy)
    (copy / SHARD).unlink()
    with pytest.raises(errors.CheckpointFormatError, match=KERNEL):
        read[KERNEL]


def test_a_damaged_index(copy, rng):
    data = (copy / INDEX).read_bytes()
    for cut in [*range(0, len(data), len(data) // 30), len(data) - 1]:
        (copy / INDEX).write_bytes(data[:cut])
        tf_hub.sniff(copy)
        with pytest.raises(errors.CheckpointFormatError, match="index"):
            tf_hub.read(copy)
    for position in range(0, len(data) - 48, len(data) // 30):
        changed = bytearray(data)
        changed[position] ^= 0x10
        (copy / INDEX).write_bytes(changed)
        with pytest.raises(errors.CheckpointFormatError, match="checksum"):
            tf_hub.read(copy)
    (copy / INDEX).write_bytes(rng.bytes(500))
    with pytest.raises(errors.CheckpointFormatError, match="mark"):
        tf_hub.read(copy)
    (copy / INDEX).unlink()
    assert not tf_hub.sniff(copy)
    with pytest.raises(errors.CheckpointFormatError, match=r"variables\.index"):
        tf_hub.read(copy)


def pack(path, directory, inside=".", first=()):
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as file:
        for name in first:
            file.add(directory / name, f"{inside}/{name}")
        file.add(directory, inside)
    return path


@pytest.mark.parametrize("name", ["m.tar.gz", "m.tgz", "m.tar"])
def test_archives(resnet, arrays, tmp_path, monkeypatch, name):
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    path = pack(tmp_path / name, resnet)
    assert tf_hub.sniff(path)
    read = tf_hub.read(path)
    assert same(read, arrays)
    assert read.path == path
    assert len(list((tmp_path / "temp").iterdir())) == 1
    del read
    gc.collect()
    assert list((tmp_path / "temp").iterdir()) == []


def test_an_archive_of_a_folder(resnet, arrays, tmp_path):
    path = pack(tmp_path / "m.tar.gz", resnet, "model_1")
    assert tf_hub.sniff(path)
    assert same(tf_hub.read(path), arrays)
    folder = tmp_path / "above"
    shutil.copytree(resnet, folder / "1")
    assert tf_hub.sniff(folder)
    assert same(tf_hub.read(folder), arrays)


def test_an_archive_is_known_by_its_start(resnet, tmp_path):
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as file:
        big = tarfile.TarInfo("./variables/variables.data-00000-of-00001")
        big.size = 64 << 20
        index = tarfile.TarInfo("./variables/variables.index")
        file.addfile(index, io.BytesIO())
        file.addfile(big, io.BytesIO(bytes(64 << 20)))
    assert tf_hub.sniff(tmp_path / "m.tar.gz")


def test_hostile_archives(resnet, tmp_path, monkeypatch):
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    link = tarfile.TarInfo("variables/variables.data-00000-of-00001")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for member in (tarfile.TarInfo("../../evil"), link):
        path = tmp_path / "m.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            file.add(resnet / "saved_model.pb", "saved_model.pb")
            file.addfile(member)
        assert tf_hub.sniff(path)
        with pytest.raises(errors.ArchiveError, match=member.name):
            tf_hub.read(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tar.gz", "temp"]
    assert list((tmp_path / "temp").iterdir()) == []


def test_a_chain_of_extended_headers_is_not_sniffed(tmp_path):
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 512
    data = (name.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000
    (tmp_path / "m.tar").write_bytes(data)
    assert not tf_hub.sniff(tmp_path / "m.tar")


def test_truncated_archives(resnet, tmp_path):
    path = pack(tmp_path / "m.tar.gz", resnet)
    data = path.read_bytes()
    for cut in [*range(0, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:cut])
        tf_hub.sniff(path)
        with pytest.raises(errors.BitTfError):
            tf_hub.read(path)


def test_garbage_is_not_sniffed(tmp_path, rng):
    for name in ("a.tar.gz", "a.tar", "a.tgz", "a.npz", "saved_model.pb"):
        path = tmp_path / name
        for data in (b"", rng.bytes(2000), b"\x1f\x8b" + rng.bytes(99)):
            path.write_bytes(data)
            assert not tf_hub.sniff(path)
            with pytest.raises(errors.BitTfError):
                tf_hub.read(path)
    assert not tf_hub.sniff(tmp_path)
    with pytest.raises(errors.CheckpointFormatError):
        tf_hub.read(tmp_path)
    assert not tf_hub.sniff(tmp_path / "missing")
    assert not tf_hub.sniff("nul\0")
    with pytest.raises(FileNotFoundError):
        tf_hub.read(tmp_path / "missing")
    assert archive.is_archive(tmp_path / "a.tar")


def test_export_of_what_was_read(resnet, arrays, tmp_path):
    checkpoints.write(tf_hub.read(resnet), tmp_path / "a.npz")
    assert same(checkpoints.read(tmp_path / "a.npz"), arrays)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_the_published_files(name, monkeypatch, tmp_path):
    row = variants.ARCHITECTURES[name]
    shard = tmp_path / "variables.data-00000-of-00001"
    found = {}
    for line in (CORPORA / f"{name}.txt").read_text().splitlines():
        source, shape = line.split()
        shape = tuple(map(int, shape.split(",")))
        key = f"keras_layer/{source}"
        found[key] = tensor_bundle.Variable(shape, np.dtype("f4"), shard, 0, 0)
    (tmp_path / "variables").mkdir()
    (tmp_path / INDEX).write_bytes(b"")
    monkeypatch.setattr(tensor_bundle, "variables", lambda prefix: found)
    monkeypatch.setattr(tensor_bundle, "require_data", lambda chosen: None)
    read = tf_hub.read(tmp_path)
    expected = layout.expected_shapes(row.blocks, row.stem_width, 1000)
    assert read.shapes == expected
    assert sorted(read.sources.values()) == sorted(found)
    assert read.extra == ()
