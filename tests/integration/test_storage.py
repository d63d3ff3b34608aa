"""The object storage, a folder and an S3 endpoint alike: objects, links, uploads; and avatars on either."""

import asyncio
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import time
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from apart import Apart, apart_from
from conftest import until
from PIL import ExifTags, Image

from app.core.errors import NotFound, Unavailable
from app.core.settings import StorageSettings
from app.domain.profiles.avatars import ROOM, TYPES, Avatars, Expected, draw
from app.domain.profiles.rules import NewProfile, Profile
from app.scaling.storage import PUBLIC_CACHING, Storage
from deploy.local.cluster import Cluster
from deploy.local.ports import free_port

SECRET = b"x" * 32
PUBLIC = "http://shop.example"
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
async def endpoint() -> AsyncIterator[str]:
    """An S3 endpoint with an empty bucket."""
    port = free_port()
    process = subprocess.Popen(  # noqa: ASYNC220, S603  # starting it takes a moment only
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"

    async def made() -> bool:
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient() as client:
                return (await client.put(f"{url}/assets")).is_success
        return False

    try:
        await until(made, seconds=60)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module", params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest, endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storage]:
    """A storage of either kind."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "AWS_ENDPOINT": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }.items():
            patched.setenv(name, value)
        folder = tmp_path_factory.mktemp("storage").as_uri()
        yield Storage(StorageSettings(url="s3://assets" if request.param == "s3" else folder), SECRET, PUBLIC, "here")


@pytest.fixture(scope="module")
async def apart(cluster: Cluster) -> AsyncIterator[Apart]:
    async with apart_from(cluster) as made:
        yield made


async def upload(storage: Storage, key: str, content: bytes, content_type: str = "image/png") -> None:
    """Put an object as a client does, through its link; a folder's link leads to an instance, which is not here."""
    link = await storage.upload_link(key, content_type, len(content), datetime.now(UTC))
    if link.url.startswith(PUBLIC):
        named, _, _ = storage.open_upload(link.url.rpartition("/")[2], time())
        await storage.put(named, content, content_type)
        return
    async with httpx.AsyncClient() as client:
        (await client.put(link.url, content=content, headers=link.headers)).raise_for_status()


def picture(kind: str = "PNG", size: tuple[int, int] = (800, 600), mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").convert(mode).save(out, kind, **options)
    return out.getvalue()


async def test_what_is_put_can_be_got_measured_and_deleted(storage: Storage, tmp_path: Path) -> None:
    key, file = f"things/{uuid4()}", tmp_path / "large"
    await asyncio.to_thread(file.write_bytes, b"x" * 12_000_000)  # more than one part
    await storage.put(key, b"content", "text/plain")
    await storage.put_file(f"{key}-large", file, "text/plain")
    assert await storage.get(key) == b"content"
    assert (await storage.size(key), await storage.size(f"{key}-large")) == (7, 12_000_000)
    await storage.delete(key)
    await storage.delete(key)
    assert await storage.size(key) is None
    with pytest.raises(NotFound):
        await storage.get(key)


async def test_a_prefix_is_deleted_and_its_neighbour_stays(storage: Storage) -> None:
    one, other = uuid4(), uuid4()
    for key in (f"a/{one}/1", f"a/{one}/2", f"a/{other}/1"):
        await storage.put(key, b"x", "text/plain")
    assert await storage.delete_below(f"a/{one}", datetime.now(UTC) - timedelta(hours=1)) == 0, "they are new"
    assert await storage.delete_below(f"a/{one}") == 2
    assert await storage.size(f"a/{other}/1") == 1


@pytest.mark.sabotage("app/scaling/storage.py", 'attributes["Cache-Control"] = caching', "pass")
async def test_a_public_object_says_itself_how_long_it_may_be_kept(storage: Storage) -> None:
    key = f"things/{uuid4()}"
    await storage.put(key, b"content", "text/plain", caching=PUBLIC_CACHING)
    link = await storage.link(key, time())
    if link.startswith(PUBLIC):
        return  # an instance serves a folder's objects and says it, tests/api/test_avatars.py
    async with httpx.AsyncClient() as client:
        assert (await client.get(link)).headers["cache-control"] == PUBLIC_CACHING


async def test_a_link_of_a_bucket_needs_no_credentials(storage: Storage) -> None:
    key = f"things/{uuid4()}"
    await storage.put(key, b"content", "text/plain")
    link = await storage.link(key, time())
    if link.startswith(PUBLIC):
        assert storage.open_link(link.rpartition("/")[2], time()) == key
        return
    async with httpx.AsyncClient() as client:
        answer = await client.get(link)
    assert (answer.content, answer.headers["content-type"]) == (b"content", "text/plain")


async def test_links_lead_to_where_clients_reach_the_bucket(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    own = urlsplit(await storage.link("things/x", time()))
    monkeypatch.setattr(storage, "_outside", "https://shop.example/storage")
    link = urlsplit(await storage.link("things/x", time()))
    upload = await storage.upload_link("things/x", "image/png", 1, datetime.now(UTC))
    if own.path.startswith("/files/"):
        assert link.path.startswith("/files/"), "a folder's links are our own"
        return
    assert (link.netloc, link.path) == ("shop.example", f"/storage{own.path}")
    assert parse_qs(link.query).keys() == parse_qs(own.query).keys()
    assert upload.url.startswith("https://shop.example/storage/")


async def test_the_regions_network_is_where_assets_are(tmp_path: Path) -> None:
    settings = StorageSettings(url=tmp_path.as_uri(), public_url="https://{region}.cdn.example/")
    assert (
        await Storage(settings, SECRET, PUBLIC, "eu-west").address("avatars/x", 0)
        == "https://eu-west.cdn.example/avatars/x"
    )


async def member(apart: Apart) -> Profile:
    return await apart.resources.profiles.sign_up(
        NewProfile(f"{uuid4().hex}@example.com", "a long enough phrase", "Ada")
    )


def expected(profile: Profile, size: int, content_type: str = "image/png", seconds: float = 60) -> Expected:
    return Expected(f"uploads/{profile.id}/{uuid4().hex}", content_type, size, time() + seconds)


async def shown(apart: Apart, profile: Profile) -> str | None:
    return (await apart.resources.profiles.own(profile.id)).avatar_url


async def test_an_upload_is_shown_as_a_picture_of_our_own(storage: Storage, apart: Apart) -> None:
    profile, avatars = await member(apart), Avatars(apart.resources.database, storage, apart.resources.profiles)
    content = picture()
    waiting = expected(profile, len(content))
    with pytest.raises(Unavailable):
        await avatars.accept(profile.id, waiting)
    await upload(storage, waiting.key, content)
    await avatars.accept(profile.id, waiting)
    first = str(await shown(apart, profile)).removeprefix("/api/v1/assets/")
    with Image.open(io.BytesIO(await storage.get(first))) as image:
        assert (image.format, image.size) == ("WEBP", (512, 384))
    assert await storage.size(waiting.key) is None
    await avatars.accept(profile.id, expected(profile, 1, seconds=-1))  # a link that nobody used
    again = expected(profile, 10**6)
    await upload(storage, again.key, picture(size=(64, 64)))
    await avatars.accept(profile.id, again)
    second = str(await shown(apart, profile)).removeprefix("/api/v1/assets/")
    assert second != first
    assert await storage.size(first) is None, "the one before is gone"
    await avatars.erase(profile.id)
    assert await storage.size(second) is None


@pytest.mark.sabotage("app/domain/profiles/avatars.py", "if size <= expected.size:", "if True:")
async def test_what_is_not_what_was_announced_is_never_shown(storage: Storage, apart: Apart) -> None:
    profile, avatars = await member(apart), Avatars(apart.resources.database, storage, apart.resources.profiles)
    page = b"<script>alert(1)</script>"
    for content, announced in (
        (page, expected(profile, len(page))),
        (picture("JPEG"), expected(profile, 10**6)),
        (picture(), expected(profile, 10)),
        (picture()[:200], expected(profile, 10**6)),
    ):
        await upload(storage, announced.key, content)
        await avatars.accept(profile.id, announced)
        assert await shown(apart, profile) is None
        assert await storage.size(announced.key) is None


async def test_a_profile_that_is_erased_meanwhile_shows_nothing(storage: Storage, apart: Apart) -> None:
    profile, avatars = await member(apart), Avatars(apart.resources.database, storage, apart.resources.profiles)
    announced = expected(profile, 10**6)
    await upload(storage, announced.key, picture())
    await apart.resources.profiles.erase(profile.id, profile.version)
    await avatars.accept(profile.id, announced)
    assert await storage.delete_below(f"avatars/{profile.id}") == 0


def drawn_within(room: int, content: bytes, content_type: str) -> bool:
    """Return whether a process that may take `room` bytes more than it has can draw the picture."""
    program = f"""
import resource, sys
from app.domain.profiles.avatars import draw
content = sys.stdin.buffer.read()
has = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + {room}, has + {room}))
sys.exit(0 if draw(content, {content_type!r}) else 3)
"""
    ended = subprocess.run(  # noqa: S603  # our own
        [sys.executable, "-c", program], input=content, cwd=CHECKOUT, check=False, stderr=subprocess.PIPE
    )
    assert ended.returncode in {0, 1, 3}, ended.stderr
    return ended.returncode == 0


# Each as large as its kind may be; a phone's photo is the first.
@pytest.mark.parametrize(
    ("content_type", "mode", "side", "options"),
    [
        ("image/jpeg", "RGB", 4890, {}),
        ("image/jpeg", "CMYK", 1990, {"progressive": True, "subsampling": 0}),
        ("image/png", "RGB", 2880, {}),
        ("image/png", "RGBA", 2050, {}),
        ("image/webp", "RGBA", 1470, {}),
    ],
    ids=["photo", "progressive", "png", "transparent", "webp"],
)
@pytest.mark.sabotage("app/domain/profiles/avatars.py", "_memory(image, content_type) > ROOM", "image.width < 0")
def test_a_picture_that_would_fill_the_memory_is_not_decoded(
    content_type: str, mode: str, side: int, options: dict[str, object]
) -> None:
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 6
    largest, larger = (
        picture(TYPES[content_type], (width, width), mode=mode, exif=on_its_side, **options)
        for width in (side, int(side * 1.02))
    )
    # What the picture itself is comes on top, and a stack for libwebp's thread.
    assert drawn_within(ROOM + len(largest) + 16_000_000, largest, content_type)
    assert draw(larger, content_type) is None


def test_nothing_but_pixels_gets_through() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera that tells"
    drawn = draw(picture("JPEG", exif=exif, comment=b"<script>"), "image/jpeg")
    assert drawn is not None
    with Image.open(io.BytesIO(drawn)) as image:
        assert not image.getexif()
    assert b"tells" not in drawn
    assert b"<script>" not in drawn


async def test_nobody_uploads_without_a_link_of_ours(tmp_path: Path) -> None:
    storage = Storage(StorageSettings(url=tmp_path.as_uri()), SECRET, PUBLIC, "here")
    link = await storage.upload_link("uploads/x", "image/png", 5, datetime.now(UTC))
    signed = link.url.rpartition("/")[2]
    assert storage.open_upload(signed, time()) == ("uploads/x", "image/png", 5)
    with pytest.raises(NotFound):
        storage.open_upload(signed, time() + 301)
    with pytest.raises(NotFound):
        storage.open_link(signed, time())
    with pytest.raises(NotFound):
        storage.open_upload((await storage.link("uploads/x", time())).rpartition("/")[2], time())
