"""The Grafana dashboards as code. `python -m dashboards` writes them as JSON to helm/dashboards."""
