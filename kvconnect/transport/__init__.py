"""Transports: each moves bytes for a plan and knows no requests, keys or leases."""
