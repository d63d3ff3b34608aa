"""What follows an announced upload and an erased profile: pictures are looked at, shown, and deleted."""

from app.domain.profiles.avatars import Expected
from app.wiring import Resources
from workers.task import Delivery, once, task

# Decoding 24 megapixels takes a second; the rest is for an object storage that is slow.
ACCEPT_SECONDS = 30.0
ERASE_SECONDS = 60.0


@task("upkeep.accept_avatar", seconds=ACCEPT_SECONDS)
async def accept_avatar(resources: Resources, delivery: Delivery) -> None:
    """Look at an upload and show it if it is what was announced; deferred until it is there or its link is over."""
    await resources.avatars.accept(delivery.message.profile_id, Expected(**delivery.message.payload))
    async with once(resources, delivery):
        pass


@task("upkeep.erase_avatar", seconds=ERASE_SECONDS)
async def erase_avatar(resources: Resources, delivery: Delivery) -> None:
    """Delete the pictures of an erased profile."""
    await resources.avatars.erase(delivery.message.profile_id)
    async with once(resources, delivery):
        pass
