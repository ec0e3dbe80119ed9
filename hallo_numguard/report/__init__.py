"""Renderers of reports and traces: each module has `render`. Imports no torch."""
