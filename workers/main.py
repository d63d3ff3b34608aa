"""The worker: Celery's prefork pool around our tasks, each child with an event loop and resources of its own.

SIGTERM stops taking messages and lets the running tasks end, each bounded by its time limit. A worker that is killed
loses nothing: what it had not finished comes again from the outbox.
"""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from billiard.process import active_children
from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker import request

from app.core.settings import Settings, load_settings
from app.core.telemetry import configure_logging, logger
from app.scaling.lifecycle import Lifecycle, Phase
from workers import metrics
from workers.broker import create_celery
from workers.runtime import Runtime
from workers.task import HARD_MARGIN_SECONDS, Delivery, Task, execute
from workers.tasks import CHORES, TASKS
from workers.tasks.upkeep import Chore, attend

log = logger(__name__)


class Request(request.Request):  # type: ignore[misc]
    """A delivery whose acknowledgement, when it fails, makes the worker connect anew.

    Celery logs such a failure and goes on. With Redis the delivery then counts as held for ever, and since a worker
    holds only as many as it has processes, two of them during one outage stop it for good, without a sign.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connection_errors = ()  # those that are logged and passed over


def run_worker(tasks: Iterable[Task] = TASKS) -> None:
    """Run a worker until it is told to stop.

    Raises:
        SettingsError: naming every bad setting.
        SystemExit: with the worker's exit code.
    """
    settings = load_settings()
    configure_logging(settings.service, "worker")
    # Celery tells of each task twice at this level; our own line, with request id and outcome, is the third.
    for chatty in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns root because pickled tasks would let whoever reaches the broker run code as root. Ours are JSON only.
    warnings.simplefilter("ignore", SecurityWarning)
    let_go = metrics.serve(settings.service.metrics_port)
    signals.worker_process_init.connect(lambda **_: let_go(), weak=False)
    lifecycle = Lifecycle(settings.service.ready_file)
    celery = create_worker(settings, lifecycle, tasks)
    worker = celery.Worker(
        hostname=f"worker@{settings.service.instance}",
        loglevel=settings.service.log_level,
        quiet=True,
        # Workers have nothing to tell each other; looking for neighbours alone takes a second of every start.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    _end_children()
    lifecycle.enter(Phase.STOPPED)
    metrics.forget()
    raise SystemExit(worker.exitcode)


def _end_children() -> None:
    """End the children that the pool has forgotten: one that was replaced while the pool was closing never hears of it.

    Nothing is lost with them: the pool has waited for every task. Left alone they would stay for ever, with all that
    they have open.
    """
    for child in active_children():
        log.warning("a child outlived its pool", pid=child.pid)
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


def create_worker(settings: Settings, lifecycle: Lifecycle, tasks: Iterable[Task] = TASKS) -> Celery:
    """Return the Celery application with the tasks and chores on it and the life of its children arranged."""
    celery = create_celery(settings)
    # The ready file is the parent's: a child that is replaced must not touch it.
    service = settings.service.model_copy(update={"ready_file": None})
    runtime = Runtime(settings.model_copy(update={"service": service}))
    for task in tasks:
        celery.task(name=task.name, bind=True, time_limit=task.longest, Request=Request)(_deliver(runtime, task))
    for chore in CHORES:
        limit = chore.seconds + HARD_MARGIN_SECONDS
        celery.task(name=chore.name, time_limit=limit, Request=Request)(_attend(runtime, chore))
    # weak=False: nobody else holds these functions.
    signals.setup_logging.connect(_keep_logging, weak=False)
    signals.worker_process_init.connect(lambda **_: _open(runtime), weak=False)
    signals.worker_process_shutdown.connect(lambda **_: runtime.close(), weak=False)
    signals.worker_ready.connect(lambda **_: lifecycle.enter(Phase.READY), weak=False)
    signals.worker_shutting_down.connect(lambda **_: _drain(lifecycle), weak=False)
    return celery


def _deliver(runtime: Runtime, task: Task) -> Callable[[Any, dict[str, Any]], None]:
    def deliver(run: Any, body: dict[str, Any]) -> None:
        redelivered = bool(run.request.delivery_info.get("redelivered"))
        delivery = Delivery.from_json(task.name, body, copy=run.request.id, redelivered=redelivered)
        runtime.run(execute(task, runtime.resources, delivery))

    return deliver


def _attend(runtime: Runtime, chore: Chore) -> Callable[[], None]:
    def run() -> None:
        runtime.run(attend(chore, runtime.resources))

    return run


def _open(runtime: Runtime) -> None:
    try:
        runtime.open()
    except Exception as error:
        # Celery would log it and let the child take tasks that it cannot do; a child that ends is replaced.
        log.exception("the resources of a worker process do not open")
        raise SystemExit(1) from error


def _drain(lifecycle: Lifecycle) -> None:
    # A second signal finds the worker draining already.
    if lifecycle.phase < Phase.DRAINING:
        lifecycle.enter(Phase.DRAINING)


def _keep_logging(**_: Any) -> None:
    """Stand in the place of Celery's own logging set-up, which this signal replaces; ours is done."""
