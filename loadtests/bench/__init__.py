"""The hot path against its limit: `python -m loadtests.bench`, or `make bench`."""

# Under this name the sides a, b and c find the value.
KEY = "bench:profile"
