"""A chat, whole and streamed, with OpenAI's own client.

pip install openai
python examples/openai_chat.py [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is a stage?"}], temperature=0, max_tokens=100
)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What happens when a node dies?"}],
    temperature=0,
    max_tokens=100,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")
