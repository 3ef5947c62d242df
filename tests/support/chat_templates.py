"""Chat templates in the shapes that public models have, written for the tests."""

# ruff: noqa: E501 (templates are as long as models have them)
from __future__ import annotations

# Turns between two marks, an answer opened at the end.
CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

CHATML_DEFAULT_SYSTEM = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nBe of use.<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content | trim ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# The system text inside the first user turn, BOS before every pair, strict alternation.
INST_WITH_SYSTEM = """{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
    {% set turns = messages %}{% set system = false %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

INST_STRICT = """{{ bos_token }}{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}{{ raise_exception('only user and assistant roles') }}{%- endif -%}
{%- if (message.role == 'user') != (loop.index0 is even) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if message.role == 'user' -%}[INST] {{ message.content }} [/INST]{%- else -%}{{ message.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""

# Tools between marks of their own before the last user turn; a namespace counts.
INST_TOOLS = """{%- if tools is not defined %}{% set tools = none %}{% endif -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- set ns = namespace(index=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if tools is not none and message == users[-1] -%}
            {{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' ~ message.content ~ '[/INST]' -}}{%- set ns.index = ns.index + 1 -%}
    {%- elif message.role == 'assistant' -%}{{- ' ' ~ message.content ~ eos_token -}}
    {%- else -%}{{- '[SYSTEM_PROMPT]' ~ message.content ~ '[/SYSTEM_PROMPT]' -}}{%- endif -%}
{%- endfor -%}
{{- ns.index -}}
"""

# Headers, a date, and tools that may be missing altogether.
HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n" }}
{%- if tools is not none %}{{- "Tools: " }}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

PHI = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}
"""

# Takes text and lists of parts.
GEMMA_PARTS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception('wrong content') }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

# Thinking may be turned off, old thoughts are cut, tools come first.
QWEN_THINKING = """{%- if tools %}
    {{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

FULL_WIDTH_BARS = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', is_first=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
    {%- if ns.is_first %}{% set ns.system = ns.system + message['content'] %}{% set ns.is_first = false %}
    {%- else %}{% set ns.system = ns.system + '\n\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}
"""

DOCUMENTS = """{{ bos_token }}{%- if documents -%}
    <|SYSTEM|>{%- for document in documents -%}
Document: {{ loop.index0 }}
{% for key, value in document.items() %}{{ key }}: {{ value }}
{% endfor %}{%- endfor -%}<|END|>
{%- elif tools -%}<|TOOLS|>{{ tools | map(attribute='name') | join(', ') }}<|END|>{%- endif -%}
{%- for message in messages -%}
    {{- '<|START|><|' + message['role'] | upper + '|>' + message['content'].strip() + '<|END|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|START|><|CHATBOT|>' }}{%- endif -%}
"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = "Cut: April. Today: " + strftime_now('%B %d, %Y') + "." %}
    {%- if tools and documents %}{%- set system = system + " Both." %}{%- elif tools %}{%- set system = system + " Tools." %}
    {%- elif documents %}{%- set system = system + " Documents." %}{%- else %}{%- set system = system + " Neither." %}{%- endif %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- for message in rest %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
"""

FALCON = """{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}
{%- if message['role'] == 'system' %}{{ message['content'].strip() }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'].strip().replace('\r\n', '\n').replace('\n\n', '\n') }}
{%- elif message['role'] == 'assistant' %}{{ 'Falcon: ' + message['content'].strip() }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"""

VICUNA = """{%- set sep = ' ' -%}{%- set sep2 = eos_token if eos_token is defined else '</s>' -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + sep }}
{%- elif message.role == 'user' -%}USER: {{ message.content + sep }}
{%- else -%}ASSISTANT: {{ message.content + sep2 }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""

ALPACA = """{{ (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | first | default('Below is a task.', true)) }}

{% for message in messages | rejectattr('role', 'equalto', 'system') %}
{% if message.role == 'user' %}
### Instruction:
{{ message.content | trim -}}
{% else %}
### Response:
{{ message.content | trim -}}
{% endif %}
{% if not loop.last %}


{% endif %}
{% endfor %}
{% if add_generation_prompt and messages[-1].role != 'assistant' %}

### Response:
{% endif %}"""

OLMO = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}
{%- if not loop.last %}{{ message['content'] + eos_token + '\n' }}{% else %}{{ message['content'] + eos_token }}{% endif %}
{%- endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""

# Marks what the assistant says, and sets a variable inside that is not visible outside.
GENERATION_BLOCKS = """{% set seen = 'outside' %}{% for message in messages %}
{% if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{% set seen = 'inside' %}{{ message.content }}{{ seen }}<|im_end|>{% endgeneration %}{{ seen }}

{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

STARCHAT = """{%- set default = 'None' -%}{%- set found = messages[0].content if messages[0].role == 'system' else default -%}
{{- '<|system|>\n' + found + '<|end|>\n' -}}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
{%- if loop.index > 6 -%}{%- break -%}{%- endif -%}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else '' -}}"""

OPENCHAT = """{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""

SOLAR = """{% for message in messages %}{% if message['role'] == 'system' %}{% if message['content'] %}{{ '### System:\n' + message['content'] + '\n\n' }}{% endif %}{% elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ '### Assistant:\n' + message['content'] }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}{% endfor %}"""

# What undefined special tokens look like to those who ask.
SPECIALS = """{% for t in [bos_token, eos_token, unk_token, sep_token, cls_token, mask_token, pad_token, image_token] %}
{{ loop.index }}{{ t is defined }}{{ t if t is defined else '-' }}
{% endfor %}{{ documents is none }}{{ tools is defined }}{{ messages[0] | tojson }}{{ {'b': [1, '<é>'], 'a': none} | tojson(indent=1) }}
{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=[',', ':']) }}{{ dict(x=1).x }}{{ range(3) | list }}
{%- if unknown %}{{ unknown.deep }}{% endif %}"""

MACRO = """{%- macro turn(role, text) -%}{{ '[' ~ role ~ '] ' ~ text ~ '\n' }}{%- endmacro -%}
{{- bos_token if bos_token -}}{%- for m in messages -%}{{ turn(m['role'], m['content']) }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ turn('assistant', '') | trim }}{%- endif -%}"""

# Concatenates what may not be there.
FRAGILE = """{% for m in messages %}{{ m['role'] + m['content'] + m['name'] }}{% endfor %}"""

TEMPLATES = {name.lower(): text for name, text in list(globals().items()) if name.isupper() and isinstance(text, str)}
