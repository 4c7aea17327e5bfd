"""The smallest Django project that uses monitoring, and nothing else of this repository."""
