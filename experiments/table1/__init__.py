"""Table 1 of a run: `python -m experiments.table1`."""
