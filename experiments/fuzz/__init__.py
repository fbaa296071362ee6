"""Random configs, files and commands: `python -m experiments.fuzz`."""
