"""Photos and prompts, and the banks on the device that a step draws from."""
