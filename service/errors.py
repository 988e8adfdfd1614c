"""The errors of requests, and the one table from errors to gRPC status codes."""

import grpc


class RequestError(Exception):
    """Base of the errors that a client receives; the message names the field, the value and what is allowed."""

    reason = ""
    """A word for the access log, where the status does not say it."""


class InvalidRequest(RequestError):
    """A field has a value that is not allowed."""


class NotFound(RequestError):
    """No such model, version or profile."""


class DigestMismatch(RequestError):
    """The steering was made for other gates and autoencoders than those served."""


class Lacking(RequestError):
    """The model lacks what the request needs, such as a dial."""


class Overloaded(RequestError):
    """The queue is full. retry_after_seconds: when the queued images are expected to have run."""

    reason = "queue_full"

    def __init__(self, message: str, retry_after_seconds: float):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class OverLimit(Overloaded):
    """The client is over a limit of its own. retry_after_seconds: when it is expected not to be."""

    def __init__(self, message: str, retry_after_seconds: float, reason: str):
        super().__init__(message, retry_after_seconds)
        self.reason = reason


class Expired(RequestError):
    """The deadline passed before inference."""


class Stopping(RequestError):
    """The server is shutting down."""


class Unavailable(RequestError):
    """The requested model exists but cannot be loaded."""


class NotAllowed(RequestError):
    """The server's settings do not allow this to clients."""


class ModelNotAllowed(NotAllowed):
    """The client may not call this model."""

    reason = "model"


STATUS: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    DigestMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    Lacking: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OverLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    Stopping: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    ModelNotAllowed: grpc.StatusCode.PERMISSION_DENIED,
}
