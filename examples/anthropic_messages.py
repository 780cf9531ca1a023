"""A message, whole and streamed, and a tool call, with Anthropic's own client.

pip install anthropic
python examples/anthropic_messages.py [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import os
import sys

from anthropic import Anthropic

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")
client = Anthropic(base_url=url, api_key=os.environ.get("ANTHROPIC_API_KEY", "none"))
GREEDY = {"temperature": 0}  # the SDK has no parameter for it any more

message = client.messages.create(
    model=model, max_tokens=100, extra_body=GREEDY, messages=[{"role": "user", "content": "What is a stage?"}]
)
for block in message.content:
    if block.type == "text":
        print(block.text)

with client.messages.stream(
    model=model,
    max_tokens=100,
    extra_body=GREEDY,
    messages=[{"role": "user", "content": "What happens when a node dies?"}],
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print(f"\n{stream.get_final_message().usage.output_tokens} tokens")

called = client.messages.create(
    model=model,
    max_tokens=100,
    extra_body=GREEDY,
    messages=[{"role": "user", "content": "What is the weather in Berlin?"}],
    tools=[
        {
            "name": "weather",
            "description": "The weather of a city.",
            "input_schema": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris", "Tokyo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        }
    ],
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
)
for block in called.content:
    if block.type == "tool_use":
        print(f"the model calls {block.name}({block.input})")
