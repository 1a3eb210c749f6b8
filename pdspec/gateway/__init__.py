"""OpenAI's HTTP API in front of a router: a small process that speaks HTTP on one side and gRPC on the other.

fields (JSON → typed values) · requests (→ what the router is asked) · shapes (answers → OpenAI's objects) · refusals
(errors → OpenAI's) · choices (several answers at once) · service (routes, and how it is started) · actor
"""
