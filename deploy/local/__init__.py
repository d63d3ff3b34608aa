"""The local cluster: real servers and every process of ours on one machine, without Docker and without root.

`cluster.Cluster` is its face, for `scaleout up` and for the tests alike. Everything that goes wrong in a way a person
can mend is a `ClusterError` whose text says how.
"""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster cannot do what was asked; the text is for a person and says what to do next."""


class CancelledError(ClusterError):
    """Another part of the start failed or was interrupted, so this part gave up."""
