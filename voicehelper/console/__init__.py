"""The operator's console: the admin's theme, its first page, its roles."""
