"""Dispatch and combine under compute, on slow links."""
