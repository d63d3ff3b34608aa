"""What Citus asks of statements: each on a table of a shard names the profile, so that it goes to one node.

Those that are meant for all profiles are listed, as `docs/patterns/sharding.md` lists them. (PYTEST_DONT_REWRITE:
nothing is asserted here.)
"""

import re
from collections.abc import Iterable

from app.domain.tables import metadata

SPREAD = {table.name: table for table in metadata.sorted_tables if "profile_id" in table.primary_key.columns}
_TOUCHED = re.compile(rf'\b(?:FROM|JOIN|INTO|UPDATE)\s+"?({"|".join(SPREAD)})\b')
_INTO = re.compile(rf'\bINSERT INTO "?(?:{"|".join(SPREAD)})"? \(([^)]*)\)')
# The column, alone or first of several in parentheses, is one or some of the statement's values.
_NAMED = re.compile(r"\bprofile_id(?:, [^()]*\))? (?:=|IN) \(*\$\d")
FOR_ALL = {
    "list of profiles": re.compile(r"^SELECT .* FROM profiles WHERE profiles\.erased_at IS NULL"),
    "list of dead letters": re.compile(r"^SELECT .* FROM dead_letters .*ORDER BY dead_letters\.id DESC"),
    "dead letter by its id": re.compile(r"^SELECT .* FROM dead_letters .*WHERE dead_letters\.id = \$1::UUID$"),
    "comparison of payments": re.compile(r"^SELECT .* FROM payment_attempts WHERE payment_attempts\.updated_at >="),
    "search for what is purged": re.compile(r"^SELECT .* FROM (\w+) WHERE \1\.\w+_at < .*ORDER BY \1\.\w+_at LIMIT"),
    "look at the backlog": re.compile(
        r"FROM outbox WHERE outbox\.due_at IS NOT NULL AND \(outbox\.event NOT IN \(.*LIMIT"
    ),
    "relay's claim": re.compile(r"^SELECT .* FROM outbox WHERE outbox\.due_at <= .*FOR UPDATE SKIP LOCKED$"),
}


def about_shards(statements: Iterable[str]) -> list[str]:
    """Return those statements that touch a table of a shard, each on one line."""
    return [" ".join(statement.split()) for statement in statements if _TOUCHED.search(statement)]


def names_the_profile(statement: str) -> bool:
    """Return whether a statement is about profiles that it names, or writes rows that say whose they are."""
    inserted = _INTO.findall(statement)
    if inserted:
        return all(re.search(r"\bprofile_id\b", columns) for columns in inserted)
    return bool(_NAMED.search(statement))


def strays(statements: Iterable[str]) -> list[str]:
    """Return the statements that Citus would send to all nodes, besides those that are meant for all."""
    return [
        statement
        for statement in about_shards(statements)
        if not names_the_profile(statement) and not any(known.search(statement) for known in FOR_ALL.values())
    ]
