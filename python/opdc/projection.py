"""Hidden states and a head in the place of logits."""

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """Logits that a language model's head would make: `hidden @ weight.T`, a chunk at a time.

    It stands wherever logits `(..., V)` do: for the student, the teacher or both of any loss, in
    `token_logprobs`, `entropy` and `topk`. The logits of all positions never exist together; those
    of a chunk are made, compared, turned into their gradient and into `dh` and `dW` by four matrix
    products. Inactive positions are not projected; on a GPU they are, as hidden states of 0, since
    the host would have to wait to know them: where many are, `hidden[mask]` and the like save that.

    The logits are `scale · (hidden Wᵀ + bias + inputs Aᵀ)`; with a `softcap` `c`, `c tanh(…/c)` of
    that. They are float32, or float64 if `hidden` or `weight` is, whatever the others are: a
    bfloat16 head does not round them, and autocast does not reach them. Gradients are added up in
    that type and rounded once, to the dtype of each tensor. Only the student's tensors receive one,
    and only those that require it. The products are torch's: on a GPU they are in TF32 if that is
    allowed (`torch.backends.cuda.matmul.allow_tf32`), which rounds what goes in.

    Attributes:
        hidden: `(..., H)`, the last hidden states; float32, float64, bfloat16 or float16.
        weight: `(V, H)`, the head, in a dtype of its own; rows have stride 1.
        bias: `(V,)`.
        scale: a finite factor of the logits (`logit_scale`).
        softcap: `c > 0`, a bound of the logits (`final_logit_softcapping`).
        adapter: `(inputs, weight)`, `(..., r)` and `(V, r)`: a LoRA of the head, whose `inputs` are
            `(hidden @ A.T) * scaling`.
        sparse_gradient: the gradients of `weight` and `bias` come as sparse tensors that hold the
            rows of a `TopK` teacher's ids; for `lsm` and divergences with `normalize="both"` from
            such a teacher, which read no other row of `weight`. To know how many rows that are, the
            host waits for a GPU in backward.
        max_bytes: what the logits of one chunk, of student and teacher together, and what is needed
            to compute with them may take; the smaller one if both say. None: 256 MiB, on a GPU 1
            GiB, or one position. Larger chunks are a little faster.

    Besides that a call takes the gradients themselves: `(..., H)` and `(V, H)` in the type of the
    arithmetic. A head in bfloat16 or float16 is converted block by block, for every chunk.

    >>> import opdc, torch
    >>> _ = torch.manual_seed(0)
    >>> head = torch.nn.Linear(4, 10, bias=False)
    >>> hidden = torch.randn(2, 3, 4, requires_grad=True)
    >>> teacher = torch.randn(2, 3, 10)
    >>> loss = opdc.reverse_kl(opdc.Projection(hidden, head.weight), teacher)
    >>> loss.backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([2, 3, 4]), torch.Size([10, 4]))
    >>> torch.allclose(loss, opdc.reverse_kl(head(hidden), teacher))
    True
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: tuple[Tensor, Tensor] | None = None
    sparse_gradient: bool = False
    max_bytes: int | None = None
