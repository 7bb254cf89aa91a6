"""Fixtures with real servers."""
