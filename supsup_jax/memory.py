"""How much memory there is, so that what cannot fit is refused in words before it is tried."""

import os

import jax

from supsup_jax.types import CapacityError


def device_bytes() -> int:
    """Of the default device; where that is the CPU, or does not say, of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_room(num_bytes: int, capacity: int) -> None:
    """Raises CapacityError when a store of `capacity` takes more bytes than there are."""
    if num_bytes > (room := device_bytes()):
        raise CapacityError(
            f"a store of capacity {capacity:,} takes {num_bytes:,} bytes, and there are {room:,}: "
            "split the tasks over several stores and let one_shot_streamed read them in turn"
        )
