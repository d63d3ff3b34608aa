"""The first requests to a running cluster, printed by `make run` to be pasted into a shell.

Every line works as it is printed, in the printed order, with curl and what any machine has besides; a second time too.
"""

from __future__ import annotations

from typing import NamedTuple

# Above any product's stock, and a quantity that an order may have.
MORE_THAN_THERE_IS = 1000

JSON = "-H 'Content-Type: application/json'"
AS_ADMIN = '-H "Authorization: Bearer $admin"'
SIGNED_IN = '-H "Authorization: Bearer $token"'


class Stop(NamedTuple):
    """One stop of the tour: what it shows, and the lines to paste."""

    title: str
    lines: list[str]


def stops(url: str, mailbox: str) -> list[Stop]:
    """The tour through the cluster at `url` whose SMTP sink lists its messages at `mailbox`."""
    return [
        Stop(
            "Where it is; a name and a password; and a way to take a value out of an answer",
            [
                f"api={url}/api/v1 email=you-$RANDOM$RANDOM@example.com password='three calm otters swim'",
                """first() { grep -o "\\"$1\\": *\\"[^\\"]*\\"" | head -n 1 | cut -d '"' -f 4; }""",
            ],
        ),
        Stop(
            "Sign up",
            [
                f"""curl -s $api/profiles {JSON} \\""",
                """  -d '{"email": "'"$email"'", "password": "'"$password"'", "name": "You"}'; echo""",
            ],
        ),
        Stop(
            "Sign in",
            [
                f"""token=$(curl -s $api/sessions {JSON} \\""",
                """  -d '{"email": "'"$email"'", "password": "'"$password"'"}' | first token); echo "$token\"""",
            ],
        ),
        Stop(
            "List products, and keep the first one",
            [
                f"""curl -s "$api/products?limit=3" {SIGNED_IN}; echo""",
                f"""product=$(curl -s "$api/products?limit=1" {SIGNED_IN} | first id); echo "$product\"""",
            ],
        ),
        Stop("Search products", [f"""curl -s "$api/products/search?q=lamp&limit=3" {SIGNED_IN}; echo"""]),
        Stop("Order two of it", [_order(2, "tok_ok")]),
        Stop("Wait until it is confirmed", [_until("confirmed")]),
        Stop(
            "Download the invoice",
            [
                f"""until curl -sfL -o invoice.pdf "$api/orders/$order/invoice" {SIGNED_IN}; do sleep 0.3; done""",
                "ls -l invoice.pdf",
            ],
        ),
        Stop(
            "Read the mail, with the invoice attached",
            [f"""until curl -s "{mailbox}/messages?to=$email" | grep '"attachments"'; do sleep 0.3; done"""],
        ),
        Stop("An order whose payment is declined", [_order(1, "tok_declined"), _until("rejected")]),
        Stop("An order of more than there is", [_order(MORE_THAN_THERE_IS, "tok_ok"), _until("rejected")]),
        Stop(
            "Its history as server-sent events; of an order under way they come as they happen",
            [f"""curl -sN "$api/orders/$order/events" {SIGNED_IN}"""],
        ),
        Stop(
            "What goes well with the product",
            [f"""curl -s "$api/products/$product/recommendations" {SIGNED_IN}; echo"""],
        ),
        Stop(
            "An avatar, straight into the object storage; here a picture of the API's own page",
            [
                """curl -s -o you.png "${api%/api/v1}/docs/favicon.png\"""",
                f"""me=$(curl -s $api/profiles/me {SIGNED_IN} | first id)""",
                f"""upload=$(curl -s -X PUT $api/profiles/$me/avatar {SIGNED_IN} {JSON} \\""",
                """  -d '{"content_type": "image/png", "size": '$(($(wc -c < you.png)))'}' | first upload_url)""",
                """curl -s -T you.png -H 'Content-Type: image/png' "$upload\"""",
                f"""until avatar=$(curl -s $api/profiles/me {SIGNED_IN} | first avatar_url) && test "$avatar\"""",
                "do sleep 1; done",
                """curl -sL -o avatar.webp "${api%/api/v1}$avatar"; ls -l avatar.webp""",
            ],
        ),
        Stop(
            "A report of today's sales, for the administrator",
            [
                f"""admin=$(curl -s $api/sessions {JSON} \\""",
                """  -d '{"email": "admin@example.com", "password": "correct horse battery"}' | first token)""",
                f"""job=$(curl -s $api/reports {AS_ADMIN} {JSON} \\""",
                """  -d '{"kind": "sales", "from": "'$(date -u +%F)'", "to": "'$(date -u +%F)'"}' | first job_id)""",
                f"""until curl -s $api/jobs/$job {AS_ADMIN} | tee job.json | grep '"done"'; do sleep 0.3; done""",
                """curl -s "$(first result_url < job.json)\"""",
            ],
        ),
    ]


def _order(quantity: int, method: str) -> str:
    return (
        f"""order=$(curl -s $api/orders {SIGNED_IN} -H "Idempotency-Key: try-$RANDOM$RANDOM$RANDOM" {JSON} \\\n"""
        f"""  -d '{{"items": [{{"product_id": "'$product'", "quantity": {quantity}}}], """
        f""""payment_method": "{method}"}}' | first id); echo "$order\""""
    )


def _until(status: str) -> str:
    show = f'curl -s "$api/orders/$order" {SIGNED_IN}'
    return f"""until {show} | grep '"status": *"{status}"'; do sleep 0.3; done"""
