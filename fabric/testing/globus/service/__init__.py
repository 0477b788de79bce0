"""The stand-in of the hosted Globus Compute service: HTTP in front, RabbitMQ behind.

``python -m fabric.testing.globus.service FILE`` serves with the ``ServiceSettings`` in a file.
"""
