#!/bin/sh
# Waits for object storage and makes the bucket. Both answers of S3 to a second try are fine: 200 and 409.
set -eu
status=$(curl --silent --show-error --output /dev/null --write-out '%{http_code}' --config /run/secrets/curl.conf \
    --retry 60 --retry-delay 1 --retry-connrefused --retry-all-errors --max-time 5 \
    --aws-sigv4 aws:amz:us-east-1:s3 --request PUT http://storage:8333/scaleout)
case $status in
    200 | 409) echo "The bucket scaleout is there." ;;
    *) echo "Object storage answered $status to PUT /scaleout." >&2; exit 1 ;;
esac
