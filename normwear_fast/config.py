"""The sizes of a NormWear model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normwear_fast.errors import UsageError

SAMPLING_RATE = 65.0
"""Hz; the rate the published weights were trained at."""

LARGEST_SAMPLE = 1e15
"""In its own units. The variances of tokens of 1e18 overflow float32, and where they do the
kernels give finite numbers that mean nothing; fill values (1e20, 9.97e36) are larger still."""

MIN_SAMPLES = 11
"""The shortest series: 9 scalogram rows, one row of patches, in both scalograms."""

LARGEST, DEEPEST = 2**16, 256
"""Of a size, and of a number of layers: what is beyond would only fill memory before it is refused."""

FUSIONS = ("cls", "mean", "none")
TOKENS = ("scalogram", "series")


@dataclass(frozen=True)
class NormWearConfig:
    """Architecture of a NormWear model; the defaults are the released one.

    Args:
        embed_dim: width E of a token.
        depth: encoder layers.
        num_heads: attention heads of the encoder, each ``embed_dim // num_heads`` wide.
        mlp_ratio: hidden width of every MLP over its token width.
        fusion_every: a [CLS] fusion block follows layer 0 and every ``fusion_every``-th after it.
        decoder_embed_dim: width D of a decoder token.
        decoder_depth: decoder layers.
        decoder_num_heads: attention heads of the decoder, 8 for any D in the released code.
        patch_size: scalogram rows and scales of a patch.
        num_scales: wavelet scales a = 0.1, 1.1, ... of the scalogram.
        grid_rows: rows of patches the position table was made for (387 scalogram rows of 9).
        pretrain_samples: samples the decoder reconstructs.
        pretrain_channels: channels the decoder reconstructs together.
        wavelet: PyWavelets name of a real mother wavelet; ``mexh`` is the Ricker wavelet.
        fusion: what a fusion block joins channels by, :data:`FUSIONS`. ``cls``, the released one: it
            runs over the channels' [CLS] tokens. ``mean``: over the mean of each channel's tokens.
            Either way its outputs replace the [CLS] tokens. ``none``: there are no fusion blocks.
        tokens: what a token is made from, :data:`TOKENS`. ``scalogram``, the released one: patches of
            the scalogram. ``series``: ``patch_size[0]`` samples of the series itself, one column.

    ``mean`` and ``series`` are the paper's ablations: they are pretrained and run by the plain
    modules only.

    Source: Luo et al. 2026 (arXiv 2412.09758), section 3, and the released checkpoint's shapes.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    fusion_every: int = 2
    decoder_embed_dim: int = 512
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    patch_size: tuple[int, int] = (9, 5)
    num_scales: int = 65
    grid_rows: int = 43
    pretrain_samples: int = 388
    pretrain_channels: int = 4
    wavelet: str = "mexh"
    fusion: str = "cls"
    tokens: str = "scalogram"

    def __post_init__(self) -> None:
        if isinstance(self.patch_size, list):
            object.__setattr__(self, "patch_size", tuple(self.patch_size))
        counts: tuple[str, ...] = ("embed_dim", "depth", "num_heads", "fusion_every")
        counts += (
            "decoder_embed_dim",
            "decoder_num_heads",
            "num_scales",
            "grid_rows",
            "pretrain_samples",
        )
        for name in (*counts, "pretrain_channels"):
            value, most = getattr(self, name), DEEPEST if name == "depth" else LARGEST
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(
                    f"NormWearConfig.{name} is {value!r}; it must be an int >= 1, and at most {most:,}"
                )
        if not isinstance(self.decoder_depth, int) or not 0 <= self.decoder_depth <= DEEPEST:
            raise UsageError(
                f"NormWearConfig.decoder_depth is {self.decoder_depth!r}; it must be an int >= 0, and at "
                f"most {DEEPEST:,}"
            )
        if not isinstance(self.mlp_ratio, int | float) or not 0 < self.mlp_ratio <= LARGEST:
            raise UsageError(f"NormWearConfig.mlp_ratio is {self.mlp_ratio!r}; it must be above 0")
        sizes = self.patch_size if isinstance(self.patch_size, tuple) else ()
        if len(sizes) != 2 or not all(isinstance(n, int) and 1 <= n <= LARGEST for n in sizes):
            raise UsageError(
                f"NormWearConfig.patch_size is {self.patch_size!r}; it must be two ints >= 1"
            )
        for name, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if width % heads or width % 4:
                raise UsageError(
                    f"NormWearConfig.{name} is {width}; it must be a multiple of 4 and of its "
                    f"{heads} heads"
                )
        for name, known in (("fusion", FUSIONS), ("tokens", TOKENS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"NormWearConfig.{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(known)}"
                )
        if self.num_scales % self.patch_size[1]:
            raise UsageError(
                f"NormWearConfig.num_scales is {self.num_scales}; it must be a multiple of the "
                f"patch's {self.patch_size[1]} scales"
            )

    @classmethod
    def base(cls) -> NormWearConfig:
        """The released model."""
        return cls()

    @classmethod
    def small(cls) -> NormWearConfig:
        """The small size of the reference numbers, for tests and trials."""
        return cls(embed_dim=128, depth=4, num_heads=2, decoder_embed_dim=64, decoder_depth=1)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def grid_columns(self) -> int:
        """Patches along the scale axis: 13 in the released model, 1 where tokens are of the series."""
        if self.tokens == "series":
            return 1
        return self.num_scales // self.patch_size[1]

    @property
    def grid_tokens(self) -> int:
        """Tokens of a pretraining channel, [CLS] included: 560 in the released model."""
        return 1 + self.grid_rows * self.grid_columns

    @property
    def in_engine(self) -> bool:
        """Whether `FastNormWear` runs this variant, and not the plain modules alone."""
        return self.fusion != "mean" and self.tokens == "scalogram"

    def has_fusion(self, layer: int) -> bool:
        """Whether a fusion block follows encoder layer ``layer`` (counted from 0)."""
        return self.fusion != "none" and layer % self.fusion_every == 0

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["patch_size"] = list(self.patch_size)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> NormWearConfig:
        """From ``to_dict``'s mapping (config.json); unknown names are an error that lists them."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(
                f"{source}: unknown NormWearConfig names {', '.join(unknown)}; "
                f"known are {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def check_config(config: Any) -> None:
    """A UsageError unless this is a NormWearConfig, or None for the released sizes."""
    if config is not None and not isinstance(config, NormWearConfig):
        raise UsageError(
            f"config is a {type(config).__name__}; it must be a NormWearConfig, which "
            "NormWearConfig(embed_dim=..., depth=...) makes"
        )
