"""Running one step on many devices and hosts."""
