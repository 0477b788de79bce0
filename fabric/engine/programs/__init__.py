"""Intervention programs inside the one continuous batch."""
