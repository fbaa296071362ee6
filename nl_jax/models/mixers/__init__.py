"""The mixers: one architecture a file or package."""
