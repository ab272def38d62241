"""Functions that load models' configurations, vocabularies and tokenizers, and parse prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxmoe.errors import CheckpointError, ConfigError, MissingDependencyError
from fluxmoe.words import line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def numbers(text: str, option: str) -> list[int]:
    """Parse ``1,2,3`` into a list. Raises ConfigError, which names ``option``."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"not a list of numbers: {text!r}", where=option, fix="write 1,2,3"
        ) from error


def quiet() -> None:
    """Disable transformers' progress bars.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to run a PyTorch model", fix="pip install 'fluxmoe[hf]'"
        ) from error
    transformers.logging.disable_progress_bar()


def config(model: str) -> PretrainedConfig:
    """Load a model's configuration. Raises CheckpointError or UnsupportedError."""
    from transformers import AutoConfig

    from fluxmoe import checkpoint

    checkpoint.require_readable(model)
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # a model's own code can raise anything
        raise checkpoint.not_loadable(model, error) from error


def setting(model: str, key: str) -> int | None:
    """Read a number from a model's ``config.json`` without transformers; None if unavailable."""
    from fluxmoe import checkpoint

    try:
        file = Path(checkpoint.downloaded(model)) / "config.json"
        found = checkpoint.text_part(checkpoint.read_map(file)).get(key)
    except CheckpointError:  # the model's checks report the error
        return None
    return found if isinstance(found, int) else None


def require_length(model: str, tokens: int) -> None:
    """Reject a request whose prompt and answer together exceed the model's maximum length.

    Raises:
        ConfigError: The request is too long.
    """
    longest = setting(model, "max_position_embeddings")
    if longest and tokens > longest:
        raise ConfigError(
            f"{tokens} tokens with the prompt are more than the model's maximum of {longest}",
            where="--max-new-tokens",
            fix="lower it",
        )


def require_tokens(tokens: Sequence[int], size: int, option: str) -> None:
    """Reject a prompt that is empty or has tokens outside the model's vocabulary.

    Raises:
        ConfigError: The prompt is invalid; the error names ``option``.
    """
    if not tokens:
        raise ConfigError("a prompt is empty", where=option, fix="give it at least one token")
    if not all(0 <= token < size for token in tokens):
        raise ConfigError(
            f"invalid prompt tokens: {line(tokens)}",
            where=option,
            fix=f"all must be within 0…{size - 1}",
        )


def stop_tokens(model: str) -> tuple[int, ...]:
    """Return the ids of the tokens at which transformers stops generating."""
    from transformers import GenerationConfig

    try:
        tokens = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json: transformers uses the model's config
        tokens = GenerationConfig.from_model_config(config(model)).eos_token_id
    return tuple(tokens) if isinstance(tokens, list) else () if tokens is None else (tokens,)


def tokenizer(model: str, *, required: bool) -> PreTrainedTokenizerBase | None:
    """Load a model's tokenizer.

    Returns:
        The tokenizer, or None if the model has none and ``required`` is false.

    Raises:
        ConfigError: The model has no tokenizer and ``required`` is true.
    """
    from transformers import AutoTokenizer

    from fluxmoe.checkpoint import first_line

    why = "it has no vocabulary"
    try:
        found = AutoTokenizer.from_pretrained(model)
        # Some tokenizers load even without their files, but then have only special tokens.
        if found.vocab_size > len(found.all_special_ids):
            return found
    except (OSError, ValueError, KeyError) as error:
        why = first_line(error)
    if not required:
        return None
    raise ConfigError(
        f"cannot load a tokenizer: {why}",
        where=model,
        fix="give the prompt as token ids: --prompt-ids 1,2,3",
    )


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str) -> list[int]:
    """Convert text to token ids."""
    assert tokenizer is not None
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids
