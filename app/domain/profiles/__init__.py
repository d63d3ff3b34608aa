"""Profiles: sign-up, the two views of a profile, search, change and erasure."""
