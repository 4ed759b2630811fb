"""What people and bulk work cost each other on this machine: `python -m bench.coserve`."""
