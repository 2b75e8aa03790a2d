"""What our own tests stand on: engines without vLLM, and their commands."""
