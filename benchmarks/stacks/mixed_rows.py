"""Rows of one batch that have different tasks."""
