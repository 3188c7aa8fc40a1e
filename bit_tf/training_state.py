"""Where a training run stands: one file, replaced whole at every checkpoint.

An .npz archive of the model's variables, the optimizer's, and `state.json`,
which holds the step, the settings that must be the same when the run goes on,
and the history. A process that is killed while it writes leaves the older file.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bit_tf import errors, files

__all__ = ["State", "differences", "fingerprint", "read", "restore", "write"]

_FORMAT = 1
_JSON = "state.json"
_MAX_JSON = 1 << 28
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class State:
    """What a file says, but for the arrays.

    Attributes:
      path: the file.
      step: steps done.
      settings: what `write` was given.
      rows: the history until then.
    """

    path: pathlib.Path
    step: int
    settings: dict[str, Any]
    rows: list[dict[str, Any]]


def fingerprint(variables: Iterable[Any]) -> str:
    """SHA-256, in hexadecimal, of the values, shapes and order of variables.

    Args:
      variables: keras.Variables.
    """
    digest = hashlib.sha256()
    for variable in variables:
        array = _stored(variable)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write(
    path: str | os.PathLike[str],
    step: int,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> None:
    """Replaces the state's file.

    Args:
      path: the file; its folder exists.
      step: steps done.
      settings, rows: of JSON's types.
      variables: name → keras.Variable.

    Raises:
      FloatingPointError: a variable holds NaN or infinity; what was there is
        kept.
      OSError: it cannot be written; what was there is kept.
    """
    described = json.dumps(
        {
            "format": _FORMAT,
            "step": step,
            "settings": dict(settings),
            "rows": rows,
        }
    )
    with (
        files.new_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(_JSON, described)
        for name, variable in variables.items():
            array = _stored(variable)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise FloatingPointError(name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read(path: str | os.PathLike[str]) -> State | None:
    """What the file says; None if there is none.

    Raises:
      TrainingError: it is damaged.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_JSON) as member:
            found = json.loads(member.read(_MAX_JSON))
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']!r}")
        step, settings, rows = found["step"], found["settings"], found["rows"]
        if type(step) is not int or not (
            isinstance(settings, dict)
            and isinstance(rows, list)
            and all(isinstance(row, dict) for row in rows)
            and 0 <= step == len(rows)
        ):
            raise ValueError("no step, settings and rows")
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    return State(path, step, settings, rows)


def restore(state: State, variables: Mapping[str, Any]) -> None:
    """Assigns all variables, after a look at all names, shapes and dtypes.

    Args:
      state: of `read`.
      variables: name → keras.Variable, those that `write` was given.

    Raises:
      TrainingError: the file is damaged, or of another model.
    """
    try:
        with zipfile.ZipFile(state.path) as archive:
            names = {
                name.removesuffix(".npy")
                for name in archive.namelist()
                if name != _JSON
            }
            if names != set(variables):
                raise ValueError(
                    f"{len(names)} arrays for {len(variables)} variables"
                )
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad}")
            for name, variable in variables.items():
                with archive.open(f"{name}.npy") as member:
                    array = np.lib.format.read_array(
                        io.BytesIO(member.read()), allow_pickle=False
                    )
                if array.shape != tuple(variable.shape):
                    raise ValueError(f"{name} of shape {array.shape}")
                variable.assign(array)
    except _READ_ERRORS as error:
        raise _damaged(state.path, error) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "name: before → now" of settings that are not the same.

    What is inside of another setting has a name such as "rule.batch_size".
    """
    # Through JSON, so that tuples are lists on both sides.
    now = _flat(json.loads(json.dumps(dict(now))))
    before = _flat(before)
    return [
        f"{name}: {errors.brief(before.get(name))} → "
        f"{errors.brief(now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            for inner, leaf in _flat(value).items():
                found[f"{name}.{inner}"] = leaf
        else:
            found[name] = value
    return found


def _stored(variable: Any) -> np.ndarray:
    """The value as the file has it: bfloat16, which NumPy lacks, as float32."""
    array = np.asarray(variable.numpy())
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _damaged(path: pathlib.Path, error: BaseException) -> errors.TrainingError:
    return errors.TrainingError(
        "A run goes on from the state that it has written. Received: "
        f"{str(path)!r}, which is damaged or of another model ({error}). Begin "
        "anew with --restart (restart=True), or in another output directory."
    )
