"""Measurements of a run: scores, diagnostics, alarms."""
