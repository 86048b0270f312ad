"""Text in, rows of tokens out: what the three stages' data modules share."""
