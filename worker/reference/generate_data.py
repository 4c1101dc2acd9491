"""Reference values for the data pipeline, taken from transformers.

Builds two tiny byte-level BPE tokenizers on text made here, puts chat templates in the styles people use on
them, and stores what `apply_chat_template` renders, the token ids, and which tokens are scored.
`tests/data.rs` compares all of it exactly.

    python worker/reference/generate_data.py     # transformers 5.23, tokenizers 0.22 or newer

Everything is deterministic; running it again leaves the same bytes.
"""

import datetime
import json
import random
import re
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent / "data"
NOW = datetime.datetime(2025, 3, 4, 5, 6, 7)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>", "<|eot|>"]
# Splits digits in threes and lets punctuation take the newlines behind it, as newer vocabularies do.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class FixedClock(datetime.datetime):
    """`strftime_now` reads this clock, so that the renderings never change."""

    @classmethod
    def now(cls, tz=None):
        return NOW


def corpus():
    """Sentences of a small made-up grammar, with some letters beyond ASCII."""
    rng = random.Random(7)
    who = ["the user", "the assistant", "a sailor", "an old stonecutter", "Grüße", "naïve Zoë", "日本語", "мост"]
    does = ["counts", "carries", "stacks", "asks about", "answers with", "weighs", "thinks of"]
    what = ["stones", "three boats", "the answer", "a question?", "lanterns!", "12 ropes", "the system", "407 steps"]
    end = [". ", ", ", ": ", "\n ", "...\n\n "]
    for _ in range(1500):
        yield f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}{rng.choice(end)}"


def train(split, post_processor):
    """One byte-level BPE tokenizer of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = post_processor(bos)
    return tokenizer


TOKENIZERS = {
    "plain": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False), lambda bos: bos),
    "split": lambda: train(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        # Trims white space off the offsets; what is scored must not depend on it.
        lambda bos: processors.Sequence([processors.ByteLevel(trim_offsets=True), bos]),
    ),
}

CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou stack stones.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|sep|>\n\n' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}"
)

INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = messages[0]['content'].strip() + '\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (first if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

# Everything at once: namespace, macros, loop controls, the clock, JSON, Python methods, slices, tests.
KITCHEN = """\
{#- all the helpers -#}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y, %A %H:%M:%S day %j %-d %e %I%p %y %%") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- macro header(role) -%}
<|start|>{{ role }}<|sep|>
{% endmacro -%}
{%- set ns = namespace(turns=0, system='none', last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message['content'] | trim %}
        {%- continue %}
    {%- endif %}
    {%- if message['role'] not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
{%- endfor %}
{{- bos_token }}{{ header('system') }}{{ ns.system.upper() }} {{ date_string }}
{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- set config = {"name": "kitchen <&>", "list": [1, 2.5, none, true, "é\\n"], "empty": {}, "none": []} %}
{{- config | tojson }}
{{ config | tojson(indent=2) }}
{{ config.get('missing', 'default') }}{{ config.list[1:3] | length }}{% for k, v in config.items() %} {{ k }}{% endfor %}
{{ true }} {{ none }} {{ 7 // 2 }} {{ 7 / 2 }} {{ undefined_name }}{{ '%s-%d' | format('a', 3) }}
{% for message in messages %}
{% if message.role == 'tool' %}
{{ header('tool') }}{{ message | tojson }}<|eot|>
{% elif message.role == 'user' %}
{{ header('user') }}{{ message.content.replace('stones', 'rocks').rstrip() }}{% if message.content is string and message.content.startswith('A') %} (A){% endif %}<|eot|>
{% elif message.role == 'assistant' %}
{{ header('assistant') }}{{ message.content.split('|')[0].strip('\\n') }}<|eot|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

GENERATION = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- set shown = message.content %}
        {{- shown + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Earlier reasoning is taken out, the last turn always has a reasoning block.
THINKING = """\
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The same with a generation prompt that opens the reasoning block itself.
OPEN_THINKING = THINKING.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")


def turns(*contents, system=None):
    """user, assistant, user, ... with an optional system message in front."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ["user", "assistant"][i % 2], "content": c} for i, c in enumerate(contents)]


SHORT = turns("How many stones?", "12 ropes, 407 steps.")
LONG = turns("  A sailor asks:\n", "Grüße 👋🏽, naïve Zoë!\n\n", "日本語?", " мост 🧱\t|x", "e\u0301 and é", "three\r\nboats</b> ", system=" weigh it ")
TOOLS = turns("A question?", "calling", system="tools") + [
    {"role": "tool", "content": '{"a": "<é>"}'},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "the answer"},
]
REASONED = turns("one?", "<think>\nstones stones\n</think>\n\nthe answer", "two?", "plain\nlantern", "three?", "<think>why</think>three boats")

CASES = [
    ("chatml", CHATML, ["plain", "split"], [SHORT, LONG, TOOLS]),
    ("headers", HEADERS, ["plain", "split"], [SHORT, LONG, TOOLS]),
    ("inst", INST, ["plain", "split"], [SHORT, LONG, LONG[1:]]),
    ("zephyr", ZEPHYR, ["plain", "split"], [SHORT, LONG]),
    ("kitchen", KITCHEN, ["split"], [SHORT, LONG, TOOLS]),
    ("generation", GENERATION, ["plain"], [SHORT, LONG, TOOLS]),
    ("thinking", THINKING, ["plain"], [SHORT, REASONED, LONG]),
    ("open-thinking", OPEN_THINKING, ["plain"], [SHORT, REASONED]),
]
TEXTS = ["the assistant counts stones.", " Grüße 👋🏽\n\n", "a </s> b<|im_end|>\n"]
PAIRS = [
    ("How many stones?", "12 ropes."),
    ("日本語", "👋🏽 мост"),
    ("why?\n", "\n the answer "),
    ("spaces", "   then text"),
    ("stones", ""),
]


def untrimmed(tokenizer, text):
    """Ids and character offsets as the vocabulary cuts the text, without a post-processor's trimming."""
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.post_processor = processors.ByteLevel(trim_offsets=False)
    encoding = bare.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def overlapping(offsets, spans):
    """1 for each token some of whose characters lie in a span."""
    return [int(any(s < end and e > start for start, end in spans)) for s, e in offsets]


def spans_by_prefix(tokenizer, conversation, full):
    """Of each assistant turn, what is rendered after its generation prompt."""
    render = lambda messages, prompt: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    spans = []
    for i, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt, turn = render(conversation[:i], True), render(conversation[: i + 1], False)
            assert full.startswith(prompt) and full.startswith(turn) and turn.startswith(prompt)
            spans.append((len(prompt), len(turn)))
    return spans


def spans_by_pattern(name, conversation, full):
    """For templates that render a turn differently once another follows, read off the finished text."""
    opened = "assistant\n<think>\n" if name == "open-thinking" else "assistant\n"
    spans = []
    for found in re.finditer(r"<\|im_start\|>assistant\n.*?<\|im_end\|>\n", full, re.DOTALL):
        text = found.group()
        head = "<|im_start|>" + (opened if text.startswith("<|im_start|>" + opened) else "assistant\n")
        spans.append((found.start() + len(head), found.end()))
    return spans


def conversation_case(name, tokenizer, conversation):
    """What transformers makes of one conversation."""
    full = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids, offsets = untrimmed(tokenizer, full)
    encoded = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=name == "generation"
    )
    assert encoded["input_ids"] == ids
    if name == "generation":
        mask = encoded["assistant_masks"]
    else:
        by_pattern = name in ("thinking", "open-thinking")
        spans = spans_by_pattern(name, conversation, full) if by_pattern else spans_by_prefix(tokenizer, conversation, full)
        mask = overlapping(offsets, spans)
    return {
        "messages": conversation,
        "rendered": full,
        "prompted": prompt,
        "ids": ids,
        "scored": "".join(map(str, mask)),
    }


def plain_cases(tokenizer):
    """Text, and prompt and completion without a template."""
    texts = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    pairs = []
    for prompt, completion in PAIRS:
        text = prompt + "\n" + completion
        ids, offsets = untrimmed(tokenizer, text)
        whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        assert whole[1:-1] == ids
        mask = [0] + overlapping(offsets, [(len(prompt) + 1, len(text))]) + [1]
        pairs.append({"prompt": prompt, "completion": completion, "ids": whole, "scored": "".join(map(str, mask))})
    return {"texts": texts, "pairs": pairs}


def load(kind, template):
    """The tokenizer as transformers loads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes((HERE / f"{kind}.json").read_bytes())
        config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (Path(folder) / "chat_template.jinja").write_text(template, newline="")
        return AutoTokenizer.from_pretrained(folder)


def main():
    chat_template_utils.datetime = FixedClock
    HERE.mkdir(exist_ok=True)
    for kind, build in TOKENIZERS.items():
        text = json.dumps(json.loads(build().to_str()), ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{kind}.json").write_text(text + "\n")
    out = {
        "now": NOW.isoformat(),
        "plain": {kind: plain_cases(load(kind, None)) for kind in TOKENIZERS},
        "templates": [
            {
                "name": name,
                "tokenizer": kind,
                "template": template,
                "conversations": [conversation_case(name, load(kind, template), c) for c in conversations],
            }
            for name, template, kinds, conversations in CASES
            for kind in kinds
        ],
    }
    text = json.dumps(out, ensure_ascii=False, indent=1)
    # Number lists on one line keep the file small and its diffs readable.
    text = re.sub(r"\[\s+((?:\d+,\s+)*\d+)\s+\]", lambda m: "[" + re.sub(r"\s+", "", m.group(1)) + "]", text)
    (HERE / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
