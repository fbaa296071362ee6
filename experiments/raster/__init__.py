"""A picture of the levels at work: `python -m experiments.raster`."""
