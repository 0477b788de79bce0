"""Parsl applications that run on the fabric."""
