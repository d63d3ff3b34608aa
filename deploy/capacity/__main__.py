"""Writes what follows from the figures into the docs once they are measured again: `python -m deploy.capacity`.

The plan that docs/operations/capacity.md shows, and the table of costs of docs/deployment/aws.md; `make check` fails
while either is of older figures.
"""

from deploy.capacity import report
from deploy.terraform import costs


def main() -> None:
    """Write both pages."""
    report.PAGE.write_text(report.written(report.PAGE.read_text()))
    costs.main()


if __name__ == "__main__":
    main()
