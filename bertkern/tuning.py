"""In which form each linear layer runs: the fastest of bertkern's kernels on this machine, dense included.

One form per layer, whatever the number of rows: forms sum in different orders, and a row's result must not depend on
the rows beside it. Measured times are kept on disk, by machine, versions, shape and density.
"""

import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, ops
from .formats.bsr import BsrWeight
from .nn.sparse import DENSE, Form, pack_blocks
from .progress import LateBar

VERSION = 1
# Rows at which forms are compared: a sentence, and a batch or a long text.
ROWS = (16, 128)
# A sparse form has to win by this much, beyond what a timing is good for.
MARGIN = 0.98
# Of a form, in a measurement. Six once took forms that are 5 to 20 % slower, on a machine with other work.
_TURNS = 16
# Fewer zeros are not worth a look: break-even lies near 5 %.
LEAST_ZEROS = 0.03
# Weights whose shares of blocks differ by no more than this are alike.
_ALIKE = 0.02
# Forms that the cost model puts beyond this share are not timed.
_HOPELESS = 1.05
# Steps along K that the kernels' lists can tell apart (kSparseDwords in csrc).
_MOST_STEPS = 65536
_PER_DWORD = {torch.int8: 4, torch.bfloat16: 2}
# What reading a damaged file as JSON raises: no JSON, no text, or brackets without end.
_UNREADABLE = (ValueError, RecursionError)
# Warnings name the line that called accelerate or quantize_, three calls above.
_CALLER = 4
# Features that share a pattern, by layout, and the cost model: time as a share of the dense kernel's, fixed part and
# slope over the density of their micro-blocks. Fitted on one AVX-512 machine at 128 rows.
_COSTS: dict[tuple[str, int], tuple[float, float]] = {
    ("panels", 16): (0.05, 0.95),
    ("tokens", 4): (0.08, 1.00),
    ("tokens", 1): (0.02, 1.85),
}
# The same where a matrix unit (AMX) does the dense product and, of int8 alone, that of panels.
_MATRIX_COSTS: dict[torch.dtype, dict[tuple[str, int], tuple[float, float]]] = {
    torch.int8: {("panels", 16): (0.36, 1.70), ("tokens", 4): (0.20, 4.0), ("tokens", 1): (0.20, 8.0)},
    torch.bfloat16: {("panels", 16): (0.20, 8.0), ("tokens", 4): (0.20, 8.0), ("tokens", 1): (0.20, 16.0)},
}


@dataclass(frozen=True)
class Choice:
    """Why a layer runs in the form that it does.

    Attributes:
        form: the chosen one.
        shares: of every form that was compared, its time as a share of the dense kernel's.
        measured: whether these are measured; else they are the cost model's.
        weight: of which dtype and shape the weight is that this was found for; empty: of any.
        kept: the share of its blocks, of the form's size, that hold anything; of single weights where it is dense.
    """

    form: Form
    shares: Mapping[str, float] = field(default_factory=dict)
    measured: bool = False
    weight: str = ""
    kept: float = 0.0

    def __str__(self) -> str:
        others = ", ".join(f"{form} {share:.2f}" for form, share in self.shares.items())
        source = "measured" if self.measured else "estimated"
        return f"{source} time, dense = 1: {others}" if others else ""


@dataclass(frozen=True)
class Plan:
    """The form of every linear layer of a model, by name, as found on one machine.

    Attributes:
        layers: name -> Choice.
        machine: processor, instruction set, threads, GPUs where there are some, and versions of bertkern and torch.

    Example:
        >>> Plan.from_dict(Plan({"dense": Choice(DENSE)}).to_dict()).layers["dense"].form.layout
        'dense'
    """

    layers: Mapping[str, Choice]
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` reads."""
        layers = {
            name: {
                "form": str(c.form),
                "shares": dict(c.shares),
                "measured": c.measured,
                **({"weight": c.weight, "kept": c.kept} if c.weight else {}),
            }
            for name, c in self.layers.items()
        }
        return {"version": self.version, "machine": dict(self.machine), "layers": layers}

    @classmethod
    def from_dict(cls, values: Any) -> "Plan":
        """The plan of `to_dict`'s record; raises ValueError for anything else."""
        if not isinstance(values, dict) or values.get("version") != VERSION:
            got = values.get("version") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"Plan: expected version {VERSION}. Got {got!r}.")
        if not isinstance(values.get("layers"), dict) or not isinstance(values.get("machine"), dict):
            raise ValueError("Plan: expected layers and machine. Got others.")
        layers = {}
        for name, entry in values["layers"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("form"), str):
                raise ValueError(f"Plan: expected a form for {name}. Got {entry!r}.")
            shares = entry.get("shares", {})
            known = isinstance(shares, dict) and all(isinstance(share, (int, float)) for share in shares.values())
            weight, kept = entry.get("weight"), entry.get("kept")
            told = isinstance(weight, str) and isinstance(kept, (int, float))
            layers[name] = Choice(
                Form.parse(entry["form"]),
                shares if known else {},
                entry.get("measured") is True and known,
                *((weight, kept) if told else ()),
            )
        return cls(layers, values["machine"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """The plan of a file; raises ValueError where it is none, OSError where it cannot be read."""
        try:
            values = json.loads(Path(path).read_bytes())
        except _UNREADABLE as error:
            raise ValueError(f"Plan: expected {str(path)!r} to be JSON. Got {error}.") from None
        return cls.from_dict(values)


def machine() -> dict[str, Any]:
    """What times depend on beside the weight."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **({"gpu": " and ".join(sorted(set(gpus)))} if gpus else {}),
        "processor": _processor(),
        "isa": ops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "bertkern": __version__,
        "torch": torch.__version__,
    }


def usable(plan: "Plan | str | os.PathLike[str] | None") -> Plan | None:
    """`plan`, if it was made on such a machine; else None, with a warning that says so."""
    if plan is None:
        return None
    if not isinstance(plan, Plan):
        if not isinstance(plan, (str, os.PathLike)):
            raise TypeError(f"accelerate: expected plan to be a Plan or the path of one. Got {type(plan).__name__}.")
        try:
            plan = Plan.load(plan)
        except (ValueError, OSError) as error:
            warnings.warn(f"bertkern: the plan is made anew: {error}", stacklevel=_CALLER)
            return None
    here = machine()
    differing = [key for key, value in here.items() if plan.machine.get(key) != value]
    if differing:
        warnings.warn(
            f"bertkern: the plan is made anew: it was made with another {', '.join(differing)}.", stacklevel=_CALLER
        )
        return None
    return plan


def naming(plan: Plan | None, names: Collection[str]) -> Plan | None:
    """`plan`, if it tells of one of the layers `names`; else None, with a warning.

    It then is of another model, or of one around or inside this.
    """
    if plan is None or not plan.layers or not names or plan.layers.keys() & set(names):
        return plan
    warnings.warn(
        f"bertkern: the plan is made anew: it tells of {next(iter(plan.layers))} and others, none of which is a linear "
        f"layer here, as {next(iter(names))} is.",
        stacklevel=_CALLER,
    )
    return None


def choose(
    weight: Tensor,
    pack_dense: Callable[[], Tensor],
    scale: Tensor | None,
    times: "Times | None",
    rows: Sequence[int] = ROWS,
) -> Choice:
    """The form in which a weight runs fastest.

    Args:
        weight: [N, K] fp32, bf16, fp16 or int8 codes.
        pack_dense: makes the packed dense weights.
        scale: of int8 codes.
        times: where measured times are looked up and kept; None: by the cost model.
        rows: of X, at which forms are compared.
    """
    forms = candidates(weight)
    if not forms:
        return found_for(weight, Choice(DENSE))
    if times is None:
        shares = {str(form): cost for form, (_, cost) in forms.items()}
        return found_for(weight, fastest(list(forms), shares, measured=False))
    n, k = weight.shape
    shares: dict[str, float] = {}
    dense: Tensor | None = None
    for form, (density, _) in forms.items():
        at = "" if tuple(rows) == ROWS else f" at {','.join(map(str, rows))}"

        def measure(form: Form = form) -> float:
            nonlocal dense
            dense = pack_dense() if dense is None else dense
            blocks = BsrWeight.from_dense(weight, (form.rows, form.columns))
            return _share(pack_blocks(blocks, form, scale, None), dense, n, k, rows)

        shares[str(form)] = times.share(f"{_kind(weight)} {form} {density:.2f}{at}", measure)
    return found_for(weight, fastest(list(forms), shares, measured=True))


def found_for(weight: Tensor, choice: Choice) -> Choice:
    """`choice`, which says that it was found for `weight` [N, K]."""
    return replace(choice, weight=_kind(weight), kept=_kept(weight, choice.form))


def holds(choice: Choice, weight: Tensor) -> bool:
    """Whether `choice`, which a plan tells of, was found for such a weight as `weight` [N, K], and the kernels take it.

    Else its form might be slower than the dense one, or the dense one than others.
    """
    if not fits(choice.form, weight) or choice.weight not in ("", _kind(weight)):
        return False
    return not choice.weight or abs(choice.kept - _kept(weight, choice.form)) <= _ALIKE


def tell_others(names: Sequence[str]) -> None:
    """Warns that the layers `names` are not those that a plan tells of."""
    if names:
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        warnings.warn(
            f"bertkern: the plan is made anew for {names[0]}{others}: it was made for weights of another dtype or "
            "shape, or with other zeros.",
            stacklevel=_CALLER,
        )


def fits(form: Form, weight: Tensor) -> bool:
    """Whether the kernels can take `weight` [N, K] in `form`."""
    if form == DENSE:
        return True
    n, k = weight.shape
    rounded = -(-n // form.rows) * form.rows * -(-k // form.columns) * form.columns
    return -(-k // _PER_DWORD.get(weight.dtype, 1)) <= _MOST_STEPS and rounded < 2**31


def cost(layout: str, features: int, density: float, dtype: torch.dtype = torch.float32) -> float:
    """The time of a sparse form as a share of the dense one's, by the cost model.

    Args:
        layout, features: "panels" with 16 features that share a pattern, or "tokens" with 1 or 4.
        density: of blocks of so many features and one step of the kernel along K: 4 int8 codes, 2 bf16 or 1 fp32.
        dtype: of the weight.
    """
    costs = _MATRIX_COSTS.get(dtype, _COSTS) if ops.cpu_isa() == "amx" else _COSTS
    fixed, slope = costs[layout, features]
    return fixed + slope * density


def candidates(weight: Tensor) -> dict[Form, tuple[float, float]]:
    """The sparse forms that might be faster than the dense one, with their density and estimated share of its time.

    A form's blocks are the largest that hold no more of the weight than the kernel's own micro-blocks do.
    """
    if weight.numel() == 0 or not fits(Form("tokens", 1, 1), weight):
        return {}
    nonzero = weight != 0
    if float(nonzero.float().mean()) > 1 - LEAST_ZEROS:
        return {}
    per = _PER_DWORD.get(weight.dtype, 1)
    found = {}
    for layout, rows in _COSTS:
        density = _density(nonzero, rows, per)
        share = cost(layout, rows, density, weight.dtype)
        if share < _HOPELESS:
            block = _storage(nonzero, rows, per, density) if layout == "panels" else (rows, per)
            found[Form(layout, *block)] = (density, min(1.0, share))
    return found


class Times:
    """Measured shares of one kernel's time in another's, kept in a file of this machine.

    A context manager: what is new is written where it is left, also by Ctrl-C.

    Args:
        path: of the file; None: `bertkern` in the user's cache folder, or in BERTKERN_CACHE. A file that is damaged or
            of another machine is made anew, with a warning; one that cannot be written is done without.
        bar: is told when something is measured.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, bar: LateBar | None = None) -> None:
        self._bar = bar
        self.machine = machine()
        name = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(path) if path is not None else _cache() / f"times-{name}.json"
        self._shares: dict[str, float] = {}
        self._new = False
        try:
            text = self.path.read_bytes()
        except OSError:
            return
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("it holds no times.")
            if values.get("version") != VERSION or values.get("machine") != self.machine:
                raise ValueError("it is of another machine or version.")
            shares = values.get("shares")
            if not isinstance(shares, dict) or not all(map(_is_share, shares.values())):
                raise ValueError("it holds no times.")
            self._shares = shares
        except _UNREADABLE as error:
            warnings.warn(f"bertkern: {self.path} is made anew: {error}", stacklevel=_CALLER)

    def __enter__(self) -> "Times":
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def share(self, key: str, measure: Callable[[], float]) -> float:
        """The share kept under `key`; else what `measure` finds, which is kept from now on, and written by `save`."""
        share = self._shares.get(key)
        if share is None:
            if self._bar is not None:
                self._bar.begin()
            share = self._shares[key] = measure()
            self._new = True
        return share

    def save(self) -> None:
        """Writes what is new."""
        if not self._new:
            return
        values = {"version": VERSION, "machine": self.machine, "shares": self._shares}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Exchanged in one step: another process may be reading.
            temporary = self.path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(values, indent=1))
            temporary.replace(self.path)
        except OSError:
            return
        self._new = False


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def fastest(forms: Sequence[Form], shares: Mapping[str, float], measured: bool) -> Choice:
    """The form with the least share of the dense one's time, or the dense one."""
    best = min(forms, key=lambda form: shares[str(form)])
    return Choice(best if shares[str(best)] < MARGIN else DENSE, shares, measured)


@contextmanager
def _one_thread() -> Iterator[None]:
    """An encoder gives each thread rows or features of its own: one alone says what a kernel can do, undisturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share(packed: Tensor, dense: Tensor, n: int, k: int, rows: Sequence[int]) -> float:
    """The time of `packed` as a share of that of `dense`: the worst over `rows` if it loses anywhere, else the mean.

    With a residual: most layers of an encoder have one or another epilogue, which costs forms differently.
    """
    run = torch.ops.bertkern.linear.default
    generator = torch.Generator().manual_seed(0)
    shares = []
    with torch.no_grad(), _one_thread():
        for count in rows:
            x, residual = (torch.randn(count, width, generator=generator) for width in (k, n))
            best = {id(packed): math.inf, id(dense): math.inf}
            # In turns, so that a change of the clock meets both; the least of many is what the kernel can do.
            for _ in range(_TURNS):
                for weights in (packed, dense):
                    run(x, weights, n, 0, residual)
                    start = time.perf_counter()
                    run(x, weights, n, 0, residual)
                    best[id(weights)] = min(best[id(weights)], time.perf_counter() - start)
            shares.append(best[id(packed)] / best[id(dense)])
    return max(shares) if max(shares) >= 1 else math.exp(sum(map(math.log, shares)) / len(shares))


def _kind(weight: Tensor) -> str:
    # There are no kernels of its own for fp16 on a CPU.
    dtype = torch.float32 if weight.dtype == torch.float16 and weight.is_cpu else weight.dtype
    return f"{str(dtype).removeprefix('torch.')} {weight.shape[0]}x{weight.shape[1]}"


def _kept(weight: Tensor, form: Form) -> float:
    return _density(weight != 0, form.rows or 1, form.columns or 1) if weight.numel() else 0.0


def _density(nonzero: Tensor, rows: int, columns: int) -> float:
    return float(_blocks(nonzero, rows, columns).float().mean())


def _blocks(nonzero: Tensor, rows: int, columns: int) -> Tensor:
    """bool [ceil(N / rows), ceil(K / columns)]: whether a block holds a nonzero."""
    n, k = nonzero.shape
    padded = torch.nn.functional.pad(nonzero, (0, -k % columns, 0, -n % rows))
    return padded.view(-(-n // rows), rows, -1, columns).any(3).any(1)


def _storage(nonzero: Tensor, rows: int, columns: int, density: float) -> tuple[int, int]:
    for side in (64, 32, 16):
        if _density(nonzero, side, side) <= density * 1.02:
            return side, side
    return rows, columns


def _cache() -> Path:
    if named := os.environ.get("BERTKERN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bertkern"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
