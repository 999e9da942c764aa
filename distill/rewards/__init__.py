"""What a response is worth, found by rules."""
