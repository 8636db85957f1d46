"""Did debate help? What the report's first sentence says of the intervals."""

import pytest

from report import tables


def cells(low, high, pgr=None, **controls) -> dict:
    """Of ours, with the interval of its lead over finetune, and of controls, by the interval of their lead over ours."""
    ours = {"diff_vs_finetune": (low + high) / 2, "diff_vs_finetune_ci": (low, high), "seeds": 2, "n": 99}
    ours |= {"pgr": pgr, "pgr_ci": (0.2, 0.8), "rows": ["a"]}
    ceiling = {"gap": 0.02, "gap_ci": (-0.01, 0.05), "rows": ["c"]}
    led = {m: {"diff_vs_ours": sum(ci) / 2, "diff_vs_ours_ci": ci, "rows": ["d"]} for m, ci in controls.items()}
    return {"ours": ours, "strong_ceiling": ceiling} | led | dict.fromkeys(("finetune", "weak_floor"), {"rows": ["b"]})


def verdict(of: dict) -> str:
    return tables.joined(tables.verdict("a", of, {"no_argument": "sides alone", "naive_ensemble": "naive"}))


def test_the_verdict_is_what_the_interval_says():
    helped = verdict(cells(0.01, 0.11, 0.5))
    assert helped.startswith("a: yes. ") and "+6.0 [+1.0, +11.0]" in helped and "2 seeds, 99" in helped
    assert "PGR is 50 [20, 80] %" in helped
    not_shown = verdict(cells(-0.01, 0.1))
    assert not_shown.startswith("a: not shown, the interval") and "+2.0 [-1.0, +5.0], is not clear of zero" in not_shown
    assert verdict(cells(-0.2, -0.1)).startswith("a: no, it hurt. ")
    assert verdict({"finetune": {}}).startswith("a: no answer")
    single = {"single" if m == "ours" else m: cell for m, cell in cells(0.01, 0.11, 0.5).items()}
    assert verdict(single) == helped.replace("Ours minus", "A single judge minus")


@pytest.mark.parametrize(
    ("no_argument", "naive_ensemble", "named"),
    [
        ((-0.11, -0.01), (-0.09, -0.02), ""),
        ((-0.08, 0.0), (-0.09, -0.02), "; sides alone minus ours is -4.0 [-8.0, +0.0]"),
        ((-0.11, -0.01), (0.01, 0.03), "; naive minus ours is +2.0 [+1.0, +3.0]"),
    ],
)
def test_who_does_not_lead_the_controls_was_not_helped_by_arguments(no_argument, naive_ensemble, named):
    controls = {"no_argument": no_argument, "naive_ensemble": naive_ensemble}
    said = verdict(cells(0.01, 0.11, 0.5, **controls))
    assert said.startswith("a: not shown, a control without arguments is not behind. " if named else "a: yes. ")
    assert f" points of test accuracy{named}; PGR is 50 [20, 80] %" in said
    assert verdict(cells(-0.2, -0.1, **controls)) == verdict(cells(-0.2, -0.1))  # the controls change a yes alone
