"""The side that reads: fetches, chunks received, remote engines and their leases."""
