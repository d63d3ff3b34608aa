"""One event loop and one set of resources for each child of a worker, opened after the fork.

Celery's children are synchronous processes; our rooms are asynchronous. A child therefore runs one loop in a thread of
its own for its whole life, so that pools, breakers and replica watchers live as long there as in an API instance.
"""

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from app.core import tracing
from app.core.settings import Settings
from app.scaling.lifecycle import Phase
from app.wiring import Resources, beating, open_resources

T = TypeVar("T")

# More than any pool needs to close. A child that does not end by then is killed by its parent without harm.
CLOSE_SECONDS = 5.0


class Runtime:
    """The loop and the resources of one child. Create it before the fork, open it after.

    Args:
        settings: what the resources are opened with.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._resources: Resources | None = None

    @property
    def resources(self) -> Resources:
        """The resources of this child.

        Raises:
            RuntimeError: before `open` and after `close`.
        """
        if self._resources is None:
            raise RuntimeError("the runtime of this process is not open")
        return self._resources

    def open(self) -> None:
        """Start the loop, open the resources and return once they are there.

        Raises:
            Exception: what `open_resources` raised; a dependency that is down is no reason.
        """
        opened: Future[None] = Future()
        # The context goes along for what the logs say of the process.
        here = contextvars.copy_context()
        self._thread = threading.Thread(target=here.run, args=(self._live, opened), name="event loop", daemon=True)
        self._thread.start()
        opened.result()

    def close(self) -> None:
        """Close the resources and end the loop."""
        if self._thread is None or self._loop is None or self._closing is None:
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(CLOSE_SECONDS)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine on the loop and wait for its end; the time limit is the coroutine's own.

        An exception that reaches the waiting thread meanwhile, such as a signal's, cancels the coroutine.
        """
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("the runtime of this process is not open")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _live(self, opened: "Future[None]") -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(opened))

    async def _serve(self, opened: "Future[None]") -> None:
        try:
            # The traces go last: closing the resources may be part of one.
            with tracing.exporting(self._settings, "worker"):
                async with open_resources(self._settings) as resources, beating(resources, "worker"):
                    self._loop = asyncio.get_running_loop()
                    self._closing = asyncio.Event()
                    self._resources = resources
                    resources.lifecycle.enter(Phase.READY)
                    opened.set_result(None)
                    await self._closing.wait()
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error)  # the thread that opens raises it
                return
            raise
        finally:
            self._resources = self._loop = None
