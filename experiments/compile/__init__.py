"""Steps compiled for TPUs that are not here."""
