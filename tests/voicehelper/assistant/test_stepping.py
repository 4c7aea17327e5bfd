"""Async work driven from a sync generator."""

import asyncio
import gc
import time

import pytest

from voicehelper.assistant.attempts import Signal
from voicehelper.assistant.stepping import steps


def test_what_it_says_and_its_result():
    async def work(say):
        say("a")
        await asyncio.sleep(0)
        say("b")
        return 7

    assert list(steps(work, tick_seconds=5)) == ["a", "b", 7]


def test_it_ticks_while_nothing_is_said():
    async def work(say):
        await asyncio.sleep(0.1)
        say("late")

    heard = list(steps(work, tick_seconds=0.02))
    assert heard[0] is Signal.TICK and heard[-2:] == ["late", None]


def test_its_error_is_raised():
    async def work(say):
        say("a")
        raise KeyError("x")

    going = steps(work, tick_seconds=5)
    assert next(going) == "a"
    with pytest.raises(KeyError):
        next(going)


def test_closing_it_cancels_the_work_and_waits_for_its_end():
    ends = []

    async def work(say):
        say("a")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ends.append("tidied up")

    going = steps(work, tick_seconds=5)
    next(going)
    started = time.monotonic()
    going.close()
    assert ends == ["tidied up"]
    assert time.monotonic() - started < 5
    gc.collect()  # a loop that was left open would warn
