"""Training of the networks that make adapters."""
