"""Hooks that users can replace: prompt expansion and safety filters."""

from inference.hooks.applied import Hooks, PreparedPrompt, Refusal
from inference.hooks.expanders import load_expander
from inference.hooks.expansion import Expansion, PromptExpander
from inference.hooks.safety import SafetyFilter, load_safety
from inference.hooks.user_code import HookFailedError

__all__ = ["Expansion", "HookFailedError", "Hooks", "PreparedPrompt", "PromptExpander", "Refusal",
           "SafetyFilter", "load_expander", "load_safety"]
