"""Devices: one mesh, and where arrays lie on it."""
