"""The decode role: reserves pages, lands the handoff, and writes answers in one continuous batch."""
