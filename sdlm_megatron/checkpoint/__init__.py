"""Checkpoints of a running engine: sharding, asynchronous save, restore, node-local disks."""
