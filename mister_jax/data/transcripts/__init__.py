"""Transcripts of recordings.

`reader` lists the formats, and `utterances` has the rules that join and split segments.
"""
