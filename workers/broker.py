"""The Celery application and the publishing to it: five named queues, JSON only, nothing that the outbox does not keep.

The broker is a pipe, not a store. A message that it loses is published again from its outbox row, a message that it
delivers twice is dropped by its receipt; so there is no result backend, and no retry or delay lives in Celery.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from time import time
from typing import Any

import orjson
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from app.core.settings import Settings

# A task's queue is the part of its name before the dot, so a queue can be given workers of its own by name.
QUEUES = ("orders", "invoices", "emails", "reports", "upkeep")

# A broker on the same network answers in milliseconds. After 5 s without an answer the connection is taken for dead,
# well before anybody would notice that messages wait.
ANSWER_SECONDS = 5.0
CONNECT_SECONDS = 1.0

# For SIGQUIT, the impatient stop: this long tasks may still end, the rest is cancelled and delivered again. SIGTERM
# waits for the running tasks, each of which is bounded by its own time limit.
SOFT_SHUTDOWN_SECONDS = 5.0

# Opening the pools of a child takes a few tenths of a second; on a laptop that is busy starting a cluster, seconds.
CHILD_START_SECONDS = 15.0


class BrokerDown(Exception):  # a state of the world that the relay handles, not a fault to report
    """The broker did not take the messages, or nobody knows whether it did."""


def create_celery(settings: Settings) -> Celery:
    """Return the application that relay, workers and scheduler share; tasks are registered by the workers alone."""
    celery = Celery("scaleout", broker=settings.redis.broker, set_as_current=False)
    celery.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_queues=[Queue(name) for name in QUEUES],  # type: ignore[no-untyped-call]
        task_routes={f"{name}.*": {"queue": name} for name in QUEUES},
        # A name that no queue is for is a mistake and raises, instead of waiting in a queue that nobody reads.
        task_create_missing_queues=False,
        task_default_queue="none",
        task_publish_retry=False,  # the relay waits without holding a thread, the scheduler has its next time
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_enable_prefetch_count_reduction=False,  # nothing is held that does not run
        worker_concurrency=settings.workers.concurrency,
        worker_proc_alive_timeout=CHILD_START_SECONDS,
        worker_soft_shutdown_timeout=SOFT_SHUTDOWN_SECONDS,
        # What still runs then is delivered again anyway: better that it ends than that it runs twice at once.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # the metrics and the outbox say what a worker does; nobody commands it
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a broker that comes back after an hour finds its workers waiting
        # Nor does one that answers and refuses: that is full, or has become a replica in a failover.
        broker_channel_error_retry=True,
        broker_connection_timeout=CONNECT_SECONDS,
        broker_transport_options={
            "visibility_timeout": settings.workers.visibility_timeout,
            "socket_timeout": ANSWER_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            # With these two the messages of a killed worker are looked for every 10 s once their time is over,
            # rather than every 100 s.
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
        },
    )
    return celery


# Of each message in a queue: when it came there, in seconds since 1970.
PUBLISHED_AT = "published_at"


@dataclass(frozen=True, slots=True)
class Posting:
    """One run of one task, to be handed to the broker.

    Attributes:
        task: its name.
        body: JSON.
        label: says in Celery's logs what it is of.
        handed_at: when it was about to be handed over the last time, in seconds since 1970; None for the first time.
            Its copy from then still waits while the queue begins with what came no later.
    """

    task: str
    body: dict[str, Any]
    label: str
    handed_at: float | None = None

    @property
    def queue(self) -> str:
        """The queue of the task."""
        return self.task.partition(".")[0]


class Publisher:
    """One connection to the broker, for one thread. It opens by itself and is opened anew after a failure.

    Args:
        celery: the application, for its queues and routes.
    """

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._producer: Any = None

    def connect(self) -> None:
        """Open the connection if there is none. This blocks, as `publish` does: never call it on an event loop.

        Raises:
            BrokerDown: if the broker does not answer.
        """
        with self._failing():
            if self._producer is None:
                connection = self._celery.connection_for_write()
                self._producer = self._celery.amqp.Producer(connection, auto_declare=False)
                self._producer.channel.client.ping()

    def publish(self, postings: Sequence[Posting]) -> Sequence[Posting]:
        """Hand the postings to the broker, in one round trip, and one more before it if one of them comes again.

        Returns:
            Those that it was handed: not those of which a copy still waits there.

        Raises:
            BrokerDown: if it is not known that the broker has all of them.
        """
        self.connect()
        with self._failing():
            due = self._without_those_that_wait(postings)
            self._send(due)
        return due

    def waiting(self) -> dict[str, tuple[int, float]]:
        """Return of each queue how many messages wait in it, and since how many seconds the oldest.

        Raises:
            BrokerDown: if the broker does not answer.
        """
        self.connect()
        with self._failing():
            pipeline = self._producer.channel.client.pipeline(transaction=False)
            for queue in QUEUES:
                pipeline.llen(queue)
                pipeline.lindex(queue, -1)
            answers = pipeline.execute()
        now = time()
        return {
            queue: (length, max(0.0, now - _published_at(oldest)) if oldest else 0.0)
            for queue, length, oldest in zip(QUEUES, answers[::2], answers[1::2], strict=True)
        }

    def _without_those_that_wait(self, postings: Sequence[Posting]) -> Sequence[Posting]:
        """Leave out what would only make a long queue longer: else an hour without workers fills it with copies.

        A queue is first in, first out, so its oldest message says how far it has come. What was lost is handed over
        again as soon as the queue has passed the place where it would stand.
        """
        if all(posting.handed_at is None for posting in postings):
            return postings
        pipeline = self._producer.channel.client.pipeline(transaction=False)
        for queue in QUEUES:
            pipeline.lindex(queue, -1)
        oldest = {queue: _published_at(raw) for queue, raw in zip(QUEUES, pipeline.execute(), strict=True) if raw}
        return [
            posting
            for posting in postings
            # It came there at most that long after it was about to, and clocks of two relays differ by less.
            if posting.handed_at is None or posting.handed_at + ANSWER_SECONDS < oldest.get(posting.queue, inf)
        ]

    def _send(self, postings: Sequence[Posting]) -> None:
        now = time()
        with self._producer.batch():
            for posting in postings:
                self._celery.send_task(
                    posting.task,
                    args=(posting.body,),
                    argsrepr=posting.label,
                    kwargsrepr="",
                    headers={PUBLISHED_AT: now},
                    producer=self._producer,
                    retry=False,
                )

    def close(self) -> None:
        """Let go of the connection, also of a broken one."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KombuError, RedisError, OSError):
                producer.connection.release()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (KombuError, RedisError, OSError) as error:
            self.close()
            raise BrokerDown(type(error).__name__) from error


def _published_at(raw: bytes) -> float:
    """Return when a message came into its queue; of a version that did not note it, that it came last."""
    return float(orjson.loads(raw)["headers"].get(PUBLISHED_AT, inf))
