"""Emotion timelines of recordings: subtitles, annotation files and an interactive web page."""
