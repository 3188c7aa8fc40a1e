"""Other programs' checkpoint files, written out by hand."""

import pathlib
import re

import h5py
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from bit_tf import variants
from bit_tf.checkpoints import layout, rename

PUBLISHED = [name for name in variants.ARCHITECTURES if name != "testing"]
CORPORA = pathlib.Path(__file__).parent / "corpora"


def corpus(source, architecture):
    """Names and shapes that another program gives, in its order."""
    lines = (CORPORA / source / f"{architecture}.txt").read_text().splitlines()
    found = {}
    for line in lines:
        name, shape = line.split(" ")
        assert name not in found
        found[name] = tuple(map(int, shape.split(",")))
    return found


def flax(arrays, head="head", prefix=""):
    """Flax's names and layouts, written out by hand."""
    result = {}
    for name, array in arrays.items():
        new = name.replace(
            "root_block/standardized_conv2d", "root_block/conv_root"
        )
        new = re.sub("^group_norm", "norm-pre-head", new)
        new = new.replace("a/proj/standardized_conv2d", "conv_proj")
        for number, letter in enumerate("abc", 1):
            new = new.replace(f"/{letter}/group_norm", f"/gn{number}")
            new = new.replace(
                f"/{letter}/standardized_conv2d", f"/conv{number}"
            )
        new = new.replace("gamma", "scale").replace("beta", "bias")
        new = new.replace("head/conv2d", head)
        if new.endswith(("/scale", "/bias")) and "head/b" not in name:
            array = (
                array if name.startswith("head") else array[None, None, None]
            )
        result[prefix + new] = array
    return result


def paddle(arrays, scheme=rename.PADDLE):
    """Names and layouts of PaddleNLP, written out by hand."""
    result = {}
    for name, array in arrays.items():
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        result[scheme.spell(name)] = np.ascontiguousarray(array)
    return result


def layers_of(arrays):
    """Layer → canonical names, in the order of big_transfer's own model."""
    found = {"root_block": ["root_block/standardized_conv2d/kernel"]}
    for block in range(1, 5):
        names = found[f"block{block}"] = []
        for unit in range(1, 100):
            scope = f"block{block}/unit{unit:02d}"
            if f"{scope}/a/group_norm/gamma" not in arrays:
                break
            for letter in "abc":
                names += [
                    f"{scope}/{letter}/group_norm/gamma",
                    f"{scope}/{letter}/group_norm/beta",
                    f"{scope}/{letter}/standardized_conv2d/kernel",
                ]
            if unit == 1:
                names.append(f"{scope}/a/proj/standardized_conv2d/kernel")
    found["group_norm"] = ["group_norm/gamma", "group_norm/beta"]
    found["re_lu_48"] = found["global_average_pooling2d"] = []
    if layout.HEAD_KERNEL in arrays:
        found["head/dense"] = [layout.HEAD_KERNEL, layout.HEAD_BIAS]
    return found


def weight_name(name, prefix=""):
    return prefix + name.replace("head/conv2d", "head/dense") + ":0"


def texts(names, fixed):
    """As h5py 2 wrote them (fixed bytes), or h5py 3."""
    if not names:
        return np.array([])
    return np.array([n.encode() for n in names]) if fixed else list(names)


def big_transfer_h5(
    path, arrays, prefix="", fixed=True, rename=None, change=None
):
    """A file as Keras 2 writes it.

    Args:
      rename: (layer, index, canonical name) → weight name.
      change: edits {layer: [(weight name, array)]} before it is written.
    """
    rename = rename or (lambda layer, index, name: weight_name(name, prefix))
    layers = {
        layer: [
            (rename(layer, index, name), arrays[name])
            for index, name in enumerate(names)
        ]
        for layer, names in layers_of(arrays).items()
    }
    if change:
        change(layers)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = texts(list(layers), fixed)
        file.attrs["backend"] = b"tensorflow" if fixed else "tensorflow"
        file.attrs["keras_version"] = b"2.3.0-tf" if fixed else "2.3.0-tf"
        for layer, rows in layers.items():
            group = file.create_group(layer)
            names = [name for name, _ in rows]
            group.attrs["weight_names"] = texts(names, fixed)
            for name, array in rows:
                if array is not None:
                    group.create_dataset(name, data=array)
        if not fixed:
            top = file.create_group("top_level_model_weights")
            top.attrs["weight_names"] = texts([], fixed)
    return path


def saved_model(path, named):
    """A SavedModel of TensorFlow 2 with variables of these names."""
    root = tf.Module()
    root.kept = [tf.Variable(value, name=name) for name, value in named.items()]
    tf.saved_model.save(root, str(path))
    return path


def tf1_hub(path, named, victim=None, slots=False):
    """A module of TF1 Hub, with a graph that must never be loaded."""
    v1 = tf.compat.v1
    (path / "variables").mkdir(parents=True)
    (path / "tfhub_module.pb").write_bytes(b"")
    with tf.Graph().as_default() as graph:
        made = [
            v1.get_variable(name, initializer=value, use_resource=False)
            for name, value in named.items()
        ]
        if slots:
            v1.train.get_or_create_global_step()
            loss = tf.add_n([tf.reduce_sum(x) for x in made])
            v1.train.MomentumOptimizer(0.1, 0.9).minimize(loss)
        saver = v1.train.Saver(v1.global_variables())
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            saver.save(
                session,
                str(path / "variables" / "variables"),
                write_meta_graph=False,
                write_state=False,
            )
        if victim:
            tf.io.write_file(str(victim), "the graph was run")
        model = saved_model_pb2.SavedModel(saved_model_schema_version=1)
        model.meta_graphs.add().graph_def.CopyFrom(graph.as_graph_def())
    (path / "saved_model.pb").write_bytes(model.SerializeToString())
    return path


def hub_names(arrays, prefix="", numbered=False, square=True):
    """Arrays by the names and shapes that a module gives them."""
    found = {}
    for index, (name, array) in enumerate(arrays.items()):
        if numbered and index:
            name = name.replace("ed_conv2d/", f"ed_conv2d_{index}/")
        if name == layout.HEAD_KERNEL and square:
            array = array[None, None]
        found[prefix + name] = array
    return found
