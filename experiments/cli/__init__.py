"""What all commands share: flags, exit statuses, processes, text."""
