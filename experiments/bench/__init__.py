"""Speed and memory, as ratios: `python -m experiments.bench`."""
