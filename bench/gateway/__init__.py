"""What the gateway costs beside other proxies, on this machine: `python -m bench.gateway`."""
