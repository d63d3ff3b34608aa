#!/bin/sh
# Makes the passwords of this stack once, and writes every secret as a file that only its reader can open.
# A volume for each reader: the databases' is not mounted where Redis runs, and no service can see another's. Addresses
# come in as ADDRESS_<NAME>, or DIRECT_<NAME> for migrations, with {owner} and {redis} where a password belongs, and go
# out as the file <NAME>.
set -eu
umask 077

once() { # once FILE BYTES: random bytes as hexadecimal digits, kept for as long as the volume
    [ -s "$1" ] || { od -An -N "$2" -tx1 /dev/urandom | tr -d ' \n' >"$1.new" && mv "$1.new" "$1"; }
}

made=/secrets/made
once $made/superuser 24
once $made/owner 24
once $made/replication 24
once $made/redis 24
once $made/application 32
once $made/storage_id 10
once $made/storage_key 20

owner=$(cat $made/owner) redis=$(cat $made/redis)

for reader in database redis service storage pooler; do
    folder=/secrets/$reader
    # Written anew at each start: an address may have changed.
    find "$folder" -mindepth 1 -delete
done

cp $made/superuser $made/owner $made/replication /secrets/database/
echo "*:*:*:replicator:$(cat $made/replication)" >/secrets/database/pgpass

echo "requirepass $redis" >/secrets/redis/password.conf
echo "{\"redis://redis:6379\": \"$redis\"}" >/secrets/redis/passwords.json

cp $made/application /secrets/service/SECRET_KEY
cp $made/storage_id /secrets/service/AWS_ACCESS_KEY_ID
cp $made/storage_key /secrets/service/AWS_SECRET_ACCESS_KEY

addresses() { # addresses PREFIX FOLDER: a file for each variable with the prefix that says something
    for name in $(env | sed -n "s/^$1_\([A-Z_]*\)=..*/\1/p"); do
        printenv "$1_$name" | sed "s/{owner}/$owner/g; s/{redis}/$redis/g" >"$2/$name"
    done
}
addresses ADDRESS /secrets/service
# The same again for who must reach the databases themselves.
mkdir /secrets/service/direct
find /secrets/service -maxdepth 1 -type f -exec cp {} /secrets/service/direct/ \;
addresses DIRECT /secrets/service/direct

echo "\"scaleout\" \"$owner\"" >/secrets/pooler/userlist.txt

cat >/secrets/storage/s3.json <<JSON
{"identities": [{"name": "service",
  "credentials": [{"accessKey": "$(cat $made/storage_id)", "secretKey": "$(cat $made/storage_key)"}],
  "actions": ["Admin", "Read", "Write", "List"]}]}
JSON
# curl reads it, so that the key is in no process list.
echo "user = \"$(cat $made/storage_id):$(cat $made/storage_key)\"" >/secrets/storage/curl.conf

# The accounts that the images run as: PostgreSQL's and our own. Storage runs as root; Redis's account differs from image
# to image, and its volume has no other reader.
chown -R 999:999 /secrets/database
chown -R 10001:10001 /secrets/service /secrets/pooler
chmod 644 /secrets/redis/*
