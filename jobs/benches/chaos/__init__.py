"""Runs that are struck again and again."""
