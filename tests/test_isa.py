"""Which instruction set the kernels use, and the variable that caps it."""

from pathlib import Path

import pytest
import torch

from bertkern import _lib  # noqa: F401  registers the operators

_host = pytest.importorskip("bertkern._host", reason="the host module was built for another Python")

LEVELS = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
DETECTED = _host.cpu()["isa"]
ASK = "import torch; from bertkern import _lib; print(torch.ops.bertkern.cpu_isa())"


def flags_of_linux() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_detection_agrees_with_the_kernel():
    """Linux hides flags whose registers it does not save, so its list is an independent answer to the same question."""
    needs = [
        set(),
        {"avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        {"avx512_vnni"},
        {"avx512_bf16"},
        {"amx_tile", "amx_int8", "amx_bf16"},
    ]
    flags, expected = flags_of_linux(), "portable"
    for name, need in zip(LEVELS, needs, strict=True):
        if not need <= flags:
            break
        expected = name
    assert expected == DETECTED


@pytest.mark.parametrize("cap", LEVELS)
def test_cap(cap, run_python):
    done = run_python(ASK, BERTKERN_CPU_ISA=cap)
    assert done.returncode == 0, done.stderr
    level, best = LEVELS.index(cap), LEVELS.index(DETECTED)
    assert int(done.stdout) == min(level, best)
    warnings = [line for line in done.stderr.splitlines() if "BERTKERN_CPU_ISA" in line]
    expected = f"bertkern: BERTKERN_CPU_ISA={cap} is more than this processor has; using {DETECTED}."
    assert warnings == ([expected] if level > best else [])


@pytest.mark.parametrize("cap", [None, ""])
def test_no_cap(cap, run_python):
    done = run_python(ASK, BERTKERN_CPU_ISA=cap)
    assert done.returncode == 0, done.stderr
    assert LEVELS[int(done.stdout)] == DETECTED


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 ", "4"])
def test_unknown_cap_is_refused_at_every_call(name, run_python):
    ask_twice = (
        "import torch; from bertkern import _lib\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        torch.ops.bertkern.cpu_isa()\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0])\n"
    )
    done = run_python(ask_twice, BERTKERN_CPU_ISA=name)
    assert done.returncode == 0, done.stderr
    line = f"BERTKERN_CPU_ISA: expected one of {', '.join(LEVELS)}. Got '{name}'."
    assert done.stdout.splitlines() == [line, line]


def test_cap_is_read_once(run_python):
    done = run_python(f"{ASK}\nimport os; os.environ['BERTKERN_CPU_ISA'] = 'portable'\n{ASK}", BERTKERN_CPU_ISA=None)
    first, second = done.stdout.split()
    assert first == second


def test_caches_are_plausible():
    cpu = _host.cpu()
    assert 2**13 <= cpu["l1d"] <= 2**20
    assert cpu["l1d"] <= cpu["l2"] <= 2**28
    assert cpu["l3"] == 0 or cpu["l2"] <= cpu["l3"] <= 2**32
    assert cpu["cores"] >= 1


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp32"])
def test_peak(dtype):
    assert 0.01 < _host.peak(dtype, threads=1, seconds=0.002) < 1e6


def test_probes_refuse_nonsense():
    with pytest.raises(ValueError, match=r"peak: expected dtype int8, bf16 or fp32\. Got 'int7'\."):
        _host.peak("int7")
    with pytest.raises(ValueError, match=r"read_bandwidth: expected threads in \[1, 4096\]\. Got 0\."):
        _host.read_bandwidth(0)
    assert _host.read_bandwidth(1, megabytes=8) > 0.1


def test_operator_and_host_module_agree():
    assert LEVELS[torch.ops.bertkern.cpu_isa()] == _host.active_isa()
