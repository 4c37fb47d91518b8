"""What differs between model families: loading, prompts, noise, target, layer names."""
