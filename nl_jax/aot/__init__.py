"""Programs compiled ahead of time for chips that are not here."""
