"""The two demonstrations: `make quickstart` on a real model, `make smoke` on a tiny one."""
