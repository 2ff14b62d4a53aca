"""Adapters from what a user has written: histories, what is retrieved from them, the text that stands for a user."""
