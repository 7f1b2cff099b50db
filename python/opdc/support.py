"""Teachers that are known on a few ids only."""

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """A teacher that is known on `K` ids a position, e.g. from an inference server.

    Log-probs are natural, over the teacher's whole vocabulary, and at the temperature of the loss
    already. A slot whose id is negative is missing, its log-prob is not read. No id comes twice,
    and the order does not matter.

    Attributes:
        ids: `(..., K)`, of an integer dtype. On a GPU one beyond the vocabulary is no error: the
            loss of its row is NaN.
        logprobs: `(..., K)`, the teacher's log-probs of them.
        token_logprobs: `(...)`, its log-probs of the sampled tokens, for losses that compare them.
        entropy: `(...)`, its entropies, for `opdc.eopd`.
        tail_logprob: `(...)`, log of its mass off the ids, for `normalize="tail"`; by default
            `log(1 − Q)` of the mass `Q` on them.

    >>> import opdc, torch
    >>> teacher = opdc.TopK(torch.tensor([[4, 0, -1]]), torch.tensor([[-0.1, -3.0, 0.0]]))
    >>> student = torch.zeros(1, 5)
    >>> f"{opdc.lsm(student, teacher).item():.4f}"
    '0.8104'
    """

    ids: Tensor
    logprobs: Tensor
    token_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    tail_logprob: Tensor | None = None
