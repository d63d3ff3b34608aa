"""Payments: what we ask the payment provider for, and what it answered."""
