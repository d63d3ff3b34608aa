"""The machinery that makes the service scale; it knows nothing of profiles, orders or HTTP."""
