"""Several sources of KV as one: who gives which part, and loads under way."""
