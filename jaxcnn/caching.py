"""A cache for functions of nets and losses, which users define and which may not be hashable."""

import functools
from collections.abc import Callable
from typing import Any


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``make`` with a cache for its last 64 results; calls with unhashable arguments are not cached."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make, updated=())
    def wrapper(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return cached(*args)

    return wrapper
