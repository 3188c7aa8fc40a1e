"""Work in processes of its own."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from typing import Any

__all__ = ["fresh"]


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
