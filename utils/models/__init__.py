"""The 4-bit body, its adapters, tokens and memory."""
