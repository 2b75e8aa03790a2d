"""Several connectors as one; those of ours load together. See docs/multi.md."""
