"""What DeepSpeed's ZeRO holds on one rank, by the rules of its stages.

Read in DeepSpeed 0.19.8 (stage_1_and_2.py, stage3.py) and held in tests against real engines.
Where nobody shares, parallel.whole stands in its place.
parallel.zero asks for AdamW, float32 accumulation and DeepSpeed's own bucket sizes.
"""

from __future__ import annotations

from typing import NamedTuple

BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size: allocated whole, however small the model."""

GATHERED = 1_000_000_000
"""Elements of stage3_max_live_parameters: weights that stage 3 keeps gathered, at most."""

PREFETCH = 50_000_000
"""Elements of stage3_prefetch_bucket_size."""

WIDE = 4


class ZeroBytes(NamedTuple):
    """Bytes of one rank while it trains; buckets and gathered weights at their peak."""

    parameters: int
    master: int  # float32 copies of the weights that learn
    moments: int
    gradients: int
    buckets: int
    gathered: int  # stage 3: weights of other ranks


def zero_bytes(
    *, stage: int, held: int, trained: int, ranks: int, element: int, cuda: bool
) -> ZeroBytes:
    """Return what a rank holds.

    held: elements of its tensor-parallel part of the model, of them `trained` learn; ranks that
    ZeRO cuts over; element: bytes of a weight; cuda: reductions overlap with the backward, from
    two buckets (and a bucket is resident whole; on a CPU only what was written to).
    """
    if ranks == 1:  # parallel.whole: no buckets; in float32 the weights are their own masters
        master = WIDE * trained if element < WIDE else 0
        whole = WIDE * trained
        return ZeroBytes(element * held, master, 2 * whole, whole, 0, 0)
    share = -(-trained // ranks)
    bucket = BUCKET if cuda else min(BUCKET, trained)
    number = 2 if cuda else 1
    if stage == 3:
        gathered = element * (min(held, GATHERED) + min(held, PREFETCH))
        return ZeroBytes(
            parameters=element * -(-held // ranks),
            master=WIDE * share,
            moments=2 * WIDE * share,
            gradients=WIDE * share + element * min(trained, PREFETCH),
            buckets=WIDE * bucket,
            gathered=gathered,
        )
    # stage 1 sums gradients of whole weights, and of its share once more when all are summed
    gradients = WIDE * (trained + share) if stage == 1 else WIDE * 2 * share
    reduced = element if stage == 2 else WIDE
    joined = WIDE * min(BUCKET, trained) if stage == 2 else 0  # float32 for the message
    return ZeroBytes(
        parameters=element * held,
        master=WIDE * share,
        moments=2 * WIDE * share,
        gradients=gradients,
        buckets=number * reduced * bucket + joined,
        gathered=0,
    )
