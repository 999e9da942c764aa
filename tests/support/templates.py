"""Chat templates of each kind, by who writes the think tags.

Written after the documented behaviour of the releases: prompts of Qwen3-Thinking-2507 end with the
opening tag, so that a response has only the closing one; Qwen3-Instruct-2507 knows no thinking, and
ignores `enable_thinking`. Later hybrid models have the switch, and open the block where it is on.
"""

_HEAD = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>assistant\\n' }}"""
_THOUGHTS = """
{%- set text = m.content %}{%- set thoughts = m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}
{{- text }}"""
_TAIL = """
{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}
{%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nOPENED' }}{%- endif %}"""

_SWITCH = "<think>\\n' + ('' if enable_thinking | default(true) else '\\n</think>\\n\\n') + '"
OPENING_HYBRID = (_HEAD + _THOUGHTS + _TAIL).replace("OPENED", _SWITCH)
THINKING_ONLY = (_HEAD + _THOUGHTS + _TAIL).replace("OPENED", "<think>\\n")
INSTRUCT = (_HEAD + "{{- m.content }}" + _TAIL).replace("OPENED", "")
