"""Memory rows that go up the stack beside the tokens of a segment (RMT, ARMT, HMT).

    late | front | sensory | tokens ... | back

Tokens read front and sensory rows (late rows: from the segment's middle on); back rows read all of
it and are what the segment leaves. Front rows read no token, so tokens keep their order of time to
the bit. Rows are few and the same on every rank: tokens may be spread over ranks as ever.

Each kind reads: late, itself; front, itself; sensory (the end of the segment before, read again),
front and earlier sensory rows; back, everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.fold import Piece
from model.interfaces import Segments
from model.memory.base import Block
from model.rope import rotate


class Frame(NamedTuple):
    """How many rows of each kind stand around a segment."""

    front: int = 0
    back: int = 0
    late: int = 0
    sensory: int = 0
    causal: bool = False  # front rows read earlier ones only, back rows likewise
    gap: int = 0  # places left free between the rows before the tokens and the tokens

    @property
    def before(self) -> int:
        """Rows that stand before the tokens."""
        return self.late + self.front + self.sensory

    @property
    def rows(self) -> int:
        """All rows."""
        return self.before + self.back


class Rows(NamedTuple):
    """The rows of one segment of B streams."""

    frame: Frame
    x: Tensor  # [B * frame.rows, D], scattered as rows of tokens are
    visible: Tensor | None = None  # [B] bool: False hides the sensory rows


class RowKeys(NamedTuple):
    """A layer's queries, keys and values of the rows, rotated: [B, rows, H or Hkv, K]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def pair(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some rows."""
        return self.k[:, part], self.v[:, part]


def rows_keys(block: Block, rows: Rows, segments: Segments) -> RowKeys:
    """Return what a layer makes of the rows; the late ones stand first, the back ones behind."""
    frame, device = rows.frame, rows.x.device
    first = segments.window * segments.segment_len
    before = torch.arange(first - frame.before, first, device=device) - frame.gap
    end = first + segments.segment_len
    after = torch.arange(end, end + frame.back, device=device)
    cos, sin = (x.unsqueeze(1) for x in segments.rope(torch.cat((before, after))))
    q, k, v, _ = (part.unflatten(0, (-1, frame.rows)) for part in block.project(rows.x))
    return RowKeys(rotate(q, cos, sin), rotate(k, cos, sin), v)


def token_pieces(rows: Rows, keys: RowKeys, segments: Segments) -> list[Piece]:
    """Return what the tokens read of the rows."""
    frame = rows.frame

    def piece(part: slice, visible: Tensor | None = None, queries: slice = slice(None)) -> Piece:
        k, v = (x.unsqueeze(1) for x in keys.pair(part))
        return Piece(k, v, None if visible is None else visible.unsqueeze(1), queries)

    late, front, sensory, _ = _parts(frame)
    pieces = []
    if frame.front:
        pieces.append(piece(front))
    if frame.sensory:
        pieces.append(piece(sensory, rows.visible))
    if frame.late:
        # of every rank's slice too: late rows stand where the first half lies evenly on the ranks
        pieces.append(piece(late, queries=slice(segments.length // 2, None)))
    return pieces


def read_rows(
    block: Block, rows: Rows, keys: RowKeys, tokens: tuple[Tensor, Tensor], segments: Segments
) -> Rows:
    """Return the rows after this layer; tokens: the segment's keys and values [B, S, Hkv, K]."""
    frame, found = rows.frame, []
    if frame.before:
        found.append(read_before(frame, keys))
    if frame.back:
        found.append(_read_back(rows, keys, tokens, segments))
    attended = torch.cat(found, 1) if len(found) > 1 else found[0]
    return rows._replace(x=block.finish(rows.x, attended.flatten(0, 1)))


def _parts(frame: Frame) -> list[slice]:
    """Return where late, front, sensory and back rows are."""
    ends = [frame.late, frame.late + frame.front, frame.before, frame.rows]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def read_before(frame: Frame, keys: RowKeys) -> Tensor:
    """Return what late, front and sensory rows read of one another: [B, before, H, K]."""
    before = slice(0, frame.before)
    q, k, v = (x[:, before].transpose(1, 2) for x in keys)
    mask = None
    if frame.causal or frame.late or frame.sensory:
        mask = _mask(frame, q.device)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def _mask(frame: Frame, device: torch.device) -> Tensor:
    """Return which row before the tokens reads which: [before, before] bool."""
    late, front, sensory, _ = _parts(frame)
    reads = torch.zeros(frame.before, frame.before, dtype=torch.bool, device=device)
    reads[late, late] = True
    reads[front, front] = True
    reads[sensory, front] = reads[sensory, sensory] = True
    if frame.causal:
        reads[front, front] = reads[front, front].tril()
    reads[sensory, sensory] = reads[sensory, sensory].tril()
    return reads


def _read_back(
    rows: Rows, keys: RowKeys, tokens: tuple[Tensor, Tensor], segments: Segments
) -> Tensor:
    frame = rows.frame
    late, front, sensory, back = _parts(frame)
    pieces = [Piece(*keys.pair(back), causal=frame.causal)]
    if frame.late or frame.front:
        pieces.append(Piece(*keys.pair(slice(late.start, front.stop))))
    if frame.sensory:
        pieces.append(Piece(*keys.pair(sensory), rows.visible))
    return segments.sequence.fold_slots(keys.q[:, back], *tokens, pieces=pieces)
