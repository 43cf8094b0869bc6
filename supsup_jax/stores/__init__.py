"""The tasks of a network: in memory, over devices, on disk."""
