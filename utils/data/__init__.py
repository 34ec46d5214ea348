"""Rated responses: sources, checks, pairs."""
