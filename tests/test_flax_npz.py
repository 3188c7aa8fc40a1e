"""Flax parameters in .npz files: big_vision's and bit_jax's."""

import os
import random
import tracemalloc
import zipfile

import helpers
import numpy as np
import pytest
from foreign import corpus, flax

from bit_tf import errors
from bit_tf.checkpoints import flax_npz, google_npz

FORMAT = errors.CheckpointFormatError
MISMATCH = errors.CheckpointMismatchError

GAMMA = "block1/unit01/b/group_norm/gamma"
NORM = "block1/unit01/gn2/scale"
CONV = "block2/unit01/conv2/kernel"
ROOT = "root_block/conv_root/kernel"


TINY = helpers.random_arrays((1, 1, 1, 1), 32, 10)
HEADLESS = helpers.random_arrays((1, 2, 1, 3), 32, 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.npz"


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def same(read, arrays):
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.shape == arrays[name].shape
        assert array.tobytes() == arrays[name].tobytes(), name
    return True


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (1, 2, 1, 3)])
@pytest.mark.parametrize(
    ("head", "prefix", "numerics", "preset"),
    [
        ("head", "", "big_vision", "big_vision fewshot"),
        ("head", "params/", "big_vision", "big_vision fewshot"),
        ("head", "opt/target/", "big_vision", "big_vision fewshot"),
        ("conv_head", "", "google", "big_transfer eval"),
        ("conv_head", "params/", "google", "big_transfer eval"),
    ],
)
def test_round_trip(path, savez, blocks, head, prefix, numerics, preset):
    arrays = helpers.random_arrays(blocks, 32, 10)
    arrays[GAMMA][:3] = [-0.0, 1e-45, 3.4e38]
    stored = flax(arrays, head, prefix)
    assert {f"{prefix}{ROOT}", f"{prefix}{head}/bias"} < stored.keys()
    savez(path, **stored)
    assert flax_npz.sniff(path)
    read = flax_npz.read(str(path))
    assert same(read, arrays)
    assert (read.blocks, read.num_classes) == (blocks, 10)
    assert (read.format, read.extra) == ("flax_npz", ())
    assert read.facts.numerics == numerics
    assert read.facts.preset.name == preset
    assert not any("-inf" in note for note in read.notes)
    assert any("no published file" in note for note in read.notes) == (
        head == "conv_head"
    )
    assert read.sources[GAMMA] == prefix + NORM


def test_no_head_and_no_prefix_may_be_either(path):
    read = flax_npz.read(save(path, flax(HEADLESS)))
    assert same(read, HEADLESS)
    assert read.facts.numerics == "google"
    note = " ".join(read.notes)
    assert "-inf" in note
    assert 'numerics="big_vision"' in note


def test_no_head_behind_a_prefix(path):
    read = flax_npz.read(save(path, flax(HEADLESS, prefix="params/")))
    assert same(read, HEADLESS)
    assert read.facts.numerics == "big_vision"
    assert read.notes == ()


@pytest.mark.parametrize("head", ["head", "conv_head"])
def test_a_head_of_four_axes(path, head):
    arrays = flax(TINY, head)
    arrays[f"{head}/kernel"] = arrays[f"{head}/kernel"][None, None]
    assert same(flax_npz.read(save(path, arrays)), TINY)


@pytest.mark.parametrize("dtype", [">f4", "<f2", "<f8"])
def test_other_floats_and_orders(path, dtype):
    stored = {
        name: np.asfortranarray(array.astype(dtype))
        for name, array in flax(TINY).items()
    }
    for name, array in flax_npz.read(save(path, stored)).items():
        expected = TINY[name].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(array, expected, strict=True)


def training_state(prefix="opt/0/"):
    state = {
        f"{prefix}{moment}/{name}": np.zeros(1, np.float32)
        for moment in ("mu", "nu")
        for name in flax(TINY)
    }
    return state | {
        f"{prefix}count": np.int32(7),
        "chrono/accum_train_time": np.float64(1),
        "extra/rng": np.zeros(2, np.uint32),
        "extra/more": np.array([None], object),
    }


def test_an_optimizers_state_is_skipped_and_told(path):
    stored = flax(TINY, prefix="params/") | training_state()
    read = flax_npz.read(save(path, stored))
    assert same(read, TINY)
    assert read.extra == ()
    count = 2 * len(TINY) + 1
    notes = "\n".join(read.notes)
    assert f"skipped optimizer state: opt/… ({count} arrays)" in notes
    assert "chrono/… (1 array)" in notes
    assert "extra/… (2 arrays)" in notes


def test_an_optimizer_of_old(path):
    stored = flax(TINY, prefix="opt/target/") | training_state("opt/state/")
    read = flax_npz.read(save(path, stored))
    assert same(read, TINY)
    assert read.extra == ()
    count = 2 * len(TINY) + 1
    assert f"opt/… ({count} arrays)" in " ".join(read.notes)


def test_other_names_are_extra(path):
    stored = flax(TINY, prefix="params/") | {
        "params/ema": np.float32(1),
        "step": np.int64(2),
    }
    read = flax_npz.read(save(path, stored))
    assert read.extra == ("params/ema", "step")
    assert read.notes == ()
    stored = flax(TINY) | {"opt/count": np.int64(2), "step": np.int64(2)}
    read = flax_npz.read(save(path, stored))
    assert read.extra == ("opt/count", "step")
    assert read.notes == ()


def test_the_names_are_those_of_the_corpora():
    arrays = helpers.random_arrays((1, 2, 1, 3), 32, 1000)
    for source, head, prefix in (
        ("flax_big_vision", "head", "params/"),
        ("flax_bit_jax", "conv_head", ""),
    ):
        known = corpus(source, "R50x1").keys()
        assert flax(arrays, head, prefix).keys() < known


# Mutations of one array.


def put(name, change):
    return lambda a: a | {name: change(a[name])}


def moved(old, new):
    return lambda a: {(new if k == old else k): v for k, v in a.items()}


def without(name):
    return lambda a: {k: v for k, v in a.items() if k != name}


def with_nan(array):
    array = array.copy()
    array.reshape(-1)[5] = np.nan
    return array


SPELLED = rf"− {GAMMA} \(params/{NORM}\)"
NORM_, CONV_, ROOT_ = f"params/{NORM}", f"params/{CONV}", f"params/{ROOT}"
HEAD, BIAS = "params/head/kernel", "params/head/bias"
MUTATIONS = {
    "renamed": (
        moved(NORM_, f"{NORM_}s"), MISMATCH, rf"(?s){SPELLED}.*\+ {NORM_}s"
    ),
    "renamed root": (moved(ROOT_, "params/root"), MISMATCH, f"− .*{ROOT_}"),
    "without the prefix": (
        moved(NORM_, NORM), MISMATCH, rf"(?s){SPELLED}.*\+ {NORM}"
    ),
    "renamed, without the prefix": (
        moved(NORM_, "block1/gn"), MISMATCH, rf"(?s){SPELLED}.*\+ block1/gn"
    ),
    "dropped": (without(NORM_), MISMATCH, SPELLED),
    "dropped head": (without(HEAD), MISMATCH, rf"− .*\({HEAD}\)"),
    "dropped bias": (without(BIAS), MISMATCH, rf"− .*\({BIAS}\)"),
    "OIHW": (put(CONV_, lambda a: a.transpose(3, 2, 0, 1)), MISMATCH, CONV_),
    "transposed head": (put(HEAD, lambda a: a.T), MISMATCH, HEAD),
    "shorter": (put(NORM_, lambda a: a[..., :-1]), MISMATCH, f"≠ .*{NORM_}"),
    "one axis": (
        put(NORM_, lambda a: a[0, 0, 0]), MISMATCH, rf"≠ .*{NORM_}.*\(32,\)"
    ),
    "two axes": (put(NORM_, lambda a: a[0, 0]), MISMATCH, f"≠ .*{NORM_}"),
    "other axes": (put(NORM_, lambda a: a.T), MISMATCH, f"≠ .*{NORM_}"),
    "repeated": (
        put(NORM_, lambda a: a.repeat(2, 0)), MISMATCH, f"≠ .*{NORM_}"
    ),
    "ints": (put(NORM_, lambda a: a.astype(np.int32)), FORMAT, GAMMA),
    "objects": (put(NORM_, lambda a: a.astype(object)), FORMAT, GAMMA),
    "nan": (put(NORM_, with_nan), FORMAT, f"{GAMMA} .*{NORM_}.*nan"),
    "two heads": (
        lambda a: a | {"params/conv_head/kernel": a[HEAD]},
        FORMAT,
        "one name.*conv_head/kernel",
    ),
    "half a head each": (
        moved(BIAS, "params/conv_head/bias"), MISMATCH, r"\+ params/head/kernel"
    ),
    "another depth": (
        lambda a: a | {"params/block5/unit01/gn1/scale": a[NORM_]},
        MISMATCH,
        r"\+ block5/unit01/",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MUTATIONS)
def test_mutations_are_refused_by_name(path, case):
    change, error, message = MUTATIONS[case]
    save(path, change(flax(TINY, prefix="params/")))
    assert flax_npz.sniff(path)
    with pytest.raises(error, match=message):
        dict(flax_npz.read(path))


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_not_opened(path):
    target = path.with_name("executed")
    evil = np.array([Evil(str(target))], object)
    save(path, flax(TINY) | {"block1/unit01/gn2/scale": evil})
    with pytest.raises(FORMAT, match=f"(?s){GAMMA}.*pickle is never opened"):
        flax_npz.read(path)
    save(path, flax(TINY) | {"ema": evil})
    assert same(flax_npz.read(path), TINY)
    assert not target.exists()
    with np.load(path, allow_pickle=True) as loaded:
        assert loaded["ema"].shape == (1,)
    assert target.exists()


def test_a_member_that_inflates_is_refused_at_no_cost(path):
    save(path, flax(TINY))
    bomb = path.with_name("bomb.npz")
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            data = old.read(info)
            if info.filename == "block1/unit01/gn2/scale.npy":
                data += bytes(64 << 20)
            new.writestr(info.filename, data)
    assert bomb.stat().st_size < path.stat().st_size + 200_000
    tracemalloc.start()
    try:
        with pytest.raises(FORMAT, match=GAMMA):
            dict(flax_npz.read(bomb))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_opening_reads_no_data(path):
    save(path, flax(TINY))
    flax_npz.read(path)
    tracemalloc.start()
    try:
        read = flax_npz.read(path)
        assert read[GAMMA].shape == (32,)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4_000_000
    assert peak < 400_000


def test_each_access_reads_anew(path):
    read = flax_npz.read(save(path, flax(TINY)))
    for name in (GAMMA, "head/conv2d/kernel"):
        read[name][:] = 0
        assert read[name].any()


def test_sniff(tmp_path, path):
    arrays = flax(TINY)
    few = {name: arrays[name] for name in list(arrays)[:4]}
    assert not flax_npz.sniff(save(path, few))
    assert not flax_npz.sniff(save(path, {"a": np.zeros(3)}))
    assert flax_npz.sniff(
        save(path, {"root_block/conv_root/kernel": np.zeros(3)})
    )
    del arrays["root_block/conv_root/kernel"]
    assert flax_npz.sniff(save(path, arrays))
    google_npz.write(TINY, path)
    assert not flax_npz.sniff(path)
    save(path, TINY)
    assert not flax_npz.sniff(path)


def test_sniff_garbage(tmp_path, path):
    rng = random.Random(0)
    data = save(path, flax(TINY)).read_bytes()
    for content in (
        b"",
        b"PK",
        b"PK\3\4",
        b"PK\5\6" + bytes(18),
        *(rng.randbytes(size) for size in range(1, 300, 7)),
        *(b"PK\3\4" + rng.randbytes(size) for size in range(1, 300, 7)),
        *(data[: len(data) * i // 20] for i in range(20)),
        data[:-1],
    ):
        path.write_bytes(content)
        assert not flax_npz.sniff(path)
    assert not flax_npz.sniff(tmp_path)
    assert not flax_npz.sniff(tmp_path / "missing")
    assert not flax_npz.sniff(tmp_path / "\0")


def test_every_cut_is_refused(path):
    data = save(path, flax(TINY)).read_bytes()
    for i in range(30):
        path.write_bytes(data[: len(data) * i // 30])
        with pytest.raises(errors.BitTfError):
            flax_npz.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        flax_npz.read(path)


def test_what_is_no_archive(tmp_path, path):
    path.write_bytes(b"hello")
    with pytest.raises(FORMAT, match="zip archive"):
        flax_npz.read(path)
    with pytest.raises(FORMAT, match="directory"):
        flax_npz.read(tmp_path)
    save(path, {"a": np.zeros(3)})
    with pytest.raises(MISMATCH, match=r"begins with(.|\n)*\+ a"):
        flax_npz.read(path)
