"""From rows of finished runs to tables; no model is run."""
