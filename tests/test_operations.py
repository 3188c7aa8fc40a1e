import os
import shutil

import pytest
import tensorflow as tf

from bit_tf import errors
from hub_export import operations


class Model(tf.Module):
    """A model of pictures, which does something on the way."""

    def __init__(self, deed=None, table=None):
        super().__init__()
        self.deed = deed or (lambda images: images)
        self.table = table

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def __call__(self, images):
        images = self.deed(images)
        if self.table is not None:
            number = self.table.lookup(tf.constant(["b"]))
            images += tf.cast(number, tf.float32)
        return tf.reduce_mean(images, [1, 2])


def writes(images):
    tf.io.write_file("/nowhere/file", "text")
    return images


def reads(images):
    return images + tf.io.decode_raw(tf.io.read_file("/dev/null"), tf.float32)


def lists(images):
    return images + float(0) * tf.cast(
        tf.size(tf.io.matching_files("/etc/*")), tf.float32
    )


def runs_python(images):
    (images,) = tf.py_function(lambda image: [image], [images], [tf.float32])
    return tf.ensure_shape(images, [None, None, None, 3])


def runs_numpy(images):
    images = tf.numpy_function(lambda image: image, [images], tf.float32)
    return tf.ensure_shape(images, [None, None, None, 3])


def prints_to_a_file(images):
    tf.print(images[0, 0, 0], output_stream="file:///nowhere/file")
    return images


def prints(images):
    tf.print(images[0, 0, 0])
    return images


def saves(images):
    tf.raw_ops.SaveV2(
        prefix="/nowhere/file",
        tensor_names=["a"],
        shape_and_slices=[""],
        tensors=[images],
    )
    return images


def restores(images):
    (value,) = tf.raw_ops.RestoreV2(
        prefix="/nowhere/file",
        tensor_names=["a"],
        shape_and_slices=[""],
        dtypes=[tf.float32],
    )
    return images + value


def reads_inside(images):
    return tf.while_loop(
        lambda images: tf.reduce_sum(images) < 0,
        lambda images: (reads(images),),
        [images],
    )[0]


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        (writes, "WriteFile reads or writes files"),
        (reads, "ReadFile reads or writes files"),
        (reads_inside, "ReadFile reads or writes files"),
        (lists, "MatchingFiles reads or writes files"),
        (runs_python, "EagerPyFunc runs Python"),
        (runs_numpy, "PyFunc runs Python"),
        (prints_to_a_file, "PrintV2 reads or writes files"),
        (saves, "SaveV2 reads or writes files"),
        (restores, "RestoreV2 reads or writes files"),
    ],
)
def test_deeds_that_are_refused(tmp_path, deed, problem):
    tf.saved_model.save(Model(deed), tmp_path)
    found = operations.read(tmp_path)
    assert [text.partition(" (")[0] for text in found.problems] == [problem]


def test_what_exports_do_is_accepted(small_export, tmp_path):
    found = operations.read(small_export)
    assert found.problems == ()
    assert found.reusable
    assert found.total > found.kinds > 10
    tf.saved_model.save(Model(prints), tmp_path)
    assert operations.read(tmp_path).problems == ()


def read_proto(directory):
    from tensorflow.core.protobuf import saved_model_pb2

    data = (directory / "saved_model.pb").read_bytes()
    return saved_model_pb2.SavedModel.FromString(data)


def write_proto(proto, directory):
    directory.mkdir(exist_ok=True)
    data = proto.SerializeToString()
    (directory / "saved_model.pb").write_bytes(data)


def test_tables_are_read_from_assets_only(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            str(words),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        ),
        -1,
    )
    good = tmp_path / "good"
    tf.saved_model.save(Model(table=table), good)
    assert operations.read(good).problems == ()

    proto = read_proto(good)
    proto.meta_graphs[0].asset_file_def[0].filename = "../../words.txt"
    write_proto(proto, tmp_path / "outside")
    (problem,) = operations.read(tmp_path / "outside").problems
    assert "'../../words.txt' is no file in assets/" in problem

    proto = read_proto(good)
    for node in proto.meta_graphs[0].object_graph_def.nodes:
        if node.WhichOneof("kind") == "asset":
            node.constant.operation = "Const"
    write_proto(proto, tmp_path / "constant")
    (problem,) = operations.read(tmp_path / "constant").problems
    assert "InitializeTableFromTextFileV2 reads" in problem


def test_operations_of_elsewhere_are_named(small_export, tmp_path):
    proto = read_proto(small_export)
    node = proto.meta_graphs[0].graph_def.library.function[0].node_def.add()
    node.name, node.op = "extra", "StealSecrets"
    write_proto(proto, tmp_path)
    assert operations.read(tmp_path).problems == (
        "StealSecrets is no operation of this TensorFlow",
    )


def test_saving_that_is_called_by_others_is_refused(small_export, tmp_path):
    """The functions that store variables are not to be used for anything."""
    proto = read_proto(small_export)
    meta = proto.meta_graphs[0]
    saver = meta.saver_def.save_tensor_name.partition(":")[0]
    (name,) = (
        node.attr["f"].func.name
        for node in meta.graph_def.node
        if node.name == saver
    )
    for function in meta.graph_def.library.function:
        if "forward" in function.signature.name:
            node = function.node_def.add()
            node.name, node.op = "extra", "StatefulPartitionedCall"
            node.attr["f"].func.name = name
    write_proto(proto, tmp_path)
    found = operations.read(tmp_path).problems
    assert [text.split()[0] for text in found] == [
        "MergeV2Checkpoints",
        "SaveV2",
    ]


def test_graphs_of_tensorflow_1(small_export, tmp_path):
    proto = read_proto(small_export)
    proto.meta_graphs[0].ClearField("object_graph_def")
    write_proto(proto, tmp_path)
    assert not operations.read(tmp_path).reusable
    proto = read_proto(small_export)
    proto.meta_graphs.add().CopyFrom(proto.meta_graphs[0])
    write_proto(proto, tmp_path)
    assert not operations.read(tmp_path).reusable


def test_a_graph_as_text(small_export, tmp_path):
    from google.protobuf import text_format

    text = text_format.MessageToString(read_proto(small_export))
    (tmp_path / "saved_model.pbtxt").write_text(text)
    found = operations.read(tmp_path)
    assert found == operations.read(small_export)
    (tmp_path / "saved_model.pbtxt").write_text("no { such")
    with pytest.raises(errors.VerificationError, match="protocol message"):
        operations.read(tmp_path)


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "garbage", "directory", "gone", "pipe"]
)
def test_what_is_no_graph(small_export, tmp_path, damage):
    path = tmp_path / "saved_model.pb"
    content = (small_export / path.name).read_bytes()
    if damage == "directory":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "garbage": os.urandom(1000),
            }[damage]
        )
    with pytest.raises(errors.VerificationError, match="Received"):
        operations.read(tmp_path)


def test_a_graph_that_would_be_loaded_instead(small_export, tmp_path):
    """TensorFlow takes saved_model.cpb where there is one."""
    copy = tmp_path / "copy"
    shutil.copytree(small_export, copy)
    (copy / "saved_model.cpb").write_bytes(b"")
    with pytest.raises(errors.VerificationError, match=r"saved_model\.cpb"):
        operations.read(copy)
