"""Functions and endpoint templates that sites register with Globus Compute."""
