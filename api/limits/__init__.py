"""Limits on interactive requests: per key and for all keys together, exact across processes.

admit ──► admitted (a lease is held) ──────────────────────────────► settle
  │  └──► waiting (a place in the key's line) ──► admitted ─────────► settle
  └─────► refused (nothing was taken)      └───► left or gave up ──► settle (all is given back)
"""
