"""A Django app of two consumers whose handlers do all that handlers may do, and write down each effect."""
