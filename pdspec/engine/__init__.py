"""The two steps of serving, prefill and decode. Either runs on any worker; roles add scheduling and the wire."""
