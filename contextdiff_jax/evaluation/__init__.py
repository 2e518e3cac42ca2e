"""Metrics: functions on arrays."""
