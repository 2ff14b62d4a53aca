"""Training of adapters and routers for MoLoRA: data, losses, loops, evaluation."""
