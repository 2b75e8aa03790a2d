"""The three plays of ``kvconnect demo``: KV handed over, stored and loaded, or both in one load."""
