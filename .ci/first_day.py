"""A newcomer's first minutes: `make run`, the printed requests pasted as printed, Ctrl-C, and nothing left running."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120  # the promise is 60 on two idle cores; a machine that builds something else meanwhile is slower
TOUR_SECONDS = 120


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def printed_requests(output: str) -> str:
    """Return the lines between the invitation to paste and the line that says that all is ready."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Try it"))
    last = next(number for number, line in enumerate(lines) if line.startswith("Ready after"))
    return "\n".join(lines[first + 1 : last])


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return what was printed once the cluster is ready."""
    deadline = time.monotonic() + START_SECONDS
    while "Ready after" not in (said := log.read_text(encoding="utf-8")):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"make run did not become ready:\n{said}")
        time.sleep(0.1)  # between two looks at the log
    return said


def starts_with(file: Path, beginning: bytes) -> bool:
    """Return whether there is such a file and it begins so."""
    return file.exists() and file.read_bytes().startswith(beginning)


def main() -> None:
    """Do it, and exit with what went wrong."""
    # Whoever is started in the background may have been told to ignore Ctrl-C, and tells its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "make-run.log"
        environment = os.environ | {"PORT": str(free_port())}
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["make", "run"], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        said = wait_until_ready(process, log)
        print(said.splitlines()[-1])
        listed = json.loads((ROOT / ".cluster" / "cluster.json").read_text(encoding="utf-8"))
        tour = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", printed_requests(said)],
            cwd=folder,
            check=False,
            timeout=TOUR_SECONDS,
            capture_output=True,
            text=True,
        )
        wanted = {
            "the requests run through": tour.returncode == 0,
            "an order is confirmed": '"status":"confirmed"' in tour.stdout,
            "the invoice is a PDF": starts_with(Path(folder) / "invoice.pdf", b"%PDF"),
            "the mail has it attached": '"attachments"' in tour.stdout and ".pdf" in tour.stdout,
            "a declined payment is rejected": '"reason":"payment_declined"' in tour.stdout,
            "too large an order is rejected": '"reason":"out_of_stock"' in tour.stdout,
            "its history comes as events": "event: status" in tour.stdout,
            "the avatar is a picture of our own making": starts_with(Path(folder) / "avatar.webp", b"RIFF"),
            "the report has today's sales": "\nday,product_id,sku," in tour.stdout,
        }
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        left = [entry["name"] for entry in listed["processes"] if Path(f"/proc/{entry['pid']}").exists()]
        wanted["nothing is left running"] = not left
        for what, held in wanted.items():
            print(f"{'yes' if held else 'NO '}  {what}")
        if not all(wanted.values()):
            sys.exit(f"{tour.stdout}\n{tour.stderr}\nleft: {left}")


if __name__ == "__main__":
    main()
