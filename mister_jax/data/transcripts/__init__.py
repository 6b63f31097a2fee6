"""Transcripts of recordings: formats, and the rules that make utterances of their segments."""
