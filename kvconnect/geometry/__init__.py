"""Where KV is and how two shards of it overlap: views → rectangles → rows or chunks."""
