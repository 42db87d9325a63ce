"""A tokenizer whose tokens are single bytes, for tiny models made from scratch."""

from __future__ import annotations

from typing import Any

PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that writes the messages one behind the other and nothing else."""


def byte_tokenizer(characters: str | None = None, chat_template: str | None = None) -> Any:
    """A ``PreTrainedTokenizerFast`` with ids for <pad>, <eos> and every byte, or only those of ``characters`` (ASCII).

    It adds no special token by itself; a byte that has no id vanishes. It is a byte-level BPE without merges, and not something simpler,
    because transformers loads the tokenizer of a Qwen2 or Llama folder as one, whatever its file says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if characters is None:
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokens = sorted({token for c in characters for token in to_bytes.pre_tokenize_str(c)[0][0]})
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(("<pad>", "<eos>", *tokens))}, merges=[]))
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
    fast.chat_template = chat_template
    return fast
