"""Which servers that speak MySQL's protocol are taken, by what they say in their greeting."""

import pytest

from app.scaling.dialect.mariadb import check_version

TAKEN = ("10.6.0-MariaDB", "10.11.6-MariaDB-log", "5.5.5-10.11.6-MariaDB", "11.4.2-MariaDB")
REFUSED = ("5.7.44", "8.0.36", "8.0.36-28", "12.0.1", "10.5.9-MariaDB", "5.5.5-10.5.9-MariaDB")


@pytest.mark.parametrize("version", TAKEN)
def test_mariadb_from_the_oldest_on_is_taken(version: str) -> None:
    check_version(version)


@pytest.mark.sabotage(path="app/scaling/dialect/mariadb.py", take_out='"MariaDB" not in version or ', put="")
@pytest.mark.parametrize("version", REFUSED)
def test_what_is_older_or_no_mariadb_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(ConnectionError, match=f"MariaDB 10.6 or newer is needed; the server there is {version}"):
        check_version(version)
