"""The side whose blocks are read: leases on them, and chunks of them gathered and sent."""
