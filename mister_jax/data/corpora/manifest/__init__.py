"""Manifests: user dialogues listed in a JSON Lines or CSV file."""
