"""Doors into programs that deploy vLLM; each imports that program only when it is used."""
