"""Pages of a mapped file are let go of, and nothing else is."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from bertkern.mapped import release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
COUNT = 2**20  # floats: 4 MB


def resident(tensor: torch.Tensor) -> int:
    """Resident kB of the mapping that `tensor` begins in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and first == "Rss:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.fixture
def mapped(tmp_path) -> torch.Tensor:
    """The numbers from 0 to COUNT in a file, all of them read."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(torch.arange(COUNT, dtype=torch.float32).numpy().tobytes())
    tensor = torch.from_file(str(path), shared=False, size=COUNT, dtype=torch.float32)
    assert float(tensor.max()) == COUNT - 1
    return tensor


def test_pages_that_were_only_read_go(mapped):
    assert resident(mapped) >= 4096
    assert release(mapped)
    assert resident(mapped) < 64
    assert torch.equal(mapped, torch.arange(COUNT, dtype=torch.float32))


def test_a_part_takes_nothing_from_its_neighbours(mapped):
    part = mapped[1000 : COUNT // 2]
    assert release(part)
    assert 2048 <= resident(mapped) <= 2048 + 64


def test_small_tensors_that_stand_side_by_side_go_together(mapped):
    small = list(mapped[: COUNT // 2].split(100))
    assert not any(release(tensor) for tensor in small[:50])
    assert release(*reversed(small))
    assert resident(mapped) <= 2048 + 64
    assert torch.equal(mapped, torch.arange(COUNT, dtype=torch.float32))


def test_changed_values_stay(mapped):
    mapped[COUNT // 2] = -1
    assert not release(mapped)
    assert float(mapped[COUNT // 2]) == -1
    # The pages before and behind went.
    assert resident(mapped) < 64
    assert torch.equal(mapped[COUNT // 2 + 1 :], torch.arange(COUNT // 2 + 1, COUNT, dtype=torch.float32))


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(COUNT), torch.ones(3), torch.ones(0), torch.ones(COUNT, device="meta"), torch.ones(1024, 1024).T],
    ids=["heap", "small", "empty", "meta", "transposed"],
)
def test_other_memory_is_left_alone(tensor):
    assert not release(tensor)
    if tensor.device.type == "cpu":
        assert bool((tensor == 1).all())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_is_freed_goes_back_to_the_system(run_python):
    code = """
import re, torch
import bertkern as bk
from pathlib import Path

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

def model():
    return torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(30))).eval()

bk.accelerate(model()[:1], measure=False)
# From here on malloc keeps what is as large as a weight, and the last piece keeps it from seeing an end of its heap.
large = torch.ones(7 * 2**20)
del large
sparse, last = model(), torch.ones(2**16)
with torch.no_grad():
    for linear in sparse:
        linear.weight[64:] = 0
before = resident()
bk.accelerate(sparse, measure=False)
print(before - resident())
"""
    done = run_python(code)
    assert int(done.stdout) > 80, done.stderr + done.stdout  # of 126 MB
