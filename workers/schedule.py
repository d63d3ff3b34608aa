"""The scheduler: Celery beat with one table of what is due how often; the workers do it.

Two schedulers at once do no harm: every chore runs under a lock. A scheduler that was down sends once what it missed.
"""

from celery import signals

from app.core.settings import load_settings
from app.core.telemetry import configure_logging
from app.scaling.lifecycle import Lifecycle, Phase
from workers.broker import create_celery

MINUTE = 60.0

# Chore -> seconds between two runs.
SCHEDULE: dict[str, float] = {
    # A reservation keeps an e-mail address from being used; nobody should wait long for one that was left behind.
    "upkeep.sweep_directory": MINUTE,
    # A Redis that is lost takes the views since then with it; more often would be a transaction for a handful of them.
    "upkeep.flush_views": MINUTE,
    # A payment that differs is somebody's money; each is compared about 26 times before it is too old.
    "upkeep.reconcile_payments": 60 * MINUTE,
    # Rows live for days; an hour more or less is nothing, and each run deletes little.
    "upkeep.purge": 60 * MINUTE,
    "upkeep.sweep_uploads": 24 * 60 * MINUTE,
    # Whoever asked for a report that nobody makes is told so within an hour and a quarter.
    "upkeep.purge_jobs": 15 * MINUTE,
}


def run() -> None:
    """Run the scheduler until SIGTERM or SIGINT.

    Raises:
        SettingsError: naming every bad setting.
    """
    settings = load_settings()
    configure_logging(settings.service, "scheduler")
    lifecycle = Lifecycle(settings.service.ready_file)
    celery = create_celery(settings)
    celery.conf.update(
        beat_schedule_filename=str(settings.service.schedule_file),
        beat_schedule={
            # A run that was not taken before the next is due is stale: without workers nothing piles up to be done.
            name: {"task": name, "schedule": seconds, "options": {"expires": seconds}}
            for name, seconds in SCHEDULE.items()
        },
    )
    signals.setup_logging.connect(lambda **_: None, weak=False)  # ours is done
    signals.beat_init.connect(lambda **_: lifecycle.enter(Phase.READY), weak=False)
    try:
        celery.Beat(quiet=True, loglevel=settings.service.log_level, redirect_stdouts=False).run()
    finally:
        lifecycle.enter(Phase.STOPPED)
