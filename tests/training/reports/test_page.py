"""Claims are computed from measured values, and the page shows the outcome."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.reports.test_results import METRICS
from training.reports.page import check_claims, make_page


def _results(*values: tuple[int, float]) -> dict[str, Any]:
    """Make a row with a Fréchet distance at each seed."""
    results = [
        {
            "run": f"run{number}",
            "seed": seed,
            "pairs": 2,
            "key": str(number),
            "request": {"num_inference_steps": 1},
            "summary": {**METRICS, "frechet": value},
        }
        for number, (seed, value) in enumerate(values)
    ]
    return {"results": results, "missing": []}


def _report(claim: dict[str, Any], **rows: dict[str, Any]) -> dict[str, Any]:
    base = {"text": "It is so", "metric": "frechet", "row": "t.a", "of": None}
    row = {"pairs": None}
    report = {
        "name": "trial",
        "study": {
            "title": "Trial",
            "about": "",
            "notes": ["It was tried twice."],
            "frames": 17,
            "pairs": 2,
            "diversity": {"pairs": 1, "seeds": 2},
            "steps": None,
            "logs": [],
            "tables": {
                "t": {
                    "title": "Table",
                    "about": "About it.",
                    "frames": None,
                    "rows": {name: {"label": f"row {name}", **row} for name in rows},
                }
            },
            "claims": {"c": {**base, "at_least": None, "at_most": None, **claim}},
        },
        "hardware": [{"cpu": "CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3"}],
        "models": {"m": {"dit": 64 * "a", "adapter": 64 * "b"}},
        "runs": {"r": {"command": "make it", "note": "", "phases": {}}},
        "rows": {f"t.{name}": row for name, row in rows.items()},
        "sheets": {},
    }
    return {**report, "claims": check_claims(report)}


THREE = _results((1, 2.0), (2, 3.0), (3, 10.0))
OTHER = _results((1, 2.0), (2, 2.5), (3, 12.0))


@pytest.mark.parametrize(
    ("claim", "figure", "holds", "num_hold"),
    [
        ({"at_most": 3.0}, 3.0, True, 2),
        ({"at_most": 2.9}, 3.0, False, 1),
        ({"at_least": 3.0}, 3.0, True, 2),
        ({"at_least": 2.9, "at_most": 3.1}, 3.0, True, 1),
        ({"at_least": 3.1, "at_most": 4.0}, 3.0, False, 0),
        # Alone, each is divided by the other row at its own seed: 1, 1.2 and 0.83.
        ({"of": "t.b", "at_most": 1.25}, 1.2, True, 3),
        ({"of": "t.b", "at_most": 1.1}, 1.2, False, 2),
        ({"of": "t.b", "at_least": 1.1}, 1.2, True, 1),
    ],
)
def test_a_claim_is_about_medians(
    claim: dict[str, Any], figure: float, holds: bool, num_hold: int
) -> None:
    verdict = _report(claim, a=THREE, b=OTHER)["claims"]["c"]
    assert verdict["figure"] == pytest.approx(figure)
    assert verdict["value"] == 3
    assert (verdict["holds"], verdict["num_hold"], verdict["num_all"]) == (holds, num_hold, 3)


def test_a_seed_that_the_other_row_lacks_is_not_counted() -> None:
    report = _report({"of": "t.b", "at_most": 2.0}, a=THREE, b=_results((1, 2.0)))
    verdict = report["claims"]["c"]
    assert (verdict["figure"], verdict["num_hold"], verdict["num_all"]) == (1.5, 1, 1)


def test_several_runs_at_one_seed_are_each_held_against_the_median() -> None:
    rows = {"a": _results((1, 2.0), (1, 3.0)), "b": _results((1, 1.0), (1, 2.0), (1, 9.0))}
    verdict = _report({"of": "t.b", "at_most": 1.25}, **rows)["claims"]["c"]
    assert (verdict["figure"], verdict["holds"]) == (1.25, True)
    assert (verdict["num_hold"], verdict["num_all"]) == (1, 2)


@pytest.mark.parametrize("missing", ["a", "b"])
def test_what_was_not_run_is_neither(missing: str) -> None:
    rows = {"a": THREE, "b": OTHER, missing: _results()}
    report = _report({"of": "t.b", "at_most": 1.0}, **rows)
    assert set(report["claims"]["c"].values()) == {None}
    assert "| It is so |  | ≤ 1 | not run |  |" in make_page(report)


@pytest.mark.parametrize(("bound", "verdict"), [(1.25, "**holds**"), (1.0, "**does not hold**")])
def test_the_page_says_what_comes_out(bound: float, verdict: str) -> None:
    page = make_page(_report({"of": "t.b", "at_most": bound}, a=THREE, b=OTHER))
    count = "3 of 3" if bound > 1.2 else "2 of 3"
    assert f"| It is so | 3.000 / 2.500 = 1.200 | ≤ {bound:g} | {verdict} | {count} |" in page


def test_a_row_shows_medians_and_the_spread() -> None:
    page = make_page(_report({"at_most": 1.0}, a=THREE, b=_results()))
    assert "| row a | 1 | 3.00 (2.00 to 10.00) | 0.900 | 0.00 | 1.000 |" in page
    assert "| 5.0 | 3 |\n" in page
    assert "| row b | not run |" in page
    assert "| *true renders* |  | 0.00 | 0.990 |" in page
    for part in ("# Trial\n", "## Table\n\nAbout it.", "It was tried twice.", "make it\n"):
        assert part in page
    assert "of 1 pairs" not in page


def test_a_table_says_the_length_that_is_its_own() -> None:
    report = _report({"at_most": 1.0}, a=THREE)
    length = "Each clip is one chunk of 9 frames."
    assert length not in make_page(report)
    report["study"]["tables"]["t"]["frames"] = 9
    assert f"About it.\n\n{length}\n\n| " in make_page(report)
