"""Chat templates that behave as those of well-known models do: written anew, in short. And a tokenizer of bytes that knows their tokens."""

from __future__ import annotations

from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

_TOOLS = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"""
_CALLS = """{%- for call in message.tool_calls or [] %}
{{- '\\n' if not loop.first or content else '' }}{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"""
_RESULT = """{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"""
_GENERATE = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

QWEN25 = f"""{_TOOLS}{{%- if messages[0].role != 'system' and not tools %}}{{{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}}}{{%- endif %}}
{{%- for message in messages %}}{{%- set content = message.content %}}
{{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}}}
{{%- elif message.role == 'assistant' %}}{{{{- '<|im_start|>assistant\\n' + content }}}}{_CALLS}{{{{- '<|im_end|>\\n' }}}}
{{%- elif message.role == 'tool' %}}{_RESULT}{{%- endif %}}{{%- endfor %}}{_GENERATE}"""

# Thinking is shown behind the last question only, as Qwen3 does; with enable_thinking=false an empty thought is put in for the model.
QWEN3 = f"""{_TOOLS}{{%- set ns = namespace(last=0) %}}
{{%- for message in messages %}}{{%- if message.role == 'user' %}}{{%- set ns.last = loop.index0 %}}{{%- endif %}}{{%- endfor %}}
{{%- for message in messages %}}{{%- set content = message.content %}}
{{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}}}
{{%- elif message.role == 'assistant' %}}{{%- set thought = '' %}}
{{%- if '</think>' in content %}}{{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}{{%- endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if loop.index0 > ns.last and (loop.last or thought) %}}{{{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}}}{{%- endif %}}
{{{{- content }}}}{_CALLS}{{{{- '<|im_end|>\\n' }}}}
{{%- elif message.role == 'tool' %}}{_RESULT}{{%- endif %}}{{%- endfor %}}{_GENERATE}
{{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}}{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{%- endif %}}"""

# Contents are trimmed, a result of a tool must follow a call, and there is one call a message, as with Llama 3.1.
LLAMA3 = """{{- '<|begin_of_text|>' }}{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or not messages[loop.index0 - 1].tool_calls %}{{- raise_exception('a result without a call') }}{%- endif %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- elif message.tool_calls %}{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

TEMPLATES = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "none": None}
END_OF_TURN = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "none": "<|endoftext|>"}


def byte_tokenizer(template: str = "qwen2.5") -> Any:
    """Bytes, the special tokens of all templates, and tags that are tokens, but not special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Some merges, so that text that was cut into tokens once could be cut otherwise the next time.
    merges = [("a", "b"), ("ab", "c"), ("e", "r"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), ("1", "2"), ("1", "1")]
    words = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN[template], pad_token="<|endoftext|>", additional_special_tokens=SPECIAL
    )
    fast.add_tokens(TAGS)
    fast.chat_template = TEMPLATES[template]
    return fast
