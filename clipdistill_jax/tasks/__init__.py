"""Supervised losses and metrics, one file a task."""
