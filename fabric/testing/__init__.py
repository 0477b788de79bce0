"""Fakes and rigs that ship: no room imports them."""
