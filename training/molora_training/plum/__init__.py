"""A user's adapter from conversations one at a time, none of which is kept (PLUM, arXiv 2411.13405)."""
