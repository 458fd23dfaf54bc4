"""The facts behind `python -m bertkern doctor`."""

import copy
import json

import pytest
import torch

from bertkern import doctor


@pytest.fixture(scope="module")
def facts():
    return doctor.collect()


def test_facts_are_plain(facts):
    assert list(facts) == ["versions", "processor", "threads", "build", "gpu", "hints"]
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(hint, str) and "\n" not in hint for hint in facts["hints"])


def test_facts_are_those_of_this_process(facts):
    assert (
        facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )  # the metadata may lack the variant
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["processor"]["isa_active"] == doctor.ISA_NAMES[torch.ops.bertkern.cpu_isa()]
    assert facts["build"]["error"] is None


def test_build_facts(facts):
    if not facts["build"]["host_module"]:
        pytest.skip("the host module was built for another Python")
    assert facts["build"]["flags portable"] == "baseline"
    assert "2.10" in facts["build"]["torch built against"]
    assert facts["build"]["compiler"]


def test_text_names_every_section(facts):
    lines = doctor.text(facts).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(facts)


def hints_after(facts, **changes) -> list[str]:
    changed = copy.deepcopy(facts)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        changed[section][key] = value
    return doctor.hints(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads__torch": 64, "threads__usable_cores": 2}, "OMP_NUM_THREADS=2"),
        (
            {"threads__torch": 1, "threads__usable_cores": 8, "threads__OMP_NUM_THREADS": "1"},
            "OMP_NUM_THREADS=1 leaves 7 of 8 cores idle.",
        ),
        ({"versions__transformers": None}, "pip install 'bertkern[hf]'"),
        ({"versions__transformers": "5.5.1"}, "Expected transformers 5.6 or newer. Got 5.5.1."),
        ({"processor__isa_detected": "avx2"}, "no 8-bit dot product"),
        (
            {
                "processor__isa_cap": "avx2",
                "processor__isa_active": "avx2",
                "processor__isa_detected": "avx512vnni",
                "processor__isa_error": None,
            },
            "BERTKERN_CPU_ISA=avx2 caps this processor, which has avx512vnni.",
        ),
        ({"build__error": None, "build__host_module": False}, "There is no host module for Python"),
        ({"build__error": "not built"}, "not built"),
    ],
)
def test_hints(facts, changes, words):
    assert [hint for hint in hints_after(facts, **changes) if words in hint]


def test_unknown_isa_is_a_hint(run_python):
    code = "import json; from bertkern import doctor; print(json.dumps(doctor.collect()))"
    done = run_python(code, BERTKERN_CPU_ISA="avx9")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["processor"]["isa_active"] is None
    line = "BERTKERN_CPU_ISA: expected one of portable, avx2, avx512, avx512vnni, avx512bf16, amx. Got 'avx9'."
    assert line in facts["hints"]


def test_missing_operators_are_a_hint(run_python):
    code = "import json; from bertkern import doctor; print(json.dumps(doctor.collect()))"
    done = run_python(code, BERTKERN_LIBRARY="/nowhere.so")
    if done.returncode:  # the package itself loads the operators, and says so
        assert done.stderr.strip().endswith("ImportError: BERTKERN_LIBRARY: there is no file /nowhere.so.")
    else:
        facts = json.loads(done.stdout)
        assert facts["build"]["error"] in facts["hints"]


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)])
def test_container_limit(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor._cgroup_cores(str(tmp_path)) == cores


def test_peaks():
    rates = doctor.peaks()
    assert set(rates) in (set(), {"int8", "bf16", "fp32", "read"})
    assert all(rate > 0 for rate in rates.values())
