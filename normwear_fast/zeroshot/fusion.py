"""MSiTF: the tokens of a window and a question become one vector in the text encoder's space.

First ``definition``, the paper's formulas on whole tensors; then what ``MSiTF.forward`` runs, the
same numbers at a fifth of the work; tests/zeroshot/test_fusion.py holds the two together in float64.
Source: Luo et al. 2026 (arXiv 2412.09758), zero-shot inference; numbers pinned by
tests/golden/msitf.npz.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normwear_fast.errors import InputError, UsageError
from normwear_fast.watch import Watch

RECENCY_BASE = 0.997
"""The last token of a channel weighs 1, each one before it 0.3 % less."""

IMPORTANCE_SHARE = 0.5
RECENCY_SHARE = 0.2
GATE_TEMPERATURE = 0.5
FEED_FORWARD_EPS = 1e-6
COSINE_EPS = 1e-8
TOKEN_BUDGET = 8192
"""Tokens whose keys exist at once: 24 MB of float32 for the released width."""


class FusionTerms(NamedTuple):
    """What a token's weight is made of, one value a token, channel-major within each window."""

    relevance: Tensor
    """Softmax over the window's tokens of cosine(question, key); sums to 1."""
    importance: Tensor
    """Gate in (0, 1), independent of the question."""
    recency: Tensor
    """0.997 to the power of the tokens that follow in the channel."""
    weight: Tensor
    """Softmax over the window's tokens of the sum of the terms in use; sums to 1."""


def definition(
    module: MSiTF,
    embedding: Tensor,
    query: Tensor | None,
    *,
    relevance_only: bool = False,
    use_query: bool = True,
    recency: bool = True,
) -> tuple[Tensor, FusionTerms | None]:
    """The formulas as they stand, keys and values of all tokens in memory.

    Args: as :meth:`MSiTF.forward`.
    Returns: fused (B, Q) and the terms, each (B, C*P); no terms without a query.
    """
    batch, channels, patches, width = embedding.shape
    z = embedding.reshape(batch, channels * patches, width)
    v = module.v(z)
    if not use_query or query is None:
        return module.feed_forward(v.mean(dim=1)), None
    q = module.q(query).unsqueeze(1)
    relevance = F.cosine_similarity(q, module.k(z), dim=-1, eps=COSINE_EPS).softmax(dim=1)
    log_p = module.cd(z).log()
    g = gumbel_noise(log_p) if module.training else torch.full_like(log_p, 0.577)
    importance = ((log_p + g) / GATE_TEMPERATURE).softmax(dim=-1)[..., 1]
    age = torch.arange(patches - 1, -1, -1, dtype=z.dtype, device=z.device)
    recent = (RECENCY_BASE**age).repeat(channels).expand(batch, -1)
    total = relevance
    if not relevance_only:
        total = total + IMPORTANCE_SHARE * importance
        if recency:
            total = total + RECENCY_SHARE * recent
    w = total.softmax(dim=1)
    u = (w.unsqueeze(-1) * v).sum(dim=1)
    return module.feed_forward(u), FusionTerms(relevance, importance, recent, w)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel draws: -log of a unit exponential."""
    return -torch.empty_like(like).exponential_().log()


class StochasticLinear(nn.Module):
    """mu(x); in training plus normal noise times softplus(var(x))."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.mu = nn.Linear(width_in, width_out)
        self.var = nn.Sequential(nn.Linear(width_in, width_out), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        out = self.mu(x)
        if self.training:
            out = out + self.var(x) * torch.randn_like(out)
        return out


class FeedForward(nn.Module):
    """u + mu(gelu(Linear(LayerNorm(u)))), under the released state dict's spelling of names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc_liner = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), StochasticLinear(hidden, width)
        )
        self.LayerNorm = nn.LayerNorm(width, eps=FEED_FORWARD_EPS)
        self.dropout = nn.Dropout(0.1)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.dropout(self.fc_liner(self.LayerNorm(u)))


class PackedWindows:
    """Tokens of windows of any channel count and length, end to end in one (N, E) tensor.

    Args:
        tokens: (N, E), window after window, channel-major within a window.
        shapes: (channels, tokens a channel) of each window.
    """

    def __init__(self, tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> None:
        self.tokens = tokens
        self.shapes = list(shapes)
        counts = [channels * patches for channels, patches in self.shapes]
        self.counts = torch.tensor(counts, device=tokens.device)
        # Neighbours of one length go through one batched product: one call for a uniform batch.
        self.runs = [(count, len(list(run))) for count, run in groupby(counts)]

    def per_token(self, values: Tensor) -> Tensor:
        """(n,) a window -> (N,) a token."""
        return torch.repeat_interleave(values, self.counts, output_size=len(self.tokens))

    def dots(self, vectors: Tensor) -> Tensor:
        """(n, E) or (1, E) -> (N,): each token's product with its window's vector."""
        if len(vectors) == 1:
            return self.tokens @ vectors[0]
        parts, token, window = [], 0, 0
        for count, windows in self.runs:
            tokens = self.tokens[token : token + count * windows].view(windows, count, -1)
            run = vectors[window : window + windows].unsqueeze(-1)
            parts.append(torch.bmm(tokens, run).flatten())
            token, window = token + count * windows, window + windows
        return torch.cat(parts)

    def sums(self, weights: Tensor) -> Tensor:
        """(N,) -> (n, E): each window's weighted sum of its tokens."""
        parts, token = [], 0
        for count, windows in self.runs:
            stop = token + count * windows
            tokens = self.tokens[token:stop].view(windows, count, -1)
            parts.append(torch.bmm(weights[token:stop].view(windows, 1, count), tokens).squeeze(1))
            token = stop
        return torch.cat(parts)

    def softmax(self, x: Tensor) -> Tensor:
        """(N,) -> (N,), over each window's tokens.

        No maximum is subtracted: cosines and sums of terms lie in [-1, 1.7], where exp is safe.
        """
        e = x.exp()
        sums = torch.segment_reduce(e, "sum", lengths=self.counts, unsafe=True)
        return e / self.per_token(sums)

    def recency(self) -> Tensor:
        """(N,): 0.997 to the power of the tokens that follow in the same channel."""
        lengths = [patches for channels, patches in self.shapes for _ in range(channels)]
        per_channel = torch.tensor(lengths, device=self.tokens.device)
        size = len(self.tokens)
        stops = torch.repeat_interleave(per_channel.cumsum(0), per_channel, output_size=size)
        age = stops - 1 - torch.arange(size, device=self.tokens.device)
        return RECENCY_BASE ** age.to(self.tokens.dtype)

    def split(self, values: Tensor) -> list[Tensor]:
        """(N,) -> one (channels, tokens a channel) a window."""
        parts = values.split([channels * patches for channels, patches in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class MSiTF(nn.Module):
    """Fusion of a window's tokens with a question, under the released parameter names.

    Args:
        embed_dim: width E of a NormWear token.
        query_dim: width Q of the text encoder's vectors; the feed-forward is 4 Q wide.

    Work a token at E = 768, Q = 2048, counting a multiply-add as two: keys and values as written
    cost 4 E Q = 6.3 MFLOP and leave 16 KB of (token, Q) rows. Here no value row is formed, since
    the weights of a window sum to one: sum w (V z + b) = V (sum w z) + b. A cosine needs q.k, which
    is (K^T q).z + q.b, 2 E operations; and the length of k = K z + b, which an orthogonal factor of
    [K b] keeps: with [K b] = O [R r; 0 s], |k|^2 = |R z + r|^2 + s^2, 2 E^2 = 1.2 MFLOP and 3 KB a
    token, with no subtraction anywhere (the Gram matrix K^T K would square the conditioning). A
    channel of 560 tokens then costs 0.66 GFLOP beside the encoder's 107. Where Q <= E the factor
    would be no narrower than K, and K takes its place. Training goes the same way. A budget bounds
    the tokens whose rows exist at once.
    """

    def __init__(self, embed_dim: int = 768, query_dim: int = 2048) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.query_dim = query_dim
        self.cd = nn.Sequential(nn.Linear(embed_dim, 2), nn.Sigmoid())
        self.k = nn.Linear(embed_dim, query_dim)
        self.v = nn.Linear(embed_dim, query_dim)
        self.q = nn.Linear(query_dim, query_dim)
        self.out_fc = FeedForward(query_dim, 4 * query_dim)
        self.source = "random initialisation"
        self.sha256: str | None = None
        self.description: dict[str, Any] = {}
        self._factor: tuple[nn.Linear, Watch, tuple[Tensor, Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        return f"MSiTF(embed_dim={self.embed_dim}, query_dim={self.query_dim}, {self.source})"

    def __getstate__(self) -> dict[str, Any]:
        # The factor is a cache of this module's own parameters: no copy's.
        return self.__dict__ | {"_factor": None}

    def feed_forward(self, u: Tensor) -> Tensor:
        return self.out_fc(u)

    def forward(
        self,
        embedding: Tensor,
        query: Tensor | None,
        *,
        relevance_only: bool = False,
        use_query: bool = True,
        recency: bool = True,
    ) -> Tensor:
        """Fuse windows of one shape.

        Args:
            embedding: (B, C, P, E), the encoder's output, [CLS] included, channels in order.
            query: (B, Q), the question of each window; (1, Q) serves all; unused, and may be
                None, with ``use_query=False``.
            relevance_only: weigh tokens by the question alone.
            use_query: False takes the plain mean over the tokens.
            recency: False leaves the recency term out.
        Returns: (B, Q), comparable with text vectors.
        Raises: InputError for a shape of another width or count.
        """
        if embedding.ndim != 4:
            raise InputError(
                f"MSiTF embedding has shape {tuple(embedding.shape)}; it must be (B, C, P, "
                f"{self.embed_dim}): windows, channels, tokens, width"
            )
        batch, channels, patches, _ = embedding.shape
        packed = self._pack(embedding.flatten(0, 2), [(channels, patches)] * batch)
        fused, _ = self._fuse(packed, query, relevance_only, use_query, recency, TOKEN_BUDGET)
        return fused

    def fuse(
        self,
        embeddings: Sequence[Tensor],
        query: Tensor | None,
        *,
        relevance_only: bool = False,
        use_query: bool = True,
        recency: bool = True,
        batch_tokens: int = TOKEN_BUDGET,
    ) -> Tensor:
        """Fuse windows whose channel counts and lengths may differ.

        Args:
            embeddings: one (C_i, P_i, E) a window.
            query: (n, Q), or (1, Q) for all windows.
            batch_tokens: most tokens whose keys exist at once.
        Returns: (n, Q).
        """
        packed = self._pack_list(embeddings)
        fused, _ = self._fuse(packed, query, relevance_only, use_query, recency, batch_tokens)
        return fused

    def terms(
        self, embeddings: Sequence[Tensor], query: Tensor, *, batch_tokens: int = TOKEN_BUDGET
    ) -> list[FusionTerms]:
        """What weighs each token: per window, each term as (C_i, P_i).

        Args: as :meth:`fuse`.
        """
        packed = self._pack_list(embeddings)
        self._check_query(query, len(packed.shapes))
        terms = self._terms(packed, query, False, True, batch_tokens)
        split = zip(*(packed.split(values) for values in terms), strict=True)
        return [FusionTerms(*window) for window in split]

    @classmethod
    def from_pretrained(cls, source: str | Path) -> MSiTF:
        """A fusion module from a released ``.pth``, a safetensors file or a folder.

        Raises: WeightsError that lists missing, unexpected and misshaped names.
        """
        from normwear_fast.zeroshot.checkpoint import load_fusion

        return load_fusion(source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``fusion.safetensors`` and ``fusion.json`` into ``folder``."""
        from normwear_fast.zeroshot.checkpoint import save_fusion

        save_fusion(self, folder)

    def _pack(self, tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> PackedWindows:
        if tokens.shape[-1] != self.embed_dim:
            raise InputError(
                f"MSiTF got tokens {tokens.shape[-1]} wide; this fusion module was made for an "
                f"encoder of width {self.embed_dim}"
            )
        if not shapes or min(min(shape) for shape in shapes) < 1:
            raise InputError("MSiTF got a window without channels or tokens, or no window at all")
        return PackedWindows(tokens.to(self.k.weight.dtype), shapes)

    def _pack_list(self, embeddings: Sequence[Tensor]) -> PackedWindows:
        for index, window in enumerate(embeddings):
            if window.ndim != 3:
                raise InputError(
                    f"MSiTF window {index} has shape {tuple(window.shape)}; it must be (C, P, "
                    f"{self.embed_dim}): channels, tokens, width"
                )
        shapes = [(window.shape[0], window.shape[1]) for window in embeddings]
        if not shapes:
            raise InputError("MSiTF got no window at all")
        tokens = [window.flatten(0, 1) for window in embeddings]
        return self._pack(tokens[0] if len(tokens) == 1 else torch.cat(tokens), shapes)

    def _check_query(self, query: Tensor, windows: int) -> None:
        if query.ndim != 2 or query.shape[1] != self.query_dim or len(query) not in (1, windows):
            raise InputError(
                f"MSiTF query has shape {tuple(query.shape)}; it must be ({windows}, "
                f"{self.query_dim}) or (1, {self.query_dim}): the fusion module belongs to a text "
                f"encoder of width {self.query_dim}"
            )

    def _fuse(
        self,
        packed: PackedWindows,
        query: Tensor | None,
        relevance_only: bool,
        use_query: bool,
        recency: bool,
        batch_tokens: int,
    ) -> tuple[Tensor, FusionTerms | None]:
        if use_query and query is None:
            raise UsageError("MSiTF needs a query; pass one, or use_query=False")
        if relevance_only and not use_query:
            raise UsageError("MSiTF relevance_only weighs by the query; it needs use_query=True")
        if query is None or not use_query:
            terms = None
            weight = packed.per_token(1 / packed.counts.to(packed.tokens.dtype))
        else:
            self._check_query(query, len(packed.shapes))
            terms = self._terms(packed, query, relevance_only, recency, batch_tokens)
            weight = terms.weight
        return self.feed_forward(self.v(packed.sums(weight))), terms

    def _terms(
        self,
        packed: PackedWindows,
        query: Tensor,
        relevance_only: bool,
        recency: bool,
        batch_tokens: int,
    ) -> FusionTerms:
        relevance = packed.softmax(self._cosine(packed, query, batch_tokens))
        gate = self.cd[0](packed.tokens)
        log_p = F.logsigmoid(gate)
        if self.training:
            log_p = log_p + gumbel_noise(log_p)
        # Softmax of two values is the logistic of their difference; equal constants cancel in it.
        importance = torch.sigmoid((log_p[:, 1] - log_p[:, 0]) / GATE_TEMPERATURE)
        recent = packed.recency()
        total = relevance
        if not relevance_only:
            total = total + IMPORTANCE_SHARE * importance
            if recency:
                total = total + RECENCY_SHARE * recent
        return FusionTerms(relevance, importance, recent, packed.softmax(total))

    def _cosine(self, packed: PackedWindows, query: Tensor, batch_tokens: int) -> Tensor:
        """(N,): cosine of each token's key with its window's question."""
        q = self.q(query.to(packed.tokens.dtype))
        dot = packed.dots(q @ self.k.weight)
        offset, q_norm = q @ self.k.bias, torch.linalg.vector_norm(q, dim=1)
        if len(q) > 1:
            offset, q_norm = packed.per_token(offset), packed.per_token(q_norm)
        norm = _KeyNorm.apply(
            packed.tokens, self.k.weight, self.k.bias, *self._key_factor(), max(1, batch_tokens)
        )
        return (dot + offset) / (norm.clamp_min(COSINE_EPS) * q_norm.clamp_min(COSINE_EPS))

    def _key_factor(self) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.k.weight, self.k.bias
        trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
        if trained or torch.compiler.is_exporting():
            with torch.no_grad():
                return norm_factor(weight.detach(), bias.detach())
        return self._kept_factor()

    @torch.compiler.disable
    def _kept_factor(self) -> tuple[Tensor, Tensor, Tensor]:
        kept = self._factor
        if kept is None or kept[0] is not self.k or not kept[1].unchanged():
            watch = Watch(self.k)
            with torch.no_grad():
                factor = norm_factor(self.k.weight.detach(), self.k.bias.detach())
            self._factor = kept = (self.k, watch, factor)
        return kept[2]


def norm_factor(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, r, s) with |weight z + bias|^2 = |R z + r|^2 + s^2, R of at most E rows.

    Args:
        weight: (Q, E).
        bias: (Q,).
    """
    width, embed = weight.shape
    if width <= embed:
        return weight, bias, weight.new_zeros(())
    # In float64 (2.1 GFLOP at the released sizes), once a checkpoint or training step.
    columns = torch.cat((weight, bias.unsqueeze(1)), dim=1).double()
    r = torch.linalg.qr(columns, mode="r").R.to(weight.dtype)
    return r[:embed, :embed].contiguous(), r[:embed, embed].contiguous(), r[embed, embed].abs()


class _KeyNorm(torch.autograd.Function):
    """|K z + b| of every token, without its (token, Q) row, forward or backward.

    With c the incoming gradient over the norm, dK = sum c (K z + b) z^T = K (sum c z z^T) +
    b (sum c z)^T, so that the backward pass costs 2 E^2 a token as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        r: Tensor,
        offset: Tensor,
        rest: Tensor,
        batch_tokens: int,
    ) -> Tensor:
        rows = (F.linear(chunk, r, offset) for chunk in tokens.split(batch_tokens))
        norm = torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows])
        norm = torch.hypot(norm, rest)
        ctx.save_for_backward(tokens, weight, bias, r, offset, norm)
        ctx.batch_tokens = batch_tokens
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, r, offset, norm = ctx.saved_tensors
        share = gradient / norm.clamp_min(COSINE_EPS)
        d_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        moments = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        start = 0
        for chunk, c in zip(
            tokens.split(ctx.batch_tokens), share.split(ctx.batch_tokens), strict=True
        ):
            moments.addmm_(chunk.T, chunk * c.unsqueeze(1))
            if d_tokens is not None:
                rows = F.linear(chunk, r, offset) * c.unsqueeze(1)
                torch.mm(rows, r, out=d_tokens[start : start + len(chunk)])
                start += len(chunk)
        first = tokens.T @ share
        d_weight = torch.addr(weight @ moments, bias, first)
        d_bias = weight @ first + bias * share.sum()
        return d_tokens, d_weight, d_bias, None, None, None, None


def score_options(fused: Tensor, options: Tensor) -> Tensor:
    """Probabilities of answers by their L1 distance to the fused windows.

    With d_o = |fused - option_o|_1: softmax over o of 1 - d_o / sum(d) + 1e-8. The sum runs over
    the options, so probabilities lie close together (a factor e at most) and depend on which are
    offered.

    Args:
        fused: (B, Q) of :class:`MSiTF`.
        options: (O, Q), the answers' raw text vectors.
    Returns: (B, O) in float32, or float64 where ``fused`` is; rows sum to 1.
    """
    if fused.ndim != 2 or options.ndim != 2 or fused.shape[1] != options.shape[1]:
        raise InputError(
            f"score_options got fused {tuple(fused.shape)} and options {tuple(options.shape)}; "
            "they must be (B, Q) and (O, Q) of one width Q"
        )
    if len(options) < 1:
        raise InputError("score_options got no option")
    if fused.dtype != torch.float64:
        fused = fused.float()  # no cdist in half precision, and sums of Q differences need more
    distance = torch.cdist(fused.unsqueeze(0), options.to(fused).unsqueeze(0), p=1.0).squeeze(0)
    total = distance.sum(dim=1, keepdim=True)
    # A fused window equal to every option has no preference; elsewhere the floor changes nothing.
    share = distance / total.clamp_min(torch.finfo(distance.dtype).tiny)
    return (1 - share + 1e-8).softmax(dim=1)
