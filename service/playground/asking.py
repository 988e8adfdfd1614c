"""The page's requests to a server for one image, through the client, and the answers."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.client import Asked, AsyncClient
from service.pb import steering_pb2 as pb

ROUNDS = 5
"""Number of calls without and with steering, in turn: the page shows the fastest of each."""
MOST_LATENTS = 100
"""Latents of each site: the most that the API reports."""


class Problem(Exception):
    """A question that has no answer: the HTTP status, a sentence for the user, and gRPC's error."""

    def __init__(self, status: int, sentence: str, detail: str = ""):
        super().__init__(sentence)
        self.status, self.sentence, self.detail = status, sentence, detail


@dataclass(frozen=True)
class Question:
    """The contents of the form, except for an uploaded image."""

    sample: str = ""
    """A path within the folder of samples; empty: an uploaded image."""
    profile: str = ""
    strength: float = 1.0
    budget: float | None = None

    @staticmethod
    def of(query: Mapping[str, str]) -> "Question":
        """The question in the query of a URL. Raises Problem."""
        budget = _number(query, "budget", 1.0) if query.get("limited") else None
        strength = _number(query, "strength", 1.0)
        return Question(query.get("sample", ""), query.get("profile", ""), strength, budget)

    @property
    def steers(self) -> bool:
        """Whether the question asks for steering that can have an effect."""
        return bool(self.profile) and self.strength != 0

    @property
    def cause(self) -> str:
        """What opens or closes units, in words."""
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
    """The answers for one image. The first of each pair is without steering, at the model's default budget if it has
    one; the second is as asked."""

    question: Question
    model: pb.GetModelResponse
    predictions: tuple[pb.Prediction, pb.Prediction]
    """With the probabilities of all classes."""
    receipt: pb.Receipt
    seconds: tuple[float, float]
    """Inference time: the fastest of ROUNDS calls."""
    explanations: tuple[pb.ImageExplanation, pb.ImageExplanation]
    profile: pb.GetProfileResponse | None

    @property
    def budgets(self) -> tuple[float | None, float | None]:
        """The budgets of both answers; None: no budget."""
        settings, own = self.model.settings, self.question.budget
        default = settings.default_budget if settings.HasField("default_budget") else None
        return default, default if own is None else own


async def ask(client: AsyncClient, model: pb.GetModelResponse, image: bytes, question: Question) -> Answers:
    """Ask about one image, in one call after the other so that they share no batch. Raises grpc.aio.AioRpcError."""
    plain: Asked = {"model": model.model, "version": model.version}
    plain["strength"] = 0.0  # turns off the server's default profile too
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
