"""The metrics of relays and workers, on a port of their own: they serve no HTTP otherwise.

A worker is several processes. Each of its children counts in files of one folder, and the parent adds them up when
asked; counts of children that have died stay in the sum, what they measured at the moment does not. The client library
decides at its import whether it counts in files: so `share` comes first, and this room imports the library afterwards.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share(port: int | None) -> None:
    """Let this process and its children count together, if `port` says that anybody asks. Call it before any import.

    The folder follows from the port, which no two processes of a machine share, and what was left in it is removed.
    """
    if port is None:
        return
    folder = Path(tempfile.gettempdir()) / f"scaleout-metrics-{port}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    os.environ[_VARIABLE] = str(folder)


def serve(port: int | None) -> Callable[[], None]:
    """Answer `GET /metrics` on `port` of every address, in a thread, until the process ends.

    Returns what a forked child calls to let go of the port: it would keep it taken after its parent was killed.

    Raises:
        OSError: if the port is taken.
    """
    if port is None:
        return lambda: None
    from prometheus_client import REGISTRY, CollectorRegistry, Metric, start_http_server  # noqa: PLC0415 - see above
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # noqa: PLC0415

    class Family(MultiProcessCollector):
        """Adds up what parent and children have counted."""

        def collect(self) -> Iterable[Metric]:
            """Collect, without the present state of those that are dead."""
            for process in {file.stem.rpartition("_")[2] for file in Path(self._path).glob("gauge_live*.db")}:
                if not _lives(int(process)):
                    mark_process_dead(process, self._path)  # type: ignore[no-untyped-call]  # its one room without types
            found: Iterable[Metric] = super().collect()  # type: ignore[no-untyped-call]
            return found

    registry = REGISTRY
    if _VARIABLE in os.environ:
        registry = CollectorRegistry()
        Family(registry)  # type: ignore[no-untyped-call]
    server, _ = start_http_server(port, registry=registry)
    return server.socket.close


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def forget() -> None:
    """Remove what was counted, at the end of the process that shared it."""
    folder = os.environ.get(_VARIABLE)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
