"""Load tests: scenarios for k6 and Locust, one report for both, and a comparison of two reports.

`make load` runs `python -m loadtests.load`, `make load-compare` runs `python -m loadtests.load.compare`.
"""

from __future__ import annotations


class LoadError(Exception):
    """The load cannot be sent, or a report cannot be read; the text is for a person and says what to do."""
