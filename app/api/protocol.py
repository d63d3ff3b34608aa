"""The server's HTTP parser, with one difference: what it cannot read gets a problem too, not a line of plain text.

Such bytes (a control character in a header, a method that does not exist) never become a request, so no middleware
sees them. NGINX passes many of them on.
"""

from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api import problems
from app.api.security import CONTENT_POLICY
from app.core import context


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools; named in `scaleout api`."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's name; its text would say nothing new
        """Answer bytes that are no request, and hang up."""
        with context.working(context.Work(request_id=context.new_request_id())) as work:
            answer = problems.unreadable()
        headers = Headers(raw=[*answer.raw_headers, CONTENT_POLICY, *self.server_state.default_headers])
        lines = [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"x-request-id: {work.request_id}", "x-content-type-options: nosniff", "cache-control: no-store"]
        head = "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")
        self.transport.write(STATUS_LINE[400] + head + bytes(answer.body))
        self.transport.close()
