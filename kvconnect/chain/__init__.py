"""Several sources of KV as one: which source gives which part, and loads under way."""
