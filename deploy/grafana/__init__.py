"""Grafana's dashboards, as code: `dashboards.py` says what is drawn, `python -m deploy.grafana` writes the files.

Compose and Kubernetes read the files; `make check` fails while they are not what would be written.
"""
