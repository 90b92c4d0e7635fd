"""Proves that vLLM answers with an adapter as the evaluated model did: the evaluation's proof, generated again.

The prompts go the way of clients' requests: as messages through vLLM's own chat template where the evaluation had
messages, else as tokens. All are sent at once, with prompts to the base model and to an adapter that is served already,
because the faults of vLLM with several adapters only show in a batch with several of them:

- vllm#47724: a request that is being computed while another adapter is loaded gets that one's weights. So the adapter
  that is served already is asked before the new one is loaded.
- vLLM on a CPU (serving/cpu_shield.py): a request to the base model gets the weights of an adapter in its batch.

A prompt that is answered alone would show neither, and every fault that it shows is seen in the batch too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.core.proof import ROUNDING, Answer, Prompt, Proof
from serving.engine import Engine, Generated
from serving.refusal import Refused

# How far a log-probability may be from the evaluation's (see `derived_tolerance`), in units of a typical error, and at
# least: nobody can notice a probability that differs by a thousandth of itself.
ROUNDINGS = 2.0
LEAST = 1e-3
# The root mean square of all differences may be so much of what a single one may be. Roundings differ as if by chance,
# so of many tokens few come near the limit; with other weights or another scale, most do.
SHARE_OF_ALL = 1 / 3


@dataclass(frozen=True)
class Claim:
    """What a model in vLLM is to answer."""

    model: str  # its name inside vLLM
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    tolerance: float

    def as_tokens(self) -> Claim:
        """The same, with prompts that need no chat template."""
        return replace(self, prompts=[prompt.model_copy(update={"messages": None}) for prompt in self.prompts])


def claims(proof: Proof, model: str, base: str | None, engine: Engine, tolerance: float | None = None) -> list[Claim]:
    """What a proof claims of a model and of the base model.

    Prompts that are too long for this server are left out; where all are, there is no claim.

    Args:
        model: the name inside vLLM of the model that was evaluated.
        base: that of the base model; None where clients cannot use it.
        tolerance: in place of the one that follows from the precision.
    """
    limit = derived_tolerance(proof, engine.precision) if tolerance is None else tolerance
    fitting = [number for number, (prompt, answer) in enumerate(zip(proof.prompts, proof.answers, strict=True))
               if len(prompt.tokens) + len(answer.tokens) <= engine.max_tokens]
    found = [(model, proof.answers)] + ([(base, proof.base_answers)] if base and proof.base_answers else [])
    made = [Claim(name, [proof.prompts[number] for number in fitting], [answers[number] for number in fitting], limit)
            for name, answers in found if fitting]
    return made[:1] + [claim.as_tokens() for claim in made[1:]]  # the template is the same for both


def derived_tolerance(proof: Proof, precision: str) -> float:
    """How far a log-probability may be from the evaluation's.

    Args:
        precision: in which the server computes: a key of `ROUNDING`.
    """
    # The coarser of both decides. A number's type that is not known here is a coarse one.
    u = max(ROUNDING[proof.dtype], ROUNDING.get(precision, ROUNDING["bfloat16"]))
    return max(LEAST, ROUNDINGS * u * proof.sensitivity)


async def check(engine: Engine, claims: Sequence[Claim]) -> None:
    """Have vLLM generate the answers of all claims at once, and compare them.

    Raises:
        Refused: with reason `proof`, for the first difference. The message holds no text of a prompt or an answer.
        RuntimeError: vLLM did not answer, for example because it is overloaded; a later attempt may succeed.
    """
    jobs = [(claim, number) for claim in claims for number in range(len(claim.prompts))]
    replies = await asyncio.gather(*(engine.generate(claim.model, claim.prompts[number],
                                                     len(claim.answers[number].tokens)) for claim, number in jobs),
                                   return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, Refused):
            raise reply
    differences: dict[str, list[float]] = {claim.model: [] for claim in claims}
    for (claim, number), reply in zip(jobs, replies, strict=True):
        try:
            if isinstance(reply, BaseException):
                raise reply
            differences[claim.model] += compare(claim.prompts[number], claim.answers[number], reply, claim.tolerance)
        except Refused as refused:
            raise Refused(refused.reason,
                          f"{claim.model}, prompt {number + 1} of {len(claim.prompts)}: {refused}") from None
    for claim in claims:
        found = differences[claim.model]
        mean, limit = math.sqrt(math.fsum(each * each for each in found) / len(found)), claim.tolerance * SHARE_OF_ALL
        if mean > limit:
            raise Refused("proof", f"{claim.model}: the log-probabilities of {len(found)} tokens differ from the "
                                   f"evaluation's by {mean:.3g} (root mean square); at most {limit:.3g} is rounding")


def compare(prompt: Prompt, answer: Answer, found: Generated, tolerance: float) -> list[float]:
    """The differences of the log-probabilities, token by token. A greedy answer may go another way, and is not compared
    any further, where the first two tokens were so close that rounding decides.

    Raises:
        Refused: with reason `proof`, for the first token that differs.
    """
    if found.prompt != prompt.tokens:
        position = next((at for at, (one, two) in enumerate(zip(found.prompt, prompt.tokens, strict=False))
                         if one != two), min(len(found.prompt), len(prompt.tokens)))
        raise Refused("proof", f"this server's chat template makes {len(found.prompt)} tokens of its messages, the "
                               f"evaluation's {len(prompt.tokens)}; they differ from token {position + 1} on")
    differences: list[float] = []
    for position, (token, expected, margin) in enumerate(
            zip(answer.tokens, answer.logprobs, answer.margins, strict=True)):
        if position >= len(found.tokens):
            raise Refused("proof", f"token {position + 1}: log-probability {expected:.4f} expected, and the answer has "
                                   "ended")
        logprob = found.logprobs[position]
        # Also of another token: both are the most probable one, of almost equal distributions.
        differences.append(abs(logprob - expected))
        other = found.tokens[position] != token
        # Each of two log-probabilities may be off, so a margin may be by twice as much.
        if differences[-1] > tolerance or (other and margin > 2 * tolerance):
            raise Refused("proof", f"token {position + 1}: log-probability {expected:.4f} expected, {logprob:.4f} found"
                                   f"{' of another token' if other else ''}; at most {tolerance:.3g} is rounding")
        if other:
            break
    return differences
