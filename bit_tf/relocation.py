"""Where models lie that a saved file says are elsewhere."""

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping

from bit_tf import addresses, errors

__all__ = ["moved", "moves_in_force", "relocated"]

# The innermost `relocated` comes first.
_MOVES: contextvars.ContextVar[tuple[dict[str, str], ...]] = (
    contextvars.ContextVar("moves", default=())
)


@contextlib.contextmanager
def relocated(
    moves: Mapping[str | os.PathLike[str], str | os.PathLike[str]],
) -> Iterator[None]:
    """Where models lie now, while files that name their handles are loaded.

        with hub.relocated({"https://old.example": "https://new.example"}):
            model = keras.saving.load_model("model.keras", safe_mode=False)

    A handle of a file is looked up whole; else by the longest beginning of it
    that ends before a "/". What an inner `relocated` does not name, an outer
    one may. Other threads, and the layers that code makes itself, are not
    affected. The layers are of the new handles from then on, also where they
    are saved. Users, passwords and queries are not compared: a file has none,
    and those of a new handle are used.

    Args:
      moves: old handle or beginning of handles → new one. A path that is
        relative means the one below the present directory.

    Raises:
      ValueError: it is no such mapping.
      HandleError: one of them is a malformed address.
    """
    if not isinstance(moves, Mapping):
        raise ValueError(_rule(moves))
    table = {
        addresses.public(_place(old)).rstrip("/"): _place(new)
        for old, new in moves.items()
    }
    token = _MOVES.set((table, *_MOVES.get()))
    try:
        yield
    finally:
        _MOVES.reset(token)


def moves_in_force() -> list[dict[str, str]]:
    """What the `relocated` around say, the outermost first."""
    return [dict(table) for table in reversed(_MOVES.get())]


def moved(handle: str) -> str:
    """The handle that takes the place of one in a file; mostly itself.

    Args:
      handle: as a file has it.
    """
    plain = addresses.public(handle).rstrip("/")
    for table in _MOVES.get():
        beginnings = [
            old for old in table if old == plain or plain.startswith(f"{old}/")
        ]
        if beginnings:
            old = max(beginnings, key=len)
            return table[old] + plain[len(old) :]
    return handle


def _place(place: str | os.PathLike[str]) -> str:
    """An address or absolute path without "/" at its end."""
    if not isinstance(place, (str, bytes, os.PathLike)) or not place:
        raise ValueError(_rule(place))
    return addresses.absolute(os.fsdecode(place)).rstrip("/")


def _rule(received: object) -> str:
    return (
        "relocated takes a dict of old handles, or beginnings of handles, and "
        'new ones, such as {"https://old.example": "/models"}. Received: '
        f"{errors.brief(received)}."
    )
