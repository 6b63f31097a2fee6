"""Manifests: JSON Lines or CSV files in which users list their own dialogues."""
