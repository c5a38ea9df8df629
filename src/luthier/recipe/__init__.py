"""Recipes: the strict schema, loading with overrides, and the plan; nothing here loads a model or imports torch."""
