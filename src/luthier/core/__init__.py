"""Protocols, registry, errors, random streams and the content-addressed store."""
