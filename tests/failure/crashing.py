"""A worker, relay or chore that kills itself with SIGKILL at the points of a plan, each once; else the real one.

Run as `python crashing.py worker|relay|CHORE FOLDER`: `FOLDER/plan.json` is `{point: [order id, …]}`, a point is
`service.effect before|after`, and `FOLDER/died-…` tells of each death, so that the next process goes on.
"""

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from app import operations
from app.domain.catalog.service import Catalog
from app.domain.orders.invoicing import Invoices
from app.domain.orders.mail import Mail
from app.domain.payments.service import Payments
from app.domain.reports.jobs import Jobs
from app.domain.reports.service import Reports
from app.scaling.tally import Tally
from workers import main, relay
from workers.broker import Publisher

FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else ".")

# What the steps of the saga do outside of the order's own transaction.
EFFECTS: dict[str, type] = {
    "catalog.reserve": Catalog,
    "catalog.release": Catalog,
    "catalog.dispatch": Catalog,
    "payments.authorise": Payments,
    "payments.capture": Payments,
    "invoices.issue": Invoices,
    "mail.order_confirmation": Mail,
    "reports.record_sale": Reports,
    "reports.take_back": Reports,
    "payments.undo": Payments,
    "mail.order_cancellation": Mail,
}
POINTS = (
    *(f"{effect} {when}" for effect in EFFECTS for when in ("before", "after")),
    "worker.start before",
    "relay.publish before",
    "relay.publish after",
)


def die_if_planned(point: str, order_id: str) -> None:
    """Kill this process, without a word, if the plan says so and it has not been done yet."""
    mark = FOLDER / f"died-{point.replace(' ', '-')}-{order_id}"
    plan = json.loads((FOLDER / "plan.json").read_text())
    if order_id in plan.get(point, ()) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def arm(effect: str, owner: type) -> None:
    """Put the two points of an effect around it."""
    name = effect.partition(".")[2]
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def armed(self: Any, subject: Any, *arguments: Any) -> Any:
        order_id = str(getattr(subject, "order_id", getattr(subject, "id", subject)))
        die_if_planned(f"{effect} before", order_id)
        answer = await original(self, subject, *arguments)
        die_if_planned(f"{effect} after", order_id)
        return answer

    setattr(owner, name, armed)


def arm_start() -> None:
    """Put a point between a message's arrival at a worker and the first thing that is done for it."""
    original = main.execute

    async def armed(task: Any, resources: Any, delivery: Any) -> Any:
        die_if_planned("worker.start before", str(delivery.message.subject_id))
        return await original(task, resources, delivery)

    main.execute = armed  # type: ignore[attr-defined]


def arm_publish() -> None:
    """Put two points around the moment at which a relay hands a whole batch to the broker."""
    original = Publisher.publish

    def armed(self: Publisher, postings: Any) -> None:
        for when in ("before", "after"):
            for posting in postings:
                die_if_planned(f"relay.publish {when}", posting.body["message"]["subject_id"])
            if when == "before":
                original(self, postings)

    Publisher.publish = armed  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        for armed_effect, room in EFFECTS.items():
            arm(armed_effect, room)
        arm("jobs.advance", Jobs)
        arm_start()
        main.run_worker()
    elif sys.argv[1] == "relay":
        arm_publish()
        relay.run()
    else:
        arm("tally.drop", Tally)
        sys.exit(operations.run_chore(sys.argv[1]))
