"""Dashboards as code: `python -m dashboards` writes the boards in `json/`; the rules beside them are by hand."""
