"""An S3 server with one empty bucket, in a process of its own that ends with whoever started it.

Run as `python -m deploy.chaos.bucket NAME`: it prints the port that it listens on and ends when its input closes, which
also happens when its starter is killed. It keeps objects in memory.
"""

import sys

import httpx

from deploy.local.layout import HOST


def main() -> None:
    """Serve until the input closes."""
    try:
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - to say in words that it is missing
    except ModuleNotFoundError:
        sys.exit("The package moto is missing, which serves the bucket: make setup installs it.")
    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    httpx.put(f"http://{HOST}:{port}/{sys.argv[1]}").raise_for_status()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    server.stop()


if __name__ == "__main__":
    main()
