"""Several answers to one question, ranked or with scores -> pairs of a better and a worse one."""

from corpus.readers import Dropped, FormatError

SCORES = ("overall_score", "score")  # UltraFeedback's, and that of smaller sets


def pairs_of(value, key: str) -> list[tuple]:
    """(better, worse) of [best, …, worst], or of [{"response", "overall_score"}, …].

    The best is paired with each that is worse. Where several are the best, the others of them are
    paired with the worst: every answer is used.

    Raises:
        Dropped: there are not two answers, one has no score, or all are equally good.
        FormatError: it is no list of answers.
    """
    if value == "":
        raise Dropped("fewer than two answers")
    if not isinstance(value, list):
        raise FormatError(
            f"{key!r} must be a list of answers, the best first, found {type(value).__name__}"
        )
    if len(value) < 2:
        raise Dropped("fewer than two answers")
    answers = value
    scores: list[float] = [-float(rank) for rank in range(len(value))]
    if key == "completions":
        if not all(isinstance(answer, dict) and "response" in answer for answer in value):
            raise FormatError(f'{key!r} must be a list of {{"response": …, "overall_score": …}}')
        answers = [answer["response"] or "" for answer in value]
        scores = [_score(answer) for answer in value]
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    best, worst = order[0], order[-1]
    if scores[best] == scores[worst]:
        raise Dropped("equal scores")
    pairs = [
        (best, other) if scores[other] < scores[best] else (other, worst) for other in order[1:]
    ]
    return [(answers[better] or "", answers[worse] or "") for better, worse in pairs]


def _score(answer: dict) -> float:
    for key in SCORES:
        score = answer.get(key)
        if isinstance(score, int | float) and score == score:
            return float(score)
    raise Dropped("no score")
