"""What can be wrong with a request, and the one table from there to gRPC status codes."""

import grpc


class RequestError(Exception):
    """Base of the errors that a client is told; the message names the field, the value and what is allowed."""


class InvalidRequest(RequestError):
    """A field has a value that is not allowed."""


class NotFound(RequestError):
    """No such model, version or profile."""


class DigestMismatch(RequestError):
    """The steering was made for other gates and autoencoders than those served."""


class Overloaded(RequestError):
    """The queue is full. retry_after_seconds: when what waits will have been run."""

    def __init__(self, message: str, retry_after_seconds: float):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Expired(RequestError):
    """The deadline passed before inference."""


class Stopping(RequestError):
    """The server is shutting down."""


class Unavailable(RequestError):
    """What was asked for is there but does not work."""


class NotAllowed(RequestError):
    """The server was not started so that clients may do this."""


STATUS: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    DigestMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    Stopping: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
}
