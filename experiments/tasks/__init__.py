"""Recall, languages and needles: `python -m experiments.tasks`."""
