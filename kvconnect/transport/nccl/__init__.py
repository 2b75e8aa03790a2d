"""NCCL: reads and writes over sends and receives."""
