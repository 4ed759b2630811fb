"""How fast limits are decided, how exactly, and what that adds to a request: `python -m bench.limits`."""
