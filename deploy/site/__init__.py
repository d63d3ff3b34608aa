"""The documentation as a site: `python -m deploy.site`, or `make docs`."""
