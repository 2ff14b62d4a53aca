"""Several LoRA adapters made into one, without their base."""
