"""KV kept in host memory and on disk: keys, what is resident, eviction, and the store itself."""
