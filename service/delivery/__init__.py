"""Delivery of bundles to servers: to and from OCI registries, and from object stores.

The registry client is our own and uses only the standard library, so the server's image can pull without further
packages. oras-py (0.2.43) was tried: it does not check digests of pulls, reads uploads into memory, has no timeouts,
and pushes no artifactType. The tests use it, and skopeo, as counterparts.
"""
