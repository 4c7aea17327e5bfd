"""What a developer's machine runs instead of a data centre: PostgreSQL, a Kafka broker, our own processes.

`python -m voicehelper.devstack up` (which is `make up`) starts all of it; tests start the parts they need.
"""


class DevstackError(Exception):
    """Something the developer has to decide or install; its text is shown as it is, without a traceback."""
