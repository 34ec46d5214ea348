"""Shared code of the notebooks; see the table in the README for what each file does."""
