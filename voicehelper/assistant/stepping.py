"""Async work driven from a sync generator, in the same thread: it can be waited for a while, and be cancelled.

A web worker's thread that waits for a provider has to notice meanwhile that its client has gone, and a blocking read
cannot be called off.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from typing import TypeVar

from .attempts import Signal

Said = TypeVar("Said")
Result = TypeVar("Result")


def steps(
    work: Callable[[Callable[[Said], None]], Coroutine[None, None, Result]], *, tick_seconds: float
) -> Generator[Said | Result | Signal, None, None]:
    """Run `work(say)`: yield what it says, TICK whenever it has said nothing for `tick_seconds`, its result at last.

    Raises what it raises. Closing the generator cancels it and waits for its end. While the caller has the floor the
    work stands still.
    """
    loop = asyncio.new_event_loop()
    try:
        said: asyncio.Queue[Said | asyncio.Task[Result]] = asyncio.Queue()
        task = loop.create_task(work(said.put_nowait))
        task.add_done_callback(said.put_nowait)
        try:
            while True:
                try:
                    item = loop.run_until_complete(asyncio.wait_for(said.get(), tick_seconds))
                except TimeoutError:
                    yield Signal.TICK
                    continue
                if item is task:
                    yield task.result()
                    return
                yield item  # type: ignore[misc]  # the task is the only one of its kind
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # told above, or nobody waits for it
                loop.run_until_complete(task)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
