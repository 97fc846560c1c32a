"""Statistics of right answers: pass@k, majority vote and confidence intervals. Knows nothing of models or sampling."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from nanoforge.posttraining.answers import answer_value, normalize_answer, parse_number, same_answer


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k completions is right, if c of n >= k are.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, eq. 1.
    """
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Iterable[str | None], *, is_number: bool = True) -> str | None:
    """The most frequent answer, as it was first written (self-consistency, Wang et al. 2023); None has no vote.

    Where the right answer is a number, numbers are the same by value; others are as normalized text. Of equally
    frequent ones, the first to reach the count wins.
    """
    votes: dict[Fraction | str, int] = {}
    first_written: dict[Fraction | str, str] = {}
    winner: Fraction | str | None = None
    for answer in answers:
        if answer is None:
            continue
        value = answer_value(answer) if is_number else None
        key = normalize_answer(answer) if value is None else value
        votes[key] = votes.get(key, 0) + 1
        first_written.setdefault(key, answer)
        if winner is None or votes[key] > votes[winner]:
            winner = key
    return None if winner is None else first_written[winner]


def majority_at_k(answers: Sequence[str | None], reference: str, k: int) -> float:
    """How often the majority of k answers is right: the mean over consecutive groups of k.

    An incomplete last group is left out. Unbiased, as the groups are independent; with exactly k answers it is 0 or 1.
    """
    assert 1 <= k <= len(answers), (k, len(answers))
    is_number = parse_number(reference) is not None
    starts = range(0, len(answers) - k + 1, k)
    votes = [majority_vote(answers[start : start + k], is_number=is_number) for start in starts]
    return sum(same_answer(vote, reference) for vote in votes) / len(starts)


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The confidence interval of a proportion (Wilson 1927), of 95 % with z = 1.96; all of [0, 1] with n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    z2_n = z * z / n
    center = p + z2_n / 2
    margin = z * math.sqrt(p * (1 - p) / n + z2_n / (4 * n))
    return max(0.0, (center - margin) / (1 + z2_n)), min(1.0, (center + margin) / (1 + z2_n))
