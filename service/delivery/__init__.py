"""Bundles on their way to a server: to and from registries of OCI artefacts, and from object stores.

The registry's client is our own, on the standard library: the server's image can then pull without another package.
oras-py (0.2.43) was tried: its pulls check no digest, its uploads are read into memory, its requests have no timeout,
and it pushes no artifactType. The tests use it, and skopeo, as the other side.
"""
