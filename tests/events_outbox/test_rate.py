import statistics

import pytest

from events_outbox import rate
from events_outbox.rate import GATHER, GATHER_MAX_SECONDS, Pace

WINDOW_SECONDS = 0.005
MIN_SECONDS, MAX_SECONDS = 0.005, 0.1


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(rate, "time", made)
    return made


def windows(clock, pace, *, per_second, seconds):
    """Events of each window, and the pause after it, when so many events come in a second, evenly."""
    found = []
    ends_at, seen = clock.now + seconds, int(clock.now * per_second)
    while clock.now < ends_at:
        pace.begin()
        come = int(clock.now * per_second)
        clock.now += WINDOW_SECONDS
        found.append((come - seen, pace.pause_seconds(come - seen)))
        seen = come
        clock.now += found[-1][1]
    return found


@pytest.mark.parametrize("per_second", [200, 400, 800])
def test_events_gather_while_they_come(clock, per_second):
    settled = windows(clock, Pace(MIN_SECONDS, MAX_SECONDS), per_second=per_second, seconds=3)[50:]
    assert statistics.mean(events for events, _ in settled) == pytest.approx(GATHER, rel=0.15)
    assert all(MIN_SECONDS <= pause <= GATHER_MAX_SECONDS for _, pause in settled)


def test_many_events_are_taken_at_once(clock):
    settled = windows(clock, Pace(MIN_SECONDS, MAX_SECONDS), per_second=20_000, seconds=1)[20:]
    assert {pause for _, pause in settled} == {MIN_SECONDS}


@pytest.mark.parametrize("per_second", [20, 100])
def test_few_events_do_not_wait_for_more(clock, per_second):
    found = windows(clock, Pace(MIN_SECONDS, MAX_SECONDS), per_second=per_second, seconds=3)
    assert max(pause for events, pause in found if events) == GATHER_MAX_SECONDS


def test_pauses_double_while_nothing_comes_and_are_short_again_after_an_event(clock):
    pace = Pace(MIN_SECONDS, MAX_SECONDS)
    idle = [pause for _, pause in windows(clock, pace, per_second=0, seconds=1)]
    assert idle[:7] == [0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.1]
    pace.begin()
    pace.pause_seconds(1)
    pace.begin()
    assert pace.pause_seconds(0) == MIN_SECONDS


def test_a_longest_pause_below_the_gathering_holds(clock):
    found = windows(clock, Pace(0.001, 0.02), per_second=30, seconds=2)
    assert max(pause for _, pause in found) == 0.02


def test_a_burst_after_silence_is_keeping_up_within_a_moment(clock):
    pace = Pace(MIN_SECONDS, MAX_SECONDS)
    windows(clock, pace, per_second=0, seconds=60)
    found = windows(clock, pace, per_second=800, seconds=1)
    assert all(pause <= 0.012 for _, pause in found[10:])
