"""Where stored KV is kept, as one rank sees it: slots in memory and in files, and what moves them.

The worker's half of host and disk tiers. `arena` is memory or a file (`backing`) with a table of
headers in front; `slot_index` says which slot holds which key, `slot_layout` how the blocks of a
chunk lie in a slot. `host` and `disk` move KV, `tiered_store` puts them together, and `runner` is
the thread that carries out jobs. `kvconnect.offload.cache` decides which keys
to keep.
"""
