"""Serving: many requests with different stacks in one batch, an OpenAI-compatible server, a store of adapters."""
