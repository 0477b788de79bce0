"""The functions that sites register with Globus Compute; each is shipped as source."""
