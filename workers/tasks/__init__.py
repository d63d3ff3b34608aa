"""All tasks and chores of the workers; `workers/relay.py` says which events the tasks follow."""

from workers.task import Task
from workers.tasks import avatars, confirmed, orders, reports, upkeep
from workers.tasks.upkeep import Chore

TASKS: tuple[Task, ...] = (
    orders.reserve_stock,
    orders.release_stock,
    orders.undo,
    orders.authorise_payment,
    orders.capture_payment,
    orders.notify_warehouse,
    confirmed.issue_invoice,
    confirmed.forget_buyer,
    confirmed.confirm_order,
    confirmed.confirm_cancellation,
    confirmed.record_sale,
    reports.make_report,
    avatars.accept_avatar,
    avatars.erase_avatar,
    upkeep.forget_sessions,
    upkeep.end_sessions,
    upkeep.refresh_profile,
    upkeep.refresh_product,
)

CHORES: tuple[Chore, ...] = (
    upkeep.sweep_directory,
    upkeep.flush_views,
    upkeep.reconcile_payments,
    upkeep.purge,
    upkeep.purge_jobs,
    upkeep.sweep_uploads,
)
