"""What breaks the local cluster on purpose while clients use it, and says whether every promise was kept.

One `Stage` (a cluster whose servers are reached through doors that can misbehave), one `Load` (clients that write down
all they see), one table of `Fault`s; the failure suite, `make chaos` and `make demo` are three ways to play on it.
"""
