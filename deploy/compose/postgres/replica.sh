#!/bin/bash
# A streaming replica: clones the primary if it has no copy to go on from, then becomes the server.
# A copy can be continued while the primary keeps the log from where the copy stopped, which is what its slot is for.
set -euo pipefail
export PGPASSFILE=/run/secrets/pgpass
slot=${NAME//-/_}
primary="host=$PRIMARY user=replicator dbname=scaleout connect_timeout=5"
draft=$PGDATA.part

ask() { psql "$primary" -XqAt -v ON_ERROR_STOP=1 -c "$1"; }

if [[ -s $PGDATA/PG_VERSION ]]; then
    # With the primary away nobody can say; the copy then serves what it has.
    if kept=$(ask "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '$slot' AND wal_status <> 'lost'"); then
        [[ $kept == 1 ]] || rm -rf "$PGDATA"
    fi
fi
if [[ ! -s $PGDATA/PG_VERSION ]]; then
    # A clone that was cut off left its draft and perhaps its slot.
    rm -rf "$draft" "$PGDATA"
    ask "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '$slot'" >/dev/null
    mkdir -p "$(dirname "$PGDATA")"
    pg_basebackup -d "$primary application_name=$NAME" -D "$draft" -X stream --checkpoint=fast -R -C -S "$slot"
    # Whom it follows goes into a file that postgresql.conf includes: ALTER SYSTEM can then name another one for a while,
    # and RESET leads back.
    grep '^primary_' "$draft/postgresql.auto.conf" >"$draft/follow.conf"
    sed -i '/^primary_/d' "$draft/postgresql.auto.conf"
    mv "$draft" "$PGDATA"
fi
exec postgres "$@"
