"""scaleout: a reference profile and order service that scales horizontally."""
