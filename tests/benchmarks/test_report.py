"""What the bench makes of figures: verdicts, table, JSON. No measuring, so no noise."""

import json
import re
from dataclasses import replace

import pytest

from tests.benchmarks.bench import QUICK, Drain, start_of
from tests.benchmarks.latency import WARM_UP_SECONDS, by_round
from tests.benchmarks.report import Row, exit_code, markdown, median_and_spread, number, percentile, table, write_json


def promise(value, must):
    return Row(measure="speed", value=value, unit="x", must=must)


def claim(value, near, far):
    return Row(measure="speed", value=value, unit="x", claim=(near, far))


@pytest.mark.parametrize(
    ("value", "must", "holds"),
    [
        (0.70, ">= 0.70", True),
        (0.69, ">= 0.70", False),
        (60.0, "<= 60", True),
        (60.1, "<= 60", False),
        (0, "= 0", True),
        (1, "= 0", False),
        (None, "measured", False),
    ],
)
def test_a_promise_holds_up_to_its_limit(value, must, holds):
    row = promise(value, must)
    assert row.holds is holds
    assert row.verdict() == ("holds" if holds else "FALLS SHORT")
    assert exit_code([promise(1, ">= 1"), row]) == (0 if holds else 1)


@pytest.mark.parametrize(
    ("value", "near", "far", "holds"),
    [
        (3, 3, 5, True),  # from three times
        (9, 3, 5, True),  # more than was claimed
        (2.9, 3, 5, False),
        (60, 60, 50, True),  # to 60 % or less
        (40, 60, 50, True),
        (61, 60, 50, False),
        (35, 35, None, True),
        (34, 35, None, False),
        (0.5, None, 0.5, True),
        (0.6, None, 0.5, False),
    ],
)
def test_a_claim_is_judged_and_fails_nothing(value, near, far, holds):
    row = claim(value, near, far)
    assert row.claim_holds is holds
    assert row.holds is None
    assert row.verdict() == ("claim holds" if holds else "claim does not hold")
    assert exit_code([row]) == 0


def test_a_figure_without_promise_or_claim_has_no_verdict():
    row = Row(measure="rate", value=5, unit="events/s")
    assert (row.holds, row.claim_holds, row.verdict(), row.target()) == (None, None, "", "")


def test_the_json_lists_each_row_with_these_keys(tmp_path):
    rows = [
        Row(measure="rate", value=0.5, unit="x", must=">= 0.70", baseline="bare, 9 events/s", detail="median of 5"),
        claim(2, 3, 5),
    ]
    write_json(rows, tmp_path / "build" / "bench.json")
    assert json.loads((tmp_path / "build" / "bench.json").read_text()) == [
        {
            "measure": "rate",
            "value": 0.5,
            "unit": "x",
            "baseline": "bare, 9 events/s",
            "must": ">= 0.70",
            "holds": False,
            "detail": "median of 5",
        },
        {
            "measure": "speed",
            "value": 2,
            "unit": "x",
            "baseline": None,
            "must": None,
            "holds": None,
            "detail": "claimed 3 to 5: claim does not hold",
        },
    ]


def test_the_table_and_the_page_show_value_limit_verdict_and_baseline():
    row = Row(measure="rate | of all", value=1234.5, unit="events/s", must=">= 2000", baseline="bare", detail="one run")
    assert [re.split(r"\s{2,}", line.strip()) for line in table([row]).splitlines()[2:]] == [
        ["rate | of all", "1,234 events/s", ">= 2000", "FALLS SHORT"],
        ["baseline: bare"],
        ["one run"],
    ]
    assert markdown([row]).splitlines()[-1] == (
        "| rate \\| of all | 1,234 events/s | >= 2000 | FALLS SHORT | baseline: bare; one run |"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (5, "5"),
        (0.123, "0.12"),
        (0.0123, "0.0123"),
        (45.67, "45.7"),
        (1200, "1,200"),
        (-2, "-2"),
    ],
)
def test_numbers_as_a_person_writes_them(value, text):
    assert number(value) == text


def test_median_and_spread():
    assert median_and_spread([3, 1, 2]) == (2, "median of 3, 1 to 3")
    assert median_and_spread([3]) == (3, "one run")


def test_percentiles_are_values_that_were_measured():
    values = list(range(100, 0, -1))
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7], 0.99) == 7


def test_the_start_is_taken_off_a_rate():
    # 0.5 s of start, then 1000 events a second; in one of three runs each something else took long.
    few = [Drain(100, seconds, 0.1) for seconds in (0.6, 0.9, 0.6)]
    many = [Drain(1100, seconds, 0.6) for seconds in (1.6, 1.6, 2.9)]
    start = start_of(few, many)
    assert start == pytest.approx(0.5)
    assert many[0].rate(start) == pytest.approx(1000)
    assert Drain(10, 1.5, 0.1).rate(start) == pytest.approx(10)


def test_latencies_are_sorted_into_rounds_by_commit_without_the_warming_up():
    scale = replace(QUICK, rounds=2, latency_seconds=10)
    begin = 1000.0 + WARM_UP_SECONDS
    measured = [(1000.0, 9.0), (begin + 9.9, 1.0), (begin, 2.0), (begin + 10, 3.0), (begin + 20, 9.0)]
    assert by_round(scale, measured) == [[1.0, 2.0], [3.0]]
