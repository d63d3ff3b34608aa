"""The run folder of the local cluster: private files, passwords that stay, sockets that fit."""

import stat
from pathlib import Path

import pytest

from deploy.local import ClusterError
from deploy.local.layout import (
    LONGEST_SOCKET_PATH,
    Layout,
    Secrets,
    read_json,
    write_json,
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path, tmp_path / "state")
    made.create(None)
    return made


def test_files_are_readable_by_their_owner_only(layout: Layout) -> None:
    write_json(layout.cluster, {"url": ""})
    Secrets.load(layout)
    for file in (layout.cluster, layout.secrets):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_is_replaced_whole_and_leaves_no_draft_behind(layout: Layout) -> None:
    write_json(layout.cluster, {"url": "old"})
    with layout.cluster.open() as reader:
        write_json(layout.cluster, {"url": "new"})
        assert "old" in reader.read()
    assert read_json(layout.cluster) == {"url": "new"}
    assert not list(layout.root.glob(".cluster.json*"))


def test_passwords_stay_the_same_between_starts_and_need_no_quoting(layout: Layout) -> None:
    first, second = Secrets.load(layout), Secrets.load(layout)
    assert first == second
    assert all(letter.isalnum() or letter in "-_" for letter in first.superuser + first.redis)
    assert first.superuser not in repr(first)


def test_a_lost_password_file_is_named_instead_of_locking_the_data_out(layout: Layout) -> None:
    (layout.data / "primary").mkdir()
    with pytest.raises(ClusterError, match=r"secrets\.json is gone"):
        Secrets.load(layout)


def test_the_socket_fits_however_long_the_path_is(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    assert len(str(Layout(deep, deep / "state").socket)) <= LONGEST_SOCKET_PATH


def test_a_folder_that_is_a_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "cluster").write_text("")
    with pytest.raises(ClusterError, match="Start in a folder that you may write"):
        Layout(tmp_path / "cluster", tmp_path / "state").create_root()
