"""Adapters that change over time: what they keep, what holds them back, and how forgetting is told."""
