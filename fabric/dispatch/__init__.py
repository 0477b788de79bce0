"""The channels by which tasks reach instances: session, direct and Parsl, behind one protocol."""
