"""Drafts from siblings: the suffix index of a group, what drafts are worth, and what they cost."""
