"""A routed stack inside vLLM: :mod:`export` makes a folder that vLLM loads as one LoRA, :mod:`plugin` routes it."""
