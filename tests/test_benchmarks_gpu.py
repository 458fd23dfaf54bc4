"""The benchmarks of a card as far as they need none: processes that hang, sections, goals, and jobs on the CPU."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import readme_table
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import campaign, card, checks, goals, job, problems, process, providers, sections, timing
from benchmarks.results import Run, load

CARD = {"device": "a fake card", "arch": "sm_00", "smi": {"driver_version": "1"}, "versions": {"torch": "2"}}
ROW = ["gemm", "torch-bf16", "latency_ms", ["axis", "x"], [1.0, 0.9, 1.1], {}, {}]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def context_of(folder, seconds=60.0, others=None) -> campaign.Context:
    run = campaign.run_of("ops", CARD)
    return campaign.Context(
        run, folder, CARD, time.monotonic() + seconds, "cpu", others or {}, report=lambda text: None
    )


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_that_ends():
    lines = []
    outcome = process.run(python("import sys; print(1); print(2); print('why', file=sys.stderr); sys.exit(3)"), 60,
                          lines.append)  # fmt: skip
    assert (outcome.code, lines, outcome.tail) == (3, ["1", "2"], "why")
    assert str(outcome) == "exit status 3: why" and not outcome.ok
    assert str(process.run(python(""), 60)) == "ok"


@pytest.mark.parametrize("limit", [{"seconds": 1.5}, {"seconds": 60, "silence": 1.5}])
def test_a_process_that_hangs_is_killed_with_its_children(limit):
    """One that ignores all that can be ignored, and left a child that does."""
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(600)"
    )
    lines = []
    outcome = process.run(python(code), each_line=lines.append, **limit)
    assert outcome.code is None and outcome.seconds < 30 and "killed after" in str(outcome)
    (child,) = map(int, lines)
    for _ in range(100):  # until whoever inherited it has waited for it
        try:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child lives on")


def test_what_was_said_before_a_hang_is_kept():
    lines = []
    outcome = process.run(python("import time; print('a', flush=True); time.sleep(600)"), 1.5, lines.append)
    assert outcome.code is None and lines == ["a"]


# --- jobs that hang or crash -----------------------------------------------------------------------------------------

FAKE_JOB = """
import json, os, sys, time
skip = json.loads(sys.argv[1]).get("skip", [])
def say(**line): print(json.dumps(line), flush=True)
for case in ("one", "two", "three"):
    if case in skip: continue
    say(at=case + "|")
    for provider in ("good", "hangs", "crashes"):
        if f"{case}|{provider}" in skip: continue
        say(at=f"{case}|{provider}")
        if case == "two" and provider == "hangs": time.sleep(600)
        if case == "two" and provider == "crashes": os.kill(os.getpid(), 11)
    say(at=case + "|")
    say(row=["gemm", "good", "latency_ms", ["axis", case], [1, 1, 1], {}, {}])
    say(at=case + "|", finished=case)
say(done=True)
"""


def test_a_hang_and_a_crash_cost_a_provider_on_a_case(tmp_path):
    context = context_of(tmp_path)
    command = [*python(FAKE_JOB)]
    assert context.command(lambda skip: [*command, json.dumps(skip)], 60, silence=1.5)
    assert context.run.x_values("latency_ms") == ["one", "two", "three"] and len(context.run.rows) == 3
    assert {name.strip() for name in context.run.absent} == {"two|hangs", "two|crashes"}
    assert "killed after" in context.run.absent["two|hangs "] and "-11" in context.run.absent["two|crashes "]
    assert len(load(tmp_path / "gpu-ops.json").rows) == 3


def test_a_job_that_never_works_is_given_up(tmp_path):
    context = context_of(tmp_path)
    assert not context.command(lambda skip: python("import sys; sys.exit('broken')"), 60, 10)
    assert "broken" in context.run.absent["before anything "]


def test_lines_that_are_no_json_are_passed_over(tmp_path):
    context = context_of(tmp_path)
    assert context.take("a library's banner") == {} and context.take('{"row": ') == {}
    context.take(json.dumps({"row": ROW}))
    assert context.run.rows[0].median == 1.0 and context.run.rows[0].device == "a fake card"


# --- sections --------------------------------------------------------------------------------------------------------


def section(name: str, log: list[str], works: bool = True, seconds: float = 60.0, sleeps: float = 0.0):
    def work(context: campaign.Context) -> bool:
        log.append(name)
        context.take(json.dumps({"row": ROW}))
        time.sleep(min(sleeps, max(0.0, context.left())))
        return works

    return campaign.Section(name, seconds, "a test", work)


def test_finished_sections_are_skipped_and_others_done_anew(tmp_path):
    log, said = [], []
    both = [section("ops", log), section("models", log, works=False)]
    runs = campaign.go(both, tmp_path, CARD, report=said.append)
    assert log == ["ops", "models"] and runs["ops"].facts["finished"] and not runs["models"].facts["finished"]
    runs = campaign.go(both, tmp_path, CARD, report=said.append)
    assert log == ["ops", "models", "models"] and set(runs) == {"ops", "models"}
    assert any("done before" in line for line in said)
    campaign.go(both, tmp_path, CARD, again=True, report=said.append)
    assert log[3:] == ["ops", "models"]
    campaign.go(both[:1], tmp_path, CARD | {"device": "another card"}, report=said.append)
    assert log[5:] == ["ops"]


def test_a_section_finds_those_that_ended_before(tmp_path):
    campaign.go([section("ops", [])], tmp_path, CARD, report=lambda text: None)
    seen = []
    last = campaign.Section("profile", 60, "a test", lambda context: bool(seen.extend(context.others)) or True)
    campaign.go([last], tmp_path, CARD, report=lambda text: None)
    assert seen == ["ops"]


def test_the_budget_ends_the_campaign(tmp_path):
    log, said = [], []
    made = [section("ops", log, sleeps=2.5), section("models", log)]
    runs = campaign.go(made, tmp_path, CARD, budget=6.5, report=said.append)
    assert log == ["ops"] and set(runs) == {"ops"}
    assert said[-1] == "models: not begun, the budget of 6.5 s is spent"


def test_a_section_knows_its_own_time(tmp_path):
    left = []
    short = campaign.Section("ops", 7, "a test", lambda context: left.append(context.left()) or True)
    campaign.go([short], tmp_path, CARD, budget=100, report=lambda text: None)
    campaign.go([short], tmp_path, CARD, budget=10 * campaign.BUDGET_S, again=True, report=lambda text: None)
    assert 6 < left[0] <= 7 and 69 < left[1] <= 70


def test_the_sections_fit_the_nine_minutes():
    assert campaign.BUDGET_S < 9 * 60
    assert [one.name for one in sections.SECTIONS] == ["smoke", "tests", "sanitizer", "ops", "models", "profile"]
    assert sum(sections.SHARES.values()) == pytest.approx(1)


# --- smoke and sanitizer ---------------------------------------------------------------------------------------------


FAKE_CASES = """
import json, os, sys, time
done = sys.argv[1:]
def say(**line): print(json.dumps(line), flush=True)
wrong = 0
print("a library's banner")
for case in ("mul-1x2", "mul-3x4", "hangs-1", "crashes-1", "add-7", "add-8"):
    if case in done: continue
    say(at=case)
    if case == "hangs-1": time.sleep(600)
    if case == "crashes-1": os.kill(os.getpid(), 11)
    wrong += case == "mul-3x4"
    say(case=case, said="ok" if case != "mul-3x4" else "Traceback\\nAssertionError: differs")
sys.exit(wrong > 0)
"""


def group_of(code: str, name: str = "fake") -> checks.Group:
    return checks.Group(name, lambda done: [*python(code), *done])


def test_a_case_that_hangs_or_crashes_costs_itself(tmp_path):
    context = context_of(tmp_path)
    broken = group_of("import sys; sys.exit('no such module')", "broken")
    assert checks.smoke(context, [group_of(FAKE_CASES), broken], silence=2)
    found = {row.provider: row for row in load(tmp_path / "gpu-ops.json").rows}
    assert {name: row.median for name, row in found.items()} == {
        "fake mul": 0, "fake hangs": 0, "fake crashes": 0, "fake add": 1, "broken before anything": 0,
    }  # fmt: skip
    assert "killed" in found["fake hangs"].config["said"] and "-11" in found["fake crashes"].config["said"]
    assert (
        found["fake mul"].config.items() >= {"cases": 2, "wrong": 1, "said": "mul-3x4: AssertionError: differs"}.items()
    )
    assert "no such module" in found["broken before anything"].config["said"]


def test_smoke_without_time(tmp_path):
    context = context_of(tmp_path, seconds=1)
    assert not checks.smoke(context, [group_of(FAKE_CASES)]) and not context.run.rows


def test_a_child_that_dies_at_once_is_not_begun_for_ever(tmp_path):
    begun = tmp_path / "begun"
    code = f"import os; open({str(begun)!r}, 'a').write('x'); os.kill(os.getpid(), 11)"
    assert checks.case_by_case(group_of(code), lambda: 60.0) == {"before anything": "exit status -11"}
    assert begun.read_text() == "x"


def test_cases_of_a_kernel_share_a_row():
    cases = ["linear-fp16-16x16-128-64x32x48", "linear-fp16-16x16-128-1x17x19", "attend-fp16-64-1", "dead_blocks"]
    assert checks.grouped(cases) == ["linear-fp16-16x16-128", "attend-fp16-64", "dead_blocks"]
    assert checks.grouped(["tests/a.py::test_b[1-2]", "tests/a.py::test_b[3]"]) == ["tests/a.py::test_b"]


def test_every_case_of_a_script_is_in_one_child(tmp_path):
    context = context_of(tmp_path)
    (script,) = (path for path in checks.scripts() if path.name == "interpret_int8_gemm.py")
    _, cases = checks._listed(script)
    groups = checks.kernels(context, [script])
    commands = [group.command([]) for group in groups]
    names = [name for words in commands for option, name in itertools.pairwise(words) if option == "--only"]
    assert len(cases) > 30 and not context.run.absent
    assert sorted(names) == sorted(checks.grouped(cases)) and len(groups) == -(-len(names) // checks.MOST_NAMES)
    assert groups[0].command(["a"])[-2:] == ["--skip", "a"]


def test_tests_for_a_card_are_dealt_out(tmp_path):
    """Where there is no card all are skipped, each in one of the children."""
    files = ["tests/cuda/test_rowwise_on_card.py"]
    found = [checks.case_by_case(group, lambda: 300.0) for group in checks.sharded("cuda", files, 2)]
    assert all(found) and not set(found[0]) & set(found[1])
    assert abs(len(found[0]) - len(found[1])) <= 1 and len(found[0]) + len(found[1]) > 50
    if not torch.cuda.is_available():
        assert all(text == "skipped: Skipped: no NVIDIA card here" for part in found for text in part.values())
    assert set(checks.marked(["tests/cuda"])) >= {
        "tests/cuda/test_attention.py", "tests/cuda/test_rowwise_on_card.py", "tests/cuda/test_sparse_on_card.py",
    }  # fmt: skip
    assert {"tests/ops/test_varlen.py", "tests/gpu/test_cuda.py", "tests/nn/test_block_sparse.py"} <= set(
        checks.marked(["tests"])
    )


def test_the_scripts_are_found():
    assert {"interpret.py", "interpret_attention.py", "interpret_groupwise.py"} <= {p.name for p in checks.scripts()}


def test_without_a_sanitizer_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "sanitizer_path", lambda: None)
    context = context_of(tmp_path)
    assert checks.sanitizer(context)
    assert "skipped" in context.run.absent["compute-sanitizer"] and not context.run.rows


def test_what_the_sanitizer_says(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "sanitized", lambda tool, path: [
        checks.Kernel(f"{tool} a", python("")),
        checks.Kernel(f"{tool} b", python("print('========= Invalid __global__ read'); import sys; sys.exit(9)")),
    ])  # fmt: skip
    context = context_of(tmp_path)
    assert checks.sanitizer(context, "compute-sanitizer")
    found = {row.provider: row for row in context.run.rows}
    assert {name: row.median for name, row in found.items()} == {
        "memcheck a": 1, "memcheck b": 0, "racecheck a": 1, "racecheck b": 0,
    }  # fmt: skip
    assert "Invalid __global__ read" in found["memcheck b"].config["said"]


def test_what_takes_too_long_under_a_sanitizer_is_not_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "sanitized", lambda tool, path: [
        checks.Kernel(f"{tool} slow", python("import time; time.sleep(600)")), checks.Kernel(f"{tool} a", python("")),
    ])  # fmt: skip
    context = context_of(tmp_path, seconds=4)
    assert not checks.sanitizer(context, "compute-sanitizer")
    assert sorted(context.run.facts["missed"]) == ["memcheck slow", "racecheck slow"]
    assert {row.provider: row.median for row in context.run.rows} == {"memcheck a": 1, "racecheck a": 1}


def test_pytest_is_counted(tmp_path):
    """By the hooks of tests/conftest.py; one test ends the whole child."""
    path = tmp_path / "test_it.py"
    path.write_text(
        "import os, pytest\n"
        "def test_a(): print('said')\n"
        "def test_b(): assert False\n"
        "def test_c(): os._exit(7)\n"
        "def test_d(): pytest.skip('not here')\n"
        "@pytest.fixture\n"
        "def broken(): raise KeyError('broken')\n"
        "def test_e(broken): pass\n"
    )
    hooks = ["-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]

    def command(done):
        return [sys.executable, "-m", "pytest", "-s", "-q", *hooks, "--shard=0/1", str(path),
                *(f"--done={test}" for test in done)]  # fmt: skip

    context = context_of(tmp_path)
    assert checks.tests(context, [checks.Group("tests", command)])
    assert {row.x_value: row.median for row in context.run.rows} == {"tests": 5, "failures": 3, "skipped": 1}
    assert {name.rpartition("::")[2] for name in context.run.absent} == {"test_b", "test_c", "test_e"}
    assert "exit status 7" in next(text for name, text in context.run.absent.items() if "test_c" in name)


# --- the card --------------------------------------------------------------------------------------------------------


def test_nvidia_smi_is_read():
    text = "NVIDIA H200, 570.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W, 33, Enabled, Disabled\n"
    assert card.parse_smi(text)["driver_version"] == "570.1" and card.parse_smi(text)["clocks.sm"] == "1980 MHz"
    assert card.parse_smi("") == {} and card.parse_smi("No devices were found\n") == {}


# --- goals -----------------------------------------------------------------------------------------------------------


def rows_of(*cells) -> list:
    run = Run("gpu-ops", "a fake card", "sm_00", 1)
    for kernel, provider, x, ms, *metric in cells:
        run.add(kernel, provider, metric[0] if metric else "latency_ms", ("axis", x), (ms, ms, ms))
    return run.rows


def test_the_worst_point_and_the_fastest_of_ours_count():
    goal = goals.Goal("g", "gemm", "bertkern-.*-int8", "torch-bf16", "4096x.*", 1.5)
    rows = rows_of(
        ("gemm", "torch-bf16", "4096xa", 2.0), ("gemm", "bertkern-a-int8", "4096xa", 4.0),
        ("gemm", "bertkern-b-int8", "4096xa", 1.0), ("gemm", "torch-bf16", "4096xb", 3.0),
        ("gemm", "bertkern-b-int8", "4096xb", 2.5), ("gemm", "bertkern-b-int8", "128xb", 99.0),
        ("gemm", "torch-bf16", "128xb", 1.0),
    )  # fmt: skip
    (verdict,) = goals.judge(rows, [goal])
    assert (verdict.measured, verdict.x, verdict.met) == (pytest.approx(1.2), "4096xb", False)
    assert verdict.shortfall == pytest.approx(1.25) and goals.worst([verdict]) is verdict
    assert goals.table([verdict])[0][1:4] == [">= 1.5x", "1.2x", "missed"]


def test_values_at_most_and_nothing_measured():
    goal = goals.Goal("g", "model", "bertkern-int8", "", "1x128", 0.35, "device_ms")
    (verdict,) = goals.judge(rows_of(("model", "bertkern-int8", "1x128", 0.3, "device_ms")), [goal])
    assert verdict.met and verdict.shortfall < 1
    (nothing,) = goals.judge([], [goal])
    assert nothing.met is None and goals.table([nothing])[0][2:4] == ["-", "not measured"]
    assert goals.worst([nothing]) is None


def test_attention_off_proportion():
    rows = rows_of(("peak", "launch", "8192 launch", 0.1), *(
        ("attention", "bertkern-triton-bf16", f"64x384 h{heads}", 0.1 + ms)
        for heads, ms in ((4, 4.0), (2, 2.0), (1, 1.3))
    ))  # fmt: skip
    (found,) = goals.off_proportion(rows)
    assert found.x_value == "64x384" and found.median == pytest.approx(0.3)


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.name)
def test_every_goal_speaks_of_what_is_measured(goal):
    """Its points and providers are among those that the sections measure."""
    import re

    if goal.kernel == "model":
        from benchmarks.gpu import models

        names, points = [engine.name for engine in models.ENGINES], list(models.CASES)
    else:
        names = [provider.name for provider in providers.of(goal.kernel)]
        points = [case.x for case in problems.CASES[goal.kernel]()]
        points += list({point.rpartition(" h")[0] for point in points} if goal.kernel == "attention" else ())
    assert any(re.fullmatch(goal.points, point) for point in points)
    for pattern in filter(None, (goal.fast, goal.slow)):
        assert any(re.fullmatch(pattern, name) for name in names)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_copies_of_cold_weights():
    weights = (torch.ones(256), [torch.ones(4).t()], None)
    made = timing.copies(weights, l2=4096)
    assert len(made) == 1 + 4 * 4096 // (1024 + 16) and made[0] is weights
    assert all(torch.equal(one[0], weights[0]) and one[0].data_ptr() != weights[0].data_ptr() for one in made[1:])
    assert len(timing.copies((torch.ones(1),), l2=1 << 30)) == timing.MOST_COPIES
    assert timing.cloned(torch.ones(4, 6).t()).stride() == (1, 6)


def test_turns_are_interleaved_and_each_call_counts_once():
    log = []

    class Clock(timing.HostClock):
        def milliseconds(self, replay, times):
            for _ in range(times):
                replay()
            return 6.0 * times

    ready = [timing.Timed(name, lambda name=name: log.append(name), 3, "host", 2) for name in ("a", "b")]
    samples = timing.take_turns(Clock(), ready, 2)
    assert log == [*"aaa", *"bbb", *"bbb", *"aaa"] and samples["a"].ms == [2.0, 2.0] and samples["b"].calls == 12


# --- jobs, on the CPU ------------------------------------------------------------------------------------------------

SMALL = {
    "gemm": {"models": (((64, 32),),), "rows": (16,)},
    "sparse": {"shapes": ((16, ((64, 64),)),), "blocks": (32,), "zeros": (0.5,)},
    "groupwise": {"layers": ((64, 128),), "rows": (1,)},
    "attention": {"batch": 2, "length": 8, "heads": (2, 1)},
    "rowwise": {"rows": (8,), "widths": (32,)},
}


class Collected(job.Say):
    def __init__(self):
        self.lines = []

    def __call__(self, **line):
        self.lines.append(json.loads(json.dumps(line)))

    def rows(self, metric: str) -> dict[str, float]:
        found = [line["row"] for line in self.lines if "row" in line]
        return {row[1]: row[4][0] for row in found if row[2] == metric}

    def absent(self) -> dict[str, str]:
        return {name: why for line in self.lines for name, why in line.get("absent", {}).items()}


@pytest.fixture
def small_clock(monkeypatch):
    monkeypatch.setattr(timing.HostClock, "l2", 256)
    monkeypatch.setattr(timing, "TURN_MS", 0.01)


@pytest.mark.parametrize("op", SMALL)
def test_an_operators_job(op, small_clock, monkeypatch):
    from benchmarks.gpu import ops

    say = Collected()
    ops.job(say, op, "cpu", peaks={"bf16": 1.0, "int8": 2.0, "copy": 1.0}, rounds=1, cases=SMALL[op])
    here = [one.name for one in providers.of(op) if one.lacks("cpu") is None]
    assert set(say.rows("latency_ms")) == set(here) and all(ms > 0 for ms in say.rows("latency_ms").values())
    away = {one.name for one in providers.of(op)} - set(here)
    assert {f"{op} {name}" for name in away} == set(say.absent())
    assert bool(say.rows("share_of_peak")) == (op != "rowwise")
    assert bool(say.rows("share_of_copy")) == (op in ("rowwise", "groupwise"))
    cases = problems.CASES[op]
    first = cases(**SMALL[op])[0].x
    again = Collected()
    ops.job(again, op, "cpu", [case.x for case in cases(**SMALL[op])[1:]] + [f"{first}|{here[0]}"], rounds=1,
            cases=SMALL[op])  # fmt: skip
    assert set(again.rows("latency_ms")) == set(here[1:])


def test_a_wrong_provider_has_no_times(small_clock, monkeypatch):
    from benchmarks.gpu import ops

    wrong = providers.Provider("attention", "wrong", lambda p: (p.qkv, lambda qkv: qkv[:, 0].float()))
    raises = providers.Provider("attention", "raises", lambda p: 1 / 0)
    monkeypatch.setattr(providers, "TABLE", (*providers.of("attention"), wrong, raises))
    say = Collected()
    ops.job(say, "attention", "cpu", rounds=1, cases={**SMALL["attention"], "heads": (1,)})
    assert "torch-sdpa-bf16" in say.rows("latency_ms") and not {"wrong", "raises"} & set(say.rows("latency_ms"))
    assert "dB from float64" in say.absent()["attention wrong"]
    assert "ZeroDivisionError" in say.absent()["attention raises"]


def test_a_job_without_time_says_where_it_stopped(small_clock):
    from benchmarks.gpu import ops

    say = Collected()
    ops.job(say, "attention", "cpu", seconds=-1, cases=SMALL["attention"])
    assert {"unfinished attention": "from 2x8 h2 on"} in [line.get("fact") for line in say.lines]
    assert not say.rows("latency_ms")


def test_kernels_are_chosen_by_the_environment(monkeypatch):
    monkeypatch.delenv(providers.VARIABLE, raising=False)
    one = providers.Provider("gemm", "x", lambda p: None, kernels="cuda")
    with one.chosen():
        assert os.environ[providers.VARIABLE] == "cuda"
    assert providers.VARIABLE not in os.environ
    monkeypatch.setenv(providers.VARIABLE, "triton")
    with one.chosen():
        assert os.environ[providers.VARIABLE] == "cuda"
    assert os.environ[providers.VARIABLE] == "triton"


def test_peaks_job(small_clock):
    from benchmarks.gpu import peaks

    say = Collected()
    peaks.job(say, "cpu", size=64, copy=1024, rounds=1)
    found = next(line["fact"]["peaks"] for line in say.lines if "fact" in line)
    assert {"bf16", "int8", "launch", "copy"} <= set(found) and all(value > 0 for value in found.values())


def test_models_job(small_clock):
    from benchmarks.gpu import models

    say, names = Collected(), ("torch-eager-bf16", "bertkern-int8")
    small = {"layers": 1, "hidden": 64, "heads": 2}
    models.job(say, "cpu", rounds=1, calls=1, only=["64x128:0.5 pruned"], engines=names, **small)
    assert set(say.rows("latency_ms")) == set(names) and set(say.rows("host_us")) == set(names), say.absent()
    assert set(say.rows("ratio")) == {"torch-eager-bf16 / bertkern-int8"}


def test_pruned_models_and_padded_batches():
    from benchmarks.gpu import models

    model = models.bert(1, True, 64, 2).encoder.layer[0]
    out, second = model.attention.output.dense.weight, model.output.dense.weight
    assert int((out.view(64, 2, 32).abs().sum((0, 2)) == 0).sum()) == 1
    assert int((second.abs().sum(0) == 0).sum()) == round(0.65 * 256)
    mask = models.batch_of(64, 128, 0.5, "cpu")["attention_mask"]
    assert abs(float(mask.float().mean()) - 0.5) < 0.02 and int(mask[0].sum()) == 128


def test_profile_job():
    from benchmarks.gpu import profile

    say = Collected()
    profile.job(say, "attention", "2x8 h1", ["torch-sdpa-bf16", "bertkern-cuda-none"], "cpu", **SMALL["attention"])
    assert say.rows("sum_us")["torch-sdpa-bf16"] > 0 and "profile bertkern-cuda-none" in say.absent()


def test_a_job_as_a_process(tmp_path):
    context = context_of(tmp_path, seconds=300)
    context.sizes["peaks"] = {"size": 32, "copy": 64, "rounds": 1}
    assert context.job("peaks", 300), context.run.absent
    assert {row.provider for row in context.run.rows} >= {"bf16", "copy"} and "peaks" in context.run.facts


# --- the command line ------------------------------------------------------------------------------------------------


def test_sections_are_read():
    assert [one.name for one in command.parse_sections("models, smoke")] == ["smoke", "models"]
    with pytest.raises(ValueError, match=r"sections: expected some of smoke, .*\. Got 'speed'\."):
        command.parse_sections("smoke,speed")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--sections", "speed"], "expected some of"),
        (["--budget", "0"], "expected seconds above 0"),
        (["--budget", "x"], "invalid float"),
        (["--out", __file__], "out: expected a folder. Got the file"),
        (["--out", f"{__file__}/below"], "out: expected a folder. Got the file"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--sections smoke,tests" in said and "exit status" in said


def test_without_a_card(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "find_card", lambda: None)
    assert command.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (
        said.err.count("\n") == 1 and "No CUDA card here" in said.err and not said.out and not list(tmp_path.iterdir())
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_child_finds_no_card():
    assert command.find_card() is None


def test_a_whole_campaign(monkeypatch, capsys, tmp_path):
    log = []
    monkeypatch.setattr(command, "find_card", lambda: CARD)
    monkeypatch.setattr(sections, "SECTIONS", (section("ops", log), section("models", log, works=False)))
    assert command.main(["--out", str(tmp_path)]) == 1
    assert command.main(["--out", str(tmp_path), "--sections", "ops"]) == 0
    said = capsys.readouterr().out
    assert "a fake card, sm_00, driver 1" in said and "worst at" in said and log == ["ops", "models"]
    assert (tmp_path / "gpu-ops.json").exists() and (tmp_path / "gpu-ops.csv").exists()
    assert (tmp_path / "gpu-gemm.png").stat().st_size > 1000
    assert command.main(["--out", str(tmp_path), "--list"]) == 0
    listed = capsys.readouterr().out
    assert "done" in listed and "cut short" in listed
    assert command.main(["--out", str(tmp_path), "--goals"]) == 0
    assert "not measured" in capsys.readouterr().out


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readmes_table_of_a_card(tmp_path):
    assert readme_table.gpu_table(tmp_path) == readme_table.GPU_EMPTY
    run = campaign.run_of("models", CARD)
    for name, ms in (("bertkern-int8", 0.5), ("torch-eager-bf16", 2.0)):
        run.add("model", name, "latency_ms", ("batch x tokens", "64x128:0.5"), (ms, ms, ms))
    run.save(tmp_path / "gpu")
    text = readme_table.gpu_table(tmp_path)
    assert "| **bertkern-int8** | 0.5 |" in text and "| >= 3x | 4x | met |" in text and "a fake card" in text


def test_the_readme_has_the_place():
    readme = (campaign.ROOT / "README.md").read_text()
    text = readme_table.gpu_table(campaign.ROOT / "benchmarks" / "results")
    assert readme_table.insert(readme, text, readme_table.GPU_BEGIN, readme_table.GPU_END) == readme
