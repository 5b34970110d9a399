"""Schedules and measured steps as SVG and as traces."""
