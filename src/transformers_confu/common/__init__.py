"""What several parts and their commands share."""
