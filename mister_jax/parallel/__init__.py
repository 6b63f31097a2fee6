"""Execution of a step on several devices and hosts."""
