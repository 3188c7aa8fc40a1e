"""big_transfer's .h5: names, positions, shapes, and what is refused."""

import tracemalloc

import h5py
import helpers
import numpy as np
import pytest
from foreign import PUBLISHED, corpus, weight_name
from foreign import big_transfer_h5 as write

from bit_tf import errors, variants
from bit_tf.checkpoints import (
    big_transfer_h5,
    checkpoint,
    hdf5,
    layout,
)

TINY = (1, 1, 1, 1)
KERNEL = "block2/unit01/b/standardized_conv2d/kernel"
GAMMA = "block3/unit01/c/group_norm/gamma"
KEPT = {
    "": "block2/block2/unit01/b/standardized_conv2d/kernel:0",
    "resnet/": "block2/resnet/block2/unit01/b/standardized_conv2d/kernel:0",
}


def place(layers, name, prefix=""):
    """(layer's rows, index) of a canonical name."""
    wanted = weight_name(name, prefix)
    for rows in layers.values():
        for index, (found, _) in enumerate(rows):
            if found == wanted:
                return rows, index
    raise AssertionError(name)


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.h5"


def anonymous(layer, index, name):
    """Names that tell nothing but a number."""
    return f"weight_{index}"


NAMINGS = {
    "names": {"prefix": ""},
    "fixed": {"prefix": "", "fixed": True},
    "variable": {"prefix": "", "fixed": False},
    "called": {"prefix": "resnet/"},
    "another model name": {"prefix": "my_model_3/"},
    "position": {"rename": anonymous},
    "position and kinds": {
        "rename": lambda layer, index, name: (
            f"{name.rpartition('/')[2]}_{index}:0"
        )
    },
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    ("blocks", "classes"), [(TINY, 10), ((1, 2, 1, 3), 7), ((2, 1, 1, 1), 0)]
)
def test_reads_bit_identical(path, naming, blocks, classes):
    arrays = helpers.random_arrays(blocks, 32, classes)
    write(path, arrays, **NAMINGS[naming])
    assert big_transfer_h5.sniff(path)
    read = big_transfer_h5.read(path)
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.tobytes() == arrays[name].tobytes()
        assert array.shape == arrays[name].shape
        assert read.dtypes[name] == np.float32
    assert (read.blocks, read.stem_width, read.num_classes) == (
        blocks,
        32,
        classes,
    )
    assert (read.format, read.extra) == ("big_transfer_h5", ())
    assert read.facts.numerics == "google"
    assert read.facts.preset.name == "big_transfer eval"
    assert read.notes == (
        "The layout is inferred from big_transfer's code; no published file "
        "was seen.",
    )


def test_a_fine_tuned_head_has_another_prefix(path, arrays):
    def rename(layer, index, name):
        return weight_name(name, "resnet/" if "head" in layer else "")

    write(path, arrays, rename=rename)
    read = big_transfer_h5.read(path)
    assert read.sources[layout.HEAD_BIAS] == (
        "head/dense/resnet/head/dense/bias:0"
    )
    assert read.sources[KERNEL] == KEPT[""]
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_the_name_of_the_file_says_nothing(tmp_path):
    arrays = helpers.random_arrays((1, 2, 1, 1), 32, 5)
    for name in ("BiT-S-R50x3.h5", "BiT-S-R101x1.h5"):
        read = big_transfer_h5.read(write(tmp_path / name, arrays))
        assert (read.blocks, read.stem_width) == ((1, 2, 1, 1), 32)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("by", ["names", "positions"])
def test_names_that_big_transfers_code_gives(name, by, monkeypatch, path):
    row = variants.ARCHITECTURES[name]
    expected = layout.expected_shapes(row.blocks, row.stem_width, 1000)
    entries, weights = {}, {}
    for source, shape in corpus("big_transfer_h5", name).items():
        layer = "head/dense" if source[:4] == "head" else source.split("/")[0]
        weight = source.removeprefix(f"{layer}/")
        if by == "positions":
            weight = f"w{len(entries)}"
            source = f"{layer}/{weight}"
        weights.setdefault(layer, []).append(weight)
        entries[source] = checkpoint.Entry(
            shape, np.dtype("f4"), lambda: None, source
        )
    attributes = {"layer_names": {"": tuple(weights)}, "weight_names": weights}
    monkeypatch.setattr(hdf5, "datasets", lambda path: entries)
    monkeypatch.setattr(hdf5, "texts", lambda path, key: attributes[key])
    read = big_transfer_h5.read(path)
    assert read.shapes == expected
    assert sorted(read.sources.values()) == sorted(entries)
    if by == "names":
        for canonical, source in read.sources.items():
            assert source.endswith(f"/{weight_name(canonical)}")


def read_all(path):
    return dict(big_transfer_h5.read(path))


def mutated(path, arrays, change, error=errors.CheckpointMismatchError):
    for prefix in ("", "resnet/"):
        write(
            path,
            arrays,
            prefix,
            change=lambda layers, prefix=prefix: change(layers, prefix),
        )
        with pytest.raises(error) as caught:
            read_all(path)
        message = str(caught.value)
        assert str(path) in message
        assert KERNEL in message
        assert KEPT[prefix] in message
    return message


def edit(function):
    def change(layers, prefix):
        rows, index = place(layers, KERNEL, prefix)
        rows[index] = (rows[index][0], function(rows[index][1]))

    return change


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: np.swapaxes(x, 0, 2), "transposed"),
        (lambda x: x.transpose(3, 2, 0, 1), "OIHW"),
        (lambda x: x[..., :-1], "found (3, 3, 64, 63)"),
        (lambda x: x.reshape(9, 64, 64), "reshaped"),
    ],
)
def test_shapes_are_never_made_to_fit(path, arrays, function, word):
    assert word in mutated(path, arrays, edit(function))


def test_a_cast_or_nan_names_the_array(path, arrays):
    def nan(x):
        x = x.copy()
        x[0, 0, 0, 3] = np.nan
        return x

    kind = errors.CheckpointFormatError
    assert "int32" in mutated(
        path, arrays, edit(lambda x: x.astype("i4")), kind
    )
    assert "nan" in mutated(path, arrays, edit(nan), kind)


def test_a_missing_array_is_named(path, arrays):
    def drop(layers, prefix):
        rows, index = place(layers, KERNEL, prefix)
        del rows[index]

    assert "− " in mutated(path, arrays, drop)
    kind = errors.CheckpointFormatError
    message = mutated(path, arrays, edit(lambda x: None), kind)
    assert "weight_names" in message


def test_a_renamed_array_is_named(path, arrays):
    def rename(layers, prefix):
        rows, index = place(layers, KERNEL, prefix)
        rows[index] = (
            rows[index][0].replace("kernel", "weight"),
            rows[index][1],
        )

    assert "kernel" in mutated(path, arrays, rename)
    with pytest.raises(errors.CheckpointMismatchError, match="weight:0"):
        big_transfer_h5.read(path)


def test_an_array_that_no_layer_lists_is_extra(path, arrays):
    write(path, arrays)
    with h5py.File(path, "a") as file:
        file["block1/more"] = np.zeros(3, "i4")
    assert big_transfer_h5.read(path).extra == ("block1/more",)


def test_names_and_positions_must_agree(path, arrays):
    def swap(layers):
        rows, index = place(layers, GAMMA)
        rows[index], rows[index + 1] = rows[index + 1], rows[index]

    write(path, arrays, change=swap)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        big_transfer_h5.read(path)
    assert GAMMA in str(caught.value)
    assert "block3/block3/unit01/c/group_norm/beta:0" in str(caught.value)

    def layers(layers):
        first = layers.pop("block1")
        layers["block1"] = first

    write(path, arrays, change=layers)
    with pytest.raises(errors.CheckpointFormatError, match="in the place of"):
        big_transfer_h5.read(path)


def test_positions_and_kinds_must_agree(path, arrays):
    def kinds(layer, index, name):
        leaf = name.rpartition("/")[2]
        if name == GAMMA:
            leaf = "beta"
        return f"{leaf}_{index}:0"

    write(path, arrays, rename=kinds)
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        big_transfer_h5.read(path)
    assert GAMMA in str(caught.value)
    assert "block3/beta_6:0" in str(caught.value)


def test_positions_and_shapes_must_agree(path, arrays):
    def change(layers):
        rows = layers["block2"]
        name, array = rows[5]
        rows[5] = (name, array.transpose(3, 2, 0, 1))

    write(path, arrays, rename=anonymous, change=change)
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        big_transfer_h5.read(path)
    assert f"{KERNEL} (block2/weight_5)" in str(caught.value)


def test_another_number_of_arrays(path, arrays):
    write(
        path,
        arrays,
        rename=anonymous,
        change=lambda layers: layers["block2"].pop(),
    )
    with pytest.raises(errors.CheckpointMismatchError, match="block2: 9"):
        big_transfer_h5.read(path)
    write(
        path,
        arrays,
        rename=anonymous,
        change=lambda layers: layers.pop("root_block"),
    )
    with pytest.raises(errors.CheckpointMismatchError, match="6 layers"):
        big_transfer_h5.read(path)


def test_another_model(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["conv1"]
        file.create_group("conv1").attrs["weight_names"] = ["conv1/kernel:0"]
        file["conv1/conv1/kernel:0"] = np.zeros((7, 7, 3, 64), "f4")
    assert big_transfer_h5.sniff(path)
    with pytest.raises(errors.CheckpointMismatchError, match="conv1: 1"):
        big_transfer_h5.read(path)


def test_another_architecture_is_not_cut_to_fit(path, arrays):
    def fifth(layers):
        layers["block5"] = [
            (name.replace("block4", "block5"), array)
            for name, array in layers["block4"]
        ]

    write(path, arrays, change=fifth)
    with pytest.raises(errors.CheckpointMismatchError, match=r"\+ block5"):
        big_transfer_h5.read(path)


def test_attributes_that_list_no_arrays(path, arrays):
    def broken(function):
        write(path, arrays)
        with h5py.File(path, "a") as file:
            function(file)
        with pytest.raises(errors.CheckpointFormatError) as caught:
            big_transfer_h5.read(path)
        return str(caught.value)

    def no_layers(file):
        del file.attrs["layer_names"]

    def no_weights(file):
        del file["block2"].attrs["weight_names"]

    def no_group(file):
        names = file.attrs["layer_names"]
        file.attrs["layer_names"] = np.append(names, b"block9")

    def twice(file):
        names = file["block2"].attrs["weight_names"]
        file["block2"].attrs["weight_names"] = np.append(names, names[5])

    def escape(file):
        names = file["block2"].attrs["weight_names"]
        file["block2"].attrs["weight_names"] = np.append(names, b"../block1")

    assert "layer_names" in broken(no_layers)
    assert not big_transfer_h5.sniff(path)
    assert "block2" in broken(no_weights)
    assert "block9" in broken(no_group)
    assert KERNEL in broken(twice)
    assert "block2/../block1" in broken(escape)


def test_hostile_files(path, arrays, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = arrays[KERNEL]
    (tmp_path / "raw").write_bytes(arrays[KERNEL].tobytes())
    shape = arrays[KERNEL].shape
    victim = tmp_path / "victim"

    def external(file, name):
        file[name] = h5py.ExternalLink(str(other), "x")

    def soft(file, name):
        file["copy"] = arrays[KERNEL]
        file[name] = h5py.SoftLink("/copy")

    def storage(file, name):
        raw = [(str(tmp_path / "raw"), 0, arrays[KERNEL].nbytes)]
        file.create_dataset(name, shape, "f4", external=raw)

    def virtual(file, name):
        there = h5py.VirtualLayout(shape, "f4")
        there[:] = h5py.VirtualSource(str(other), "x", shape)
        file.create_virtual_dataset(name, there)

    def objects(file, name):
        attack = f"cos\nsystem\n(S'touch {victim}'\ntR."
        file.create_dataset(name, data=[attack], dtype=h5py.string_dtype())

    def huge(file, name):
        file.create_dataset(name, (1 << 30, 1 << 20), "f4")

    for attack in (external, soft, storage, virtual, objects, huge):
        write(path, arrays)
        with h5py.File(path, "a") as file:
            del file[KEPT[""]]
            attack(file, KEPT[""])
        assert big_transfer_h5.sniff(path)
        with pytest.raises(errors.CheckpointFormatError) as caught:
            big_transfer_h5.read(path)
        assert KEPT[""] in str(caught.value), attack.__name__
    assert not victim.exists()


def test_truncated_files(path, arrays):
    write(path, arrays)
    data = path.read_bytes()
    for cut in [*range(0, len(data), len(data) // 30), len(data) - 1]:
        path.write_bytes(data[:cut])
        big_transfer_h5.sniff(path)
        with pytest.raises(errors.CheckpointFormatError) as caught:
            big_transfer_h5.read(path)
        assert str(path) in str(caught.value)
    assert "truncated" in str(caught.value)


def test_garbage_is_not_sniffed(path, tmp_path, rng):
    for data in (b"", b"\0", rng.bytes(1 << 12), b"PK\3\4" + rng.bytes(99)):
        path.write_bytes(data)
        assert not big_transfer_h5.sniff(path)
        with pytest.raises(errors.CheckpointFormatError):
            big_transfer_h5.read(path)
    assert not big_transfer_h5.sniff(tmp_path)
    assert not big_transfer_h5.sniff(tmp_path / "missing.h5")
    with pytest.raises(FileNotFoundError):
        big_transfer_h5.read(tmp_path / "missing.h5")
    with pytest.raises(errors.CheckpointFormatError, match="directory"):
        big_transfer_h5.read(tmp_path)


def test_one_array_is_read_at_a_time(path):
    arrays = helpers.random_arrays((1, 1, 1, 1), 64)
    read = big_transfer_h5.read(write(path, arrays))
    largest = max(array.nbytes for array in arrays.values())
    tracemalloc.start()
    for name in read:
        read[name]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * largest < path.stat().st_size
