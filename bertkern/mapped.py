"""Tensors that lie in a mapped file, as transformers loads them: what was read counts as memory until it is let go."""

import ctypes
import mmap
import sys
from array import array

from torch import Tensor

# Bits 61 to 63 of an entry of /proc/self/pagemap: of a file or shared, swapped out, present. A page with any other
# value was changed since it was read, or never was a file's: there is no other copy of it.
_UNREAD, _FILE, _PRESENT_FILE = 0b000, 0b001, 0b101


def release(tensor: Tensor) -> bool:
    """Lets go of the pages that `tensor` was read from, if they are a file's; its values stay what they are.

    Without this, a model from a file that becomes int8 layer by layer would stay resident beside its int8 form, as long
    as any tensor of the file lives. The next access reads the pages anew, from the system's cache.

    Returns:
        Whether it was done: not for memory of another kind, nor where a value was changed, nor outside Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    # Whole pages only: those at both ends hold values of neighbours, too.
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    if count <= 0:
        return False
    entries = array("Q", bytes(8 * count))
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            if pagemap.readinto(memoryview(entries).cast("B")) != 8 * count:
                return False
    except OSError:
        return False
    if not {entry >> 61 for entry in entries} <= {_UNREAD, _FILE, _PRESENT_FILE}:
        return False
    address, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
    return ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED) == 0
