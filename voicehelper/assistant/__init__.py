"""The assistant: an orchestrator that retrieves passages, has a router choose a model, and asks a provider for a reply.

It knows nothing of how conversations are kept: see `voicehelper.conversations.replies` for that.
"""
