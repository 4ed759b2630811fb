"""The bulk tier: jobs, their ledger in Redis, their files, and the worker that drains them into the engine."""
