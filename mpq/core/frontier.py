"""Non-dominated allocations."""
