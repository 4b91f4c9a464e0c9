"""What a run measures: scores, diagnostics, alarms."""
