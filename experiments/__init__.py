"""The commands: `python -m experiments.<command>`. Flags are read here only."""
