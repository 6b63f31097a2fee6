"""One's own dialogues, listed in a JSON Lines or CSV file."""
