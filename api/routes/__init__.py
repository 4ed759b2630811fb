"""Routes that are not on the streaming path, one module per noun."""
