"""Blocks on a site's machines, the instances in them, and the agent that watches both."""
