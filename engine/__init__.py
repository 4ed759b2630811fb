"""The engine tier: everything that knows vLLM, and nothing that knows Redis, jobs, keys or routes."""
