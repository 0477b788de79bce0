"""The command lines: ``fabric`` for users, ``fabric-admin`` for administrators.

This is the room that composes the others. Each command is a file, imported when it is called.
"""
