"""Where stored KV is kept, as one rank sees it: slots in memory and in files, and what moves them.

The worker's half of host and disk tiers. `arena` is memory with a table of headers in front,
`files` the same on disk; `index` says which slot holds which key; `slot_layout` how the blocks of a
chunk lie in a slot; `host` puts those together. Which keys to keep is decided elsewhere
(`kvconnect.offload.cache`).
"""
