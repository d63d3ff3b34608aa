"""Load tests: `bench` compares with the limit on one machine; nothing here is part of the service."""
