"""The lab's tokenizer: one token per word of the world, bytes for everything else (digits one by one)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.lab.words import all_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
_SIGNS = ("####",)


def vocabulary() -> dict[str, int]:
    """Token -> id: the special tokens, the 256 byte symbols, then the words with and without a space before them."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIAL.values(), *sorted(ByteLevel.alphabet())]
    for word in (*_SIGNS, *all_words()):
        tokens += [word, f"Ġ{word}"] if len(word) > 1 else [f"Ġ{word}"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def tokenizer(max_length: int = 256) -> PreTrainedTokenizerFast:
    """The tokenizer, lossless for any text; it adds no special tokens by itself beyond a beginning of text.

    Args:
        max_length: the model's longest input, in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # No merges: a piece is a word of the vocabulary as a whole, or its bytes. A made-up string is therefore seen
    # letter by letter and a number digit by digit, and no training of the tokenizer can change from run to run.
    core = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|####|\d|\s|[^\sA-Za-z\d]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    bos = SPECIAL["bos_token"]
    core.add_special_tokens(list(SPECIAL.values()))
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
