"""Hooks that users can replace: prompt expansion and safety filters."""
