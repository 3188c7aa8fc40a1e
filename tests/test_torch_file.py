"""PyTorch's pickled files, written by torch; hostile ones by hand."""

import importlib.util
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile

import helpers
import numpy as np
import pytest

from bit_tf import errors
from bit_tf.checkpoints import pytorch, rename, torch_file

with_torch = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("torch"),
        reason="needs torch: "
        "pip install -c constraints.txt '.[oracle]', then pytest -m slow",
    ),
    pytest.mark.filterwarnings("ignore"),
]
MAGIC = 0x1950A86A20F9469CFC6C
NAMES = ("zip", "legacy")


def needs_torch(function):
    for mark in with_torch:
        function = mark(function)
    return function


def save(value, path, kind="zip"):
    import torch

    torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def small():
    import torch

    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(6.0).reshape(2, 3).T,
        "h": torch.tensor([1.5, -2.5]).half(),
        "bf": torch.tensor([[1.5], [-2.5]]).bfloat16().T,
        "d": torch.tensor(7.0, dtype=torch.float64),
        "i": torch.tensor([3]),
        "p": torch.nn.Parameter(torch.ones(2)),
    }


def state_dict(scheme, arrays):
    """Weights as torch tensors, under a source's names."""
    import torch

    return {
        scheme.spell(name): torch.from_numpy(scheme.encode(name, array).copy())
        for name, array in arrays.items()
    }


class Evil:
    """Runs a command when it is unpickled by pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil(path, kind, target, wrap=lambda value: value):
    """A file of torch's form whose pickle would make a file at target."""
    return pickled(path, kind, pickle.dumps(wrap(Evil(target)), protocol=2))


def pickled(path, kind, text, keys=()):
    """A file of torch's form with this pickle."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", text)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    else:
        head = [MAGIC, 1001, {"little_endian": True}]
        path.write_bytes(
            b"".join(pickle.dumps(value, protocol=2) for value in head)
            + text
            + pickle.dumps(list(keys), protocol=2)
        )
    return path


@pytest.mark.parametrize("kind", NAMES)
def test_sniff_needs_no_torch(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = evil(tmp_path / "x.bin", kind, tmp_path / "made")
    assert torch_file.sniff(path)
    assert pytorch.sniff(path)
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[torch\]") as e:
        torch_file.tensors(path)
    assert "safetensors file of the same weights needs no torch" in str(e.value)
    raw = path.read_bytes()
    for cut in range(0, len(raw) - 1, max(1, len(raw) // 40)):
        path.write_bytes(raw[:cut])
        assert torch_file.sniff(path) == (kind == "legacy" and cut >= 15)


def test_garbage_is_not_sniffed(tmp_path):
    path = tmp_path / "x"
    for raw in (
        b"",
        b"\x80\x02}.",
        b"PK\x03\x04",
        b"PK\x03\x04" + bytes(100),
        *(np.random.default_rng(seed).bytes(200) for seed in range(30)),
    ):
        path.write_bytes(raw)
        assert not torch_file.sniff(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/xdata.pkl", b"")
        archive.writestr("a.npy", b"")
    assert not torch_file.sniff(path)
    assert not torch_file.sniff(tmp_path)
    assert not torch_file.sniff(tmp_path / "none")
    assert not torch_file.sniff("\0")


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13", "0.4.1", "?"])
def test_an_unsafe_torch_is_not_used(tmp_path, monkeypatch, version):
    fake = types.ModuleType("torch")
    fake.__version__ = version
    monkeypatch.setitem(sys.modules, "torch", fake)
    path = evil(tmp_path / "x.bin", "zip", tmp_path / "made")
    with pytest.raises(errors.MissingExtraError, match=r"torch 2\.6 or later"):
        torch_file.tensors(path)


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_tensors(tmp_path, kind):
    import ml_dtypes

    path = save(small() | {"step": 7}, tmp_path / "x.pth", kind)
    assert torch_file.sniff(path)
    opened = torch_file.tensors(path)
    assert opened.extra == ("step",)
    assert opened.notes == ()
    expected = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "h": np.float16([1.5, -2.5]),
        "bf": np.array([[1.5, -2.5]], ml_dtypes.bfloat16),
        "d": np.array(7.0),
        "i": np.array([3]),
        "p": np.ones(2, np.float32),
    }
    assert opened.entries.keys() == expected.keys()
    for name, array in expected.items():
        entry = opened.entries[name]
        assert (entry.shape, entry.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(entry.load(), array, strict=True)
        loaded = entry.load()
        loaded[...] = 0
        np.testing.assert_array_equal(entry.load(), array)


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"state_dict": v}])
def test_nothing_in_a_pickle_is_executed(tmp_path, kind, wrap):
    target = tmp_path / "made"
    path = evil(tmp_path / "x.bin", kind, target, wrap)
    with pytest.raises(
        errors.CheckpointFormatError, match="Nothing of it was executed"
    ) as caught:
        torch_file.tensors(path)
    assert "system" in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not target.exists()
    with pytest.raises(errors.CheckpointFormatError):
        pytorch.read(path)
    assert not target.exists()
    # The test's own weapon works.
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists()


def test_a_plain_pickle_is_refused_unopened(tmp_path):
    target = tmp_path / "made"
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(Evil(target)))
    assert not pytorch.sniff(path)
    with pytest.raises(errors.CheckpointFormatError, match="a Python pickle"):
        pytorch.read(path)
    assert not target.exists()


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_refused_tensors_are_named(tmp_path, kind):
    import torch

    refused = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "stretched": torch.zeros(1).expand(2**40),
    }
    path = save(small() | refused, tmp_path / "x.bin", kind)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        torch_file.tensors(path)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == list(refused)


@needs_torch
@pytest.mark.parametrize("value", [7, [1], None])
def test_no_dict(tmp_path, value):
    path = save(value, tmp_path / "x.bin")
    with pytest.raises(errors.CheckpointFormatError, match="dict of tensors"):
        torch_file.tensors(path)


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema"])
def test_wrapped_state_dicts(tmp_path, kind, wrapper):
    import torch

    value = {
        "epoch": 3,
        wrapper: small(),
        "optimizer": {"state": {0: {"m": torch.ones(2), "v": [torch.ones(1)]}}},
    }
    opened = torch_file.tensors(save(value, tmp_path / "x.bin", kind))
    assert opened.entries.keys() == small().keys()
    assert opened.extra == ("epoch",)
    assert opened.notes == (
        f"The weights are the file's {wrapper!r}.",
        "skipped optimizer state: optimizer (2 arrays)",
    )


@needs_torch
def test_of_two_state_dicts_one_is_read_and_both_are_named(tmp_path):
    import torch

    value = {"state_dict_ema": small(), "state_dict": {"x": torch.ones(1)}}
    opened = torch_file.tensors(save(value, tmp_path / "x.bin"))
    assert opened.entries.keys() == {"x"}
    assert opened.notes == (
        "The weights are the file's 'state_dict'.",
        "Not read: 'state_dict_ema'.",
    )


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_truncated_and_damaged_files(tmp_path, kind):
    path = save(small(), tmp_path / "x.bin", kind)
    raw = path.read_bytes()
    for cut in range(0, len(raw) - 1, len(raw) // 40):
        path.write_bytes(raw[:cut])
        with pytest.raises(errors.BitTfError):
            pytorch.read(path)
        with pytest.raises(errors.CheckpointFormatError):
            torch_file.tensors(path)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        damaged = bytearray(raw)
        for place in rng.integers(len(raw), size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            for entry in torch_file.tensors(path).entries.values():
                entry.load()
        except errors.CheckpointFormatError:
            pass


@needs_torch
def test_compressed_archives_are_refused(tmp_path):
    path = save(small(), tmp_path / "x.bin")
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(errors.CheckpointFormatError, match="compressed"):
        torch_file.tensors(tmp_path / "y.bin")


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_a_file_that_shrinks_is_an_error_and_not_a_crash(tmp_path, kind):
    import torch

    path = save({"w": torch.ones(100_000)}, tmp_path / "x.bin", kind)
    load = torch_file.tensors(path).entries["w"].load
    assert load().sum() == 100_000
    os.truncate(path, 100)
    with pytest.raises(errors.CheckpointFormatError, match="w cannot be read"):
        load()


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
@pytest.mark.parametrize(
    "scheme",
    [rename.TIMM, rename.TRANSFORMERS, rename.TRANSFORMERS_BARE],
    ids=["timm", "transformers", "bare"],
)
def test_weights_are_bit_identical(tmp_path, kind, prefix, wrapper, scheme):
    classes = 0 if scheme is rename.TRANSFORMERS_BARE else 10
    arrays = helpers.random_arrays((1, 1, 1, 1), 32, classes)
    value = {
        prefix + name: tensor
        for name, tensor in state_dict(scheme, arrays).items()
    }
    if wrapper:
        value = {wrapper: value}
    found = pytorch.read(save(value, tmp_path / "x.bin", kind))
    assert found.format == scheme.name
    assert found.extra == ()
    assert found.facts.numerics == "timm"
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found.sources[name] == prefix + scheme.spell(name)


@needs_torch
def test_mutations_are_named(tmp_path):
    import torch

    arrays = helpers.random_arrays((1, 1, 1, 1), 32, 10)
    name = "stages.2.blocks.0.conv2.weight"
    canonical = "block3/unit01/b/standardized_conv2d/kernel"
    whole = state_dict(rename.TIMM, arrays)
    for change, where in (
        (lambda t: t.permute(2, 3, 1, 0), canonical),
        (lambda t: t[:-1], canonical),
        (lambda t: t.int(), name),
        (lambda t: t.to_sparse(), name),
        (lambda t: t.to(torch.complex64), name),
        (lambda t: None, canonical),
    ):
        path = save(
            {**whole, "module": 1, name: change(whole[name])},
            tmp_path / "x.bin",
        )
        with pytest.raises(errors.CheckpointError, match=where):
            pytorch.read(path)
    broken = whole[name].clone()
    broken[1, 2, 0, 1] = float("nan")
    found = pytorch.read(save({**whole, name: broken}, tmp_path / "x.bin"))
    with pytest.raises(errors.CheckpointFormatError, match=name):
        found[canonical]


@needs_torch
def test_bfloat16_weights(tmp_path):
    arrays = helpers.random_arrays((1, 1, 1, 1), 32, 10)
    value = {
        name: tensor.bfloat16()
        for name, tensor in state_dict(rename.TIMM, arrays).items()
    }
    found = pytorch.read(save(value, tmp_path / "x.bin"))
    for name, tensor in value.items():
        canonical = rename.TIMM.canonical(name)
        assert found.dtypes[canonical].name == "bfloat16"
        np.testing.assert_array_equal(
            found[canonical],
            rename.TIMM.decode(canonical, tensor.float().numpy()),
            strict=True,
        )


@needs_torch
def test_shards(tmp_path):
    import json

    arrays = helpers.random_arrays((1, 1, 1, 1), 32, 10)
    value = state_dict(rename.TRANSFORMERS, arrays)
    names = sorted(value)
    parts = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, part in parts.items():
        save({name: value[name] for name in part}, tmp_path / file)
    where = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for path in (tmp_path, index):
        assert pytorch.sniff(path)
        found = pytorch.read(path)
        assert found.path == tmp_path
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    where["bit.norm.weight"] = "a.bin"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        errors.CheckpointFormatError, match=r"bit\.norm\.weight"
    ):
        pytorch.read(tmp_path)


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def called(name, args):
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + args + b"R"


def storage(size, key="0"):
    return (
        b"(" + string("storage") + b"ctorch\nFloatStorage\n" + string(key)
        + string("cpu") + b"J" + struct.pack("<i", size) + b"tQ"
    )  # fmt: skip


def tensor(size, shape, stride=1):
    return called(
        "torch._utils _rebuild_tensor_v2",
        b"(" + storage(size) + b"K\0J" + struct.pack("<i", shape)
        + b"\x85K" + bytes([stride]) + b"\x85\x89"
        + called("collections OrderedDict", b")") + b"t",
    )  # fmt: skip


DEEP = b")" + b"\x85" * 900_000
DOUBLED = b")q\0" + b"h\0\x86q\0" * 60
HUGE = b"J" + struct.pack("<i", 2_000_000_000) + b"\x85"
HOSTILE = {
    "a deep key": b"}" + b")" + b"\x85" * 2_000_000 + b"Ns",
    "a less deep key": b"}" + DEEP + b"Ns",
    "a deep value": b"}" + string("a") + DEEP + b"s",
    "a doubled key": b"}" + DOUBLED + b"Ns",
    "a set": b"}" + string("a")
    + called("__builtin__ set", b"](" + DOUBLED + b"e\x85") + b"s",
    "pairs": called("collections OrderedDict", b"](" + DOUBLED
    + b"K\1\x86e\x85"),
    "counted": called("collections Counter", b"](" + DOUBLED + b"e\x85"),
    "bytes": b"}" + string("a") + called("builtins bytearray", HUGE) + b"s",
    "bytes of Python 2":
    b"}" + string("a") + called("__builtin__ bytearray", HUGE) + b"s",
    "new bytes":
    b"}" + string("a") + b"cbuiltins\nbytearray\n" + HUGE + b"\x81s",
    "a new tensor":
    b"}" + string("a") + b"ctorch\nTensor\n" + HUGE + b"\x81s",
    "a called tensor": b"}" + string("a") + called("torch Tensor", HUGE) + b"s",
    "bytes made by a tensor's maker": b"}" + string("a") + called(
        "torch._tensor _rebuild_from_type_v2",
        b"(ctorch\nFloatTensor\nctorch\nTensor\n" + HUGE + b"}t",
    ) + b"s",
    "text copied": b"](" + string("x" * 4000) + b"q\0"
    + called("_codecs encode", b"h\0" + string("latin1") + b"\x86") * 2
    + b"e",
    "numbers copied": b"](](" + b"K\1" * 3000 + b"e\x85q\0"
    + called("__builtin__ set", b"h\0") * 9 + b"e",
    "a slow codec": b"}" + string("a") + called(
        "_codecs encode", string("x" * 3000) + string("punycode") + b"\x86"
    ) + b"s",
    "a tensor beyond": b"}" + string("a") + tensor(1, 10**9) + b"s",
    "a storage beyond": b"}" + string("a") + tensor(10**9, 1) + b"s",
    "strides beyond": b"}" + string("a") + tensor(4, 4, 2) + b"s",
    "many opcodes": b"](" + b"N" * 1_000_001 + b"e",
}  # fmt: skip
READ_ALL = """
import pathlib, resource, sys
from bit_tf import errors
from bit_tf.checkpoints import torch_file
import ml_dtypes, torch
started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    print(path.name, flush=True, end=": ")
    try:
        torch_file.tensors(path)
    except errors.CheckpointFormatError as error:
        print("refused")
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started
print("memory", "taken" if taken > 500_000 else "kept")
"""


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_nothing_hostile_hangs_or_takes_memory_or_ends_the_process(
    tmp_path, kind
):
    for name, text in HOSTILE.items():
        pickled(tmp_path / name, kind, b"\x80\2" + text + b".", ["0"])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_ALL, tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.stdout.splitlines() == [
        *(f"{name}: refused" for name in sorted(HOSTILE)),
        "memory kept",
    ], run.stderr


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a deep value", "more than 100 deep"),
        ("a doubled key", "a key that is"),
        ("bytes", r"GLOBAL builtins\.bytearray"),
        ("a new tensor", r"GLOBAL torch\.Tensor"),
        ("text copied", "make more than the file holds"),
        ("numbers copied", "make more than the file holds"),
        ("a slow codec", r"unusual call of _codecs\.encode"),
        ("a tensor beyond", "beyond its storage of 1 values"),
        ("strides beyond", "beyond its storage of 4 values"),
        ("a storage beyond", "not in the file"),
        ("many opcodes", "more than 1000000 opcodes"),
    ],
)
def test_what_is_hostile_is_refused_by_the_rule(tmp_path, kind, name, why):
    text = b"\x80\2" + HOSTILE[name] + b"."
    path = pickled(tmp_path / "x", kind, text, ["0"])
    with pytest.raises(errors.CheckpointFormatError, match=why):
        torch_file.tensors(path)


@needs_torch
@pytest.mark.parametrize("method", ["get", "items", "values", "__class__"])
@pytest.mark.parametrize("kind", NAMES)
def test_values_do_not_hide_methods(tmp_path, kind, method):
    """An OrderedDict's state may have any names."""
    odd = called("collections OrderedDict", b")") + b"}" + string(method)
    odd += b"K\1sb"
    text = b"\x80\2" + odd + b"(" + string("state_dict") + odd
    text += string("a") + b"K\1s" + string("optimizer") + odd + b"u."
    opened = torch_file.tensors(pickled(tmp_path / "x", kind, text))
    assert opened.extra == ("a",)
    assert opened.notes[-1] == "skipped optimizer state: optimizer (0 arrays)"


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_attributes_of_tensors(tmp_path, kind):
    import torch

    for value in (torch.ones(2), torch.nn.Parameter(torch.ones(2))):
        value.remark = ["any"]
        path = save({"w": value}, tmp_path / "x", kind)
        array = torch_file.tensors(path).entries["w"].load()
        np.testing.assert_array_equal(array, np.ones(2, np.float32))
        value.resolve_neg = 1
        save({"w": value}, path, kind)
        with pytest.raises(
            errors.CheckpointFormatError, match="its own resolve_neg"
        ):
            torch_file.tensors(path)


@needs_torch
def test_storages_without_data_are_refused(tmp_path):
    text = b"\x80\2}" + string("a") + tensor(4, 4) + b"s."
    path = pickled(tmp_path / "x", "legacy", text)
    with pytest.raises(errors.CheckpointFormatError, match="list of storages"):
        torch_file.tensors(path)
    path = pickled(tmp_path / "y", "zip", text)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(8))
        archive.writestr("archive/other", bytes(100))
    with pytest.raises(errors.CheckpointFormatError, match="8 bytes of its 16"):
        torch_file.tensors(path)


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_training_checkpoints(tmp_path, kind, optimizer):
    import collections

    import torch

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)
    )
    model[1].bias = model[1].weight
    steps = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(steps, [2, 2, 5])
    for _ in range(3):
        model(torch.ones(1, 3, 5, 5)).sum().backward()
        steps.step()
        schedule.step()
    weights = model.state_dict()
    assert weights._metadata
    value = {
        "state_dict": weights,
        "optimizer": steps.state_dict(),
        "schedule": schedule.state_dict(),
        "random": (random.Random(0).getstate(), torch.get_rng_state()),
        "odd": [
            2**200, -1.5, None, True, 1j, {1, "a"}, b"ab", torch.Size([1]),
            torch.device("cpu"), torch.float16, "x" * 5000,
            collections.Counter("aab"), {1: 2, None: 3, 1.5: [()]},
        ],
        "best": torch.tensor(0.5),
    }  # fmt: skip
    path = save(value, tmp_path / "x", kind)
    assert torch.load(path, weights_only=True).keys() == value.keys()
    opened = torch_file.tensors(path)
    assert opened.extra == ("best", "odd", "random", "schedule")
    assert any("skipped optimizer state" in note for note in opened.notes)
    assert opened.entries.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(
            opened.entries[name].load(), tensor.numpy(), strict=True
        )


@needs_torch
@pytest.mark.parametrize("kind", NAMES)
def test_what_else_is_pickled_is_named(tmp_path, kind):
    import argparse

    import torch

    for value, name in (
        (argparse.Namespace(a=1), "argparse.Namespace"),
        (np.float64(0.5), np.float64(0.5).__reduce__()[0].__module__),
        (bytearray(b"a"), "builtins.bytearray"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    ):
        path = save({"state_dict": small(), "x": value}, tmp_path / "x", kind)
        with pytest.raises(
            errors.CheckpointFormatError,
            match=rf"only\. Received: GLOBAL {name}(\.scalar)?\. Nothing of it",
        ):
            torch_file.tensors(path)


@needs_torch
def test_what_torch_itself_refuses_is_named(tmp_path):
    text = b"\x80\2}" + string("a") + b"ctorch._C._x\nNothing\ns."
    path = pickled(tmp_path / "x", "zip", text)
    with pytest.raises(
        errors.CheckpointFormatError,
        match=r"Received: GLOBAL torch\._C\._x\.Nothing\. Nothing of it",
    ):
        torch_file.tensors(path)


@needs_torch
def test_damage_is_named_by_the_first_tensor_that_has_it(tmp_path, monkeypatch):
    import torch

    value = {"a": torch.arange(100.0), "b": torch.arange(200.0)}
    value |= {
        "tied": value["b"],
        "part": value["b"][3:9],
        "none": value["a"][:0],
    }
    path = save(value, tmp_path / "x")
    good = path.read_bytes()
    checked = []
    check = torch_file._check_sum
    monkeypatch.setattr(
        torch_file,
        "_check_sum",
        lambda file, member: (checked.append(member), check(file, member)),
    )
    opened = torch_file.tensors(path)
    checked.clear()
    for name in (*value, *value):
        np.testing.assert_array_equal(
            opened.entries[name].load(), value[name].numpy()
        )
    assert len(checked) == 2
    at = good.index(value["b"].numpy().tobytes()) + 500
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    opened = torch_file.tensors(path)
    np.testing.assert_array_equal(opened.entries["a"].load(), value["a"])
    for name in ("b", "tied", "part"):
        with pytest.raises(
            errors.CheckpointFormatError, match=f": {name} cannot be.*CRC-32"
        ):
            opened.entries[name].load()
    at = good.index(b"little")
    path.write_bytes(good[:at] + b"L" + good[at + 1 :])
    with pytest.raises(
        errors.CheckpointFormatError, match=r"byteorder.*CRC-32"
    ):
        torch_file.tensors(path)


@needs_torch
def test_files_without_checksums(tmp_path):
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        path = save(small(), tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    opened = torch_file.tensors(path)
    for name, tensor in small().items():
        array = opened.entries[name].load().astype(np.float64)
        np.testing.assert_array_equal(array, tensor.detach().double().numpy())
