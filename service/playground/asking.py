"""What the page asks of a server for one image, through its client, and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.client import Asked, AsyncClient
from service.pb import steering_pb2 as pb

ROUNDS = 5
"""Calls without steering and with it, in turn: the page shows the fastest of each."""
MOST_LATENTS = 100
"""Of each site: the most that the API reports."""


class Problem(Exception):
    """A question without an answer: the HTTP status, a sentence for the person, and what gRPC says about it."""

    def __init__(self, status: int, sentence: str, detail: str = ""):
        super().__init__(sentence)
        self.status, self.sentence, self.detail = status, sentence, detail


@dataclass(frozen=True)
class Question:
    """What the form holds, beside an uploaded image."""

    sample: str = ""
    """A path within the folder of samples; empty: an uploaded image."""
    profile: str = ""
    strength: float = 1.0
    budget: float | None = None

    @staticmethod
    def of(query: Mapping[str, str]) -> "Question":
        """Read from the query of a URL. Raises Problem."""
        budget = _number(query, "budget", 1.0) if query.get("limited") else None
        strength = _number(query, "strength", 1.0)
        return Question(query.get("sample", ""), query.get("profile", ""), strength, budget)

    @property
    def steers(self) -> bool:
        """Whether it asks for steering that can change anything."""
        return bool(self.profile) and self.strength != 0

    @property
    def cause(self) -> str:
        """What opens or closes units."""
        if self.budget is None:
            return "steering"
        return "steering and the budget" if self.steers else "the budget"


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    text = query.get(name) or str(default)
    try:
        return float(text)
    except ValueError as error:
        raise Problem(422, f"{name} is {text!r}; allowed: a number") from error


@dataclass(frozen=True)
class Answers:
    """Of one image. The first of each pair is without steering and budget, the second as the question asks."""

    question: Question
    model: pb.GetModelResponse
    predictions: tuple[pb.Prediction, pb.Prediction]
    """With the probabilities of all classes."""
    receipt: pb.Receipt
    seconds: tuple[float, float]
    """Of inference: the fastest of ROUNDS calls."""
    explanations: tuple[pb.ImageExplanation, pb.ImageExplanation]
    profile: pb.GetProfileResponse | None


async def ask(client: AsyncClient, model: pb.GetModelResponse, image: bytes, question: Question) -> Answers:
    """Calls of one image, one after the other so that they do not share a batch. Raises grpc.aio.AioRpcError."""
    plain: Asked = {"model": model.model, "version": model.version}
    plain["strength"] = 0.0  # not the server's default profile either
    steered: Asked = {**plain}
    if question.profile:
        steered |= {"profile": question.profile, "strength": question.strength}
    if question.budget is not None:
        steered["budget"] = question.budget
    profile = None
    if question.profile:
        profile = await client.profile(question.profile, model.model, model.version)
    explained = [await client.explain([image], latents=MOST_LATENTS, **asked) for asked in (plain, steered)]
    answers: list[list[pb.PredictResponse]] = [[], []]
    for _ in range(ROUNDS):
        for own, asked in zip(answers, (plain, steered), strict=True):
            own.append(await client.predict([image], top_k=len(model.labels), **asked))
    before, after = (own[-1].predictions[0] for own in answers)
    seconds = [min(answer.receipt.inference_seconds for answer in own) for own in answers]
    return Answers(
        question, model, (before, after), answers[1][-1].receipt, (seconds[0], seconds[1]),
        (explained[0].explanations[0], explained[1].explanations[0]), profile,
    )  # fmt: skip
