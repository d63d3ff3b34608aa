"""The hot path against its limit: `python -m loadtests.bench`, or `make bench`."""
