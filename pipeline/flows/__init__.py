"""The only place that imports ray: where each step runs, not what it does."""
