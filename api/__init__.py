"""The HTTP tier: tenants, keys, limits, the streaming passthrough, the routes and the command line."""
