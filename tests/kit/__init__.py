"""What our own tests stand on: engines without vLLM, a network with faults, checks of channels."""
