"""The one collection of all tables of the service, whichever room declares them, and the table of the shards' map.

Migrations are compared with it, and a mover finds in it what belongs to a profile.
"""

from sqlalchemy import JSON, BigInteger, Column, Integer, MetaData, Table

# One naming rule for every constraint, so that migrations can name what they change on any engine.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# The one row says where every logical shard is; whoever changes it names the epoch that it has seen. In the catalog.
shard_map = Table(
    "shard_map",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
)
