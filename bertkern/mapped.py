"""Memory that a model no longer needs goes back to the system: pages of mapped files, and what malloc keeps."""

import ctypes
import mmap
import sys
from array import array
from itertools import groupby

from torch import Tensor

# Bits 61 to 63 of an entry of /proc/self/pagemap: of a file or shared, swapped out, present. A page with any other
# value was changed since it was read, or never was a file's: there is no other copy of it.
_DROPPABLE = frozenset((0b000, 0b001, 0b101))
# Bytes between tensors of a file that stand side by side: what aligns the second.
GAP = 64


def release(*tensors: Tensor) -> bool:
    """Lets go of the pages that `tensors` were read from, if they are a file's; the values stay what they are.

    transformers loads tensors that lie in a mapped file. Without this, a model that becomes int8 layer by layer would
    stay resident beside its int8 form, as long as any tensor of the file lives. The next access reads the pages anew,
    from the system's cache.

    Of tensors that stand side by side, as a file has them, the pages that they share go, too. At the ends of such a row
    whole pages alone go: the others hold values of tensors that nobody named.

    Returns:
        Whether all these pages went: not those of memory of another kind, nor any where a value was changed, nor any
        outside Linux.
    """
    if sys.platform != "linux":
        return False
    rows: list[list[int]] = []
    for start, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if _has_bytes(t)):
        if rows and start <= rows[-1][1] + GAP:
            rows[-1][1] = max(end, rows[-1][1])
        else:
            rows.append([start, end])
    spans = [(-(-start // mmap.PAGESIZE), end // mmap.PAGESIZE) for start, end in rows]
    went = [_let_go(first, stop - first) for first, stop in spans if first < stop]
    return bool(went) and all(went)


def _has_bytes(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > 0


def _let_go(first: int, count: int) -> bool:
    """Drops those of `count` pages that are a file's and unchanged; whether these were all."""
    entries = array("Q", bytes(8 * count))
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            if pagemap.readinto(memoryview(entries).cast("B")) != 8 * count:
                return False
    except OSError:
        return False
    done, at = True, first
    for droppable, run in groupby(entry >> 61 in _DROPPABLE for entry in entries):
        pages = sum(1 for _ in run)
        if droppable:
            address, size = ctypes.c_void_p(at * mmap.PAGESIZE), ctypes.c_size_t(pages * mmap.PAGESIZE)
            droppable = ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED) == 0
        done &= droppable
        at += pages
    return done


def trim() -> None:
    """Gives back what was freed: malloc keeps pieces of less than 32 MB, such as weights, for whoever comes next."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        give_back(ctypes.c_size_t(0))
