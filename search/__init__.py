"""Searches: a problem in, a frontier of allocations out."""
